"""Threads for blocking calls of trinfer's own: those of a user, who may have all of trio's at work, are no hindrance.

But for one: trio starts processes in a thread of its default limiter, and nobody can give it another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["run_sync"]

T = TypeVar("T")

THREADS = 16
_limiter: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("trinfer_threads")


async def run_sync(function: Callable[[], T], *, abandon_on_cancel: bool = False) -> T:
    """`trio.to_thread.run_sync`, beside the threads of the user, of whom trio's default lets 40 work at a time."""
    try:
        limiter = _limiter.get()
    except LookupError:
        limiter = trio.CapacityLimiter(THREADS)
        _limiter.set(limiter)
    return await trio.to_thread.run_sync(function, limiter=limiter, abandon_on_cancel=abandon_on_cancel)
