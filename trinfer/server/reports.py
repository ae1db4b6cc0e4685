"""What is kept of each start attempt that has failed: for the error's history, for observers, for the post-mortem."""

from __future__ import annotations

import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trinfer.errors import ServerError
    from trinfer.server.diagnosis import Diagnosis

__all__ = ["CrashReport", "report"]

CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")
# Signals whose default action writes a core file: signal(7).
CORE_SIGNALS = frozenset(
    {"SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGQUIT", "SIGSEGV", "SIGSYS", "SIGTRAP", "SIGXCPU"}
)


@dataclass(frozen=True)
class CrashReport:
    """One start attempt that has failed.

    Attributes:
        attempt: its number in the server's life, from 1.
        phase: "starting" or "serving".
        message: what happened, in one sentence.
        returncode: the engine's exit code, negative for a signal; None where it did not exit by itself.
        signal: name of the signal that ended it, such as SIGSEGV; empty otherwise.
        core: where the kernel puts core files, if the signal is one that leaves a core and limits allow it; else empty.
        uptime: seconds from its spawn to its end.
        at: when it ended, in seconds since the epoch.
        diagnosis: what the catalogue makes of its last lines; None where it knows nothing.
        log_tail: its last lines of output.
    """

    attempt: int
    phase: str
    message: str
    returncode: int | None
    signal: str
    core: str
    uptime: float
    at: float
    diagnosis: Diagnosis | None
    log_tail: tuple[str, ...]

    @property
    def line(self) -> str:
        """For the history of an error: attempts that fail alike are told apart by how long they lasted."""
        return f"start {self.attempt}, {self.phase}, after {self.uptime:.1f} s: {self.message}"


def report(
    failure: ServerError,
    *,
    attempt: int,
    was_ready: bool,
    uptime: float,
    diagnosis: Diagnosis | None,
    log_tail: Sequence[str],
) -> CrashReport:
    """What is known about an attempt that has just ended."""
    name = _signal_name(failure.returncode)
    return CrashReport(
        attempt=attempt,
        phase="serving" if was_ready else "starting",
        message=failure.message,
        returncode=failure.returncode,
        signal=name,
        core=_core_place() if name in CORE_SIGNALS else "",
        uptime=uptime,
        at=time.time(),
        diagnosis=diagnosis,
        log_tail=tuple(log_tail),
    )


def _signal_name(returncode: int | None) -> str:
    if returncode is None or returncode >= 0:
        return ""
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"signal {-returncode}"


def _core_place() -> str:
    """The kernel's pattern; empty where core files are off. A pattern with a pipe ignores the limit: core(5)."""
    try:
        pattern = CORE_PATTERN.read_text().strip()
    except OSError:
        return ""
    limited = resource.getrlimit(resource.RLIMIT_CORE)[0] == 0
    return "" if limited and not pattern.startswith("|") else pattern
