"""Records out of files: whatever is in them, a record, a row's error with its place, or a FileError."""

from __future__ import annotations

import csv
import gzip
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.data.files import SUFFIXES, as_nobody, keys, outcomes, program, read, rows, standard, write
from trinfer import ConfigError, FileError
from trinfer.data import readers
from trinfer.data.readers import Inputs

LINES = [b'{"n": %d, "text": "%s"}' % (n, random.Random(n).randbytes(20).hex().encode()) for n in range(200)]


def compressed(data: bytes, suffix: str) -> bytes:
    if suffix == "gz":
        return gzip.compress(data)
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


# -- lines ----------------------------------------------------------------------------------------------------------


def test_lines_end_in_many_ways(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \t\r\n{"a": 2}\n \x0c{"a": "\\u0000\xc3\xbc"}  \n{"a": 4}')
    found = read(path)
    assert [raw.fields() for raw in found] == [{"a": 1}, {"a": 2}, {"a": "\0ü"}, {"a": 4}]
    assert [raw.place for raw in found] == ["a.jsonl:1", "a.jsonl:4", "a.jsonl:5", "a.jsonl:6"]
    assert sum(raw.size for raw in found) == path.stat().st_size - len(b"\n  \t\r\n")
    plain = tmp_path / "b.jsonl"
    plain.write_bytes(b'{"a": 4}\n{"a": "\\u0000\xc3\xbc"}\n{"a": 2}\n{"a": 1}\n')
    assert keys(plain) == keys(path)[::-1]


@pytest.mark.parametrize("content", [b"", b"\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n\n", b" "])
def test_nothing_in_many_forms(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert read(tmp_path / "a.jsonl") == []


def test_bad_lines_are_told_with_file_and_line_and_the_others_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\nno\n{"a": "\xff"}\n[]\n{"a": "\0"}\n\0\n{"a": 2}')
    found = outcomes(path)
    assert (found[0], found[-1]) == ({"a": 1}, {"a": 2})
    for number, said in ((2, "not JSON"), (3, "not UTF-8"), (4, "JSON list"), (5, "not JSON"), (6, "not JSON")):
        assert f"a.jsonl:{number}: " in found[number - 1]
        assert said in found[number - 1]


def test_lines_that_are_too_long_are_told_and_passed_by(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_LINE", 20)
    path = tmp_path / "a.jsonl"
    fits = b'{"a": "%s"}' % (b"x" * 11)
    assert len(fits) == 20
    long = [b'{"a": "%s"}' % (b"x" * size) for size in (12, 5000, 3 << 20)]
    path.write_bytes(b"\n".join([fits, *long, fits]))
    found = read(path)
    assert [raw.place for raw in found] == [f"a.jsonl:{n}" for n in (1, 2, 3, 4, 5)]
    assert [raw.size for raw in found] == [len(line) + 1 for line in [fits, *long]] + [len(fits)]
    said = [f"a.jsonl:{n}: the line is longer than 20 bytes" for n in (2, 3, 4)]
    assert outcomes(path) == [{"a": "x" * 11}, *said, {"a": "x" * 11}]
    # Keys are of the whole line, though it is not kept.
    path.write_bytes(long[2] + b"\n" + long[2][:-1] + b"]\n" + long[2] + b"\n" + b"x" * 50)
    first, second, third, _ = keys(path)
    assert first == third != second
    assert outcomes(path)[3] == "a.jsonl:4: the line is longer than 20 bytes"


# -- compression ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_many_members_are_one_file(tmp_path, suffix):
    path = tmp_path / f"a.jsonl.{suffix}"
    members = [b"\n".join(LINES[:50]), b"", b"\n" + b"\n".join(LINES[50:120]), b"\n", b"\n".join(LINES[120:])]
    path.write_bytes(b"".join(compressed(member, suffix) for member in members))
    assert [raw.data for raw in read(path)] == LINES


def test_frames_of_zstd_of_every_kind(tmp_path):
    data = b"\n".join(LINES) + b"\n"
    parts = zstandard.ZstdCompressor(write_content_size=False, write_checksum=False).compressobj()
    frames = [
        parts.compress(data) + parts.flush(),
        (0x184D2A5F).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"12345",  # to be skipped
        (0x184D2A50).to_bytes(4, "little") + bytes(4),
        zstandard.ZstdCompressor().compress(b" " * 1_000_000),  # blocks of one byte
        zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=28)).compress(data),
    ]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert [raw.data for raw in read(tmp_path / "a.jsonl.zst")] == LINES * 2


def test_a_window_larger_than_the_librarys_limit_is_read(tmp_path):
    # As `zstd --long=31` makes them.
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=30, write_content_size=False)
    with open(tmp_path / "a.jsonl.zst", "wb") as file:
        writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        file.write(writer.compress(b"\n".join(LINES)) + writer.flush())
    assert [raw.data for raw in read(tmp_path / "a.jsonl.zst")] == LINES


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@given(data=st.data())
def test_a_file_that_was_cut_is_never_taken_for_whole(tmp_path_factory, suffix, data):
    path = tmp_path_factory.mktemp("c") / f"a.jsonl.{suffix}"
    first, second = (compressed(b"\n".join(lines) + b"\n", suffix) for lines in (LINES[:100], LINES[100:]))
    cut = data.draw(st.integers(1, len(first + second) - 1).filter(lambda cut: cut != len(first)))
    path.write_bytes((first + second)[:cut])
    found = []
    with pytest.raises(FileError, match=f"a.jsonl.{suffix} cannot be read") as caught:
        found += (raw.data for raw in Inputs(str(path)))
    assert "not copied to its end" in caught.value.cause
    assert "again" in caught.value.advice


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@given(data=st.data())
def test_a_changed_byte_is_never_taken_for_the_truth(tmp_path_factory, suffix, data):
    path = tmp_path_factory.mktemp("c") / f"a.jsonl.{suffix}"
    content = bytearray(compressed(b"\n".join(LINES) + b"\n", suffix))
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    error = None
    try:
        found = [raw.data for raw in read(path)]
    except FileError as problem:
        error = problem
    if error is None:  # a byte of the head that says nothing of the content
        assert found == LINES
    else:
        assert f"a.jsonl.{suffix}" in error.message


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_what_is_not_compressed_or_has_a_tail_is_told(tmp_path, suffix):
    path = tmp_path / f"a.jsonl.{suffix}"
    for content in (b'{"a": 1}\n', compressed(b"{}\n", suffix) + b"and more"):
        path.write_bytes(content)
        with pytest.raises(FileError, match="cannot be read") as caught:
            read(path)
        assert "not what its name says" in caught.value.cause


