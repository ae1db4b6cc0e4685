"""Faults to order: what a fake engine shall do wrong, and when, in one place."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trinfer.testing import fake_engine

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["OUT_OF_MEMORY", "Faults"]

OUT_OF_MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB."


@dataclass(frozen=True, kw_only=True)
class Faults:
    """A schedule of faults for one fake engine; the default is a healthy one. Times in seconds, requests from 1.

    Attributes:
        slow_start: bind only after this time.
        latency, token_latency: time before each answer, and for each of its words.
        crash_at_request: exit while this request is under way. crash_after: so long after it was ready.
        exit_code, signal: how it ends then; ``signal`` is a name such as SIGSEGV.
        wedge_after: answer so many requests, then none; /health still says 200.
        sick_after: /health says 503 from then on.
        prints: lines of output at the start, `OUT_OF_MEMORY` for instance.
        dies_at_start: exit before it binds, after its output.
        port_stolen: find the port taken, in the first N starts.
        statuses: answer these requests with these statuses; ``retry_after`` goes with them.
        fails_from: answer with status 500 from this request on; /health still says 200.
        stalls: answer these requests so much later.
        reset_at: reset the connection in the middle of this answer.
        orphan: have a grandchild that ignores SIGTERM, and a daemon.
        deaf: ignore SIGTERM.
        bad_utf8: write bytes that are no text.
        only_first: be well from start N + 1 on, so that a restart heals it; 0 never.
        more: further options of ``python -m trinfer.testing.fake_engine``.
    """

    slow_start: float = 0.0
    latency: float = 0.0
    token_latency: float = 0.0
    crash_at_request: int | None = None
    crash_after: float | None = None
    exit_code: int = 1
    signal: str = ""
    wedge_after: int | None = None
    sick_after: float | None = None
    prints: tuple[str, ...] = ()
    dies_at_start: bool = False
    port_stolen: int = 0
    statuses: Mapping[int, int] = field(default_factory=dict)
    retry_after: str = ""
    fails_from: int | None = None
    stalls: Mapping[int, float] = field(default_factory=dict)
    reset_at: int | None = None
    orphan: bool = False
    deaf: bool = False
    bad_utf8: bool = False
    only_first: int = 0
    more: tuple[str, ...] = ()

    def command(self, counter: str) -> list[str]:
        """A command template for ``server_command``.

        Args:
            counter: path of a file in which starts are counted; it need not exist.
        """
        options = ["--counter", counter, "--exit-code", str(self.exit_code)]
        for name, value in (
            ("ready-after", self.slow_start or None),
            ("latency", self.latency or None),
            ("token-latency", self.token_latency or None),
            ("crash-at", self._crash()),
            ("signal", self.signal or None),
            ("wedge-after", self.wedge_after),
            ("sick-after", self.sick_after),
            ("port-in-use", self.port_stolen or None),
            ("retry-after", self.retry_after or None),
            ("reset-at", self.reset_at),
            ("only-first", self.only_first or None),
        ):
            if value is not None:
                options += [f"--{name}", str(value)]
        for line in self.prints:
            options += ["--print", line]
        for number, status in self.statuses.items():
            options += ["--status-at", str(number), str(status)]
        if self.fails_from is not None:
            options += ["--status-from", str(self.fails_from), "500"]
        for number, seconds in self.stalls.items():
            options += ["--stall-at", str(number), str(seconds)]
        for name, wanted in (
            ("deaf-grandchild", self.orphan),
            ("daemon", self.orphan),
            ("deaf", self.deaf),
            ("bad-utf8", self.bad_utf8),
        ):
            if wanted:
                options.append(f"--{name}")
        return [sys.executable, "-S", "-E", fake_engine.__file__, "--port", "{port}", *options, *self.more]

    def _crash(self) -> str | None:
        if self.dies_at_start:
            return "before-bind"
        if self.crash_at_request is not None:
            return f"request:{self.crash_at_request}"
        return None if self.crash_after is None else f"ready:{self.crash_after}"
