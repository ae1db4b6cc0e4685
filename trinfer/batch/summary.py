"""How far a run is, and in the end what it was: counted as it goes, and added up over its sessions."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trinfer.errors import TrinferError
    from trinfer.results import InferenceResult

__all__ = ["Histogram", "Summary"]

PER_OCTAVE = 8  # buckets; each is 9 % wider than the one before
ZERO = -1000  # the bucket of 0


def bucket_of(value: float) -> int:
    return math.floor(math.log2(value) * PER_OCTAVE) if value > 0 else ZERO


BUCKETS = [bucket_of(number) for number in range(4096)]  # of numbers of tokens, which are counted for each request


class Histogram:
    """Counts of positive numbers, in buckets that grow with them: percentiles of millions, within 5 %."""

    def __init__(self, counts: Mapping[int, int] | None = None) -> None:
        self.counts: Counter[int] = Counter(counts or {})

    def add(self, value: float) -> None:
        self.counts[bucket_of(value)] += 1

    def add_count(self, value: int) -> None:
        """The same for an integer, sooner."""
        self.counts[BUCKETS[value] if 0 <= value < len(BUCKETS) else bucket_of(value)] += 1

    def __sub__(self, before: Histogram) -> Histogram:
        """What has come since."""
        return Histogram(self.counts - before.counts)

    @property
    def total(self) -> int:
        return self.counts.total()

    def percentile(self, percent: float) -> float | None:
        """The value below which so many percent lie; None without any."""
        left = self.total * percent / 100
        for bucket in sorted(self.counts):
            left -= self.counts[bucket]
            if left <= 0:
                return self.middle(bucket)
        return None

    @staticmethod
    def middle(bucket: int) -> float:
        return 0.0 if bucket == ZERO else float(2 ** ((bucket + 0.5) / PER_OCTAVE))

    def bars(self) -> Iterator[tuple[float, int]]:
        """Middle and count of each bucket, from the first to the last that has any."""
        buckets = [bucket for bucket in self.counts if bucket != ZERO]
        for bucket in range(min(buckets, default=0), max(buckets, default=-1) + 1):
            yield self.middle(bucket), self.counts[bucket]


@dataclass
class Summary:
    """How far a run is.

    Attributes:
        ok, failed, removed: rows with an answer, with an error, and those whose rollouts all gave None.
        skipped: rows that an earlier session had done; failed_before: those of them that failed.
        bytes_read: of the input, by rows that are done.
        requests, cache_hits: generations asked for, and those that an earlier session had paid for.
        prompt_tokens, completion_tokens: as the server counted them.
        in_flight: requests under way.
        finish_reasons: how often each occurred.
        failures: per type of error, how often, and the message of the first.
        latency: seconds of each request.
        prompt_lengths, completion_lengths: tokens of each request.
        ready_after: seconds from the start of the run until the engine was ready; None before.
        began: seconds of trio's clock.
        engine: what the engine is doing, in a word or two.
        restarts: of the engine.
        is_complete: every row of the input has its outcome.
    """

    began: float = 0.0
    ready_after: float | None = None
    ok: int = 0
    failed: int = 0
    removed: int = 0
    skipped: int = 0
    failed_before: int = 0
    bytes_read: int = 0
    requests: int = 0
    cache_hits: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    in_flight: int = 0
    engine: str = "starting"
    restarts: int = 0
    is_complete: bool = False
    finish_reasons: Counter[str] = field(default_factory=Counter)
    failures: dict[str, tuple[int, str]] = field(default_factory=dict)
    latency: Histogram = field(default_factory=Histogram)
    prompt_lengths: Histogram = field(default_factory=Histogram)
    completion_lengths: Histogram = field(default_factory=Histogram)

    @property
    def done(self) -> int:
        return self.ok + self.failed + self.removed

    def add_request(self, result: InferenceResult, seconds: float) -> None:
        """One generation has been answered."""
        prompt, completion = result.prompt_tokens, result.completion_tokens
        self.requests += 1
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        self.finish_reasons[result.finish_reason or "none"] += 1
        self.latency.add(seconds)
        self.prompt_lengths.add_count(prompt)
        self.completion_lengths.add_count(completion)

    def add_failure(self, size: int, error: TrinferError) -> None:
        """One row has failed for good."""
        self.failed += 1
        self.bytes_read += size
        kind = type(error).__name__
        count, first = self.failures.get(kind, (0, error.message))
        self.failures[kind] = (count + 1, first)

    COUNTS = (
        "ok",
        "failed",
        "removed",
        "requests",
        "cache_hits",
        "prompt_tokens",
        "completion_tokens",
        "restarts",
    )

    def to_json(self) -> dict[str, Any]:
        """What adds up over sessions, as JSON takes it."""
        value: dict[str, Any] = {name: getattr(self, name) for name in self.COUNTS}
        value["finish_reasons"] = dict(self.finish_reasons)
        value["failures"] = {kind: list(each) for kind, each in self.failures.items()}
        for name in ("latency", "prompt_lengths", "completion_lengths"):
            value[name] = {str(bucket): count for bucket, count in sorted(getattr(self, name).counts.items())}
        return value

    def add_json(self, value: Mapping[str, Any]) -> Self:
        """Add a session's figures."""
        for name in self.COUNTS:
            setattr(self, name, getattr(self, name) + value[name])
        self.finish_reasons.update(value["finish_reasons"])
        for kind, (count, first) in value["failures"].items():
            before, message = self.failures.get(kind, (0, first))
            self.failures[kind] = (before + count, message)
        for name in ("latency", "prompt_lengths", "completion_lengths"):
            getattr(self, name).counts.update({int(bucket): count for bucket, count in value[name].items()})
        return self
