"""Progress of a batch run: a bar on a terminal, plain lines elsewhere, and a summary at the end.

Everything goes to standard error: standard output is for data.
"""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from trinfer.batch.summary import Summary

__all__ = ["LineProgress", "SilentProgress", "describe", "say", "show_progress"]

LINE_EVERY = 5.0  # seconds
BAR_EVERY = 0.1  # seconds
OWN_WORK = {"reading the journal", "publishing"}


def say(text: str) -> None:
    """A line for people, on standard error. A terminal that has gone, or a full disk behind it, ends no run."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


class SilentProgress:
    """Shows nothing."""

    def update(self, summary: Summary) -> None: ...


class LineProgress:
    """A line every few seconds, for logs."""

    def __init__(self, total_bytes: int | None) -> None:
        self._total = total_bytes
        self._began = time.monotonic()
        self._next = self._began + LINE_EVERY

    def update(self, summary: Summary) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + LINE_EVERY
            say(_line(summary, self._total, now - self._began))


class BarProgress:
    """A bar by rich, and a line of counts below it: on one line, a terminal of 80 columns would cut both."""

    def __init__(self, total_bytes: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
        from rich.text import Text

        class Bar(Progress):
            counts = ""

            def get_renderables(self) -> Iterator[RenderableType]:
                yield self.make_tasks_table(self.tasks)
                yield Text(self.counts)

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}"),
            console=Console(stderr=True),
            transient=True,
            refresh_per_second=5,
            auto_refresh=False,  # no thread beside the trio loop
        )
        self._task = self._bar.add_task("engine: starting", total=total_bytes, left="")
        self._total = total_bytes
        self._began = time.monotonic()
        self._next = 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        self._bar.refresh()
        return self

    def __exit__(self, *_error: object) -> None:
        self._bar.stop()

    def update(self, summary: Summary) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + BAR_EVERY
        with contextlib.suppress(OSError):
            seconds = now - self._began
            left = _left(summary, self._total, seconds)
            self._bar.counts = _counts(summary, seconds)
            self._bar.update(
                self._task,
                description=_doing(summary),
                completed=summary.bytes_read,
                left="" if left is None else f"{left[0]} rows, {_time(left[1])} left",
            )
            self._bar.refresh()


@contextlib.contextmanager
def show_progress(total_bytes: int | None, *, wanted: bool) -> Iterator[SilentProgress | LineProgress | BarProgress]:
    """The kind of progress that fits where standard error goes to."""
    if not wanted:
        yield SilentProgress()
    elif sys.stderr.isatty():
        with BarProgress(total_bytes) as bar:
            yield bar
    else:
        yield LineProgress(total_bytes)


def _doing(summary: Summary) -> str:
    if summary.engine.startswith("ready"):
        return "generating"
    return summary.engine if summary.engine in OWN_WORK else f"engine: {summary.engine}"


def _counts(summary: Summary, seconds: float) -> str:
    per = 1 / seconds if seconds > 0 else 0.0
    text = (
        f"{summary.skipped + summary.done} rows  {summary.done * per:.1f} rows/s  "
        f"{summary.prompt_tokens * per:.0f} in, {summary.completion_tokens * per:.0f} out tokens/s  "
        f"{summary.in_flight} in flight"
    )
    for count, name in (
        (summary.failed, "failed"),
        (summary.skipped, "done before"),
        (summary.cache_hits, "answers used again"),
        (summary.restarts, "restarts"),
    ):
        if count:
            text += f"  {count} {name}"
    return text


def _line(summary: Summary, total: int | None, seconds: float) -> str:
    text = _counts(summary, seconds)
    if not summary.engine.startswith("ready"):
        text = f"{_doing(summary)}, {seconds:.0f} s  {text}"
    left = _left(summary, total, seconds)
    if total and left is not None:
        text = f"{100 * summary.bytes_read / total:3.0f} %  {text}  {left[0]} rows, {_time(left[1])} left"
    return text


def _left(summary: Summary, total: int | None, seconds: float) -> tuple[int, float] | None:
    """Rows and seconds that are left, by the bytes of the input; None where nothing is known yet."""
    if not total or not summary.bytes_read:
        return None
    rows = (summary.skipped + summary.done) * max(0, total - summary.bytes_read) / summary.bytes_read
    # What was done before took none of this session's time; nor did the start of the engine, as far as rows are due.
    working = max(0.0, seconds - (summary.ready_after or 0.0))
    return round(rows), rows * working / summary.done if summary.done else 0.0


def _time(seconds: float) -> str:
    minutes, rest = divmod(int(max(0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def describe(summary: Summary, seconds: float, cost: float | None = None) -> str:
    """The session in a few lines."""
    per_second = summary.completion_tokens / seconds if seconds > 0 else 0.0
    lines = [f"{summary.done} rows in {seconds:.1f} s: {summary.ok} ok, {summary.failed} failed"]
    if summary.removed:
        lines[0] += f", {summary.removed} without results"
    if summary.skipped:
        lines[0] += f"; {summary.skipped} were done before"
    if summary.ready_after is not None:
        lines[0] += f" (engine ready after {summary.ready_after:.1f} s)"
    lines.append(
        f"tokens: {summary.prompt_tokens} in, {summary.completion_tokens} out, {per_second:.0f} out per second"
    )
    if cost is not None:
        lines[-1] += f"; cost: {cost:.4f}"
    if summary.latency.total:
        shown = ((name, summary.latency.percentile(percent)) for name, percent in (("p50", 50), ("p99", 99)))
        lines.append("latency: " + ", ".join(f"{name} {value:.3g} s" for name, value in shown if value is not None))
    if summary.cache_hits:
        lines.append(f"answers used again: {summary.cache_hits}")
    if summary.finish_reasons:
        reasons = ", ".join(f"{reason} {count}" for reason, count in summary.finish_reasons.most_common())
        lines.append(f"finished by: {reasons}")
    lines += [
        f"failed: {kind} {count}, first: {' '.join(first.split())[:300]}"
        for kind, (count, first) in sorted(summary.failures.items())
    ]
    return "\n".join(lines)
