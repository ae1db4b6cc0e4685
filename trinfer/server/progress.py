"""What an engine is doing while it starts, read from its own output, and whether it gets anywhere.

Sources of the phrases: the output of vLLM, SGLang, llama.cpp, transformers and huggingface_hub, as they print it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import trio

__all__ = ["Phase", "StartProgress"]

# In the order in which they come; a line belongs to the last one that matches it.
PHASES: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "download",
        re.compile(r"[Dd]ownloading|Fetching \d+ files|Time spent downloading|\.(?:safetensors|bin|gguf): +\d+%"),
    ),
    (
        "load weights",
        re.compile(
            r"Loading (?:safetensors|pt|checkpoint|weights)|Starting to load model|Load weight begin|load_tensors:"
            r"|loading model tensors|Loading model weights|Loading checkpoint shards"
        ),
    ),
    (
        "compile",
        re.compile(
            r"torch\.compile|Dynamo bytecode|[Cc]ompiling (?:a |the )?(?:graph|kernel|model)|AOT compil|Inductor"
            r"|JIT compil"
        ),
    ),
    ("capture graphs", re.compile(r"[Cc]apturing (?:CUDA|cuda|batches|bs)|Capture (?:cuda|CUDA) graph|Graph captur")),
    ("warm up", re.compile(r"[Ww]arm(?:ing)?[ -]?up")),
)

# 45%, 3/12, 1.2 GB: what grows while there is progress. Dates and times grow always, and are none of these.
_AMOUNT = re.compile(
    r"(?<![\d/.:-])(?P<percent>\d+(?:\.\d+)?)%"
    r"|(?<![\d/.:-])(?P<done>\d+)/\d+(?![\d/])"
    r"|(?<![\d/.:-])(?P<size>\d+(?:\.\d+)?) ?(?P<unit>[kKMGT])i?B?\b"
)
_UNITS = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_DIGITS = re.compile(r"[\d.]+")
_BAR = re.compile(r"[#█▏▎▍▌▋▊▉|]+ *")
HEARD, LINES = 4 * 1024, 20  # characters and lines that are looked at of what comes at once
KINDS_OF_LINES = 1000  # kept at most; an engine that prints more kinds of amounts is not measured by them


@dataclass(frozen=True)
class Phase:
    """One phase of a start; ``began`` in seconds since the engine was spawned."""

    name: str
    began: float


class StartProgress:
    """Hears an engine's output while it starts.

    Attributes:
        phases: those seen so far, in order.
        heard_at: when the last output came, in seconds of trio's clock.
        moved_at: when an amount in the output last grew, or a new phase began; None before.
    """

    def __init__(self) -> None:
        self._began = trio.current_time()
        self._amounts: dict[str, float] = {}
        self.phases: list[Phase] = []
        self.heard_at = self._began
        self.moved_at: float | None = None

    @property
    def phase(self) -> str:
        """The current one; empty before the first is recognised."""
        return self.phases[-1].name if self.phases else ""

    def hear(self, text: str) -> Phase | None:
        """Take complete lines; returns the phase that has begun with them, if one has."""
        self.heard_at = trio.current_time()
        begun: Phase | None = None
        # Of a flood, the end will do: all of it would hold up the loop.
        for line in text[-HEARD:].splitlines()[-LINES:]:
            begun = self._find_phase(line) or begun
            self._find_amount(line)
        return begun

    def _find_phase(self, line: str) -> Phase | None:
        name = next((name for name, regex in reversed(PHASES) if regex.search(line)), None)
        if name is None or any(phase.name == name for phase in self.phases):
            return None
        phase = Phase(name, trio.current_time() - self._began)
        self.phases.append(phase)
        self.moved_at = trio.current_time()
        return phase

    def _find_amount(self, line: str) -> None:
        for match in _AMOUNT.finditer(line):
            kind = f"{match.lastgroup}: {_DIGITS.sub('#', _BAR.sub('', line[: match.start()]))}"
            if match["percent"]:
                amount = float(match["percent"])
            elif match["done"]:
                amount = float(match["done"])
            else:
                amount = float(match["size"]) * _UNITS[match["unit"]]
            if amount > self._amounts.get(kind, 0.0) and (kind in self._amounts or len(self._amounts) < KINDS_OF_LINES):
                self._amounts[kind] = amount
                self.moved_at = trio.current_time()
            return  # the first amount of a line tells; behind it stand rates and estimates

    def describe(self) -> str:
        """For messages: the last phase and how far into the start it began."""
        if not self.phases:
            return ""
        last = self.phases[-1]
        return f"{last.name}, since {trio.current_time() - self._began - last.began:.0f} s"
