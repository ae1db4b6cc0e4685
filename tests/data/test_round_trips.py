"""What is written is read again, in every format."""

from __future__ import annotations

import json
import math
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.data.files import SUFFIXES, read, rows, write
from trinfer.data import parquet as parquet_module

TEXT = st.text(st.characters(exclude_categories=()), max_size=6)  # lone surrogates, too
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
    | st.sampled_from([{}, [], "", 2**53 + 1, 2**63, -(2**63), 0.5]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc") | TEXT, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(
    st.builds(lambda number, more: {**more, "id": number}, st.integers(0, 9), st.dictionaries(TEXT, VALUES, max_size=3))
    | st.builds(lambda number, value: {"id": number, "x": value}, st.integers(0, 9), VALUES),
    max_size=7,
)


def as_json(value):
    """Two surrogates that make a character are one after JSON."""
    return json.loads(json.dumps(value))


@given(suffix=st.sampled_from(SUFFIXES), content=ROWS)
def test_lines_come_back_as_they_were(tmp_path_factory, suffix, content):
    path = write(tmp_path_factory.mktemp("r") / f"a.{suffix}", content)
    assert rows(path) == as_json(content)


def clean(text: str) -> str:
    return parquet_module.SURROGATES.sub("\ufffd", text)


def is_same(value, found) -> bool:
    """Columns have one type: integers may become equal floats, and names that are not there None."""
    if isinstance(value, str):
        return found == clean(value)
    if isinstance(value, dict):
        names = {clean(name): each for name, each in value.items()}
        if len(names) < len(value):
            return isinstance(found, dict)  # two names have become one
        return isinstance(found, dict) and all(is_same(names.get(name), found.get(name)) for name in {*names, *found})
    if isinstance(value, list):
        return isinstance(found, list) and len(found) == len(value) and all(map(is_same, value, found))
    return (found == value and isinstance(found, bool) == isinstance(value, bool)) or (value is None and found is None)


def is_told(value, found) -> bool:
    """As a JSON text."""
    return found is None if value is None else isinstance(found, str) and json.loads(found) == value


@given(content=ROWS, at_once=st.integers(1, 4))
@example([{"x": 2**60 + 1}, {"x": 0.5}], 1)
@example([{"x": [2**60 + 1]}, {"x": [0.5]}], 1)
@example([{"x": {"a": 1}}, {"x": {"b": {}}}], 1)
@example([{"x": "\ud800"}, {"x": {"\udfff": "\ud800"}}], 2)
@example([{"\ud800": 1}, {"\ufffd": 2}, {"\udc00": 3}], 1)
@example([{"x": None}, {"x": [None]}, {"x": [[]]}, {"x": [["a"]]}], 1)
@example([{"id": 1}, {}, {"id": 2}], 1)
@example([{"x": 0.5}, {"x": True}], 1)
@example([{"x": [0.5, True]}], 1)
def test_parquet_comes_back_in_columns_of_one_type(tmp_path_factory, monkeypatch, content, at_once):
    monkeypatch.setattr(parquet_module, "ROWS", at_once)
    content = as_json(content)
    path = write(tmp_path_factory.mktemp("r") / "a.parquet", content)
    found = rows(path)
    if not any(content):
        assert found == []  # no column, no row
        return
    assert len(found) == len(content)
    names = list(dict.fromkeys(name for row in content for name in row))
    columns = list(found[0])
    assert len(columns) == len(names)
    for name, column in zip(names, columns, strict=True):
        values = [(row.get(name), other[column]) for row, other in zip(content, found, strict=True)]
        assert all(is_same(*pair) for pair in values) or all(is_told(*pair) for pair in values), (name, values)
        assert column == name or clean(name) != name


def test_values_of_types_that_do_not_go_together_become_json_texts(tmp_path):
    content = [{"a": 1, "b": 1}, {"a": "x", "b": None}, {"a": None, "b": 2**63}, {"a": {"ü": []}}]
    assert rows(write(tmp_path / "a.parquet", content)) == [
        {"a": "1", "b": "1"},
        {"a": '"x"', "b": None},
        {"a": None, "b": "9223372036854775808"},
        {"a": '{"\\u00fc": []}', "b": None},
    ]


def test_one_lone_surrogate_leaves_a_column_of_texts(tmp_path):
    content = [{"a": "fine"}, {"a": "b\ud800c", "x": {"k\udfff": "\ud800"}}]
    found = rows(write(tmp_path / "a.parquet", content))
    assert found == [{"a": "fine", "x": None}, {"a": "b\ufffdc", "x": {"k\ufffd": "\ufffd"}}]


def test_numbers_that_are_none_are_null_in_every_format(tmp_path):
    content = [{"a": math.nan}, {"a": math.inf}, {"a": 0.5}]
    for name in ("a.parquet", "a.jsonl"):
        assert rows(write(tmp_path / name, content)) == [{"a": None}, {"a": None}, {"a": 0.5}]


def test_objects_with_names_that_are_data_become_json_texts(tmp_path):
    # A column for each of them would be millions of values.
    content = [{"scores": {f"document {n}": n}, "deep": [{"of": {f"page {n}": "x"}}]} for n in range(4000)]
    began = time.monotonic()
    found = rows(write(tmp_path / "a.parquet", content))
    assert [{name: json.loads(text) for name, text in row.items()} for row in found] == content
    assert time.monotonic() - began < 5


def test_deep_nesting_becomes_a_json_text(tmp_path):
    deep: list = []
    for _ in range(200):
        deep = [deep]
    (row,) = rows(write(tmp_path / "a.parquet", [{"a": deep}]))
    assert json.loads(row["a"]) == deep


@pytest.mark.parametrize("suffix", [*SUFFIXES, "parquet"])
def test_an_empty_output_is_an_empty_input(tmp_path, suffix):
    assert read(write(tmp_path / f"a.{suffix}", [])) == []


def test_equal_rows_make_equal_files(tmp_path):
    for suffix in (*SUFFIXES, "parquet"):
        made = set()
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir(exist_ok=True)
            path = write(tmp_path / folder / f"{folder}.{suffix}", [{"a": n} for n in range(100)])
            with open(path, "rb") as file:
                made.add(file.read())
        assert len(made) == 1, suffix
