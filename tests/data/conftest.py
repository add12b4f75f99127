import json
from pathlib import Path

import numpy as np
import pytest

from trainfw.data import DataConfig, TokenStore


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A JSONL file of 200 short documents, all different."""
    path = tmp_path / "corpus.jsonl"
    rows = [{"text": f"Document {i}: " + f"line {i * i} of words and words; " * (1 + i % 5)} for i in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(
        source=str(corpus), sequence_length=32, validation_fraction=0.1, cache_dir=str(tmp_path / "cache")
    )


def make_store(lengths: list[int]) -> TokenStore:
    """Documents of these lengths; every token of the stream differs from the others, and none is 0."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(1, offsets[-1] + 1, dtype=np.uint32)
    return TokenStore(tokens, offsets, num_bytes=int(offsets[-1]), digest=f"{lengths}")
