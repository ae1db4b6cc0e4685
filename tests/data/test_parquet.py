"""Parquet of other people: types that JSON does not know, values that Python does not, files that are broken."""

from __future__ import annotations

import datetime
import decimal
import json
import random
import re
import zoneinfo

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.files import keys, outcomes, program, read, rows, write
from trinfer import FileError
from trinfer.batch.items import encode
from trinfer.data import readers
from trinfer.data.readers import Inputs

UTC = datetime.UTC
NOON = datetime.datetime(2024, 2, 29, 12, 30, 0, 250)
BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")


def save(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def column(value, type_):
    return pyarrow.array([value, None], type_)


DATES = pyarrow.list_(pyarrow.list_(pyarrow.date32()))
OBJECTS = pyarrow.struct({"a": pyarrow.struct({"b": pyarrow.binary(), "c": pyarrow.float64()})})
TYPES = {
    "seconds": (column(NOON, pyarrow.timestamp("s")), "2024-02-29T12:30:00"),
    "micro": (column(NOON, pyarrow.timestamp("us")), "2024-02-29T12:30:00.000250"),
    "nano": (column(NOON, pyarrow.timestamp("ns")), "2024-02-29T12:30:00.000250"),
    "utc": (column(NOON.replace(tzinfo=UTC), pyarrow.timestamp("us", "UTC")), "2024-02-29T12:30:00.000250+00:00"),
    "zone": (
        column(NOON.replace(tzinfo=BERLIN), pyarrow.timestamp("us", "Europe/Berlin")),
        "2024-02-29T12:30:00.000250+01:00",
    ),
    "date": (column(NOON.date(), pyarrow.date32()), "2024-02-29"),
    "time": (column(NOON.time(), pyarrow.time64("us")), "12:30:00.000250"),
    "duration": (column(datetime.timedelta(days=1, seconds=1), pyarrow.duration("us")), 86401.0),
    "decimal": (column(decimal.Decimal("12.50"), pyarrow.decimal128(9, 2)), "12.50"),
    "bytes": (column(b"\xff\0", pyarrow.binary()), "/wA="),
    "fixed": (column(b"\xff\0", pyarrow.binary(2)), "/wA="),
    "nan": (column(float("nan"), pyarrow.float64()), None),
    "infinite": (column(float("inf"), pyarrow.float32()), None),
    "half": (column(0.5, pyarrow.float16()), 0.5),
    "unsigned": (column(2**64 - 1, pyarrow.uint64()), 2**64 - 1),
    "nothing": (pyarrow.array([None, None], pyarrow.null()), None),
    "word": (pyarrow.array(["a", None]).dictionary_encode(), "a"),
    "lists": (column([[NOON.date()], None, []], DATES), [["2024-02-29"], None, []]),
    "object": (column({"a": {"b": b"x", "c": float("nan")}}, OBJECTS), {"a": {"b": "eA==", "c": None}}),
    "mapping": (column([("k", b"v")], pyarrow.map_(pyarrow.string(), pyarrow.binary())), [["k", "dg=="]]),
    "text": (column("\0ü\n", pyarrow.large_string()), "\0ü\n"),
    "boolean": (column(True, pyarrow.bool_()), True),
}
KEYS = """
import sys
for name in sys.argv[2:]:
    sys.modules[name] = None
from tests.data.files import keys
print([key.hex() for key in keys(sys.argv[1])])
"""


def test_types_that_json_does_not_know_become_those_that_it_does(tmp_path):
    path = save(tmp_path / "a.parquet", **{name: values for name, (values, _) in TYPES.items()})
    first, second = rows(path)
    assert first == {name: expected for name, (_, expected) in TYPES.items()}
    assert second == dict.fromkeys(TYPES)
    assert json.loads(encode(first)) == first
    json.dumps(first, allow_nan=False)
    # Also in another process, where pandas, which has times of its own, is not installed.
    found = [key.hex() for key in keys(path)]
    assert found == [key.hex() for key in keys(path)]
    assert program(KEYS, path, "pandas", PYTHONHASHSEED="5").strip() == str(found)


def test_values_that_cannot_be_had_are_told_with_their_row(tmp_path):
    number = pyarrow.array(range(3), pyarrow.int32())
    text = pyarrow.array([b"good", b"\xff", b"\xfe"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    late = pyarrow.array([1, 10**7, 2], pyarrow.int32()).view(pyarrow.date32())
    path = save(tmp_path / "a.parquet", number=number, text=text, late=late)
    found = outcomes(path)
    assert found[0] == {"number": 0, "text": "good", "late": "1970-01-02"}
    assert re.match(r"a\.parquet:2: the field '(text|late)' cannot be read: ", found[1])
    assert re.match(r"a\.parquet:3: the field 'text' cannot be read: .*utf-8", found[2])
    assert len(set(keys(path))) == 3
    assert keys(path) == keys(path)


def test_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(FileError, match="several columns of the name 'a'"):
        read(tmp_path / "a.parquet")


def test_places_count_on_over_batches_and_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PARQUET_ROWS", 7)
    table = pyarrow.table({"n": list(range(50))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=20)
    found = read(tmp_path / "a.parquet")
    assert [(raw.place, raw.fields()) for raw in found] == [(f"a.parquet:{n + 1}", {"n": n}) for n in range(50)]


@pytest.mark.parametrize("kind", ["empty", "cut", "head only", "other", "damaged"])
def test_files_that_are_broken_are_told(tmp_path, kind):
    path = tmp_path / "a.parquet"
    write(path, [{"n": random.Random(n).random()} for n in range(3000)])
    whole = path.read_bytes()
    middle = len(whole) // 4
    path.write_bytes(
        {
            "empty": b"",
            "cut": whole[:-1000],
            "head only": whole[:6],
            "other": b'{"a": 1}\n' * 100,
            "damaged": whole[:middle] + b"\xff" * 500 + whole[middle + 500 :],
        }[kind]
    )
    with pytest.raises(FileError, match=r"the input .*a\.parquet cannot be read: ") as caught:
        list(Inputs(str(path)))
    assert "damaged" in caught.value.cause
    assert "again" in caught.value.advice


def test_a_damaged_byte_is_told(tmp_path):
    path = tmp_path / "a.parquet"
    content = [{"n": random.Random(n).random()} for n in range(300)]
    write(path, content)
    whole = path.read_bytes()
    for at in range(4, len(whole) // 2, 50):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(FileError, match=r"a\.parquet cannot be read: "):
            read(path)
