"""Durable runs, as users start, stop, break and continue them: every row once, and nothing paid for twice."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections import Counter
from typing import TYPE_CHECKING

import pyarrow.parquet
import pytest
import zstandard

from tests.batch.runs import kept_rows
from tests.cli.commands import (
    end,
    figures,
    here,
    ids,
    kill,
    prompts,
    rows,
    start,
    trinfer,
    wait_for,
    wait_for_rows,
    write,
)
from tests.engine_configs import fake_command
from trinfer.durable.journal import read_segments

if TYPE_CHECKING:
    from pathlib import Path

# -- a finished run -------------------------------------------------------------------------------------------------


def test_a_finished_run_is_whole_and_the_same_command_says_so(tmp_path: Path):
    source = prompts(tmp_path / "in.jsonl", 1, 2, 3, 2, 2)  # equal rows are rows of their own
    out = tmp_path / "out.jsonl"
    code, _, stderr = trinfer("run", source, "-o", out)
    assert (code, "5 ok, 0 failed" in stderr) == (0, True)
    assert Counter(ids(out)) == {1: 1, 2: 3, 3: 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.run"]
    before = out.stat()
    code, stdout, stderr = trinfer("run", source, "-o", out)
    assert (code, stdout) == (0, "")
    assert stderr == f"this run is finished: 5 rows in {out}; --restart begins it anew\n"
    assert out.stat().st_mtime_ns == before.st_mtime_ns
    assert out.stat().st_ino == before.st_ino


def test_rows_are_known_by_content_in_any_order_with_rows_added_and_removed(tmp_path: Path):
    source, out = prompts(tmp_path / "in", 1, 2, 3, 4, 5, 5), tmp_path / "out"
    command = ("run", source, "-o", out)
    assert here(*command)[0] == 0
    texts = {row["id"]: row["generation"]["text"] for row in rows(out)}
    prompts(source, 5, 9, 4, 3, 5, 5)
    code, _, stderr = here(*command, "--ordered")
    assert (code, ids(out)) == (0, [5, 9, 4, 3, 5, 5])
    assert "2 rows in" in stderr  # 9, and the third 5
    assert "4 were done before" in stderr
    assert all(row["generation"]["text"] == texts[row["id"]] for row in rows(out) if row["id"] != 9)
    assert figures(tmp_path / "out.run")["requests"] == 8
    # A row that was removed is not asked for again when it comes back; nor is anything when the output is lost.
    prompts(source, 2, 5)
    assert "2 were done before" in here(*command)[2]
    assert sorted(ids(out)) == [2, 5]
    out.unlink()
    code, _, stderr = here(*command)
    assert (code, sorted(ids(out))) == (0, [2, 5])
    assert "engine ready" not in stderr
    assert figures(tmp_path / "out.run")["requests"] == 8
    # A change within the same second, of the same length, is one.
    prompts(source, 2, 6)
    assert here(*command)[0] == 0
    assert sorted(ids(out)) == [2, 6]


def test_another_part_another_order_and_another_form_of_the_output_are_not_finished(tmp_path: Path):
    source, out = prompts(tmp_path / "in", *range(8)), tmp_path / "out"
    command = ("run", source, "-o", out, "-q")
    for options, expected in (
        (["--limit", "2"], {0, 1}),
        (["--limit", "4"], {0, 1, 2, 3}),
        ([], set(range(8))),
        (["--limit", "1"], {0}),
    ):
        assert here(*command, *options)[0] == 0
        assert (set(ids(out)), len(ids(out))) == (expected, len(expected))
    orders = []
    for options in (["--ordered"], ["--ordered", "--shuffle", "1"], ["--ordered", "--shuffle", "2"]):
        assert here(*command, *options)[0] == 0
        orders.append(tuple(ids(out)))
    assert orders[0] == tuple(range(8))
    assert len(set(orders)) == 3
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert figures(tmp_path / "out.run")["requests"] == 8  # in all that
    code, _, stderr = here("run", source, "-o", out, "--ordered", "--shuffle", "2")
    assert (code, "this run is finished: 8 rows" in stderr) == (0, True)


def test_several_rollouts_of_each_row(tmp_path: Path):
    source, out = prompts(tmp_path / "in", 1, 2), tmp_path / "out"
    assert here("run", source, "-o", out, "--rollouts", "3", "-q")[0] == 0
    assert sorted((row["id"], len(row["generations"])) for row in rows(out)) == [(1, 3), (2, 3)]
    assert figures(tmp_path / "out.run")["requests"] == 6
    code, _, stderr = here("run", source, "-o", out)
    assert (code, "- rollouts = 3\n    + rollouts = 1" in stderr) == (2, True)


def test_a_changed_job_is_refused_with_the_differences_unless_accepted(tmp_path: Path):
    source, out, run_dir = prompts(tmp_path / "in", 1, 2), tmp_path / "out", tmp_path / "out.run"
    template = tmp_path / "template"
    template.write_text("Say {{ prompt }}")
    command = ("run", source, "-o", out)
    assert here(*command, "-q", "--param", "seed=1")[0] == 0
    written = out.read_bytes()
    for options, lines in (
        (["--param", "seed=2"], ["- params.seed = 1", "+ params.seed = 2"]),
        (["--system-prompt", "be brief"], ["- system_prompt = null", '+ system_prompt = "be brief"']),
        (["--model", "other"], ['- model = ""', '+ model = "other"']),
        (["--prompt-field", "q"], ["- prompt_field = null", '+ prompt_field = "q"']),
        (["--template", template], ["- template = null", '+ template = "Say {{ prompt }}"']),
        (["--no-chat"], ["- use_chat = true", "+ use_chat = false"]),
    ):
        seed = [] if "--param" in options else ["--param", "seed=1"]
        code, _, stderr = here(*command, *seed, *options)
        assert code == 2
        assert [line.strip() for line in stderr.splitlines() if line.startswith("    ")] == lines
        assert "--accept-changes" in stderr
    assert out.read_bytes() == written
    prompts(source, 1, 2, 3)
    assert here(*command, "-q", "--param", "seed=2", "--accept-changes")[0] == 0
    assert sorted(ids(out)) == [1, 2, 3]
    assert figures(run_dir)["requests"] == 3  # what was done stays
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["job"]["params"] == {"seed": 2}
    assert [job["params"] for job in manifest["notes"]["history"]] == [{"seed": 1}]
    assert here(*command, "--param", "seed=1")[0] == 2  # the new one counts from now on
    assert here(*command, "-q", "--param", "seed=1", "--restart")[0] == 0
    assert figures(run_dir)["requests"] == 3
    assert "history" not in json.loads((run_dir / "manifest.json").read_text())["notes"]


def test_a_dry_run_shows_requests_and_an_estimate_and_starts_nothing(tmp_path: Path):
    source = write(tmp_path / "in", *({"prompt": "x" * 400} for _ in range(5)))
    code, stdout, stderr = here(
        *("run", source, "-o", tmp_path / "out", "--dry-run", "--engine", "vllm", "--model", "m", "--rollouts", "2"),
        *("--param", "max_tokens=7", "--executable", "/no/such/vllm"),
    )
    assert code == 0
    shown, end_of = [], 0
    while stdout[end_of:].strip():
        value, length = json.JSONDecoder().raw_decode(stdout[end_of:].lstrip())
        end_of += len(stdout[end_of:]) - len(stdout[end_of:].lstrip()) + length
        shown.append(value)
    assert shown == [{"max_tokens": 7, "messages": [{"role": "user", "content": "x" * 400}]}] * 3
    assert "5 rows, 0 of the first 5 not valid" in stderr
    assert "prompt tokens: about 1,000 (100 for each request" in stderr
    assert "at most 70 generated" in stderr
    write(source, "no json", {"prompt": "x"})
    code, _, stderr = here("run", source, "-o", tmp_path / "out", "--dry-run")
    assert (code, "in:1: the line is not JSON" in stderr) == (1, True)
    assert list(tmp_path.iterdir()) == [source]


def test_a_dry_run_tells_of_rows_that_are_nested_too_deeply(tmp_path: Path):
    deep = '{"messages": [{"role": "user", "content": ' + 500 * "[" + '"x"' + 500 * "]" + "}]}\n"
    (tmp_path / "in").write_text(deep + '{"prompt": "hi"}\n' + 3 * deep)
    code, stdout, stderr = here("run", tmp_path / "in", "-o", tmp_path / "out", "--dry-run")
    assert (code, json.loads(stdout)["messages"][0]["content"]) == (1, "hi")
    assert stderr.count("nested too deeply") == 4
    assert "4 of the first 5 not valid" in stderr


def test_standard_input_is_read_again_since_it_may_be_another(tmp_path: Path):
    out = tmp_path / "out"
    lines = [b'{"id": %d, "prompt": "p"}\n' % number for number in range(4)]
    assert trinfer("run", "-", "-o", out, "-q", stdin=b"".join(lines[:3]))[0] == 0
    code, _, stderr = trinfer("run", "-", "-o", out, stdin=b"".join(lines))
    assert (code, sorted(ids(out))) == (0, [0, 1, 2, 3])
    assert "1 rows in" in stderr
    assert "3 were done before" in stderr
    code, _, stderr = trinfer("run", "-", "-o", out)
    assert code == 4
    assert "the input is empty" in stderr
    assert "give the whole input again" in stderr
    assert sorted(ids(out)) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["out.jsonl.gz", "out.jsonl.zst", "out.parquet", "out/"])
def test_every_form_of_output_is_published_whole_and_again(tmp_path: Path, name: str):
    def read() -> list[int]:
        if name == "out/":
            parts = sorted((tmp_path / "out").iterdir())
            assert [part.name for part in parts] == ["part-00000-of-00001-00000.jsonl"]
            return ids(parts[0])
        data = (tmp_path / name).read_bytes()
        if name.endswith("parquet"):
            return pyarrow.parquet.read_table(io.BytesIO(data))["id"].to_pylist()
        zstd = zstandard.ZstdDecompressor().decompressobj()
        plain = gzip.decompress(data) if name.endswith("gz") else zstd.decompress(data)
        return [json.loads(line)["id"] for line in plain.splitlines()]

    source = prompts(tmp_path / "in", *range(5))
    command = ("run", source, "-o", f"{tmp_path}/{name}", "--ordered")
    assert here(*command, "-q", "--limit", "3")[0] == 0
    assert read() == [0, 1, 2]
    assert here(*command, "-q")[0] == 0
    assert read() == [0, 1, 2, 3, 4]
    assert "this run is finished: 5 rows" in here(*command)[2]
    assert figures(tmp_path / f"{name.rstrip('/')}.run")["requests"] == 5
    if name == "out/":
        assert here(*command, "-q", "--output-format", "parquet")[0] == 0
        assert [part.name for part in (tmp_path / "out").iterdir()] == ["part-00000-of-00001-00000.parquet"]


def test_figures_and_report_add_up_over_sessions_and_have_a_price(tmp_path: Path):
    source, out, run_dir = prompts(tmp_path / "in", *range(9)), tmp_path / "out", tmp_path / "out.run"
    command = ("run", source, "-o", out, "--price-in", "2000000", "--price-out", "3000000")
    assert here(*command, "-q", "--limit", "4")[0] == 0
    first = figures(run_dir)
    code, _, stderr = here(*command, "--system-prompt", "<b>", "--accept-changes")
    found = figures(run_dir)
    assert (code, first["sessions"], found["sessions"]) == (0, 1, 2)
    assert (first["requests"], found["requests"]) == (4, 9)
    assert found["output"] == {"rows": 9, "failed": 0, "removed": 0}
    usage = [row["generation"]["usage"] for row in rows(out)]
    assert found["prompt_tokens"] == sum(each["prompt_tokens"] for each in usage)
    assert found["completion_tokens"] == sum(each["completion_tokens"] for each in usage)
    assert found["cost"] == pytest.approx(2 * found["prompt_tokens"] + 3 * found["completion_tokens"])
    assert f"cost: {found['cost'] - first['cost']:.4f}" in stderr  # of this session
    assert sum(found["finish_reasons"].values()) == 9
    assert found["seconds"] > first["seconds"] > 0
    page = (run_dir / "report.html").read_text()
    assert f"{found['cost']:,.4f}" in page
    assert "<script" not in page
    assert "<b>" not in page
    assert set(re.findall("https?://[^\"' <]*", page)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    # Time has a price, too.
    assert here(*command[:4], "-q", "--restart", "--gpu-price", "3600")[0] == 0
    assert figures(run_dir)["cost"] == pytest.approx(figures(run_dir)["seconds"])


# -- a run that ends early ------------------------------------------------------------------------------------------


def test_every_way_to_end_a_run_early_is_continued_and_pays_for_nothing_twice(tmp_path: Path):
    count, at_once = 120, 4
    source, out, run_dir = prompts(tmp_path / "in", *range(count)), tmp_path / "out", tmp_path / "out.run"
    answered = tmp_path / "answered"
    # --daemon: a process that has left the engine's process group.
    engine = fake_command("--latency", "0.05", "--daemon", "--answered-file", str(answered))
    rest = ("run", source, "-o", out, "--engine", "custom", "--model", "fake", "--max-concurrent", at_once)
    command = (*rest, "--model-kwarg", f"server_command={json.dumps(engine)}")
    # While the input is read and the engine loads, nothing has come yet.
    process = start(*command)
    wait_for((run_dir / "manifest.json").exists, process)
    kill(process)
    for number, code in ((signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGUSR1, 75), (signal.SIGKILL, -9)):
        process = start(*command)
        wait_for_rows(run_dir, len(kept_rows(run_dir)) + 5, process)
        got, stderr = end(process, number)
        assert got == code, stderr
        assert ("run the same command again to continue it" in stderr) == (code > 0)
        assert not out.exists()
    # An engine that gets stuck, so that there is something to wait for, and not to wait for.
    stuck = [*engine, *(word for number in range(6, 6 + at_once) for word in ("--stall-at", str(number), "60"))]
    process = start(*rest, "--model-kwarg", f"server_command={json.dumps(stuck)}", "--no-progress")
    wait_for_rows(run_dir, len(kept_rows(run_dir)) + 5, process)
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    while "stopping" not in process.stderr.readline():
        assert process.poll() is None
    assert end(process, signal.SIGTERM)[0] == 128 + signal.SIGTERM
    code, _, stderr = trinfer(*command, "--time-limit", "0:01")
    assert code == 75, stderr
    assert "the time limit is reached" in stderr
    done = len(kept_rows(run_dir))
    code, _, stderr = trinfer(*command)
    assert code == 0, stderr
    assert f"{count - done} rows in" in stderr
    assert f"{done} were done before" in stderr
    assert sorted(ids(out)) == list(range(count))
    assert all(row["generation"]["text"] == f"echo: {row['prompt']}" for row in rows(out))
    asked = Counter(answered.read_text().splitlines())
    assert len(asked) == count
    assert asked.total() <= count + 2 * at_once  # kill -9, and the second signal, drop what is under way
    # Three sessions ended in good order after some rows, two were killed, one ran out of time, and one was the last.
    assert figures(run_dir)["sessions"] in {4, 5}
    assert figures(run_dir)["requests"] >= count - (asked.total() - len(asked)) - 2 * (5 + 2 * at_once)


def test_stopping_in_good_order_pays_for_each_row_once_and_counts_it_once(tmp_path: Path):
    source, out, run_dir = prompts(tmp_path / "in", *range(40)), tmp_path / "out", tmp_path / "out.run"
    answered = tmp_path / "answered"
    engine = fake_command("--latency", "0.05", "--answered-file", str(answered))
    command = (
        *("run", source, "-o", out, "--engine", "custom", "--model", "fake", "--max-concurrent", "4"),
        *("--model-kwarg", f"server_command={json.dumps(engine)}", "--price-out", "1000000"),
    )
    process = start(*command)
    wait_for_rows(run_dir, 5, process)
    assert end(process, signal.SIGTERM)[0] == 75
    assert trinfer(*command)[0] == 0
    assert sorted(ids(out)) == list(range(40))
    assert Counter(answered.read_text().splitlines()).total() == 40
    found = figures(run_dir)
    assert (found["sessions"], found["requests"], found["cost"]) == (2, 40, 80.0)  # "echo:", and a word


def test_a_run_directory_has_one_trinfer_at_a_time_and_outlives_it(tmp_path: Path):
    source, out = prompts(tmp_path / "in", 1, 2, 3), tmp_path / "out"
    process = start("run", source, "-o", out, "--model-kwarg", "latency=30")
    wait_for(lambda: any(tmp_path.glob("out.run/manifest.json")), process)
    for arguments in (
        ["run", source, "-o", out],
        ["run", source, "-o", out, "--restart"],
        ["run", source, "-o", tmp_path / "other", "--run-dir", tmp_path / "out.run"],
        ["retry", tmp_path / "out.run"],
    ):
        code, _, stderr = here(*arguments)
        assert code == 4
        assert f"is in use by process {process.pid} on {socket.gethostname()}" in stderr
    kill(process)
    assert list((tmp_path / "out.run" / "owners").iterdir())  # it could not clean up
    assert here("run", source, "-o", out, "-q")[0] == 0
    assert sorted(ids(out)) == [1, 2, 3]


def test_publishing_may_be_killed_and_is_not_broken_off_by_a_signal(tmp_path: Path):
    # What hardly shrinks takes its time.
    source = write(tmp_path / "in", *({"id": i, "prompt": "p", "blob": os.urandom(15_000).hex()} for i in range(400)))
    out, partial = tmp_path / "out.jsonl.gz", tmp_path / "out.jsonl.gz.partial"
    command = ("run", source, "-o", out)

    def read() -> list[int]:
        with gzip.open(out) as file:
            return sorted(json.loads(line)["id"] for line in file)

    process = start(*command)
    wait_for(lambda: partial.exists() and partial.stat().st_size, process)
    kill(process)
    assert (out.exists(), partial.exists()) == (False, True)
    code, _, stderr = trinfer(*command)
    assert code == 0
    assert "400 were done before" in stderr
    assert "engine ready" not in stderr
    assert (read(), partial.exists()) == (list(range(400)), False)
    out.unlink()
    process = start(*command)
    wait_for(lambda: partial.exists() and partial.stat().st_size, process)
    code, stderr = end(process, signal.SIGTERM)
    assert (code, "stopping" in stderr, "not complete" in stderr) == (0, True, False)
    assert read() == list(range(400))
    assert "this run is finished" in here(*command)[2]


# -- disks ----------------------------------------------------------------------------------------------------------


def resize(disk: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(disk)], check=True)


def test_a_disk_that_fills_up_in_the_journal_and_in_publishing(tmp_path: Path, small_disk: Path):
    source = write(tmp_path / "in", *({"id": i, "prompt": "p", "blob": "y" * 2000} for i in range(200)))
    out = small_disk / "out"
    command = ("run", source, "-o", out)
    code, _, stderr = here(*command)
    assert (code, "No space left on device" in stderr) == (4, True)
    assert list(small_disk.iterdir()) == []  # nothing has come of it
    resize(small_disk, "size=450k")
    code, _, stderr = here(*command, "--max-concurrent", "16")
    assert (code, "writing the journal" in stderr) == (4, True)
    assert "make room" in stderr
    done = len(kept_rows(small_disk / "out.run"))
    assert 50 < done < 200
    resize(small_disk, "size=900k")
    code, _, stderr = here(*command)
    assert code == 4
    assert f"{200 - done} ok, 0 failed; {done} were done before" in stderr
    assert f"the output {out} failed: No space left on device" in stderr
    assert [path.name for path in small_disk.iterdir()] == ["out.run"]
    resize(small_disk, "size=4m")
    code, _, stderr = here(*command)
    assert (code, "200 were done before" in stderr) == (0, True)
    assert sorted(ids(out)) == list(range(200))


def test_a_disk_that_is_read_only_is_told_before_anything_is_paid_for(tmp_path: Path, small_disk: Path):
    source = prompts(tmp_path / "in", 1, 2)
    resize(small_disk, "size=1m")
    assert here("run", source, "-o", small_disk / "out", "-q")[0] == 0
    resize(small_disk, "ro")
    for arguments, words in (
        (["run", source, "-o", tmp_path / "x", "--run-dir", small_disk / "out.run"], "Read-only file system"),
        (["run", source, "-o", tmp_path / "x", "--run-dir", small_disk / "new"], "Read-only file system"),
        (["retry", small_disk / "out.run"], "is not writable"),
        (["run", source, "-o", small_disk / "new", "--run-dir", tmp_path / "rd"], "is not writable"),
        (["run", source, "-o", f"{small_disk}/parts/", "--run-dir", tmp_path / "rd"], "is not writable"),
    ):
        code, _, stderr = here(*arguments)
        assert code == 4
        assert words in stderr
        assert "rows in" not in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "small"]


# -- run directories ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["notes", "journal/monday", "stats.json", "errors.jsonl"])
def test_a_folder_that_is_no_run_directory_is_left_alone(tmp_path: Path, name: str):
    source, folder = prompts(tmp_path / "in", 1), tmp_path / "mine"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("precious")
    for more in ([], ["--restart"], ["--accept-changes", "--overwrite"]):
        code, _, stderr = here("run", source, "-o", tmp_path / "out", "--run-dir", folder, *more)
        assert code == 4
        assert f"holds something else: {name.split('/')[0]}" in stderr
    assert [path for path in folder.rglob("*") if path.is_file()] == [folder / name]
    assert (folder / name).read_text() == "precious"
    assert not (tmp_path / "out").exists()
    code, _, stderr = here("run", source, "-o", tmp_path / "out", "--run-dir", source)
    assert (code, "cannot be made: File exists" in stderr) == (4, True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"format": 1}',
        '{"format": 1, "job": 5}',
        '{"format": 1, "job": {}, "notes": []}',
        '{"format": 9}',
    ],
)
def test_a_damaged_manifest_is_told_and_restart_gets_over_it(tmp_path: Path, text: str):
    source, out = prompts(tmp_path / "in", 1), tmp_path / "out"
    assert here("run", source, "-o", out, "-q")[0] == 0
    manifest = tmp_path / "out.run" / "manifest.json"
    manifest.write_text(text)
    for arguments in (["run", source, "-o", out], ["retry", tmp_path / "out.run"]):
        code, _, stderr = here(*arguments)
        assert code == 4
        assert f"the manifest {manifest}" in stderr
        assert "what to do: " in stderr
        assert "unexpected" not in stderr
    assert here("run", source, "-o", out, "-q", "--restart")[0] == 0
    assert ids(out) == [1]


def test_a_journal_without_its_manifest_is_not_taken_for_another_run(tmp_path: Path):
    source, out = prompts(tmp_path / "in", 1), tmp_path / "out"
    assert here("run", source, "-o", out, "-q")[0] == 0
    (tmp_path / "out.run" / "manifest.json").unlink()
    code, _, stderr = here("run", source, "-o", out, "--overwrite", "--system-prompt", "another")
    assert (code, "it has no manifest.json" in stderr) == (4, True)


def test_a_damaged_journal_is_told_and_repaired(tmp_path: Path):
    source, out, run_dir = prompts(tmp_path / "in", *range(300)), tmp_path / "out", tmp_path / "out.run"
    command = ("run", source, "-o", out)
    assert here(*command, "-q", "--max-concurrent", "4")[0] == 0
    written = sorted(out.read_text().splitlines())
    [segment] = read_segments(run_dir / "journal" / "00000-of-00001")
    frames = list(segment.frames(verify=True))
    assert len(frames) > 6
    with segment.path.open("r+b") as file:
        for at in (frames[1].offset + 2, frames[4].bodies + 10):  # in the head of a commit, and in a row
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))
    lost = sum(len(list(frames[number].entries())) for number in (1, 4))
    out.unlink()
    code, _, stderr = here(*command)
    assert (code, "is damaged between bytes" in stderr) == (4, True)
    assert "run again with --repair" in stderr
    assert not out.exists()
    code, _, stderr = here(*command, "--repair")
    assert code == 0, stderr
    assert f"{lost} rows in" in stderr
    assert f"{300 - lost} were done before" in stderr
    assert "2 damaged parts were taken out of the journal" in stderr
    assert sorted(out.read_text().splitlines()) == written  # the dummy always says the same


def test_damage_that_only_reading_the_rows_shows_is_repaired_too(tmp_path: Path):
    """In a segment that is full already, rows are not looked into when a run is continued."""
    source, out, run_dir = prompts(tmp_path / "in", *range(40)), tmp_path / "out", tmp_path / "out.run"
    command = ("run", source, "-o", out)
    assert here(*command, "-q", "--max-concurrent", "2")[0] == 0
    folder = run_dir / "journal" / "00000-of-00001"
    [segment] = read_segments(folder)
    frame = next(iter(segment.frames(verify=True)))
    with segment.path.open("r+b") as file:
        file.seek(frame.bodies)
        file.write(b"?")
    prompts(source, *range(41))
    (folder / "000002.journal").write_bytes(b"")  # as a crash leaves one that was just begun
    for _ in range(2):
        code, _, stderr = here(*command)
        assert (code, "is damaged between bytes" in stderr) == (4, True)
    assert here(*command, "-q", "--repair", "--ordered")[0] == 0
    assert ids(out) == list(range(41))
    out.unlink()
    assert here(*command, "-q", "--ordered")[0] == 0  # what is repaired stays so
    assert ids(out) == list(range(41))


# -- outputs and inputs ---------------------------------------------------------------------------------------------


def test_an_output_that_is_somebody_elses_is_neither_replaced_nor_called_finished(tmp_path: Path):
    source, run_dir = prompts(tmp_path / "in", 1, 2), tmp_path / "rd"
    command = ("run", source, "--run-dir", run_dir, "-q")
    assert here(*command, "-o", tmp_path / "a")[0] == 0
    other = write(tmp_path / "b", {"precious": True})
    code, _, stderr = here(*command, "-o", other)
    assert (code, f"the output {other} exists already" in stderr) == (4, True)
    assert rows(other) == [{"precious": True}]
    assert here(*command, "-o", tmp_path / "c")[0] == 0  # a second place is no new work
    assert sorted(ids(tmp_path / "c")) == [1, 2]
    for name in ("c", "a"):
        assert here(*command, "-o", tmp_path / name)[0] == 0
    assert here(*command, "-o", other, "--overwrite")[0] == 0
    assert sorted(ids(other)) == [1, 2]
    assert figures(run_dir)["requests"] == 2
    # Parts in a folder are an output as well.
    parts = tmp_path / "parts"
    parts.mkdir()
    write(parts / "part-00000-of-00002-00000.jsonl", {"precious": True})
    code, _, stderr = here("run", source, "-o", f"{parts}/")
    assert (code, "exists already" in stderr) == (4, True)
    assert here("run", source, "-o", f"{parts}/", "--overwrite", "-q")[0] == 0
    assert [path.name for path in parts.iterdir()] == ["part-00000-of-00001-00000.jsonl"]


@pytest.mark.parametrize("run_dir", ["out.run", "elsewhere"])
def test_a_run_replaces_what_it_has_written_also_after_a_restart_that_failed_and_nothing_else(tmp_path: Path, run_dir):
    source, out = prompts(tmp_path / "in", 1, 2), tmp_path / "out"
    command = ("run", source, "-o", out, "--run-dir", tmp_path / run_dir, "-q", "--on-error", "fail")
    assert here(*command)[0] == 0
    write(source, {"id": 1, "prompt": "p1"}, "not json")
    assert here(*command, "--restart")[0] == 5
    assert sorted(ids(out)) == [1, 2]  # until there is something better
    prompts(source, 1, 3)
    assert here(*command)[0] == 0
    assert sorted(ids(out)) == [1, 3]
    # A file of somebody else, at the place where the run has not published yet.
    out.unlink()
    shutil.rmtree(tmp_path / run_dir)
    write(source, {"id": 1, "prompt": "p1"}, "not json")
    assert here(*command)[0] == 5
    write(out, {"precious": True})
    prompts(source, 1, 3)
    code, _, stderr = here(*command)
    assert (code, "exists already" in stderr) == (4, True)
    assert rows(out) == [{"precious": True}]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_the_run_directory_of_another_user_is_told(tmp_path: Path):
    source, out = prompts(tmp_path / "in", 1), tmp_path / "out"
    assert here("run", source, "-o", out, "-q")[0] == 0
    for folder in (tmp_path, *tmp_path.parents):  # pytest's folders are private
        if folder.is_relative_to(tempfile.gettempdir()):
            folder.chmod(0o755)
    os.seteuid(65534)
    try:
        code, _, stderr = here("run", source, "-o", out)
    finally:
        os.seteuid(0)
    assert (code, "is private to the user who has started the run" in stderr) == (4, True)


@pytest.mark.parametrize("output", ["out.jsonl", "parts/"])
def test_what_a_run_has_written_is_not_its_input(tmp_path: Path, output: str):
    folder = tmp_path / "data"
    folder.mkdir()
    prompts(folder / "in.jsonl", 1, 2, 3)
    command = ("run", folder, "-o", f"{folder}/{output}")
    assert here(*command, "-q")[0] == 0
    written = folder / "out.jsonl" if output == "out.jsonl" else next((folder / "parts").iterdir())
    assert "this run is finished: 3 rows" in here(*command)[2]
    written.unlink()
    code, _, stderr = here(*command)
    assert (code, "0 failed; 3 were done before" in stderr) == (0, True)
    assert sorted(ids(written)) == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["-o", "OUT.csv"], 2, "allowed are jsonl, parquet"),
        (["-o", "OUT.txt", "--no-durable"], 2, "allowed are jsonl, parquet"),
        (["-o", "OUT.parquet.gz"], 2, "Parquet is compressed within"),
        (["-o", "OUT" + 300 * "x"], 4, "File name too long"),
        (["-o", "OUT" + 300 * "x", "--no-durable"], 4, "File name too long"),
        (["-o", "OUT" + 300 * "x" + "/", "--run-dir", "OUT.rd"], 4, "File name too long"),
        (["-o", "OUT" + 247 * "x"], 4, "File name too long"),  # which NAME.run would not be
        (["-o", "no-such://x/out", "--run-dir", "OUT.rd"], 2, "no-such"),
        (["-o", "memory://x/out"], 2, "--run-dir FOLDER"),
        (["-o", "IN/"], 4, "is no folder"),
        (["-o", "IN/parts/", "--run-dir", "OUT.rd"], 4, "is no folder"),
        (["-o", "OUT/no/such/folder"], 4, "its folder does not exist"),
        (["-o", "-", "--durable"], 2, "is a stream"),
        (["-o", "OUT", "--no-durable", "--run-dir", "OUT.rd"], 2, "--run-dir needs a run directory"),
        (["-o", "OUT", "--no-durable", "--restart"], 2, "--restart needs a run directory"),
        (["-o", "OUT", "--no-durable", "--ordered"], 2, "--ordered needs a run directory"),
        (["-o", "OUT/", "--no-durable"], 2, "a folder of parts needs a run directory"),
        (["-o", "OUT", "--max-failures", "1.5"], 2, "--max-failures '1.5'"),
        (["-o", "OUT", "--price-in", "-1"], 2, "allowed are prices"),
        (["-o", "OUT", "--time-limit", "soon"], 2, "allowed are seconds"),
        (["-o", "OUT", "--limit", "0"], 2, "allowed are integers >= 1"),
        (["-o", "OUT", "--limit", "9" * 400], 2, "allowed are integers >= 1"),
        (["-o", "OUT", "--rollouts", "9" * 400], 2, "allowed are integers >= 1"),
        (["-o", "OUT", "--time-limit", "9" * 400 + "-1:00"], 2, "allowed are seconds"),
        (["-o", "OUT", "--template", "/no/such/template"], 4, "cannot be read"),
    ],
)
def test_mistakes_are_told_before_an_engine_starts_and_leave_nothing(tmp_path: Path, arguments, code, words):
    source = prompts(tmp_path / "in", 1)
    texts = [text.replace("OUT", str(tmp_path / "out")).replace("IN", str(source)) for text in arguments]
    # An engine that cannot be started: code 3 would tell that it was tried.
    got, stdout, stderr = here("run", source, *texts, "--engine", "vllm", "--model", "m", "--executable", "/no/vllm")
    assert (got, stdout) == (code, ""), stderr
    assert words in stderr
    assert "unexpected" not in stderr
    assert list(tmp_path.iterdir()) == [source]


def test_an_input_that_is_gone_or_emptied_costs_no_output(tmp_path: Path):
    source, out = prompts(tmp_path / "in", 1, 2), tmp_path / "out"
    assert here("run", source, "-o", out, "-q")[0] == 0
    source.write_text("\n\n")
    code, _, stderr = here("run", source, "-o", out)
    assert (code, "the input is empty" in stderr) == (4, True)
    source.unlink()
    code, _, stderr = here("run", source, "-o", out)
    assert (code, "No such file" in stderr) == (4, True)
    assert sorted(ids(out)) == [1, 2]


def test_the_output_of_one_input_is_not_replaced_by_that_of_another_by_mistake(tmp_path: Path):
    first, second, out = prompts(tmp_path / "first", 1, 2), prompts(tmp_path / "second", 3), tmp_path / "out"
    assert here("run", first, "-o", out, "-q")[0] == 0
    code, _, stderr = here("run", second, "-o", out)
    assert (code, "is finished, and was of other inputs" in stderr) == (2, True)
    assert sorted(ids(out)) == [1, 2]
    assert here("run", second, first, "-o", out, "-q")[0] == 0  # more of them are no mistake
    assert sorted(ids(out)) == [1, 2, 3]
    assert here("run", second, "-o", out, "--overwrite", "-q")[0] == 0
    assert ids(out) == [3]


def test_an_output_that_comes_up_while_the_run_works_is_not_replaced(tmp_path: Path):
    source, out = prompts(tmp_path / "in", 1, 2), tmp_path / "out"
    command = ("run", source, "-o", out, "--model-kwarg", "latency=1")
    process = start(*command)
    wait_for((tmp_path / "out.run" / "manifest.json").exists, process)
    write(out, {"precious": True})
    code, stderr = end(process)
    assert (code, "was made by somebody else while the run was under way" in stderr) == (4, True)
    assert rows(out) == [{"precious": True}]
    out.unlink()
    assert here(*command, "-q")[0] == 0
    assert sorted(ids(out)) == [1, 2]


# -- shards ---------------------------------------------------------------------------------------------------------


def test_shards_share_the_rows_and_are_retried_as_one(tmp_path: Path):
    source = prompts(tmp_path / "in", *range(40))
    command = ("run", source, "-o", f"{tmp_path}/out/", "-q")
    bad = ("--model-kwarg", "error_rate=0.3", "--model-kwarg", "error_status=400")
    for rank in range(3):
        assert here(*command, "--shard", f"{rank}/3", *bad)[0] == 1
    parts = sorted((tmp_path / "out").iterdir())
    assert [part.name for part in parts] == [f"part-0000{rank}-of-00003-00000.jsonl" for rank in range(3)]
    assert sorted(each for part in parts for each in ids(part)) == list(range(40))
    assert here("retry", tmp_path / "out.run", "-q", "--model-kwarg", "error_rate=0")[0] == 0
    parts = sorted((tmp_path / "out").iterdir())
    assert [part.name for part in parts] == ["part-00000-of-00001-00000.jsonl"]
    assert sorted(each for part in parts for each in ids(part)) == list(range(40))
    assert not any("error" in row for row in rows(parts[0]))


def test_every_shard_lists_its_failures_and_no_list_outlives_them(tmp_path: Path):
    source, run = prompts(tmp_path / "in", *range(40)), tmp_path / "out.run"
    command = ("run", source, "-o", f"{tmp_path}/out/", "--no-progress")
    bad = ("--model-kwarg", "error_rate=0.3", "--model-kwarg", "error_status=400")

    def lists() -> list[str]:
        return sorted(path.name for path in run.glob("errors*"))

    for rank in range(2):
        code, _, stderr = here(*command, "--shard", f"{rank}/2", *bad)
        assert code == 1
        [named] = [word.rstrip(";") for word in stderr.split() if "errors" in word]
        assert rows(run / os.path.basename(named))
    both = ["errors-00000-of-00002.jsonl", "errors-00001-of-00002.jsonl"]
    assert lists() == both
    assert here(*command, *bad, "--accept-changes")[0] == 1
    assert lists() == ["errors.jsonl"]
    for rank in range(2):
        assert here(*command, "--shard", f"{rank}/2", *bad)[0] == 1
    assert lists() == both
    assert here("retry", run, "-q", "--model-kwarg", "error_rate=0")[0] == 0
    assert lists() == []


def test_a_run_that_comes_to_nothing_takes_the_lists_of_its_shards_with_it(tmp_path: Path):
    source = prompts(tmp_path / "in", *range(40))
    command = ("run", source, "-o", f"{tmp_path}/out/", "--shard", "0/2", "-q")
    bad = ("--model-kwarg", "error_rate=1", "--model-kwarg", "error_status=400")
    assert here(*command, *bad, "--max-failures", "2")[0] == 5
    assert here(*command, "--restart", "--model-kwarg", "no_such=1")[0] in {2, 3}
    assert here(*command)[0] == 0


@pytest.mark.parametrize(
    ("shard", "output", "words"),
    [
        ("3/3", "out/", "allowed is RANK/COUNT"),
        ("x", "out/", "allowed is RANK/COUNT"),
        ("-1/3", "out/", "allowed is RANK/COUNT"),
        ("1/3", "out", "allowed is a folder"),
    ],
)
def test_shards_that_are_not_possible(tmp_path: Path, shard, output, words):
    code, _, stderr = here("run", prompts(tmp_path / "in", 1), "-o", f"{tmp_path}/{output}", f"--shard={shard}")
    assert (code, words in stderr) == (2, True)
