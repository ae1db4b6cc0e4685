"""``trinfer retry``: the rows of a run that failed, once more."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["add_parser"]


def add_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    parse: Callable[[Sequence[str]], argparse.Namespace],
) -> None:
    """Options of ``trinfer retry``; ``parse`` reads the command of the run."""
    parser = commands.add_parser(
        "retry",
        help="run the rows of a run that failed again",
        description="Runs the rows that failed again, with the options that the run had, and writes its output anew. "
        "Options that are given here replace the run's.",
        usage="trinfer retry RUN_DIR [OPTIONS OF THE RUN]",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the run directory (OUTPUT.run)")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of the run that are to be others")

    def execute(arguments: argparse.Namespace) -> int:
        return _execute(arguments, parse)

    parser.set_defaults(execute=execute)


def _execute(arguments: argparse.Namespace, parse: Callable[[Sequence[str]], argparse.Namespace]) -> int:
    """Run the command; returns its exit code. Raises TrinferError."""
    from pathlib import Path

    from trinfer.durable.manifest import Manifest
    from trinfer.errors import ConfigError, FileError

    path = Path(arguments.run_dir).absolute()
    manifest = Manifest.load(path)
    if manifest is None:
        raise FileError(f"{arguments.run_dir} is no run directory", advice="give the folder OUTPUT.run of a run")
    command = manifest.notes.get("command")
    if not command:
        raise ConfigError(
            f"the run in {arguments.run_dir} was not started by `trinfer run` or `trinfer batch`",
            advice="call the same InferenceRunner with retry_failed=True",
        )
    folder = manifest.notes.get("folder", ".")
    try:
        os.chdir(folder)  # the paths in its options begin there
    except OSError as error:
        raise FileError(f"the folder {folder}, where the run was started, is not there: {error.strerror}") from error
    again = parse([*command, "--run-dir", str(path), *arguments.options])
    again.retry_failed = True
    again.restart = False
    # What was started stays on record, for the next time.
    again.argv = list(command)
    code: int = again.execute(again)
    return code
