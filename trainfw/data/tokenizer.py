"""Tokenizers. All are Hugging Face `tokenizers` pipelines, so a run's tokenizer is a plain tokenizer.json."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from trainfw.data.added_tokens import TokenizerFiles
from trainfw.data.config import BYTE_VOCAB_SIZE, TokenizerConfig
from trainfw.data.confined import LimitError, UnusableError, helper
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

BPE_SAMPLE_BYTES = 64_000_000
"""BPE is trained on no more text than this, from the start of the training split: more changes few merges."""

# GPT-4's split, with numbers cut into two digits (not three), as a small vocabulary has no room for a thousand numbers.
_SPLIT = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_tried: set[bytes] = set()
"""Digests of tokenizers that did no harm."""

FAILS = "the tokenizer fails"

_KNOWN_BOS = (BOS, "<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>", "[BOS]", "<｜begin▁of▁sentence｜>")
_KNOWN_EOS = (EOS, "</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<eos>", "[EOS]", "<｜end▁of▁sentence｜>")


@dataclass(frozen=True, repr=False)
class Tokenizer:
    """Text to token ids and back. A special token's name within a text is text like any other."""

    backend: tokenizers.Tokenizer
    bos_id: int
    """Starts every document; `eos_id` for a tokenizer that has no such token."""
    eos_id: int
    """Ends every document."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The rest of its tokenizer_config.json (a chat template, say), kept for those who export it."""
    stop_ids: tuple[int, ...] = ()
    """Where generation stops besides `eos_id`, as the files say. See `data.stop_ids`, which asks the template too."""
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
        """Reads special tokens as such, as `encode` does not, and puts nothing around a text."""
        # One of the byte-level post-processors would cut the spaces off the tokens' places.
        backend = self._with_post_processor(None)
        backend.encode_special_tokens = bool(self.settings.get("split_special_tokens"))
        return backend

    def _with_post_processor(self, form: dict[str, Any] | None) -> tokenizers.Tokenizer:
        state = json.loads(self.backend.to_str()) | {"post_processor": form}
        return tokenizers.Tokenizer.from_str(json.dumps(state))

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def past(self, rows: int) -> list[tuple[int, str]]:
        """Tokens that text may become, by their ids, for which an embedding of so many rows has none: special tokens,
        which only a chat template writes, are left out."""
        added = self.backend.get_added_tokens_decoder()
        special = {id_ for id_, token in added.items() if token.special}
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        return sorted((id_, token) for token, id_ in vocabulary.items() if id_ >= rows and id_ not in special)

    @property
    def prefix_ids(self) -> list[int]:
        """What the tokenizer itself puts before a text that stands alone: often bos, often nothing."""
        with guarded(FAILS):
            encoding = self.backend.encode("a")
        if 0 not in encoding.special_tokens_mask:
            raise UserError(f"{FAILS}: what it puts around a text takes the text's place")
        return encoding.ids[: encoding.special_tokens_mask.index(0)]

    def starting_texts(self) -> Tokenizer:
        """The same, but that a text which stands alone starts with bos, as documents do in training."""
        bos = self.backend.id_to_token(self.bos_id)
        first, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        # The library's own constructor would read a token's name as a pattern.
        post = {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [self.bos_id], "tokens": [bos]}},
        }
        return replace(self, backend=self._with_post_processor(post))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with neither bos nor eos."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, on all cores."""
        with guarded(FAILS):
            return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens have none, and bytes that are not UTF-8 become U+FFFD."""
        with guarded(FAILS):
            return self.backend.decode(ids, skip_special_tokens=True)

    def fingerprint(self) -> str:
        """Two tokenizers with one fingerprint encode alike: what they put around a text is not asked for here."""
        around, self.backend.post_processor = self.backend.post_processor, None
        state = f"{self.bos_id} {self.eos_id} {self.backend.to_str()}"
        self.backend.post_processor = around
        return hashlib.blake2b(state.encode(), digest_size=16).hexdigest()

    def save(self, directory: Path | str) -> None:
        """Write tokenizer.json, tokenizer_config.json and, where generation stops at more than `eos_id`,
        generation_config.json, as `load_tokenizer` and Transformers read them."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self.settings,
        }
        settings["eos_token"] = self.backend.id_to_token(self.eos_id)
        if self.bos_id != self.eos_id:
            settings["bos_token"] = self.backend.id_to_token(self.bos_id)
        write_text(directory / "tokenizer.json", self.backend.to_str(pretty=True))
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        write_text(directory / "tokenizer_config.json", text + "\n")
        if set(self.stop_ids) - {self.eos_id}:
            stops = {"eos_token_id": list(dict.fromkeys([self.eos_id, *self.stop_ids]))}
            write_text(directory / GENERATION, json.dumps(stops, indent=2) + "\n")


class TextStream:
    """Decodes tokens as they arrive, holding back a character until all of its bytes are there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []  # the tokens of the last text given: a decoder may look at its left neighbour
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; often a word, and empty within a character."""
        self._held.append(token_id)
        text = self._text()
        return "" if text.endswith("\ufffd") else self._give(text)

    def flush(self) -> str:
        """The text still held back, its incomplete characters as U+FFFD."""
        return self._give(self._text())

    def _text(self) -> str:
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._held)[len(before) :]

    def _give(self, text: str) -> str:
        if text:
            self._shown, self._held = self._held, []
        return text


def vocab_size(config: TokenizerConfig) -> int:
    """The vocabulary's size, known before any data is read."""
    if config.name == "bytes":
        return BYTE_VOCAB_SIZE
    if config.name == "bpe":
        assert config.vocab_size is not None
        return config.vocab_size
    assert config.path is not None
    return load_tokenizer(config.path).vocab_size


