"""The rollouts of one item: a nursery of them, their requests, and what their errors mean.

Rules: when one rollout fails for good, its siblings are cancelled. An answer that was paid for is used again when the
rollout is run again, after a crash or after an error. Errors of the user's own code are the item's failure, with their
traceback kept as the cause; only a failed engine or disk is more than that.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import trio

from trinfer.batch.calls import call_key, payload_hash
from trinfer.errors import InferenceError, RolloutError, ServerError, TrinferError
from trinfer.results import InferenceResult

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from trinfer.batch.committer import Committer
    from trinfer.batch.items import Generator, Item, Job
    from trinfer.batch.summary import Summary

__all__ = ["Requests", "run_rollouts"]


class Requests:
    """Sends the requests of all rollouts, not more than so many at once.

    Args:
        params: generation parameters of every request that does not set them itself.
        limiter: how many at once; None where the number of items limits it.
        committer: remembers answers of unfinished items; None where none are kept.
        read: makes a result of an answer.
    """

    def __init__(
        self,
        server: Generator,
        params: Mapping[str, Any],
        summary: Summary,
        limiter: trio.CapacityLimiter | None,
        committer: Committer | None,
        read: Callable[[Mapping[str, Any]], InferenceResult] = InferenceResult.from_response,
    ) -> None:
        self._read = read
        self._server, self._params, self._summary = server, params, summary
        self._limiter, self._committer = limiter, committer

    async def send(self, payload: Mapping[str, Any]) -> InferenceResult:
        """One generation. Raises InferenceError, ServerError."""
        if self._limiter is None:
            return await self._send(payload)
        # On behalf of this call, and not of the task: a rollout may ask for several things in one task's name.
        turn = object()
        await self._limiter.acquire_on_behalf_of(turn)
        try:
            return await self._send(payload)
        finally:
            self._limiter.release_on_behalf_of(turn)

    async def _send(self, payload: Mapping[str, Any]) -> InferenceResult:
        summary = self._summary
        summary.in_flight += 1
        began = trio.current_time()
        try:
            response = await self._server.make_request({**self._params, **payload} if self._params else payload)
        finally:
            summary.in_flight -= 1
        result = self._read(response)
        summary.add_request(result, trio.current_time() - began)
        return result

    async def recall_or_send(self, item: Item, rollout: int, counts: Counter[bytes], payload: Any) -> InferenceResult:  # noqa: ANN401  # the user's
        """One generation within a rollout, which may have been answered before. Raises as `send`."""
        if not isinstance(payload, dict):
            raise TypeError(f"generate() takes the payload of a request as a dict, not a {type(payload).__name__}")
        hashed = payload_hash(payload)
        key = call_key(rollout, hashed, counts[hashed])
        counts[hashed] += 1
        if item.calls is None:
            item.calls = {}
        elif key in item.calls:
            self._summary.cache_hits += 1
            await trio.lowlevel.checkpoint()
            return self._read(item.calls[key])
        result = await self.send(payload)
        item.calls[key] = dict(result.raw)
        if self._committer is not None:
            self._committer.hold(item.key, key, result.raw)
        return result


class _Generate:
    """What a rollout calls."""

    def __init__(self, requests: Requests, item: Item, rollout: int) -> None:
        self._requests, self._item, self._rollout = requests, item, rollout
        self._counts: Counter[bytes] = Counter()

    async def __call__(self, payload: Mapping[str, Any]) -> InferenceResult:
        return await self._requests.recall_or_send(self._item, self._rollout, self._counts, payload)


async def run_rollouts(job: Job, item: Item, requests: Requests) -> list[Any]:
    """All rollouts of an item, side by side; their results in order.

    Raises:
        InferenceError: one failed; RolloutError where the user's code did. ServerError: the engine did.
    """
    if not job.keeps_calls and job.rollouts == 1:
        return [await job.rollout(item, requests.send)]
    results: list[Any] = [None] * job.rollouts
    if job.rollouts == 1:
        await _one(job, item, requests, 0, results)
        return results
    failure: TrinferError | None = None

    async def run(number: int) -> None:
        nonlocal failure
        try:
            await _one(job, item, requests, number, results)
        except TrinferError as error:
            # The first failure stops the others; what they raise when they are stopped is not told.
            if failure is None or isinstance(error, ServerError):
                failure = error
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for number in range(job.rollouts):
            nursery.start_soon(run, number)
    if failure is not None:
        raise failure
    return results


async def _one(job: Job, item: Item, requests: Requests, number: int, results: list[Any]) -> None:
    generate = _Generate(requests, item, number) if job.keeps_calls else requests.send
    try:
        results[number] = await job.rollout(item, generate)
    except TrinferError:
        raise
    except BaseExceptionGroup as group:
        raise _the_one(group, item) from group
    except Exception as error:
        raise _rollout_error(item, error) from error


def _the_one(group: BaseExceptionGroup[BaseException], item: Item) -> BaseException:
    """What a rollout with a nursery of its own has failed of: the worst comes first."""
    for kind in (KeyboardInterrupt, SystemExit, trio.Cancelled):
        found = group.subgroup(kind)
        if found is not None:
            return found
    errors = list(_leaves(group))
    for wanted in (ServerError, InferenceError):
        for error in errors:
            if isinstance(error, wanted):
                return error
    return _rollout_error(item, errors[0])


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


def _rollout_error(item: Item, error: BaseException) -> RolloutError:
    return RolloutError(
        f"{item.place}: the rollout failed with {type(error).__name__}: {error}",
        cause="an error in the rollout function, or in the answer that it got",
        advice="look at the traceback (TRINFER_DEBUG=1), mend the function, and run again with retry_failed",
    )
