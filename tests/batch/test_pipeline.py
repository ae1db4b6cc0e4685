"""Feed, workers and committer with servers that are plain objects: order, bounds, failures, cancellation."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from trinfer import BadRequestError, ConnectionLost, FileError, InferenceResult, RolloutError, RunStopped, ServerError
from trinfer.batch.calls import answer_of, key_of
from trinfer.batch.committer import CALL, FAILED, ROW, read_failed
from trinfer.batch.feed import Feed
from trinfer.batch.jobs import GenerationJob, RolloutJob
from trinfer.batch.pipeline import Limits, run_items
from trinfer.batch.policy import ErrorPolicy, FailureBudget
from trinfer.batch.prompts import PromptOptions, Prompts
from trinfer.batch.run_directory import temporary_index
from trinfer.batch.summary import Summary
from trinfer.data.records import Raw


class Rows:
    def __init__(self, count: int) -> None:
        self.count, self.read_so_far = count, 0

    def __iter__(self):
        for number in range(self.count):
            self.read_so_far += 1
            line = b'{"id": %d, "prompt": "p", "text": "t"}' % number
            yield Raw(f"f:{number}", len(line), line)


class Lines:
    """What is committed, and how."""

    keeps_calls = True

    def __init__(self, fail_after: int | None = None) -> None:
        self.ids: list[int] = []
        self.kinds: Counter[int] = Counter()
        self.errors: list[dict[str, Any]] = []
        self.fail_after = fail_after

    def commit(self, records) -> None:
        if self.fail_after is not None and len(self.ids) >= self.fail_after:
            raise FileError("the disk is full")
        for record in records:
            self.kinds[record.kind] += 1
            if record.kind == ROW:
                self.ids.append(json.loads(record.body)["id"])
            elif record.kind == FAILED:
                line, error = read_failed(record.body)
                self.errors.append(json.loads(error))
                if line is not None:
                    self.ids.append(json.loads(line)["id"])


class Server:
    def __init__(self, latency: float = 1.0, ready_after: float = 5.0) -> None:
        self.ready_after = ready_after
        self.latency, self.running, self.most, self.answered = latency, 0, 0, 0
        self.payloads: list[dict[str, Any]] = []

    async def wait_ready(self) -> None:
        await trio.sleep(self.ready_after)

    async def make_request(self, payload) -> dict[str, Any]:
        await self.wait_ready() if self.answered == 0 else None
        self.running += 1
        self.most = max(self.most, self.running)
        self.payloads.append(dict(payload))
        try:
            await trio.sleep(self.latency)
        finally:
            self.running -= 1
        self.answered += 1
        return {"choices": [{"message": {"content": "a"}}], "usage": {"completion_tokens": 2}}


async def run(server, rows, target, *, job=None, limits=None, policy=None, stop=None, summary=None) -> Summary:
    summary = summary or Summary(trio.current_time())
    job = job or GenerationJob(Prompts(PromptOptions()))
    index = temporary_index()
    try:
        await run_items(
            server,
            job,
            Feed(rows, job, index),
            target,
            limits=limits or Limits(10),
            policy=policy or ErrorPolicy(),
            params={"max_tokens": 3},
            summary=summary,
            stop=stop,
        )
    finally:
        index.close()
    return summary


async def test_every_row_once_with_bounded_concurrency(autojump_clock: trio.testing.MockClock):
    server, target = Server(), Lines()
    summary = await run(server, Rows(500), target)
    assert sorted(target.ids) == list(range(500))
    assert server.most == 10
    assert (summary.ok, summary.failed, summary.completion_tokens, summary.in_flight) == (500, 0, 1000, 0)
    assert summary.is_complete
    assert summary.latency.total == 500
    assert server.payloads[0] == {"max_tokens": 3, "messages": [{"role": "user", "content": "p"}]}


async def test_reading_overlaps_with_the_start_and_stops_at_the_bound():
    rows = Rows(10**9)
    with trio.move_on_after(0.5):  # the engine is not ready yet
        await run(Server(), rows, Lines())
    assert 10 <= rows.read_so_far <= 600  # two batches of the feed


async def test_a_failed_row_does_not_stop_the_others(autojump_clock: trio.testing.MockClock):
    class Refusing(Server):
        async def make_request(self, payload):
            answer = await super().make_request(payload)
            if self.answered % 5 == 0:
                raise BadRequestError("refused", status=400, server_message="too bad", request_id="r1")
            return answer

    target = Lines()
    summary = await run(Refusing(), Rows(50), target)
    assert sorted(target.ids) == list(range(50))
    assert (summary.ok, summary.failed, summary.failures) == (40, 10, {"BadRequestError": (10, "refused")})
    error = target.errors[0]
    assert error["response"] == {
        "status_code": 400,
        "request_id": "r1",
        "body": {"error": {"message": "too bad", "type": "BadRequestError", "param": None, "code": 400}},
    }
    assert error["error"] is None  # as OpenAI's files have it: that is for requests that got no answer
    assert error["place"].startswith("f:")


@pytest.mark.parametrize("when", ["start", "later"])
async def test_a_failed_engine_stops_the_run_and_keeps_what_was_answered(when, autojump_clock: trio.testing.MockClock):
    class Dying(Server):
        async def wait_ready(self):
            await super().wait_ready()
            if when == "start":
                raise ServerError("dead")

        async def make_request(self, payload):
            if self.answered > 30:
                raise ServerError("dead")
            return await super().make_request(payload)

    server, target, summary = Dying(), Lines(), Summary()
    with pytest.raises(ServerError, match="dead"):
        await run(server, Rows(500), target, summary=summary)
    assert len(target.ids) == server.answered
    assert not summary.is_complete


async def test_a_full_disk_stops_the_run():
    rows = Rows(10**9)
    with pytest.raises(FileError, match="full"), trio.fail_after(10):
        await run(Server(0.01, 0.0), rows, Lines(fail_after=20))
    assert rows.read_so_far < 2000


async def test_a_cancelled_run_commits_what_was_answered_and_is_not_complete():
    class Cancelling(Server):
        async def make_request(self, payload):
            if self.answered > 50:
                scope.cancel()
            return await super().make_request(payload)

    server, target, summary = Cancelling(0.02, 0.0), Lines(), Summary()
    with trio.CancelScope() as scope:
        await run(server, Rows(10**9), target, summary=summary)
    assert scope.cancelled_caught
    assert len(target.ids) == server.answered > 50
    assert not summary.is_complete


async def test_stopping_finishes_what_is_under_way_and_nothing_more():
    class Stopping(Server):
        async def make_request(self, payload):
            if self.running == 9:  # with this one, all ten are under way
                stop.set()
            return await super().make_request(payload)

    server, target, stop, summary = Stopping(latency=0.3), Lines(), trio.Event(), Summary()
    server.answered = 1  # ready
    await run(server, Rows(30), target, stop=stop, summary=summary)
    assert len(target.ids) == 10
    assert not summary.is_complete


async def test_a_run_whose_last_rows_are_dropped_is_not_complete():
    """All rows are read and under way when time runs out: that is no end."""
    server, summary = Server(latency=60), Summary()
    server.answered = 1
    with trio.move_on_after(0.3):
        await run(server, Rows(5), Lines(), summary=summary)
    assert not summary.is_complete


# -- policies -------------------------------------------------------------------------------------------------------


class Flaky(Server):
    """Refuses each row's first requests."""

    def __init__(self, times: int, error=ConnectionLost) -> None:
        super().__init__(latency=0.1)
        self.times, self.error = times, error
        self.refused: Counter[str] = Counter()

    async def make_request(self, payload):
        answer = await super().make_request(payload)
        name = json.dumps(payload)
        if self.refused[name] < self.times:
            self.refused[name] += 1
            raise self.error("not now")
        return answer


