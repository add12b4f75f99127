"""Tokenizers: Hugging Face `tokenizers` pipelines, so that a run's tokenizer is a plain tokenizer.json."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from trainfw.confined import LimitError, UnusableError, helper
from trainfw.data.added_tokens import TokenizerFiles
from trainfw.data.config import BYTE_VOCAB_SIZE, TokenizerConfig
from trainfw.data.pretokens import OURS
from trainfw.data.progress import Progress, reported
from trainfw.data.trials import guarded, opened
from trainfw.errors import UserError
from trainfw.formats import huggingface_tokenizer, read_header
from trainfw.json_text import TOKENIZER_LIMIT, read_json
from trainfw.paths import check_file, resolve_path
from trainfw.unfinished import write_text
from trainfw.utf8 import read_utf8

BOS, EOS = "<|bos|>", "<|eos|>"

GENERATION = "generation_config.json"

BATCH_BYTES = 2**20
"""Bytes of text tokenised at once: enough for every core, little enough for any memory."""
BPE_SAMPLE_BYTES = 64_000_000
"""Most bytes of text, from the start of the training split, that BPE is trained on: more would change few merges."""

_tried: set[bytes] = set()
"""Digests of the tokenizers that passed the helper's trial."""

FAILS = "the tokenizer fails"

_USUAL_BOS = (BOS, "<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>", "[BOS]", "<｜begin▁of▁sentence｜>")
_USUAL_EOS = (EOS, "</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<eos>", "[EOS]", "<｜end▁of▁sentence｜>")


@dataclass(frozen=True, repr=False)
class Tokenizer:
    """A tokenizer. It encodes the name of a special token within a text like any other text."""

    backend: tokenizers.Tokenizer
    bos_id: int
    """Token that starts every document; `eos_id` for a tokenizer that has no such token."""
    eos_id: int
    """Token that ends every document."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Other keys of its tokenizer_config.json (a chat template, say), which an export writes again."""
    stop_ids: tuple[int, ...] = ()
    """Further tokens at which its files stop generation. See `data.stop_ids`, which asks the template too."""
    template_file: Path | None = field(default=None, compare=False)
    """File that holds its chat template, for errors."""

    def __repr__(self) -> str:
        return f"<Tokenizer: {self.vocab_size:,} tokens, begins with {self.bos_id}, ends with {self.eos_id}>"

    def __post_init__(self) -> None:
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()

    @cached_property
    def reading_markers(self) -> tokenizers.Tokenizer:
        """Tokenizer that reads special tokens as such (`encode` does not), and adds none around a text."""
        # A byte-level post-processor would cut the spaces off the tokens' offsets.
        backend = self._with_post_processor(None)
        backend.encode_special_tokens = bool(self.settings.get("split_special_tokens"))
        return backend

    def _with_post_processor(self, form: dict[str, Any] | None) -> tokenizers.Tokenizer:
        state = json.loads(self.backend.to_str()) | {"post_processor": form}
        return tokenizers.Tokenizer.from_str(json.dumps(state))

    @property
    def vocab_size(self) -> int:
        """Largest id plus one."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the special tokens, by their text."""
        added = self.backend.get_added_tokens_decoder()
        return {token.content: id_ for id_, token in added.items() if token.special}

    def past(self, rows: int) -> list[tuple[int, str]]:
        """Return (id, token) of the tokens of text that have no row in an embedding of so many rows.

        Special tokens, which only a chat template writes, are left out.
        """
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        special = self.special_tokens.values()
        return sorted((id_, token) for token, id_ in vocabulary.items() if id_ >= rows and id_ not in special)

    @property
    def prefix_ids(self) -> list[int]:
        """Ids that the tokenizer itself puts before a text: often bos, often none."""
        with guarded(FAILS):
            encoding = self.backend.encode("a")
        if 0 not in encoding.special_tokens_mask:
            raise UserError(f"{FAILS}: what it puts around a text takes the text's place")
        return encoding.ids[: encoding.special_tokens_mask.index(0)]

    def starting_texts(self) -> Tokenizer:
        """Return a tokenizer that also starts a text with bos, as documents start in training."""
        bos = self.backend.id_to_token(self.bos_id)
        first, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        # The library's own constructor reads a token's name as a pattern.
        post = {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [self.bos_id], "tokens": [bos]}},
        }
        return replace(self, backend=self._with_post_processor(post))

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, with neither bos nor eos."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, on all cores."""
        with guarded(FAILS):
            return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; special tokens have none, and bytes that are not UTF-8 become U+FFFD."""
        with guarded(FAILS):
            return self.backend.decode(ids, skip_special_tokens=True)

    @cached_property
    def _is_byte_level(self) -> bool:
        decoder = json.loads(self.backend.to_str())["decoder"] or {}
        return "ByteLevel" in {decoder.get("type"), *(one["type"] for one in decoder.get("decoders", []))}

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token alone stands for, which may be part of a character; of a special one, its name.

        A token that the vocabulary does not have, such as a row that fills up an embedding, stands for none.
        """
        added = self.backend.get_added_tokens_decoder().get(token_id)
        if added is not None:
            return added.content.encode()
        piece = self.backend.id_to_token(token_id) or ""
        if self._is_byte_level:
            return bytes(_BYTES[name] for name in piece if name in _BYTES)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):  # as SentencePiece writes what it has no token for
            return bytes.fromhex(byte[1])
        return piece.replace("▁", " ").encode()

    def fingerprint(self) -> str:
        """Return a hash that tokenizers share only if they encode alike; tokens around a text do not count."""
        around, self.backend.post_processor = self.backend.post_processor, None
        state = f"{self.bos_id} {self.eos_id} {self.backend.to_str()}"
        self.backend.post_processor = around
        return hashlib.blake2b(state.encode(), digest_size=16).hexdigest()

    def save(self, directory: Path | str) -> None:
        """Write tokenizer.json and tokenizer_config.json as `load_tokenizer` and Transformers read them.

        Where generation stops at more than `eos_id`, generation_config.json is written too.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        usual = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        settings = usual | self.settings | {"eos_token": self.backend.id_to_token(self.eos_id)}
        if self.bos_id != self.eos_id:
            settings["bos_token"] = self.backend.id_to_token(self.bos_id)
        write_text(directory / "tokenizer.json", self.backend.to_str(pretty=True))
        write_text(directory / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        if set(self.stop_ids) - {self.eos_id}:
            stops = {"eos_token_id": list(dict.fromkeys([self.eos_id, *self.stop_ids]))}
            write_text(directory / GENERATION, json.dumps(stops, indent=2) + "\n")


class TextStream:
    """Decoder of tokens as they arrive, which holds back a character until all of its bytes are there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []  # the tokens of the last text given: a decoder may look at its left neighbour
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """Add a token and return the text that it completes; often a word, and empty within a character."""
        self._held.append(token_id)
        text = self._text()
        return "" if text.endswith("\ufffd") else self._give(text)

    def flush(self) -> str:
        """Return the text still held back, its incomplete characters as U+FFFD."""
        return self._give(self._text())

    def _text(self) -> str:
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._held)[len(before) :]

    def _give(self, text: str) -> str:
        if text:
            self._shown, self._held = self._held, []
        return text


