"""Conversion of a GGUF file's tokenizer to Hugging Face's form: tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

from collections import Counter
from typing import Any

from trainfw.errors import UserError, short
from trainfw.formats.gguf.header import Header, known_or_refuse
from trainfw.formats.gguf.token_types import ALIASES, PRE_TOKENIZERS, ROLES, SPACE, STOPS, Kind, implied_merges

_GGML = "tokenizer.ggml"
MAX_TOKENS, MAX_TOKEN, MAX_LETTERS = 1 << 19, 1_000, 1 << 22
"""Most tokens, letters of a token, and letters of all: the largest vocabularies have about half of that."""
NONE = 0xFFFFFFFF
"""Id that some files write where there is no token."""


def huggingface_tokenizer(header: Header) -> tuple[dict[str, object], dict[str, object], tuple[int, ...]]:
    """Return a GGUF file's tokenizer.json, tokenizer_config.json, and ids at which generation stops besides eos.

    The model is byte-level BPE (`gpt2`) or SentencePiece BPE (`llama`). Raises UserError for other models, for an
    unknown pre-tokenizer, and for lists that do not fit together.
    """
    build = known_or_refuse(header, f"{_GGML}.model", {"gpt2": _byte_level, "llama": _sentencepiece})
    tokens = header.items(f"{_GGML}.tokens", str)
    if not tokens:
        raise UserError(f"{header.file}: {_GGML}.tokens is empty")
    types = header.items(f"{_GGML}.token_type", int) if f"{_GGML}.token_type" in header.metadata else []
    if types and len(types) != len(tokens):
        raise UserError(f"{header.file}: {_GGML}.token_type has {len(types)} elements, tokens has {len(tokens)}")
    # Sizes whose tokenizer takes minutes to build are refused.
    if len(tokens) > MAX_TOKENS:
        raise UserError(f"{header.file}: {_GGML}.tokens has {len(tokens):,} tokens: expected {MAX_TOKENS:,} at most")
    longest, letters = max(tokens, key=len), sum(map(len, tokens))
    if len(longest) > MAX_TOKEN:
        has = f"{short(longest)}, of {len(longest):,} letters"
        raise UserError(f"{header.file}: {_GGML}.tokens has {has}: expected {MAX_TOKEN:,} at most")
    if letters > MAX_LETTERS:
        raise UserError(f"{header.file}: {_GGML}.tokens has {letters:,} letters: expected {MAX_LETTERS:,} at most")
    if len(set(tokens)) < len(tokens):
        twice, _ = Counter(tokens).most_common(1)[0]
        raise UserError(f"{header.file}: {_GGML}.tokens has {short(twice)} twice")
    named = {}
    for key in (*ROLES.values(), *STOPS):
        if (id_ := header.get(f"{_GGML}.{key}", int, NONE)) != NONE:
            if not 0 <= id_ < len(tokens):
                raise UserError(f"{header.file}: {_GGML}.{key} = {id_}: the vocabulary has {len(tokens)} tokens")
            named[key] = id_
    settings: dict[str, Any] = {role: tokens[named[key]] for role, key in ROLES.items() if key in named}
    stops = tuple(named[key] for key in STOPS if key in named)
    form = build(header, tokens, types, settings)
    kinds = dict(zip(tokens, types))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    form["added_tokens"] = [
        {"id": id_, "content": token, **flags, "special": kinds.get(token) != Kind.USER_DEFINED}
        for id_, token in enumerate(tokens)
        if kinds.get(token) in (Kind.CONTROL, Kind.USER_DEFINED) or token in settings.values() or id_ in stops
    ]
    # llama.cpp's own defaults: without these keys, SentencePiece models start with bos.
    add_bos = header.get(f"{_GGML}.add_bos_token", bool, build is _sentencepiece) and "bos_token" in settings
    add_eos = header.get(f"{_GGML}.add_eos_token", bool, False) and "eos_token" in settings
    if add_bos or add_eos:
        bos, eos = [settings["bos_token"]] * add_bos, [settings["eos_token"]] * add_eos
        form["post_processor"] = _template(bos, eos, {token: id_ for id_, token in enumerate(tokens)})
    settings |= {"add_bos_token": add_bos, "add_eos_token": add_eos}
    if "tokenizer.chat_template" in header.metadata:
        settings["chat_template"] = header.get("tokenizer.chat_template", str)
    return form, settings, stops


def _byte_level(header: Header, tokens: list[str], _types: list[int], _settings: dict[str, Any]) -> dict[str, object]:
    name = header.get(f"{_GGML}.pre", str, "default")
    names = {**PRE_TOKENIZERS, **{alias: PRE_TOKENIZERS[of] for alias, of in ALIASES.items()}}
    pre = known_or_refuse(header, f"{_GGML}.pre", names) if name != "default" else PRE_TOKENIZERS[name]
    merges = [merge.split(" ") for merge in header.items(f"{_GGML}.merges", str)]
    vocabulary = set(tokens)
    for merge in merges:
        if len(merge) != 2 or not vocabulary.issuperset((*merge, "".join(merge))):
            shown = short(" ".join(merge))
            raise UserError(f"{header.file}: {_GGML}.merges has {shown}: expected two tokens that make one")
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    normalizer = {"type": pre.normalizer} if pre.normalizer else None
    model = _bpe(tokens, merges, ignore_merges=pre.ignore_merges)
    return _form(model, normalizer=normalizer, pre_tokenizer=dict(pre.form), decoder=byte_level)


def _sentencepiece(header: Header, tokens: list[str], types: list[int], settings: dict[str, Any]) -> dict[str, object]:
    gemma = header.architecture.startswith("gemma")
    # llama.cpp's converter writes a token that is a run of spaces with plain spaces.
    tokens[:] = [SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]
    scores = header.items(f"{_GGML}.scores", float)
    if len(scores) != len(tokens):
        raise UserError(f"{header.file}: {_GGML}.scores has {len(scores)} elements, tokens has {len(tokens)}")
    ids = {token: id_ for id_, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        raise UserError(f"{header.file}: {_GGML}.tokens has a run of spaces twice")
    kinds = types or [Kind.NORMAL] * len(tokens)
    plain = {id_ for id_, kind in enumerate(kinds) if kind not in (Kind.CONTROL, Kind.UNKNOWN)}
    # Gemma's merges follow the order of its tokens, not their scores.
    ranks = {token: float(id_) if gemma else -scores[id_] for token, id_ in ids.items() if id_ in plain}
    first = next((token for token, kind in zip(tokens, kinds) if kind == Kind.UNKNOWN), None)
    to_space: dict[str, Any] = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    from_space: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoders = [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if header.get(f"{_GGML}.add_space_prefix", bool, not gemma):
        prepend = {"type": "Prepend", "prepend": SPACE}
        normalizer: dict[str, Any] = {"type": "Sequence", "normalizers": [prepend, from_space]}
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    else:
        normalizer = from_space
    merges = implied_merges({token: id_ for token, id_ in ids.items() if id_ in plain}, ranks, header.file)
    model = _bpe(
        tokens, [*map(list, merges)], unk_token=settings.get("unk_token") or first, fuse_unk=True, byte_fallback=True
    )
    return _form(model, normalizer=normalizer, pre_tokenizer=None, decoder={"type": "Sequence", "decoders": decoders})


def _form(model: dict[str, Any], **parts: dict[str, Any] | None) -> dict[str, Any]:
    fixed: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": []}
    return {**fixed, "post_processor": None, **parts, "model": model}


def _bpe(tokens: list[str], merges: list[list[str]], **changes: object) -> dict[str, object]:
    return {
        "type": "BPE",
        **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
        **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
        **changes,
        "vocab": {token: id_ for id_, token in enumerate(tokens)},
        "merges": merges,
    }


def _template(before: list[str], after: list[str], ids: dict[str, int]) -> dict[str, object]:
    """Return the post-processor that puts special tokens around a text."""

    def text(name: str) -> list[dict[str, object]]:
        kinds = [
            *(("SpecialToken", one) for one in before),
            ("Sequence", name),
            *(("SpecialToken", one) for one in after),
        ]
        return [{kind: {"id": id_, "type_id": 0}} for kind, id_ in kinds]

    return {
        "type": "TemplateProcessing",
        "single": text("A"),
        "pair": [*text("A"), *text("B")],
        "special_tokens": {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in (*before, *after)},
    }
