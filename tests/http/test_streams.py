"""Server-sent events: the parser, and streams against scripted servers."""

from __future__ import annotations

import gc
import itertools
import json
import time

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from tests.http.scripted import RESET, Scripted, serving
from trinfer import (
    ConnectionLost,
    ContextLengthError,
    NotFoundError,
    ProtocolError,
    RequestError,
    RequestTimeout,
)
from trinfer.http.api import ApiClient, Timeouts
from trinfer.http.retry import RetryPolicy
from trinfer.http.sse import SseParser

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"
QUICK = RetryPolicy(base=0.02)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


# -- the parser -----------------------------------------------------------------------------------------------------

STREAMS = {
    b"data: one\n\ndata: two\n\n": [b"one", b"two"],
    b"data: one\r\n\r\ndata:two\r\rdata:  three\n\n": [b"one", b"two", b" three"],
    b": comment\n\nid: 7\nevent: x\nretry: 5\ndata: a\ndata: b\ndata\n\n": [b"a\nb\n"],
    b"\xef\xbb\xbfdata: mark\n\n": [b"mark"],
    "data: ünï ▏\n\n".encode(): ["ünï ▏".encode()],
    b"data: not complete\n": [],
    b"\n\n\ndata:\n\n": [b""],
    b"dataset: no\n\ndata: yes\n\n": [b"yes"],
    b"": [],
}


@pytest.mark.parametrize("stream", STREAMS)
@given(data=st.data())
def test_events_split_anywhere(stream, data):
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)))))
    edges = [0, *cuts, len(stream)]
    parser = SseParser()
    events = [e for a, b in itertools.pairwise(edges) for e in parser.feed(stream[a:b])]
    assert events == STREAMS[stream]


@given(st.lists(st.text().filter(lambda s: "\r" not in s and "\n" not in s)), st.sampled_from(["\n", "\r\n", "\r"]))
def test_any_text_comes_through(texts, end):
    parser = SseParser()
    stream = "".join(f"data: {text}{end}{end}" for text in texts).encode("utf-8", "surrogatepass")
    events = parser.feed(stream) + parser.feed(b"\n")
    assert events == [text.encode("utf-8", "surrogatepass") for text in texts]


# -- streams --------------------------------------------------------------------------------------------------------


async def collect(origin, payload=None, *, timeout=5.0, **settings):
    client = ApiClient(origin, **{"retry": QUICK, **settings})
    events = []
    try:
        async for item in client.stream_json("/x", payload or {"a": 1}, timeout=timeout):
            events.append(item)  # noqa: PERF401  # what came before an error is wanted too
    except RequestError as error:
        error.came = events
        raise
    finally:
        assert client.pool.in_use == 0
        client.close()
    return events


async def test_a_stream_is_whole_and_its_connection_kept():
    body = (
        chunk(event({"n": 1})) + chunk(event({"n": 2}) + b": ping\n\n" + event({"usage": {"x": 1}})) + chunk(DONE) + END
    )
    server = Scripted([HEAD + body], [HEAD, *[bytes([b]) for b in body]])
    async with serving(server) as origin:
        client = ApiClient(origin)
        payload = {"messages": []}
        for _ in range(2):
            events = [item async for item in client.stream_json("/x", payload, timeout=5)]
            assert events == [{"n": 1}, {"n": 2}, {"usage": {"x": 1}}]
        assert payload == {"messages": []}
        assert json.loads(server.requests[0].partition(b"\r\n\r\n")[2]) == {"messages": [], "stream": True}
        assert (server.connections, client.pool.idle, client.pool.in_use) == (1, 1, 0)
        client.close()


async def test_a_stream_without_done_ends_with_its_body():
    async with serving(Scripted([HEAD + chunk(event({"n": 1})) + END])) as origin:
        assert await collect(origin) == [{"n": 1}]
    async with serving(Scripted([b"HTTP/1.1 200 OK\r\n\r\n" + event({"n": 1}), None])) as origin:
        assert await collect(origin) == [{"n": 1}]


UNENDED = {"n": 2, "text": "ünï"}


