"""The journal's bytes: whatever was written, and wherever it was cut, recovers to what was committed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinfer import FileError
from trinfer.durable.frames import HEAD_BYTES, Record
from trinfer.durable.journal import Journal, read_segments

if TYPE_CHECKING:
    from pathlib import Path

RECORDS = st.lists(
    st.builds(
        Record,
        st.integers(1, 4),
        st.binary(min_size=16, max_size=16),
        st.binary(max_size=60) | st.just(b"trj1" * 20),  # what looks like a frame within
    ),
    min_size=1,
    max_size=5,
)
COMMITS = st.lists(RECORDS, max_size=8)


def contents(folder: Path, *, repair: bool = False) -> list[Record]:
    found = []
    for segment in read_segments(folder):
        for frame in segment.frames(verify=True, repair=repair):
            bodies = segment.read(frame)
            for entry in frame.entries():
                start = entry.offset - frame.bodies
                found.append(Record(entry.kind, entry.key, bodies[start : start + entry.length]))
    return found


def write(folder: Path, commits: list[list[Record]], segment_bytes: int = 1 << 20) -> list[tuple[Path, int, int]]:
    """Commit, and tell after each in which file, up to where, and how many records there are then."""
    journal = Journal(folder, segment_bytes=segment_bytes)
    marks = []
    count = 0
    for commit in commits:
        journal.append(commit)
        count += len(commit)
        segment = read_segments(folder)[-1].path
        marks.append((segment, segment.stat().st_size, count))
    journal.close()
    return marks


@given(commits=COMMITS, segment_bytes=st.sampled_from([1, 200, 1 << 20]))
def test_what_was_committed_is_there(tmp_path_factory, commits, segment_bytes):
    folder = tmp_path_factory.mktemp("j") / "journal"
    half = len(commits) // 2
    write(folder, commits[:half], segment_bytes)
    write(folder, commits[half:], segment_bytes)  # another process goes on
    assert contents(folder) == [record for commit in commits for record in commit]


@given(commits=st.lists(RECORDS, min_size=1, max_size=6), data=st.data())
def test_any_prefix_recovers_to_whole_commits_and_goes_on(tmp_path_factory, commits, data):
    folder = tmp_path_factory.mktemp("j") / "journal"
    segment_bytes = data.draw(st.sampled_from([1, 150, 1 << 20]))
    marks = write(folder, commits, segment_bytes)
    last = marks[-1][0]
    cut = data.draw(st.integers(0, last.stat().st_size))
    os.truncate(last, cut)
    garbage = data.draw(st.binary(max_size=30))
    with last.open("ab") as file:  # blocks of which nobody knows what is in them
        file.write(garbage)
    kept = max([count for path, end, count in marks if path != last or end <= cut], default=0)
    everything = [record for commit in commits for record in commit]
    if cut < HEAD_BYTES and cut + len(garbage) >= HEAD_BYTES:
        return  # a head of garbage is no journal; see below
    write(folder, [[Record(1, b"x" * 16, b"more")]], segment_bytes)
    assert contents(folder) == [*everything[:kept], Record(1, b"x" * 16, b"more")]


@given(commits=st.lists(RECORDS, min_size=2, max_size=6), data=st.data())
def test_a_changed_byte_is_never_taken_for_the_truth(tmp_path_factory, commits, data):
    folder = tmp_path_factory.mktemp("j") / "journal"
    marks = write(folder, commits)
    path, end, _ = marks[-1]
    at = data.draw(st.integers(HEAD_BYTES, end - 1))
    whole = bytearray(path.read_bytes())
    whole[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    everything = [record for commit in commits for record in commit]
    hit = next(n for n, (_, upto, _) in enumerate(marks) if at < upto)
    before = marks[hit - 1][2] if hit else 0
    if hit == len(marks) - 1:  # the last commit: as after a crash
        assert contents(folder) == everything[:before]
        return
    with pytest.raises(FileError, match="is damaged between bytes"):
        contents(folder)
    with pytest.raises(FileError, match="--repair"):
        Journal(folder)
    assert contents(folder, repair=True) == everything[:before] + everything[marks[hit][2] :]
    journal = Journal(folder, repair=True)
    journal.append([Record(1, b"x" * 16, b"more")])
    journal.close()
    assert contents(folder, repair=True)[-1].body == b"more"


def test_what_is_no_journal_is_refused(tmp_path):
    (tmp_path / "000001.journal").write_bytes(b"something else, and long enough")
    with pytest.raises(FileError, match="no journal of trinfer"):
        Journal(tmp_path)
    (tmp_path / "000001.journal").write_bytes(b"trinferJ" + b"\x09\0\0\0" * 2)
    with pytest.raises(FileError, match="its format is 9"):
        Journal(tmp_path)
    (tmp_path / "000001.journal").unlink()
    (tmp_path / "notes.txt").write_text("not ours")
    Journal(tmp_path).close()
    assert (tmp_path / "notes.txt").exists()


def test_old_blocks_of_another_segment_are_not_taken_for_new_ones(tmp_path):
    write(tmp_path / "a", [[Record(1, b"a" * 16, b"old")]])
    write(tmp_path / "b", [[Record(1, b"b" * 16, b"new")]])
    old = (tmp_path / "a" / "000001.journal").read_bytes()[HEAD_BYTES:]
    with (tmp_path / "b" / "000001.journal").open("ab") as file:
        file.write(old)
    assert [record.body for record in contents(tmp_path / "b")] == [b"new"]


def test_files_are_private(tmp_path):
    write(tmp_path / "j", [[Record(1, b"a" * 16, b"x")]])
    assert (tmp_path / "j").stat().st_mode & 0o077 == 0
    assert (tmp_path / "j" / "000001.journal").stat().st_mode & 0o077 == 0
