"""``trinfer run``: the prompts of a JSONL file through one engine."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from typing import TYPE_CHECKING, Any

from trinfer.cli import exit_codes

if TYPE_CHECKING:
    import trio

    from trinfer.batch.files import JsonlReader, JsonlWriter
    from trinfer.batch.runner import Progress, Summary
    from trinfer.config import InferenceConfig
    from trinfer.server.base import InferenceServer

__all__ = ["add_parser", "execute"]

ENGINE_LOOKS = 0.5  # seconds between two looks at what the engine is doing
ENGINES = ("dummy", "vllm", "sglang", "llamacpp", "transformers", "custom", "endpoint")

EPILOG = f"""\
input: one JSON object per line, with `messages`, `prompt` or `text` (or --prompt-field), and an `id` if it has one.
output: the same fields, `id`, and `generation` (text, finish_reason, usage) or `error` (type, message, status), in the
order in which rows are done. Until the run is complete, the file is called OUTPUT.partial; an interrupted run keeps it.

keys come from the environment: TRINFER_API_KEY, or OPENAI_API_KEY with --engine endpoint.

{exit_codes.TABLE}"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Options of ``trinfer run``."""
    parser = commands.add_parser(
        "run",
        help="run the prompts of a JSONL file",
        description="Runs one generation for each row of a JSONL file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(execute=execute)
    add = parser.add_argument
    add("input", metavar="INPUT", help="JSONL file, or - for standard input")
    add("-o", "--output", required=True, help="JSONL file, or - for standard output")
    add("--overwrite", action="store_true", help="replace an output that exists")
    add(
        "--max-concurrent", type=_at_least_one, default=256, metavar="N", help="requests at once (default: %(default)s)"
    )
    add("--time-limit", type=_duration, metavar="TIME", help="stop in time: seconds, or [DAYS-][HOURS:]MINUTES:SECONDS")
    add(
        "--drain-timeout",
        type=_seconds,
        default=20.0,
        metavar="SECONDS",
        help="how long a run that is stopped may take for what is under way (default: %(default)g)",
    )
    add("--no-progress", action="store_true", help="show no progress")
    add("-q", "--quiet", action="store_true", help="show neither progress nor summary")

    engine = parser.add_argument_group("engine")
    add = engine.add_argument
    add("--engine", choices=ENGINES, default="dummy", help="which engine (default: %(default)s)")
    add("--model", default="", help="the model's name or path")
    add("--endpoint-url", metavar="URL", help="base URL, with --engine endpoint")
    add("--model-max-context", type=int, default=8192, metavar="TOKENS", help="(default: %(default)s)")
    for name, meaning in (("tp", "tensor"), ("pp", "pipeline"), ("dp", "data")):
        add(f"--{name}", type=int, default=1, metavar="N", help=f"{meaning} parallel size")
    add("--model-kwarg", action="append", default=[], metavar="KEY=VALUE", help="option of the engine; repeatable")
    add("--executable", metavar="PROGRAM", help="the engine's program, where it is not the one on PATH")
    add("--transport", choices=("auto", "tcp", "uds"), default="auto", help="how to reach it (default: %(default)s)")
    add("--server-log-folder", metavar="FOLDER", help="keep the engine's output here")
    add("--ready-timeout", type=float, default=1500.0, metavar="SECONDS", help="for loading (default: %(default)g)")
    add(
        "--max-restarts",
        type=int,
        default=3,
        metavar="N",
        help="start an engine that dies again, so often in ten minutes (default: %(default)s)",
    )
    add(
        "--stall-timeout",
        type=_seconds,
        default=300.0,
        metavar="SECONDS",
        help="start it again when nothing moves for so long; 0 never does (default: %(default)g)",
    )
    add("--trust-remote-code", action="store_true", help="let the engine run code that comes with the model")

    request = parser.add_argument_group("requests")
    add = request.add_argument
    add("--chat", action=argparse.BooleanOptionalAction, default=True, help="use the chat route (default)")
    add("--prompt-field", metavar="NAME", help="field of the row that holds the prompt")
    add("--system-prompt", metavar="TEXT", help="for rows without a system message")
    add(
        "--param", action="append", default=[], metavar="KEY=VALUE", help="generation parameter, such as max_tokens=100"
    )
    add(
        "--request-timeout",
        type=float,
        default=3600.0,
        metavar="SECONDS",
        help="for one request (default: %(default)g)",
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are seconds >= 0")
    return value


def _duration(text: str) -> float:
    """``90``, ``1:30``, ``2:00:00``, ``1-12:00:00``: as SLURM writes them, but a single number is seconds."""
    days, dash, rest = text.rpartition("-")
    try:
        parts = [float(part) for part in rest.split(":")]
        if len(parts) > 3 or (dash and not days.isdigit()):
            raise ValueError(text)
        seconds = sum(part * 60.0**power for power, part in enumerate(reversed(parts))) + int(days or 0) * 86400.0
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are seconds, or [DAYS-][HOURS:]MINUTES:SECONDS")
    return seconds


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small: allowed are integers >= 1")
    return value


def _pairs(option: str, texts: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` texts; values are JSON where they can be read so, else text.

    Raises:
        ConfigError: one has no key, or a key stands twice.
    """
    from trinfer.errors import ConfigError

    pairs: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ConfigError(f"{option} {text!r}: allowed is KEY=VALUE, such as max_tokens=100")
        if key in pairs:
            raise ConfigError(f"{option} {key!r} is given twice: allowed is once")
        try:
            pairs[key] = json.loads(value)
        except ValueError:
            pairs[key] = value
    return pairs


def _config(arguments: argparse.Namespace) -> InferenceConfig:
    import os

    from trinfer.config import InferenceConfig

    delay = min(5.0, arguments.ready_timeout)
    return InferenceConfig(
        server_type=arguments.engine,
        model_name_or_path=arguments.model,
        model_max_context=arguments.model_max_context,
        use_chat=arguments.chat,
        endpoint_url=arguments.endpoint_url,
        # An engine of our own is reached by nobody else, and gets a key only where the user has one for it.
        api_key=os.environ.get("TRINFER_API_KEY", "").strip() or None,
        tp=arguments.tp,
        pp=arguments.pp,
        dp=arguments.dp,
        request_timeout=arguments.request_timeout,
        model_kwargs=_pairs("--model-kwarg", arguments.model_kwarg),
        server_log_folder=arguments.server_log_folder,
        server_ready_max_attempts=max(1, round(arguments.ready_timeout / delay)) if delay > 0 else 1,
        server_ready_delay_sec=delay,
        transport=arguments.transport,
        max_restarts=arguments.max_restarts,
        stall_timeout=arguments.stall_timeout or None,
        trust_remote_code=arguments.trust_remote_code,
        executable=arguments.executable,
        multi_node=None if arguments.tp * arguments.pp * arguments.dp > 1 else False,
    )


def execute(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit code.

    Raises:
        TrinferError: what `trinfer.cli.main` turns into a message.
    """
    import trio

    from trinfer.batch.files import JsonlReader, JsonlWriter
    from trinfer.batch.rows import PromptOptions
    from trinfer.errors import ConfigError

    params = _pairs("--param", arguments.param)
    for name in ("messages", "prompt", "stream"):
        if name in params:
            raise ConfigError(f"--param {name} is set by trinfer: allowed are generation parameters")
    if arguments.system_prompt is not None and not arguments.chat:
        raise ConfigError("--system-prompt needs the chat route: allowed is one of --system-prompt and --no-chat")
    config = _config(arguments)
    reader = JsonlReader(
        arguments.input, PromptOptions(arguments.chat, arguments.prompt_field, arguments.system_prompt)
    )
    try:
        writer = JsonlWriter(arguments.output, overwrite=arguments.overwrite, source=arguments.input)
        try:
            return trio.run(
                _Job(arguments, config, params, reader, writer).run, restrict_keyboard_interrupt_to_checkpoints=True
            )
        finally:
            writer.close()
    finally:
        reader.close()


class _Job:
    """One run: server, rows and signals together.

    Stopping comes in three steps: no more rows are begun; after --drain-timeout, what is still under way is dropped; at
    a second signal, everything is.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        config: InferenceConfig,
        params: dict[str, Any],
        reader: JsonlReader,
        writer: JsonlWriter,
    ) -> None:
        self._arguments, self._config, self._params = arguments, config, params
        self._reader, self._writer = reader, writer
        self._signal: int | None = None
        self._server: InferenceServer | None = None

    async def run(self) -> int:
        import trio

        from trinfer.batch.runner import Summary
        from trinfer.errors import TrinferError
        from trinfer.observe.progress import describe

        summary = Summary(began=trio.current_time())
        failure: TrinferError | None = None
        self._stopping = trio.Event()
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGUSR1) as signals:
            async with trio.open_nursery() as nursery:
                work = trio.CancelScope()
                nursery.start_soon(self._hear, signals, work)
                nursery.start_soon(self._watch_time, work)
                with work:
                    try:
                        await self._generate(summary)
                        if summary.is_complete:
                            await self._writer.finish()
                    except TrinferError as error:
                        failure = error
                nursery.cancel_scope.cancel()
        if not self._arguments.quiet and (failure is None or summary.done):
            print(describe(summary, trio.current_time() - summary.began), file=sys.stderr)
        self._writer.close()
        if self._writer.unfinished is not None:
            print(f"the run is not complete; its rows so far are in {self._writer.unfinished}", file=sys.stderr)
        if failure is not None:
            raise failure
        if not summary.is_complete:
            return exit_codes.INTERRUPTED if self._signal == signal.SIGINT else exit_codes.REQUEUE
        return exit_codes.ROWS_FAILED if summary.failed else exit_codes.OK

    async def _generate(self, summary: Summary) -> None:
        import trio

        from trinfer.batch.runner import run_rows
        from trinfer.engines.create import create_server
        from trinfer.errors import TrinferError
        from trinfer.observe.progress import show_progress

        failure: TrinferError | None = None

        wanted = not (self._arguments.no_progress or self._arguments.quiet)
        async with create_server(self._config) as server:
            self._server = server
            with show_progress(self._reader.total_bytes, wanted=wanted) as progress:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._watch_engine, server, summary, progress)
                    try:
                        await run_rows(
                            server,
                            self._reader,
                            self._writer,
                            max_concurrent=self._arguments.max_concurrent,
                            params=self._params,
                            summary=summary,
                            progress=progress,
                            stop=self._stopping,
                        )
                    except TrinferError as error:
                        failure = error
                    nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _watch_engine(self, server: InferenceServer, summary: Summary, progress: Progress) -> None:
        """Say what the engine is doing, also while no rows are done: a start may take minutes."""
        import trio

        while True:
            summary.engine = server.phase or server.state.value
            if server.restarts:
                summary.engine += f" (restarts: {server.restarts})"
            progress.update(summary)
            await trio.sleep(ENGINE_LOOKS)

    async def _hear(self, signals: Any, work: trio.CancelScope) -> None:  # noqa: ANN401  # trio's receiver type is private
        async for number in signals:
            if self._signal is not None:
                # The second time means now. The engine's guard sees that its owner has gone, and cleans up.
                import os

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

        print(f"\n{message}", file=sys.stderr)
        self._stopping.set()
        # An engine that is still loading has answered nothing, and will not in time.
        is_ready = self._server is not None and self._server.state.value in {"ready", "restarting"}
        work.deadline = trio.current_time() + (self._arguments.drain_timeout if is_ready else 0.0)
