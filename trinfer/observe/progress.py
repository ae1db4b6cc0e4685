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

    from trinfer.batch.runner import Summary

__all__ = ["LineProgress", "SilentProgress", "describe", "show_progress"]

LINE_EVERY = 5.0  # seconds
BAR_EVERY = 0.1  # seconds


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
            print(_line(summary, self._total, now - self._began), file=sys.stderr, flush=True)


class BarProgress:
    """A bar by rich."""

    def __init__(self, total_bytes: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[counts]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            refresh_per_second=5,
            auto_refresh=False,  # no thread beside the trio loop
        )
        self._task = self._bar.add_task("engine: starting", total=total_bytes, counts="")
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
        self._bar.update(
            self._task,
            description=_doing(summary),
            completed=summary.bytes_read,
            counts=_counts(summary, now - self._began),
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
    return "generating" if summary.engine.startswith("ready") else f"engine: {summary.engine}"


def _counts(summary: Summary, seconds: float) -> str:
    rate = summary.done / seconds if seconds > 0 else 0
    tokens = summary.completion_tokens / seconds if seconds > 0 else 0
    text = f"{summary.done} rows  {rate:.1f} rows/s  {tokens:.0f} tokens/s  {summary.in_flight} in flight"
    return text + (f"  {summary.failed} failed" if summary.failed else "")


def _line(summary: Summary, total: int | None, seconds: float) -> str:
    text = _counts(summary, seconds)
    if not summary.engine.startswith("ready"):
        text = f"{_doing(summary)}, {seconds:.0f} s  {text}"
    if total and summary.bytes_read:
        left = seconds * (total - summary.bytes_read) / summary.bytes_read
        text = f"{100 * summary.bytes_read / total:3.0f} %  {text}  {_time(left)} left"
    return text


def _time(seconds: float) -> str:
    minutes, rest = divmod(int(max(0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def describe(summary: Summary, seconds: float) -> str:
    """The run in a few lines."""
    per_second = summary.completion_tokens / seconds if seconds > 0 else 0.0
    lines = [f"{summary.done} rows in {seconds:.1f} s: {summary.ok} ok, {summary.failed} failed"]
    if summary.ready_after is not None:
        lines[0] += f" (engine ready after {summary.ready_after:.1f} s)"
    lines.append(
        f"tokens: {summary.prompt_tokens} in, {summary.completion_tokens} out, {per_second:.0f} out per second"
    )
    if summary.finish_reasons:
        reasons = ", ".join(f"{reason} {count}" for reason, count in summary.finish_reasons.most_common())
        lines.append(f"finished by: {reasons}")
    lines += [
        f"failed: {kind} {count}, first: {' '.join(first.split())[:300]}"
        for kind, (count, first) in sorted(summary.failures.items())
    ]
    return "\n".join(lines)
