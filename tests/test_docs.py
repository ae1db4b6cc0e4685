"""The examples of the documentation run, and what it says of files is true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("first_request.py", r"^\w+( \w+)*$"),
        (
            "overlap.py",
            r"^state: starting\n(Tell me about the number \d+\. -> [\w ]+\n){20}state: ready\nstate: stopped$",
        ),
        ("custom_engine.py", r"^echo: Hello$"),
        ("rollouts.py", r"^19 documents, 1 left out, 76 requests\nagain: 0 requests$"),
    ],
)
def test_examples_run(name, words):
    done = subprocess.run(
        [sys.executable, "-W", "error", f"examples/{name}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(words, done.stdout.strip())


def test_files_that_the_documents_name_exist():
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]:
        for name in re.findall(r"`((?:tests|trinfer|examples|benchmarks|docs)/[\w/.-]+\.\w+)`", document.read_text()):
            assert (ROOT / name).exists(), f"{document.name} names {name}"
