from __future__ import annotations

import os

from pydantic import Field, model_validator

from trainfw.config import Config, invalid
from trainfw.errors import did_you_mean

STORES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs")}
"""Object stores by scheme: the library that lists one, and the extra of trainfw that installs it. TensorStore itself
reads and writes the arrays."""

MANIFEST = "manifest.json"
"""File of a checkpoint that identifies it and lists its files."""


class CheckpointConfig(Config):
    """Times of saving, and the checkpoints to keep. The last step is always saved."""

    directory: str | None = None
    """Directory of the checkpoints: an absolute path, or a place in an object store such as s3://bucket/llama, for this
    run alone. Null: in the run's directory."""
    every: int = Field(default=1000, ge=0)
    """Save after every this many steps; 0: only at the end."""
    keep_last: int = Field(default=2, ge=1)
    """Keep this many of the newest checkpoints."""
    keep_every: int | None = Field(default=None, ge=1)
    """Beyond those, keep every checkpoint whose step is a multiple of this."""
    max_failures: int = Field(default=3, ge=0)
    """Saves in a row that may fail (a full disk, a store that does not answer) before the run does. The last save of
    a run may not."""

    @model_validator(mode="after")
    def _directory_is_a_place(self) -> CheckpointConfig:
        scheme, is_store, rest = (self.directory or "").partition("://")
        bucket, _, place = rest.partition("/")
        if is_store and scheme not in STORES:
            expected = f"expected a path, or a store by {' or '.join(f'{store}://' for store in STORES)}"
            invalid("directory", f"{expected}{did_you_mean(scheme, STORES)}")
        if self.directory == "" or (is_store and not (bucket and place.strip("/"))):
            invalid("directory", "expected a path, or a bucket and a place in it, such as s3://bucket/llama")
        if self.directory and not is_store and not os.path.isabs(os.path.expanduser(self.directory)):
            invalid("directory", "expected an absolute path, the same from everywhere, or a place in a store")
        return self
