"""What nvidia-smi says about GPUs and who holds their memory. Where it is not installed, nothing is known.

Source: ``nvidia-smi --help-query-gpu``, ``--help-query-compute-apps``. In a container, it gives pids of the host, which
mean nothing inside.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

__all__ = ["Gpu", "GpuUser", "gpu_count", "gpu_users", "gpus", "has_nvidia_smi"]

TIMEOUT = 5.0  # seconds; a hung driver hangs nvidia-smi


@dataclass(frozen=True)
class Gpu:
    """One GPU; memory in MiB."""

    index: int
    uuid: str
    name: str
    total: int
    free: int
    driver: str


@dataclass(frozen=True)
class GpuUser:
    """One process on one GPU; memory in MiB."""

    pid: int
    uuid: str
    used: int


def has_nvidia_smi() -> bool:
    return shutil.which("nvidia-smi") is not None


def gpu_count() -> int | None:
    """Number of NVIDIA GPUs, told by the driver in microseconds; None where there is no such driver."""
    try:
        return len(os.listdir("/proc/driver/nvidia/gpus"))
    except OSError:
        return None


def gpus() -> list[Gpu] | None:
    """All GPUs; None where nvidia-smi is not there, or fails. Blocks, for seconds at most."""
    rows = _query("--query-gpu=index,uuid,name,memory.total,memory.free,driver_version")
    if rows is None:
        return None
    return [
        Gpu(_number(row[0]), row[1], row[2], _number(row[3]), _number(row[4]), row[5]) for row in rows if len(row) == 6
    ]


def gpu_users() -> list[GpuUser] | None:
    """All processes that hold GPU memory; None where nvidia-smi is not there, or fails. Blocks, as `gpus`."""
    rows = _query("--query-compute-apps=pid,gpu_uuid,used_memory")
    if rows is None:
        return None
    return [GpuUser(_number(row[0]), row[1], _number(row[2])) for row in rows if len(row) == 3]


def _number(text: str) -> int:
    """0 for what is no number: "[N/A]", on some devices."""
    digits = text.split(" ")[0]
    return int(digits) if digits.isdigit() else 0


def _query(query: str) -> list[list[str]] | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, query, "--format=csv,noheader,nounits"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    return [[cell.strip() for cell in line.split(",")] for line in lines if line.strip()]
