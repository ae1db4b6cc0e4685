"""What nvidia-smi says about GPUs and who holds their memory. Where it is not installed, nothing is known.

Source: ``nvidia-smi --help-query-gpu``, ``--help-query-compute-apps``. In a container, it gives pids of the host, which
mean nothing inside.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["Gpu", "GpuUser", "gpu_count", "gpu_users", "gpus", "has_nvidia_smi", "large_users"]

TIMEOUT = 5.0  # seconds; a hung driver hangs nvidia-smi
LARGE_SHARE = 0.1  # of a GPU's memory
KILLED = 1.0  # seconds that it may take to die then


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


def large_users(visible: Collection[str], own: Collection[int]) -> list[GpuUser] | None:
    """Processes other than ``own`` that hold a tenth or more of a GPU's memory; None where nothing is known. Blocks.

    Args:
        visible: indices or uuids of the GPUs in question; empty for all.
    """
    devices = gpus()
    users = gpu_users()
    if devices is None or users is None:
        return None
    least = {
        gpu.uuid: gpu.total * LARGE_SHARE
        for gpu in devices
        if not visible or str(gpu.index) in visible or gpu.uuid in visible
    }
    return [user for user in users if user.pid not in own and user.used >= least.get(user.uuid, math.inf)]


def _number(text: str) -> int:
    """0 for what is no number: "[N/A]", on some devices."""
    digits = text.split(" ")[0]
    return int(digits) if digits.isdigit() else 0


def _query(query: str) -> list[list[str]] | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        smi = subprocess.Popen(
            [program, query, "--format=csv,noheader,nounits"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return None
    assert smi.stdout is not None
    with smi.stdout:
        try:
            out = smi.communicate(timeout=TIMEOUT)[0]
        except subprocess.TimeoutExpired:
            # Not subprocess.run, which waits for the corpse: there is none while the driver holds it in state D.
            smi.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                smi.wait(KILLED)
            return None
    if smi.returncode:
        return None
    lines = out.decode("utf-8", "replace").splitlines()
    return [[cell.strip() for cell in line.split(",")] for line in lines if line.strip()]
