"""The journal's bytes: whatever was written, and wherever it was cut, recovers to what was committed."""

from __future__ import annotations

import errno
import itertools
import os
import struct
import zlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinfer import FileError
from trinfer.durable.disk import Disk
from trinfer.durable.frames import HEAD_BYTES, PIECE, Record, encode_frame
from trinfer.durable.journal import Journal, read_segments
from trinfer.durable.repair import mend

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


def contents(folder: Path) -> list[Record]:
    found = []
    for segment in read_segments(folder):
        for frame in segment.frames(verify=True):
            bodies = segment.read(frame)
            for entry in frame.entries():
                start = entry.offset - frame.bodies
                found.append(Record(entry.kind, entry.key, bodies[start : start + entry.length]))
    return found


def quick_look(folder: Path) -> list[tuple[int, bytes]]:
    """What a run that is continued sees: heads and tables."""
    frames = [frame for segment in read_segments(folder) for frame in segment.frames(verify=False)]
    return [(entry.kind, entry.key) for frame in frames for entry in frame.entries()]


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
    was = last.read_bytes()
    cut = data.draw(st.integers(0, len(was)))
    os.truncate(last, cut)
    garbage = data.draw(st.binary(max_size=30) | st.binary(min_size=400, max_size=400))
    with last.open("ab") as file:  # blocks of which nobody knows what is in them
        file.write(garbage)
    assert cut < HEAD_BYTES or quick_look(folder) == [(record.kind, record.key) for record in contents(folder)]
    now = last.read_bytes()  # garbage may happen to be what was there
    kept = max([count for path, end, count in marks if path != last or now[:end] == was[:end]], default=0)
    everything = [record for commit in commits for record in commit]
    if cut < HEAD_BYTES and cut + len(garbage) >= HEAD_BYTES:
        return  # a head of garbage is no journal; see below
    write(folder, [[Record(1, b"x" * 16, b"more")]], segment_bytes)
    assert contents(folder) == [*everything[:kept], Record(1, b"x" * 16, b"more")]


@given(records=RECORDS, piece=st.integers(1, 200))
def test_pieces_are_the_frame_however_small_they_are(records, piece):
    whole = b"".join(encode_frame(records, 7))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trinfer.durable.frames.PIECE", piece)
        assert b"".join(encode_frame(records, 7)) == whole


MIXED = [Record(1 + n % 5, bytes([n]) * 16, b"trj1 %d" % n * (n % 3)) for n in range(8)]  # bodies may be empty
PIECES = {
    "many": [Record(1 + n % 5, n.to_bytes(16, "big"), b"%d" % n * 40) for n in range(1500)],
    "empty": [Record(2, n.to_bytes(16, "big"), b"") for n in range(4000)],
    "huge": [Record(1, b"h" * 16, b"x" * (3 * PIECE))],
    "edges": [Record(1, bytes([n]) * 16, b"x" * (PIECE + n - 1)) for n in range(3)],
}


def cuts_of(records: list[Record], piece: int) -> list[int]:
    """Lengths to which a frame may be torn: all of a small one; about the pieces' edges of a large one."""
    edges = list(itertools.accumulate(map(len, encode_frame(records, 0))))
    if edges[-1] < piece:
        return list(range(edges[-1]))
    return sorted({0, *(edge + by for edge in edges for by in (-1, 0, 1) if edge + by < edges[-1])})


@pytest.mark.parametrize("name", ["mixed", *PIECES])
@pytest.mark.parametrize("tail", ["nothing", "zeros", "garbage"])
def test_a_commit_of_several_pieces_is_there_whole_or_not_at_all(tmp_path, monkeypatch, name, tail):
    if name == "mixed":
        monkeypatch.setattr("trinfer.durable.frames.PIECE", 16)
    records = PIECES.get(name, MIXED)
    first, more = Record(1, b"a" * 16, b"first"), Record(3, b"x" * 16, b"more")
    (_, begin, _), (path, end, _) = write(tmp_path, [[first], records])
    whole = path.read_bytes()
    assert contents(tmp_path) == [first, *records]
    for cut in cuts_of(records, PIECE):
        left = end - begin - cut  # the file may have its length before it has its blocks
        after = {"nothing": b"", "zeros": bytes(left), "garbage": b"\xff" * min(left, 50)}[tail]
        path.write_bytes(whole[: begin + cut] + after)
        if path.read_bytes() == whole:
            continue
        assert quick_look(tmp_path) == [(1, first.key)]
        write(tmp_path, [[more]])
        assert contents(tmp_path) == [first, more]


@given(commits=COMMITS)
def test_the_quick_ways_to_read_a_table_say_the_same(tmp_path_factory, commits):
    folder = tmp_path_factory.mktemp("j") / "journal"
    write(folder, commits)
    for segment in read_segments(folder):
        for frame in segment.frames(verify=False):
            entries = list(frame.entries())
            assert [(entry.kind, entry.length, entry.key) for entry in entries] == list(frame.rows())
            assert frame.kinds == {entry.kind for entry in entries}
            assert frame.count == len(entries)


