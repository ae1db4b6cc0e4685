"""The states of a server, and the one place where they change.

Rule: every transition goes through `Lifecycle`, along an edge of `ALLOWED`; nobody else keeps a flag that says the
same. Readiness is one `trio.Event` per start attempt, with the failure stored beside it: an event cannot carry an
error, and a waiter that only saw the event would not know what it woke up to.

::

    stopped ──▶ starting ──▶ ready ──▶ draining ──▶ stopped
                             │   ▲        └──▶ failed ──▶ stopped
                             ▼   │
                           restarting

From each state but stopped, a way leads to failed, and from each one to stopped.
"""

from __future__ import annotations

import enum
import logging
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from trinfer.errors import ServerError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ALLOWED", "Lifecycle", "ServerState", "Transition"]


logger = logging.getLogger(__name__)


class ServerState(enum.Enum):
    """Where a server is in its life."""

    STOPPED = "stopped"  # not entered yet, or everything of it is gone
    STARTING = "starting"  # its engine is being spawned or loads
    READY = "ready"  # its engine answers
    RESTARTING = "restarting"  # its engine has died, and another one is coming; requests wait for it
    DRAINING = "draining"  # requests under way are finished, new ones refused
    FAILED = "failed"  # its engine is of no use any more; the failure says why


ALLOWED: dict[ServerState, frozenset[ServerState]] = {
    ServerState.STOPPED: frozenset({ServerState.STARTING}),
    ServerState.STARTING: frozenset({ServerState.READY, ServerState.FAILED, ServerState.STOPPED}),
    ServerState.READY: frozenset(
        {ServerState.RESTARTING, ServerState.DRAINING, ServerState.FAILED, ServerState.STOPPED}
    ),
    ServerState.RESTARTING: frozenset({ServerState.READY, ServerState.FAILED, ServerState.STOPPED}),
    ServerState.DRAINING: frozenset({ServerState.FAILED, ServerState.STOPPED}),
    ServerState.FAILED: frozenset({ServerState.STOPPED}),
}


COMING = frozenset({ServerState.STARTING, ServerState.RESTARTING})
SERVING = frozenset({ServerState.READY, ServerState.DRAINING})


@dataclass(frozen=True)
class Transition:
    """One change of state.

    Attributes:
        at: seconds of trio's clock.
        reason: why, in words.
        attempt: number of the start attempt to which the new state belongs, from 1.
    """

    before: ServerState
    after: ServerState
    at: float
    reason: str
    attempt: int = 0


