"""The states of a server, and the one place where they change.

Rule: every transition goes through `Lifecycle`, along an edge of `ALLOWED`; nobody else keeps a flag that says the
same. Readiness is one `trio.Event` per start attempt, with the failure stored beside it: an event cannot carry an
error, and a waiter that only saw the event would not know what it woke up to.

::

    stopped ──▶ starting ──▶ ready ──▶ failed ──▶ stopped
                   │  └─────────────▶ failed
                   └──▶ stopped  ◀── ready
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from trinfer.errors import ServerError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ALLOWED", "Lifecycle", "ServerState", "Transition"]


class ServerState(enum.Enum):
    """Where a server is in its life."""

    STOPPED = "stopped"  # not entered yet, or everything of it is gone
    STARTING = "starting"  # its engine is being spawned or loads
    READY = "ready"  # its engine answers
    FAILED = "failed"  # its engine is of no use any more; the failure says why


ALLOWED: dict[ServerState, frozenset[ServerState]] = {
    ServerState.STOPPED: frozenset({ServerState.STARTING}),
    ServerState.STARTING: frozenset({ServerState.READY, ServerState.FAILED, ServerState.STOPPED}),
    ServerState.READY: frozenset({ServerState.FAILED, ServerState.STOPPED}),
    ServerState.FAILED: frozenset({ServerState.STOPPED}),
}


@dataclass(frozen=True)
class Transition:
    """One change of state. ``at`` is in seconds of trio's clock."""

    before: ServerState
    after: ServerState
    at: float
    reason: str


class _Attempt:
    """One try to bring the engine up. ``settled`` is set once waiters have something to look at."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.settled = trio.Event()


class Lifecycle:
    """State, readiness and failure of one server.

    ``observers`` are called with each `Transition`, synchronously, after it happened.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._state = ServerState.STOPPED
        self._attempt = _Attempt(0)
        self._failure: ServerError | None = None
        self._down = trio.Event()
        self.observers: list[Callable[[Transition], None]] = []

    @property
    def state(self) -> ServerState:
        return self._state

    @property
    def failure(self) -> ServerError | None:
        """Why the server failed; None unless it did. Kept when it is stopped afterwards."""
        return self._failure

    @property
    def down(self) -> trio.Event:
        """Set once this life is over: failed or stopped."""
        return self._down

    # -- transitions ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """A new life begins, with its first attempt."""
        self._move(ServerState.STARTING, "entered")
        self._failure = None
        self._down = trio.Event()
        self._attempt = _Attempt(1)

    def retry(self) -> None:
        """The attempt was in vain and another begins; waiters go on to wait for that one."""
        assert self._state is ServerState.STARTING, self._state
        previous, self._attempt = self._attempt, _Attempt(self._attempt.number + 1)
        previous.settled.set()

    def ready(self) -> None:
        self._move(ServerState.READY, "the engine answers")
        self._attempt.settled.set()

    def fail(self, failure: ServerError) -> None:
        """Store why, and wake every waiter."""
        self._failure = failure
        self._move(ServerState.FAILED, failure.message)
        self._attempt.settled.set()
        self._down.set()

    def stop(self, reason: str) -> None:
        """Idempotent: a server that is stopped already stays so."""
        if self._state is ServerState.STOPPED:
            return
        self._move(ServerState.STOPPED, reason)
        self._attempt.settled.set()
        self._down.set()

    def _move(self, after: ServerState, reason: str) -> None:
        before = self._state
        if after not in ALLOWED[before]:
            raise AssertionError(f"{self._name}: no way from {before.value} to {after.value} ({reason})")
        self._state = after
        for observer in tuple(self.observers):
            observer(Transition(before, after, trio.current_time(), reason))

    # -- waiting ----------------------------------------------------------------------------------------------

    async def wait_ready(self) -> None:
        """Return once the server is ready, over as many start attempts as it takes.

        Raises:
            ServerError: it failed or was stopped. Each waiter gets an error of its own with the same content.

        Cancelled: nothing is left behind.
        """
        while self._state is ServerState.STARTING:
            await self._attempt.settled.wait()
        if self._state is not ServerState.READY:
            raise self.down_error()

    def down_error(self) -> ServerError:
        """A fresh error that says why the server is down."""
        if self._failure is not None:
            return self._failure.fresh()
        if self._state is ServerState.STARTING:
            return ServerError(
                f"{self._name} is still starting", advice="await server.wait_ready() first", server=self._name
            )
        if self._attempt.number == 0:
            return ServerError(
                f"{self._name} has not been started",
                advice="use it inside its block: `async with server: ...`",
                server=self._name,
            )
        return ServerError(
            f"{self._name} has been stopped",
            advice="send requests inside the server's `async with` block",
            server=self._name,
        )
