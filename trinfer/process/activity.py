"""What processes have consumed, as a sign of life. Linux; elsewhere nothing is known."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["cpu_seconds", "io_bytes"]

_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pids: Iterable[int]) -> float | None:
    """CPU time of living processes so far, user and system; None where none could be read. Source: proc(5), stat."""
    total: float | None = None
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat", "rb") as stat:
                fields = stat.read().rpartition(b")")[2].split()
            total = (total or 0.0) + (int(fields[11]) + int(fields[12])) / _TICKS
        except (OSError, ValueError, IndexError):
            continue
    return total


def io_bytes(pids: Iterable[int]) -> int | None:
    """Bytes that living processes have read and written so far; None where none could be read. Source: proc(5), io."""
    total: int | None = None
    for pid in pids:
        try:
            with open(f"/proc/{pid}/io", "rb") as io:
                lines = dict(line.split(b": ") for line in io.read().splitlines())
            total = (total or 0) + int(lines[b"rchar"]) + int(lines[b"wchar"])
        except (OSError, ValueError, KeyError):
            continue
    return total
