"""The rollouts of one item: a nursery of them, their requests, and what their errors mean.

Rules: when one rollout fails for good, its siblings are cancelled. An answer that was paid for is used again when the
rollout is run again, after a crash or after an error. Errors of the user's own code are the item's failure, with their
traceback kept as the cause; only a failed engine or disk is more than that.
"""

from __future__ import annotations

import math
import os
import traceback
from typing import TYPE_CHECKING, Any

import trio

from trinfer.batch.calls import Call, answer_of, call_key, encode_call, payload_hash
from trinfer.errors import InferenceError, RolloutError, ServerError, TrinferError
from trinfer.results import InferenceResult

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from trinfer.batch.committer import Committer
    from trinfer.batch.items import Generator, Item, Job
    from trinfer.batch.summary import Summary
    from trinfer.batch.waiting import Turns

__all__ = ["Requests", "leaves", "rollout_error", "run_rollouts"]


class Requests:
    """Sends the requests of all rollouts, not more than so many at once.

    Args:
        params: generation parameters of every request that does not set them itself.
        turns: how many at once; None where the number of items limits it.
        committer: keeps answers of unfinished items; None where none are kept.
        remembers: whether an item that is begun again in this session is to get the same answers.
        read: makes a result of an answer.
        settings: what decides an answer beside the payload: an answer that was kept counts only for the same.
    """

    def __init__(
        self,
        server: Generator,
        params: Mapping[str, Any],
        summary: Summary,
        turns: Turns | None,
        committer: Committer | None,
        read: Callable[[Mapping[str, Any]], InferenceResult] = InferenceResult.from_response,
        settings: Mapping[str, Any] | None = None,
        *,
        remembers: bool = True,
    ) -> None:
        self._read = read
        self._settings = payload_hash(settings or {})
        self._server, self._params, self._summary = server, params, summary
        self._turns, self._committer = turns, committer
        self._remembers = remembers or committer is not None

    async def send(self, payload: Mapping[str, Any]) -> InferenceResult:
        """One generation. Raises InferenceError, ServerError."""
        # One coroutine, and not one within the other: this runs for every request.
        summary, turns = self._summary, self._turns
        if turns is not None and not turns.take_now():
            await turns.wait()
        summary.in_flight += 1
        began = trio.current_time()
        try:
            response = await self._server.make_request({**self._params, **payload} if self._params else payload)
        finally:
            summary.in_flight -= 1
            if turns is not None:
                turns.give_back()
        result = self._read(response)
        summary.add_request(result, trio.current_time() - began)
        return result

    async def recall_or_send(self, generate: _Generate, payload: Any) -> InferenceResult:  # noqa: ANN401  # the user's
        """One generation within a rollout, which may have been answered before. Raises as `send`."""
        if not isinstance(payload, dict):
            raise TypeError(f"generate() takes the payload of a request as a dict, not a {type(payload).__name__}")
        if not self._remembers:
            return await self.send(payload)
        item = generate.item
        call = generate.begin_only_call(payload, self._settings)
        if call is not None:
            result = await self.send(payload)
            try:
                call.answered(result.raw)
            except ValueError:  # of a server of the user's own: it is no JSON, and cannot be kept
                return result
            if item.calls is None:
                item.call = call
            else:  # the rollout has sent others meanwhile
                item.calls[call.hash()] = call.body()
            if self._committer is not None:
                self._committer.hold(item.key, call)
            return result
        key = generate.next_key(payload_hash(payload, self._settings))
        if item.calls is None:
            item.calls = {} if item.call is None else {item.call.hash(): item.call.body()}
        if key in item.calls:
            self._summary.cache_hits += 1
            await trio.lowlevel.checkpoint()
            return self._read(answer_of(item.calls[key]))
        result = await self.send(payload)
        # Now, and not when it is written: the result is the rollout's, which may take it to pieces.
        item.calls[key] = body = encode_call(key, result.raw)
        if self._committer is not None:
            self._committer.hold(item.key, body)
        return result


