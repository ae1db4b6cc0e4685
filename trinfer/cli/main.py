"""``trinfer``: finds the command, and turns every error that trinfer raises into a clean message and exit code.

Rule: nothing heavy is imported before a command runs, so that ``--help`` and ``--version`` answer at once.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from typing import TYPE_CHECKING

from trinfer._version import __version__
from trinfer.cli import batch, doctor, exit_codes, gc, logs, ps, retry, run

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
    for command in (run, batch, ps, logs, gc, doctor):
        command.add_parser(commands)
    retry.add_parser(commands, _parse)
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    arguments = build_parser().parse_args(argv)
    arguments.argv = list(argv)  # a run notes how it was started
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Raises SystemExit(2) for wrong options, as argparse does."""
    _open_standard_files()
    try:
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        code: int = arguments.execute(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return exit_codes.INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has had enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return exit_codes.OK
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
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show ends no command


def _report(error: Exception) -> int:
    from trinfer.errors import ConfigError, FileError, RunStopped, ServerError, TrinferError
    from trinfer.observe.progress import say

    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, OSError) and _is_stdout(error):
        error = FileError(f"standard output cannot be written: {error.strerror}")
    elif isinstance(error, OSError) and error.errno in {errno.EMFILE, errno.ENFILE}:
        error = FileError(
            f"too few files can be open at once: {error}", advice="raise the limit: `ulimit -n 4096`, for instance"
        )
    elif isinstance(error, FileNotFoundError) and _is_astray():
        error = FileError("the working directory does not exist any more", advice="go to one that does, and try again")
    say(f"trinfer: {error}" if isinstance(error, TrinferError) else _bug(error))
    for kind, code in (
        (ConfigError, exit_codes.USAGE),
        (FileError, exit_codes.FILES),
        (ServerError, exit_codes.ENGINE),
        (RunStopped, exit_codes.STOPPED),
    ):
        if isinstance(error, kind):
            return code
    return exit_codes.BUG


def _is_stdout(error: OSError) -> bool:
    """Whether it is standard output that has failed; nothing else is written without a name."""
    return error.filename is None and error.errno in {errno.ENOSPC, errno.EIO, errno.EBADF}


def _is_astray() -> bool:
    """Whether the working directory was removed: then relative paths name nothing."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _bug(error: Exception) -> str:
    return (
        f"trinfer: unexpected {type(error).__name__}: {error}\n"
        "  what to do: this is a bug of trinfer; run it again with TRINFER_DEBUG=1, and report the traceback"
    )
