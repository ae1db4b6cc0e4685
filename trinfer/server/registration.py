"""Keeps a server's entry in the ledger true, from its start to its end."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Protocol

import trio

from trinfer.process import threads
from trinfer.process.identity import SERVER_VARIABLE, pid_space, run_id
from trinfer.process.ledger import Entry, Ledger
from trinfer.server.lifecycle import ServerState

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trinfer.config import InferenceConfig
    from trinfer.process.output import EngineLog
    from trinfer.server.attempt import Attempt
    from trinfer.server.lifecycle import Transition

__all__ = ["Registered", "Registration"]

logger = logging.getLogger(__name__)

EVERY = 5.0  # seconds between two looks at the number of requests


class Registered(Protocol):
    """What the ledger says about a server."""

    config: InferenceConfig
    rank: int
    log: EngineLog

    @property
    def engine_name(self) -> str: ...
    @property
    def state(self) -> ServerState: ...
    @property
    def restarts(self) -> int: ...
    @property
    def requests_accepted(self) -> int: ...
    @property
    def marker(self) -> Mapping[str, str]: ...
    @property
    def current_attempt(self) -> Attempt | None: ...


class Registration:
    """Observes the lifecycle of one server."""

    def __init__(self, server: Registered) -> None:
        self._server = server
        self._ledger = Ledger()
        self._started_at = 0.0
        self._last: Entry | None = None

    def hear(self, transition: Transition) -> None:
        if transition.before is ServerState.STOPPED:
            self._started_at = time.time()
            self._ledger.sweep()
        if transition.after is ServerState.STOPPED:
            self._last = None
            self._ledger.remove()
        else:
            self._write()

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """Write down now and then how many requests and which processes there are, until cancelled."""
        troubled = False
        while True:
            await trio.sleep(EVERY)
            try:
                attempt = self._server.current_attempt
                processes = [] if attempt is None else await threads.run_sync(attempt.known_processes)
                if attempt is self._server.current_attempt and self._server.state is not ServerState.STOPPED:
                    self._write(processes)
                troubled = False
            except Exception:  # a help, never a need: no engine is ended for it
                if not troubled:
                    logger.exception("%s: the ledger's entry could not be brought up to date", self._server.engine_name)
                troubled = True

    def _write(self, processes: Sequence[tuple[int, int]] | None = None) -> None:
        server = self._server
        attempt = server.current_attempt
        if processes is None:
            processes = [] if attempt is None else attempt.known_processes()
        address = "" if attempt is None else attempt.uds or (f"port {attempt.port}" if attempt.port else "")
        entry = Entry(
            server=server.marker[SERVER_VARIABLE],
            run=run_id(),
            engine=server.engine_name,
            rank=server.rank,
            model=server.config.model,
            state=server.state.value,
            address=address,
            log=str(server.log.path.absolute()) if server.log.path else "",
            started_at=self._started_at,
            restarts=server.restarts,
            requests=server.requests_accepted,
            processes=sorted(map(list, processes)),
            space=pid_space(),
        )
        if entry != self._last:
            self._last = entry
            self._ledger.write(entry)
