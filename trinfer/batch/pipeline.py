"""Feed, workers, committer: many items at a time, in bounded memory.

Rules: an item that fails is an outcome like any other, as far as the policy allows; only a failed engine or disk stops
the run. What has been answered is committed, also when the run is stopped or cancelled; stopping lets the items under
way be finished.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

from trinfer.batch.committer import FAILED, REMOVED, ROW, Committer, failed_body
from trinfer.batch.items import error_line
from trinfer.batch.rollouts import Requests, run_rollouts
from trinfer.errors import InferenceError, RunStopped, TrinferError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trinfer.batch.committer import Target
    from trinfer.batch.feed import Feed
    from trinfer.batch.items import Generator, Item, Job, Progress
    from trinfer.batch.policy import ErrorPolicy
    from trinfer.batch.summary import Summary

__all__ = ["Limits", "run_items"]


class Limits:
    """How much at once.

    Args:
        generations: requests under way, >= 1.
        documents: items under way; by default as many as keep that many requests under way.
        rollouts: of each item.
    """

    def __init__(self, generations: int, documents: int | None = None, rollouts: int = 1) -> None:
        self.generations = generations
        self.documents = documents if documents is not None else max(1, generations // rollouts)


async def run_items(
    server: Generator,
    job: Job,
    feed: Feed,
    target: Target,
    *,
    limits: Limits,
    policy: ErrorPolicy,
    params: Mapping[str, Any],
    summary: Summary,
    progress: Progress | None = None,
    stop: trio.Event | None = None,
) -> None:
    """Do the job with every item of the feed, and commit every outcome, in the order in which they are done.

    Args:
        params: generation parameters of every request that does not set them itself.
        summary: filled as the run goes on.
        stop: when it is set, no more items are begun, and those under way are finished.

    Raises:
        ServerError: the engine failed. FileError: the input or the disk did. RunStopped: too many rows fail.

    Cancelled: requests under way are dropped; what was answered is committed.
    """
    run = _Run(server, job, target, limits, policy, params, summary)
    run.progress = progress
    if stop is not None:
        run.stopping = stop
    await run.all(feed)


class _Run:
    def __init__(
        self,
        server: Generator,
        job: Job,
        target: Target,
        limits: Limits,
        policy: ErrorPolicy,
        params: Mapping[str, Any],
        summary: Summary,
    ) -> None:
        self._server, self._job, self._policy, self._summary = server, job, policy, summary
        self._limits = limits
        self._committer = Committer(target, self._stop)
        # Where each item has one request at a time, the number of items is limit enough.
        needs_limiter = job.keeps_calls or limits.documents * job.rollouts > limits.generations
        limiter = trio.CapacityLimiter(limits.generations) if needs_limiter else None
        self._requests = Requests(
            server, params, summary, limiter, self._committer if job.keeps_calls else None, job.read
        )
        self.progress: Progress | None = None
        self.stopping = trio.Event()
        self._failure: TrinferError | None = None
        self._scope = trio.CancelScope()
        self._all_read = False
        self._begun = self._done = 0  # items

    def _stop(self, failure: TrinferError) -> None:
        """The first failure stops the run; those that follow from it are not told."""
        if self._failure is None:
            self._failure = failure
        self._scope.cancel()

    async def all(self, feed: Feed) -> None:
        # As many items wait as are under way: enough to keep every worker busy, and no more memory than that.
        send, items = trio.open_memory_channel["Item"](self._limits.documents)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._committer.run)
            try:
                with self._scope:
                    async with trio.open_nursery() as work, items:
                        work.start_soon(self._await_engine)
                        for _ in range(self._limits.documents):
                            work.start_soon(self._work, items.clone())
                        await self._read(feed, send)
            finally:
                self._committer.close()
        if self._failure is None and self._all_read and self._done == self._begun:
            self._check_budget(at_end=True)
            self._summary.is_complete = self._failure is None
        if self._failure is not None:
            raise self._failure

    async def _read(self, feed: Feed, items: trio.MemorySendChannel[Item]) -> None:
        async with trio.open_nursery() as nursery, items:

            async def give_up() -> None:
                await self.stopping.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(give_up)
            try:
                # A read of a terminal or pipe is abandoned when the run ends.
                while batch := await trio.to_thread.run_sync(feed.next_batch, abandon_on_cancel=True):
                    self._note(feed)
                    for item in batch:
                        self._begun += 1
                        await items.send(item)
                self._note(feed)
            except TrinferError as error:
                self._stop(error)
            else:
                self._all_read = True
            nursery.cancel_scope.cancel()

    def _note(self, feed: Feed) -> None:
        summary = self._summary
        summary.bytes_read += feed.skipped_bytes
        summary.skipped += feed.skipped
        feed.skipped_bytes = feed.skipped = 0

    async def _await_engine(self) -> None:
        """Only to know when it was ready; items are read and requests prepared meanwhile."""
        try:
            await self._server.wait_ready()
        except TrinferError as error:
            self._stop(error)
        else:
            self._summary.ready_after = trio.current_time() - self._summary.began

    async def _work(self, items: trio.MemoryReceiveChannel[Item]) -> None:
        async with items:
            async for item in items:
                if self.stopping.is_set():
                    return
                try:
                    await self._do(item)
                    self._done += 1
                except TrinferError as error:
                    self._stop(error)
                    return
                if self.progress is not None:
                    self.progress.update(self._summary)

    async def _do(self, item: Item) -> None:
        """One item up to its outcome; raises what concerns more than this item."""
        attempt = 0
        while True:
            attempt += 1
            try:
                if item.error is not None:
                    raise item.error
                outcome = self._job.finish(item, await run_rollouts(self._job, item, self._requests))
            except TrinferError as error:
                if not isinstance(error, InferenceError) and error is not item.error:
                    raise
                if self._policy.tries_again(error, attempt) and not self.stopping.is_set():
                    await trio.sleep(self._policy.pause(attempt))
                    continue
                await self._fail(item, error)
                return
            break
        summary = self._summary
        summary.bytes_read += item.size
        # Shielded: what has been paid for gets to the committer, which is there until the workers have gone.
        with trio.CancelScope(shield=True):
            if outcome.line is None:
                summary.removed += 1
                await self._committer.put(REMOVED, item.key, b"")
            else:
                summary.ok += 1
                await self._committer.put(ROW, item.key, outcome.line)

    async def _fail(self, item: Item, error: TrinferError) -> None:
        """Note a failure; with on_error="fail" it is the run's, and the item is to be done again by the next."""
        if self._policy.on_error == "fail":
            stopped = RunStopped(
                f"{item.place}: {error.message}",
                cause=error.cause,
                advice="mend the row, or use --on-error skip to go on without it; run the same command to continue",
                log_tail=error.log_tail,
            )
            raise stopped from error
        self._summary.add_failure(item.size, error)
        with trio.CancelScope(shield=True):
            body = failed_body(self._job.failed(item, error), error_line(item, error))
            await self._committer.put(FAILED, item.key, body)
        self._check_budget()

    def _check_budget(self, *, at_end: bool = False) -> None:
        summary, budget = self._summary, self._policy.budget
        if budget is not None and budget.is_exceeded(summary.failed, summary.done, at_end=at_end):
            kinds = ", ".join(f"{kind} {count}" for kind, (count, _) in sorted(summary.failures.items()))
            first = next(iter(summary.failures.values()))[1]
            self._stop(
                RunStopped(
                    f"{summary.failed} of {summary.done} rows have failed, and {budget} may: {kinds}",
                    cause=f"the first was: {' '.join(first.split())[:300]}",
                    advice="mend the cause, and run `trinfer retry` with the run directory",
                )
            )