class _Attempt:
    """One try to bring the engine up.

    ``settled`` is set once waiters have something to look at, ``over`` once its engine answers no more.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.settled = trio.Event()
        self.over = trio.Event()


class Lifecycle:
    """State, readiness and failure of one server.

    ``observers`` are called with each `Transition`, synchronously, in order, after it happened; what they raise is
    logged.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._state = ServerState.STOPPED
        self._attempt = _Attempt(0)
        self._failure: ServerError | None = None
        self._down = False
        self._leaving = False
        self._drain_reason: str | None = None
        self._untold: deque[Transition] = deque()
        self.observers: list[Callable[[Transition], None]] = []

    @property
    def state(self) -> ServerState:
        return self._state

    @property
    def failure(self) -> ServerError | None:
        """Why the server failed; None unless it did. Kept when it is stopped afterwards."""
        return self._failure

    @property
    def is_down(self) -> bool:
        """No more answers are to be expected: failed, stopped, or about to be stopped."""
        return self._down

    @property
    def over(self) -> trio.Event:
        """Set once the engine that serves now has died or is stopped; each start attempt has its own."""
        return self._attempt.over

    @property
    def attempt(self) -> int:
        """Number of the current start attempt, from 1; 0 before the first."""
        return self._attempt.number

    # -- transitions ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """A new life begins, with its first attempt."""
        self._attempt = _Attempt(1)
        # Before observers look: what they see is the new life.
        self._failure = None
        self._leaving = self._down = False
        self._drain_reason = None
        self._move(ServerState.STARTING, "entered")

    def retry(self) -> None:
        """The attempt was in vain and another begins; waiters go on to wait for that one."""
        assert self._state in COMING, self._state
        previous, self._attempt = self._attempt, _Attempt(self._attempt.number + 1)
        previous.settled.set()
        previous.over.set()

    def ready(self) -> None:
        self._move(ServerState.READY, "the engine answers")
        self._attempt.settled.set()
        if self._drain_reason is not None and self._state is ServerState.READY:  # an observer may have been quicker
            self._move(ServerState.DRAINING, self._drain_reason)

    def restart(self, reason: str) -> None:
        """The engine has died while it served, and another attempt begins; requests wait for it."""
        previous, self._attempt = self._attempt, _Attempt(self._attempt.number + 1)
        self._move(ServerState.RESTARTING, reason)
        previous.over.set()

    def drain(self, reason: str) -> None:
        """Refuse new requests from now on, or from when the engine is ready. Idempotent."""
        if self._drain_reason is None:
            self._drain_reason = reason
            if self._state is ServerState.READY:
                self._move(ServerState.DRAINING, reason)

    def fail(self, failure: ServerError) -> None:
        """Store why, and wake every waiter."""
        self._failure = failure
        self._move(ServerState.FAILED, failure.message)
        self._end()

    def leave(self) -> None:
        """The server is about to be stopped, which may take a while: nobody shall wait for it any more. Idempotent."""
        self._leaving = True
        self._end()

    def stop(self, reason: str) -> None:
        """Idempotent: a server that is stopped already stays so."""
        if self._state is ServerState.STOPPED:
            return
        self._move(ServerState.STOPPED, reason)
        self._end()

    def _end(self) -> None:
        self._down = True
        self._attempt.settled.set()
        self._attempt.over.set()

    def _move(self, after: ServerState, reason: str) -> None:
        before = self._state
        if after not in ALLOWED[before]:
            raise AssertionError(f"{self._name}: no way from {before.value} to {after.value} ({reason})")
        self._state = after
        self._untold.append(Transition(before, after, trio.current_time(), reason, self._attempt.number))
        if len(self._untold) > 1:
            return  # an observer has done this: it is told when everybody has heard of what came before
        try:
            while self._untold:
                for observer in tuple(self.observers):
                    try:
                        observer(self._untold[0])
                    except Exception:  # somebody's mistake in watching it is no reason to end an engine
                        logger.exception("%s: an observer of its states has failed", self._name)
                self._untold.popleft()
        except BaseException:
            self._untold.clear()
            raise

    # -- waiting ----------------------------------------------------------------------------------------------

    async def wait_ready(self, *, accepted: bool = False) -> None:
        """Return once the server is ready, over as many start attempts as it takes.

        Args:
            accepted: for a request that was accepted before: it gets its turn also while the server drains.

        Raises:
            ServerError: it failed, was stopped or drains. Each waiter gets an error of its own with the same content.

        Cancelled: nothing is left behind.
        """
        if (
            accepted or self._drain_reason is None or self._leaving
        ):  # else: who waited before the drain still gets a turn
            while self._state in COMING and not self._leaving:
                await self._attempt.settled.wait()
            if self._state in SERVING and not self._leaving:
                return
        raise self.down_error()

    def down_error(self) -> ServerError:
        """A fresh error that says why the server takes no requests."""
        if self._failure is not None:
            return self._failure.fresh()
        what, advice = "has been stopped", "send requests inside the server's `async with` block"
        if self._attempt.number == 0:
            what, advice = "has not been started", "use it inside its block: `async with server: ...`"
        elif not self._leaving and self._drain_reason is not None:
            what, advice = f"takes no more requests, it drains ({self._drain_reason})", "send them to another server"
        elif not self._leaving and self._state in COMING:
            what, advice = f"is still {self._state.value}", "await server.wait_ready() first"
        return ServerError(f"{self._name} {what}", advice=advice, server=self._name)
