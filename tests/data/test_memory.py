"""Memory stays flat, however long the input or the output is: what a process of its own has used at most."""

from __future__ import annotations

import pytest

from tests.data.files import program

ALLOWED = 45  # MiB more than a small file of the same kind takes; the large ones have 80 and more
CODE = """
import gzip, os, sys
from pathlib import Path

from trinfer.data.readers import Inputs
from trinfer.data.writers import OutputFile

def used():
    # Not what getrusage says: that of the parent counts, too, until the program was loaded.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10

LINE = b'{"n": 1, "text": "%s"}\\n' % (b"x" * 1000)

def make(kind, path, count):
    \"\"\"About a KiB a row.\"\"\"
    if kind == "parquet":
        import pyarrow.parquet

        schema = pyarrow.schema({"n": pyarrow.int64(), "text": pyarrow.string()})
        texts = pyarrow.array(os.urandom(500).hex() for _ in range(1000))
        with pyarrow.parquet.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
            # One group of rows.
            table = pyarrow.table({"n": range(count), "text": pyarrow.concat_arrays([texts] * (count // 1000))})
            writer.write_table(table, row_group_size=count)
    elif kind == "one line":
        with open(path, "wb") as file:
            file.write(b"a\\n")
            for _ in range(count // 1000):
                file.write(b"x" * 1_000_000)
    elif kind == "csv":
        with open(path, "wb") as file:
            file.write(b"n,text\\n")
            for n in range(count):
                file.write(b'%d,"%s"\\n' % (n, b"x" * 1000))
    elif kind == "zst":  # to next to nothing
        import zstandard

        with open(path, "wb") as file, zstandard.ZstdCompressor().stream_writer(file) as writer:
            for _ in range(count // 100):
                writer.write(LINE * 100)
    else:
        with (gzip.open(path, "wb", 1) if kind == "gz" else open(path, "wb")) as file:
            for _ in range(count // 100):
                file.write(LINE * 100)

def write(path, count):
    file = OutputFile(path)
    for n in range(count // 100):
        file.write(b'{"n": %d, "text": "%s"}\\n' % (n, b"x" * 100_000))
    file.finish()
    file.close()

folder, task, kind, count = *sys.argv[1:4], int(sys.argv[4])
suffix = {"gz": "jsonl.gz", "zst": "jsonl.zst", "one line": "csv"}.get(kind, kind)
if "make" in task:
    make(kind, f"{folder}/small.{suffix}", 1000)
    make(kind, f"{folder}/large.{suffix}", count)
if "read" in task:
    found = []
    for size in ("small", "large"):
        rows = sum(1 for _ in Inputs(f"{folder}/{size}.{suffix}"))
        if kind == "one line":
            rows += sum(1 for _ in Inputs(f"{folder}/{size}.{suffix}", format="jsonl"))
        found += [rows, used()]
    print(*found)
if task == "write":
    write(f"{folder}/small.{suffix}", 20_000)  # several batches
    before = used()
    write(f"{folder}/large.{suffix}", count)
    print(1000, before, count, used())
"""


def grown(folder, task, kind, count) -> int:
    """In MiB."""
    small, before, large, after = map(int, program(CODE, folder, task, kind, count).split())
    assert (small, large) == ((3, 3) if kind == "one line" else (1000, count))
    print(kind, task, after - before)
    return after - before


@pytest.mark.parametrize("kind", ["jsonl", "gz", "zst", "csv"])
def test_a_long_input_is_read_in_little_memory(tmp_path, kind):
    assert grown(tmp_path, "make and read", kind, 80_000) < ALLOWED


def test_long_parquet_is_read_in_little_memory(tmp_path):
    program(CODE, tmp_path, "make", "parquet", 100_000)
    assert grown(tmp_path, "read", "parquet", 100_000) < ALLOWED


def test_a_line_without_end_is_read_in_little_memory(tmp_path):
    # The longest line that is allowed, twice: what it is put together from is there meanwhile.
    assert grown(tmp_path, "make and read", "one line", 200_000) < 128 + ALLOWED


def test_long_parquet_is_written_in_little_memory(tmp_path):
    assert grown(tmp_path, "write", "parquet", 100_000) < ALLOWED
