"""``trinfer retry``: the rows of a run that failed, once more."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

__all__ = ["add_parser"]


def add_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    parse: Callable[[Sequence[str]], argparse.Namespace],
) -> None:
    """Options of ``trinfer retry``; ``parse`` reads the command of the run."""
    parser = commands.add_parser(
        "retry",
        help="run the rows of a run that failed again",
        description="Runs the rows that failed again, with the options of the run's last command, and writes its "
        "output anew. Options that are given here replace the run's.",
        usage="trinfer retry RUN_DIR [OPTIONS OF THE RUN]",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the run directory (OUTPUT.run)")
    options = parser.add_argument("options", nargs=argparse.REMAINDER, help="options of the run that are to be others")
    options.required = False  # argparse says it is, where RUN_DIR is missing

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
    folder = _folder_of(manifest.notes, path)
    try:
        os.chdir(folder)  # the paths in its options begin there
    except OSError as error:
        raise FileError(f"the folder {folder}, where the run was started, is not there: {error.strerror}") from error
    # A run of several shards is retried as one: what is left is little, and the output is written anew in any case.
    whole = ["--shard", "0/1"] if command[0] == "run" else []
    again = parse([*command, *whole, "--run-dir", str(path), *arguments.options])
    for name in ("param", "model_kwarg"):  # of those that may stand several times, the last of each key counts
        texts = getattr(again, name, None)
        if texts is not None:
            setattr(again, name, list({text.partition("=")[0]: text for text in texts}.values()))
    again.retry_failed = True
    again.restart = False
    # Changes that were accepted once are no leave for others; and what was started stays on record, for the next time.
    again.accept_changes = "--accept-changes" in arguments.options
    again.argv = [*command, *arguments.options] if again.accept_changes else list(command)
    code: int = again.execute(again)
    return code


def _folder_of(notes: Mapping[str, Any], path: Path) -> str:
    """Where the command of a run is to be called: where it was, or the same place beside a run that was moved."""
    folder, before = str(notes.get("folder", ".")), notes.get("run_dir")
    now = os.path.realpath(path)
    # A copy must not write over the output of the original. Where only the run directory was moved, the rest stays.
    if isinstance(before, str) and before != now and (os.path.exists(before) or not os.path.isdir(folder)):
        return os.path.normpath(os.path.join(now, os.path.relpath(folder, before)))
    return folder
