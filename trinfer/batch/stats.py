"""The figures of a run, over all of its sessions: ``stats.json``, and what the report and the summary are made of."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trinfer.batch.summary import Histogram, Summary

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Prices", "Session", "statistics", "total"]

POINTS = 400  # of a session's timeline; when there are more, every second one goes
MILLION = 1_000_000


@dataclass(frozen=True)
class Prices:
    """What things cost, in any currency.

    Attributes:
        tokens_in, tokens_out: of a million tokens.
        gpu_hour: of one GPU for an hour.
        gpus: how many the engine uses.
    """

    tokens_in: float = 0.0
    tokens_out: float = 0.0
    gpu_hour: float = 0.0
    gpus: int = 1

    def cost(self, prompt_tokens: int, completion_tokens: int, seconds: float) -> float | None:
        """Of a run; None where no price is known."""
        if not (self.tokens_in or self.tokens_out or self.gpu_hour):
            return None
        tokens = (prompt_tokens * self.tokens_in + completion_tokens * self.tokens_out) / MILLION
        return tokens + seconds / 3600 * self.gpu_hour * self.gpus


class Session:
    """The figures of one session as it goes: its summary, and how that has grown."""

    def __init__(self, summary: Summary) -> None:
        self._summary = summary
        self._began = time.time()
        self._start = time.monotonic()
        self._points: list[list[float]] = []
        self._interval = 1.0
        self._next = 0.0
        self._latency_before = Histogram()

    def sample(self) -> None:
        """Look at the summary; called about once in a second."""
        now = time.monotonic() - self._start
        if now < self._next:
            return
        self._next = now + self._interval
        summary = self._summary
        latency = summary.latency - self._latency_before
        self._latency_before = Histogram(summary.latency.counts)
        percentiles = [round(latency.percentile(percent) or 0.0, 4) for percent in (50, 99)]
        tokens = summary.prompt_tokens + summary.completion_tokens
        self._points.append([round(now, 1), summary.done, tokens, summary.in_flight, *percentiles, summary.failed])
        if len(self._points) > POINTS:
            del self._points[::2]
            self._interval *= 2

    def to_json(self) -> dict[str, Any]:
        """As it is kept."""
        return {
            "began": self._began,
            "seconds": round(time.monotonic() - self._start, 3),
            "summary": self._summary.to_json(),
            "timeline": list(self._points),
        }


def total(sessions: Sequence[Mapping[str, Any]]) -> Summary:
    """The sessions' figures together."""
    summary = Summary()
    for session in sessions:
        summary.add_json(session["summary"])
    return summary


def statistics(sessions: Sequence[Mapping[str, Any]], prices: Prices, published: Mapping[str, int]) -> dict[str, Any]:
    """What ``stats.json`` holds.

    Args:
        published: rows, failed and removed of the output.
    """
    summary = total(sessions)
    seconds = sum(session["seconds"] for session in sessions)
    percentiles = {
        name: {f"p{percent:g}": histogram.percentile(percent) for percent in (50, 90, 99, 99.9)}
        for name, histogram in (
            ("latency_seconds", summary.latency),
            ("prompt_tokens", summary.prompt_lengths),
            ("completion_tokens", summary.completion_lengths),
        )
    }
    return {
        "output": dict(published),
        "sessions": len(sessions),
        "seconds": round(seconds, 3),
        "rows_per_second": summary.done / seconds if seconds else 0.0,
        "requests": summary.requests,
        "cache_hits": summary.cache_hits,
        "prompt_tokens": summary.prompt_tokens,
        "completion_tokens": summary.completion_tokens,
        "tokens_out_per_second": summary.completion_tokens / seconds if seconds else 0.0,
        "finish_reasons": dict(summary.finish_reasons.most_common()),
        "failures": {kind: {"count": count, "first": first} for kind, (count, first) in summary.failures.items()},
        "engine_restarts": summary.restarts,
        "percentiles": percentiles,
        "cost": prices.cost(summary.prompt_tokens, summary.completion_tokens, seconds),
    }
