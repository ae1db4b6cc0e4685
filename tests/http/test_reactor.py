"""The reactor on real sockets: edges that come together, losses while somebody waits, and life without it."""

from __future__ import annotations

import os
import resource
import socket
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from tests.http.scripted import Scripted, serving
from trinfer.http import reactor as reactor_module
from trinfer.http.pool import Pool
from trinfer.http.reactor import CHUNK, Reactor, Watched
from trinfer.http.transport import PlainTransport


class Wire:
    """A transport, and the other end of its socket."""

    def __init__(self, reactor: Reactor) -> None:
        ours, self.peer = socket.socketpair()
        self.transport = PlainTransport(trio.SocketStream(trio.socket.from_stdlib_socket(ours)), reactor)

    async def read(self, count: int) -> bytes:
        """So many bytes, or what there is until the end."""
        got = bytearray()

        def feed(data: bytes) -> bool:
            got.extend(data)
            return not data or len(got) >= count

        await self.transport.fill(feed)
        return bytes(got)


@asynccontextmanager
async def wires(*, running: bool = True):
    reactor = Reactor()
    made: list[Wire] = []
    async with trio.open_nursery() as nursery:
        if running:
            nursery.start_soon(reactor.run)
            await trio.testing.wait_all_tasks_blocked()

        def make() -> Wire:
            made.append(Wire(reactor))
            return made[-1]

        try:
            yield make, nursery.cancel_scope
        finally:
            nursery.cancel_scope.cancel()
            for wire in made:
                wire.transport.close()
                wire.peer.close()


@pytest.mark.parametrize("running", [True, False])
async def test_what_is_there_already_is_read(running):
    async with wires(running=running) as (make, _):
        wire = make()
        wire.peer.sendall(b"hello")
        assert await wire.read(5) == b"hello"


@pytest.mark.parametrize("running", [True, False])
async def test_pieces_and_the_end_that_comes_with_the_last_one(running):
    async with wires(running=running) as (make, _):
        wire = make()
        wire.peer.sendall(b"abc")
        wire.peer.close()
        # The end is an edge that comes together with the bytes: it must not be lost with them.
        assert await wire.read(3) == b"abc"
        with trio.fail_after(5):
            assert await wire.read(1) == b""
            assert await wire.read(1) == b""


async def test_the_end_after_the_edge_of_the_last_bytes():
    async with wires() as (make, _):
        wire = make()
        wire.peer.sendall(b"abc")
        await trio.testing.wait_all_tasks_blocked(0.01)  # told, and not read: nobody waits
        wire.peer.shutdown(socket.SHUT_WR)
        with trio.fail_after(5):
            assert await wire.read(100) == b"abc"


@pytest.mark.parametrize("size", [CHUNK - 1, CHUNK, CHUNK + 1, 20 * CHUNK])
async def test_more_than_one_read(size):
    async with wires() as (make, _), trio.open_nursery() as nursery:
        wire = make()
        data = os.urandom(size)
        wire.peer.setblocking(False)
        peer = trio.SocketStream(trio.socket.from_stdlib_socket(wire.peer.dup()))
        nursery.start_soon(peer.send_all, data)
        with trio.fail_after(10):
            assert await wire.read(size) == data
        await peer.aclose()


async def test_each_of_many_gets_its_own():
    async with wires() as (make, _):
        all_wires = [make() for _ in range(300)]
        got: dict[int, bytes] = {}

        async def read(number: int) -> None:
            got[number] = await all_wires[number].read(8)

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                for number in range(300):
                    nursery.start_soon(read, number)
                await trio.testing.wait_all_tasks_blocked()
                for number, wire in enumerate(all_wires):
                    wire.peer.sendall(b"%04d" % number)
                await trio.sleep(0.01)
                for wire in reversed(all_wires):
                    wire.peer.sendall(b"half")
        assert got == {number: b"%04dhalf" % number for number in range(300)}


@pytest.mark.parametrize("how", ["close", "reactor"])
async def test_who_waits_when_the_socket_or_the_reactor_goes(how):
    async with wires() as (make, scope):
        wire = make()
        outcome: list[object] = []

        async def read() -> None:
            try:
                outcome.append(await wire.read(2))
            except OSError as error:
                outcome.append(error)

        with trio.CancelScope(shield=True), trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                await trio.testing.wait_all_tasks_blocked()
                if how == "close":
                    wire.transport.close()
                else:
                    wire.peer.sendall(b"a")
                    await trio.testing.wait_all_tasks_blocked(0.01)
                    scope.cancel()
                    await trio.testing.wait_all_tasks_blocked(0.01)
                    wire.peer.sendall(b"b")
        # Without the reactor, it goes on by trio's own means, and nothing of what was read is lost.
        assert outcome == [b"ab"] if how == "reactor" else isinstance(outcome[0], ConnectionAbortedError)


