"""Hypothesis drives a server with a real engine through start, requests, cancellations, kills, restarts and exit.

The machine is synchronous; trio runs in a thread for the machine's life. After each run: no survivor, no hang, only
answers or typed errors (one for each request), states along allowed edges, and no more restarts than the budget allows.

    HYPOTHESIS_PROFILE=deep python -m pytest tests/server/test_state_machine.py     10,000 examples
"""

from __future__ import annotations

import os
import queue
import signal
import threading
from contextlib import suppress
from typing import Any

import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.engine_configs import fake_config, text_of
from trinfer import CustomServer, InferenceError, ServerError, ServerState
from trinfer.process.guard import descendants
from trinfer.process.identity import RUN_VARIABLE, run_id
from trinfer.process.spawn import marked_processes
from trinfer.server.lifecycle import ALLOWED, COMING, Transition

HANG = 15.0  # seconds after which something is said to hang: grace is 0.1 s, and no answer takes longer than that

STARTS = st.sampled_from(
    [
        ("--ready-after", "0.1"),
        ("--loading-503", "0.15"),
        ("--never-ready",),
        ("--crash-at", "before-bind"),
        ("--crash-at", "ready:0.2"),
        ("--crash-at", "request:2"),
        ("--reset-at", "1"),
        ("--wedge-after", "1"),
        ("--flood", "3000000"),
        ("--bad-utf8", "--long-line", "300000", "--progress-bar"),
        ("--port-in-use", "1"),
        ("--fail-starts", "1"),
        ("--status-at", "1", "503"),
        ("--status-at", "2", "500"),
        ("--sick-after", "0.1"),
        ("--silent-health",),
        ("--latency", "0.1"),
        (),
    ]
)
TREES = st.sets(
    st.sampled_from(["--deaf", "--own-session", "--daemon", "--deaf-grandchild", "--respawning", "--stopped"]),
    max_size=3,
)


