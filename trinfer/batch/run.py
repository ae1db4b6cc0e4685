"""One session of a run, from input to output: what is done already, what is left, and the publishing."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import trio

from trinfer.batch.committer import JournalTarget, StreamTarget
from trinfer.batch.feed import Feed
from trinfer.batch.pipeline import Limits, run_items
from trinfer.batch.policy import ErrorPolicy
from trinfer.batch.publish import Output, Published, publish
from trinfer.batch.report import render
from trinfer.batch.run_directory import RunDirectory, temporary_index
from trinfer.batch.stats import Prices, Session, statistics, total
from trinfer.batch.summary import Summary
from trinfer.data.files import is_remote
from trinfer.data.writers import OutputFile, check_output, is_stream
from trinfer.durable.manifest import Manifest
from trinfer.errors import ConfigError, FileError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from trinfer.batch.committer import Target
    from trinfer.batch.items import Generator, Job, Progress
    from trinfer.data.readers import Inputs
    from trinfer.durable.disk import Disk

__all__ = ["BatchRun", "RunOptions", "default_run_dir"]

SAVE_EVERY = 10.0  # seconds between two looks at the figures of a session
SAMPLE_EVERY = 1.0


def default_run_dir(output: str) -> Path:
    """OUTPUT.run, beside the output."""
    if is_remote(output):
        raise ConfigError(
            f"the run directory of a remote output must be on a local disk: allowed is --run-dir FOLDER ({output})"
        )
    name = output.rstrip("/")
    if name in {"", ".", ".."}:
        raise ConfigError(f"the output {output!r}: allowed are files, and folders that have a name")
    return Path(name + ".run")


@dataclass(frozen=True)
class RunOptions:
    """How a run is done.

    Attributes:
        output: where rows go.
        run_dir: where the run is kept; None for a run that cannot be continued.
        limits: how much at once.
        policy: what becomes of rows that fail.
        params: generation parameters of every request that does not set them itself.
        job: what decides the answers, for the manifest.
        notes: what else is good to know.
        ordered: write the rows in the order of the input.
        overwrite: replace an output that exists.
        restart, accept_changes, repair, retry_failed: see `RunDirectory`.
        errors: a file for failures of a run without a run directory; those of others are in the directory.
        prices: for the statistics.
    """

    output: Output
    run_dir: Path | None
    limits: Limits
    policy: ErrorPolicy = field(default_factory=ErrorPolicy)
    params: Mapping[str, Any] = field(default_factory=dict)
    job: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    rank: int = 0
    world_size: int = 1
    ordered: bool = False
    overwrite: bool = False
    restart: bool = False
    accept_changes: bool = False
    repair: bool = False
    retry_failed: bool = False
    errors: str | None = None
    prices: Prices = field(default_factory=Prices)
    segment_bytes: int | None = None


class BatchRun:
    """A context manager that holds the run directory or the output.

    Raises, on entering:
        FileError, ConfigError: the output or the run directory cannot be used for this run.
    """

    def __init__(self, inputs: Inputs, job: Job, options: RunOptions, disk: Disk | None = None) -> None:
        self._inputs, self._job, self._options, self._disk = inputs, job, options, disk
        self._stack = contextlib.ExitStack()
        self.summary = Summary()
        self.directory: RunDirectory | None = None
        self.published: Published | None = None
        self._output: OutputFile | None = None
        self._errors: OutputFile | None = None

    def __enter__(self) -> Self:
        options = self._options
        if options.world_size > 1 and not options.output.is_folder:
            raise ConfigError(f"the output {options.output.path!r} of several shards: allowed is a folder (FOLDER/)")
        if not options.output.is_folder:
            check_output(options.output.path, self._inputs.paths)
        with contextlib.ExitStack() as stack:
            if options.run_dir is None:
                self._open_output(stack)
            else:
                self._open_directory(options.run_dir, stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def _open_output(self, stack: contextlib.ExitStack) -> None:
        options, path = self._options, self._options.output.path
        if options.output.is_folder:
            raise ConfigError("a folder of parts needs a run directory: allowed is one of FOLDER/ and --no-durable")
        for existing in (path, path + ".partial"):
            if not is_stream(path) and not is_remote(path) and os.path.exists(existing) and not options.overwrite:
                raise FileError(
                    f"the output {existing} exists already",
                    cause="it is what an unfinished run has left" if existing != path else None,
                    advice="give another name, or --overwrite",
                )
        self._output = OutputFile(path, format=options.output.format, disk=self._disk)
        stack.callback(self._close_output, self._output)
        if options.errors is not None:
            self._errors = OutputFile(options.errors, format="jsonl", disk=self._disk)
            stack.callback(self._errors.close, keep=True)

    def _close_output(self, output: OutputFile) -> None:
        output.close(keep=True)

    def _open_directory(self, path: Path, stack: contextlib.ExitStack) -> None:
        options = self._options
        output = options.output.path
        is_ours = options.overwrite or (path / "manifest.json").exists()
        if not is_ours and not options.output.is_folder and not is_remote(output) and os.path.exists(output):
            raise FileError(f"the output {output} exists already", advice="give another name, or --overwrite")
        notes = {**options.notes, "output": output, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        notes["inputs"] = self._inputs.describe()
        self.directory = stack.enter_context(
            RunDirectory(
                path,
                Manifest(options.job, notes),
                rank=options.rank,
                world_size=options.world_size,
                restart=options.restart,
                accept_changes=options.accept_changes,
                repair=options.repair,
                retry_failed=options.retry_failed,
                segment_bytes=options.segment_bytes,
                disk=self._disk,
            )
        )

    @property
    def unfinished(self) -> Path | None:
        """What an incomplete run without a run directory has written so far."""
        return self._output.partial if self._output is not None else None

    @property
    def is_finished(self) -> bool:
        """Whether this shard has published its output already, for the same input."""
        if self.directory is None or self._options.retry_failed:
            return False
        mark = self.directory.finished()
        if mark is None or self.directory.changed or mark.get("inputs") != self._inputs.describe():
            return False
        output = self._options.output
        return is_remote(output.path) or os.path.exists(output.path)

    def statistics(self) -> dict[str, Any]:
        """The figures of all sessions."""
        sessions = self.directory.sessions() if self.directory is not None else [self._session.to_json()]
        published = self.published or Published()
        rows = {"rows": published.rows, "failed": published.failed, "removed": published.removed}
        return statistics(sessions, self._options.prices, rows)

    async def run(
        self,
        make_server: Callable[[], AbstractAsyncContextManager[Any]],
        *,
        stop: trio.Event | None = None,
        progress: Progress | None = None,
        on_server: Callable[[Any], None] | None = None,
        adapt: Callable[[Any], Generator] | None = None,
    ) -> None:
        """Do what is left, and publish.

        Args:
            make_server: the engine; it is not started where nothing is left. None in its place is a worker node, whose
                engine has ended when the block is entered.
            stop: when it is set, no more rows are begun, and those under way are finished.
            on_server: told which engine runs.
            adapt: makes of the engine what the job's requests go to.

        Raises:
            ServerError: the engine failed. FileError: a file did. RunStopped: too many rows fail.

        Cancelled: requests under way are dropped; what was answered is kept.
        """
        summary = self.summary
        summary.began = trio.current_time()
        self._session = Session(summary)
        with contextlib.closing(_Opened(self)) as opened:
            await trio.to_thread.run_sync(opened.open)
            feed, target = opened.feed, opened.target
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch)
                failure: Exception | None = None
                try:
                    if opened.is_continued and not await self._peek(feed):
                        summary.is_complete = True
                    else:
                        async with make_server() as server:
                            if server is None:
                                return
                            if on_server is not None:
                                on_server(server)
                            generator = server if adapt is None else adapt(server)
                            await self._generate(generator, feed, target, stop, progress)
                except Exception as error:  # comes out below, not in a group
                    failure = error
                finally:
                    nursery.cancel_scope.cancel()
            if failure is not None:
                raise failure
            if summary.is_complete:
                self._refuse_an_empty_input(feed)
                summary.engine = "publishing"
                if progress is not None:
                    progress.update(summary)
                await trio.to_thread.run_sync(partial(self._publish, feed.seen))

    def _refuse_an_empty_input(self, feed: Feed) -> None:
        """An input that has been read up already must not empty the output."""
        if self.directory is not None and not feed.seen and self.directory.known and self._options.world_size == 1:
            raise FileError(
                f"the input is empty, and {self.directory.path} holds {self.directory.known} rows",
                cause="standard input, a pipe or an iterator can be read only once",
                advice="give the whole input again",
            )

    async def _peek(self, feed: Feed) -> bool:
        """Whether anything is left to do: an engine that loads for minutes is not started for nothing."""
        found = await trio.to_thread.run_sync(feed.peek, abandon_on_cancel=True)
        self.summary.skipped += feed.skipped
        self.summary.bytes_read += feed.skipped_bytes
        feed.skipped = feed.skipped_bytes = 0
        return found

    async def _generate(
        self,
        server: Generator,
        feed: Feed,
        target: Target,
        stop: trio.Event | None,
        progress: Progress | None,
    ) -> None:
        await run_items(
            server,
            self._job,
            feed,
            target,
            limits=self._options.limits,
            policy=self._options.policy,
            params=self._options.params,
            summary=self.summary,
            progress=progress,
            stop=stop,
        )

    async def _watch(self) -> None:
        """Keep the figures of this session, also of one that is killed."""
        next_save = trio.current_time() + SAVE_EVERY
        while True:
            self._session.sample()
            if self.directory is not None and trio.current_time() >= next_save:
                await trio.to_thread.run_sync(self._save_session)
                next_save = trio.current_time() + SAVE_EVERY
            await trio.sleep(SAMPLE_EVERY)

    def _save_session(self) -> None:
        """A disk that is full is told by the journal; figures are not worth a run."""
        if self.directory is not None and (self.summary.done or self.summary.requests):
            with contextlib.suppress(FileError):
                self.directory.save_session(self._session.to_json())

    def _publish(self, expected: int) -> None:
        directory, options = self.directory, self._options
        if directory is None:
            assert self._output is not None
            self._output.finish()
            if self._errors is not None:
                self._errors.finish()
            return
        order = self._inputs if options.ordered else None
        self.published = publish(directory, options.output, expected=expected, order=order, disk=self._disk)
        self._save_session()
        self._describe(directory)
        mark = {**vars(self.published), "inputs": self._inputs.describe()}
        directory.mark_finished(mark)

    def _describe(self, directory: RunDirectory) -> None:
        """Statistics and report: of use to people, and not worth a failure."""
        with contextlib.suppress(OSError):
            figures = self.statistics()
            (directory.path / "stats.json").write_text(json.dumps(figures, indent=1) + "\n")
            sessions = directory.sessions()
            page = render(figures, total(sessions), sessions, directory.manifest)
            (directory.path / "report.html").write_text(page, encoding="utf-8")


class _Opened:
    """What a session works with, opened in a thread."""

    def __init__(self, run: BatchRun) -> None:
        self._run = run
        self._stack = contextlib.ExitStack()
        self.is_continued = False

    def open(self) -> None:
        run, options, directory = self._run, self._run._options, self._run.directory
        self.target: Target
        if directory is None:
            index = temporary_index()
            self._stack.callback(index.close)
            assert run._output is not None
            self.target = StreamTarget(run._output, run._errors)
            self.feed = Feed(run._inputs, run._job, index, rank=options.rank, world_size=options.world_size)
            return
        directory.mark_unfinished()
        self.target = JournalTarget(directory.load())
        self.is_continued = directory.known > 0
        self.feed = Feed(
            run._inputs,
            run._job,
            directory.index,
            is_done=directory.is_done,
            recall=directory.recall,
            rank=options.rank,
            world_size=options.world_size,
        )

    def close(self) -> None:
        self._stack.close()