class _Generate:
    """What a rollout calls."""

    def __init__(self, requests: Requests, item: Item, rollout: int, *, alone: bool) -> None:
        self.item = item
        self._requests, self._rollout, self._alone = requests, rollout, alone
        self._first: Call | None = None
        self._counts: dict[bytes, int] | None = None

    async def __call__(self, payload: Mapping[str, Any]) -> InferenceResult:
        return await self._requests.recall_or_send(self, payload)

    def begin_only_call(self, payload: dict[str, Any], settings: bytes) -> Call | None:
        """A note of the first call, where it may stay the only one; None where the long way is to be taken."""
        item = self.item
        if self._first is not None or self._counts is not None or not self._alone:
            return None
        if item.calls is not None or item.call is not None:  # answers that were got before
            return None
        try:
            self._first = Call(payload, settings)
        except ValueError:
            return None
        return self._first

    def next_key(self, hashed: bytes) -> bytes:
        """The key of the next call, with a payload of this hash."""
        if self._counts is None:
            self._counts = {} if self._first is None else {self._first.hash(): 1}
        number = self._counts.get(hashed, 0)
        self._counts[hashed] = number + 1
        return call_key(hashed, self._rollout, number)


async def run_rollouts(job: Job, item: Item, requests: Requests) -> list[Any]:
    """All rollouts of an item, side by side; their results in order.

    Raises:
        InferenceError: one failed; RolloutError where the user's code did. ServerError: the engine did.
    """
    if not job.keeps_calls and job.rollouts == 1:
        return [await job.rollout(item, requests.send)]
    if job.rollouts == 1:
        return [await _one(job, item, requests, 0)]
    results: list[Any] = [None] * job.rollouts
    failure: TrinferError | None = None

    async def run(number: int) -> None:
        nonlocal failure
        try:
            results[number] = await _one(job, item, requests, number)
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


async def _one(job: Job, item: Item, requests: Requests, number: int) -> Any:  # noqa: ANN401  # the job's own
    generate = _Generate(requests, item, number, alone=job.rollouts == 1) if job.keeps_calls else requests.send
    try:
        return await job.rollout(item, generate)
    except TrinferError:
        raise
    except BaseExceptionGroup as group:
        the_one = _the_one(group, item)
        if _is_stale(the_one):
            raise _stale(item) from group
        raise the_one from group
    except trio.Cancelled as error:
        if _is_stale(error):
            raise _stale(item) from error
        raise
    except Exception as error:
        raise rollout_error(item, error) from error


def _is_stale(error: BaseException) -> bool:
    """Whether a cancellation is none of this task: a nursery would take it for its own, and the item for finished."""
    if trio.current_effective_deadline() == -math.inf:
        return False
    if isinstance(error, BaseExceptionGroup):
        return error.subgroup(trio.Cancelled) is not None
    return isinstance(error, trio.Cancelled)


def _stale(item: Item) -> RolloutError:
    return RolloutError(
        f"{item.place}: the rollout failed with a trio.Cancelled, and nobody has cancelled it",
        cause="the rollout has kept the exception, or got it from another task, and has raised it again",
        advice="let a trio.Cancelled go where it was raised, and run again with retry_failed",
    )


def _the_one(group: BaseExceptionGroup[BaseException], item: Item) -> BaseException:
    """What a rollout with a nursery of its own has failed of: the worst comes first."""
    for kind in (KeyboardInterrupt, SystemExit, trio.Cancelled):
        found = group.subgroup(kind)
        if found is not None:
            return found
    errors = list(leaves(group))
    for wanted in (ServerError, InferenceError):
        for error in errors:
            if isinstance(error, wanted):
                return error
    return rollout_error(item, errors[0])


def leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The errors in a group, and in the groups within."""
    found: list[BaseException] = []
    for error in group.exceptions:
        found += leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


def rollout_error(item: Item, error: BaseException) -> RolloutError:
    """What to tell of an error of the user's code."""
    try:
        told = str(error)
    except Exception:  # their own code, too
        told = "(its text cannot be had)"
    return RolloutError(
        f"{item.place}: the rollout failed with {type(error).__name__}: {told}{_line_of(error)}",
        cause="an error in the rollout function, or in the answer that it got",
        advice="mend the function, and run again with retry_failed",
    )


def _line_of(error: BaseException) -> str:
    """Where it was raised: a failure that is skipped leaves no traceback."""
    frames = traceback.extract_tb(error.__traceback__, limit=-1)
    return f" ({os.path.basename(frames[0].filename)}:{frames[0].lineno})" if frames else ""
