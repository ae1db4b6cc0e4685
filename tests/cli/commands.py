"""The command line for tests: as a process of its own, or in this one, where nothing is killed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.batch.runs import kept_rows
from trinfer.cli.main import main

ROOT = Path(__file__).parent.parent.parent


def trinfer(
    *arguments: object, stdin: bytes = b"", cwd: Path = ROOT, env: dict[str, str] | None = None
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a process."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "trinfer", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def here(*arguments: object) -> tuple[int, str, str]:
    """The same in this process, which spares the start of an interpreter."""
    out, err = io.StringIO(), io.StringIO()
    # A retry goes to the folder of its run.
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(os.getcwd()):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "trinfer", *map(str, arguments)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )


def end(process: subprocess.Popen[str], number: int | None = None) -> tuple[int, str]:
    """Send a signal, and wait; returns exit code and standard error."""
    if number is not None:
        process.send_signal(number)
    try:
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    return process.returncode, err


def kill(process: subprocess.Popen[str]) -> None:
    assert end(process, signal.SIGKILL)[0] == -signal.SIGKILL


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    """Return when the condition holds; the process must live until then."""
    give_up = time.monotonic() + 20
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.002)


def wait_for_rows(run_dir: Path, count: int, process: subprocess.Popen[str]) -> None:
    wait_for(lambda: len(kept_rows(run_dir)) >= count, process)


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def prompts(path: Path, *numbers: int) -> Path:
    return write(path, *({"id": number, "prompt": f"p{number}"} for number in numbers))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ids(path: Path) -> list[Any]:
    return [row["id"] for row in rows(path)]


def figures(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "stats.json").read_text())
    return found