@given(commits=st.lists(RECORDS, min_size=2, max_size=6), data=st.data())
def test_a_changed_byte_is_never_taken_for_the_truth(tmp_path_factory, commits, data):
    folder = tmp_path_factory.mktemp("j") / "journal"
    marks = write(folder, commits)
    path, end, _ = marks[-1]
    at = data.draw(st.integers(0, end - 1))
    whole = bytearray(path.read_bytes())
    whole[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    everything = [record for commit in commits for record in commit]
    hit = next(n for n, (_, upto, _) in enumerate(marks) if at < upto)
    before = marks[hit - 1][2] if hit else 0
    if at < HEAD_BYTES:
        before, marks[hit] = 0, (path, 0, 0)  # nothing but the head is lost
    elif hit == len(marks) - 1:  # the last commit: as after a crash
        assert contents(folder) == everything[:before]
        return
    with pytest.raises(FileError, match="is damaged between bytes"):
        contents(folder)
    with pytest.raises(FileError, match="--repair"):
        Journal(folder)
    assert mend(folder, Disk()) == 1
    assert contents(folder) == everything[:before] + everything[marks[hit][2] :]
    assert mend(folder, Disk()) == 0
    journal = Journal(folder)
    journal.append([Record(1, b"x" * 16, b"more")])
    journal.close()
    assert contents(folder)[-1].body == b"more"


def test_what_cannot_be_repaired(tmp_path):
    (tmp_path / "000001.journal").write_bytes(b"something else, and long enough")
    with pytest.raises(FileError, match="no journal of trinfer"):
        mend(tmp_path, Disk())
    write(tmp_path / "j", [[Record(1, b"a" * 16, b"x")]])
    path = tmp_path / "j" / "000001.journal"
    path.write_bytes(b"trinferJ" + bytes(len(path.read_bytes())))
    with pytest.raises(FileError, match="--repair"):
        Journal(tmp_path / "j")
    assert mend(tmp_path / "j", Disk()) == 1  # nothing whole follows its head
    assert contents(tmp_path / "j") == []


def test_a_head_that_never_reached_the_disk_is_no_damage(tmp_path):
    write(tmp_path, [[Record(1, b"a" * 16, b"x")]])
    (tmp_path / "000002.journal").write_bytes(bytes(4096))
    write(tmp_path, [[Record(1, b"b" * 16, b"y")]])
    assert [record.body for record in contents(tmp_path)] == [b"x", b"y"]


def test_a_repair_on_a_full_disk_changes_nothing(tmp_path):
    class Full(Disk):
        def write(self, fd: int, data: memoryview) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    commits = [[Record(1, bytes([n]) * 16, b"x" * 100)] for n in range(3)]
    marks = write(tmp_path / "j", commits)
    path = marks[0][0]
    whole = bytearray(path.read_bytes())
    whole[marks[0][1] - 1] ^= 1
    path.write_bytes(whole)
    with pytest.raises(FileError, match=r"repairing .* failed: No space") as caught:
        mend(tmp_path / "j", Full())
    assert "make room" in caught.value.advice
    assert path.read_bytes() == whole
    assert [each.name for each in (tmp_path / "j").iterdir()] == [path.name]
    assert mend(tmp_path / "j", Disk()) == 1
    assert contents(tmp_path / "j") == commits[1] + commits[2]


def test_what_is_no_journal_is_refused(tmp_path):
    (tmp_path / "000001.journal").write_bytes(b"something else, and long enough")
    with pytest.raises(FileError, match="no journal of trinfer"):
        Journal(tmp_path)
    head = struct.pack("<8sII", b"trinferJ", 9, 9)
    (tmp_path / "000001.journal").write_bytes(head + struct.pack("<I", zlib.crc32(head)))
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


@given(commits=COMMITS, frame_bytes=st.integers(1, 300))
def test_a_huge_commit_is_written_as_several_frames(tmp_path_factory, commits, frame_bytes):
    folder = tmp_path_factory.mktemp("j") / "journal"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trinfer.durable.journal.FRAME_BYTES", frame_bytes)
        write(folder, commits, 1000)
    assert contents(folder) == [record for commit in commits for record in commit]
    frames = [frame for segment in read_segments(folder) for frame in segment.frames(verify=True)]
    assert all(frame.length <= frame_bytes or len(list(frame.entries())) == 1 for frame in frames)


def test_a_commit_of_more_records_than_a_frame_can_have(tmp_path, monkeypatch):
    # Answers of unfinished rows wait for the disk without a bound.
    for module in ("frames", "journal"):
        monkeypatch.setattr(f"trinfer.durable.{module}.LARGEST_COUNT", 10)
    records = [Record(4, bytes([n]) * 16, b"x" * (n % 3)) for n in range(35)]
    write(tmp_path, [records, records[:1]])
    assert contents(tmp_path) == [*records, records[0]]
    frames = [frame.count for segment in read_segments(tmp_path) for frame in segment.frames(verify=True)]
    assert frames == [10, 10, 10, 5, 1]
