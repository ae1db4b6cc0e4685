"""Feed, workers, committer: many items at a time, in bounded memory.

Rules: an item that fails is an outcome like any other, as far as the policy allows; only a failed engine or disk stops
the run. What has been answered is committed, also when the run is stopped or cancelled; stopping lets the items under
way be finished.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

from trinfer.batch.committer import FAILED, REMOVED, ROW, VOID, Committer, failed_body
from trinfer.batch.items import error_line
from trinfer.batch.rollouts import Requests, run_rollouts
from trinfer.batch.waiting import Handover, Turns
from trinfer.errors import InferenceError, RolloutError, RunStopped, TrinferError

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
    settings: Mapping[str, Any] | None = None,
    summary: Summary,
    progress: Progress | None = None,
    stop: trio.Event | None = None,
) -> None:
    """Do the job with every item of the feed, and commit every outcome, in the order in which they are done.

    Args:
        params: generation parameters of every request that does not set them itself.
        settings: what decides an answer beside the payload; answers that were kept count only for the same.
        summary: filled as the run goes on.
        stop: when it is set, no more items are begun, and those under way are finished.

    Raises:
        ServerError: the engine failed. FileError: the input or the disk did. RunStopped: too many rows fail.

    Cancelled: requests under way are dropped; what was answered is committed.
    """
    run = _Run(server, job, target, limits, policy, params, settings, summary)
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
        settings: Mapping[str, Any] | None,
        summary: Summary,
    ) -> None:
        self._server, self._job, self._policy, self._summary = server, job, policy, summary
        self._limits = limits
        self._committer = Committer(target, self._stop)
        # Where each item has one request at a time, the number of items is limit enough.
        needs_turns = job.keeps_calls or limits.documents * job.rollouts > limits.generations
        turns = Turns(limits.generations) if needs_turns else None
        self._requests = Requests(
            server,
            params,
            summary,
            turns,
            self._committer if job.keeps_calls and target.keeps_calls else None,
            job.read,
            settings,
            remembers=policy.on_error == "retry",
        )
        self.progress: Progress | None = None
        self.stopping = trio.Event()
        self._failure: Exception | None = None
        self._scope = trio.CancelScope()
        self._all_read = False
        self._begun = self._done = 0  # items

    def _stop(self, failure: Exception) -> None:
        """The first failure stops the run; those that follow from it are not told."""
        if self._failure is None:
            self._failure = failure
        self._scope.cancel()

    async def all(self, feed: Feed) -> None:
        # As many items wait as are under way: enough to keep every worker busy, and no more memory than that.
        items = Handover(self._limits.documents)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._committer.run)
            try:
                with self._scope:
                    async with trio.open_nursery() as work:
                        work.start_soon(self._await_engine)
                        for _ in range(self._limits.documents):
                            work.start_soon(self._work, items)
                        await self._read(feed, items)
            finally:
                self._committer.close()
        if self._failure is None and self._all_read and self._done == self._begun:
            self._check_budget(at_end=True)
            self._summary.is_complete = self._failure is None
        if self._failure is not None:
            raise self._failure

    async def _read(self, feed: Feed, items: Handover) -> None:
        async with trio.open_nursery() as nursery:

            async def give_up() -> None:
                await self.stopping.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(give_up)
            try:
                # A read of a terminal or pipe is abandoned when the run ends. The thread is none that rollouts may use.
                thread = trio.CapacityLimiter(1)
                while batch := await trio.to_thread.run_sync(feed.next_batch, abandon_on_cancel=True, limiter=thread):
                    feed.tell(self._summary)
                    await items.give(batch)
                    self._begun += len(batch)
                feed.tell(self._summary)
            except Exception as error:  # an iterator of the caller's own may raise anything
                self._stop(error)
            else:
                self._all_read = True
            nursery.cancel_scope.cancel()
        items.close()

    async def _await_engine(self) -> None:
        """Only to know when it was ready; items are read and requests prepared meanwhile."""
        try:
            await self._server.wait_ready()
        except TrinferError as error:
            self._stop(error)
        else:
            self._summary.ready_after = trio.current_time() - self._summary.began

    async def _work(self, items: Handover) -> None:
        summary = self._summary
        while (item := items.take_now() or await items.take()) is not None and not self.stopping.is_set():
            requests = summary.requests
            try:
                await self._do(item)
                self._done += 1
            except TrinferError as error:
                self._stop(error)
                return
            if self.progress is not None:
                self.progress.update(summary)
            if summary.requests == requests:  # an item without any may not have given way
                await trio.lowlevel.checkpoint()

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
                    if isinstance(error, RolloutError) and attempt > 1:
                        item.forget_calls()  # no tool that was away for a moment: it is the answers that make it fail
                    await trio.sleep(self._policy.pause(attempt))
                    continue
                await self._fail(item, error)
                return
            break
        summary = self._summary
        summary.bytes_read += item.size
        # What has been paid for gets to the committer, which is there until the workers have gone.
        if outcome.line is None:
            summary.removed += 1
            self._committer.put(REMOVED, item.key, b"")
        else:
            summary.ok += 1
            self._committer.put(ROW, item.key, outcome.line)
        if self._committer.is_behind:
            await self._committer.room()

    async def _fail(self, item: Item, error: TrinferError) -> None:
        """Note a failure; with on_error="fail" it is the run's, and the item is to be done again by the next."""
        if isinstance(error, RolloutError) and self._job.keeps_calls:
            self._committer.put(VOID, item.key, self._job.code.encode())
        if self._policy.on_error == "fail":
            advice = "mend the row, or use --on-error skip to go on without it; run the same command to continue"
            if self._job.code:
                advice = "mend the rollout or the document, or leave it out (on_error='skip'); the same call continues"
            stopped = RunStopped(
                error.message if error.message.startswith(item.place) else f"{item.place}: {error.message}",
                cause=error.cause,
                advice=advice,
                log_tail=error.log_tail,
            )
            raise stopped from error
        self._summary.add_failure(item.size, error)
        self._committer.put(FAILED, item.key, failed_body(self._job.failed(item, error), error_line(item, error)))
        self._check_budget()
        await self._committer.room()

    def _check_budget(self, *, at_end: bool = False) -> None:
        try:
            self._policy.check(self._summary, at_end=at_end)
        except RunStopped as stopped:
            self._stop(stopped)
