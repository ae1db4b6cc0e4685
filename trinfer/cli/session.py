"""One run from the command line: signals, progress, summary and exit code, for ``run``, ``batch`` and ``retry``.

Stopping comes in three steps: no more rows are begun; after --drain-timeout, what is still under way is dropped; at a
second signal, everything is.
"""

from __future__ import annotations

import argparse
import os
import signal
from typing import TYPE_CHECKING, Any

from trinfer.cli import exit_codes
from trinfer.cli.options import at_least_one, duration, price, seconds

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import trio

    from trinfer.batch.items import Generator
    from trinfer.batch.run import BatchRun
    from trinfer.batch.stats import Prices
    from trinfer.config import InferenceConfig
    from trinfer.server.base import InferenceServer

__all__ = ["Session", "add_run_options", "prices"]


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """How much at once, what happens to rows that fail, where the run is kept, when it ends."""
    add = parser.add_argument_group("run").add_argument
    add("--run-dir", metavar="FOLDER", help="where the run is kept (default: OUTPUT.run)")
    add(
        "--durable",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="keep every finished row, so that the same command continues after a crash (default, but for pipes)",
    )
    add("--restart", action="store_true", help="throw the run directory away, and begin anew")
    add("--accept-changes", action="store_true", help="continue although prompt, model or parameters have changed")
    add("--repair", action="store_true", help="take damaged parts out of the journal; what was in them is run again")
    add("--overwrite", action="store_true", help="replace an output that exists")
    add("--ordered", action="store_true", help="write the rows in the order of the input")
    add("--max-concurrent", type=at_least_one, default=256, metavar="N", help="requests at once (default: %(default)s)")
    add(
        "--on-error",
        choices=("fail", "skip", "retry"),
        default="skip",
        help="when a row fails: stop, go on, or try again before going on (default: %(default)s)",
    )
    add("--max-failures", metavar="N|P%", help="stop when more rows fail: a number, or a share such as 1%%")
    add("--time-limit", type=duration, metavar="TIME", help="stop in time: seconds, or [DAYS-][HOURS:]MINUTES:SECONDS")
    add(
        "--drain-timeout",
        type=seconds,
        default=20.0,
        metavar="SECONDS",
        help="how long a run that is stopped may take for what is under way (default: %(default)g)",
    )
    add("--price-in", type=price, default=0.0, metavar="PRICE", help="of a million prompt tokens")
    add("--price-out", type=price, default=0.0, metavar="PRICE", help="of a million generated tokens")
    add("--gpu-price", type=price, default=0.0, metavar="PRICE", help="of one GPU for an hour")
    add("--no-progress", action="store_true", help="show no progress")
    add("-q", "--quiet", action="store_true", help="show neither progress nor summary")


def prices(arguments: argparse.Namespace) -> Prices:
    """What the options say."""
    from trinfer.batch.stats import Prices

    gpus = arguments.tp * arguments.pp * arguments.dp
    return Prices(arguments.price_in, arguments.price_out, arguments.gpu_price, gpus)


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


class Session:
    """Engine, rows and signals together."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        config: InferenceConfig,
        batch: BatchRun,
        total_bytes: int | None,
        adapt: Callable[[InferenceServer], Generator] | None = None,
    ) -> None:
        self._arguments, self._config, self._batch, self._adapt = arguments, config, batch, adapt
        self._total_bytes = total_bytes
        self._signal: int | None = None

    def execute(self) -> int:
        """Run; returns the exit code.

        Raises:
            TrinferError: what `trinfer.cli.main` turns into a message.
        """
        import trio

        return trio.run(self._run, restrict_keyboard_interrupt_to_checkpoints=True)

    async def _run(self) -> int:
        import trio

        from trinfer.errors import TrinferError

        batch, summary = self._batch, self._batch.summary
        failure: TrinferError | None = None
        self._stopping = trio.Event()
        began = trio.current_time()
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            numbers.append(signal.SIGHUP)
        with trio.open_signal_receiver(*numbers) as signals:
            async with trio.open_nursery() as nursery:
                work = trio.CancelScope()
                nursery.start_soon(self._hear, signals, work)
                nursery.start_soon(self._watch_time, work)
                with work:
                    try:
                        await self._generate(batch)
                    except TrinferError as error:
                        failure = error
                nursery.cancel_scope.cancel()
        # Publishing is not broken off: a signal that comes so late changes nothing.
        is_complete = failure is None and summary.is_complete and (batch.is_published or not work.cancelled_caught)
        self._tell(trio.current_time() - began, is_complete=is_complete, failed=failure is not None)
        if failure is not None:
            raise failure
        if not is_complete:
            return exit_codes.INTERRUPTED if self._signal == signal.SIGINT else exit_codes.REQUEUE
        failed = batch.published.failed if batch.published is not None else summary.failed
        return exit_codes.ROWS_FAILED if failed else exit_codes.OK

    def _tell(self, took: float, *, is_complete: bool, failed: bool) -> None:
        from trinfer.observe.progress import describe, say

        batch, summary = self._batch, self._batch.summary
        if not self._arguments.quiet and (not failed or summary.done):
            cost = prices(self._arguments).cost(summary.prompt_tokens, summary.completion_tokens, took)
            say(describe(summary, took, cost))
        if batch.directory is not None:
            if batch.directory.mended:
                say(f"{batch.directory.mended} damaged parts were taken out of the journal; their rows were run again")
            if not is_complete and batch.directory.has_begun:
                say(f"the run is not complete: run the same command again to continue it ({batch.directory.path})")
            elif batch.published is not None and batch.published.failed:
                say(
                    f"{batch.published.failed} rows failed: see {batch.directory.errors_file}; "
                    f"`trinfer retry {batch.directory.path}` runs them again"
                )
        elif not is_complete and batch.unfinished is not None and _has_content(batch.unfinished):
            say(f"the run is not complete; its rows so far are in {batch.unfinished}")

    async def _generate(self, batch: BatchRun) -> None:
        from trinfer.engines.create import create_server
        from trinfer.observe.progress import show_progress

        wanted = not (self._arguments.no_progress or self._arguments.quiet)
        with show_progress(self._total_bytes, wanted=wanted) as progress:
            await batch.run(
                lambda: create_server(self._config), stop=self._stopping, progress=progress, adapt=self._adapt
            )

    async def _hear(self, signals: Any, work: trio.CancelScope) -> None:  # noqa: ANN401  # trio's receiver type is private
        async for number in signals:
            if self._signal is not None:
                # The second time means now. The engine's guard sees that its owner has gone, and cleans up.
                os._exit(128 + number)
            self._signal = number
            self._stop(f"{signal.Signals(number).name}: stopping; once more stops at once", work)

    async def _watch_time(self, work: trio.CancelScope) -> None:
        import trio

        if self._arguments.time_limit is not None:
            await trio.sleep(self._arguments.time_limit)
            self._stop("the time limit is reached: stopping", work)

    def _stop(self, message: str, work: trio.CancelScope) -> None:
        import trio

        from trinfer.observe.progress import say

        say(f"\n{message}")
        self._stopping.set()
        # An engine that is still loading has answered nothing, and will not in time.
        server = self._batch.server
        is_ready = server is not None and server.state.value in {"ready", "restarting"}
        is_over = self._batch.summary.is_complete and server is not None
        work.deadline = trio.current_time() + (self._arguments.drain_timeout if is_ready or is_over else 0.0)
