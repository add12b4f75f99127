"""Conversion of a Hugging Face tokenizer to a GGUF file's metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainfw.errors import UserError
from trainfw.formats.gguf.token_types import PRE_TOKENIZERS, ROLES, SPACE, STOPS, Kind, canonical, implied_merges
from trainfw.json_text import TOKENIZER_LIMIT, read_json
from trainfw.utf8 import read_utf8

_GGML = "tokenizer.ggml"


def tokenizer_metadata(directory: Path, vocab_size: int) -> dict[str, object]:
    """Return the `tokenizer.*` keys for the tokenizer.json and tokenizer_config.json in a directory.

    They include the tokens at which its generation_config.json stops; besides eos, a GGUF file has a place for two.

    Args:
        vocab_size: rows of the embedding table; those without a token are listed as unused, as llama.cpp expects.

    Raises UserError for a tokenizer that llama.cpp has no name for.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"no {file}: a GGUF file holds the model's tokenizer")
    form, settings = _json(file), _json(directory / "tokenizer_config.json")
    model = form.get("model") or {}
    if model.get("type") != "BPE":
        raise UserError(f"{file}: a {model.get('type')} tokenizer has no place in a GGUF file: expected BPE")
    # Special tokens past the embedding are left out, as llama.cpp's converter does.
    form["added_tokens"] = [
        token for token in form.get("added_tokens") or () if token["id"] < vocab_size or not token.get("special")
    ]
    ids = {**model["vocab"], **{token["content"]: token["id"] for token in form["added_tokens"]}}
    if len(set(ids.values())) < len(ids) or (ids and max(ids.values()) >= vocab_size):
        raise UserError(
            f"{file}: {len(ids)} tokens with ids to {max(ids.values())}: the model's embedding has {vocab_size} rows"
        )
    tokens = [f"[PAD{id_}]" for id_ in range(vocab_size)]
    types: list[int] = [Kind.UNUSED] * vocab_size
    for token, id_ in ids.items():
        tokens[id_], types[id_] = token, Kind.NORMAL
    if len(set(tokens)) < len(tokens):
        raise UserError(f"{file}: two tokens of one name, counting [PAD<id>] for the rows that none has")
    for added in form["added_tokens"]:
        types[added["id"]] = Kind.CONTROL if added.get("special") else Kind.USER_DEFINED
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        metadata = _sentencepiece(file, form, types, merges, ids)
    elif merges:
        metadata = {
            f"{_GGML}.model": "gpt2",
            f"{_GGML}.pre": _pre_tokenizer(file, form),
            f"{_GGML}.merges": [" ".join(merge) for merge in merges],
            f"{_GGML}.add_space_prefix": False,
        }
    else:
        raise UserError(f"{file}: a tokenizer without merges, which llama.cpp does not read")
    metadata |= {f"{_GGML}.tokens": tokens, f"{_GGML}.token_type": [*map(int, types)]}
    roles = _json(directory / "special_tokens_map.json") | settings
    contents = {role: name.get("content") if isinstance(name, dict) else name for role, name in roles.items()}
    names = {role: contents[role] for role in ROLES if contents.get(role) in ids}
    metadata |= {f"{_GGML}.{ROLES[role]}": ids[name] for role, name in names.items()}
    eos = metadata.get(f"{_GGML}.eos_token_id")
    stops = _json(directory / "generation_config.json").get("eos_token_id")
    others = [id_ for id_ in (stops if isinstance(stops, list) else [stops]) if id_ not in (None, eos)]
    if len(others) > len(STOPS):
        raise UserError(
            f"{directory}: generation stops at the tokens {', '.join(map(str, others))} besides eos, and a GGUF file "
            f"has a place for {len(STOPS)}: take some out of generation_config.json's eos_token_id"
        )
    metadata |= {f"{_GGML}.{key}": id_ for key, id_ in zip(STOPS, others)}
    before, after = _around(form.get("post_processor"))
    for flag, role, there in (("add_bos_token", "bos_token", before), ("add_eos_token", "eos_token", after)):
        given = settings.get(flag)
        metadata[f"{_GGML}.{flag}"] = bool(names.get(role) in there if given is None else given)
    template = settings.get("chat_template")
    if (jinja := directory / "chat_template.jinja").is_file():
        template = read_utf8(jinja)
    elif isinstance(template, list):  # several by name
        defaults = [one for one in template if isinstance(one, dict) and one.get("name") == "default"]
        template = defaults[-1].get("template") if defaults else None
    if template and isinstance(template, str):
        metadata["tokenizer.chat_template"] = template
    return metadata