class Numbered(Rows):
    def __iter__(self):
        for number, raw in enumerate(super().__iter__()):
            yield raw._replace(data=raw.data.replace(b'"p"', b'"p%d"' % number))


async def test_rows_are_tried_again_when_that_may_help(autojump_clock: trio.testing.MockClock):
    server, target = Flaky(2), Lines()
    summary = await run(server, Numbered(20), target, policy=ErrorPolicy("retry"))
    assert (summary.ok, summary.failed, server.answered) == (20, 0, 60)
    summary = await run(Flaky(9), Numbered(20), Lines(), policy=ErrorPolicy("retry", retries=2))
    assert (summary.ok, summary.failed) == (0, 20)
    server = Flaky(1, BadRequestError)
    summary = await run(server, Numbered(20), Lines(), policy=ErrorPolicy("retry"))
    assert (summary.failed, server.answered) == (20, 20)  # the same request would be refused again


async def test_fail_stops_with_the_first_failure(autojump_clock: trio.testing.MockClock):
    target = Lines()
    with pytest.raises(RunStopped, match=r"f:\d+: not now") as caught:
        await run(Flaky(9), Numbered(500), target, policy=ErrorPolicy("fail"))
    assert isinstance(caught.value.__cause__, ConnectionLost)
    assert not target.kinds[FAILED]  # to be done by the next run