# -- tables ---------------------------------------------------------------------------------------------------------


def test_csv_as_people_write_it(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'\xef\xbb\xbf,text,"a, b"\r\n0,"two\r\nlines",x\r\n\r\n1,"say ""hi""",\r\n2, \xc3\xbc\0 ,"a,\tb"\r\n3,last,'
    )
    found = read(path)
    assert [raw.fields() for raw in found] == [
        {"": "0", "text": "two\r\nlines", "a, b": "x"},  # a column without a name, as pandas writes its index
        {"": "1", "text": 'say "hi"', "a, b": ""},
        {"": "2", "text": " ü\0 ", "a, b": "a,\tb"},
        {"": "3", "text": "last", "a, b": ""},
    ]
    assert [raw.place for raw in found] == ["a.csv:2", "a.csv:5", "a.csv:6", "a.csv:7"]
    header = len(b'\xef\xbb\xbf,text,"a, b"\r\n') + len(b"\r\n")
    assert sum(raw.size for raw in found) == path.stat().st_size - header
    (tmp_path / "b.tsv").write_text('a\tb\n1,2\t"x\ty"\n')
    assert rows(tmp_path / "b.tsv") == [{"a": "1,2", "b": "x\ty"}]
    (tmp_path / "c.csv").write_bytes(b"a,b\r1,2\r\r3,4\r")
    assert outcomes(tmp_path / "c.csv") == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    assert read(tmp_path / "c.csv")[1].place == "c.csv:4"


