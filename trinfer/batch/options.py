"""How a run is done: everything that a caller chooses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trinfer.batch.policy import ErrorPolicy
from trinfer.batch.stats import Prices
from trinfer.data.files import is_remote
from trinfer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trinfer.batch.pipeline import Limits
    from trinfer.batch.publish import Output

__all__ = ["RunOptions", "default_run_dir"]


def default_run_dir(output: str) -> Path:
    """OUTPUT.run, beside the output."""
    if is_remote(output):
        raise ConfigError(
            f"the run directory of a remote output must be on a local disk: allowed is --run-dir FOLDER ({output})"
        )
    name = output.rstrip("/")
    if name in {"", ".", ".."}:
        raise ConfigError(f"the output {output!r}: allowed are files, and folders that have a name")
    return Path(name + ".run")


@dataclass(frozen=True)
class RunOptions:
    """How a run is done.

    Attributes:
        output: where rows go.
        run_dir: where the run is kept; None for a run that cannot be continued.
        limits: how much at once.
        policy: what becomes of rows that fail.
        params: generation parameters of every request that does not set them itself.
        job: what decides the answers, for the manifest.
        notes: what else is good to know.
        ordered: write the rows in the order of the input.
        overwrite: replace an output that exists.
        restart, accept_changes, repair, retry_failed: see `RunDirectory`.
        errors: a file for failures of a run without a run directory; those of others are in the directory.
        prices: for the statistics.
    """

    output: Output
    run_dir: Path | None
    limits: Limits
    policy: ErrorPolicy = field(default_factory=ErrorPolicy)
    params: Mapping[str, Any] = field(default_factory=dict)
    job: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    rank: int = 0
    world_size: int = 1
    ordered: bool = False
    overwrite: bool = False
    restart: bool = False
    accept_changes: bool = False
    repair: bool = False
    retry_failed: bool = False
    errors: str | None = None
    prices: Prices = field(default_factory=Prices)
    segment_bytes: int | None = None
