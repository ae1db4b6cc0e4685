"""Connections, pool and requests against scripted servers on real sockets."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import random
import resource
import socket
import ssl
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.http.scripted import RESET, Scripted, serving
from trinfer import (
    AuthenticationError,
    BadRequestError,
    ConnectionLost,
    ContextLengthError,
    InferenceError,
    NotFoundError,
    ProtocolError,
    RateLimitError,
    RequestError,
    RequestTimeout,
)
from trinfer.http import api, control, pool
from trinfer.http.api import ApiClient
from trinfer.http.connection import HttpAnswer, MalformedAnswer, _Reader
from trinfer.http.control import ControlClient
from trinfer.http.failures import server_message
from trinfer.http.origin import Origin
from trinfer.http.pool import Pool
from trinfer.http.retry import NO_RETRIES
from trinfer.http.serving import HttpRequest, HttpResponse, json_response, serve_http
from trinfer.http.transport import Proxy, TlsOptions, find_proxy

if TYPE_CHECKING:
    from pathlib import Path

OK = b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"ok":true}'
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


# -- complete answers -----------------------------------------------------------------------------------------------

ANSWERS = {
    "length": PLAIN,
    "any case": b"HTTP/1.1 200 OK\r\ncOnTeNt-LeNgTh:5\r\n\r\nhello",
    "no reason phrase": b"HTTP/1.1 200\r\nContent-Length: 5\r\n\r\nhello",
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
    "chunked, extensions and trailers": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: x\r\n\r\n"
    b"5;name=value\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n",
    "interim": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\n" + PLAIN,
}
UNTIL_CLOSE = {
    "close-delimited": b"HTTP/1.1 200 OK\r\n\r\nhello",
    "1.0": b"HTTP/1.0 200 OK\r\n\r\nhello",
    "connection: close": b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello",
}


def read(*pieces: bytes, end: bool = False) -> HttpAnswer:
    reader = _Reader()
    for piece in pieces:
        reader.feed(piece)
    if end:
        reader.feed(b"")
    complete = reader.complete
    assert complete
    return HttpAnswer(reader.status, reader.headers, reader.take_body())


@pytest.mark.parametrize("name", [*ANSWERS, *UNTIL_CLOSE])
@given(data=st.data())
@settings(max_examples=30)
def test_a_complete_answer_split_anywhere(name, data):
    whole = {**ANSWERS, **UNTIL_CLOSE}[name]
    cuts = sorted(data.draw(st.sets(st.integers(1, len(whole) - 1))))
    edges = [0, *cuts, len(whole)]
    pieces = [whole[a:b] for a, b in itertools.pairwise(edges)]
    answer = read(*pieces, end=name in UNTIL_CLOSE)
    assert (answer.status, answer.body) == (200, b"hello")


@pytest.mark.parametrize("name", ANSWERS)
async def test_connections_are_kept_for_the_next_request(name):
    server = Scripted([ANSWERS[name]], [PLAIN])
    async with serving(server) as origin:
        own = Pool(origin)
        request = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
        for _ in range(2):
            assert (await own.exchange(request)).body == b"hello"
        assert (server.connections, own.idle, own.in_use) == (1, 1, 0)
        own.close()


@pytest.mark.parametrize("name", UNTIL_CLOSE)
async def test_connections_that_the_server_ends_are_not_kept(name):
    server = Scripted([UNTIL_CLOSE[name], None], [PLAIN])
    async with serving(server) as origin:
        own = Pool(origin)
        for _ in range(2):
            assert (await own.exchange(b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n")).body == b"hello"
        assert server.connections == 2
        own.close()


# -- what is no answer ----------------------------------------------------------------------------------------------

MALFORMED = {
    "repeated equal length": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    "no http": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "length and chunked": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked and length": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "strange length": b"HTTP/1.1 200 OK\r\nContent-Length: 5x\r\n\r\nhello",
    "negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello",
    "strange coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nhello",
    "bad chunk size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n",
    "two answers": PLAIN + PLAIN,
    "an answer and more": PLAIN + b"garbage",
    "another protocol": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    "header too long": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\nContent-Length: 5\r\n\r\nhello",
    "header without end": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000,
    "body too long": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\nhello",
    "trailers for ever": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n"
    + b"X: y\r\n" * 60_000,
    "interim with a length and a body": b"HTTP/1.1 104 Soon\r\nContent-Length: 5\r\n\r\nhello" + PLAIN,
    "interim in chunks": b"HTTP/1.1 110 Soon\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n" + PLAIN,
    "no status": b"HTTP/1.1 000 Nothing\r\nContent-Length: 0\r\n\r\n" + PLAIN,
    "interim for ever": b"HTTP/1.1 102 Processing\r\n\r\n" * 20 + PLAIN,
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_whatever_is_malformed_is_an_error_and_ends_the_connection(name):
    server = Scripted([MALFORMED[name], 5.0], [OK])
    async with serving(server) as origin:
        client = ApiClient(origin)
        with pytest.raises(ProtocolError):
            await client.post_json("/x", {}, timeout=2)
        assert client.pool.idle == 0
        assert await client.post_json("/x", {}, timeout=5) == {"ok": True}
        assert server.connections == 2
        client.close()


@pytest.mark.parametrize("name", MALFORMED)
@given(data=st.data())
@settings(max_examples=20)
def test_malformed_answers_split_anywhere_are_never_complete_and_clean(name, data):
    whole = MALFORMED[name]
    cut = data.draw(st.integers(1, len(whole) - 1))
    reader = _Reader()

    def feed() -> None:  # either piece may raise
        for piece in (whole[:cut], whole[cut:]):
            reader.feed(piece)
            assert not reader.complete or piece == whole[:cut]

    with pytest.raises(MalformedAnswer):
        feed()


async def test_bytes_that_come_after_an_answer_close_the_connection_before_its_next_use():
    server = Scripted([OK, 0.05, b'HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n{"ok":false}', 5.0], [OK])
    async with serving(server) as origin:
        client = ApiClient(origin)
        assert await client.post_json("/x", {}, timeout=5) == {"ok": True}
        await trio.sleep(0.2)
        assert await client.post_json("/x", {}, timeout=5) == {"ok": True}
        assert server.connections == 2
        client.close()


async def test_a_connection_that_the_server_has_closed_is_noticed_before_its_use():
    server = Scripted([OK, None], [OK])
    async with serving(server) as origin:
        client = ApiClient(origin)
        for _ in range(2):
            assert await client.post_json("/x", {}, timeout=5) == {"ok": True}
            await trio.sleep(0.05)
        assert len(server.requests) == 2
        client.close()


async def test_a_reused_connection_that_ends_before_its_answer_is_replaced():
    # The server reads the second request, and closes: it had decided to before the request came.
    server = Scripted([OK], [None], [OK])
    async with serving(server) as origin:
        client = ApiClient(origin)
        for _ in range(2):
            assert await client.post_json("/x", {}, timeout=5) == {"ok": True}
        assert (server.connections, len(server.requests)) == (2, 3)
        client.close()


async def test_without_retries_a_request_is_sent_once_more_at_most():
    server = Scripted(*[[0.05, OK]] * 5, *[[None]] * 10)
    async with serving(server) as origin, trio.open_nursery() as nursery:
        client = ApiClient(origin, retry=NO_RETRIES)
        nursery.start_soon(client.sweep)
        async with trio.open_nursery() as several:
            for _ in range(5):
                several.start_soon(partial(client.post_json, "/x", {}, timeout=50))
        assert client.pool.idle == 5
        with pytest.raises(ConnectionLost):
            await client.post_json("/x", {}, timeout=50)
        assert len(server.requests) == 7  # five connections, and what they are good for, notwithstanding
        client.close()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "script",
    [[None], [RESET], [b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{", None], [b"HTTP/1.1 200 OK\r\n", RESET]],
)
async def test_an_answer_that_breaks_off_is_lost(script):
    server = Scripted(script)
    async with serving(server) as origin:
        client = ApiClient(origin, retry=NO_RETRIES)
        with pytest.raises(ConnectionLost):
            await client.post_json("/x", {}, timeout=5)
        assert (client.pool.in_use, client.pool.idle) == (0, 0)
        client.close()


async def test_nobody_there():
    client = ApiClient(Origin.from_url("http://127.0.0.1:1"), retry=NO_RETRIES)
    with pytest.raises(ConnectionLost, match=r"127\.0\.0\.1:1.*Connection refused"):
        await client.post_json("/x", {}, timeout=5)
    client = ApiClient(Origin.unix("/no/such/socket"), retry=NO_RETRIES)
    with pytest.raises(ConnectionLost, match="no connection"):
        await client.post_json("/x", {}, timeout=5)
    client.close()
    with pytest.raises(ConnectionLost, match="closed"):
        await client.post_json("/x", {}, timeout=5)


def not_accepting(path: Path, *, queue: int) -> trio.SocketListener:
    """A unix socket with a queue for one connection more than ``queue``, from which nobody is taken yet."""
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    bound.bind(str(path))
    bound.listen(queue)
    bound.setblocking(False)
    return trio.SocketListener(trio.socket.from_stdlib_socket(bound))


async def test_a_full_queue_of_a_unix_socket_is_waited_for(tmp_path):
    # The server accepts nobody for a while: a queue of one has room for two.
    async def answer(_: HttpRequest) -> HttpResponse:
        return json_response({"ok": True})

    listener = not_accepting(tmp_path / "s", queue=1)
    client = ApiClient(Origin.unix(str(tmp_path / "s")), retry=NO_RETRIES)
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as requests:
            for _ in range(30):
                requests.start_soon(partial(client.post_json, "/x", {}, timeout=9))
            await trio.sleep(0.1)
            with trio.move_on_after(0.05) as impatient:
                await client.post_json("/x", {}, timeout=9)
            assert impatient.cancelled_caught
            nursery.start_soon(serve_http, answer, [listener])
        assert client.pool.in_use == 0
        client.close()
        nursery.cancel_scope.cancel()


@pytest.fixture
def few_descriptors():
    """Twenty more than are open now."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = set(map(int, os.listdir("/proc/self/fd")))
    last = next(itertools.islice((fd for fd in itertools.count() if fd not in in_use), 19, None))
    resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_more_requests_than_file_descriptors_wait_for_each_other(few_descriptors):
    # Client and server share the descriptors: some ten connections are possible.
    async def answer(_: HttpRequest) -> HttpResponse:
        await trio.sleep(0.02)
        return json_response({"ok": True})

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(serve_http, answer, listeners)
        await trio.testing.wait_all_tasks_blocked()
        port = listeners[0].socket.getsockname()[1]
        client = ApiClient(Origin.from_url(f"http://127.0.0.1:{port}"), retry=NO_RETRIES)
        nursery.start_soon(client.sweep)
        with trio.move_on_after(0.03):  # those who give up while they wait leave the count as it was
            async with trio.open_nursery() as impatient:
                for _ in range(50):
                    impatient.start_soon(partial(client.post_json, "/x", {}, timeout=20))
        assert client.pool.in_use == 0
        async with trio.open_nursery() as requests:
            for _ in range(100):
                requests.start_soon(partial(client.post_json, "/x", {}, timeout=20))
        assert client.pool.in_use == 0
        client.close()
        nursery.cancel_scope.cancel()


