"""What becomes of rows that fail, and when there are too many of them."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, Self, get_args

from trinfer.data.records import InvalidRow
from trinfer.errors import (
    AuthenticationError,
    BadRequestError,
    ConfigError,
    NotFoundError,
    RunStopped,
    StructuredOutputError,
    TrinferError,
)

if TYPE_CHECKING:
    from trinfer.batch.summary import Summary

__all__ = ["ErrorPolicy", "FailureBudget", "OnError"]

OnError = Literal["fail", "skip", "retry"]
SAMPLE = 100  # rows before a share says anything
# The same request would fail in the same way. Everything else may be the moment's fault.
FINAL = (BadRequestError, AuthenticationError, NotFoundError, InvalidRow, StructuredOutputError)


@dataclass(frozen=True)
class FailureBudget:
    """How many rows may fail: a number, or a share of those that are done.

    Attributes:
        count: rows; None for a share.
        share: between 0 and 1; None for a number. It is looked at from 100 rows on, and at the end.
    """

    count: int | None = None
    share: float | Fraction | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """``100`` or ``1%``.

        Raises:
            ConfigError: it is neither.
        """
        try:
            if text.endswith("%"):
                share = Fraction(text[:-1]) / 100  # 29% of 100 rows are 29, and not a little less
                if 0 <= share <= 1:
                    return cls(share=share)
            elif int(text) >= 0:
                return cls(count=int(text))
        except (ValueError, ZeroDivisionError):
            pass
        raise ConfigError(f"--max-failures {text!r}: allowed are a number of rows >= 0, or a share such as 1%")

    def is_exceeded(self, failed: int, done: int, *, at_end: bool = False) -> bool:
        if self.count is not None:
            return failed > self.count
        if self.share is None or not failed:
            return False
        return (done >= SAMPLE or at_end) and failed > self.share * done

    def __str__(self) -> str:
        return f"{self.count} rows" if self.count is not None else f"{float(100 * (self.share or 0)):g}%"


@dataclass(frozen=True)
class ErrorPolicy:
    """What to do with a row that fails.

    Attributes:
        on_error: "fail" ends the run with the first; "skip" notes the error and goes on; "retry" tries again first.
        retries: how often, with "retry"; errors that would come again are not tried again.
        budget: how many may fail before the run is stopped; None for any number.
    """

    on_error: OnError = "skip"
    retries: int = 3
    budget: FailureBudget | None = None

    def __post_init__(self) -> None:
        if self.on_error not in get_args(OnError):
            raise ConfigError(f"on_error={self.on_error!r}: allowed are {', '.join(get_args(OnError))}")
        if self.retries < 0:
            raise ConfigError(f"retries={self.retries}: allowed are integers >= 0")

    @classmethod
    def of(cls, on_error: str | Self, max_failures: str | None = None) -> Self:
        """A policy from its options' texts. Raises ConfigError."""
        if isinstance(on_error, cls):
            return on_error
        budget = None if max_failures is None else FailureBudget.parse(str(max_failures))
        return cls(on_error, budget=budget)  # type: ignore[arg-type]  # checked at construction

    def tries_again(self, error: TrinferError, attempt: int) -> bool:
        """Whether a row that has failed for the ``attempt``-th time is tried once more."""
        return self.on_error == "retry" and attempt <= self.retries and not isinstance(error, FINAL)

    @staticmethod
    def pause(attempt: int) -> float:
        """Seconds before the next try: on top of what each request has waited for already."""
        return min(30.0, 1.0 * 2.0 ** (attempt - 1))

    def check(self, summary: Summary, *, at_end: bool = False) -> None:
        """Look at the budget of the whole run: what earlier sessions have done counts.

        Raises:
            RunStopped: more rows have failed than may.
        """
        failed, done = summary.failed + summary.failed_before, summary.done + summary.skipped
        if self.budget is None or not self.budget.is_exceeded(failed, done, at_end=at_end):
            return
        kinds = [f"{kind} {count}" for kind, (count, _) in sorted(summary.failures.items())]
        if summary.failed_before:
            kinds.append(f"{summary.failed_before} before")
        first = next((first for _, first in summary.failures.values()), None)
        raise RunStopped(
            f"{failed} of {done} rows have failed, and {self.budget} may: {', '.join(kinds)}",
            cause=None if first is None else f"the first was: {' '.join(first.split())[:300]}",
            advice="mend the cause (errors.jsonl in the run directory lists them all), and run `trinfer retry` with "
            "the run directory; or raise --max-failures",
        )
