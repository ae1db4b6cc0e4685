"""Brings an engine up, over as many start attempts as it may take, watches over it, and starts it again.

Rules:
- Nothing that goes wrong here comes out as an exception: it becomes the server's failure, with its explanation.
- Who waits is told before the clean-up, which may take the grace period; a next attempt begins only after it, when
  the old processes are gone, and what they held.
- What will fail again is not tried again; what may pass is, within the budget.
"""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import TYPE_CHECKING, Protocol

import trio

from trinfer.errors import ServerError, TrinferError
from trinfer.process import threads
from trinfer.process.identity import new_marker
from trinfer.server.attempt import Attempt, FinalFailure, PortTaken
from trinfer.server.diagnosis import diagnose, is_port_in_use
from trinfer.server.gpu_release import (
    RELEASE_WAIT,
    describe_holders,
    strangers,
    until_released,
    until_strangers_leave,
)
from trinfer.server.lifecycle import SERVING, ServerState
from trinfer.server.preflight import preflight
from trinfer.server.reports import CrashReport, report
from trinfer.server.restarts import RestartBudget
from trinfer.server.starting import Starter, StartWatch

if TYPE_CHECKING:
    from collections.abc import Collection

    from trinfer.process.gpus import GpuUser
    from trinfer.server.health import HealthWatch
    from trinfer.server.lifecycle import Lifecycle
    from trinfer.server.link import Link
    from trinfer.server.node import Node

__all__ = ["Supervised", "Supervisor"]

logger = logging.getLogger(__name__)

PORT_CHANGES = 10  # new ports taken in one start before the start counts as failed
LAST_WORDS = 0.04  # seconds that the output of a dead engine may still take to arrive
SHOWN_TAIL = 50  # lines
READ_TAIL = 200  # lines that are searched for a cause
KEPT_REPORTS = 100
TOLD_SOON = 2.0  # seconds for a look at the GPUs before a failure is told


class Supervised(Starter, Protocol):
    """What a supervisor needs to know of its server."""

    rank: int
    node: Node

    @property
    def engine_name(self) -> str: ...
    @property
    def can_serve_uds(self) -> bool: ...
    async def start_server(self) -> trio.Process | None: ...
    async def monitor_health(self) -> None: ...
    def open_link(self) -> Link: ...
    def health_watch(self, attempt: Attempt, link: Link) -> HealthWatch | None: ...


