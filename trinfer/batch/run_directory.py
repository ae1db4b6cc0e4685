"""A run directory: what a run is, what of it is done, and who works on it.

    manifest.json            what the run was started with
    journal/RANK-of-WORLD/   outcomes, and answers of unfinished rows
    finished/RANK-of-WORLD   what a shard has published
    sessions/                figures of each session
    owners/                  who works on it now

Rule: the journal is the truth. Everything else is made from it, or describes it. Shards are made by content, so that a
run may be continued with another number of them: every session looks into the journals of all.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from trinfer.batch.calls import decode_call
from trinfer.batch.committer import CALL, FAILED, REMOVED, ROW
from trinfer.durable.disk import Disk, advice_for, write_file
from trinfer.durable.index import Index, Place
from trinfer.durable.journal import Journal, Segment, read_segments
from trinfer.durable.lock import RunLock
from trinfer.durable.manifest import Manifest, differences
from trinfer.errors import FileError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trinfer.batch.items import Item

__all__ = ["RunDirectory"]

LENGTH_BITS = 30  # of a record's place: 1 GiB of length, and the rest for the offset
LONGEST = (1 << LENGTH_BITS) - 1
OURS = {"manifest.json", "journal", "finished", "sessions", "owners", "errors.jsonl", "stats.json", "report.html"}


class RunDirectory:
    """One shard's view of a run directory; a context manager that holds its lock.

    Args:
        manifest: what is to be run.
        restart: throw away what is there.
        accept_changes: continue although the job has changed.
        repair: go on behind damaged parts of the journal.
        retry_failed: rows that failed count as not done.

    Raises, on entering:
        FileError: it is in use, cannot be written, is damaged, or is something else.
        ConfigError: it belongs to another job; the message lists the differences.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        *,
        rank: int = 0,
        world_size: int = 1,
        restart: bool = False,
        accept_changes: bool = False,
        repair: bool = False,
        retry_failed: bool = False,
        segment_bytes: int | None = None,
        disk: Disk | None = None,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.rank, self.world_size = rank, world_size
        self._restart, self._accept, self.repair = restart, accept_changes, repair
        self.retry_failed = retry_failed
        self._segment_bytes = segment_bytes
        self._disk = disk or Disk()
        self._lock = RunLock(path, rank, world_size)
        self._stack = contextlib.ExitStack()
        self._calls: dict[bytes, list[Place]] = {}
        self.segments: list[Segment] = []
        self.changed: list[str] = []
        self._ends: dict[int, int] = {}  # up to where each segment has been read
        self.known = 0  # rows that have an outcome
        self.superseded = 0  # outcomes that another one has replaced
        self.is_new = False
        self.session_started: str | None = None

    def __enter__(self) -> Self:
        try:
            self.is_new = not self.path.exists()
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(
                f"the run directory {self.path} cannot be made: {error.strerror}",
                advice="choose another with --run-dir, or use --no-durable",
            ) from error
        self._refuse_others()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._lock)
            if self._restart:
                self._throw_away()
            self._check_manifest()
            self.index = self._make_index(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        if not self._has_journal() and self.finished() is None:
            self._forget()  # nothing has come of it
        self._stack.close()

    def _has_journal(self) -> bool:
        return any(self.path.glob("journal/*/*"))

    def _forget(self) -> None:
        """Remove what an attempt has made that did not get as far as its first row."""
        with contextlib.suppress(OSError):
            for name in OURS - {"owners"}:
                target = self.path / name
                if target.is_dir():
                    shutil.rmtree(target)
                else:
                    target.unlink(missing_ok=True)
            self._lock.release()
            (self.path / "owners").rmdir()
            self.path.rmdir()

    def _refuse_others(self) -> None:
        if self.path.is_dir() and not (self.path / "manifest.json").exists():
            strangers = sorted(each.name for each in self.path.iterdir() if each.name not in OURS)
            strangers = [name for name in strangers if not name.startswith(".")]
            if strangers:
                raise FileError(
                    f"the run directory {self.path} holds something else: {', '.join(strangers[:3])}",
                    advice="give another --run-dir",
                )

    def _throw_away(self) -> None:
        self._lock.refuse_everybody()
        try:
            for name in OURS - {"owners"}:
                target = self.path / name
                if target.is_dir():
                    shutil.rmtree(target)
                else:
                    target.unlink(missing_ok=True)
        except OSError as error:
            raise FileError(f"the run directory {self.path} cannot be emptied: {error.strerror}") from error
        self.is_new = True

    def _check_manifest(self) -> None:
        found = Manifest.load(self.path)
        if found is None or not self._has_journal():
            self.manifest.save(self.path, self._disk)
            return
        if self._accept:
            self.changed = differences(found.job, self.manifest.job)
            if self.changed:
                history = [*found.notes.get("history", []), dict(found.job)]
                Manifest(self.manifest.job, {**self.manifest.notes, "history": history}).save(self.path, self._disk)
        else:
            found.check(self.manifest, self.path)

    def _make_index(self, stack: contextlib.ExitStack) -> Index:
        try:
            index = Index(self.path)
        except OSError as error:
            raise self._error(error) from error
        stack.callback(index.close)
        return index

    def _error(self, error: OSError) -> FileError:
        return FileError(f"the run directory {self.path} failed: {error.strerror}", advice=advice_for(error))

    # What is done.

    def load(self) -> Journal:
        """Read what is done, and open this shard's journal. Blocking; seconds for millions of rows.

        Raises:
            FileError: a journal cannot be read, or is damaged.
        """
        own = self.path / "journal" / self.shard_name
        options = {} if self._segment_bytes is None else {"segment_bytes": self._segment_bytes}
        journal = Journal(own, disk=self._disk, repair=self.repair, **options)
        self._stack.callback(journal.close)
        try:
            # Our own comes last, so that segments that are added later have their numbers at the end.
            # Shards of the same sharding hold nothing of this one's.
            others = sorted(each for each in own.parent.iterdir() if not each.name.endswith(self.shard_name[5:]))
            for folder in [*others, own]:
                self.segments += read_segments(folder)
            for number in range(len(self.segments)):
                self._load(number)
        except OSError as error:
            raise self._error(error) from error
        return journal

    def _load(self, number: int) -> None:
        index, calls = self.index, self._calls
        for frame in self.segments[number].frames(verify=False, repair=self.repair):
            if frame.offset < self._ends.get(number, 0):
                continue
            for kind, key, offset, length in frame.entries():
                if kind == CALL:
                    calls.setdefault(key, []).append(Place(0, kind, number, offset << LENGTH_BITS | length))
                elif index.record(key, kind, number, offset << LENGTH_BITS | length, keep=(ROW, REMOVED)):
                    self.superseded += 1
                else:
                    self.known += 1
                if kind != CALL:
                    calls.pop(key, None)
            self._ends[number] = frame.end

    def is_done(self, state: int) -> bool:
        """Whether nothing is left to do for a row in this state of the index."""
        return state in {ROW, REMOVED} or (state == FAILED and not self.retry_failed)

    def recall(self, item: Item) -> None:
        """Give an item the answers that an earlier session has got for it. Raises FileError."""
        places = self._calls.pop(item.key, None)
        if places is None:
            return
        item.calls = {}
        for place in places:
            segment = self.segments[place.segment]
            found = decode_call(segment.read_one(place.offset >> LENGTH_BITS, place.offset & LONGEST))
            if found is not None:
                item.calls[found[0]] = found[1]

    def load_new(self) -> None:
        """Read what this session has added. Raises FileError."""
        own = self.path / "journal" / self.shard_name
        known = {segment.path for segment in self.segments}
        self.segments += [segment for segment in read_segments(own) if segment.path not in known]
        try:
            for number, segment in enumerate(self.segments):
                if segment.path.parent == own:
                    self._load(number)
        except OSError as error:
            raise self._error(error) from error

    # What is known beside the journal.

    @property
    def shard_name(self) -> str:
        return f"{self.rank:05d}-of-{self.world_size:05d}"

    def finished(self) -> Mapping[str, Any] | None:
        """What this shard has published; None where it has not finished."""
        with contextlib.suppress(OSError, ValueError):
            value = json.loads((self.path / "finished" / self.shard_name).read_bytes())
            if isinstance(value, dict):
                return value
        return None

    def mark_finished(self, value: Mapping[str, Any]) -> None:
        """Note that this shard has published everything. Raises FileError."""
        self._write(f"finished/{self.shard_name}", json.dumps(value).encode())

    def mark_unfinished(self) -> None:
        """Other shardings' marks are void as soon as this one works."""
        with contextlib.suppress(OSError):
            for path in (self.path / "finished").iterdir():
                if path.name == self.shard_name or not path.name.endswith(self.shard_name[5:]):
                    path.unlink(missing_ok=True)

    def all_finished(self) -> bool:
        """Whether every shard has finished."""
        folder = self.path / "finished"
        return all((folder / f"{rank:05d}{self.shard_name[5:]}").exists() for rank in range(self.world_size))

    def save_session(self, figures: Mapping[str, Any]) -> None:
        """Keep the figures of this session; called again and again. Raises FileError."""
        if self.session_started is None:
            taken = self.sessions()
            self.session_started = f"{self.shard_name}-{len(taken):05d}-{os.urandom(2).hex()}"
        self._write(f"sessions/{self.session_started}.json", json.dumps(figures).encode())

    def sessions(self) -> list[Mapping[str, Any]]:
        """The figures of all sessions, oldest first."""
        found = []
        folder = self.path / "sessions"
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
            with contextlib.suppress(OSError, ValueError):
                found.append(json.loads(path.read_bytes()))
        return sorted(found, key=lambda each: each.get("began", 0))

    def _write(self, name: str, data: bytes) -> None:
        path = self.path / name
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            write_file(path, data, self._disk)
        except OSError as error:
            raise self._error(error) from error


def temporary_index() -> Index:
    """An index for runs without a run directory.

    Raises:
        FileError: there is no room for it.
    """
    try:
        return Index(Path(tempfile.gettempdir()))
    except OSError as error:
        raise FileError(f"no temporary file can be made: {error.strerror}", advice=advice_for(error)) from error
