"""One session of a run, from input to output: what is done already, what is left, and the publishing."""

from __future__ import annotations

import contextlib
import json
import os
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, Self

import trio

from trinfer.batch.committer import JournalTarget, StreamTarget
from trinfer.batch.feed import Feed
from trinfer.batch.pipeline import run_items
from trinfer.batch.publish import Published, list_failures, publish
from trinfer.batch.report import render
from trinfer.batch.rollouts import leaves
from trinfer.batch.run_directory import RunDirectory, temporary_index
from trinfer.batch.safety import is_output_of, leave_out_own_files, refuse_other_inputs
from trinfer.batch.stats import Session, statistics, total
from trinfer.batch.summary import Summary
from trinfer.data.files import is_remote
from trinfer.data.writers import OutputFile, is_stream
from trinfer.durable.manifest import Manifest
from trinfer.errors import ConfigError, FileError, RunStopped

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from trinfer.batch.committer import Target
    from trinfer.batch.items import Generator, Job, Progress
    from trinfer.batch.options import RunOptions
    from trinfer.data.readers import Inputs
    from trinfer.durable.disk import Disk
    from trinfer.server.lifecycle import ServerState

__all__ = ["BatchRun"]

SAVE_EVERY = 10.0  # seconds between two savings of the figures of a session
LOOK_EVERY = 0.5
SETTINGS = ("model", "use_chat", "params")  # of a job: what decides an answer beside the payload


