"""What a run directory is for: written once, compared by every run that continues it.

Rule: what decides the answers (prompt, model, parameters, the rollout's code) must be the same, or the run is refused,
with the differences; what only describes (input, versions, places) may differ, and is kept for people to read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trinfer.durable.disk import Disk, advice_for, write_file
from trinfer.errors import ConfigError, FileError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["Manifest", "differences"]

NAME = "manifest.json"
FORMAT = 1
SHOWN = 300  # characters of a value
MISSING = "(not set)"


@dataclass(frozen=True)
class Manifest:
    """What a run was started with.

    Attributes:
        job: what decides the answers; a run is continued only with the same.
        notes: what else is good to know.
    """

    job: Mapping[str, Any]
    notes: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Manifest | None:
        """The manifest of a run directory; None where there is none.

        Raises:
            FileError: it cannot be read, or was made by a later trinfer.
        """
        path = folder / NAME
        try:
            value = json.loads(path.read_bytes())
            if value["format"] != FORMAT:
                raise FileError(
                    f"the manifest {path} has format {value['format']}; this trinfer reads {FORMAT}",
                    advice="use the trinfer that wrote it, or give another --run-dir",
                )
            job, notes = value["job"], value.get("notes", {})
            if not isinstance(job, dict) or not isinstance(notes, dict):
                raise TypeError("job and notes are objects")
            return cls(job, notes)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise FileError(f"the manifest {path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise FileError(
                f"the manifest {path} is no manifest of trinfer: {error}",
                advice="give another --run-dir, or --restart to begin anew",
            ) from error

    def save(self, folder: Path, disk: Disk | None = None) -> None:
        """Write it, whole or not at all. Raises FileError."""
        value = {"format": FORMAT, "job": self.job, "notes": self.notes}
        try:
            write_file(folder / NAME, (json.dumps(value, indent=1) + "\n").encode(), disk)
        except OSError as error:
            raise FileError(
                f"the manifest in {folder} cannot be written: {error.strerror}", advice=advice_for(error)
            ) from error

    def check(self, wanted: Manifest, folder: Path) -> None:
        """Refuse to continue this run as another one.

        Raises:
            ConfigError: the jobs differ; the message lists how.
        """
        found = differences(self.job, wanted.job)
        if found:
            raise ConfigError(
                f"the run in {folder} was started with other settings:\n" + "\n".join(found),
                cause="answers of two kinds would stand in one output",
                advice="use the old settings, or --accept-changes to go on with the new ones for what is left, or "
                "--restart to throw the run directory away and begin anew",
            )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Two lines for each value that differs, the old and the new one; empty for equal jobs."""
    old, new = _flat(before), _flat(now)
    lines = []
    for name in sorted(old.keys() | new.keys()):
        before_it, now_it = old.get(name, MISSING), new.get(name, MISSING)
        if before_it != now_it and json.dumps(before_it) != json.dumps(now_it):  # NaN is none but itself
            lines += [f"    - {name} = {_shown(old, name)}", f"    + {name} = {_shown(new, name)}"]
    return lines


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        if isinstance(inner, dict):
            flat |= _flat(inner, f"{prefix}{name}.")
        else:
            flat[prefix + name] = inner
    # As JSON would give it back, so that a tuple equals a list.
    return json.loads(json.dumps(flat, default=str))  # type: ignore[no-any-return]  # a dict in, a dict out


def _shown(values: Mapping[str, Any], name: str) -> str:
    if name not in values:
        return MISSING
    text = json.dumps(values[name])
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text)} characters)"
