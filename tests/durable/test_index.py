"""The table of keys against a dict."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinfer.durable.index import Index

if TYPE_CHECKING:
    from pathlib import Path

# Few different first bytes, so that keys collide.
KEYS = st.builds(
    lambda low, rest: bytes([low]) + bytes(7) + rest, st.integers(0, 3), st.binary(min_size=8, max_size=8)
).filter(lambda key: key != bytes(16))
STEPS = st.lists(st.tuples(st.sampled_from(["see", "record", "get"]), KEYS, st.integers(1, 4), st.integers(0, 2**40)))


@given(STEPS)
def test_it_behaves_like_a_dict(tmp_path_factory, steps):
    index = Index(tmp_path_factory.mktemp("i"), capacity=8)
    model: dict[bytes, tuple[int, int, int, int]] = {}
    for what, key, state, offset in steps:
        seen, old, segment, place = model.get(key, (0, 0, 0, 0))
        if what == "see":
            assert tuple(index.see(key)) == (seen, old, segment, place)
            model[key] = (seen + 1, old, segment, place)
        elif what == "record":
            assert index.record(key, state, 7, offset, keep=(1, 2)) == old
            model[key] = (seen, state, 7, offset) if old not in (1, 2) else (seen, old, segment, place)
        else:
            found = index.get(key)
            assert found == (model.get(key)) if key in model else found is None
    assert len(index) == len(model)
    index.close()


def test_a_million_keys_take_no_memory(tmp_path: Path):
    """The table lies in the page cache: what the process holds does not grow with it."""
    code = """
import hashlib, resource, sys
from pathlib import Path
from trinfer.durable.index import Index

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
index = Index(Path(sys.argv[1]))
def fill(first, last):
    for number in range(first, last):
        index.see(hashlib.blake2b(b'%d' % number, digest_size=16).digest())
fill(0, 2000)
before = peak()
fill(2000, 300_000)
assert all(index.get(hashlib.blake2b(b'%d' % n, digest_size=16).digest()).seen == 1 for n in range(0, 300_000, 99))
assert len(index) == 300_000
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2048  # KiB
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_an_error_of_the_system(small_disk: Path):
    index = Index(small_disk)

    def fill() -> None:
        for number in range(100_000):
            index.see(number.to_bytes(8, "little") + b"x" * 8)

    with pytest.raises(OSError, match="No space left"):
        fill()
    index.close()
    assert os.listdir(small_disk) == []