def test_bad_rows_of_a_table_are_told_and_the_others_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'a,b\n1,2\n3\n4,5,6\n"x"y,7\n\xff,8\n"two\nlines",9,10\n"multi\nline"z,1\n11,12\n"never closed,13\n14,15\n'
    )
    good = {2: ("1", "2"), 11: ("11", "12")}
    bad = {
        3: "the row has 1 fields, and the first line 2",
        4: "the row has 3 fields",
        5: "the row is no CSV",
        6: "the row is not UTF-8",
        7: "the row has 3 fields",
        9: "the row is no CSV",
        12: "the row is no CSV: unexpected end of data",
    }
    found = {}
    for raw, outcome in zip(read(path), outcomes(path), strict=True):
        found[int(raw.place.removeprefix("a.csv:"))] = outcome
    assert {line: found[line] for line in good} == {line: {"a": a, "b": b} for line, (a, b) in good.items()}
    assert found.keys() == good.keys() | bad.keys()
    for line, said in bad.items():
        assert f"a.csv:{line}: {said}" in found[line]
    assert len(set(keys(path))) == len(found)


def test_tables_that_have_no_names(tmp_path):
    path = tmp_path / "a.csv"
    for content in (b"", b"\n\n", b"a,b\n", b"a,b"):
        path.write_bytes(content)
        assert read(path) == []
    for content, said in (
        (b"a,b,a\n1,2,3\n", "several columns of the name 'a'"),
        ("a,b\n1,2\n".encode("utf-16"), "first line .* not UTF-8"),
        (b'"a"b,c\n1,2\n', "no CSV"),
    ):
        path.write_bytes(content)
        with pytest.raises(FileError, match=said) as caught:
            read(path)
        assert caught.value.advice


def test_rows_and_lines_of_a_table_that_are_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_LINE", 30)
    path = tmp_path / "a.csv"
    many = '"' + "\n".join(["abcdefghi"] * 4) + '"'  # no line of it is too long
    path.write_text(f"a,b\n1,{'x' * 40}\n2,{'y' * (3 << 20)}\n3,{many}\n4,ok\n5,{'z' * 27}\n6,{'z' * 40}")
    found = outcomes(path)
    said = "longer than 30 characters"
    assert [said in each for each in found[:3]] == [True] * 3
    assert "a.csv:2: " in found[0]
    assert "a.csv:3: " in found[1]
    assert "a.csv:4: " in found[2]
    assert {"a": "4", "b": "ok"} in found
    assert {"a": "5", "b": "z" * 27} in found
    assert said in found[-1]


def test_the_limit_of_the_csv_module_is_raised_only():
    code = "import csv; csv.field_size_limit(2**31); import trinfer.data.readers; print(csv.field_size_limit())"
    assert program(code).strip() == str(2**31)
    assert csv.field_size_limit() >= readers.LONGEST_LINE


@given(st.lists(st.lists(st.text(st.characters(codec="utf-8"), max_size=5), min_size=2, max_size=2), max_size=5))
def test_what_the_csv_module_writes_is_read(tmp_path_factory, table):
    path = tmp_path_factory.mktemp("c") / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["a", "b"], *table])
    assert rows(path) == [{"a": a, "b": b} for a, b in table]


# -- texts ----------------------------------------------------------------------------------------------------------


