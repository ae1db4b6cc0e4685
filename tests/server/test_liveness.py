"""Stories of other people's engines, told to the judge as tables; times in seconds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinfer.server.liveness import Judge, Signs, Verdict, progress_counters

STALL = 300.0


def judge(*rows: Signs, stall: float | None = STALL) -> list[Verdict]:
    judged = Judge(stall)
    return [judged.see(row) for row in rows]


def every(step: float, until: float, **changes) -> list[Signs]:
    """A look every ``step`` seconds; values may be functions of the time."""
    rows = []
    for number in range(int(until / step) + 1):
        at = number * step
        rows.append(Signs(at, **{key: value(at) if callable(value) else value for key, value in changes.items()}))
    return rows


STORIES = {
    # vLLM and SGLang: health 200 and 0 tokens/s for hours
    "a silent engine with requests": (every(5, 310, in_flight=8, received=3, counters=100.0, has_counters=True), 300),
    "a page of metrics that does not answer either": (
        [
            *every(5, 20, in_flight=8, received=3, counters=100.0, has_counters=True),
            *(Signs(20 + at, 8, 3, None, True) for at in range(5, 400, 5)),
        ],
        300,
    ),
    "progress, then silence": (
        every(5, 700, in_flight=8, received=lambda at: int(min(at, 100)), counters=5.0, has_counters=True),
        400,
    ),
    "callers that give up and come again do not hide it": (
        every(5, 900, in_flight=lambda at: 0 if at % 60 == 0 else 4, received=1, counters=7.0, has_counters=True),
        # of each minute, 50 seconds are seen with requests at both ends
        355,
    ),
    "looks at the counters are rarer than looks": (
        [Signs(at, 8, 3, 100.0 if at % 5 == 0 else None, True) for at in range(310)],
        300,
    ),
    "looks at the CPU are rarer than looks": (
        [Signs(at, 1, 0, cpu=12.5 if at % 5 == 0 else None) for at in range(310)],
        300,
    ),
    "an engine without counters whose processes sleep": (every(5, 310, in_flight=1, received=0, cpu=12.5), 300),
}
GOOD_STORIES = {
    "a prefill of four minutes": (every(5, 240, in_flight=1, received=0, counters=10.0, has_counters=True), "silent"),
    "a long generation that is not streamed": (
        every(5, 3600, in_flight=1, received=0, counters=lambda at: at * 50, has_counters=True),
        "busy",
    ),
    "saturated: answers come, one in four minutes": (
        every(5, 3600, in_flight=500, received=lambda at: int(at / 240), counters=None, has_counters=True),
        "busy",
    ),
    "an engine without counters that computes, looked at now and then": (
        [Signs(at, 1, 0, cpu=at / 2 if at % 5 == 0 else None) for at in range(3601)],
        "busy",
    ),
    "an engine without counters that computes": (every(5, 3600, in_flight=1, received=0, cpu=lambda at: at), "busy"),
    "idle for hours": (every(5, 3600, in_flight=0, received=9), "idle"),
    "a restart of the counters": (
        every(5, 900, in_flight=1, received=0, counters=lambda at: at % 250, has_counters=True),
        "busy",
    ),
}


@pytest.mark.parametrize("name", STORIES)
def test_an_end_is_found_in_time(name):
    rows, expected = STORIES[name]
    judged = Judge(STALL)
    found = next((row.at for row in rows if judged.see(row) is Verdict.WEDGED), None)
    assert found is not None
    assert expected <= found <= expected + 5


@pytest.mark.parametrize("name", GOOD_STORIES)
def test_work_is_left_alone(name):
    rows, last = GOOD_STORIES[name]
    verdicts = judge(*rows)
    assert Verdict.WEDGED not in verdicts
    assert Verdict.UNHEALTHY not in verdicts
    assert verdicts[-1].value == last


def refusing(step: float, until: float) -> Verdict:
    """The last verdict on an engine that answers four times a second with an error."""
    rows = every(step, until, in_flight=0, received=lambda at: int(4 * at), refused=lambda at: int(4 * at))
    return judge(*rows)[-1]


def test_an_engine_that_only_fails_is_useless_after_a_while():
    assert refusing(1, 299) is Verdict.IDLE
    assert refusing(1, 302) is Verdict.USELESS
    mixed = every(1, 3000, in_flight=3, received=lambda at: int(4.01 * at), refused=lambda at: int(4 * at))
    assert Verdict.USELESS not in judge(*mixed)  # a good answer in a hundred seconds
    bursts = every(1, 400, in_flight=2, received=lambda at: 8 * int(at / 30), refused=lambda at: 8 * int(at / 30))
    assert judge(*bursts)[330] is Verdict.USELESS
    rare = every(1, 3000, in_flight=0, received=lambda at: int(at / 600), refused=lambda at: int(at / 600))
    assert set(judge(*rare)) == {Verdict.IDLE}
    assert Verdict.USELESS not in judge(*every(1, 900, in_flight=0, received=int, refused=int), stall=None)


def test_three_failed_probes_in_a_row_are_an_end_and_two_are_none():
    idle = {"in_flight": 0, "received": 0}
    rows = [Signs(at, **idle, probe=probe) for at, probe in enumerate([False, False, True, False, False, None, False])]
    assert [verdict.value for verdict in judge(*rows)] == ["idle"] * 6 + ["unhealthy"]


def test_probes_of_a_busy_engine_do_not_count():
    rows = [Signs(at, 3, at, probe=False) for at in range(10)]
    assert set(judge(*rows)) == {Verdict.BUSY}


def test_without_a_limit_nothing_is_wedged():
    assert Verdict.WEDGED not in judge(*every(5, 9000, in_flight=1, received=0), stall=None)


@given(st.lists(st.tuples(st.floats(0.01, 50), st.integers(0, 5), st.booleans()), max_size=80))
def test_no_engine_is_wedged_before_its_time(steps):
    judged, at, received, quiet = Judge(STALL), 0.0, 0, 0.0
    before = 0
    for number, (step, in_flight, moves) in enumerate(steps):
        at += step
        received += moves
        quiet = 0.0 if moves or number == 0 else quiet + (step if in_flight and before else 0.0)
        before = in_flight
        verdict = judged.see(Signs(at, in_flight, received, 1.0, True))
        assert (verdict is Verdict.WEDGED) == bool(in_flight and quiet >= STALL)


PAGES = {
    "vllm": (
        b"# HELP vllm:generation_tokens_total Number of generation tokens processed.\n"
        b"# TYPE vllm:generation_tokens_total counter\n"
        b'vllm:generation_tokens_total{engine="0",model_name="m"} 27453.0\n'
        b'vllm:prompt_tokens_total{engine="0",model_name="m"} 1.0e+06\n'
        b'vllm:num_requests_running{engine="0",model_name="m"} 8.0\n',
        1027453.0,
    ),
    "two engines": (
        b'vllm:generation_tokens_total{engine="0"} 1.0\nvllm:generation_tokens_total{engine="1"} 2.0\n',
        3.0,
    ),
    "sglang": (b'sglang:generation_tokens_total{model_name="m"} 7557572.0\nsglang:num_running_reqs{} 4\n', 7557572.0),
    "llama.cpp": (b"llamacpp:tokens_predicted_total 28\nllamacpp:prompt_tokens_total 12\n", 40.0),
    "no number": (b"vllm:generation_tokens_total NaNN\n", None),
    "no counters": (b"python_gc_objects_collected_total 10\nvllm:num_requests_running 3\n", None),
    "no metrics": (b"<html>", None),
    "empty": (b"", None),
}


@pytest.mark.parametrize("name", PAGES)
def test_counters_of_the_engines(name):
    page, expected = PAGES[name]
    assert progress_counters(page) == expected
