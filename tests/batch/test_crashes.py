"""A run that is killed again and again: every document once, with its own answer, and next to nothing paid twice.

``TRINFER_KILLS=300 python -m pytest tests/batch/test_crashes.py`` does it more often.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from tests.batch.crash_program import expected, prompt, turns
from trinfer.durable.frames import HEAD_BYTES
from trinfer.durable.journal import read_segments

ROOT = Path(__file__).parent.parent.parent
KILLS = int(os.environ.get("TRINFER_KILLS", "30"))
DOCUMENTS = 3000 * max(1, KILLS // 30)
CONCURRENCY = 16
OTHER_SHARDING = range(10, 13)  # these kills hit a run of two shards


class Run:
    """The processes of one session."""

    def __init__(self, folder: Path, world_size: int = 1) -> None:
        self.processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.batch.crash_program", str(folder)),
                    *map(str, (rank, world_size, CONCURRENCY)),
                ],
                cwd=ROOT,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            for rank in range(world_size)
        ]

    def is_over(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def kill(self, *, group: bool) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL) if group else process.kill()
        for process in self.processes:
            process.communicate()

    def finish(self) -> None:
        for process in self.processes:
            _, err = process.communicate(timeout=300)
            assert process.returncode == 0, err.decode()


def tear(folder: Path, dice: random.Random) -> None:
    """As after a crash of the machine: the last commit has reached the disk in part, and garbage follows."""
    for journal in (folder / "out.run" / "journal").glob("*"):
        segments = read_segments(journal)
        if not segments:
            continue
        path = segments[-1].path
        last = max((frame.offset for frame in segments[-1].frames(verify=True)), default=HEAD_BYTES)
        size = path.stat().st_size
        os.truncate(path, dice.randint(last, size))
        if dice.random() < 0.5:
            with path.open("ab") as file:
                file.write(dice.randbytes(dice.randrange(200)))


def test_a_run_that_is_killed_again_and_again(tmp_path: Path):
    dice = random.Random(KILLS)
    texts = {number: f"text {number} " + "x" * dice.randrange(300) for number in range(DOCUMENTS)}
    lines = [json.dumps({"id": str(number), "text": text}) + "\n" for number, text in texts.items()]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(lines))
    killed: Counter[str] = Counter()
    in_flight = 0
    while killed.total() < KILLS:
        number = killed.total()
        world_size = 2 if number in OTHER_SHARDING else 1
        run = Run(tmp_path, world_size)
        time.sleep(dice.uniform(0.3, 1.1))
        assert not run.is_over(), "the run was over before it was killed often enough: more documents are needed"
        how = dice.choice(["alone", "group", "machine"])
        run.kill(group=how != "alone")
        if how == "machine":
            tear(tmp_path, dice)
        killed[how] += 1
        in_flight += CONCURRENCY * world_size
        if number == KILLS // 2:  # the input comes in another order
            dice.shuffle(lines)
            source.write_text("".join(lines))
    Run(tmp_path).finish()
    parts = sorted((tmp_path / "out").iterdir())
    found = [json.loads(line) for path in parts for line in path.read_text().splitlines()]
    assert len(found) == DOCUMENTS
    answers = {int(row["id"]): row["metadata"]["rollout_results"] for row in found}
    assert answers == {number: [expected(number, text)] for number, text in texts.items()}
    answered = Counter(line for path in tmp_path.glob("answered-*") for line in path.read_text().splitlines())
    ideal = sum(map(turns, texts))
    firsts = {json.dumps(prompt(number, 0, text)) for number, text in texts.items()}
    assert firsts <= answered.keys()
    assert len(answered) == ideal
    print(f"{KILLS} kills ({dict(killed)}): {answered.total()} requests for {ideal}, {in_flight} in flight at kills")
    assert answered.total() <= 1.02 * ideal + in_flight
    assert set(killed) == {"alone", "group", "machine"}
    # The same call again finds nothing to do.
    before = answered.total()
    Run(tmp_path).finish()
    assert sum(len(path.read_text().splitlines()) for path in tmp_path.glob("answered-*")) == before
    shutil.rmtree(tmp_path / "out.run")
