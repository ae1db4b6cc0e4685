"""What a run must not do to files: read what it writes, and replace what is not its own."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from trinfer.batch.run_directory import finished_marks, noted_outputs, unusable
from trinfer.errors import ConfigError, FileError

if TYPE_CHECKING:
    from trinfer.batch.publish import Output
    from trinfer.data.readers import Inputs

__all__ = ["is_output_of", "leave_out_own_files", "refuse_other_inputs"]


def is_output_of(run_dir: Path, output: Output) -> bool:
    """Whether the output, where there is one, is what the run in this directory has written.

    Raises:
        FileError: the directory is somebody else's.
    """
    try:
        if not (run_dir / "manifest.json").exists():
            return False
    except OSError as error:
        raise unusable(run_dir, error) from error
    return output.describe()["path"] in noted_outputs(run_dir)


def leave_out_own_files(inputs: Inputs, output: Output, run_dir: Path, *, is_ours: bool) -> None:
    """What the run has written itself is no input, where a folder or a glob finds it.

    Raises:
        FileError: nothing else is among the inputs.
    """
    own: set[str] = set()
    if output.is_local_folder:
        with contextlib.suppress(OSError):  # a folder that cannot be is told later
            own = {os.path.realpath(part) for part in Path(output.path).glob("part-*-of-*-*")}
    elif is_ours:
        own = {os.path.realpath(output.path)}
    folder = os.path.realpath(run_dir) + os.sep
    paths = inputs.paths
    reals = {path: os.path.realpath(path) for path in paths}
    kept = [path for path, real in reals.items() if real not in own and not real.startswith(folder)]
    if paths and not kept:
        raise FileError(f"the input {paths[0]} is what this run has written", advice="give another output")
    inputs.paths = kept


def refuse_other_inputs(inputs: Inputs, output: Output, run_dir: Path) -> None:
    """The output of one input is not to be replaced by that of quite another, because its name was typed again.

    Raises:
        ConfigError: the run in this directory is finished, and had none of these inputs.
    """
    now = {entry["path"] for entry in inputs.describe()}
    before = {entry["path"] for mark in finished_marks(run_dir) for entry in mark.get("inputs", [])}
    if now and before and not now & before:
        raise ConfigError(
            f"the run in {run_dir} is finished, and was of other inputs: {', '.join(sorted(before)[:3])}",
            cause=f"{output.path} would lose its rows to those of the new inputs",
            advice="give another output, or --overwrite to replace this one",
        )