class Supervisor:
    """One life of one server: its attempts, one after the other.

    Attributes:
        attempt: the current one; None before the first, between two, and after the last.
        link: the way to its engine, once it has been spawned.
        start: how its start goes.
        found_model: the first model that it offers, where the config names none.
        reports: of the attempts that have failed, oldest first.
        marker: environment variables of all its processes.
        restarts: how often the engine was started again after it had been ready.
        launched: the first attempt has executed the engine, or has failed.
    """

    def __init__(self, server: Supervised, lifecycle: Lifecycle) -> None:
        self._server = server
        self._lifecycle = lifecycle
        self._budget = RestartBudget(server.config)
        self._start_failures = 0
        self._was_ready = False
        self._ports: set[int] = set()
        # The same for all attempts: before one begins, nothing is left of the one before.
        self.marker = new_marker()
        self.attempt: Attempt | None = None
        self.link: Link | None = None
        self.start: StartWatch | None = None
        self.found_model = ""
        self.reports: list[CrashReport] = []
        self.launched = trio.Event()

    @property
    def restarts(self) -> int:
        return self._budget.total

    async def run(self) -> None:
        """Return when the engine has failed for good, or (on a worker node) has ended well.

        Cancelled: the engine is stopped, and nothing of it is left.
        """
        try:
            while (pause := await self._attempt_once()) is not None:
                if pause:
                    logger.info("%s: the next start comes in %.1f s", self._server.name, pause)
                    await trio.sleep(pause)
        finally:
            self.attempt = None

    async def _attempt_once(self) -> float | None:
        """One attempt, from its lease to its clean-up; seconds until another shall follow, None if none shall."""
        server = self._server
        env = {**os.environ, **server.config.env}
        if server.config.gpus is not None:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, server.config.gpus))
        attempt = Attempt(log=server.log, env=env, marker=self.marker, grace=server.config.shutdown_grace_sec)
        pause: float | None = None

        async def body() -> None:
            nonlocal pause
            failure = await self._start_and_watch(attempt)
            if failure is not None:  # else a worker node's engine has ended well
                pause = await self._what_next(attempt, failure)

        self.attempt = attempt
        server.log.begin(f"start attempt {self._lifecycle.attempt} of {server.name}")
        try:
            await attempt.run(body)
        finally:
            self.attempt = None
            link, self.link = self.link, None
            if link is not None:
                await link.aclose()
        if pause is None:
            return None
        holders = await until_released(attempt.known_pids)
        if holders:
            self._lifecycle.fail(self._still_held(holders))
            return None
        if self._is_short_of_resources():
            began = trio.current_time()
            await until_strangers_leave(self._visible_gpus(), attempt.known_pids)
            pause = max(0.0, pause - (trio.current_time() - began))
        return pause

    def _still_held(self, holders: Collection[GpuUser]) -> ServerError:
        return ServerError(
            f"{self._server.name}: not started again: the engine has ended, but GPU memory is still held after "
            f"{RELEASE_WAIT:.0f} s: {describe_holders(holders)}",
            cause="a process that cannot be ended (state D) waits for the driver",
            advice="look at `nvidia-smi` and `dmesg`; the GPU may need a reset, or the machine a restart",
            server=self._server.name,
            history=[past.line for past in self.reports],
        )

    # -- after a failure ------------------------------------------------------------------------------------------

    async def _what_next(self, attempt: Attempt, failure: ServerError) -> float | None:
        """Put the failure on record, and tell who waits; the pause before the next attempt, None if it was the last."""
        attempt.remember_processes()  # whose GPU memory is then waited for
        server, lifecycle = self._server, self._lifecycle
        serving = lifecycle.state in SERVING
        if isinstance(failure, PortTaken) and not serving and len(self._ports) <= PORT_CHANGES:
            logger.info("%s: %s; taking another port", server.name, failure.message)
            lifecycle.retry()
            return 0.0
        crash = self._report(attempt, failure, serving=serving)
        self.reports = [*self.reports, crash][-KEPT_REPORTS:]
        others = await self._who_else_holds_gpus(attempt)
        refusal = self._why_not_again(failure, crash)
        if refusal is not None:
            lifecycle.fail(self._explain(failure, crash, refusal, others))
            return None
        logger.warning("%s: starting again after: %s", server.name, failure.message)
        if serving:
            lifecycle.restart(failure.message)
        else:
            lifecycle.retry()
        # Before the first readiness nothing is on the budget's account yet, and its pause is that of a first restart.
        return self._budget.pause(short_of_resources=self._is_short_of_resources())

    def _is_short_of_resources(self) -> bool:
        """Whether the last attempt has failed for lack of something that may come free."""
        diagnosis = self.reports[-1].diagnosis if self.reports else None
        return diagnosis is not None and diagnosis.kind == "resource"

    async def _who_else_holds_gpus(self, attempt: Attempt) -> str:
        """Others that may be why there was not enough memory, in words; empty for nobody."""
        if not self._is_short_of_resources():
            return ""
        with trio.move_on_after(TOLD_SOON):  # those who wait are told soon, with this or without
            return describe_holders(await strangers(self._visible_gpus(), attempt.known_pids))
        return ""

    def _visible_gpus(self) -> Collection[str]:
        config = self._server.config
        if config.gpus is not None:
            return [str(gpu) for gpu in config.gpus]
        visible = {**os.environ, **config.env}.get("CUDA_VISIBLE_DEVICES", "")
        return [each.strip() for each in visible.split(",") if each.strip()]

    def _why_not_again(self, failure: ServerError, crash: CrashReport) -> str | None:
        """Why there shall not be another attempt, in words (which may be empty); None if there shall."""
        server = self._server
        if server.node.is_worker or not server.is_local:
            return ""
        if self._lifecycle.state is ServerState.DRAINING:
            return "it was draining"
        diagnosed_final = crash.phase == "starting" and crash.diagnosis is not None and crash.diagnosis.is_final
        if diagnosed_final or isinstance(failure, FinalFailure):
            return "the same start would fail again" if len(self.reports) > 1 else ""
        if self._was_ready:
            return None if self._budget.take(trio.current_time()) else self._budget.describe()
        self._start_failures += 1
        return None if self._start_failures <= server.config.server_start_max_retries else ""

    def _report(self, attempt: Attempt, failure: ServerError, *, serving: bool) -> CrashReport:
        log = self._server.log
        # Engines of several processes repeat a failure in each, with a traceback: its cause may stand far up.
        lines = failure.log_tail or log.tail(READ_TAIL)
        return report(
            failure,
            attempt=self._lifecycle.attempt,
            was_ready=serving,
            uptime=trio.current_time() - attempt.began,
            diagnosis=diagnose(lines, self._server.engine_name, returncode=failure.returncode),
            log_tail=failure.log_tail or log.tail(SHOWN_TAIL),
        )

    def _explain(self, failure: ServerError, crash: CrashReport, refusal: str, others: str) -> ServerError:
        """The failure with all that is known: diagnosis, the engine's last words, the attempts before."""
        diagnosis = None if failure.cause else crash.diagnosis
        cause = diagnosis.cause if diagnosis else failure.cause
        advice = diagnosis.advice if diagnosis else failure.advice
        if cause is None and failure.returncode == 0:
            cause = "its program ended by itself and without an error: it puts itself into the background, perhaps"
            advice = (
                advice or "run it in the foreground (without --daemon, or & in a script), and for as long as it serves"
            )
        if others:
            cause = f"{cause}; others hold GPU memory: {others}"
        explained = ServerError(
            failure.message + (f"; not started again: {refusal}" if refusal else ""),
            cause=cause,
            advice=advice,
            log_tail=crash.log_tail,
            server=self._server.name,
            returncode=failure.returncode,
            history=[past.line for past in self.reports],
        )
        explained.__cause__ = failure.__cause__
        return explained

    # -- one attempt ----------------------------------------------------------------------------------------------

    async def _start_and_watch(self, attempt: Attempt) -> ServerError | None:
        """Start the engine and watch over it; returns why it failed, None for a worker's engine that ended well."""
        server = self._server
        serves = not server.node.is_worker
        start = self.start = StartWatch(server, attempt)
        try:
            if server.is_local:
                await self._check_first()
            if server.is_local and serves:
                attempt.lease_address(
                    host=server.config.host, rank=server.rank, uds=self._wants_uds(), avoid=self._ports
                )
                if attempt.port is not None:
                    self._ports.add(attempt.port)
            limit = server.config.server_start_timeout_sec
            with trio.move_on_after(limit) as spawning:
                await server.start_server()
            self.launched.set()
            if spawning.cancelled_caught:
                return _too_slow(f"{server.name}: spawning the engine took more than {limit:g} s")
            attempt.start_soon(partial(self._watch_process, attempt))
            if serves:
                self.link = server.open_link()
                attempt.start_soon(self.link.api.sweep)
                attempt.start_soon(partial(self._watch_service, attempt, self.link, start))
            failure = await attempt.verdict()
        except ServerError as error:
            failure = error
        except TrinferError as error:  # a ConfigError, most often: it would be raised again
            failure = FinalFailure(f"{server.name}: {error.message}", cause=error.cause, advice=error.advice)
            failure.__cause__ = error
        except Exception as error:
            failure = ServerError(f"{server.name}: starting failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
        finally:
            self.launched.set()
            start.close()
        return None if server.node.is_worker and failure.returncode == 0 else failure

    async def _check_first(self) -> None:
        """What is certain to fail is not tried.

        Raises:
            FinalFailure: it is.
        """
        check = partial(preflight, self._server.config, nodes=self._server.node.count)
        # In a thread: a file system may hang. The limit is that of the spawn, which comes next.
        with trio.move_on_after(self._server.config.server_start_timeout_sec):
            for finding in await threads.run_sync(check, abandon_on_cancel=True):
                if finding.level == "error":
                    raise FinalFailure(f"{self._server.name}: {finding.what}", advice=finding.advice)

    def _wants_uds(self) -> bool:
        wanted, able = self._server.config.transport, self._server.can_serve_uds
        if wanted == "uds" and not able:
            raise ServerError(
                f"{self._server.name} cannot serve on a unix socket", advice='use transport="auto" or "tcp"'
            )
        return able and wanted != "tcp"

    @trio.lowlevel.enable_ki_protection
    async def _watch_process(self, attempt: Attempt) -> None:
        """Turn the end of `monitor_health` into the attempt's verdict."""
        cause: Exception | None = None
        try:
            await self._server.monitor_health()
        except ServerError as error:
            attempt.fail(error)
            return
        except Exception as error:
            cause = error
        await attempt.drained(LAST_WORDS)
        failure = self._describe_end(attempt, cause)
        failure.__cause__ = cause
        attempt.fail(failure)

    def _describe_end(self, attempt: Attempt, cause: Exception | None) -> ServerError:
        name, ready = self._server.name, self._lifecycle.state in SERVING
        when = "while serving" if ready else "before it was ready"
        for guarded in attempt.processes:
            if guarded.exit is not None:
                if (
                    not ready
                    and attempt.port is not None
                    and any(is_port_in_use(line, attempt.port) for line in self._server.log.tail(SHOWN_TAIL))
                ):
                    return PortTaken(f"{name}: port {attempt.port} is in use", returncode=guarded.exit.returncode)
                return ServerError(
                    f"{name}: the engine ended {when}: {guarded.exit.describe()}", returncode=guarded.exit.returncode
                )
        if cause is not None:
            return ServerError(f"{name}: the engine is unhealthy: {type(cause).__name__}: {cause}")
        return ServerError(f"{name}: the engine became unhealthy {when}")

    @trio.lowlevel.enable_ki_protection
    async def _watch_service(self, attempt: Attempt, link: Link, start: StartWatch) -> None:
        """Wait until the engine answers, then watch whether it goes on doing so."""
        try:
            await start.wait(link)
        except ServerError as error:
            attempt.fail(error)
            return
        self.found_model = start.found_model
        self._was_ready = True
        self._ports.clear()  # of this start; another begins anew
        self._lifecycle.ready()
        attempt.remember_processes()
        watch = self._server.health_watch(attempt, link)
        if watch is None:
            return
        try:
            await watch.run()
        except Exception:
            # An engine that serves is not ended because nobody can watch it.
            logger.exception("%s: the health watch has failed; its process is still watched", self._server.name)


def _too_slow(what: str) -> ServerError:
    """The engine was not spawned in its time. trio starts processes in threads of its default limiter, always."""
    if trio.to_thread.current_default_thread_limiter().available_tokens:
        return ServerError(f"{what} (server_start_timeout_sec)")
    return ServerError(
        f"{what} (server_start_timeout_sec)",
        cause="all threads that trio allows by default are taken, and starting a process needs one",
        advice="give threads that work for long, or wait for this server, a limiter of their own: "
        "trio.to_thread.run_sync(…, limiter=trio.CapacityLimiter(n))",
    )
