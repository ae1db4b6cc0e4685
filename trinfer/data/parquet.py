"""Lines of JSON to Parquet: which columns there are, and of which types, is known only after the last row."""

from __future__ import annotations

import itertools
import json
import re
import tempfile
from typing import IO, TYPE_CHECKING, Any

from trinfer.data.extras import load

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["ParquetEncoder"]

ROWS = 8192  # at once, and fewer where they are long
BYTES = 8 * 2**20
WIDEST = 1000  # names in an object; one of more is taken for a mapping
DEEPEST = 24  # readers of Parquet have limits of about four times that, and count lists thrice
SURROGATES = re.compile("[\ud800-\udfff]")


class ParquetEncoder:
    """From lines of JSON to Parquet. Until all rows are known, they wait in an unnamed file.

    A field that has values of types that do not go together becomes a column of JSON texts; so does one of objects that
    have no names or very many, and one that is nested deeply. Lone surrogates, which JSON may hold and Parquet may not,
    become U+FFFD.

    Args:
        folder: where rows wait; None for the system's folder of temporary files.
    """

    def __init__(self, raw: IO[bytes], folder: Path | None) -> None:
        self._pyarrow = load("pyarrow", "writing Parquet")
        self._parquet = load("pyarrow.parquet", "writing Parquet")
        self._raw = raw
        self._rows = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # as long-lived as the encoder
        self._tail: list[bytes] = []
        self._tail_bytes = 0
        self._types: dict[str, Any] = {}  # None for columns of JSON
        self._widened: set[str] = set()
        self._unclean: set[str] = set()  # columns with lone surrogates

    def write(self, lines: bytes) -> None:
        self._rows.write(lines)
        self._tail += lines.splitlines()
        self._tail_bytes += len(lines)
        if len(self._tail) >= ROWS or self._tail_bytes >= BYTES:
            self._learn()

    def _learn(self) -> None:
        """See which types the fields of the last rows have."""
        columns: dict[str, list[Any]] = {}
        for row in map(json.loads, self._tail):
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
        self._tail, self._tail_bytes = [], 0
        for name, values in columns.items():
            self._types[name] = self._common(name, values)

    def _common(self, name: str, values: list[Any]) -> Any:  # noqa: ANN401  # a type of pyarrow
        pyarrow = self._pyarrow
        if name in self._types and self._types[name] is None:
            return None
        try:
            if _is_unfit(values):
                return None
            found = self._array(name, values).type
            known = self._types.setdefault(name, found)
            if known == found:
                return found
            both = [pyarrow.schema([("x", each)]) for each in (known, found)]
            common = pyarrow.unify_schemas(both, promote_options="permissive").field("x").type
            if not pyarrow.types.is_null(known) and not pyarrow.types.is_null(found):
                self._widened.add(name)
            return common
        except (pyarrow.ArrowException, OverflowError, TypeError):
            return None

    def _array(self, name: str, values: list[Any], type_: Any = None) -> Any:  # noqa: ANN401  # of pyarrow
        if name not in self._unclean:
            try:
                return self._pyarrow.array(values, type=type_)
            except UnicodeEncodeError:
                # From now on always: where the type is known, a value of a strange name is left out without a word.
                self._unclean.add(name)
        return self._pyarrow.array([_without_surrogates(each) for each in values], type=type_)

    def _batches(self) -> Iterator[list[dict[str, Any]]]:
        self._rows.seek(0)
        while rows := list(itertools.islice(_upto(self._rows, BYTES), ROWS)):
            yield [json.loads(row) for row in rows]

    def _check_widened(self) -> None:
        """A type that holds the values of two others need not hold each of them: large integers as floats."""
        left = {name for name in self._widened if self._types[name] is not None}
        for rows in self._batches() if left else ():
            for name in tuple(left):
                try:
                    self._array(name, [row.get(name) for row in rows], self._types[name])
                except (self._pyarrow.ArrowException, OverflowError, TypeError):
                    self._types[name] = None
                    left.remove(name)

    def finish(self) -> None:
        self._learn()
        self._check_widened()
        pyarrow = self._pyarrow
        texts = {name for name, type_ in self._types.items() if type_ is None or not _can_be_stored(type_)}
        schema = pyarrow.schema(
            [
                (column, pyarrow.string() if name in texts else self._types[name])
                for name, column in _column_names(self._types).items()
            ]
        )
        with self._parquet.ParquetWriter(self._raw, schema, compression="zstd", write_page_checksum=True) as writer:
            for rows in self._batches():
                columns = []
                for name, type_ in zip(self._types, schema.types, strict=True):
                    values = [row.get(name) for row in rows]
                    if name in texts:
                        values = [None if value is None else json.dumps(value) for value in values]
                    columns.append(self._array(name, values, type_))
                writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))

    def close(self) -> None:
        self._rows.close()


def _upto(file: IO[bytes], size: int) -> Iterator[bytes]:
    """Some lines of so many bytes, and one at least."""
    while size > 0 and (line := file.readline()):
        size -= len(line)
        yield line


def _is_unfit(values: list[Any], depth: int = 0) -> bool:
    """What pyarrow does not refuse, or only when it is too late.

    Booleans among numbers, which it takes for numbers; nesting too deep for columns; and objects of so many names that
    these are data: a column for each would fill the memory.
    """
    types = set(map(type, values))
    if depth > DEEPEST or (bool in types and not types.isdisjoint({int, float})):
        return True
    if list in types:
        lists = (each for each in values if isinstance(each, list))
        if _is_unfit(list(itertools.chain.from_iterable(lists)), depth + 1):
            return True
    inner: dict[str, list[Any]] = {}
    for each in values if dict in types else ():
        if isinstance(each, dict):
            for name, value in each.items():
                inner.setdefault(name, []).append(value)
            if len(inner) > WIDEST:
                return True
    return any(_is_unfit(each, depth + 1) for each in inner.values())


def _can_be_stored(type_: Any) -> bool:  # noqa: ANN401  # a type of pyarrow
    """Parquet knows no objects without names."""
    return "struct<>" not in str(type_)


def _without_surrogates(value: Any) -> Any:  # noqa: ANN401  # a JSON value
    if isinstance(value, str):
        return SURROGATES.sub("\ufffd", value)
    if isinstance(value, list):
        return [_without_surrogates(each) for each in value]
    if isinstance(value, dict):
        return {_without_surrogates(name): _without_surrogates(each) for name, each in value.items()}
    return value


def _column_names(names: dict[str, Any]) -> dict[str, str]:
    """What fields are called as columns: each has a name of its own."""
    columns: dict[str, str] = {}
    for name in names:
        column = _without_surrogates(name)
        while column != name and (column in names or column in columns.values()):
            column += "_"
        columns[name] = column
    return columns
