from __future__ import annotations

import numpy as np

from trainfw.data.store import TokenStore
from trainfw.errors import UserError

FIELDS = {
    "tokens": np.int32,  # the inputs
    "targets": np.int32,  # the token after each input
    "segment_ids": np.int32,  # 1, 2, ... by document within the row; 0 is padding
    "positions": np.int32,  # within the document's part of this row, from 0
    "loss_mask": np.float32,  # 1 where the target continues the input's document, else 0
}
"""The arrays of a row, each (S,), and their types."""


class Rows:
    """A store cut into rows of S tokens: row i has inputs [i*S, i*S + S) of the stream, and their next tokens.

    The rows together predict every token but each document's first (its bos) exactly once; the last row is padded
    with zeros. Rows are found by arithmetic, so any S can be read from one store.
    """

    def __init__(self, store: TokenStore, sequence_length: int) -> None:
        self.store = store
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return -(-(self.store.num_tokens - 1) // self.sequence_length)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The arrays named in `FIELDS`, each (S,). Raises IndexError outside [0, len)."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start = index * self.sequence_length
        stream = self.store.tokens[start : start + self.sequence_length + 1]
        place = np.arange(start, start + len(stream))
        document = np.searchsorted(self.store.offsets, place, side="right") - 1
        part_start = np.maximum(self.store.offsets[document], start)
        row = {
            "tokens": stream[:-1],
            "targets": stream[1:],
            "segment_ids": (document - document[0] + 1)[:-1],
            "positions": (place - part_start)[:-1],
            "loss_mask": document[1:] == document[:-1],
        }
        padding = (0, self.sequence_length + 1 - len(stream))
        return {name: np.pad(values.astype(FIELDS[name]), padding) for name, values in row.items()}

    def require(self, count: int) -> None:
        """Raise UserError unless there are `count` rows at least."""
        if len(self) < count:
            raise UserError(
                f"{self.store.num_tokens} training tokens make {len(self)} rows of {self.sequence_length}, "
                f"fewer than the {count} of one batch; give more data, or shorten sequence_length or the batch"
            )