def test_a_text_is_one_record(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftwo\r\nlines \xc3\xbc\0\n")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes(b"\xff")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"small"))
    assert outcomes(tmp_path) == [
        {"text": "two\r\nlines ü\0\n", "file": "a.txt"},
        {"text": "", "file": "b.txt"},
        "c.txt: the text is not UTF-8 (invalid start byte at byte 0)",
        {"text": "small", "file": "d.txt.gz"},
    ]
    monkeypatch.setattr(readers, "LONGEST_LINE", 5)
    assert outcomes(tmp_path / "a.txt") == ["a.txt: the text is longer than 5 bytes"]
    assert outcomes(tmp_path / "d.txt.gz") == [{"text": "small", "file": "d.txt.gz"}]
    assert len(set(keys(tmp_path))) == 4


# -- many files -----------------------------------------------------------------------------------------------------


def test_files_of_all_formats_come_one_after_the_other(tmp_path):
    content = [{"n": str(n)} for n in range(3)]
    for suffix in (*SUFFIXES, "parquet"):
        write(tmp_path / f"a.{suffix}", content)
    (tmp_path / "a.csv").write_text("n\n0\n1\n2\n")
    (tmp_path / "data").write_text('{"n": "0"}\n{"n": "1"}\n{"n": "2"}\n')  # a name that tells nothing
    (tmp_path / "b").write_text("n\n0\n1\n2\n")
    paths = [*sorted(tmp_path.glob("a.*")), tmp_path / "data"]
    assert rows(paths) == content * 6
    assert rows(tmp_path / "b", format="csv") == content
    with pytest.raises(ConfigError, match="allowed are jsonl, csv"):
        read(tmp_path / "b", format="yaml")


@pytest.mark.parametrize("window", [1, 7, 1000])
def test_shuffling_is_a_permutation_and_repeatable(tmp_path, monkeypatch, window):
    monkeypatch.setattr(readers, "SHUFFLE_ROWS", window)
    path = write(tmp_path / "a.jsonl", [{"n": n} for n in range(100)])
    order = rows(path)
    one, same, other = (rows(path, shuffle=seed) for seed in (1, 1, 2))
    assert one == same
    assert sorted(row["n"] for row in one) == sorted(row["n"] for row in other) == list(range(100))
    if window > 1:
        assert one != order
        assert one != other
    assert rows(path, shuffle=1, limit=10) == one[:10]


def test_the_limit(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"n": n} for n in range(10)])
    assert [len(rows([path], limit=limit)) for limit in (0, 1, 10, 11)] == [0, 1, 10, 10]
    with pytest.raises(ConfigError, match="limit=-1: allowed are integers >= 0"):
        Inputs(path, limit=-1)
    # What lies behind it is not read.
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip")
    assert len(rows([path, tmp_path / "b.jsonl.gz"], limit=10)) == 10


def test_what_the_inputs_are(tmp_path):
    first = write(tmp_path / "a.jsonl", [{"n": 1}])
    (tmp_path / "b.csv").write_text("n\n1\n")
    inputs = Inputs([first, str(tmp_path / "b.csv")])
    assert inputs.total_bytes == sum(os.stat(path).st_size for path in inputs.paths) == 9 + 4
    assert Inputs(first, limit=1).total_bytes is None
    assert Inputs([first, write(tmp_path / "c.jsonl.gz", [])]).total_bytes is None
    assert Inputs([first, write(tmp_path / "d.parquet", [])]).total_bytes is None
    assert Inputs([first, "memory://x.jsonl"]).total_bytes is None
    described = inputs.describe()
    assert described == Inputs([first, str(tmp_path / "b.csv")]).describe()
    assert described[0] == {"path": first, "bytes": 9, "changed": os.stat(first).st_mtime_ns}
    # A change of the same size within a second is one.
    os.utime(first, ns=(os.stat(first).st_atime_ns, os.stat(first).st_mtime_ns + 1))
    assert inputs.describe() != described
    os.unlink(first)
    with pytest.raises(FileError, match=r"a\.jsonl cannot be read: No such file"):
        inputs.describe()
    assert Inputs(["-", "memory://x.jsonl"]).describe() == [{"path": "-"}, {"path": "memory://x.jsonl"}]


def test_what_is_missing_is_told_at_once(tmp_path):
    with pytest.raises(FileError, match=r"none\.jsonl cannot be read: No such file") as caught:
        Inputs(str(tmp_path / "none.jsonl"))
    assert "check the name" in caught.value.advice
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "none")
    with pytest.raises(FileError, match=r"link\.jsonl cannot be read: No such file"):
        Inputs(str(tmp_path / "link.jsonl"))