def vocab_size(config: TokenizerConfig) -> int:
    """Return the vocabulary's size before any data is read."""
    if config.path is not None:
        return load_tokenizer(config.path).vocab_size
    return BYTE_VOCAB_SIZE if config.vocab_size is None else config.vocab_size


def byte_tokenizer() -> Tokenizer:
    """Make a tokenizer with one token a byte, whose id is the byte; bos is 256 and eos 257."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=dict(zip(_byte_names(), range(256))), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([BOS, EOS])
    return Tokenizer(backend, bos_id=256, eos_id=257)


def train_bpe(texts: Iterable[str], vocab_size: int, progress: Progress | None = None) -> Tokenizer:
    """Train byte-level BPE (lossless) of `vocab_size` tokens on the first `BPE_SAMPLE_BYTES` of `texts`.

    Raises UserError where there is too little text for so many tokens.
    """
    if vocab_size < BYTE_VOCAB_SIZE:
        raise UserError(f"vocab_size = {vocab_size}: expected {BYTE_VOCAB_SIZE} or more: every byte, and two markers")
    backend = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(OURS), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS], initial_alphabet=_byte_names(), show_progress=False
    )
    sample = first_bytes(texts, BPE_SAMPLE_BYTES)
    backend.train_from_iterator(reported(sample, "Training the tokenizer", None, progress), trainer)
    tokenizer = Tokenizer(backend, bos_id=0, eos_id=1)  # special tokens come first
    if tokenizer.vocab_size < vocab_size:
        raise UserError(
            f"tokenizer.vocab_size = {vocab_size}: the training split (data.source, less data.validation_fraction) is "
            f"too small for that; it gives {tokenizer.vocab_size} tokens at most"
        )
    return tokenizer


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load a tokenizer from a tokenizer.json, a directory that holds one, a run, a GGUF file, or `package:NAME`.

    The tokens that start and end a document are named by tokenizer_config.json or special_tokens_map.json beside it, or
    by the GGUF file; else they are those of the usual names. generation_config.json or config.json may name further
    tokens at which generation stops. Raises UserError where there is no tokenizer, or no token that ends a document.
    """
    path = resolve_path(path)
    if path.suffix == ".gguf":
        form, settings, stops = huggingface_tokenizer(read_header(path))
        backend = _backend(json.dumps(form), None, path)
        ids = _document_ids(backend, settings, path, "give tokenizer.ggml.eos_token_id")
        return Tokenizer(backend, *ids, settings, stops, path)
    if (path / "recipe.yaml").is_file():
        path = path / "tokenizer"
    file = path / "tokenizer.json" if path.is_dir() else path
    if not os.path.lexists(file):
        raise UserError(f"no tokenizer at {file}: expected a tokenizer.json, or a directory that holds one")
    text = _read(file, named=file == path)
    names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    config, special_tokens_map, added_tokens = (_json_object(file.parent / name) for name in names)
    files = TokenizerFiles(config, special_tokens_map, added_tokens, str(file.parent))
    backend = _backend(text, files, file)
    settings, template = files.settings(), file.parent / "chat_template.jinja"
    if os.path.lexists(template):
        settings["chat_template"] = _read(template)
    else:
        template = file.parent / names[0]
    ids = _document_ids(backend, files.roles(), file, f"name it as eos_token in {file.parent / names[0]}")
    return Tokenizer(backend, *ids, settings, _stop_ids(file.parent), template)