def byte_tokenizer() -> Tokenizer:
    """One token a byte, whose id is the byte; bos is 256 and eos 257."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=dict(zip(_byte_names(), range(256))), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([BOS, EOS])
    return Tokenizer(backend, bos_id=256, eos_id=257)


def train_bpe(texts: Iterable[str], vocab_size: int, progress: Progress | None = None) -> Tokenizer:
    """Byte-level BPE of `vocab_size` tokens, trained on the first `BPE_SAMPLE_BYTES` of `texts`; lossless.

    Raises UserError where there is too little text for so many tokens.
    """
    if vocab_size < BYTE_VOCAB_SIZE:
        raise UserError(f"vocab_size = {vocab_size}: expected {BYTE_VOCAB_SIZE} or more: every byte, and two markers")
    backend = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(_SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=_byte_names(),
        show_progress=False,
    )
    sample = _first_bytes(texts, BPE_SAMPLE_BYTES)
    backend.train_from_iterator(reported(sample, "Training the tokenizer", None, progress), trainer)
    tokenizer = Tokenizer(backend, bos_id=0, eos_id=1)  # special tokens come first
    if tokenizer.vocab_size < vocab_size:
        raise UserError(
            f"tokenizer.vocab_size = {vocab_size}: the training split (data.source, less data.validation_fraction) is "
            f"too small for that; it gives {tokenizer.vocab_size} tokens at most"
        )
    return tokenizer


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer of a tokenizer.json, of a directory that holds one (what `Tokenizer.save` wrote, say), of a run, of
    a GGUF file, or of `package:NAME`.

    Which tokens start and end a document is read from the tokenizer_config.json or special_tokens_map.json beside
    it, or from the GGUF file, else from the usual names; where generation stops, from generation_config.json or
    config.json too. Raises UserError where there is no such file, or no token that ends a document.
    """
    path = resolve_path(path)
    if path.suffix == ".gguf":
        return _from_gguf(path)
    if (path / "recipe.yaml").is_file():
        path = path / "tokenizer"
    file = path / "tokenizer.json" if path.is_dir() else path
    if not os.path.lexists(file):
        raise UserError(f"no tokenizer at {file}: expected a tokenizer.json, or a directory that holds one")
    text = _read(file, named=file == path)
    names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    settings, special_tokens_map, added_tokens = (_json_object(file.parent / name) for name in names)
    files = TokenizerFiles(settings, special_tokens_map, added_tokens, str(file.parent))
    backend = _backend(text, files, file)
    settings = files.settings()
    template = file.parent / "chat_template.jinja"
    if os.path.lexists(template):
        settings["chat_template"] = _read(template)
    else:
        template = file.parent / names[0]
    advice = f"name it as eos_token in {file.parent / 'tokenizer_config.json'}"
    stops = _stop_ids(file.parent)
    return Tokenizer(backend, *_document_ids(backend, files.roles(), file, advice), settings, stops, template)


def _from_gguf(file: Path) -> Tokenizer:
    form, settings, stops = huggingface_tokenizer(read_header(file))
    backend = _backend(json.dumps(form), None, file)
    ids = _document_ids(backend, settings, file, "give tokenizer.ggml.eos_token_id")
    return Tokenizer(backend, *ids, settings, stops, file)


def _backend(text: str, files: TokenizerFiles | None, file: Path) -> tokenizers.Tokenizer:
    """The tokenizer in the text of a tokenizer.json with the tokens of the files beside it; tried by the helper first,
    once in a process.

    Raises UserError where it is none, or does something that no tokenizer needs.
    """
    digest = hashlib.blake2b(f"{text}\0{files}".encode(errors="surrogatepass")).digest()
    try:
        if digest not in _tried:
            helper.call("trials:try_tokenizer", None, text, files)
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
    """The text of a file of a model's directory, or of one that was named."""
    check_file(file, named=named)
    if (size := file.stat().st_size) > TOKENIZER_LIMIT:
        raise UserError(f"{file}: is {size:,} bytes; expected {TOKENIZER_LIMIT:,} at most")
    return read_utf8(file)


def _stop_ids(directory: Path) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json or, where that says nothing, of config.json: one id, or a list."""
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
    """The ids of bos and eos. Raises UserError, with what to do, where nothing ends a document."""
    eos = _special_id(backend, roles.get("eos_token"), _KNOWN_EOS)
    bos = _special_id(backend, roles.get("bos_token"), _KNOWN_BOS)
    if eos is None:
        raise UserError(
            f"{file}: no token that ends a document; {advice} "
            f"(none of the usual names is in the vocabulary: {', '.join(_KNOWN_EOS)})"
        )
    return eos if bos is None else bos, eos


def _special_id(backend: tokenizers.Tokenizer, named: object, known: Iterable[str]) -> int | None:
    if isinstance(named, dict):  # a serialised AddedToken
        named = named.get("content")
    names = [named] if isinstance(named, str) else known
    return next((id_ for name in names if (id_ := backend.token_to_id(name)) is not None), None)


def _json_object(path: Path) -> dict[str, Any]:
    return read_json(path) if os.path.lexists(path) else {}


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    seen = 0
    for text in texts:
        yield text
        seen += len(text.encode())
        if seen >= limit:
            return


def _byte_names() -> list[str]:
    """The printable character by which byte-level vocabularies (GPT-2's and since) write each byte, by byte."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = itertools.count(256)
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]
