"""From an engine's last lines to a cause and an advice.

Rules:
- Lines are read only when a start has failed or an engine has died. A line alone never ends an engine that serves: the
  same words stand in echoed prompts and in tracebacks of single requests.
- Lines that an engine itself calls information or a warning are no causes.
- A root cause wins over what follows from it, however much of that comes after; among root causes the last one wins,
  and on one line the entry that stands first in the catalogue.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trinfer.server.catalogue import CATALOGUE, Kind, Pattern

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["CATALOGUE", "KILLED", "Diagnosis", "Kind", "Pattern", "diagnose", "is_port_in_use"]


@dataclass(frozen=True)
class Diagnosis:
    """What the catalogue makes of an engine's output.

    Attributes:
        name, cause, advice, kind: see `Pattern`; placeholders are filled in.
        line: the line that told it; empty where the exit code did.
        is_symptom: it follows from something else, which was not found.
    """

    name: str
    cause: str
    advice: str
    kind: Kind
    line: str
    is_symptom: bool = False

    @property
    def is_final(self) -> bool:
        """Whether the same start would fail again."""
        return self.kind == "fatal" and not self.is_symptom


KILLED = Diagnosis(
    "killed",
    "it was killed by SIGKILL, most often by the kernel because the machine or the job ran out of main memory",
    "look into `dmesg`, or the job's accounting, for the OOM killer; ask for more memory, or use a smaller model",
    "transient",  # what it held is free by now
    "",
)
KILLED_CODES = frozenset({-9, 137})

# How vLLM, SGLang, uvicorn, glog and llama.cpp mark a line that is no error, behind at most a prefix with a process.
_NO_ERROR = re.compile(
    r"^(?:\([^)]*\) ?|\[[^\]]*\] ?){0,2}"
    r"(?:(?:DEBUG|INFO|WARNING|WARN)\b|[\d:.,TZ -]+ ?(?:DEBUG|INFO|WARNING|WARN|[DIW])\b|\S+:\d+: \w*Warning: )"
)
_PORT_IN_USE = next(pattern.regex for pattern in CATALOGUE if pattern.name == "port-in-use")
_PORT_RETRIED = re.compile(r"trying (?:another |a new )?port|[Rr]etrying with a new port")


def diagnose(lines: Sequence[str], engine: str = "", *, returncode: int | None = None) -> Diagnosis | None:
    """What the catalogue makes of an engine's last lines, or None.

    Args:
        lines: the engine's last output, oldest first.
        engine: name of the engine; entries for other engines are left out.
        returncode: its exit code, negative for a signal: a kill that nothing else explains is told too.
    """
    patterns = [pattern for pattern in CATALOGUE if pattern.applies_to(engine)]
    symptom: Diagnosis | None = None
    for line in reversed(lines):
        if _NO_ERROR.match(line):
            continue
        for pattern in patterns:
            match = pattern.regex.search(line)
            if match is None:
                continue
            if not pattern.is_symptom:
                return _diagnosis(pattern, match, line)
            symptom = symptom or _diagnosis(pattern, match, line)
            break
    if symptom is None and returncode in KILLED_CODES:
        return KILLED
    return symptom


def _diagnosis(pattern: Pattern, match: re.Match[str], line: str) -> Diagnosis:
    advice = pattern.advice
    if pattern.advice_with_groups is not None and any(match.groupdict().values()):
        # Alternatives of a regex have groups of their own: those that are not there are empty.
        advice = pattern.advice_with_groups.format(**match.groupdict(default=""))
    return Diagnosis(pattern.name, pattern.cause, advice, pattern.kind, line, pattern.is_symptom)


def is_port_in_use(text: str, port: int | None = None) -> bool:
    """Whether an engine says in this piece of output that its port is taken, and does not look for another itself.

    Args:
        port: which one. Lines that name another one are about something else: an exporter of metrics, say.

    Cheap, since it is used on all output while an engine starts.
    """
    if "in use" not in text and "EADDRINUSE" not in text and "bind" not in text:
        return False
    return any(
        _PORT_IN_USE.search(line) is not None
        and _PORT_RETRIED.search(line) is None
        and _NO_ERROR.match(line) is None
        and (port is None or not (named := _named_ports(line)) or port in named)
        for line in text.splitlines()
    )


def _named_ports(line: str) -> set[int]:
    """What may be ports in a line: numbers of four and five digits that stand by themselves or after a colon."""
    return {int(number) for number in re.findall(r"(?<![\w.\[-])(?:[\w.\[\]-]*:)?(\d{4,5})(?![\w.-]|:\d)", line)}