@pytest.mark.parametrize(("budget", "rows", "stops"), [("10", 11, True), ("11", 11, False), ("50%", 99, True)])
async def test_a_budget_of_failures(budget, rows, stops, autojump_clock: trio.testing.MockClock):
    policy = ErrorPolicy("skip", budget=FailureBudget.parse(budget))
    summary = Summary()
    if stops:
        with pytest.raises(RunStopped, match="have failed"):
            await run(Flaky(9), Numbered(rows), Lines(), policy=policy, summary=summary)
        assert not summary.is_complete
    else:
        assert (await run(Flaky(9), Numbered(rows), Lines(), policy=policy)).failed == rows


@pytest.mark.parametrize("text", ["x", "-1", "101%", "%", "1.5", "-1%", "", "1/0%", "nan%", "inf%"])
def test_budgets_that_are_none(text):
    with pytest.raises(Exception, match="--max-failures"):
        FailureBudget.parse(text)


def test_a_share_is_looked_at_when_it_says_something():
    share = FailureBudget.parse("1%")
    assert not share.is_exceeded(1, 50)
    assert share.is_exceeded(1, 50, at_end=True)
    assert share.is_exceeded(2, 150)
    assert not share.is_exceeded(1, 150)
    assert not share.is_exceeded(0, 0, at_end=True)
    share = FailureBudget.parse("29%")  # 0.29 is a little less than that
    assert not share.is_exceeded(29, 100)
    assert share.is_exceeded(30, 100)
    assert str(share) == "29%"


# -- rollouts -------------------------------------------------------------------------------------------------------


async def ask_twice(document, generate, **context) -> Any:
    first = await generate({"messages": [{"role": "user", "content": document.id}]})
    second = await generate({"messages": [{"role": "user", "content": first.text}], **context})
    return {"first": first.text, "last": second}


async def test_rollouts_run_side_by_side_with_their_requests_bounded(autojump_clock: trio.testing.MockClock):
    server, target = Server(), Lines()
    job = RolloutJob(ask_twice, 4, context={"seed": 1})
    summary = await run(server, Rows(20), target, job=job, limits=Limits(8, rollouts=4))
    assert (summary.ok, summary.requests, server.most) == (20, 160, 8)
    assert server.payloads[-1]["seed"] == 1
    assert target.kinds[ROW] == 20


async def test_answers_within_unfinished_documents_are_committed(autojump_clock: trio.testing.MockClock):
    target = Lines()
    await run(Server(latency=30), Rows(3), target, job=RolloutJob(ask_twice))
    assert target.kinds == {CALL: 3, ROW: 3}  # each first answer; each last one came with its row


async def test_when_one_rollout_fails_its_siblings_are_cancelled(autojump_clock: trio.testing.MockClock):
    cancelled: list[str] = []
    count = 0

    async def rollout(document, generate):
        nonlocal count
        count += 1
        if count % 4 == 0:
            await generate({"prompt": "a"})
            raise KeyError("oops")
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            cancelled.append(document.id)
            raise

    target = Lines()
    summary = await run(Server(), Rows(1), target, job=RolloutJob(rollout, 4))
    assert len(cancelled) == 3
    assert summary.failures["RolloutError"][0] == 1
    assert "KeyError: 'oops'" in target.errors[0]["error"]["message"]
    assert not target.ids  # left out


async def test_errors_in_a_rollouts_own_nursery_are_told_one_by_one(autojump_clock: trio.testing.MockClock):
    async def rollout(document, generate):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(generate, {"prompt": "a"})
            nursery.start_soon(generate, {"prompt": "b"})

    with pytest.raises(RunStopped) as caught:
        await run(Flaky(9), Rows(3), Lines(), job=RolloutJob(rollout), policy=ErrorPolicy("fail"))
    assert isinstance(caught.value.__cause__, ConnectionLost)


async def test_a_rollout_that_is_tried_again_pays_only_for_what_it_had_not(autojump_clock: trio.testing.MockClock):
    tries: Counter[str] = Counter()

    async def rollout(document, generate):
        result = await generate({"prompt": document.id})
        tries[document.id] += 1
        if tries[document.id] < 2:
            raise OSError("the tool is not there")
        return result

    server = Server()
    summary = await run(server, Rows(5), Lines(), job=RolloutJob(rollout), policy=ErrorPolicy("retry"))
    assert (summary.ok, server.answered, summary.cache_hits) == (5, 5, 5)


