"""Transitions as they happen, for any number of tasks that want to know."""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from typing import TYPE_CHECKING, Self

import trio

from trinfer.server.lifecycle import ServerState

if TYPE_CHECKING:
    from trinfer.server.lifecycle import Lifecycle, Transition

__all__ = ["Events"]


class Events:
    """Every transition since this was made, until the server has been stopped; an async iterator for one task.

    A slow reader misses nothing: transitions are few, and wait for it. One that is dropped costs nothing more.
    """

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._waiting: deque[Transition] = deque()
        self._news = trio.Event()
        # Made after the end of a life, it has nothing to tell.
        self._over = lifecycle.state is ServerState.STOPPED and lifecycle.attempt > 0

        def forget(_: object) -> None:
            with contextlib.suppress(ValueError):
                lifecycle.observers.remove(hear)

        ref = weakref.ref(self, forget)

        def hear(transition: Transition) -> None:
            events = ref()
            if events is not None:
                events._waiting.append(transition)
                events._news.set()
            if transition.after is ServerState.STOPPED:
                forget(None)

        lifecycle.observers.append(hear)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Transition:
        """The next one. Cancelled: it is kept for the next call."""
        if self._over:
            raise StopAsyncIteration
        while not self._waiting:
            self._news = trio.Event()
            await self._news.wait()
        await trio.lowlevel.checkpoint_if_cancelled()
        transition = self._waiting.popleft()
        self._over = transition.after is ServerState.STOPPED
        return transition