class Watched(Protocol):
    """What is seen of an engine while it runs."""

    @property
    def state(self) -> ServerState: ...
    @property
    def phase(self) -> str: ...
    @property
    def restarts(self) -> int: ...


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
        self.is_published = False
        self.server: Watched | None = None
        self._output: OutputFile | None = None
        self._errors: OutputFile | None = None

    def __enter__(self) -> Self:
        options = self._options
        if options.world_size > 1 and not options.output.is_folder:
            raise ConfigError(f"the output {options.output.path!r} of several shards: allowed is a folder (FOLDER/)")
        if options.ordered and not self._inputs.is_repeatable:
            raise ConfigError(
                "the order of standard input, a pipe or an iterator cannot be kept: allowed is one of it and ordered",
                cause="the input is read once more in the end, to write the rows in its order",
                advice="give a file, or a list; or leave --ordered out, and sort the output",
            )
        is_ours = False
        if options.run_dir is not None:
            is_ours = is_output_of(options.run_dir, options.output)
            leave_out_own_files(self._inputs, options.output, options.run_dir, is_ours=is_ours)
        options.output.check(self._inputs.paths)
        with contextlib.ExitStack() as stack:
            if options.run_dir is None:
                self._open_output(stack)
            else:
                self._open_directory(options.run_dir, stack, is_ours=is_ours)
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

    def _open_directory(self, path: Path, stack: contextlib.ExitStack, *, is_ours: bool) -> None:
        options = self._options
        output = options.output.path
        existing = options.output.exists(f"{options.rank:05d}-of-{options.world_size:05d}")
        self._may_replace = is_ours or options.overwrite
        if existing is not None and not self._may_replace:
            raise FileError(f"the output {existing} exists already", advice="give another name, or --overwrite")
        notes = {**options.notes, "output": output, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        notes |= {"folder": os.getcwd(), "run_dir": os.path.realpath(path), "inputs": self._inputs.describe()}
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
        if not (options.overwrite or options.accept_changes or options.retry_failed):
            refuse_other_inputs(self._inputs, options.output, path)

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
        if mark is None or self.directory.changed:
            return False
        # Standard input, pipes, remote files and iterables do not tell whether they have changed: they are read once
        # more.
        if not self._inputs.tells_changes:
            return False
        output = self._options.output
        is_same = all(mark.get(name) == value for name, value in self._what_is_published().items())
        files = [os.path.join(output.path, part) for part in mark.get("parts", [])] or [output.path]
        return is_same and (is_remote(output.path) or all(map(os.path.exists, files)))

    def _what_is_published(self) -> dict[str, Any]:
        """Of which input, and to where."""
        options = self._options
        output = {**options.output.describe(), "ordered": options.ordered}
        return {"inputs": self._inputs.describe(), "selection": self._inputs.selection, "output": output}

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
        adapt: Callable[[Any], Generator] | None = None,
    ) -> None:
        """Do what is left, and publish.

        Args:
            make_server: the engine; it is not started where nothing is left. None in its place is a worker node, whose
                engine has ended when the block is entered.
            stop: when it is set, no more rows are begun, and those under way are finished.
            progress: shown how far the run is, and what the engine is doing: a start may take minutes.
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
                nursery.start_soon(self._watch, progress)
                failure: BaseException | None = None
                try:
                    if opened.is_continued and not await self._peek(feed):
                        self._options.policy.check(summary, at_end=True)
                        summary.is_complete = True
                    else:
                        async with make_server() as server:
                            if server is None:
                                return
                            self.server = server
                            generator = server if adapt is None else adapt(server)
                            await self._generate(generator, feed, target, stop, progress)
                except BaseException as error:  # comes out below, not in a group
                    if _is_cancelled(error):
                        raise
                    failure = _the_one(error)
                finally:
                    nursery.cancel_scope.cancel()
                    self._look_at_the_engine()
                    # Also of a session that is stopped: what it has paid counts.
                    self._save_session(self._session.to_json())
            if failure is not None:
                if isinstance(failure, RunStopped) and self.directory is not None:
                    await trio.to_thread.run_sync(self._list_failures, self.directory)
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
        feed.tell(self.summary)
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
            settings={name: self._options.job.get(name) for name in SETTINGS},
            summary=self.summary,
            progress=progress,
            stop=stop,
        )

    async def _watch(self, progress: Progress | None) -> None:
        """Keep the figures of this session, also of one that is killed, and show them."""
        next_save = trio.current_time() + SAVE_EVERY
        self.summary.engine = "reading the journal"
        while True:
            self._look_at_the_engine()
            self._session.sample()
            if progress is not None:
                progress.update(self.summary)
            if self.directory is not None and trio.current_time() >= next_save:
                # Told here, written there: the figures change while the thread is at work.
                await trio.to_thread.run_sync(self._save_session, self._session.to_json())
                next_save = trio.current_time() + SAVE_EVERY
            await trio.sleep(LOOK_EVERY)

    def _look_at_the_engine(self) -> None:
        server, summary = self.server, self.summary
        if server is not None and server.state.value != "stopped":
            summary.engine = server.phase or server.state.value
            summary.restarts = server.restarts

    def _save_session(self, figures: dict[str, Any]) -> None:
        """A disk that is full is told by the journal; figures are not worth a run."""
        if self.directory is not None and (self.summary.done or self.summary.requests):
            with contextlib.suppress(FileError):
                self.directory.save_session(figures)

    def _list_failures(self, directory: RunDirectory) -> None:
        """For the user, who is to mend their cause; the run has failed already, and says why."""
        with contextlib.suppress(FileError):
            list_failures(directory, self._disk)

    def _publish(self, expected: int) -> None:
        directory, options = self.directory, self._options
        if directory is None:
            assert self._output is not None
            self._output.finish()
            if self._errors is not None:
                self._errors.finish()
            self.is_published = True
            return
        existing = options.output.exists(directory.shard_name)
        if existing is not None and not self._may_replace:
            raise FileError(
                f"the output {existing} was made by somebody else while the run was under way",
                cause="nothing is lost: every row is kept in the run directory",
                advice="move it away, or use --overwrite, and run the same command again",
            )
        directory.note_output(options.output.describe()["path"])
        order = self._inputs if options.ordered else None
        self.published = publish(directory, options.output, expected=expected, order=order, disk=self._disk)
        self._save_session(self._session.to_json())
        self._describe(directory)
        published = self.published
        mark = {name: getattr(published, name) for name in ("rows", "failed", "removed", "parts")}
        directory.mark_finished({**mark, **self._what_is_published()})
        self.is_published = True

    def _describe(self, directory: RunDirectory) -> None:
        """Statistics and report: of use to people, and not worth a failure."""
        with contextlib.suppress(OSError):
            figures = self.statistics()
            (directory.path / "stats.json").write_text(json.dumps(figures, indent=1) + "\n")
            sessions = directory.sessions()
            page = render(figures, total(sessions), sessions, directory.manifest)
            (directory.path / "report.html").write_text(page, encoding="utf-8")


def _is_cancelled(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return error.subgroup(trio.Cancelled) is not None
    return isinstance(error, trio.Cancelled)


def _the_one(error: BaseException) -> BaseException:
    """What groups hold: our nurseries, and those of a shared context, wrap what goes through them."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    errors = list(leaves(error))
    ends = [each for each in errors if isinstance(each, KeyboardInterrupt | SystemExit)]
    return ends[0] if ends else errors[0] if len(errors) == 1 else error


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
        directory.note_session()
        self.target = JournalTarget(directory.load())
        self.is_continued = directory.known > 0
        self.feed = Feed(
            run._inputs,
            run._job,
            directory.index,
            done=directory.done,
            recall=directory.recall,
            rank=options.rank,
            world_size=options.world_size,
        )

    def close(self) -> None:
        if hasattr(self, "feed"):
            self.feed.close()
        self._stack.close()
