"""A look into run directories, as tests need it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from trinfer.batch.committer import ROW
from trinfer.durable.journal import read_segments

if TYPE_CHECKING:
    from pathlib import Path


def kept_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows in a run's journals so far, also while it works."""
    found = []
    for folder in sorted(run_dir.glob("journal/*")):
        for segment in read_segments(folder):
            for frame in segment.frames(verify=True):
                bodies = segment.read(frame)
                for entry in frame.entries():
                    if entry.kind == ROW:
                        start = entry.offset - frame.bodies
                        found.append(json.loads(bodies[start : start + entry.length]))
    return found
