"""Figures as rows of a table: printed, as JSON, and as a page of the documentation."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from pathlib import Path

import trio


def machine() -> str:
    versions = f"Python {platform.python_version()}, trio {trio.__version__}"
    return f"{os.cpu_count()} cores, Linux {platform.release()}, {versions}"


def arguments_for(module: str, description: str, rounds: int) -> argparse.Namespace:
    """The options that all tables of figures have."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--json", metavar="FILE", help="write the figures here too")
    parser.add_argument("--markdown", metavar="FILE", help="write a page of the documentation here")
    parser.add_argument("--rounds", type=int, default=rounds, help="repetitions of each figure (default: %(default)s)")
    return parser.parse_args()


class Figures:
    """Collects rows, prints them as a table."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []

    def add(self, name: str, values: list[float], unit: str, bound: str = "") -> None:
        row = {
            "figure": name,
            "unit": unit,
            "median": round(statistics.median(values), 3),
            "min": round(min(values), 3),
            "max": round(max(values), 3),
            "n": len(values),
            "bound": bound,
        }
        self.rows.append(row)
        print("{figure:<58} {median:>9} {min:>9} {max:>9} {unit:<6} {n:>3}  {bound}".format(**row), flush=True)

    def markdown(self, title: str, command: str) -> str:
        """The table as a page of the documentation."""
        lines = [f"# {title}", "", f"Printed by `{command}`, on:", machine() + ".", ""]
        lines += ["| figure | median | min | max | unit | n | bound |", "|---|---|---|---|---|---|---|"]
        lines += ["| {figure} | {median} | {min} | {max} | {unit} | {n} | {bound} |".format(**row) for row in self.rows]
        return "\n".join(lines) + "\n"

    def head(self) -> None:
        print(f"{machine()}\n{'figure':<58} {'median':>9} {'min':>9} {'max':>9}")

    def save(self, arguments: argparse.Namespace, title: str, module: str) -> None:
        """Write the files that the command line asks for."""
        if arguments.markdown:
            Path(arguments.markdown).write_text(self.markdown(title, f"python -m {module}"))
        if arguments.json:
            text = json.dumps({"machine": machine(), "figures": self.rows}, indent=1)
            Path(arguments.json).write_text(text + "\n")
