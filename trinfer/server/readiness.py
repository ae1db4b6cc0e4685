"""When to look whether an engine answers, and how to know that it is ours which does.

Rule: looking must cost next to nothing, so that it can be done every few milliseconds; and a 200 alone proves nothing,
since any server may sit on the port (two vLLM on one port both start: vllm-project/vllm#39762).
"""

from __future__ import annotations

import errno
import json
import select
import socket
from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["Pace", "accepts_connections", "served_models", "until_ready"]

# Time between two looks, as a share of the time that the engine has been loading: what is found is never later than
# this share, and a load of ten minutes is not disturbed by a hundred probes a second.
SHARE_OF_ELAPSED = 0.01
FASTEST = 0.01  # seconds
# Output of the engine brings the next look forward, but not nearer than this part of the regular interval.
EAGERNESS = 0.1


class Pace:
    """Adaptive polling: from milliseconds up to ``slowest`` seconds, the longer the start has taken."""

    def __init__(self, slowest: float) -> None:
        self._slowest = slowest

    def interval(self, elapsed: float) -> float:
        """Seconds until the next look, ``elapsed`` seconds after the spawn."""
        return min(max(FASTEST, elapsed * SHARE_OF_ELAPSED), self._slowest)


async def until_ready(look: Callable[[], Awaitable[bool]], *, pace: Pace, nudge: Callable[[], trio.Event]) -> None:
    """Call ``look`` until it returns True.

    Args:
        look: one look at the engine.
        pace: how long to wait between looks.
        nudge: gives an event that is set when the engine shows signs of life (its output): it usually says something
            when it begins to serve, so that the next look comes at once, however slow the pace has become.

    Cancelled: nothing is left behind but what ``look`` leaves.
    """
    began = trio.current_time()
    while True:
        looked_at = trio.current_time()
        sign_of_life = nudge()
        if await look():
            return
        interval = pace.interval(trio.current_time() - began)
        with trio.move_on_at(looked_at + interval):
            await sign_of_life.wait()
            await trio.sleep_until(looked_at + interval * EAGERNESS)
        await trio.lowlevel.checkpoint()


def accepts_connections(host: str, port: int | None, uds: str | None) -> bool:
    """Whether somebody listens there, for the price of one refused connect (some 20 microseconds).

    True also where that cannot be told at once: the real probe then decides.
    """
    address: str | tuple[str, int | None]
    if uds is not None:
        family, address = socket.AF_UNIX, uds
    elif ":" in host:
        family, address = socket.AF_INET6, (host, port)
    else:
        family, address = socket.AF_INET, (host, port)
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            code = probe.connect_ex(address)
        except OSError:  # a name instead of an address, a path that is too long: the real probe will explain it
            return True
        if code == errno.EINPROGRESS:
            # On loopback the refusal is there already, but only a poll brings it out.
            poll = select.poll()
            poll.register(probe, select.POLLOUT)
            poll.poll(0)
            code = probe.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return code not in {errno.ECONNREFUSED, errno.ENOENT}


def served_models(body: bytes) -> tuple[str, ...]:
    """Names in an answer of ``/v1/models``; empty where it is not of that form."""
    try:
        page: Any = json.loads(body)
    except ValueError:
        return ()
    data = page.get("data") if isinstance(page, dict) else None
    if not isinstance(data, list):
        return ()
    names: list[str] = []
    for entry in data:
        if isinstance(entry, dict):
            names.extend(entry[key] for key in ("id", "root") if isinstance(entry.get(key), str))
    return tuple(names)