async def test_connections_that_do_not_stand_yet_hold_descriptors_too(few_descriptors, tmp_path):
    # Nobody accepts for a while: the descriptors go to connects under way.
    async def answer(_: HttpRequest) -> HttpResponse:
        return json_response({"ok": True})

    listener = not_accepting(tmp_path / "s", queue=0)
    first_in_the_queue = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    first_in_the_queue.connect(str(tmp_path / "s"))
    client = ApiClient(Origin.unix(str(tmp_path / "s")), retry=NO_RETRIES)
    async with trio.open_nursery() as nursery:
        kept_for_the_server = [os.dup(0) for _ in range(8)]
        async with trio.open_nursery() as requests:
            for _ in range(60):
                requests.start_soon(partial(client.post_json, "/x", {}, timeout=20))
            await trio.sleep(0.1)
            assert 0 < client.pool.in_use < 20  # the others have given their slots back until there is a connection
            for fd in kept_for_the_server:
                os.close(fd)
            first_in_the_queue.close()
            nursery.start_soon(serve_http, answer, [listener])
        assert client.pool.in_use == 0
        client.close()
        nursery.cancel_scope.cancel()


async def test_no_descriptor_for_the_first_connection_is_told(few_descriptors):
    client = ApiClient(Origin.from_url("http://127.0.0.1:1"), retry=NO_RETRIES)
    held = []
    with contextlib.suppress(OSError):
        while True:
            held.append(os.dup(0))
    try:
        with pytest.raises(ConnectionLost, match="Too many open files") as caught:
            await client.post_json("/x", {}, timeout=5)
    finally:
        for fd in held:
            os.close(fd)
    assert "ulimit -n" in str(caught.value.advice)
    client.close()


