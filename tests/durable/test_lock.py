"""Who may work in a run directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from trinfer import FileError
from trinfer.durable.lock import RunLock, start_time

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HOLDER = """
import sys, time
from pathlib import Path
from trinfer.durable.lock import RunLock
with RunLock(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])) as lock:
    lock.agree()
    print("locked", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def holder(folder: Path, rank: int = 0, world_size: int = 1) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), str(rank), str(world_size)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_one_process_at_a_time(tmp_path: Path):
    held = pytest.raises(FileError, match=r"in use by process \d+ on ")
    with holder(tmp_path), held, RunLock(tmp_path):
        pass
    for _ in range(3):
        with RunLock(tmp_path):
            owner = json.loads((tmp_path / "owners" / "00000-of-00001").read_text())
            assert owner["pid"] == os.getpid()
            assert owner["start"] == start_time(os.getpid())
    assert os.listdir(tmp_path / "owners") == []


def test_shards_of_one_sharding_work_side_by_side_and_others_are_refused(tmp_path: Path):
    with holder(tmp_path, 0, 2) as process:
        with RunLock(tmp_path, 1, 2):
            pass
        with pytest.raises(FileError, match="as shard 00000 of 00002"), RunLock(tmp_path, 0, 3):
            pass
        lock = RunLock(tmp_path, 1, 2)
        with lock, pytest.raises(FileError, match=f"process {process.pid}"):
            lock.refuse_everybody()
    with RunLock(tmp_path, 0, 3):
        assert os.listdir(tmp_path / "owners") == ["00000-of-00003"]  # what the dead had left is gone


def test_file_systems_without_locks_go_by_who_is_alive(tmp_path: Path, monkeypatch):
    def no_locks(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with holder(tmp_path) as process:
        monkeypatch.setattr(fcntl, "flock", no_locks)
        with pytest.raises(FileError, match=f"process {process.pid}"), RunLock(tmp_path):
            pass
    with RunLock(tmp_path):
        pass
    (tmp_path / "owners" / "00000-of-00001").write_text(json.dumps({"pid": 1, "start": "1", "host": "elsewhere"}))
    with pytest.raises(FileError, match="process 1 on elsewhere"), RunLock(tmp_path):
        pass
    (tmp_path / "owners" / "00000-of-00001").write_text("half of it")
    with RunLock(tmp_path):
        pass


def test_a_folder_that_cannot_be_used(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be used: Not a directory"), RunLock(tmp_path / "file"):
        pass


def test_a_lock_that_is_held_for_a_moment_is_waited_for(tmp_path: Path, monkeypatch):
    # Whoever starts locks the files of others for as long as it takes to see that nobody holds them.
    with RunLock(tmp_path):
        pass
    path = tmp_path / "owners" / "00000-of-00001"
    path.touch()
    fd = os.open(path, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    flock, held = fcntl.flock, [fd]

    def given_back_after_a_look(fd: int, how: int) -> None:
        try:
            flock(fd, how)
        except BlockingIOError:
            if held:
                os.close(held.pop())
            raise

    monkeypatch.setattr(fcntl, "flock", given_back_after_a_look)
    with RunLock(tmp_path):
        assert path.exists()
    assert not held


def test_who_is_alone(tmp_path: Path):
    lock = RunLock(tmp_path, 1, 2)
    with lock:
        assert lock.is_alone()
        with holder(tmp_path, 0, 2):
            assert not lock.is_alone()
        assert lock.is_alone()
        with RunLock(tmp_path, 0, 2) as other:
            assert lock.is_alone()  # the other one has not agreed on anything yet
            other.agree()
            assert not lock.is_alone()


def test_a_lock_whose_holder_ends_in_the_moment_of_the_look_is_taken_all_the_same(tmp_path: Path, monkeypatch):
    flock, looks = fcntl.flock, []

    def held_at_the_first_look(fd: int, how: int) -> None:
        looks.append(how)
        if len(looks) == 1:
            raise BlockingIOError(errno.EWOULDBLOCK, "Resource temporarily unavailable")
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", held_at_the_first_look)
    with RunLock(tmp_path):
        fd = os.open(tmp_path / "owners" / "00000-of-00001", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)