async def test_answers_that_make_a_rollout_fail_twice_are_asked_for_again(autojump_clock: trio.testing.MockClock):
    seen: dict[str, list[str]] = {}

    async def rollout(document, generate):
        result = await generate({"prompt": document.id})
        seen.setdefault(document.id, []).append(result.text)
        if result.text != "answer 3":
            raise ValueError("this is no JSON")
        return result

    class Sampling(Server):
        async def make_request(self, payload) -> dict[str, Any]:
            await super().make_request(payload)
            return {"choices": [{"text": f"answer {self.answered}"}]}

    summary = await run(Sampling(), Rows(1), Lines(), job=RolloutJob(rollout), policy=ErrorPolicy("retry", retries=9))
    assert seen == {"0": ["answer 1", "answer 1", "answer 2", "answer 3"]}
    assert (summary.ok, summary.cache_hits) == (1, 1)


async def test_documents_without_results_are_removed_and_results_may_be_any_json(autojump_clock):
    results = {"0": None, "1": 0, "2": [], "3": InferenceResult("x"), "4": {"a": [1]}}

    async def rollout(document, generate):
        return results[document.id]

    lines: list[dict[str, Any]] = []

    class Kept(Lines):
        def commit(self, records) -> None:
            lines.extend(json.loads(record.body) for record in records if record.kind == ROW)

    summary = await run(Server(), Rows(5), Kept(), job=RolloutJob(rollout, metadata_key="r"))
    assert (summary.ok, summary.removed) == (4, 1)
    found = {line["id"]: line["metadata"]["r"] for line in lines}
    assert found == {
        "1": [0],
        "2": [[]],
        "3": [{"text": "x", "finish_reason": None, "usage": {}}],
        "4": [{"a": [1]}],
    }


async def test_results_that_cannot_be_written_are_their_documents_failure(autojump_clock):
    async def rollout(document, generate):
        value: dict[str, Any] = {}
        value["me"] = value
        return value

    with pytest.raises(RunStopped) as caught:
        await run(Server(), Rows(1), Lines(), job=RolloutJob(rollout), policy=ErrorPolicy("fail"))
    assert isinstance(caught.value.__cause__, RolloutError)


async def test_results_that_are_too_large_are_their_documents_failure(monkeypatch, autojump_clock):
    monkeypatch.setattr("trinfer.batch.jobs.LARGEST_BODY", 1000)

    async def rollout(document, generate):
        return "x" * (900 if document.id == "1" else 1000)

    target = Lines()
    summary = await run(Server(), Rows(3), target, job=RolloutJob(rollout))
    assert (summary.ok, summary.failed, target.kinds[ROW]) == (1, 2, 1)
    assert "and at most 1000 can be kept" in summary.failures["RolloutError"][1]


async def test_an_answer_is_kept_as_it_came_whatever_the_rollout_does_with_it(autojump_clock):
    tries: Counter[str] = Counter()
    seen: list[Any] = []

    async def rollout(document, generate):
        result = await generate({"prompt": document.id})
        seen.append(json.dumps(result.raw))
        result.raw["choices"].clear()
        result.raw["mine"] = object()
        tries[document.id] += 1
        if tries[document.id] < 2:
            raise OSError("the tool is not there")
        return len(seen)

    kept: list[bytes] = []

    class Kept(Lines):
        def commit(self, records) -> None:
            kept.extend(record.body for record in records if record.kind == CALL)

    summary = await run(Server(), Rows(1), Kept(), job=RolloutJob(rollout), policy=ErrorPolicy("retry"))
    assert (summary.ok, summary.cache_hits) == (1, 1)
    assert seen[0] == seen[1]
    assert [answer_of(body)["choices"][0]["message"] for body in kept] == [{"content": "a"}]


