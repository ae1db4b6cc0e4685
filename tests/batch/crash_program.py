"""The run that `test_crashes` kills: ``python -m tests.batch.crash_program FOLDER RANK WORLD_SIZE CONCURRENCY``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.engine_configs import fake_config
from trinfer import Document, InferenceRunner

LATENCY = 0.04
CRASH_AT = 700  # requests in the life of one engine


def turns(number: int) -> int:
    return 1 + number % 3


def prompt(number: int, turn: int, text: str) -> str:
    return f"{number}/{turn} {text}"


async def rollout(document: Document, generate: Any) -> str:
    """A conversation of one to three turns, each made of the answer before."""
    number, text = int(document.id), document.text
    for turn in range(turns(number)):
        result = await generate({"messages": [{"role": "user", "content": prompt(number, turn, text)}]})
        text = result.text
    return text


def expected(number: int, text: str) -> str:
    for turn in range(turns(number)):
        text = "echo: " + prompt(number, turn, text)
    return text


def main(folder: Path, rank: int, world_size: int, concurrency: int) -> None:
    config = fake_config(
        *("--latency", str(LATENCY), "--crash-at", f"request:{CRASH_AT}"),
        *("--answered-file", str(folder / f"answered-{rank}")),
        max_restarts=1000,
        max_replays=1000,
        restart_backoff_sec=0.0,
        request_timeout=120.0,
    )
    runner = InferenceRunner(
        rollout, config, str(folder / "in.jsonl"), f"{folder}/out/", max_concurrent_generations=concurrency
    )
    runner.run_sync(rank, world_size)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
