"""Where `install_engines.sh` has put the real engines, and models for them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("TRINFER_ENGINES_DIR") or Path.home() / ".cache/trinfer/engines")
SCRIPT = Path(__file__).with_name("install_engines.sh")
MODELS = Path(__file__).parents[1] / "models.py"


def python_of(engine: str) -> Path:
    """The interpreter of an engine's environment; skips the test where that is not complete."""
    environment = FOLDER / engine
    if not any(environment.glob(".complete-*")):
        pytest.skip(f"{engine} is not installed in {environment}: run tests/engines/{SCRIPT.name} {engine}")
    return environment / "bin" / "python"


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