async def test_calls_side_by_side_are_told_apart_and_all_kept(autojump_clock):
    tries: Counter[str] = Counter()
    texts: list[list[str]] = []

    async def rollout(document, generate):
        found: dict[int, str] = {}

        async def one(number: int, payload: dict[str, Any]) -> None:
            await trio.sleep(number / 10)
            found[number] = (await generate(payload)).text
            payload.clear()

        async with trio.open_nursery() as nursery:
            for number in range(4):  # the last two are the same, and the first one twice
                nursery.start_soon(one, number, {"prompt": "x" if number in {0, 2, 3} else "y"})
        texts.append([found[number] for number in range(4)])
        tries[document.id] += 1
        if tries[document.id] < 2:
            while len(kept) < 4:  # the clock jumps while a thread writes
                await trio.sleep(0.01)
            raise OSError("the tool is not there")
        return found

    class Numbered(Server):
        async def make_request(self, payload) -> dict[str, Any]:
            await super().make_request(payload)
            return {"choices": [{"text": f"{payload['prompt']} {self.answered}"}]}

    kept: dict[bytes, bytes] = {}

    class Kept(Lines):
        def commit(self, records) -> None:
            kept.update({record.body[4:20]: record.body for record in records if record.kind == CALL})

    summary = await run(Numbered(), Rows(1), Kept(), job=RolloutJob(rollout), policy=ErrorPolicy("retry"))
    assert (summary.ok, summary.requests, summary.cache_hits) == (1, 4, 4)
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == len(kept) == 4
    assert all(key_of(body) == key for key, body in kept.items())


async def test_an_answer_that_is_no_json_is_not_kept_and_harms_nobody(autojump_clock):
    class Odd(Server):
        async def make_request(self, payload) -> dict[str, Any]:
            return {**await super().make_request(payload), "odd": b"bytes"}

    target = Lines()
    assert (await run(Odd(latency=30), Rows(3), target, job=RolloutJob(ask_once))).ok == 3
    assert target.kinds == {ROW: 3}


async def ask_once(document, generate) -> Any:
    result = await generate({"prompt": document.id})
    await trio.sleep(1)
    return result


async def test_rollouts_that_use_every_thread_hold_up_neither_reading_nor_writing():
    limiter = trio.to_thread.current_default_thread_limiter()
    before, limiter.total_tokens = limiter.total_tokens, 1
    target = Lines()
    try:
        with trio.fail_after(5):
            async with limiter:  # as functions in threads do, for as long as they run
                await run(Server(0, 0), Rows(300), target, job=RolloutJob(ask_twice))
    finally:
        limiter.total_tokens = before
    assert target.kinds[ROW] == 300


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"deep": [InferenceResult("x")]}, {"deep": [{"text": "x", "finish_reason": None, "usage": {}}]}),
        ({"b", "a"}, ["a", "b"]),
        (Path("a/b"), "a/b"),
        ([float("nan"), float("inf"), 0.5], [None, None, 0.5]),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (b"\xff", "/w=="),
    ],
)
async def test_results_of_other_types_become_json(value, shown, autojump_clock):
    lines: list[Any] = []

    class Kept(Lines):
        def commit(self, records) -> None:
            lines.extend(json.loads(record.body, parse_constant=pytest.fail) for record in records)

    async def rollout(document, generate):
        return value

    assert (await run(Server(), Rows(1), Kept(), job=RolloutJob(rollout, metadata_key="r"))).ok == 1
    assert lines[0]["metadata"]["r"] == [shown]


class Mine:
    """What JSON does not know."""


async def later() -> int:
    return 1


def no_coroutine(document, generate):
    return 3


@pytest.mark.parametrize(
    ("rollout", "words"),
    [
        (lambda _, __: no_coroutine(_, __), "gives a int: it must be `async def`"),
        (partial(no_coroutine), "gives a int: it must be `async def`"),
    ],
)
async def test_a_rollout_that_is_no_async_function(rollout, words, autojump_clock):
    with pytest.raises(RunStopped, match=words):
        await run(Server(), Rows(1), Lines(), job=RolloutJob(rollout), policy=ErrorPolicy("fail"))


@pytest.mark.parametrize(("make", "words"), [(Mine, "there is a Mine in it"), (later, "an `await` is missing")])
async def test_results_that_json_does_not_know_are_told(make, words, autojump_clock):
    async def rollout(document, generate):
        return {"a": [make()]}

    target = Lines()
    summary = await run(Server(), Rows(2), target, job=RolloutJob(rollout))
    assert summary.failed == 2
    assert words in target.errors[0]["error"]["message"]


async def test_a_failure_that_is_skipped_says_where_it_was_raised(autojump_clock):
    async def rollout(document, generate):
        return [][1]

    target = Lines()
    await run(Server(), Rows(1), target, job=RolloutJob(rollout))
    line = rollout.__code__.co_firstlineno + 1
    assert f"IndexError: list index out of range (test_pipeline.py:{line})" in target.errors[0]["error"]["message"]