def test_what_may_not_be_read_is_told_at_once(open_folder):
    path = open_folder / "a.jsonl"
    path.write_text("{}")
    path.chmod(0)
    (open_folder / "sub").mkdir(mode=0)
    with as_nobody():
        with pytest.raises(FileError, match=r"a\.jsonl cannot be read: Permission denied") as caught:
            Inputs(str(path))
        assert "permissions" in caught.value.advice
        # A folder that is passed by in silence would be data that are missing.
        with pytest.raises(FileError, match="sub cannot be read: Permission denied"):
            Inputs(str(open_folder))


# -- standard input and pipes ---------------------------------------------------------------------------------------


def test_standard_input_is_a_pipe(tmp_path):
    reading, writing = os.pipe()
    os.write(writing, b'{"n": 1}\nno\n')
    os.close(writing)
    with standard(0, reading):
        inputs = Inputs("-")
        assert inputs.total_bytes is None
        first, second = inputs
        assert (first.place, first.fields()) == ("stdin:1", {"n": 1})
        assert second.place == "stdin:2"
        assert list(inputs) == []  # it can be read only once


def test_standard_input_is_a_file_of_any_format(tmp_path):
    (tmp_path / "a.csv").write_text("n\n1\n")
    for path, kind in (
        (write(tmp_path / "a.jsonl", [{"n": "1"}]), None),
        (write(tmp_path / "a.parquet", [{"n": "1"}]), "parquet"),
        (tmp_path / "a.csv", "csv"),
    ):
        with standard(0, os.open(path, os.O_RDONLY)):
            inputs = Inputs("-", format=kind)
            assert [raw.fields() for raw in inputs] == [{"n": "1"}]
            assert inputs.total_bytes == (None if kind == "parquet" else os.stat(path).st_size)


def test_parquet_comes_through_a_pipe(tmp_path):
    path = write(tmp_path / "a.parquet", [{"n": n} for n in range(5000)])
    with subprocess.Popen(["cat", path], stdout=subprocess.PIPE) as cat, standard(0, os.dup(cat.stdout.fileno())):
        assert rows("-", format="parquet") == [{"n": n} for n in range(5000)]


def test_parquet_that_is_compressed_once_more(tmp_path):
    data = Path(write(tmp_path / "a.parquet", [{"n": n} for n in range(5000)])).read_bytes()
    for suffix in ("gz", "zst"):
        path = tmp_path / f"a.parquet.{suffix}"
        path.write_bytes(compressed(data, suffix))
        assert rows(path) == [{"n": n} for n in range(5000)]


def test_a_pipe_that_does_not_block_is_read_to_its_end():
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    late = threading.Timer(0.2, lambda: (os.write(writing, b'": 2}\n{"n": 3}\n'), os.close(writing)))
    os.write(writing, b'{"n": 1}\n{"n')
    with standard(0, reading):
        late.start()
        assert rows("-") == [{"n": 1}, {"n": 2}, {"n": 3}]
    late.join()


def test_standard_input_that_is_closed_or_a_folder(tmp_path):
    said = "standard input cannot be read: Is a directory"
    with standard(0, os.open(tmp_path, os.O_RDONLY)), pytest.raises(FileError, match=said):
        read("-")
    before = os.dup(0)
    os.close(0)
    try:
        assert Inputs("-").total_bytes is None
        with pytest.raises(FileError, match="standard input cannot be read: Bad file descriptor"):
            read("-")
    finally:
        os.dup2(before, 0)
        os.close(before)


def test_a_named_pipe_is_opened_once_and_has_no_size(tmp_path):
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    inputs = Inputs(str(pipe))
    assert inputs.total_bytes is None
    code = "import sys; open(sys.argv[1], 'w').write('{\"n\": 1}\\n' * 1000)"
    with subprocess.Popen([sys.executable, "-c", code, str(pipe)]):
        assert [raw.fields() for raw in inputs] == [{"n": 1}] * 1000