@pytest.mark.parametrize("end", [b"", b"\n", b"\r"])
@pytest.mark.parametrize("last", [DONE.strip(), event(UNENDED).strip()], ids=["done", "event"])
async def test_a_last_event_without_an_empty_line_counts(last, end):
    expected = [{"n": 1}] if last == DONE.strip() else [{"n": 1}, UNENDED]
    for script in (
        [HEAD + chunk(event({"n": 1})) + chunk(last + end) + END],
        [b"HTTP/1.0 200 OK\r\n\r\n" + event({"n": 1}) + last + end, None],
    ):
        async with serving(Scripted(script)) as origin:
            assert await collect(origin) == expected


@pytest.mark.parametrize("cut", range(7, len(event(UNENDED)) - 2, 5))
async def test_a_stream_that_ends_by_closing_and_is_cut_in_an_event_is_lost(cut):
    head = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    async with serving(Scripted([head + event({"n": 1}), 0.02, event(UNENDED)[:cut], None])) as origin:
        with pytest.raises(ConnectionLost, match=r"in the middle of an event.*after 1 events") as caught:
            await collect(origin)
        assert caught.value.came == [{"n": 1}]


@pytest.mark.parametrize("body", [b": ping\n\n", b'{"error": "no"}', b"\n"], ids=["comment", "json", "nothing"])
async def test_a_stream_without_any_event_is_an_error(body):
    # Without a content type, such an answer is only known by what is in it.
    async with serving(
        Scripted([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(body) + END])
    ) as origin:
        with pytest.raises(ProtocolError, match="without a single event"):
            await collect(origin)


@pytest.mark.parametrize("way", ["break", "close", "with", "cancel", "raise"])
async def test_leaving_early_closes_the_connection(way):
    server = Scripted([HEAD + chunk(event({"n": 1})), 9.0])
    async with serving(server) as origin:
        client = ApiClient(origin)
        stream = client.stream_json("/x", {}, timeout=9)
        if way == "with":
            async with stream:
                async for _ in stream:
                    break
        elif way == "cancel":
            with trio.move_on_after(0.2):
                async for _ in stream:
                    pass
        elif way == "raise":
            with pytest.raises(KeyError):
                await raising(stream)
        else:
            async for _ in stream:
                break
            if way == "close":
                stream.close()
        del stream
        gc.collect()
        assert (client.pool.in_use, client.pool.idle) == (0, 0)
        with pytest.raises(RequestError):
            await client.post_json("/y", {}, timeout=0.5)  # the slot is free; the server has no more to say
        client.close()


async def raising(stream):
    async with stream:
        async for _ in stream:
            raise KeyError("the caller's own")


async def test_statuses_are_typed_errors_and_passing_ones_are_tried_again():
    body = b'{"error": {"message": "maximum context length is 10 tokens"}}'
    refused = b"HTTP/1.1 400 X\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    busy = b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n"
    async with serving(Scripted([busy], [None], [HEAD + chunk(event({"n": 1}) + DONE) + END])) as origin:
        assert await collect(origin) == [{"n": 1}]
    async with serving(Scripted([refused])) as origin:
        with pytest.raises(ContextLengthError) as caught:
            await collect(origin)
        assert caught.value.payload == {"a": 1}
    async with serving(Scripted(*[[busy]] * 3)) as origin:
        with pytest.raises(RequestError) as caught:
            await collect(origin, retry=RetryPolicy(max_attempts=2, base=0.01))
        assert (caught.value.status, caught.value.attempts) == (503, 2)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"error": {"message": "gone", "code": 404}}, NotFoundError),
        ({"error": {"message": "engine died", "type": "server_error"}}, RequestError),
        ({"object": "error", "message": "gone", "code": 404}, NotFoundError),
        ({"error": "words"}, RequestError),
    ],
)
async def test_an_error_in_the_middle_is_raised_with_how_far_it_came(error, kind):
    async with serving(Scripted([HEAD + chunk(event({"n": 1}) + event(error)), 9.0])) as origin:
        with pytest.raises(kind, match="after 1 events") as caught:
            await collect(origin)
        assert caught.value.came == [{"n": 1}]


@pytest.mark.parametrize("how", [[None], [RESET], [chunk(b"data: {broken")[:-4], None]])
async def test_a_stream_that_breaks_off_is_lost_and_not_tried_again(how):
    server = Scripted([HEAD + chunk(event({"n": 1})), 0.05, *how], [HEAD + chunk(DONE) + END])
    async with serving(server) as origin:
        with pytest.raises(ConnectionLost, match="after 1 events") as caught:
            await collect(origin)
        assert caught.value.came == [{"n": 1}]
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "body", [event([1]), b"data: nope\n\n", b"data: \xff\n\n"], ids=["no object", "no json", "no text"]
)
async def test_events_that_are_none(body):
    async with serving(Scripted([HEAD + chunk(body), 9.0])) as origin:
        with pytest.raises(ProtocolError):
            await collect(origin)


