"""The memory of GPUs after an engine has ended: the driver takes a while, a process in state D keeps it, and somebody
else may hold so much that there is not enough.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import trio

from trinfer.process import threads
from trinfer.process.gpus import gpu_users, has_nvidia_smi, large_users

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from trinfer.process.gpus import GpuUser

__all__ = ["RELEASE_WAIT", "describe_holders", "strangers", "until_released", "until_strangers_leave"]

RELEASE_WAIT = 30.0  # seconds
LOOK = 10.0  # seconds for one look, which takes some at most where nvidia-smi can be killed
LOOKS = 0.5  # seconds between two looks; nvidia-smi takes some tenths itself


async def until_released(pids: Collection[int]) -> list[GpuUser]:
    """Wait until none of the processes holds GPU memory, but not for ever; returns those that still do.

    Returns at once where there is no nvidia-smi. Cancelled: a look that is under way is abandoned.
    """
    if not pids or not has_nvidia_smi():
        return []

    def look() -> list[GpuUser]:
        return [user for user in gpu_users() or () if user.pid in pids]

    return await _until_nobody(look)


async def strangers(visible: Collection[str], own: Collection[int]) -> list[GpuUser]:
    """Who else holds much of these GPUs' memory now; arguments as for `large_users`. Empty where nothing is known."""
    return await _look(partial(large_users, visible, own)) if has_nvidia_smi() else []


async def until_strangers_leave(visible: Collection[str], own: Collection[int]) -> list[GpuUser]:
    """Wait until nobody else holds much of these GPUs' memory, but not for ever; returns those that still do."""
    return await _until_nobody(partial(large_users, visible, own)) if has_nvidia_smi() else []


async def _until_nobody(look: Callable[[], list[GpuUser] | None]) -> list[GpuUser]:
    give_up = trio.current_time() + RELEASE_WAIT
    while True:
        found = await _look(look)
        if not found or trio.current_time() >= give_up:
            return found
        await trio.sleep(LOOKS)


async def _look(look: Callable[[], list[GpuUser] | None]) -> list[GpuUser]:
    with trio.move_on_after(LOOK):  # a driver that hangs may keep nvidia-smi even from being killed
        return await threads.run_sync(look, abandon_on_cancel=True) or []
    return []


def describe_holders(holders: Collection[GpuUser]) -> str:
    """``pid 12 (state D): 4096 MiB``, and so on."""
    return ", ".join(f"pid {holder.pid} (state {_state(holder.pid)}): {holder.used} MiB" for holder in holders)


def _state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2].split()[0].decode()
    except (OSError, IndexError):
        return "gone"
