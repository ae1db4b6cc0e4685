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


def run(*arguments: str, module: str = "request_path") -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
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


@needs_nginx
def test_the_durable_batch_is_measured(tmp_path: Path):
    page, figures = tmp_path / "batch.md", tmp_path / "batch.json"
    quick = ("--rounds", "1", "--documents", "400", "--slot-documents", "1500", "--million", "2000")
    run("rates", "slots", "memory", *quick, "--markdown", str(page), "--json", str(figures), module="batch")
    found = {row["figure"]: row["median"] for row in json.loads(figures.read_text())["figures"]}
    assert found["trinfer, durable, 64 in flight"] > 0
    # The share that the figure claims, at a size where the start and the end still count.
    assert 90 < found["trinfer, durable: slots busy in the steady state"] <= 101
    assert found["resume: every row done, nothing published"] < 15
    assert "| trinfer, durable, 64 in flight |" in page.read_text()


@pytest.mark.parametrize("module", ["request_path", "lifecycle", "supervision", "batch", "request_cache"])
def test_benchmarks_explain_themselves(module):
    out = run("--help", module=module)
    assert "--json" in out or "--out" in out


def test_the_fixed_answer_has_the_size_that_the_table_names():
    assert len(nginx.answer()) == nginx.ANSWER_BYTES == 460


def test_the_plot_names_each_client():
    rows = [{"client": name, "in_flight": 8, "cpu_us": us} for name, us in (("trinfer", 90.0), ("other", 900.0))]
    picture = request_path.svg(rows)
    assert ">trinfer<" in picture
    assert ">900<" in picture
