"""A server on a real socket that answers with bytes to order."""

from __future__ import annotations

import socket
import struct
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import trio

from trinfer.http.origin import Origin

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

RESET = object()


class Scripted:
    """Each request gets the next script: pieces of bytes, sent one by one; after the last script, connections end.

    ``RESET`` as a piece resets the connection; a float waits.
    """

    def __init__(self, *scripts: list[object]) -> None:
        self.scripts = list(scripts)
        self.requests: list[bytes] = []
        self.connections = 0
        self.closed = 0

    async def __call__(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        try:
            while request := await read_request(stream):
                self.requests.append(request)
                if not self.scripts:
                    return
                for piece in self.scripts.pop(0):
                    if piece is RESET:
                        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        stream.socket.close()
                        return
                    if piece is None:
                        return
                    if isinstance(piece, float):
                        await trio.sleep(piece)
                        continue
                    assert isinstance(piece, bytes)
                    await stream.send_all(piece)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self.closed += 1
            stream.socket.close()


async def read_request(stream: trio.SocketStream) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        more = await stream.receive_some(65536)
        if not more:
            return b""
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    while len(body) < length:
        more = await stream.receive_some(65536)
        if not more:
            return b""
        body += more
    return head + b"\r\n\r\n" + body


@asynccontextmanager
async def serving(handler: Callable[[trio.SocketStream], object]) -> AsyncIterator[Origin]:
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, handler, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        yield Origin.from_url(f"http://127.0.0.1:{port}")
        nursery.cancel_scope.cancel()