def _backend(text: str, files: TokenizerFiles | None, file: Path) -> tokenizers.Tokenizer:
    """Open the tokenizer in the text of a tokenizer.json, with the tokens that the files beside it add.

    The helper tries it first, once in a process. Raises UserError where it cannot be read, or does harm.
    """
    digest = hashlib.blake2b(f"{text}\0{files}".encode(errors="surrogatepass")).digest()
    try:
        if digest not in _tried:
            helper.call("data.trials:try_tokenizer", None, text, files)
            _tried.add(digest)
        backend = opened(text)
    except LimitError as error:
        raise UnusableError(f"{file}: the tokenizer {error}") from None
    except UnusableError as error:
        raise UnusableError(f"{file}: {error}") from error
    if files is not None:
        files.add_to(backend)
    return backend


def _read(file: Path, *, named: bool = False) -> str:
    """Read a text file of a model's directory, or one that the user `named`."""
    check_file(file, named=named)
    if (size := file.stat().st_size) > TOKENIZER_LIMIT:
        raise UserError(f"{file}: is {size:,} bytes; expected {TOKENIZER_LIMIT:,} at most")
    return read_utf8(file)


def _stop_ids(directory: Path) -> tuple[int, ...]:
    """Read `eos_token_id`, one id or a list, from generation_config.json, or else from config.json."""
    for name in (GENERATION, "config.json"):
        value = _json_object(directory / name).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(id_, int) and not isinstance(id_, bool) for id_ in ids):
            raise UserError(f"{directory / name}: eos_token_id = {str(value)[:60]}: expected an id, or a list of them")
        return tuple(dict.fromkeys(id_ for id_ in ids if id_ >= 0))
    return ()


def _document_ids(backend: tokenizers.Tokenizer, roles: dict[str, object], file: Path, advice: str) -> tuple[int, int]:
    """Return the ids of bos and eos. Raises UserError, with `advice`, where no token ends a document."""
    found: list[int | None] = []
    for role, usual in (("bos_token", _USUAL_BOS), ("eos_token", _USUAL_EOS)):
        named = roles.get(role)
        if isinstance(named, dict):  # a serialised AddedToken
            named = named.get("content")
        names = [named] if isinstance(named, str) else usual
        found.append(next((id_ for name in names if (id_ := backend.token_to_id(name)) is not None), None))
    bos, eos = found
    if eos is None:
        raise UserError(
            f"{file}: no token that ends a document; {advice} "
            f"(none of the usual names is in the vocabulary: {', '.join(_USUAL_EOS)})"
        )
    return eos if bos is None else bos, eos


def _json_object(path: Path) -> dict[str, Any]:
    return read_json(path) if os.path.lexists(path) else {}


def first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Yield the next texts, until they have so many bytes."""
    for text in texts:
        yield text
        limit -= len(text.encode())
        if limit <= 0:
            return


def _byte_names() -> list[str]:
    """Return, for each byte, the printable character by which byte-level vocabularies (as GPT-2's) write it."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = itertools.count(256)
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


_BYTES = {name: byte for byte, name in enumerate(_byte_names())}