async def test_an_answer_that_is_no_stream():
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    async with serving(Scripted([answer])) as origin:
        with pytest.raises(ProtocolError, match="no event stream"):
            await collect(origin)


async def test_each_time_out_has_its_name():
    slow = [HEAD, 0.3, chunk(event({"n": 1})), 0.3, chunk(event({"n": 2})), 0.3, chunk(DONE) + END]
    for timeouts, total, name in (
        (Timeouts(first_byte=0.1), 5, "stream_first_byte_timeout"),
        (Timeouts(idle=0.1), 5, "stream_idle_timeout"),
        (Timeouts(), 0.5, "request_timeout"),
    ):
        async with serving(Scripted(list(slow))) as origin:
            with pytest.raises(RequestTimeout, match=name):
                await collect(origin, timeout=total, timeouts=timeouts)
    async with serving(Scripted(list(slow))) as origin:
        assert len(await collect(origin, timeouts=Timeouts(first_byte=2, idle=2))) == 2


async def test_comments_are_no_first_event():
    pings = [HEAD, *[0.05, chunk(b": ping\n\n")] * 20]
    async with serving(Scripted(pings)) as origin:
        began = trio.current_time()
        with pytest.raises(RequestTimeout, match="stream_first_byte_timeout"):
            await collect(origin, timeouts=Timeouts(first_byte=0.2, idle=5))
        assert trio.current_time() - began < 0.8


async def test_pauses_between_attempts_do_not_count_as_waiting_for_the_first_event():
    busy = [b"HTTP/1.1 503 Busy\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"]
    async with serving(Scripted(busy, [HEAD, chunk(event({"n": 1})), chunk(DONE) + END])) as origin:
        assert await collect(origin, timeouts=Timeouts(first_byte=0.5)) == [{"n": 1}]


async def test_a_stream_that_is_cancelled_after_its_last_event_gives_its_slot_back():
    async with serving(Scripted([HEAD, chunk(event({"n": 1})), chunk(DONE), 5.0])) as origin:
        client = ApiClient(origin)
        stream = client.stream_json("/x", {}, timeout=50)
        assert await anext(stream) == {"n": 1}
        with trio.move_on_after(0.1):
            await anext(stream)
        assert client.pool.in_use == 0
        client.close()


@pytest.mark.parametrize("where", ["thread", "another run"])
async def test_a_stream_that_the_collector_finds_elsewhere_gives_its_slot_back(where):
    def collect_there():
        if where == "thread":
            gc.collect()
        else:
            trio.run(_collect)

    async def _collect():
        gc.collect()
        await trio.sleep(0)

    scripts = [[HEAD, chunk(event({"n": 1})), 30.0], [HEAD, chunk(event({"n": 2})), chunk(DONE) + END]]
    async with serving(Scripted(*scripts)) as origin:
        client = ApiClient(origin, max_connections=1)
        stream = client.stream_json("/x", {}, timeout=100)
        assert await anext(stream) == {"n": 1}
        gc.disable()
        try:
            stream.myself = stream  # as an exception that is kept does
            del stream
            assert client.pool.in_use == 1
            await trio.to_thread.run_sync(collect_there)
        finally:
            gc.enable()
        with trio.fail_after(5):
            assert [event async for event in client.stream_json("/x", {}, timeout=100)] == [{"n": 2}]
        assert client.pool.in_use == 0
        client.close()


def test_a_large_event_costs_no_more_than_its_length():
    """Pieces of one line are joined once: twice the length takes twice the time, and not four times."""

    def seconds(pieces: int) -> float:
        parser = SseParser()
        piece = b"x" * 65536
        began = time.perf_counter()
        assert parser.feed(b"data: ") == []
        for _ in range(pieces):
            assert parser.feed(piece) == []
        (data,) = parser.feed(b"\n\n")
        assert len(data) == pieces * 65536
        return time.perf_counter() - began

    seconds(100)
    assert seconds(800) < 1.0  # copied again and again, it were twenty