def _pre_tokenizer(file: Path, form: dict[str, Any]) -> str:
    """Return the name by which llama.cpp cuts text like this tokenizer. Raises UserError where it has none."""
    normalizer = (form.get("normalizer") or {}).get("type")
    steps = canonical(form.get("pre_tokenizer"))
    whole = form["model"].get("ignore_merges", False)
    for name, pre in sorted(PRE_TOKENIZERS.items(), key=lambda item: item[1].normalizer != normalizer):
        cuts_alike = canonical(pre.form) == steps and normalizer in (None, pre.normalizer)
        if cuts_alike and (pre.ignore_merges or not whole):
            return name
    raise UserError(
        f"{file}: llama.cpp has no name for how this tokenizer cuts text, and would cut it otherwise; "
        f"one of: {', '.join(PRE_TOKENIZERS)}. Start from a tokenizer of these kinds to run the model there"
    )


def _sentencepiece(
    file: Path, form: dict[str, Any], types: list[int], merges: list[tuple[str, ...]], ids: dict[str, int]
) -> dict[str, Any]:
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    if missing := [name for name in bytes_ if name not in ids]:
        raise UserError(f"{file}: byte_fallback without {len(missing)} of the 256 byte tokens <0x00> to <0xFF>")
    for name in bytes_:
        types[ids[name]] = Kind.BYTE
    if (unknown := form["model"].get("unk_token")) in ids:
        types[ids[unknown]] = Kind.UNKNOWN
    # The rank of a token is where it first comes in the merges; llama.cpp merges the best score first.
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    # llama.cpp merges any two pieces that make a token; merges of user-defined tokens may be listed or not.
    plain = {token: id_ for token, id_ in ids.items() if types[id_] in (Kind.NORMAL, Kind.BYTE, Kind.USER_DEFINED)}
    needed = {token: 0.0 for token, id_ in plain.items() if types[id_] == Kind.NORMAL}
    order = [ranks[left + right] for left, right in merges]
    each = [implied_merges(plain, of, file) for of in (needed, dict.fromkeys(plain, 0.0))]
    least, most = map(set, each)
    if not least <= set(merges) <= most or order != sorted(order):
        raise UserError(
            f"{file}: not a SentencePiece tokenizer: its merges are not those that its vocabulary implies, "
            "which is all that a GGUF file can say"
        )
    scores = [0.0] * len(types)
    for token, rank in (dict.fromkeys(needed, len(ranks)) | ranks).items():
        scores[ids[token]] = -float(rank)
    return {
        f"{_GGML}.model": "llama",
        f"{_GGML}.pre": "default",
        f"{_GGML}.scores": scores,
        f"{_GGML}.add_space_prefix": _space_prefix(file, form),
    }


def _space_prefix(file: Path, form: dict[str, Any]) -> bool:
    """Tell whether a space is put before a text. Raises UserError where spaces are not written as in SentencePiece."""
    match form.get("normalizer"), form.get("pre_tokenizer"):
        case {"type": "Sequence", "normalizers": [{"type": "Prepend"}, {"type": "Replace", "content": "▁"}]}, None:
            return True
        case {"type": "Replace", "content": "▁"}, None:
            return False
        case {"type": "Replace", "content": "▁"}, {"type": "Split", "pattern": {"String": " "}}:
            return False  # Gemma: by then there are no spaces left to split at
        case None, {"type": "Metaspace", "replacement": "▁"}:
            # Texts that start with a space differ from llama.cpp, as with files of llama.cpp's own converter.
            return form["pre_tokenizer"].get("prepend_scheme", "always") != "never"
    problem = f"byte_fallback without SentencePiece's spaces ({SPACE})"
    raise UserError(f"{file}: {problem}: llama.cpp would cut text otherwise")


def _around(post: dict[str, Any] | None) -> tuple[set[str], set[str]]:
    """Return the special tokens that a post-processor puts before and after a text."""
    sides: tuple[set[str], set[str]] = set(), set()
    for step in (post or {}).get("processors") or [post or {}]:
        after = False
        for piece in (step.get("single") or ()) if step.get("type") == "TemplateProcessing" else ():
            if "Sequence" in piece:
                after = True
            else:
                sides[after].add(piece["SpecialToken"]["id"])
    return sides


def _json(file: Path) -> dict[str, Any]:
    return read_json(file, TOKENIZER_LIMIT) if file.is_file() else {}
