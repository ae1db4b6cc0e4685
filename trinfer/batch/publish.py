"""From the journal to the output: every row of the input once, in a file that is whole when it has its name.

Rule: what is written is counted, and compared with the input; an output that would lack a row, or hold one twice, does
not get its name.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trinfer.batch.committer import FAILED, REMOVED, ROW, read_failed
from trinfer.batch.run_directory import place_of, temporary_index
from trinfer.data.files import is_remote
from trinfer.data.records import content_key, numbered, shard_of
from trinfer.data.writers import OutputFile, check_format, check_output, check_writable
from trinfer.durable.disk import advice_for
from trinfer.errors import FileError, TrinferError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trinfer.batch.run_directory import RunDirectory
    from trinfer.data.records import Raw
    from trinfer.durable.disk import Disk
    from trinfer.durable.index import Place

__all__ = ["Output", "Published", "is_folder", "list_failures", "publish"]

ROWS_PER_PART = 1_000_000
CHUNK = 1 << 20


@dataclass(frozen=True)
class Output:
    """Where a run's rows go.

    Attributes:
        path: a file, or a folder of parts: a path that ends with a slash.
        format: "jsonl" or "parquet"; by default what the name tells.
        suffix: of the parts in a folder.
        rows_per_part: how many rows each of them holds at most.
    """

    path: str
    format: str | None = None
    suffix: str = "jsonl"
    rows_per_part: int = ROWS_PER_PART

    @property
    def is_folder(self) -> bool:
        return is_folder(self.path)

    @property
    def is_local_folder(self) -> bool:
        return self.is_folder and not is_remote(self.path)

    def describe(self) -> dict[str, Any]:
        """What decides which files are written."""
        path = self.path if is_remote(self.path) else os.path.realpath(self.path)
        return {"path": path, "format": self.format, "suffix": self.suffix if self.is_folder else None}

    def check(self, inputs: list[str]) -> None:
        """Refuse outputs that cannot be, before anything is paid for.

        Raises:
            FileError: it is the input, cannot be written, …. ConfigError: its format is not one that is written.
        """
        check_format(f"{self.path}x.{self.suffix}" if self.is_folder else self.path, self.format)
        if not self.is_folder:
            check_output(self.path, inputs)
        elif self.is_local_folder:
            there = Path(self.path).absolute()
            try:
                while not there.exists() and there != there.parent:
                    there = there.parent
            except OSError as error:
                raise FileError(
                    f"the output {self.path} cannot be made: {error.strerror}", advice="give another"
                ) from error
            if not there.is_dir():
                raise FileError(f"the output {self.path} cannot be made: {there} is no folder", advice="give another")
            check_writable(self.path, there)

    def exists(self, shard_name: str) -> str | None:
        """What a publishing of this shard would replace; None for nothing."""
        if is_remote(self.path):
            return None
        if self.is_folder:
            return next(map(str, parts_of(self.path, shard_name)), None)
        return self.path if os.path.exists(self.path) else None


def parts_of(folder: str, shard_name: str) -> Iterator[Path]:
    """The parts in a folder that a publishing of this shard replaces: its own, and those of other shardings."""
    shard, size = shard_name.split("-of-")
    for path in sorted(Path(folder).glob("part-*-of-*-*")):
        rank, _, rest = path.name.removeprefix("part-").partition("-of-")
        if rank == shard or not rest.startswith(size + "-"):
            yield path


def is_folder(path: str) -> bool:
    """Whether an output is a folder of parts: that has to be said, by a slash at the end."""
    return path.endswith("/")


@dataclass
class Published:
    """What has been written.

    Attributes:
        rows: lines of output.
        failed, removed: rows that failed, and rows that have no line.
        parts: names of the files, where the output is a folder.
    """

    rows: int = 0
    failed: int = 0
    removed: int = 0
    parts: list[str] = field(default_factory=list)

    @property
    def handled(self) -> int:
        return self._ok + self.failed + self.removed

    _ok: int = 0


def publish(
    run: RunDirectory,
    output: Output,
    *,
    expected: int,
    order: Iterable[Raw] | None = None,
    disk: Disk | None = None,
) -> Published:
    """Write the output of a shard whose rows all have their outcomes. Blocking.

    Args:
        expected: rows of the input that belong to this shard.
        order: the input once more, to write in its order; by default in that in which rows were done.

    Raises:
        FileError: the disk is full, a journal is damaged, …; the output is as it was before.
    """
    run.load_new()
    published = Published()
    writer = _Writer(run, output, disk)
    try:
        for kind, body in _in_order(run, order) if order is not None else _as_done(run, expected):
            if kind == FAILED:
                published.failed += 1
                line, error = read_failed(body)
                writer.error(error)
                if line is not None:
                    published.rows += 1
                    writer.write(line, 1)
            elif kind == REMOVED:
                published.removed += 1
            else:
                count = body.count(b"\n") if kind == MANY else 1
                published._ok += count
                published.rows += count
                writer.write(body, count)
        if published.handled != expected:
            raise FileError(
                f"the output would hold {published.handled} rows of {expected}",
                cause="the input was changed while the run worked on it, or this is a bug of trinfer",
                advice="run the same command again; what is finished is kept",
            )
        writer.finish()
        published.parts = writer.parts
    except OSError as error:
        raise FileError(f"publishing {output.path} failed: {error.strerror}", advice=advice_for(error)) from error
    finally:
        writer.close()
    return published


def list_failures(run: RunDirectory, disk: Disk | None = None) -> None:
    """Write the errors file of a shard that has stopped because of them. Blocking.

    Raises:
        FileError: it cannot be written, or a journal is damaged.
    """
    run.load_new()
    with contextlib.closing(OutputFile(str(run.errors_file), format="jsonl", disk=disk)) as errors:
        for number, segment in enumerate(run.segments):
            for frame in segment.frames(verify=False):
                failed = [entry for entry in frame.entries() if entry.kind == FAILED]
                bodies = segment.read(frame) if failed else b""
                for _, key, offset, length in failed:
                    if _last(run, key, number, offset, length) is not None:
                        start = offset - frame.bodies
                        errors.write(read_failed(bodies[start : start + length])[1])
        errors.finish()


def _last(run: RunDirectory, key: bytes, segment: int, offset: int, length: int) -> Place | None:
    """What is known of a key whose last outcome lies here; None where a later one has taken its place."""
    place = run.index.get(key)
    if place is None or (place.segment, place.offset) != (segment, place_of(offset, length)):
        return None
    return place


MANY = -1  # a whole commit of lines
OUTCOMES = frozenset({ROW, REMOVED, FAILED})


def _as_done(run: RunDirectory, expected: int) -> Iterator[tuple[int, bytes]]:
    """Outcomes in the order of the journal. Whole commits, where nothing in it is to be left out."""
    check = run.superseded > 0 or run.known != expected
    for number, segment in enumerate(run.segments):
        for frame in segment.frames(verify=False):
            if frame.kinds.isdisjoint(OUTCOMES):
                continue
            bodies = segment.read(frame)
            if not check and frame.kinds == {ROW}:
                yield MANY, bodies
                continue
            for kind, key, offset, length in frame.entries():
                if kind not in OUTCOMES:
                    continue
                if check:
                    place = _last(run, key, number, offset, length)
                    if place is None or not place.seen:
                        continue
                start = offset - frame.bodies
                yield kind, bodies[start : start + length]


def _in_order(run: RunDirectory, records: Iterable[Raw]) -> Iterator[tuple[int, bytes]]:
    """Outcomes in the order of the input."""
    for segment in run.segments:
        for _ in segment.frames(verify=True):
            pass  # records are read one by one below, and have no checksums of their own
    with contextlib.ExitStack() as stack:
        counts = temporary_index()
        stack.callback(counts.close)
        for raw in records:
            key = content_key(raw.data)
            if run.world_size > 1 and shard_of(key, run.world_size) != run.rank:
                continue
            key = numbered(key, counts.see(key).seen)
            place = run.index.get(key)
            if place is not None and place.state:
                yield place.state, run.body(place)


class _Writer:
    """Lines to the output's file or parts, and failures to theirs."""

    def __init__(self, run: RunDirectory, output: Output, disk: Disk | None) -> None:
        self._run, self._output, self._disk = run, output, disk
        self._file: OutputFile | None = None
        self._errors: OutputFile | None = None
        self._done: list[OutputFile] = []
        self._in_part = 0
        self.parts: list[str] = []
        if output.is_local_folder:
            try:
                os.makedirs(output.path, exist_ok=True)
            except OSError as error:
                raise FileError(f"the output {output.path} cannot be made: {error.strerror}") from error

    def write(self, lines: bytes, count: int) -> None:
        if self._output.is_folder and self._in_part >= self._output.rows_per_part:
            self._finish_part()
        if self._file is None:
            self._open()
        assert self._file is not None
        self._file.write(lines)
        self._in_part += count

    def error(self, line: bytes) -> None:
        if self._errors is None:
            self._errors = OutputFile(str(self._run.errors_file), format="jsonl", disk=self._disk)
        self._errors.write(line)

    def _open(self) -> None:
        path = self._output.path
        if self._output.is_folder:
            name = f"part-{self._run.shard_name}-{len(self.parts):05d}.{self._output.suffix}"
            path = os.path.join(path, name)
            self.parts.append(name)
            self._file = OutputFile(path, disk=self._disk)
        else:
            self._file = OutputFile(path, format=self._output.format, disk=self._disk)
        self._in_part = 0

    def _finish_part(self) -> None:
        if self._file is not None:
            self._file.finish()
            self._file.close()
            self._file = None

    def finish(self) -> None:
        """Give everything its name, and remove what an earlier publishing has left."""
        if self._file is None and not (self._output.is_folder and self.parts):
            self._open()  # an empty output is an output
        self._finish_part()
        if self._errors is not None:
            self._errors.finish()
        else:
            self._run.errors_file.unlink(missing_ok=True)
        self._run.remove_other_errors()
        if self._output.is_local_folder:
            self._remove_old_parts()

    def _remove_old_parts(self) -> None:
        for path in parts_of(self._output.path, self._run.shard_name):
            if path.name not in self.parts:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        for file in (self._file, self._errors):
            if file is not None:
                with contextlib.suppress(TrinferError):
                    file.close()
