from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trainfw.config import Config, PositiveInt, invalid

BYTE_VOCAB_SIZE = 256 + 2
"""The smallest byte-level vocabulary: every byte, `<|bos|>` and `<|eos|>`."""


class TokenizerConfig(Config):
    """How text becomes tokens."""

    name: Literal["bytes", "bpe", "file"] = "bytes"
    """`bytes`: one token a byte. `bpe`: byte-level BPE trained on the training split. `file`: a tokenizer.json."""
    vocab_size: int | None = Field(default=None, ge=BYTE_VOCAB_SIZE)
    """Tokens in the vocabulary, special tokens included; for `bpe` only."""
    path: str | None = None
    """A tokenizer.json, or a directory that holds one; for `file` only."""

    @model_validator(mode="after")
    def _fields_fit_the_name(self) -> TokenizerConfig:
        for field, owner in {"vocab_size": "bpe", "path": "file"}.items():
            given = getattr(self, field) is not None
            if given and self.name != owner:
                invalid(field, f"{field} is for `name: {owner}`, but name is {self.name!r}: remove one of them")
            if not given and self.name == owner:
                invalid(field, f"`name: {owner}` needs {field}")
        return self


class DataConfig(Config):
    """Where the text comes from, how it is tokenised, and how it is packed into rows."""

    source: str | list[str] = "python-stdlib"
    """`python-stdlib` (the text of Python's own library), or files, globs or directories: .txt, .md, .py (a document
    each), .jsonl, .parquet (a document a row), or a directory written by Hugging Face `save_to_disk`. Relative paths
    start at the working directory."""
    text_field: str = "text"
    """The key (JSONL) or column (Parquet, Hugging Face) that holds a document's text."""
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    """The tokenizer that turns text into tokens."""
    sequence_length: PositiveInt
    """Tokens in a row. Documents are concatenated and cut into rows of this length."""
    mask_documents: bool = True
    """Tokens attend to tokens of their own document only. Off, to all before them in the row: plain causal attention,
    which is what kernels compute (NKI's flash attention knows no documents)."""
    validation_fraction: float = Field(default=0.02, gt=0, lt=1)
    """The share of documents held out. A hash of its text decides a document's side."""
    max_documents: int | None = Field(default=None, ge=2)
    """Read no more than this many documents, in the order of the source."""
    shuffle: bool = True
    """Whether each epoch visits the training rows in a new random order, rather than in the order of the source."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the shuffle."""
    cache_dir: str | None = None
    """Where tokens are cached. By default `$XDG_CACHE_HOME/trainfw`, or `~/.cache/trainfw`."""
    prefetch: int = Field(default=4, ge=0, le=1024)
    """Batches read ahead of the step, in threads. 0 reads each batch when it is asked for."""
