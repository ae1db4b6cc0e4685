"""Where `install_engines.sh` has put the real engines, and models for them."""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("TRINFER_ENGINES_DIR") or Path.home() / ".cache/trinfer/engines")
SCRIPT = Path(__file__).with_name("install_engines.sh")
PATIENCE = 480.0  # seconds for an installation that is under way
MODELS = Path(__file__).parents[1] / "models.py"


def python_of(engine: str) -> Path:
    """The interpreter of an engine's environment; skips the test where that is not complete."""
    environment = FOLDER / engine
    give_up = time.monotonic() + PATIENCE
    while not any(environment.glob(".complete-*")) and _is_being_installed() and time.monotonic() < give_up:
        time.sleep(0.5)
    if not any(environment.glob(".complete-*")):
        pytest.skip(f"{engine} is not installed in {environment}: run tests/engines/{SCRIPT.name} {engine}")
    return environment / "bin" / "python"


def _is_being_installed() -> bool:
    """Whether the script is at work, as it is beside the tests in CI."""
    try:
        with open(FOLDER / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def environ() -> dict[str, str]:
    """For engines that shall neither download nor phone home."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }


def make_hugging_face_model(engine: str, folder: Path) -> Path:
    """A tiny model, made by the libraries of the engine's environment."""
    done = subprocess.run(
        [str(python_of(engine)), "-P", str(MODELS), str(folder)], env=environ(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder
