"""Disks that fail: at any call, in any way, nothing that was committed is lost, and nothing half is taken for whole."""

from __future__ import annotations

import errno
import os
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.durable.test_frames import contents
from trinfer import FileError
from trinfer.durable.disk import Disk, unfinished, write_file
from trinfer.durable.frames import PIECE, Record
from trinfer.durable.journal import Journal

if TYPE_CHECKING:
    from pathlib import Path


class FaultyDisk(Disk):
    """Fails at the n-th call, and then at every one; a write may write a part before that."""

    def __init__(self, fail_at: int, code: int = errno.EIO, part: int = 0) -> None:
        self.left, self.code, self.part = fail_at, code, part

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(self.code, os.strerror(self.code))

    def open(self, path, flags, mode=0o600):
        self._count()
        return super().open(path, flags, mode)

    def write(self, fd, data):
        if self.left == 0 and self.part:
            self.left -= 1
            return super().write(fd, data[: self.part])
        self._count()
        return super().write(fd, data)

    def sync(self, fd):
        self._count()
        super().sync(fd)

    def sync_folder(self, folder):
        self._count()
        super().sync_folder(folder)

    def truncate(self, fd, size):
        self._count()
        super().truncate(fd, size)

    def replace(self, source, target):
        self._count()
        super().replace(source, target)


@given(
    fail_at=st.integers(0, 60),
    code=st.sampled_from([errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT]),
    part=st.integers(0, 40),
    segment_bytes=st.sampled_from([1, 1 << 20]),
    piece=st.sampled_from([1, 80, PIECE]),  # three writes for a commit, two, one
)
def test_a_journal_on_a_failing_disk(tmp_path_factory, fail_at, code, part, segment_bytes, piece):
    folder = tmp_path_factory.mktemp("j") / "journal"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trinfer.durable.frames.PIECE", piece)
        fail(folder, fail_at, code, part, segment_bytes)


def fail(folder: Path, fail_at: int, code: int, part: int, segment_bytes: int) -> None:
    disk = FaultyDisk(fail_at, code, part)
    acknowledged: list[Record] = []
    offered: list[Record] = []
    journal = None
    failure = None
    try:
        journal = Journal(folder, disk=disk, segment_bytes=segment_bytes)
        for number in range(10):
            records = [Record(1, number.to_bytes(16, "big"), b"body %d" % number)] * 2
            offered += records
            journal.append(records)
            acknowledged += records
    except FileError as error:
        failure = error
    if failure is not None:
        assert os.strerror(code) in failure.message
        assert "kept" in (failure.cause or "") + (failure.advice or "")
        if journal is not None:
            with pytest.raises(FileError, match="failed before"):
                journal.append([Record(1, b"y" * 16, b"later")])
    if journal is not None:
        journal.close()
    # The next run, on a disk that works again.
    again = Journal(folder)
    found = contents(folder)
    assert found[: len(acknowledged)] == acknowledged
    assert found == offered[: len(found)]
    again.append([Record(2, b"z" * 16, b"on")])
    again.close()
    assert contents(folder) == [*found, Record(2, b"z" * 16, b"on")]


@given(fail_at=st.integers(0, 8), part=st.integers(0, 5))
def test_a_file_is_whole_or_as_it_was(tmp_path_factory, fail_at, part):
    path = tmp_path_factory.mktemp("f") / "file"
    path.write_bytes(b"old")
    disk = FaultyDisk(fail_at, part=part)
    try:
        write_file(path, b"new content", disk)
    except OSError:
        # The folder's sync comes after the rename.
        assert path.read_bytes() in {b"old", b"new content"}
    else:
        assert path.read_bytes() == b"new content"
    assert os.listdir(path.parent) == ["file"]


def test_an_interrupted_file_leaves_nothing(tmp_path: Path):
    def interrupted() -> None:
        with unfinished(tmp_path / "file", Disk()) as fd:
            os.write(fd, b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []


def test_a_full_disk_keeps_what_was_committed(small_disk: Path):
    journal = Journal(small_disk / "j", segment_bytes=8192)
    committed = 0

    def fill() -> None:
        nonlocal committed
        for number in range(10_000):
            journal.append([Record(1, number.to_bytes(16, "big"), b"x" * 500)])
            committed += 1

    with pytest.raises(FileError, match="No space left on device") as caught:
        fill()
    journal.close()
    assert "make room" in caught.value.advice
    assert committed > 50
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    again = Journal(small_disk / "j", segment_bytes=8192)
    assert len(contents(small_disk / "j")) >= committed
    again.append([Record(1, b"y" * 16, b"more")])
    again.close()
    assert contents(small_disk / "j")[-1].body == b"more"


def test_a_disk_that_is_full_in_the_middle_of_a_commit(small_disk: Path):
    first = Record(1, b"a" * 16, b"first")
    large = [Record(1, bytes([n]) * 16, b"x" * 5000) for n in range(30)]  # two pieces and a bit, of which one has room
    journal = Journal(small_disk / "j")
    journal.append([first])
    with pytest.raises(FileError, match="No space left on device"):
        journal.append(large)
    with pytest.raises(FileError, match="failed before"):
        journal.append([Record(1, b"y" * 16, b"later")])
    journal.close()
    assert (small_disk / "j" / "000001.journal").stat().st_size > 30_000  # a part of it is there
    assert contents(small_disk / "j") == [first]
    Journal(small_disk / "j").close()  # what is cut off makes room
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    again = Journal(small_disk / "j")
    again.append(large)
    again.close()
    assert contents(small_disk / "j") == [first, *large]


def test_a_disk_that_becomes_read_only(small_disk: Path):
    journal = Journal(small_disk / "j")
    journal.append([Record(1, b"a" * 16, b"x")])
    journal.close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(FileError, match="Read-only file system") as caught:
        Journal(small_disk / "j")
    assert "writable" in caught.value.advice
    assert [record.body for record in contents(small_disk / "j")] == [b"x"]
