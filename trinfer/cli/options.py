"""Options that several commands have: types of their values, the engine's group, and the config made of them."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trinfer.config import InferenceConfig

__all__ = ["add_engine_options", "at_least_one", "duration", "make_config", "pairs", "price", "seconds", "shard"]

ENGINES = ("dummy", "vllm", "sglang", "llamacpp", "transformers", "custom", "endpoint")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Which engine, how it is started, and how long things may take."""
    add = parser.add_argument_group("engine").add_argument
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
    add("--ready-timeout", type=positive, default=1500.0, metavar="SECONDS", help="for loading (default: %(default)g)")
    add(
        "--max-restarts",
        type=int,
        default=3,
        metavar="N",
        help="start an engine that dies again, so often in ten minutes (default: %(default)s)",
    )
    add(
        "--stall-timeout",
        type=seconds,
        default=300.0,
        metavar="SECONDS",
        help="start it again when nothing moves for so long; 0 never does (default: %(default)g)",
    )
    add(
        "--request-timeout",
        type=positive,
        default=3600.0,
        metavar="SECONDS",
        help="for one request (default: %(default)g)",
    )
    add("--trust-remote-code", action="store_true", help="let the engine run code that comes with the model")


def seconds(text: str) -> float:
    """A number of seconds, 0 too."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are seconds >= 0")
    return value


def positive(text: str) -> float:
    """A number of seconds, not 0."""
    value = seconds(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are seconds > 0")
    return value


def price(text: str) -> float:
    """A price, 0 too."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are prices >= 0")
    return value


def duration(text: str) -> float:
    """``90``, ``1:30``, ``2:00:00``, ``1-12:00:00``: as SLURM writes them, but a single number is seconds."""
    days, dash, rest = text.rpartition("-")
    try:
        parts = [float(part) for part in rest.split(":")]
        if len(parts) > 3 or (dash and not days.isdigit()):
            raise ValueError(text)
        value = sum(part * 60.0**power for power, part in enumerate(reversed(parts))) + int(days or 0) * 86400.0
    except (ValueError, OverflowError):
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are seconds, or [DAYS-][HOURS:]MINUTES:SECONDS")
    return value


def shard(text: str) -> tuple[int, int]:
    """``3/16``: the rank, from 0, and how many there are."""
    rank, slash, size = text.partition("/")
    if not (slash and rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed is RANK/COUNT with 0 <= RANK < COUNT, such as 0/4")
    return int(rank), int(size)


def at_least_one(text: str) -> int:
    """An integer >= 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= sys.maxsize:
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: allowed are integers >= 1, up to {sys.maxsize}")
    return value


def pairs(option: str, texts: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` texts; values are JSON where they can be read so, else text.

    Raises:
        ConfigError: one has no key, or a key stands twice.
    """
    from trinfer.errors import ConfigError

    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ConfigError(f"{option} {text!r}: allowed is KEY=VALUE, such as max_tokens=100")
        if key in found:
            raise ConfigError(f"{option} {key!r} is given twice: allowed is once")
        try:
            found[key] = json.loads(value)
        except (ValueError, RecursionError):
            found[key] = value
    return found


def make_config(arguments: argparse.Namespace, *, use_chat: bool = True) -> InferenceConfig:
    """The engine's config. Raises ConfigError."""
    import os

    from trinfer.config import InferenceConfig

    delay = min(5.0, arguments.ready_timeout)
    return InferenceConfig(
        server_type=arguments.engine,
        model_name_or_path=arguments.model,
        model_max_context=arguments.model_max_context,
        use_chat=use_chat,
        endpoint_url=arguments.endpoint_url,
        # An engine of our own is reached by nobody else, and gets a key only where the user has one for it.
        api_key=os.environ.get("TRINFER_API_KEY", "").strip() or None,
        tp=arguments.tp,
        pp=arguments.pp,
        dp=arguments.dp,
        request_timeout=arguments.request_timeout,
        model_kwargs=pairs("--model-kwarg", arguments.model_kwarg),
        server_log_folder=arguments.server_log_folder,
        server_ready_max_attempts=max(1, round(arguments.ready_timeout / delay)),
        server_ready_delay_sec=delay,
        transport=arguments.transport,
        max_restarts=arguments.max_restarts,
        stall_timeout=arguments.stall_timeout or None,
        trust_remote_code=arguments.trust_remote_code,
        executable=arguments.executable,
        multi_node=None if arguments.tp * arguments.pp * arguments.dp > 1 else False,
    )