# -- requests and errors --------------------------------------------------------------------------------------------


async def test_what_is_sent():
    server = Scripted([OK])
    async with serving(server) as origin:
        client = ApiClient(Origin.from_url(origin.url + "/base/"), api_key="k3y")
        await client.post_json("/v1/x", {"text": "ünï", "n": 1.5, "none": None}, timeout=5)
        client.close()
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /base/v1/x HTTP/1.1"
    assert f"Host: {origin.authority}" in lines
    assert "Authorization: Bearer k3y" in lines
    assert "Content-Type: application/json" in lines
    assert body.decode() == '{"text":"ünï","n":1.5,"none":null}'


@pytest.mark.parametrize(
    ("status", "body", "kind", "said"),
    [
        (400, b'{"error": {"message": "bad thing"}}', BadRequestError, "bad thing"),
        (400, b'{"object": "error", "message": "bad thing"}', BadRequestError, "bad thing"),
        (422, b'{"detail": [{"loc": ["body"]}]}', BadRequestError, '[{"loc": ["body"]}]'),
        (413, b"", BadRequestError, None),
        (401, b'{"error": "Unauthorized"}', AuthenticationError, "Unauthorized"),
        (403, b"<html>no</html>", AuthenticationError, "<html>no</html>"),
        (404, b'{"detail": "Not Found"}', NotFoundError, "Not Found"),
        (429, b"{}", RateLimitError, None),
        (500, b'{"error": {"message": "oops"}}', RequestError, "oops"),
        (503, b"\xff", RequestError, "\ufffd"),
        (302, b"", ProtocolError, None),
    ],
)
async def test_statuses_become_typed_errors(status, body, kind, said):
    head = f"HTTP/1.1 {status} X\r\nLocation: /else\r\nx-request-id: r-7\r\nContent-Length: {len(body)}\r\n\r\n"
    async with serving(Scripted([head.encode() + body])) as origin:
        client = ApiClient(origin, api_key="k3y-secret", retry=NO_RETRIES)
        with pytest.raises(InferenceError) as caught:
            await client.post_json("/x", {"a": 1}, timeout=5)
        client.close()
    error = caught.value
    assert type(error) is kind
    assert isinstance(error, RequestError)
    assert (error.status, error.server_message, error.request_id) == (status, said, "r-7")
    assert error.payload == {"a": 1}
    assert error.elapsed > 0
    assert "k3y" not in repr(error) + str(error)


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens",  # vLLM, OpenAI
        "The input (9000 tokens) is longer than the model's context length (8192 tokens).",  # SGLang
        "the request exceeds the available context size, try increasing it",  # llama.cpp
    ],
)
async def test_a_prompt_that_is_too_long_is_recognised(message):
    body = f'{{"error": {{"message": "{message}"}}}}'.encode()
    head = f"HTTP/1.1 400 X\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    async with serving(Scripted([head + body])) as origin:
        client = ApiClient(origin)
        with pytest.raises(ContextLengthError):
            await client.post_json("/x", {}, timeout=5)
        client.close()


