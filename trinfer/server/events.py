"""Transitions as they happen, for any number of tasks that want to know."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import trio

from trinfer.server.lifecycle import ServerState, Transition

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trinfer.server.lifecycle import Lifecycle

__all__ = ["transitions"]


async def transitions(lifecycle: Lifecycle) -> AsyncIterator[Transition]:
    """Every transition from the first step of the iteration on, until the server has been stopped.

    A slow reader misses nothing: transitions are few, and wait for it.
    """
    send, receive = trio.open_memory_channel[Transition](math.inf)
    lifecycle.observers.append(send.send_nowait)
    try:
        async with receive:
            async for transition in receive:
                yield transition
                if transition.after is ServerState.STOPPED:
                    return
    finally:
        lifecycle.observers.remove(send.send_nowait)
        send.close()
