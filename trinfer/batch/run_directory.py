"""A run directory: what a run is, what of it is done, and who works on it.

    manifest.json            what the run was started with
    journal/RANK-of-WORLD/   outcomes, and answers of unfinished rows
    finished/RANK-of-WORLD   what a shard has published
    outputs/                 where the run has published, or was about to: what it may replace
    sessions/                figures of each session
    owners/                  who works on it now

Rule: the journal is the truth. Everything else is made from it, or describes it. Shards are made by content, so that a
run may be continued with another number of them: every session looks into the journals of all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from trinfer.batch.calls import key_of
from trinfer.batch.committer import CALL, FAILED, REMOVED, ROW, VOID
from trinfer.data.files import is_remote
from trinfer.durable.disk import Disk, advice_for, write_file
from trinfer.durable.frames import LARGEST_BODY
from trinfer.durable.index import Index, Place
from trinfer.durable.journal import Journal, Segment, read_segments
from trinfer.durable.lock import RunLock, one_at_a_time
from trinfer.durable.manifest import Manifest, differences
from trinfer.durable.repair import mend
from trinfer.errors import FileError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trinfer.batch.items import Item

__all__ = ["RunDirectory", "finished_marks", "noted_outputs", "place_of", "temporary_index", "unusable"]

FINAL = frozenset({ROW, REMOVED})  # outcomes that no other one replaces
LENGTH_BITS = LARGEST_BODY.bit_length()  # of a place; the rest is the offset
# The manifest goes last: a folder without it is nobody's, and what is in it is left alone.
OURS = ("journal", "finished", "outputs", "sessions", "errors.jsonl", "stats.json", "report.html", "manifest.json")


class RunDirectory:
    """One shard's view of a run directory; a context manager that holds its lock.

    Args:
        manifest: what is to be run.
        restart: throw away what is there.
        accept_changes: continue although the job has changed.
        repair: take damaged parts out of the journals; nobody else may be at work.
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
        self._restart, self._accept, self._repair = restart, accept_changes, repair
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
        self.mended = 0  # parts of the journals that were damaged, and are gone
        self.session_started: str | None = None

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(
                f"the run directory {self.path} cannot be made: {error.strerror}",
                advice="choose another with --run-dir, or use --no-durable",
            ) from error
        try:
            self._refuse_others()
        except OSError as error:
            raise unusable(self.path, error) from error
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._lock)
            try:
                with one_at_a_time(self.path):
                    if self._restart:
                        self._throw_away()
                    self._check_manifest()
                    self._lock.agree()
            except OSError as error:
                raise self._error(error) from error
            self.index = self._make_index(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        if not self.has_begun and self.finished() is None:
            self._forget()  # nothing has come of it
        self._stack.close()

    @property
    def has_begun(self) -> bool:
        """Whether any row has an outcome."""
        return any(self.path.glob("journal/*/*"))

    def _forget(self) -> None:
        """Remove what an attempt has made that did not get as far as its first row."""
        with contextlib.suppress(OSError, FileError):
            with one_at_a_time(self.path):
                if any(noted_outputs(self.path)) or not self._lock.is_alone():
                    return  # there is an output that it may replace; or other shards are about to begin it
                self._remove_ours()
                self._lock.release()
                (self.path / "owners").rmdir()
            self.path.rmdir()

    def _remove_ours(self, *, keep: str = "") -> None:
        for path in self._errors_of_shards():
            path.unlink(missing_ok=True)
        for name in OURS:
            if name == keep:
                continue
            target = self.path / name
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def _refuse_others(self) -> None:
        names = sorted(each.name for each in self.path.iterdir())
        strangers = [name for name in names if name != "owners" and not name.startswith(".")]
        # Another shard may have begun the run meanwhile.
        if strangers and not (self.path / "manifest.json").exists():
            raise FileError(
                f"the run directory {self.path} holds something else: {', '.join(strangers[:3])}",
                cause="it has no manifest.json, as every run directory has",
                advice="give another --run-dir, or remove this one",
            )

    def _throw_away(self) -> None:
        self._lock.refuse_everybody()
        try:
            self._remove_ours(keep="outputs")  # they are the run's all the same
        except OSError as error:
            raise FileError(f"the run directory {self.path} cannot be emptied: {error.strerror}") from error

    def _check_manifest(self) -> None:
        found = Manifest.load(self.path)
        # Shards that wait for their engines have not begun, and will go on with the job that they have noted.
        # In this order: one that is at work now may have finished its rows before the second look.
        if found is None or (self._lock.is_alone() and not self.has_begun):
            self.manifest.save(self.path, self._disk)
            return
        if self._accept:
            self.changed = differences(found.job, self.manifest.job)
            if self.changed:
                history = [*found.notes.get("history", []), dict(found.job)]
                Manifest(self.manifest.job, {**self.manifest.notes, "history": history}).save(self.path, self._disk)
        else:
            found.check(self.manifest, self.path)

    def note_session(self) -> None:
        """Note how the run goes on: inputs may have been added, and a --limit left out. Raises FileError."""
        if self.rank > 0:
            return  # all shards get the same command, but for the rank, and there may be thousands
        try:
            with one_at_a_time(self.path):
                found = Manifest.load(self.path) or self.manifest
                notes = {**found.notes, **self.manifest.notes}
                if notes != found.notes:
                    Manifest(found.job, notes).save(self.path, self._disk)
        except OSError as error:
            raise self._error(error) from error

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
        if self._repair:
            self._lock.refuse_everybody()
            self.mended = sum(mend(folder, self._disk) for folder in sorted(self.path.glob("journal/*")))
        options = {} if self._segment_bytes is None else {"segment_bytes": self._segment_bytes}
        journal = Journal(own, disk=self._disk, **options)
        self._stack.callback(journal.close)
        try:
            # Our own comes last, so that segments that are added later have their numbers at the end.
            # Shards of the same sharding hold nothing of this one's.
            others = sorted(each for each in own.parent.iterdir() if not each.name.endswith(self.shard_name[5:]))
            for folder in [*others, own]:
                self.segments += read_segments(folder)
            # Heads and tables are read twice: that is nothing beside growing the index step by step.
            self.index.reserve(sum(frame.count for each in self.segments for frame in each.frames(verify=False)))
            for number in range(len(self.segments)):
                self._load(number)
        except OSError as error:
            raise self._error(error) from error
        return journal

    def _load(self, number: int) -> None:
        calls, done, record = self._calls, self.done, self.index.record
        code = str(self.manifest.job.get("rollout", "")).encode()
        # Damage within the rows themselves is found when they are read, in the end.
        for frame in self.segments[number].frames(verify=False):
            if frame.offset < self._ends.get(number, 0):
                continue
            replaced = outcomes = 0
            end = frame.bodies
            for kind, length, key in frame.rows():  # for millions: no more than needed
                offset, end = end, end + length
                if kind == CALL:
                    calls.setdefault(key, []).append(Place(0, kind, number, place_of(offset, length)))
                    continue
                if kind == VOID:
                    if key in calls and self.segments[number].read_one(offset, length) == code:
                        del calls[key]
                    continue
                outcomes += 1
                if record(key, kind, number, offset << LENGTH_BITS | length, keep=FINAL):
                    replaced += 1
                if calls and kind in done:
                    calls.pop(key, None)
            self.superseded += replaced
            self.known += outcomes - replaced
            self._ends[number] = frame.end

    @property
    def done(self) -> frozenset[int]:
        """States of the index in which nothing is left to do for a row."""
        return FINAL if self.retry_failed else FINAL | {FAILED}

    def recall(self, item: Item) -> None:
        """Give an item the answers that an earlier session has got for it. Raises FileError."""
        places = self._calls.pop(item.key, None)
        if places is None:
            return
        item.calls = {}
        for place in places:
            body = self.body(place)
            key = key_of(body)
            if key is not None:
                item.calls[key] = body

    def body(self, place: Place) -> bytes:
        """The record at a place of the index; not verified. Raises FileError."""
        offset, length = place.offset >> LENGTH_BITS, place.offset & LARGEST_BODY
        return self.segments[place.segment].read_one(offset, length)

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
        return next(finished_marks(self.path, self.shard_name), None)

    @property
    def errors_file(self) -> Path:
        """Where the failures of this shard are listed."""
        return self.path / ("errors.jsonl" if self.world_size == 1 else f"errors-{self.shard_name}.jsonl")

    def _errors_of_shards(self) -> Iterator[Path]:
        return self.path.glob("errors-*-of-*.jsonl")

    def remove_other_errors(self) -> None:
        """Remove what other shardings have listed: their rows are this one's now, which lists those that still fail."""
        if self.world_size > 1:
            (self.path / "errors.jsonl").unlink(missing_ok=True)
        for path in self._errors_of_shards():
            if not path.stem.endswith(self.shard_name[5:]):
                path.unlink(missing_ok=True)

    def mark_finished(self, value: Mapping[str, Any]) -> None:
        """Note that this shard has published everything. Raises FileError."""
        self._write(f"finished/{self.shard_name}", json.dumps(value).encode())

    def note_output(self, path: str) -> None:
        """Note that the run is about to write this output, and may replace it from now on. Raises FileError."""
        name = hashlib.blake2b(os.fsencode(path), digest_size=8).hexdigest()
        self._write(f"outputs/{name}", json.dumps({"path": path, "run_dir": os.path.realpath(self.path)}).encode())

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


def noted_outputs(path: Path) -> Iterator[str]:
    """Outputs that the run in a directory has written, or was about to; where they are now, if all of it was moved."""
    now = os.path.realpath(path)
    for note in sorted((path / "outputs").glob("*")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            told = json.loads(note.read_bytes())
            yield str(told["path"])
            if not is_remote(told["path"]) and told["run_dir"] != now:
                yield os.path.normpath(os.path.join(now, os.path.relpath(told["path"], told["run_dir"])))


def unusable(path: Path, error: OSError) -> FileError:
    """What to tell of a run directory that one may not look into."""
    is_private = isinstance(error, PermissionError)
    return FileError(
        f"the run directory {path} cannot be used: {error.strerror}",
        cause="it is private to the user who has started the run" if is_private else None,
        advice=f"{'run the command as that user, or ' if is_private else ''}choose another with --run-dir",
    )


def place_of(offset: int, length: int) -> int:
    """Where a record lies in its segment, as the index keeps it."""
    return offset << LENGTH_BITS | length


def finished_marks(path: Path, shard_name: str = "*") -> Iterator[Mapping[str, Any]]:
    """What the shards of the run in a directory have published."""
    for mark in sorted((path / "finished").glob(shard_name)):
        with contextlib.suppress(OSError, ValueError):
            value = json.loads(mark.read_bytes())
            if isinstance(value, dict):
                yield value


def temporary_index() -> Index:
    """An index for runs without a run directory.

    Raises:
        FileError: there is no room for it.
    """
    try:
        return Index(Path(tempfile.gettempdir()))
    except OSError as error:
        raise FileError(f"no temporary file can be made: {error.strerror}", advice=advice_for(error)) from error