@pytest.mark.parametrize("body", [b"", b"nope", b"[1]", b'"text"', b'{"a": '])
async def test_a_body_that_is_no_json_object_is_an_error(body):
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    async with serving(Scripted([head + body])) as origin:
        client = ApiClient(origin)
        with pytest.raises(ProtocolError):
            await client.post_json("/x", {}, timeout=5)
        client.close()


@given(st.binary())
def test_any_body_of_an_error_gives_a_message_or_none(body):
    said = server_message(body)
    assert said is None or 0 < len(said) <= 500


async def test_time_out():
    async with serving(Scripted([b"HTTP/1.1 200 OK\r\n", 9.0])) as origin:
        client = ApiClient(origin)
        with pytest.raises(RequestTimeout, match=r"0\.1 s"):
            await client.post_json("/x", {}, timeout=0.1)
        assert (client.pool.in_use, client.pool.idle) == (0, 0)
        client.close()


async def test_the_sweeper_ends_what_has_run_out_of_time(monkeypatch):
    monkeypatch.setattr(api, "SWEPT", 0.1)
    monkeypatch.setattr(pool, "SWEEP_EVERY", 0.02)
    server = Scripted([OK], [OK], [b"HTTP/1.1 200 OK\r\n", 9.0], [OK])
    async with serving(server) as origin, trio.open_nursery() as nursery:
        client = ApiClient(origin)
        nursery.start_soon(client.sweep)
        await trio.sleep(0)
        for _ in range(2):
            assert await client.post_json("/x", {}, timeout=0.3) == {"ok": True}
        began = trio.current_time()
        with pytest.raises(RequestTimeout, match=r"within 0\.3 s") as caught:
            await client.post_json("/x", {"a": 1}, timeout=0.3)
        assert 0.29 <= trio.current_time() - began < 2
        assert (caught.value.payload, caught.value.attempts) == ({"a": 1}, 1)
        assert (client.pool.in_use, client.pool.idle) == (0, 0)
        assert await client.post_json("/x", {}, timeout=5) == {"ok": True}
        assert server.connections == 2
        nursery.cancel_scope.cancel()
        client.close()


async def test_a_closed_client_ends_the_requests_under_way():
    async with serving(Scripted([OK], *[[9.0]] * 5)) as origin, trio.open_nursery() as nursery:
        client = ApiClient(origin, max_connections=2)
        await client.post_json("/x", {}, timeout=5)

        async def ask() -> None:
            with pytest.raises(ConnectionLost):
                await client.post_json("/x", {}, timeout=60)

        for _ in range(4):  # two under way, two that wait for a slot
            nursery.start_soon(ask)
        await trio.sleep(0.1)
        client.close()


