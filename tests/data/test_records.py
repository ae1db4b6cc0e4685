"""Keys: of the content, never of the place, the process or what happens to be installed."""

from __future__ import annotations

import datetime
import decimal
import json
import random
import uuid

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.files import keys, program, write
from tests.data.odd_values import VALUES, Thing
from trinfer.data.records import InvalidRow, Raw, content_key, numbered, record_id, shard_of
from trinfer.data.values import plain

LINES = st.lists(st.sampled_from(['{"a": 1}', '{"a": 2}', '{"b": "ü"}', '{"c": []}', "no JSON"]), max_size=12)


def numbered_keys(paths, **options) -> list[bytes]:
    seen: dict[bytes, int] = {}
    found = []
    for key in keys(paths, **options):
        number = seen[key] = seen.get(key, -1) + 1
        found.append(numbered(key, number))
    return found


@given(lines=LINES, seed=st.integers(0, 99), cut=st.integers(0, 12))
def test_reordered_split_and_merged_lines_keep_their_keys(tmp_path_factory, lines, seed, cut):
    folder = tmp_path_factory.mktemp("k")
    whole, first, second = folder / "whole.jsonl", folder / "first.jsonl", folder / "second.jsonl"
    whole.write_text("\n".join(lines))
    mixed = random.Random(seed).sample(lines, len(lines))
    # Other ends of lines, a mark at the beginning and blank lines are no part of the content.
    first.write_bytes(b"\xef\xbb\xbf" + "".join(f"{line}\r\n" for line in mixed[:cut]).encode())
    second.write_text("\n\n".join(mixed[cut:]) + "\n")
    found = numbered_keys(whole)
    assert len(set(found)) == len(lines)
    assert set(numbered_keys([first, second])) == set(found)
    assert set(numbered_keys([second, first], shuffle=seed)) == set(found)


def test_a_table_keeps_its_keys_when_it_is_cut_and_its_columns_are_reordered(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,x\n2,y\n1,x\n")
    (tmp_path / "b.csv").write_text("b,a\ny,2\n")
    (tmp_path / "c.csv").write_text("b,a\nx,1\nx,1\n")
    found = numbered_keys(tmp_path / "a.csv")
    assert len(set(found)) == 3
    assert set(numbered_keys([tmp_path / "b.csv", tmp_path / "c.csv"])) == set(found)
    rows = [{"a": n, "b": [{"c": n / 3}]} for n in (1, 2, 3, 1)]
    write(tmp_path / "a.parquet", rows)
    write(tmp_path / "b.parquet", [dict(reversed(row.items())) for row in reversed(rows[2:])])
    write(tmp_path / "c.parquet", rows[:2])
    found = numbered_keys(tmp_path / "a.parquet")
    assert len(set(found)) == 4
    assert set(numbered_keys([tmp_path / "b.parquet", tmp_path / "c.parquet"])) == set(found)


@given(data=st.binary(max_size=20), world_size=st.integers(1, 9), number=st.integers(0, 3))
def test_equal_records_come_to_one_shard_and_have_keys_of_their_own(data, world_size, number):
    key = content_key(data)
    assert len(numbered(key, number)) == 16
    assert 0 <= shard_of(key, world_size) < world_size
    assert shard_of(numbered(key, number), world_size) == shard_of(key, world_size)
    assert (numbered(key, number) == key) == (number == 0)
    assert record_id(key, number).startswith(key.hex())
    assert len({record_id(key, n) for n in range(4)} | {numbered(key, n).hex() for n in range(4)}) == 7


def test_shards_share_the_records_about_evenly():
    counts = [0] * 7
    for number in range(7000):
        counts[shard_of(content_key(b"%d" % number), 7)] += 1
    assert min(counts) > 850


KEYS_OF_VALUES = """
from tests.data.odd_values import VALUES
from trinfer.data.records import content_key
for name, make in VALUES.items():
    print(name, content_key({"value": make(), "text": "ü\\ud800"}).hex())
"""


def test_values_of_any_type_have_the_same_key_in_every_process():
    made = [program(KEYS_OF_VALUES, PYTHONHASHSEED=str(seed)) for seed in (1, 2)]
    assert made[0] == made[1]
    assert len({line.split()[1] for line in made[0].splitlines()}) == len(VALUES)
    # Made again in one process, objects have other addresses.
    assert content_key({"a": [Thing()]}) == content_key({"a": [Thing()]})
    assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1})
    assert content_key({"a": 1}) != content_key({"a": "1"})
    assert content_key({1: "a", "x": 2}) != content_key({"1": "a", "x": 2})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"\xff\x00", "/wA="),
        (bytearray(b"a"), "YQ=="),
        (datetime.datetime(2024, 1, 2, 3, 4, 5, 6), "2024-01-02T03:04:05.000006"),
        (datetime.date(1, 1, 1), "0001-01-01"),
        (datetime.time(23, 59), "23:59:00"),
        (datetime.timedelta(days=1, microseconds=5), 86400.000005),
        (decimal.Decimal("1.10"), "1.10"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (float("nan"), None),
        (float("-inf"), None),
        (np.int64(2**60), 2**60),
        (np.float64("nan"), None),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ((1, b"a"), [1, "YQ=="]),
        ({"a": {1: b"a", b"k": None}}, {"a": {"1": "YQ==", "aw==": None}}),
        ("ü\ud800\0", "ü\ud800\0"),
        (2**100, 2**100),
        (True, True),
    ],
)
def test_values_become_json(value, expected):
    made = plain(value)
    assert made == expected
    assert type(made) is type(expected)
    json.dumps(made, allow_nan=False)


def test_what_has_no_json_is_named():
    with pytest.raises(TypeError, match="Thing"):
        plain([{"a": Thing()}])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"a": "\xff"}', "f:1: the line is not UTF-8"),
        (b'{"a": 1', "f:1: the line is not JSON"),
        (b"[1]", "f:1: the line is a JSON list"),
        (b"null", "f:1: the line is a JSON NoneType"),
        (b"[" * 100_000, "f:1: the line is not JSON"),
        (b'{"a": %s}' % (b"9" * 5000), "f:1: the line is not JSON"),
    ],
)
def test_lines_that_are_no_records_say_why(line, said):
    with pytest.raises(InvalidRow, match=said):
        Raw("f:1", len(line), line).fields()


def test_a_records_own_error_comes_first():
    error = InvalidRow("f:1: too long")
    with pytest.raises(InvalidRow, match="too long"):
        Raw("f:1", 2, b"{}", error).fields()


def test_fields_are_the_callers_to_change():
    raw = Raw("f:1", 0, {"a": 1})
    raw.fields()["a"] = 2
    assert raw.fields() == {"a": 1}
