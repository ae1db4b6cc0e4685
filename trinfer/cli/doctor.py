"""``trinfer doctor``: what would keep an engine from starting, told before it is tried."""

from __future__ import annotations

import json
import platform
import sys
from typing import TYPE_CHECKING

from trinfer.cli import exit_codes

if TYPE_CHECKING:
    import argparse

    from trinfer.server.preflight import Finding

__all__ = ["add_parser", "execute"]

PACKAGES = ("trinfer", "trio", "httpx", "httptools", "vllm", "sglang", "transformers", "torch", "xllamacpp", "ray")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Options of ``trinfer doctor``."""
    parser = commands.add_parser(
        "doctor",
        help="tell what would keep an engine from starting",
        description="Checks this machine, and with --engine what that engine needs. Exit code 3: there are errors.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--engine", choices=("vllm", "sglang", "llamacpp", "transformers", "dummy"), help="check for this engine")
    add("--model", default="", help="the model's name or path")
    for name in ("tp", "pp", "dp"):
        add(f"--{name}", type=int, default=1, metavar="N")
    add("--executable", metavar="PROGRAM", help="the engine's program, where it is not the one on PATH")
    add("--json", action="store_true", help="one JSON object instead of lines")
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit code.

    Raises:
        ConfigError: the config is not possible.
    """
    from trinfer.server.preflight import inspect_machine

    findings = [*inspect_machine(), *_check_engine(arguments)]
    versions = {"python": platform.python_version(), "system": platform.platform(), **_versions()}
    if arguments.json:
        rows = [{"level": found.level, "what": found.what, "advice": found.advice} for found in findings]
        print(json.dumps({"versions": versions, "findings": rows}, indent=1))
    else:
        print(", ".join(f"{name} {version}" for name, version in versions.items()))
        for found in findings:
            print(f"[{found.level}] {found.what}" + (f"\n    what to do: {found.advice}" if found.advice else ""))
    errors = sum(found.level == "error" for found in findings)
    if errors and not arguments.json:
        print(f"trinfer: {errors} of these will keep the engine from starting", file=sys.stderr)
    return exit_codes.ENGINE if errors else exit_codes.OK


def _check_engine(arguments: argparse.Namespace) -> list[Finding]:
    from trinfer.config import InferenceConfig
    from trinfer.engines.create import create_server
    from trinfer.errors import ConfigError, ServerError
    from trinfer.server.preflight import Finding, thorough

    if arguments.engine is None:
        given = [name for name in ("model", "executable") if getattr(arguments, name)]
        given += [name for name in ("tp", "pp", "dp") if getattr(arguments, name) != 1]
        if given:
            raise ConfigError(
                f"--{given[0]} says something about an engine, and none is named",
                advice="add --engine vllm, sglang, llamacpp or transformers",
            )
        return []
    config = InferenceConfig(
        arguments.engine,
        arguments.model,
        tp=arguments.tp,
        pp=arguments.pp,
        dp=arguments.dp,
        executable=arguments.executable,
    )
    server = create_server(config)
    try:
        program = server.program
    except ServerError as error:
        return [Finding("error", error.message, error.advice or ""), *thorough(config, None)]
    return thorough(config, program)


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
