"""Threads for blocking calls of trinfer's own: a user's threads must not keep an engine from starting."""

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