@asynccontextmanager
async def tls_server(context: ssl.SSLContext):
    async def handler(stream: trio.SocketStream) -> None:
        secure = trio.SSLStream(stream, context, server_side=True)
        try:
            while await secure.receive_some(65536):
                await secure.send_all(OK)
        except trio.BrokenResourceError:
            pass
        finally:
            stream.socket.close()

    async with serving(handler) as plain:
        yield Origin.from_url(f"https://127.0.0.1:{plain.port}")


async def test_tls_with_a_private_authority_and_a_client_certificate(tmp_path):
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    own = authority.issue_cert("client@example.com")
    own.private_key_and_cert_chain_pem.write_to_path(tmp_path / "client.pem")
    async with tls_server(context) as origin:
        client = ApiClient(origin, retry=NO_RETRIES)
        with pytest.raises(ConnectionLost, match="certificate"):
            await client.post_json("/x", {}, timeout=5)
        trusting = TlsOptions(str(tmp_path / "ca.pem"))
        client = ApiClient(origin, retry=NO_RETRIES, tls=trusting)
        with pytest.raises(ConnectionLost):  # the server wants to know who we are
            await client.post_json("/x", {}, timeout=5)
        client = ApiClient(origin, tls=TlsOptions(str(tmp_path / "ca.pem"), str(tmp_path / "client.pem")))
        for _ in range(3):
            assert await client.post_json("/x", {}, timeout=5) == {"ok": True}
        client.close()
    with pytest.raises(OSError, match="No such file"):
        ApiClient(Origin.from_url("https://x"), tls=TlsOptions("/no/such/file"))


