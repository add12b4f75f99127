from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

Progress = Callable[[str, int, int | None], None]
"""Called as `progress(description, completed, total)`; `total` is None where it is not known beforehand."""


def reported(items: Iterable[T], description: str, total: int | None, progress: Progress | None) -> Iterator[T]:
    """Yield the same items and report each to `progress` once it has been used, and the true total at the end."""
    completed = 0
    for completed, item in enumerate(items, start=1):
        yield item
        if progress is not None:
            progress(description, completed, total)
    if progress is not None:
        progress(description, completed, completed)


def report_bytes(what: str, completed: int, total: int | None, progress: Progress | None) -> None:
    """Report bytes as megabytes, begun ones too."""
    if progress is not None:
        progress(f"{what}, MB", -(-completed // 10**6), None if total is None else -(-total // 10**6))
