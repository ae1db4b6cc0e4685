"""The small HTTP server, under clients and handlers that do what they should not."""

from __future__ import annotations

import itertools
import json
import logging
import os
import resource
import socket
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import httpx
import pytest
import trio
import trio.testing
from hypothesis import example, given
from hypothesis import strategies as st

from trinfer.http import serving
from trinfer.http.serving import HttpRequest, HttpResponse, json_response, serve_http

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


async def echo(request: HttpRequest) -> HttpResponse:
    """Tells what has arrived."""
    return json_response(
        {
            "method": request.method,
            "target": request.target,
            "headers": request.headers,
            "body": request.body.decode("latin-1"),
        }
    )


@asynccontextmanager
async def serving_on(handler) -> AsyncIterator[int]:
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await nursery.start(serve_http, handler, listeners)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def converse(handler, *pieces: bytes, end: bool = False) -> list[tuple[int, dict[str, str], bytes]]:
    """Send the pieces one by one, and return all answers: status, headers and body."""
    async with serving_on(handler) as port, await trio.open_tcp_stream("127.0.0.1", port) as stream:
        for piece in pieces:
            await stream.send_all(piece)
            await trio.sleep(0)
        if end:
            await stream.send_eof()
        return [answer async for answer in answers(stream)]


async def answers(stream: trio.SocketStream, quiet: float = 0.15):
    """Answers until the connection is closed, or nothing happens for a while."""
    data = b""

    async def more(patience: float) -> bool:
        nonlocal data
        with trio.move_on_after(patience):
            received = await stream.receive_some(65536)
            data += received
            return bool(received)
        return False

    async def more_unless_quiet() -> bool:
        async def until_quiet() -> None:
            # Not by the clock: the server runs in this process, and a busy machine may give neither of us a turn.
            await trio.testing.wait_all_tasks_blocked(quiet)
            nursery.cancel_scope.cancel()

        found = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(until_quiet)
            found = await more(60)
            nursery.cancel_scope.cancel()
        return found

    while True:
        while b"\r\n\r\n" not in data:
            if not await more_unless_quiet():
                assert not data, f"half an answer: {data!r}"
                return
        head, data = data.split(b"\r\n\r\n", 1)
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while True:
                while b"\r\n" not in data:
                    assert await more(5), "the stream broke off"
                size, data = data.split(b"\r\n", 1)
                while len(data) < int(size, 16) + 2:
                    assert await more(5), "the stream broke off"
                body += data[: int(size, 16)]
                data = data[int(size, 16) + 2 :]
                if size == b"0":
                    break
        elif "content-length" in headers:
            length = int(headers["content-length"])
            while len(data) < length:
                assert await more(5), "the answer broke off"
            body, data = data[:length], data[length:]
        elif first.split()[1] in {"100", "204", "304"}:
            body = b""
        else:
            while await more(5):
                pass
            body, data = data, b""
        yield int(first.split()[1]), headers, body


def statuses(found: list[tuple[int, dict[str, str], bytes]]) -> list[int]:
    return [status for status, _, _ in found]


# -- requests in every form -----------------------------------------------------------------------------------------

TALK = (
    b"GET /first?x=1 HTTP/1.1\r\nHost: x\r\nEmpty:\r\n\r\n"
    b"POST /second HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTwice: a\r\ntwice: b\r\n\r\nhello"
    b"POST /third HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"3\r\nabc\r\n2;ext=1\r\nde\r\n0\r\nChecksum: 99\r\nHost: trailer\r\n\r\n"
    b"\r\nPUT /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
)
HEARD = [
    ("GET", "/first?x=1", {"host": "x", "empty": ""}, ""),
    ("POST", "/second", {"host": "x", "content-length": "5", "twice": "a, b"}, "hello"),
    ("POST", "/third", {"host": "x", "transfer-encoding": "chunked"}, "abcde"),
    ("PUT", "/last", {"host": "x", "connection": "close", "content-length": "0"}, ""),
]


@given(cuts=st.sets(st.integers(1, len(TALK) - 1), max_size=12))
@example(cuts=set(range(1, len(TALK))))
@example(cuts=set())
async def test_requests_cut_anywhere_are_heard_the_same(cuts):
    edges = [0, *sorted(cuts), len(TALK)]
    pieces = [TALK[start:end] for start, end in itertools.pairwise(edges)]
    found = await converse(echo, *pieces)
    assert statuses(found) == [200] * 4
    heard = [json.loads(body) for _, _, body in found]
    assert [(h["method"], h["target"], h["headers"], h["body"]) for h in heard] == HEARD
    assert found[-1][1]["connection"] == "close"