async def test_an_unasked_answer_over_tls_reaches_nobody(tmp_path):
    """Both answers come in one segment, as two records: what is left of it lies above the socket."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")

    async def handler(stream: trio.SocketStream) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        secure = context.wrap_bio(incoming, outgoing, server_side=True)

        async def until_done(step):
            while True:
                try:
                    return step()
                except ssl.SSLWantReadError:
                    if data := outgoing.read():
                        await stream.send_all(data)
                    data = await stream.receive_some(65536)
                    if not data:
                        return b""
                    incoming.write(data)

        await until_done(secure.do_handshake)
        asked = 0
        while request := await until_done(lambda: secure.read(65536)):
            asked += 1
            for what in (request.rpartition(b"\r\n\r\n")[2], b'{"not": "asked for"}')[: 2 if asked == 1 else 1]:
                secure.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(what), what))
            await stream.send_all(outgoing.read())
        stream.socket.close()

    async with serving(handler) as plain:
        origin = Origin.from_url(f"https://127.0.0.1:{plain.port}")
        client = ApiClient(origin, tls=TlsOptions(str(tmp_path / "ca.pem")))
        for number in range(3):
            assert await client.post_json("/x", {"n": number}, timeout=5) == {"n": number}
        client.close()


async def test_tls_records_cut_anywhere(tmp_path):
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    async with tls_server(context) as inner:

        async def trickle(stream: trio.SocketStream) -> None:
            async with await trio.open_tcp_stream("127.0.0.1", inner.port) as upstream, trio.open_nursery() as nursery:

                async def back() -> None:
                    async for piece in upstream:
                        for at in range(0, len(piece), 3):
                            await stream.send_all(piece[at : at + 3])

                nursery.start_soon(back)
                async for piece in stream:
                    await upstream.send_all(piece)
                nursery.cancel_scope.cancel()
            stream.socket.close()

        async with serving(trickle) as plain:
            origin = Origin.from_url(f"https://127.0.0.1:{plain.port}")
            client = ApiClient(origin, tls=TlsOptions(str(tmp_path / "ca.pem")))
            for _ in range(3):
                assert await client.post_json("/x", {}, timeout=5) == {"ok": True}
            client.close()


# -- proxies --------------------------------------------------------------------------------------------------------


class ProxyServer:
    """A real forward proxy: tunnels by CONNECT, and plain requests by their absolute URL; both to ``target``."""

    def __init__(self, target: Origin) -> None:
        self.target = target
        self.heads: list[bytes] = []

    async def __call__(self, stream: trio.SocketStream) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            more = await stream.receive_some(65536)
            if not more:
                stream.socket.close()
                return
            head += more
        self.heads.append(head)
        behind = await trio.open_tcp_stream("127.0.0.1", self.target.port)
        if head.startswith(b"CONNECT"):
            await stream.send_all(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            await behind.send_all(head)
        try:
            async with trio.open_nursery() as nursery:
                for source, sink in ((stream, behind), (behind, stream)):
                    nursery.start_soon(self.pump, source, sink, nursery.cancel_scope)
        finally:
            stream.socket.close()
            behind.socket.close()

    @staticmethod
    async def pump(source: trio.SocketStream, sink: trio.SocketStream, scope: trio.CancelScope) -> None:
        try:
            while data := await source.receive_some(65536):
                await sink.send_all(data)
        except trio.BrokenResourceError:
            pass
        scope.cancel()


async def test_proxies_of_the_environment(monkeypatch, tmp_path):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("engine.invalid").configure_cert(context)
    tls = TlsOptions(str(tmp_path / "ca.pem"))
    scripted = Scripted([OK], [OK])
    async with tls_server(context) as secure, serving(scripted) as plain:
        for origin, kind in ((plain, "http"), (secure, "https")):
            proxy = ProxyServer(origin)
            async with serving(proxy) as address:
                with monkeypatch.context() as patch:
                    patch.setenv(f"{kind}_proxy", f"http://me:p%40ss@127.0.0.1:{address.port}")
                    client = ApiClient(Origin.from_url(f"{kind}://engine.invalid/base"), tls=tls)
                    for _ in range(2):
                        assert await client.post_json("/x", {}, timeout=5) == {"ok": True}
                    client.close()
                first = proxy.heads[0].split(b"\r\n")
                wanted = b"POST http://engine.invalid/base/x HTTP/1.1"
                assert first[0] == (wanted if kind == "http" else b"CONNECT engine.invalid:443 HTTP/1.1")
                assert b"Proxy-Authorization: Basic bWU6cEBzcw==" in first
                assert len(proxy.heads) == 1


def test_which_origins_go_through_a_proxy(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("https_proxy", "proxy2")
    monkeypatch.setenv("no_proxy", "inside.example")
    assert find_proxy(Origin.from_url("http://x")) == Proxy("proxy", 3128)
    assert find_proxy(Origin.from_url("https://x")) == Proxy("proxy2", 80)
    for direct in (
        "http://localhost:1",
        "http://127.0.0.1:1",
        "http://[::1]:1",
        "https://inside.example",
        "http+unix://%2Fs",
    ):
        assert find_proxy(Origin.from_url(direct)) is None
    monkeypatch.setenv("http_proxy", "socks5://proxy")
    with pytest.raises(ValueError, match="socks5://proxy"):
        find_proxy(Origin.from_url("http://x"))


# -- the pool under contention ----------------------------------------------------------------------------------------


async def echo(stream: trio.SocketStream) -> None:
    """Answers each request with its own body, in pieces."""
    from tests.http.scripted import read_request

    try:
        while request := await read_request(stream):
            body = request.partition(b"\r\n\r\n")[2]
            head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
            await stream.send_all(head + body[:5])
            await trio.sleep(0)
            await stream.send_all(body[5:])
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    finally:
        stream.socket.close()


@pytest.mark.slow
@given(st.integers(0, 2**32))
@settings(max_examples=10)
async def test_requests_cancelled_at_random_never_lose_a_slot_or_an_answer(seed):
    chance = random.Random(seed)
    answered = 0

    async def one(client: ApiClient, number: int) -> None:
        nonlocal answered
        with trio.move_on_after(chance.choice([9, 9, 0, chance.uniform(0, 0.02), chance.uniform(0, 0.2)])):
            assert await client.post_json("/x", {"marker": number}, timeout=30) == {"marker": number}
            answered += 1

    async with serving(echo) as origin:
        client = ApiClient(origin, max_connections=5)
        async with trio.open_nursery() as nursery:
            for number in range(1000):  # ten examples: 10,000 requests
                nursery.start_soon(one, client, number)
        assert client.pool.in_use == 0
        assert client.pool.idle <= 5
        assert answered >= 300
        # Every slot still works.
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(one, client, number)
        client.close()


# -- the control client ---------------------------------------------------------------------------------------------


async def test_the_control_client_maps_every_error(tmp_path):
    async with serving(Scripted([PLAIN])) as origin:
        pass
    gone = ControlClient(origin)
    with pytest.raises(ConnectionLost):
        await gone.get("/x", timeout=1)
    await gone.aclose()
    await gone.aclose()

    async def silent(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async def rude(stream: trio.SocketStream) -> None:
        await stream.send_all(b"SSH-2.0\r\n\r\n")
        stream.socket.close()

    for handler, kind in ((silent, RequestTimeout), (rude, InferenceError)):
        async with serving(handler) as origin:
            client = ControlClient(origin)
            with pytest.raises(kind):
                await client.get("/x", timeout=0.2)
            await client.aclose()


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:1", "socks5://127.0.0.1:1"])
async def test_probes_of_loopback_addresses_never_go_through_a_proxy(monkeypatch, proxy):
    # As requests: Debian gives 127.0.1.1 to a machine's own name.
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", proxy)

    async def page(stream: trio.SocketStream) -> None:
        await stream.receive_some(65536)
        await stream.send_all(PLAIN)
        stream.socket.close()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, page, 0, host="127.0.1.1"))
        port = listeners[0].socket.getsockname()[1]
        client = ControlClient(Origin.from_url(f"http://127.0.1.1:{port}"))
        assert await client.get("/x", timeout=5) == (200, b"hello")
        await client.aclose()
        nursery.cancel_scope.cancel()


async def test_the_control_clients_lack_of_descriptors_is_told_as_what_it_is(tmp_path):
    trustme.CA().cert_pem.write_to_path(tmp_path / "ca.pem")
    client = ControlClient(Origin("https", "127.0.0.1", 1), tls=TlsOptions(str(tmp_path / "ca.pem")))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))  # for the standard streams, and no more
    try:
        with pytest.raises(ConnectionLost, match="Too many open files"):
            await client.get("/x", timeout=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with pytest.raises(ConnectionLost, match="failed"):
        await client.get("/x", timeout=1)
    await client.aclose()


@pytest.mark.parametrize("how", ["timed out", "cancelled"])
async def test_a_tls_handshake_that_is_given_up_leaves_no_connection(how):
    began, ended = trio.Event(), trio.Event()

    async def never_answers(stream: trio.SocketStream) -> None:
        while await stream.receive_some(65536):
            began.set()
        if began.is_set():
            ended.set()

    async with serving(never_answers) as origin:
        client = ControlClient(Origin("https", "127.0.0.1", origin.port))
        if how == "cancelled":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(client.get, "/x", timeout=60))
                with trio.fail_after(5):
                    await began.wait()
                nursery.cancel_scope.cancel()
        timeout = 0.2
        while not began.is_set():  # where the machine is busy, the time may be over before the handshake begins
            with pytest.raises(RequestTimeout):
                await client.get("/x", timeout=timeout)
            timeout *= 2
        with trio.fail_after(1):  # the garbage collector would do it, too, but nobody knows when
            await ended.wait()
        await client.aclose()


class CancelAtStep(trio.abc.Instrument):
    """Cancels a scope at the n-th step of the task that makes it; ``is_done`` tells whether there was one."""

    def __init__(self, scope: trio.CancelScope, step: int) -> None:
        self._scope, self._left = scope, step
        self._task = trio.lowlevel.current_task()

    @property
    def is_done(self) -> bool:
        return self._left <= 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self._left -= 1
            if self._left == 0:
                self._scope.cancel()


def sockets() -> set[str]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(f"/proc/self/fd/{fd}"))
    return {name for name in found if name.startswith("socket:")}


@asynccontextmanager
async def probed(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A client for a server of this kind."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    tls = TlsOptions(str(folder / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "engine.invalid").configure_cert(context)

    async def page(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            while await stream.receive_some(65536):
                for piece in (OK[:5], OK[5:-3], OK[-3:]):
                    await stream.send_all(piece)
                    await trio.sleep(0.001)
        stream.socket.close()

    async with tls_server(context) as secure, serving(page) as plain:
        match kind:
            case "tcp":
                yield ControlClient(plain)
            case "tls":
                yield ControlClient(secure, tls=tls)
            case "unix":
                async with trio.open_nursery() as nursery:
                    listener = not_accepting(folder / "s", queue=100)
                    nursery.start_soon(trio.serve_listeners, page, [listener])
                    yield ControlClient(Origin.unix(str(folder / "s")))
                    nursery.cancel_scope.cancel()
            case _:
                scheme = "https" if kind == "tunnel" else "http"
                async with serving(ProxyServer(secure if kind == "tunnel" else plain)) as proxy:
                    monkeypatch.setenv(f"{scheme}_proxy", proxy.url)
                    yield ControlClient(Origin.from_url(f"{scheme}://engine.invalid"), tls=tls)


@pytest.mark.parametrize("kind", ["tcp", "unix", "tls", "proxy", "tunnel"])
async def test_a_probe_that_is_cancelled_at_any_step_leaves_no_connection(kind, tmp_path, monkeypatch):
    async with probed(kind, tmp_path, monkeypatch) as client:

        async def none_is_left() -> None:
            while sockets() - before:  # the server's, too, end soon
                await trio.sleep(0.001)

        before = sockets()
        assert await client.get("/x", timeout=5) == (200, b'{"ok":true}')
        gc.disable()  # it would close them, but nobody knows when
        try:
            for step in itertools.count(1):
                with trio.CancelScope() as scope:
                    cancel = CancelAtStep(scope, step)
                    trio.lowlevel.add_instrument(cancel)
                    try:
                        assert await client.get("/x", timeout=5) == (200, b'{"ok":true}')
                    finally:
                        trio.lowlevel.remove_instrument(cancel)
                with trio.fail_after(2):
                    await none_is_left()
                assert await client.get("/x", timeout=5) == (200, b'{"ok":true}')
                if not cancel.is_done:
                    break
        finally:
            gc.enable()
        assert step > 5
        await client.aclose()


async def test_probes_side_by_side_do_not_close_each_others_connections(tmp_path, monkeypatch):
    chance = random.Random(1)
    answered = 0

    async def one(patience: float) -> None:
        nonlocal answered
        with trio.move_on_after(patience):
            assert await client.get("/x", timeout=20) == (200, b'{"ok":true}')
            answered += 1

    async with probed("tcp", tmp_path, monkeypatch) as client:
        async with trio.open_nursery() as nursery:
            for _ in range(60):
                nursery.start_soon(one, chance.choice([20, chance.uniform(0, 0.3)]))
                nursery.start_soon(one, 20)
        assert answered >= 60
        await client.aclose()


async def test_a_page_that_drips_or_never_ends_costs_the_control_client_no_more_than_its_bounds(monkeypatch):
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    monkeypatch.setattr(control, "MAX_PAGE_BYTES", 2**20)
    for script, timeout, kind in (
        ([head, *[b"x", 0.05] * 40], 0.3, RequestTimeout),
        ([head, *[b"x" * 65536] * 40, 5.0], 5, ProtocolError),
    ):

        async def page(stream: trio.SocketStream, script: list[object] = script) -> None:
            await stream.receive_some(65536)
            with contextlib.suppress(trio.BrokenResourceError):
                for piece in script:
                    await (trio.sleep(piece) if isinstance(piece, float) else stream.send_all(piece))
            stream.socket.close()

        async with serving(page) as origin:
            client = ControlClient(origin)
            began = trio.current_time()
            with pytest.raises(kind):
                await client.get("/x", timeout=timeout)
            assert trio.current_time() - began < 2
            await client.aclose()


# -- origins --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected", "authority"),
    [
        ("http://127.0.0.1:8000", Origin("http", "127.0.0.1", 8000), "127.0.0.1:8000"),
        ("https://api.example.com/v1/", Origin("https", "api.example.com", 443, None, "/v1"), "api.example.com"),
        ("http://example.org/ü/a%20b c", Origin("http", "example.org", 80, None, "/%C3%BC/a%20b%20c"), "example.org"),
        ("http://bücher.example:81", Origin("http", "xn--bcher-kva.example", 81), "xn--bcher-kva.example:81"),
        ("http://[::1]:80/", Origin("http", "::1", 80), "[::1]"),
        (
            "http+unix://%2Ft%2Fa%20b/base",
            Origin("http", "localhost", 80, "/t/a b", "/base"),
            "localhost",
        ),
    ],
)
def test_urls_are_read_and_written(url, expected, authority):
    origin = Origin.from_url(url)
    assert origin == expected
    assert origin.authority == authority
    assert Origin.from_url(origin.url) == origin


@pytest.mark.parametrize(
    "url", ["ftp://x", "127.0.0.1:80", "http://", "http+unix://", "", "http://a..b", f"http://{'x' * 64}.org"]
)
def test_what_is_no_url_is_refused(url):
    with pytest.raises(ValueError, match=r"no http|names no|no proper host"):
        Origin.from_url(url)


async def test_a_server_that_answers_and_hangs_up_before_it_has_read_a_large_request():
    connections = 0

    async def refuse(stream: trio.SocketStream) -> None:
        nonlocal connections
        connections += 1
        await stream.receive_some(1000)
        body = b'{"error": {"message": "too big"}}'
        await stream.send_all(b"HTTP/1.1 413 Too Large\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await stream.aclose()  # with bytes that nobody has read: the kernel resets the connection

    async with serving(refuse) as origin:
        client = ApiClient(origin)
        with pytest.raises(BadRequestError, match="too big") as caught:
            await client.post_json("/x", {"prompt": "x" * 20_000_000}, timeout=30)
        assert caught.value.status == 413
        assert connections == 1
        assert client.pool.idle == 0
        client.close()


@pytest.mark.parametrize("path", ["/x\r\nEvil: 1", "/x y", "x", "", "http://elsewhere/", "/\u00e4", "/x\n", "/\x00"])
async def test_a_path_cannot_begin_a_request_of_its_own(path):
    server = Scripted()
    async with serving(server) as origin:
        client = ApiClient(origin)
        with pytest.raises(BadRequestError, match="cannot be asked for"):
            await client.post_json(path, {}, timeout=5)
        with pytest.raises(BadRequestError, match="cannot be asked for"):
            await client.stream_json(path, {}, timeout=5).__anext__()
        assert server.connections == 0
        client.close()


@pytest.mark.parametrize("key", ["a\nb", "a b", "k\u00e9y", "a\r\nEvil: 1"])
def test_a_key_that_cannot_stand_in_a_header(key):
    with pytest.raises(ValueError, match="the API key has") as caught:
        ApiClient(Origin.from_url("http://127.0.0.1:1"), api_key=key)
    assert key not in str(caught.value)
