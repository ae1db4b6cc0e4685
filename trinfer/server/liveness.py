"""Whether an engine that serves gets anywhere: from progress, not from probes.

Engines say "healthy" for hours while no token moves, and fall silent on probes while they work hard. So:

- With requests under way, only progress counts: an answer or a piece of one, or a counter in ``/metrics`` that moves.
  An engine without counters is believed to work as long as its processes use CPU; one that spins without getting
  anywhere is not found out.
- An engine that answers with nothing but errors of its own (5xx) for as long gets nowhere, either.
- Without requests, a cheap probe is sent now and then, one at a time, and three failures in a row are an end. A request
  for one token is sent to an idle engine only if the user wants that.

`Judge` is pure, so that the stories of other people's engines can be told to it as tables.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

__all__ = ["Judge", "Signs", "Verdict", "progress_counters"]

PROBE_FAILURES = 3  # in a row
REFUSALS = 10  # answers with an error, below which nothing is said of an engine
WORKING_CPU = 0.05  # CPU seconds per second, of all processes of the engine, above which it is working

# Names end so in the engines' metrics: vLLM, SGLang and llama.cpp put their own prefixes before them.
_COUNTER = re.compile(
    rb"^\w+[:_](?:generation_tokens_total|prompt_tokens_total|request_success_total|num_requests_total"
    rb"|iteration_tokens_total_sum|tokens_predicted_total|n_decode_total)(?:\{[^}]*\})? +(\S+)",
    re.MULTILINE,
)


def progress_counters(page: bytes) -> float | None:
    """Sum of the counters in a Prometheus page that grow while an engine works; None where there are none.

    Sources: vLLM docs/design/metrics; SGLang references/production_metrics; llama.cpp tools/server/README.
    """
    total: float | None = None
    for match in _COUNTER.finditer(page):
        try:
            total = (total or 0.0) + float(match[1])
        except ValueError:
            continue
    return total


class Verdict(enum.Enum):
    """What is to be thought of an engine."""

    IDLE = "idle"
    BUSY = "busy"  # requests under way, and progress
    SILENT = "silent"  # requests under way, and no progress for a while: a long prefill, or the beginning of an end
    WEDGED = "wedged"  # … for too long
    USELESS = "useless"  # answers come, and for too long they have all been errors of the engine
    UNHEALTHY = "unhealthy"  # idle, and probes fail


@dataclass(frozen=True)
class Signs:
    """What was seen at one moment.

    Attributes:
        at: seconds of a steady clock.
        in_flight: requests under way.
        received: answers and pieces of answers so far.
        refused: those of them that are errors of the engine.
        counters: the engine's own, or None where they could not be read this time.
        has_counters: they could be read once: not reading them is then no excuse.
        cpu: CPU seconds of its processes so far, or None.
        probe: how the last probe since the moment before went; None for no probe.
    """

    at: float
    in_flight: int
    received: int
    counters: float | None = None
    has_counters: bool = False
    cpu: float | None = None
    probe: bool | None = None
    refused: int = 0


class Judge:
    """Sees `Signs`, one after the other.

    Attributes:
        silence: seconds that requests have been under way without progress; idle time does not count.
        refusals: answers that were errors since the last good one.
    """

    def __init__(self, stall_timeout: float | None) -> None:
        self._limit = stall_timeout
        self._last: Signs | None = None
        self._counters: float | None = None
        self._cpu: tuple[float, float] | None = None  # the last that was seen, and when
        self._failures = 0
        self._refusing_since = 0.0  # when the first error came after the last good answer
        self.silence = 0.0
        self.refusals = 0

    def see(self, signs: Signs) -> Verdict:
        """The verdict after one more moment."""
        last, self._last = self._last, signs
        moved = last is None or self._has_moved(last, signs)
        if signs.counters is not None:
            self._counters = signs.counters
        if signs.cpu is not None:
            self._cpu = (signs.at, signs.cpu)
        if self._is_useless(last, signs):
            return Verdict.USELESS
        if moved:
            self.silence = 0.0
        elif last is not None and last.in_flight and signs.in_flight:
            self.silence += signs.at - last.at
        if not signs.in_flight:
            return self._judge_idle(signs)
        self._failures = 0
        if self._limit is not None and self.silence >= self._limit:
            return Verdict.WEDGED
        return Verdict.SILENT if self.silence else Verdict.BUSY

    def _has_moved(self, last: Signs, signs: Signs) -> bool:
        if signs.received != last.received:
            return True
        if signs.counters is not None and self._counters is not None:
            return signs.counters != self._counters
        if signs.has_counters or signs.cpu is None or self._cpu is None:
            return False
        before, cpu = self._cpu
        return signs.at > before and (signs.cpu - cpu) / (signs.at - before) > WORKING_CPU

    def _is_useless(self, last: Signs | None, signs: Signs) -> bool:
        if last is None:
            return False
        errors = signs.refused - last.refused
        if signs.received - last.received > errors:
            self.refusals = 0
        elif errors:
            if not self.refusals:
                self._refusing_since = signs.at
            self.refusals += errors
            if self._limit is not None and self.refusals >= REFUSALS:
                return signs.at - self._refusing_since >= self._limit
        return False

    def _judge_idle(self, signs: Signs) -> Verdict:
        if signs.probe is not None:
            self._failures = 0 if signs.probe else self._failures + 1
        return Verdict.UNHEALTHY if self._failures >= PROBE_FAILURES else Verdict.IDLE
