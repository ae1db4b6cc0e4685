from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.http.scripted import Scripted, serving
from trinfer import ConnectionLost, RateLimitError, RequestError, RequestTimeout
from trinfer.http.api import ApiClient
from trinfer.http.retry import NO_RETRIES, PASSING, RetryPolicy, retry_after_seconds

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
OK = b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"ok":true}'
QUICK = RetryPolicy(base=0.02)


def status(number: int, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {number} X", "Content-Length: 0", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


@given(
    st.integers(1, 100),
    st.sampled_from([None, *PASSING]),
    st.one_of(st.none(), st.floats(0, 1e6).map(lambda s: f"{s:.3f}"), st.text()),
)
def test_pauses_keep_their_bounds(attempts, code, retry_after):
    policy = RetryPolicy(max_attempts=50)
    pause = policy.pause(attempts, code, retry_after, now=NOW)
    if attempts >= 50:
        assert pause is None
    else:
        assert pause is not None
        assert 0 <= pause <= policy.cap + policy.base
        asked = retry_after_seconds(retry_after, now=NOW)
        assert asked is None or pause >= min(asked, policy.cap)


@given(st.integers(1, 100), st.sampled_from([400, 401, 403, 404, 405, 409, 413, 418, 422, 501, 302]))
def test_what_is_final_is_never_sent_again(attempts, code):
    assert RetryPolicy(max_attempts=1000).pause(attempts, code, "1") is None


def test_500_is_tried_once_more_and_nothing_without_retries():
    assert RetryPolicy().pause(1, 500) is not None
    assert RetryPolicy().pause(2, 500) is None
    assert NO_RETRIES.pause(1, 503) is None


def test_pauses_grow_and_are_spread():
    pauses = [[RetryPolicy().pause(attempt, 503) or 0 for _ in range(300)] for attempt in (1, 3, 5)]
    for group, bound in zip(pauses, (0.5, 2.0, 8.0), strict=True):
        assert max(group) <= bound
        assert max(group) > 0.8 * bound  # full jitter: the whole range is used
        assert min(group) < 0.2 * bound


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("0", 0),
        (" 7 ", 7),
        ("1.5", 1.5),
        ("-1", None),
        ("soon", None),
        ("", None),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90),
        (format_datetime(NOW - timedelta(seconds=90), usegmt=True), 0),
        ("Fri, 02 Jan 2026 03:05:05 -0000", 60),
        ("Fri, 99 Foo 2026", None),
    ],
)
def test_retry_after(value, seconds):
    assert retry_after_seconds(value, now=NOW) == seconds


@given(st.text())
def test_any_retry_after_is_read_or_ignored(value):
    seconds = retry_after_seconds(value)
    assert seconds is None or seconds >= 0


# -- against a server -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", sorted(PASSING | {500}))
async def test_what_passes_is_sent_again(code):
    async with serving(Scripted([status(code)], [OK])) as origin:
        client = ApiClient(origin, retry=QUICK)
        assert await client.post_json("/x", {}, timeout=5) == {"ok": True}
        client.close()


async def test_connections_that_break_are_tried_again():
    server = Scripted([None], [None], [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", None], [OK])
    async with serving(server) as origin:
        client = ApiClient(origin, retry=QUICK)
        assert await client.post_json("/x", {}, timeout=5) == {"ok": True}
        assert len(server.requests) == 4
        client.close()


async def test_after_the_last_attempt_the_error_says_how_many_there_were():
    async with serving(Scripted(*[[status(429)]] * 9)) as origin:
        client = ApiClient(origin, retry=RetryPolicy(max_attempts=3, base=0.01))
        with pytest.raises(RateLimitError) as caught:
            await client.post_json("/x", {"a": 1}, timeout=5)
        assert (caught.value.attempts, caught.value.status, caught.value.payload) == (3, 429, {"a": 1})
        client.close()
    client = ApiClient(origin, retry=RetryPolicy(max_attempts=3, base=0.01))
    with pytest.raises(ConnectionLost) as lost:
        await client.post_json("/x", {}, timeout=5)
    assert lost.value.attempts == 3


async def test_retry_after_is_honoured_and_the_slot_is_free_meanwhile():
    server = Scripted([status(503, "Retry-After: 1")], [OK], [OK])
    async with serving(server) as origin:
        client = ApiClient(origin, retry=QUICK, max_connections=1)
        import trio

        async with trio.open_nursery() as nursery:
            began = time.monotonic()
            nursery.start_soon(lambda: client.post_json("/x", {}, timeout=5))
            await trio.sleep(0.3)
            await client.post_json("/y", {}, timeout=0.5)  # there is one slot, and nobody holds it
            assert time.monotonic() - began < 0.8
        assert 1 <= time.monotonic() - began < 3
        client.close()


async def test_a_pause_longer_than_the_time_left_is_not_waited_for():
    async with serving(Scripted([status(503, "Retry-After: 30")])) as origin:
        client = ApiClient(origin)
        began = time.monotonic()
        with pytest.raises(RequestError) as caught:
            await client.post_json("/x", {}, timeout=5)
        assert caught.value.status == 503
        assert time.monotonic() - began < 2
        client.close()


async def test_a_time_out_names_the_failure_before_it():
    async with serving(Scripted([status(503)], [9.0])) as origin:
        client = ApiClient(origin, retry=QUICK)
        with pytest.raises(RequestTimeout) as caught:
            await client.post_json("/x", {}, timeout=0.3)
        assert isinstance(caught.value.__cause__, RequestError)
        assert caught.value.__cause__.status == 503
        assert caught.value.attempts == 2
        client.close()
