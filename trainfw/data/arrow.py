"""Rows of Arrow's tables, in Parquet files and saved datasets, as the JSON that they were made from.

A column has one type, so Arrow gives every struct of it every key that one of them has, null where it was absent. A
null in a struct is therefore dropped: JSON's own null cannot be told from it (JSONL and columns of JSON text keep it).
Nor can the order of keys be told, nor an integer in a column that also has fractions.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from trainfw.data.compressed import File
from trainfw.errors import RunError, UserError, pip_install
from trainfw.paths import check_file

Choose = Callable[[list[str]], list[str]]
"""Function from the columns of a table to those to read. Raises UserError where one is missing."""
SAVED = "/"
"""Kind of a saved dataset, which is a directory."""


class Table(Protocol):
    """Some rows of an Arrow table."""

    schema: Any

    def to_pylist(self) -> list[dict[str, object]]: ...


ReadTables = Callable[..., Iterator[Table]]
"""Function that yields the tables at a path, with the columns that a `Choose` picks."""
_Convert = Callable[[Any], Any]
_TEXT = ("string", "large_string", "string_view")


class NotText:
    """A value that JSON cannot write, such as a time: a template that writes it fails, and the row is refused."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return self.kind

    def __str__(self) -> str:
        raise TypeError(f"{self.kind} is not text")

    def __format__(self, _form: str) -> str:
        return str(self)


def parquet_tables(path: File, choose: Choose, rows: int = 1024, first: int = 0) -> Iterator[Table]:
    """Yield a Parquet file, from its row `first` on, as tables of so many `rows`. Raises UserError where it is none.

    Groups of rows before that are not read.
    """
    if isinstance(path, Path):
        check_file(path, named=True)
    with _reading(path, "a Parquet file"):
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path if isinstance(path, Path) else path.open()) as file:
            columns = choose(file.schema_arrow.names)
            groups = range(file.num_row_groups)
            while groups and first >= (size := file.metadata.row_group(groups[0]).num_rows):
                groups, first = groups[1:], first - size
            for table in file.iter_batches(columns=columns, batch_size=rows, row_groups=list(groups)):
                if first < len(table):
                    yield table.slice(first)
                first = max(first - len(table), 0)


def saved_dataset_tables(path: File, choose: Choose, rows: int = 1024, first: int = 0) -> Iterator[Table]:
    """Yield a directory written by Hugging Face `save_to_disk`, from its row `first` on, as tables of so many `rows`.

    Of its splits, if it has several, it is `train`.
    """
    with _reading(path, "a saved dataset"):
        import datasets

        dataset = datasets.load_from_disk(str(path))
        if isinstance(dataset, datasets.DatasetDict):
            if "train" not in dataset:
                splits = f"such as {path}/SPLIT ({', '.join(dataset)})"
                raise UserError(f"{path}: no `train` split; name one split's directory, {splits}")
            dataset = dataset["train"]
        chosen = dataset.select_columns(choose(dataset.column_names)).skip(first)
        yield from chosen.with_format("arrow").iter(batch_size=rows)


@contextlib.contextmanager
def _reading(path: File, kind: str) -> Iterator[None]:
    """Raise UserError where a library is missing, or cannot read the file as this kind (in words)."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{path}: reading {kind} needs {error.name}: {pip_install('datasets')}") from error
    except (UserError, RunError, OSError):
        raise
    except Exception as error:  # what the libraries make of a damaged file is not written down
        raise UserError(f"{path}: not {kind} that can be read: {error}") from error


def table_rows(tables: Iterable[Table]) -> Iterator[dict[str, object]]:
    """Yield the rows of tables, without what JSON cannot write."""
    for table in tables:
        columns = {field.name: _converter(field.type) for field in table.schema}
        for row in table.to_pylist():
            yield {name: _converted(columns[name], value) for name, value in row.items()}


def _converter(kind: Any) -> _Convert | None:
    """Return the function that turns an Arrow type's values (not null) into JSON's; None where they are so already."""
    import pyarrow

    types = pyarrow.types
    if isinstance(kind, pyarrow.BaseExtensionType):
        return json.loads if kind.extension_name == "arrow.json" else lambda _: NotText(str(kind))
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _converter(kind.value_type)
    if types.is_struct(kind):
        fields = {field.name: _converter(field.type) for field in kind}
        return lambda value: {k: _converted(fields[k], one) for k, one in value.items() if one is not None}
    if types.is_map(kind) and str(kind.key_type) in _TEXT:
        items = _converter(kind.item_type)
        return lambda value: {key: _converted(items, one) for key, one in value}
    if types.is_nested(kind) and hasattr(kind, "value_type"):  # the kinds of lists
        inner = _converter(kind.value_type)
        return inner and (lambda value: [_converted(inner, one) for one in value])
    plain = (types.is_integer, types.is_floating, types.is_boolean, types.is_null)
    if str(kind) in _TEXT or any(is_plain(kind) for is_plain in plain):
        return None
    return lambda _: NotText(str(kind))


def _converted(convert: _Convert | None, value: object) -> object:
    return value if convert is None or value is None else convert(value)
