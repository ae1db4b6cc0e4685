"""How often an engine is started again, and when. Pure: no clock, no sleep.

Rule: a supervisor in the sense of Erlang/OTP: at most R restarts in T seconds, then failed for good. A loop of restarts
without a brake does more harm than an engine that is down (GPUs that need a reset).
"""

from __future__ import annotations

import random
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trinfer.config import InferenceConfig

__all__ = ["RestartBudget"]

# A GPU's memory, or whatever else was short, takes its time to come free.
RESOURCE_PAUSE = 10.0  # seconds


class RestartBudget:
    """The restarts of one life of a server."""

    def __init__(self, config: InferenceConfig) -> None:
        self._most = config.max_restarts
        self._window = config.restart_window
        self._first, self._longest = config.restart_backoff_sec, config.restart_backoff_max_sec
        self._restarts: deque[float] = deque()
        self.total = 0

    def take(self, now: float) -> bool:
        """One more restart at ``now`` (seconds of any steady clock); False if the budget does not allow it."""
        while self._restarts and self._restarts[0] <= now - self._window:
            self._restarts.popleft()
        if len(self._restarts) >= self._most:
            return False
        self._restarts.append(now)
        self.total += 1
        return True

    def pause(self, *, short_of_resources: bool = False) -> float:
        """Seconds to wait before the restart just taken: it doubles with each in the window, with jitter.

        The first one comes without a pause when a crash may be passing; never so when something was short.
        """
        number = len(self._restarts)
        bound = min(self._longest, self._first * 2.0 ** min(max(0, number - 2), 60))
        pause = 0.0 if number <= 1 else random.uniform(bound / 2, bound)
        return max(pause, min(RESOURCE_PAUSE, self._longest)) if short_of_resources else pause

    def describe(self) -> str:
        """The rule, in words."""
        if not self._most:
            return "restarts are off (max_restarts=0)"
        return f"{len(self._restarts)} restarts within {self._window:g} s, the most that max_restarts allows"
