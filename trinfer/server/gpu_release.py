"""The memory of GPUs after an engine has ended: the driver takes a while, and a process in state D keeps it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from trinfer.process.gpus import gpu_users, has_nvidia_smi

if TYPE_CHECKING:
    from collections.abc import Collection

    from trinfer.process.gpus import GpuUser

__all__ = ["RELEASE_WAIT", "describe_holders", "until_released"]

RELEASE_WAIT = 30.0  # seconds
LOOKS = 0.5  # seconds between two looks; nvidia-smi takes some tenths itself


async def until_released(pids: Collection[int]) -> list[GpuUser]:
    """Wait until none of the processes holds GPU memory, but not for ever; returns those that still do.

    Returns at once where there is no nvidia-smi. Cancelled: a look that is under way is abandoned.
    """
    if not pids or not has_nvidia_smi():
        return []
    give_up = trio.current_time() + RELEASE_WAIT
    while True:
        users = await trio.to_thread.run_sync(gpu_users, abandon_on_cancel=True)
        holders = [user for user in users or () if user.pid in pids]
        if not holders or trio.current_time() >= give_up:
            return holders
        await trio.sleep(LOOKS)


def describe_holders(holders: Collection[GpuUser]) -> str:
    """``pid 12 (state D): 4096 MiB``, and so on."""
    return ", ".join(f"pid {holder.pid} (state {_state(holder.pid)}): {holder.used} MiB" for holder in holders)


def _state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2].split()[0].decode()
    except (OSError, IndexError):
        return "gone"
