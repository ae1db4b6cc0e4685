"""The benchmarks run, and the soak holds its bounds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import nginx, request_path

ROOT = Path(__file__).parent.parent.parent
needs_nginx = pytest.mark.skipif(
    shutil.which("nginx") is None and not Path("/usr/sbin/nginx").exists(), reason="nginx is not installed"
)
SOAK = "60" if os.environ.get("CI") else "10"


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.request_path", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_nginx
def test_a_comparison_writes_table_json_and_plot(tmp_path: Path):
    clients = ["trinfer", "trinfer uds", "bare trio + httptools", "datatrove _raw_post"]
    arguments = ["--clients", *clients, "--in-flight", "4", "--rounds", "1", "--seconds", "0.3"]
    out = run(*arguments, "--out", str(tmp_path))
    assert all(client in out for client in clients)
    rows = json.loads((tmp_path / "request_path.json").read_text())["rows"]
    assert {row["client"] for row in rows} == set(clients)
    assert all(row["errors"] == 0 and row["requests"] > 0 for row in rows)
    assert "trinfer uds" in (tmp_path / "request_path.md").read_text()
    assert (tmp_path / "request_path.svg").read_text().startswith("<svg")


@needs_nginx
def test_streaming_is_measured():
    out = run("--stream")
    rates = [float(line.split()[4 if "many" in line else 5]) for line in out.splitlines()]
    assert len(rates) == 2
    assert rates[0] >= 50_000  # chunks per second of CPU, many in one segment


@pytest.mark.slow
@needs_nginx
def test_a_soak_with_cancellations_and_resets_leaves_memory_and_descriptors_flat():
    out = run("--soak", SOAK)
    assert "descriptors" in out


@pytest.mark.parametrize("module", ["benchmarks.request_path", "benchmarks.lifecycle"])
def test_benchmarks_explain_themselves(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--json" in done.stdout or "--out" in done.stdout


def test_the_fixed_answer_has_the_size_that_the_table_names():
    assert len(nginx.answer()) == nginx.ANSWER_BYTES == 460


def test_the_plot_names_each_client():
    rows = [{"client": name, "in_flight": 8, "cpu_us": us} for name, us in (("trinfer", 90.0), ("other", 900.0))]
    picture = request_path.svg(rows)
    assert ">trinfer<" in picture
    assert ">900<" in picture