async def test_a_cancelled_reader_leaves_what_comes_to_the_next():
    async with wires() as (make, _):
        wire = make()
        with trio.move_on_after(0.01) as scope:
            await wire.read(5)
        assert scope.cancelled_caught
        wire.peer.sendall(b"hello")
        with trio.fail_after(5):
            assert await wire.read(5) == b"hello"


async def test_what_the_feed_raises_reaches_the_reader_and_nobody_else():
    async with wires() as (make, _):
        bad, good = make(), make()

        def refuse(data: bytes) -> bool:
            raise ValueError(data)

        async with trio.open_nursery() as nursery:

            async def fails() -> None:
                with pytest.raises(ValueError, match="x"):
                    await bad.transport.fill(refuse)

            nursery.start_soon(fails)
            await trio.testing.wait_all_tasks_blocked()
            bad.peer.sendall(b"x")
            good.peer.sendall(b"y")
            assert await good.read(1) == b"y"


async def test_a_reset_is_an_error():
    async with wires() as (make, _):
        listener = socket.create_server(("127.0.0.1", 0))
        stream = await trio.open_tcp_stream("127.0.0.1", listener.getsockname()[1])
        wire = make()
        wire.transport.close()
        wire.peer.close()
        wire.peer = listener.accept()[0]
        listener.close()
        reactor = wire.transport._reactor
        wire.transport = PlainTransport(stream, reactor)
        wire.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        wire.peer.close()
        with trio.fail_after(5), pytest.raises(ConnectionResetError):
            await wire.read(1)


async def test_a_flood_on_one_connection_leaves_turns_for_the_others():
    async with wires() as (make, _), trio.open_nursery() as nursery:
        flood, other = make(), make()
        flood.peer.setblocking(False)
        while True:
            try:
                flood.peer.send(bytes(CHUNK))
            except BlockingIOError:
                break
        flood.transport._watched._recv = lambda size: bytes(size)  # faster than it can be read, for ever
        nursery.start_soon(flood.transport.fill, lambda _: False)
        other.peer.sendall(b"hello")
        with trio.fail_after(5):
            assert await other.read(5) == b"hello"
        nursery.cancel_scope.cancel()


async def test_idle_sockets_with_unread_bytes_cost_nothing():
    async with wires() as (make, _):
        wire = make()
        wire.peer.sendall(b"nobody reads this")
        await trio.testing.wait_all_tasks_blocked(0.01)
        turns = 0

        class Count(trio.abc.Instrument):
            def before_task_step(self, task: trio.lowlevel.Task) -> None:
                nonlocal turns
                turns += 1

        counter = Count()
        trio.lowlevel.add_instrument(counter)
        await trio.sleep(0.1)
        trio.lowlevel.remove_instrument(counter)
        assert turns < 10
        assert wire.transport.has_news()


async def test_a_forked_copy_of_a_closed_socket_troubles_nobody():
    # Between fork and exec, a child holds the socket open: its edges must not be told to the next one of its number.
    async with wires() as (make, _):
        wire = make()
        copy = os.dup(wire.transport._fd)
        number = wire.transport._fd
        wire.transport.close()
        following = make()
        assert following.transport._fd == number
        wire.peer.sendall(b"for the closed one")
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert isinstance(following.transport._watched, Watched)
        assert not following.transport._watched._news
        os.close(copy)


async def test_without_a_descriptor_for_its_epoll_it_begins_when_there_is_one(monkeypatch):
    monkeypatch.setattr(reactor_module, "TRY_AGAIN", 0.02)
    reactor = Reactor()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with trio.open_nursery() as nursery:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))  # for the standard streams, and no more
        try:
            nursery.start_soon(reactor.run)
            await trio.testing.wait_all_tasks_blocked()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        early = Wire(reactor)
        early.peer.sendall(b"hello")
        assert await early.read(5) == b"hello"
        assert early.transport._watched is None
        with trio.fail_after(5):
            while reactor._epoll is None:
                await trio.sleep(0.01)
        late = Wire(reactor)
        assert late.transport._watched is not None
        for wire in (early, late):
            wire.peer.sendall(b"hello")
            assert await wire.read(5) == b"hello"
            wire.transport.close()
            wire.peer.close()
        nursery.cancel_scope.cancel()


async def test_a_pool_makes_its_connections_with_the_reactor_that_it_runs():
    server = Scripted([b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"])
    async with serving(server) as origin:
        pool = Pool(origin)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.sweep)
            await trio.testing.wait_all_tasks_blocked()
            answer = await pool.exchange(b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n")
            assert answer.status == 200
            assert len(pool._reactor._watched) == 1
            nursery.cancel_scope.cancel()
        assert pool._reactor._watched == {}
        assert server.connections == 1
        pool.close()