@given(noise=st.binary(max_size=200), before=st.booleans())
async def test_noise_never_ends_the_server(noise, before):
    good = b"GET /good HTTP/1.1\r\nHost: x\r\n\r\n"
    async with serving_on(echo) as port:
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all((good if before else b"") + noise + b"\r\n\r\n")
            with trio.move_on_after(0.02):
                await stream.receive_some(65536)
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(good)
            with trio.fail_after(5):
                assert (await stream.receive_some(65536)).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"nonsense\r\n\r\n", [400]),
        (b"GET /\r\n\r\n", [505]),
        (b"GET / HTTP/2.0\r\n\r\n", [400, 505]),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400, 505]),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", [400]),  # a TLS handshake
        (b"CONNECT there:443 HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", [400]),
        (b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", [400]),
        (b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [400]),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", [400]),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\nxyz", [400]),
        (b"GET / HTTP/1.1\r\nX: %s\r\n\r\n" % (b"x" * 200_000), [431]),
        (b"GET /%s HTTP/1.1\r\n\r\n" % (b"x" * 200_000), [431]),
        (b"GET / HTTP/1.1\r\n%s\r\n" % (b"X: y\r\n" * 40_000), [431]),
        (b"\r\n" * 100_000, [431]),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n%s\r\n" % (b"X: y\r\n" * 40_000), [431]),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: %s\r\n\r\n" % (b"x" * 200_000), [431]),
        (b"POST / HTTP/1.1\r\nContent-Length: 70000000\r\n\r\n", [413]),
        (b"POST / HTTP/1.1\r\nContent-Length: 70000000\r\nExpect: 100-continue\r\n\r\n", [413]),
    ],
)
async def test_what_is_wrong_is_refused_and_the_connection_ends(sent, expected):
    async with serving_on(echo) as port, await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(sent)
        found = [answer async for answer in answers(stream, quiet=5)]
        assert len(found) == 1
        status, headers, body = found[0]
        assert status in expected
        assert headers["connection"] == "close"
        assert json.loads(body)["error"]["code"] == status


async def test_a_body_that_grows_too_long_is_refused_while_it_is_still_coming(monkeypatch):
    monkeypatch.setattr(serving, "MAX_BODY_BYTES", 300_000)
    chunk = b"186a0\r\n" + b"x" * 100_000 + b"\r\n"
    found = await converse(echo, b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", *[chunk] * 30)
    assert statuses(found) == [413]
    found = await converse(echo, b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", *[chunk] * 3, b"0\r\n\r\n")
    assert statuses(found) == [200]


async def test_many_small_chunks_are_no_long_header():
    chunks = b"".join(b"1\r\n%c\r\n" % (97 + number % 26) for number in range(60_000))
    sent = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    found = await converse(echo, *[sent[at : at + 6001] for at in range(0, len(sent), 6001)])
    assert statuses(found) == [200]
    assert len(json.loads(found[0][2])["body"]) == 60_000


@pytest.mark.parametrize("body", [b"", b"hello"])
async def test_an_offer_of_http_2_is_ignored(body):
    sent = (
        b"POST /x HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAM\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    found = await converse(echo, sent + sent, *[bytes([byte]) for byte in sent])
    assert statuses(found) == [200] * 3
    for _, _, answer in found:
        heard = json.loads(answer)
        assert (heard["body"], heard["headers"]["connection"]) == (body.decode(), "HTTP2-Settings")


async def test_expect_100_continue():
    head = b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    assert statuses(await converse(echo, head)) == [100]
    assert statuses(await converse(echo, head + b"ab")) == [200]
    assert statuses(await converse(echo, head.replace(b"HTTP/1.1", b"HTTP/1.0"))) == []


async def test_expect_100_continue_behind_a_request_that_takes_long():
    may_answer = trio.Event()

    async def slow(request: HttpRequest) -> HttpResponse:
        if request.method == "GET":
            await may_answer.wait()
        return await echo(request)

    async with serving_on(slow) as port, await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await stream.send_all(b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        await trio.testing.wait_all_tasks_blocked(0.02)
        may_answer.set()
        assert [status async for status, _, _ in answers(stream)] == [200, 100]


# -- pipelining -----------------------------------------------------------------------------------------------------


async def test_pipelined_requests_are_handled_one_after_another_and_in_order():
    running = most = 0

    async def handler(request: HttpRequest) -> HttpResponse:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await trio.sleep(0.001 * (5 - int(request.target[1:]) % 5))
        running -= 1
        return HttpResponse(200, request.target.encode())

    found = await converse(handler, b"".join(b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % n for n in range(60)))
    assert [body for _, _, body in found] == [b"/%d" % n for n in range(60)]
    assert most == 1


@pytest.mark.parametrize("together", [True, False])
async def test_what_is_wrong_behind_a_good_request_waits_for_its_turn(together):
    async def handler(request: HttpRequest) -> HttpResponse:
        async def slowly():
            for piece in (b"one ", b"two ", b"three"):
                await trio.sleep(0.02)
                yield piece

        return HttpResponse(200, stream=slowly())

    good, bad = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"nonsense\r\n\r\n"
    found = await converse(handler, *([good + bad] if together else [good, bad]))
    assert [(status, body) for status, _, body in found[:1]] == [(200, b"one two three")]
    assert statuses(found) == [200, 400]


async def test_nothing_is_read_without_bounds_while_a_handler_works():
    handled = trio.Event()

    async def never(request: HttpRequest) -> HttpResponse:
        handled.set()
        await trio.sleep_forever()
        raise AssertionError

    async with serving_on(never) as port, await trio.open_tcp_stream("127.0.0.1", port) as stream:
        request = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n" + b"x" * 60000
        with trio.move_on_after(1) as scope:
            for _ in range(1000):
                await stream.send_all(request)
        assert handled.is_set()
        assert scope.cancelled_caught


# -- clients that go away -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["close", "reset", "half"])
@pytest.mark.parametrize("streaming", [True, False])
async def test_a_client_that_goes_away_cancels_its_handler_and_no_other(way, streaming):
    began, ended = trio.Event(), trio.Event()

    async def work() -> None:
        began.set()
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async def handler(request: HttpRequest) -> HttpResponse:
        async def endless():
            yield b"first"
            await work()

        if request.target == "/other":
            await ended.wait()
        elif streaming:
            return HttpResponse(200, stream=endless())
        else:
            await work()
        return HttpResponse(200, b"other")

    async with serving_on(handler) as port:
        other = await trio.open_tcp_stream("127.0.0.1", port)
        async with other:
            await other.send_all(b"GET /other HTTP/1.1\r\nHost: x\r\n\r\n")
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            async with stream:
                await stream.send_all(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
                with trio.fail_after(5):
                    await began.wait()
                if way == "half":
                    await stream.send_eof()
                elif way == "reset":
                    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    stream.socket.close()
                else:
                    stream.socket.close()
                with trio.fail_after(5):
                    await ended.wait()
            assert [status async for status, _, _ in answers(other)] == [200]


async def test_a_client_that_reads_nothing_holds_up_only_itself():
    async def handler(request: HttpRequest) -> HttpResponse:
        return HttpResponse(200, b"x" * 30_000_000 if request.target == "/big" else b"small")

    async with serving_on(handler) as port, await trio.open_tcp_stream("127.0.0.1", port) as stuck:
        await stuck.send_all(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(b"GET /small HTTP/1.1\r\nHost: x\r\n\r\n")
            assert [body async for _, _, body in answers(stream)] == [b"small"]


async def test_a_client_that_asks_nothing_is_let_go(monkeypatch):
    monkeypatch.setattr(serving, "IDLE_TIMEOUT", 0.05)
    async with serving_on(echo) as port, await trio.open_tcp_stream("127.0.0.1", port) as stream:
        with trio.fail_after(5):
            assert await stream.receive_some(1) == b""


# -- handlers that do wrong -----------------------------------------------------------------------------------------


async def raising(request: HttpRequest) -> HttpResponse:
    raise ZeroDivisionError


async def raising_group(request: HttpRequest) -> HttpResponse:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(raising, request)
    raise AssertionError


async def splitting(request: HttpRequest) -> HttpResponse:
    return HttpResponse(200, b"", {"X": "a\r\nSet-Cookie: b"})


async def exotic(request: HttpRequest) -> HttpResponse:
    return HttpResponse(200, b"", {"X": "\N{SNOWMAN}"})


@pytest.mark.parametrize("handler", [raising, raising_group, splitting, exotic])
async def test_a_handler_that_fails_is_status_500_and_no_more(handler, caplog):
    with caplog.at_level(logging.CRITICAL):
        found = await converse(handler, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
    assert statuses(found) == [500, 500]


async def test_a_stream_that_fails_breaks_off_its_own_answer_only(caplog):
    async def handler(request: HttpRequest) -> HttpResponse:
        async def breaking():
            yield b"first"
            raise ZeroDivisionError

        return HttpResponse(200, stream=breaking()) if request.target == "/bad" else HttpResponse(200, b"fine")

    async with serving_on(handler) as port:
        with caplog.at_level(logging.CRITICAL):
            async with httpx.AsyncClient(trust_env=False) as client:
                with pytest.raises(httpx.RemoteProtocolError):
                    await client.get(f"http://127.0.0.1:{port}/bad")
                assert (await client.get(f"http://127.0.0.1:{port}/good")).text == "fine"


# -- answers in every form ------------------------------------------------------------------------------------------


async def answering(request: HttpRequest) -> HttpResponse:
    async def pieces():
        for piece in (b"one ", b"", b"two"):
            yield piece

    match request.target:
        case "/stream":
            return HttpResponse(200, stream=pieces())
        case "/nothing":
            return HttpResponse(204, b"dropped")
        case "/odd":
            return HttpResponse(299, b"odd")
    return HttpResponse(200, b"whole")


async def test_streams_come_in_chunks_and_leave_the_connection_usable():
    request = b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n"
    found = await converse(answering, request + request)
    assert [body for _, _, body in found] == [b"one two"] * 2


async def test_a_client_of_http_1_0_gets_no_chunks():
    found = await converse(answering, b"GET /stream HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    assert found == [(200, {"connection": "close"}, b"one two")]
    found = await converse(answering, b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" * 2)
    assert found == [(200, {"content-length": "5", "connection": "keep-alive"}, b"whole")] * 2
    found = await converse(answering, b"GET / HTTP/1.0\r\n\r\n")
    assert found == [(200, {"content-length": "5", "connection": "close"}, b"whole")]


@pytest.mark.parametrize("target", [b"/stream", b"/whole"])
async def test_head_has_no_body(target):
    async with serving_on(answering) as port, await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(b"HEAD %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % target)
        received = b"".join([piece async for piece in stream])
    assert received.startswith(b"HTTP/1.1 200 OK\r\n")
    assert received.endswith(b"\r\n\r\n")
    assert received.count(b"\r\n\r\n") == 1


async def test_statuses_without_body_and_without_name():
    found = await converse(answering, b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\nGET /odd HTTP/1.1\r\nHost: x\r\n\r\n")
    assert [(status, body) for status, _, body in found] == [(204, b""), (299, b"odd")]
    assert "content-length" not in found[0][1]


# -- the end --------------------------------------------------------------------------------------------------------


async def test_cancelling_closes_listeners_and_connections_and_leaves_no_task():
    before = trio.lowlevel.current_statistics().tasks_living
    ended = 0

    async def handler(request: HttpRequest) -> HttpResponse:
        nonlocal ended
        try:
            await trio.sleep_forever()
        finally:
            ended += 1
        raise AssertionError

    streams = []
    async with serving_on(handler) as port:
        for number in range(6):
            streams.append(await trio.open_tcp_stream("127.0.0.1", port))
            if number % 2:
                await streams[-1].send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await trio.testing.wait_all_tasks_blocked(0.02)
    assert ended == 3
    assert trio.lowlevel.current_statistics().tasks_living == before
    for stream in streams:
        async with stream:
            with suppress(trio.BrokenResourceError):
                assert await stream.receive_some(1) == b""
    with pytest.raises(OSError, match="connect"):
        await trio.open_tcp_stream("127.0.0.1", port)


async def test_clients_that_take_the_last_file_descriptors_are_served_all_the_same(caplog):
    # Clients in the same process, as those of the embedded engine are: each holds a connection before any is accepted.
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    streams: list[socket.socket] = []
    async with serving_on(echo) as port:
        await trio.testing.wait_all_tasks_blocked()
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 20, before[1]))
        try:
            with suppress(OSError):
                while True:
                    client = socket.socket()
                    streams.append(client)
                    client.connect(("127.0.0.1", port))
                    client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert len(streams) >= 10
            with trio.fail_after(5):
                for client in streams:
                    trio_client = trio.socket.from_stdlib_socket(client)
                    client.setblocking(False)
                    assert (await trio_client.recv(4096)).startswith(b"HTTP/1.1 200")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            for client in streams:
                client.close()
    assert len([each for each in caplog.records if "Too many open files" in each.message]) == 1  # no flood
