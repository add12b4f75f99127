"""Files of rows, a line of JSON each, that a run adds to as it goes: read by type, whatever a crash left in them."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from trainfw.errors import UserError
from trainfw.unfinished import write_text

Row: TypeAlias = Mapping[str, Any]
Whole = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[float, Field(ge=0, le=1e10)]
_LINE_BYTES = 2**24
"""A longer line is no row of ours."""


class RowModel(BaseModel):
    """Fields that a row must have to be used."""

    model_config = ConfigDict(strict=True, extra="allow")
    step: Whole


class MetricsRow(RowModel):
    __pydantic_extra__: dict[str, FiniteFloat | None] = Field(init=False)


class EvaluationRow(RowModel):
    __pydantic_extra__: dict[str, FiniteFloat] = Field(init=False)
    example: Whole
    prompt: str
    reference: str
    output: str
    max_tokens: Whole


class FaultRow(RowModel):
    __pydantic_extra__: dict[str, FiniteFloat | str] = Field(init=False)
    kind: Literal["non_finite", "spike", "growth"]
    policy: Literal["stop", "skip", "rollback", "none"]
    row: Whole
    rows: Annotated[int, Field(ge=1, le=2**22)]


class SessionRow(RowModel):
    __pydantic_extra__: dict[str, Seconds] = Field(init=False)
    session: Annotated[int, Field(ge=0, le=10**6)]
    from_: Annotated[int, Field(alias="from", ge=0, lt=2**63)]
    started: Annotated[float, Field(ge=-1e12, le=1e12)]
    time: Annotated[float, Field(ge=-1e12, le=1e12)]
    end: str | None = None
    changed: Any = None
    boot: str | None = None
    uptime: Seconds | None = None


def stream_rows(file: Path, kind: type[RowModel], *, all_count: bool = False) -> Iterator[dict[str, Any]]:
    """Give the rows of a file, which need not be there, in order, holding one at a time.

    A line that a crash cut short is left out: what it was to say, the session that goes on says again. So is, with a
    warning, any other that is no such row; where `all_count`, UserError is raised, which says what is wrong with it.
    """
    problems = []
    for number, line in _lines(file):
        try:
            row = json.loads(line, parse_constant=_refuse)
            kind.model_validate(row)
        except ValidationError as error:
            problems.append(f"line {number}: {_problem(error)}")
        except (ValueError, RecursionError) as error:
            if not line.startswith("{") or line.endswith("}"):  # else it is torn
                problems.append(f"line {number}: is no JSON ({str(error)[:60]})")
        else:
            yield row
    if problems and all_count:
        raise UserError(f"{file}, {problems[0]}; put it right, or delete the line to go on without what it says")
    if problems:
        more = f" (and {len(problems) - 1:,} more)" if problems[1:] else ""
        warnings.warn(f"{file}: left out: {problems[0]}{more}", stacklevel=1)  # said once, whoever reads it


def append_rows(file: Path, rows: Iterable[Row], *, durable: bool = False) -> None:
    """Add rows; after a line that was cut short, on a new one. Raises OSError, with nothing added.

    Args:
        durable: they are on disk when this returns.
    """
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        end = os.lseek(descriptor, 0, os.SEEK_END)
        if end and os.pread(descriptor, 1, end - 1) != b"\n":
            data = b"\n" + data
        try:
            while data:
                data = data[os.write(descriptor, data) :]
            if durable:
                os.fsync(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, end)
            raise
    finally:
        os.close(descriptor)


def rewrite_rows(file: Path, rows: Iterable[Row]) -> None:
    """Put these rows in the place of a file's. Raises OSError, with the file as it was."""
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    if not file.is_file():
        return
    with file.open("rb") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(_LINE_BYTES), b""), start=1):
            if text := line.decode("utf-8", "replace").strip("\0 \t\r\n"):  # a power loss leaves zeros
                yield number, text


def _problem(error: ValidationError) -> str:
    first = error.errors()[0]
    key, what = ".".join(map(str, first["loc"])), first["msg"].replace("Input should be", "expected")
    if not key:
        return f"expected a row, {{...}}, not {first['input']!r:.60}"
    return f"{key} is missing" if first["type"] == "missing" else f"{key} = {json.dumps(first['input'])[:60]}: {what}"


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")
