"""``trinfer``: finds the command, and turns every error that trinfer raises into a clean message and exit code.

Rule: nothing heavy is imported before a command runs, so that ``--help`` and ``--version`` answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from trinfer._version import __version__
from trinfer.cli import doctor, exit_codes, gc, logs, ps, run

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="trinfer",
        description="Runs LLM inference engines, and prompts through them, and leaves nothing behind.",
        epilog="TRINFER_DEBUG=1 shows tracebacks.",
    )
    parser.add_argument("--version", action="version", version=f"trinfer {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (run, ps, logs, gc, doctor):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Raises SystemExit(2) for wrong options, as argparse does."""
    _open_standard_files()
    arguments = build_parser().parse_args(argv)
    try:
        code: int = arguments.execute(arguments)
    except Exception as error:
        if os.environ.get("TRINFER_DEBUG"):
            raise
        return _report(error)
    return code


def _open_standard_files() -> None:
    """Fill the places of standard files that the caller has closed, before other files get their numbers.

    Each is opened the wrong way round, so that whoever really needs it gets an error.
    """
    for number, mode in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # gets the lowest free number, which is this one
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115  # as long-lived as the program
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # likewise


def _report(error: Exception) -> int:
    from trinfer.batch.files import FileError
    from trinfer.errors import ConfigError, ServerError, TrinferError

    print(f"trinfer: {error}" if isinstance(error, TrinferError) else _bug(error), file=sys.stderr)
    if isinstance(error, ConfigError):
        return exit_codes.USAGE
    if isinstance(error, FileError):
        return exit_codes.FILES
    if isinstance(error, ServerError):
        return exit_codes.ENGINE
    return exit_codes.ROWS_FAILED


def _bug(error: Exception) -> str:
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return (
        f"trinfer: unexpected {type(error).__name__}: {error}\n"
        "  what to do: this is a bug of trinfer; run it again with TRINFER_DEBUG=1, and report the traceback"
    )
