"""Names by which a server's processes can be recognised, long after their owner has gone.

Rule: they are derived, not stored: the run is this process (its pid and start time), so that there is no global state
and nothing to write down. Every process of an engine inherits them through its environment.
"""

from __future__ import annotations

import os
import secrets

__all__ = ["RUN_VARIABLE", "SERVER_VARIABLE", "new_marker", "run_id"]

RUN_VARIABLE = "TRINFER_RUN_ID"
SERVER_VARIABLE = "TRINFER_SERVER_ID"


def run_id() -> str:
    """Id of this process, unique on this host since its boot: ``PID-STARTTIME``."""
    try:
        with open("/proc/self/stat", "rb") as stat:
            # The second field is the program's name in parentheses, which may itself hold spaces and parentheses.
            fields = stat.read().rpartition(b")")[2].split()
        return f"{os.getpid()}-{int(fields[19])}"
    except (OSError, ValueError, IndexError):  # no /proc: macOS
        return f"{os.getpid()}-0"


def new_marker() -> dict[str, str]:
    """Environment variables that mark the processes of one server."""
    return {RUN_VARIABLE: run_id(), SERVER_VARIABLE: secrets.token_hex(6)}