class ServerMachine(RuleBasedStateMachine):
    """One server, one block."""

    def __init__(self) -> None:
        super().__init__()
        self.transitions: list[Transition] = []
        self.outcomes: list[tuple[str, Any]] = []
        self.sent = 0
        self.thread: threading.Thread | None = None

    @initialize(
        start=STARTS,
        tree=TREES,
        uses=st.integers(0, 1),
        restarts=st.sampled_from([3, 2, 1, 0]),
        replays=st.integers(0, 3),
        recovers=st.booleans(),
        settled=st.booleans(),
        drains=st.sampled_from([False, False, False, True]),
        kind=st.sampled_from(["return", "raise", "cancel"]),
    )
    def enter(self, start, tree, uses, restarts, replays, recovers, settled, drains, kind):
        self.counter = f"/tmp/tri-counter-{os.getpid()}-{id(self)}"
        config = fake_config(
            *start,
            *sorted(tree),
            *("--counter", self.counter),
            *(("--only-first", "1") if recovers else ()),
            shutdown_grace_sec=0.1,
            server_start_max_retries=uses,
            max_restarts=restarts,
            max_replays=replays,
            restart_backoff_sec=0.02,
            stall_timeout=0.4,
            probe_interval_sec=0.1,
            server_ready_max_attempts=2,
            server_ready_delay_sec=0.4,
            request_timeout=1.0,
        )
        self.server = CustomServer(config)
        self.server.lifecycle.observers.append(self.transitions.append)
        self.way_out, self.drains = kind, drains
        started: queue.Queue[Any] = queue.Queue()
        self.thread = threading.Thread(target=self.live, args=(started,), name="trio loop")
        self.thread.start()
        self.token, self.tasks, self.leave_now = started.get(timeout=HANG)
        if settled:
            self.settle()

    def live(self, started: queue.Queue[Any]) -> None:
        async def main() -> None:
            leave_now = trio.Event()
            with trio.CancelScope() as scope:
                try:
                    async with trio.open_nursery() as tasks, self.server:
                        started.put((trio.lowlevel.current_trio_token(), tasks, leave_now))
                        await leave_now.wait()
                        if self.way_out == "raise":
                            raise ValueError("out")
                        if self.way_out == "cancel":
                            scope.cancel()
                            await trio.sleep_forever()
                except* ValueError as group:
                    self.outcomes.append(("left by", group.exceptions[0]))

        trio.run(main)

    def call(self, function, *args):
        return trio.from_thread.run_sync(function, *args, trio_token=self.token)

    async def ask(self, name: str, patience: float | None) -> None:
        payload = {"messages": [{"role": "user", "content": name}]}
        outcome: Any = "cancelled"
        try:
            with trio.move_on_after(float("inf") if patience is None else patience):
                outcome = text_of(await self.server.make_request(payload))
        except (InferenceError, ServerError) as error:
            outcome = error
        finally:
            self.outcomes.append((name, outcome))

    @rule(count=st.integers(1, 5), patience=st.one_of(st.none(), st.floats(0, 0.3)))
    def request(self, count, patience):
        for _ in range(count):
            self.sent += 1
            self.call(self.tasks.start_soon, self.ask, f"request-{self.sent}", patience)

    @rule(seconds=st.floats(0, 0.15))
    def wait(self, seconds):
        trio.from_thread.run(trio.sleep, seconds, trio_token=self.token)

    @rule(which=st.sampled_from(["engine", "engine", "descendant", "outer", "inner", "both"]), pick=st.integers(0, 99))
    def kill(self, which, pick):
        attempt = self.server._supervisor.attempt
        if attempt is None or not attempt.processes:
            return
        guarded = attempt.processes[0]
        tree = self.call(guarded.tree)
        pids = {
            "engine": [guarded.engine_pid],
            "descendant": [tree[pick % len(tree)]] if tree else [],
            "outer": [guarded.process.pid],
            "inner": [guarded._inner_pid],
            "both": [guarded.process.pid, guarded._inner_pid],
        }[which]
        alive = set(descendants(os.getpid()))
        for pid in pids:
            if pid in alive:  # never a pid that has been given to somebody else
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    @rule()
    def settle(self):
        """Wait until the start, or restart, has ended one way or the other."""

        async def wait() -> None:
            with trio.move_on_after(1.0):
                while self.server.state in COMING:
                    await trio.sleep(0.01)

        trio.from_thread.run(wait, trio_token=self.token)

    @precondition(lambda self: self.drains)
    @rule(timeout=st.floats(0, 0.3))
    def drain(self, timeout):
        self.call(self.tasks.start_soon, self.server.drain, timeout)

    def leave(self):
        self.call(self.leave_now.set)
        assert self.thread is not None
        self.thread.join(HANG)
        assert not self.thread.is_alive(), "leaving hangs"
        assert self.server.state is ServerState.STOPPED
        assert marked_processes({RUN_VARIABLE: run_id()}) == []

    @invariant()
    def transitions_are_allowed(self):
        for transition in list(self.transitions):
            assert transition.after in ALLOWED[transition.before]

    @invariant()
    def restarts_keep_within_the_budget(self):
        if self.thread is not None:
            most = self.server.config.max_restarts
            assert self.server.restarts <= most
            assert sum(t.after is ServerState.RESTARTING for t in list(self.transitions)) <= most

    def teardown(self):
        if self.thread is None:
            return
        self.leave()
        with suppress(FileNotFoundError):
            os.unlink(self.counter)
        names = sorted(name for name, _ in self.outcomes if name != "left by")
        assert names == sorted(f"request-{n + 1}" for n in range(self.sent)), "each request has one outcome"
        answers = {name: outcome for name, outcome in self.outcomes if name != "left by"}
        for name, outcome in answers.items():
            assert outcome in {f"echo: {name}", "cancelled"} or isinstance(outcome, InferenceError | ServerError), (
                outcome
            )
        assert ("left by" in dict(self.outcomes)) == (self.way_out == "raise")


ServerMachine.TestCase.settings = settings(stateful_step_count=8)


class TestServerMachine(ServerMachine.TestCase):
    """Collected by pytest."""
