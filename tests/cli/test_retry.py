"""Rows that fail: skipped, tried again, stopped at, counted, listed, and run again by ``trinfer retry``."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from tests.batch.runs import kept_rows
from tests.cli.commands import figures, here, ids, prompts, rows, trinfer, write
from tests.engine_configs import fake_command

if TYPE_CHECKING:
    from pathlib import Path

GOOD = [{"id": number, "prompt": f"p{number}"} for number in range(6)]
LONG = {"id": "long", "prompt": "long " * 100}


def fake(*options: str, **files: Path) -> tuple[str, ...]:
    paths = [word for name, path in files.items() for word in (f"--{name.replace('_', '-')}", str(path))]
    command = json.dumps(fake_command(*options, *paths))
    return ("--engine", "custom", "--model", "fake", "--model-kwarg", f"server_command={command}")


def test_failed_rows_are_listed_with_their_place_and_only_they_are_run_again(tmp_path: Path):
    source = write(tmp_path / "in.jsonl", *GOOD[:3], "not json", LONG, {"id": 7, "q": "no prompt"}, *GOOD[3:])
    out, run_dir = tmp_path / "out.jsonl", tmp_path / "out.jsonl.run"
    # Names in the command begin where it was given.
    command = ("run", "in.jsonl", "-o", "out.jsonl", "--model-max-context", "50")
    code, _, stderr = trinfer(*command, cwd=tmp_path)
    assert code == 1
    assert "6 ok, 3 failed" in stderr
    assert "3 rows failed: see out.jsonl.run/errors.jsonl; `trinfer retry out.jsonl.run` runs them again" in stderr
    errors = {error["place"]: error for error in rows(run_dir / "errors.jsonl")}
    assert set(errors) == {"in.jsonl:4", "in.jsonl:5", "in.jsonl:6"}
    assert all(set(error) == {"id", "custom_id", "response", "error", "place"} for error in errors.values())
    assert errors["in.jsonl:4"]["response"] is None
    assert errors["in.jsonl:4"]["error"]["code"] == "InvalidRow"
    assert errors["in.jsonl:4"]["error"]["message"].startswith("in.jsonl:4: the line is not JSON")
    assert (errors["in.jsonl:5"]["custom_id"], errors["in.jsonl:5"]["error"]) == ("long", None)
    assert errors["in.jsonl:5"]["response"]["status_code"] == 400
    assert errors["in.jsonl:6"]["custom_id"] == "7"
    answered = {row["id"]: row["generation"] for row in rows(out) if "generation" in row}
    assert set(answered) == set(range(6))
    assert {row["id"]: row["error"]["type"] for row in rows(out) if "error" in row and row["id"] in {"long", 7}} == {
        "long": "ContextLengthError",
        7: "InvalidRow",
    }
    code, _, stderr = trinfer(*command, cwd=tmp_path)
    assert code == 1
    assert "9 rows in out.jsonl, 3 rows failed: `trinfer retry out.jsonl.run`" in stderr

    # What fails again is counted once, and what is mended is gone from the errors.
    code, _, stderr = trinfer("retry", run_dir, "--model-max-context", "500")
    assert code == 1
    assert "3 rows in" in stderr
    assert "1 ok, 2 failed; 6 were done before" in stderr
    assert len(rows(out)) == 9
    again = {row["id"]: row["generation"] for row in rows(out) if "generation" in row}
    assert again == {**answered, "long": again["long"]}
    assert {error["place"] for error in rows(run_dir / "errors.jsonl")} == {"in.jsonl:4", "in.jsonl:6"}
    found = figures(run_dir)
    assert (found["sessions"], found["requests"]) == (2, 7)
    assert found["output"] == {"rows": 9, "failed": 2, "removed": 0}
    assert found["failures"]["InvalidRow"]["count"] == 4  # tries, over both sessions
    assert "InvalidRow" in (run_dir / "report.html").read_text()

    write(source, *GOOD, LONG)
    code, _, stderr = here("retry", run_dir)
    assert (code, sorted(map(str, ids(out)))) == (0, ["0", "1", "2", "3", "4", "5", "long"])
    assert not (run_dir / "errors.jsonl").exists()
    assert "7 were done before" in stderr


def test_an_input_that_fails_stops_the_run_and_a_mended_one_continues_it(tmp_path: Path):
    source, out, answered = tmp_path / "in.jsonl", tmp_path / "out", tmp_path / "answered"
    command = ("run", source, "-o", out, "--on-error", "fail", "--max-concurrent", "1")
    command = (*command, *fake(answered_file=answered))
    write(source, *GOOD, "{}")
    code, _, stderr = trinfer(*command)
    assert code == 5
    assert stderr.count("in.jsonl:7") == 1
    assert "in.jsonl:7: the row has no field 'messages' or 'prompt' or 'text'" in stderr
    assert "--on-error skip" in stderr
    assert "run the same command again to continue it" in stderr
    assert not out.exists()
    assert len(kept_rows(tmp_path / "out.run")) == 6
    write(source, *GOOD, {"id": 6, "prompt": "p6"})
    assert trinfer(*command)[0] == 0
    assert sorted(ids(out)) == list(range(7))
    assert Counter(answered.read_text().splitlines()) == {f'"p{number}"': 1 for number in range(7)}


def test_rows_are_tried_again_where_that_may_help(tmp_path: Path):
    source, out = write(tmp_path / "in", *GOOD), tmp_path / "out"
    # The client tries a status of 500 once more by itself.
    engine = fake("--status-at", "3", "500", "--status-at", "4", "500")
    command = ("run", source, "-o", out, "--max-concurrent", "1", *engine)
    code, _, stderr = here(*command)
    assert (code, "5 ok, 1 failed" in stderr) == (1, True)
    assert [error["response"]["status_code"] for error in rows(tmp_path / "out.run" / "errors.jsonl")] == [500]
    code, _, stderr = here(*command, "--restart", "--on-error", "retry")
    assert (code, "6 ok, 0 failed" in stderr) == (0, True)
    assert sorted(ids(out)) == list(range(6))


@pytest.mark.parametrize(
    ("budget", "failing", "stops"),
    [("0", 1, True), ("2", 2, False), ("2", 3, True), ("1%", 2, True), ("34%", 2, False)],
)
def test_a_budget_of_failures_stops_the_run(tmp_path: Path, budget: str, failing: int, stops: bool):
    source, out, run_dir = tmp_path / "in", tmp_path / "out", tmp_path / "out.run"
    bad = [{**LONG, "id": f"long {number}"} for number in range(failing)]
    write(source, *GOOD[:4], *bad)
    command = ("run", source, "-o", out, "--model-max-context", "50", "--max-failures", budget)
    code, _, stderr = here(*command)
    if not stops:
        assert code == 1
        assert len(rows(out)) == 4 + failing
        return
    assert code == 5
    assert f"{failing} of " in stderr
    assert f"ContextLengthError {failing}" in stderr
    assert "errors.jsonl in the run directory lists them all), and run `trinfer retry`" in stderr
    errors = rows(run_dir / "errors.jsonl")
    assert sorted(error["place"] for error in errors) == [f"in:{number}" for number in range(5, 5 + failing)]
    assert not out.exists()
    # The budget is that of the run, and not of each try.
    code, _, stderr = here(*command)
    assert (code, f"{failing} before" in stderr) == (5, True)
    assert not out.exists()
    code, _, stderr = here("retry", run_dir, "--model-max-context", "500")
    assert code == 0, stderr
    assert len(ids(out)) == len(set(ids(out))) == 4 + failing
    assert figures(run_dir)["requests"] == 4 + failing
    assert not (run_dir / "errors.jsonl").exists()


def test_a_retry_with_changes_is_refused_until_they_are_accepted(tmp_path: Path):
    source, out, run_dir = write(tmp_path / "in", *GOOD, LONG), tmp_path / "out", tmp_path / "out.run"
    assert here("run", source, "-o", out, "--model-max-context", "50", "-q", "--accept-changes")[0] == 1
    more = ("--model-max-context", "500", "--param", "max_tokens=1")
    code, _, stderr = here("retry", run_dir, *more)
    assert (code, "+ params.max_tokens = 1" in stderr) == (2, True)
    assert here("retry", run_dir, *more, "--accept-changes")[0] == 0
    words = {row["id"]: row["generation"]["usage"]["completion_tokens"] for row in rows(out)}
    assert words.pop("long") == 1
    assert all(count > 1 for count in words.values())
    # It is the run's parameter now, and the next retry knows it; others are refused again.
    write(source, *GOOD, LONG, "not json")
    assert here("retry", run_dir)[0] == 1
    assert here("retry", run_dir, "--param", "top_p=1")[0] == 2


def test_mistakes_of_a_retry(tmp_path: Path):
    source = prompts(tmp_path / "in", 1)
    for path, words in (
        (tmp_path / "none", "is no run directory"),
        (tmp_path, "is no run directory"),
        (source, "cannot be read: Not a directory"),
    ):
        code, _, stderr = here("retry", path)
        assert (code, words in stderr) == (4, True)
        assert "unexpected" not in stderr
    code, _, stderr = here("retry")
    assert (code, "arguments are required: RUN_DIR\n" in stderr) == (2, True)
    out, run_dir = tmp_path / "out", tmp_path / "out.run"
    assert here("run", source, "-o", out, "-q")[0] == 0
    assert here("retry", run_dir, "--no-such-option")[0] == 2
    manifest = json.loads((run_dir / "manifest.json").read_text())
    for notes, code, words in (
        ({**manifest["notes"], "folder": "/no/such/folder"}, 4, "where the run was started, is not there"),
        ({}, 2, "InferenceRunner with retry_failed=True"),
    ):
        (run_dir / "manifest.json").write_text(json.dumps({**manifest, "notes": notes}))
        got, _, stderr = here("retry", run_dir)
        assert (got, words in stderr) == (code, True)
    assert ids(out) == [1]


def test_a_run_of_standard_input_is_retried_with_that_input(tmp_path: Path):
    out, run_dir = tmp_path / "out", tmp_path / "out.run"
    lines = "".join(json.dumps(row) + "\n" for row in (*GOOD, LONG)).encode()
    assert trinfer("run", "-", "-o", out, "--model-max-context", "50", "-q", stdin=lines)[0] == 1
    written = out.read_bytes()
    code, _, stderr = trinfer("retry", run_dir, "--model-max-context", "500")
    assert (code, "give the whole input again" in stderr) == (4, True)
    assert out.read_bytes() == written
    assert trinfer("retry", run_dir, "--model-max-context", "500", stdin=lines)[0] == 0
    assert len(ids(out)) == 7


def failures(folder: Path) -> list[object]:
    return [row["id"] for row in rows(folder / "out") if "error" in row]


def test_a_run_that_was_moved_or_copied_is_retried_where_it_is_now(tmp_path: Path):
    before, after, copy = (tmp_path / name for name in ("before", "after", "copy"))
    before.mkdir()
    write(before / "in", *GOOD, LONG)
    limits = ("--model-max-context", "50", "-q")
    assert trinfer("run", "in", "-o", "out", *limits, cwd=before)[0] == 1
    shutil.copytree(before, copy)
    before.rename(after)
    more = ("--model-max-context", "500")
    assert here("retry", after / "out.run", *more)[0] == 0
    assert failures(after) == []
    assert (failures(copy), before.exists()) == (["long"], False)
    # The original is there again: the copy's retry writes over the copy's output only.
    after.rename(before)
    written = (before / "out").read_bytes()
    assert here("retry", copy / "out.run", *more)[0] == 0
    assert failures(copy) == []
    assert (before / "out").read_bytes() == written


def test_a_retry_repeats_the_last_command_of_a_run_and_not_its_first(tmp_path: Path):
    first = prompts(tmp_path / "first.jsonl", *range(20))
    second = prompts(tmp_path / "second.jsonl", *range(20, 40))
    bad = ("--model-kwarg", "error_rate=0.4", "--model-kwarg", "error_status=400")
    out = tmp_path / "out.jsonl"
    assert here("run", first, "-o", out, "-q", "--limit", "3")[0] == 0
    assert here("run", first, second, "-o", out, "-q", *bad)[0] == 1
    assert here("retry", f"{out}.run", "-q", "--model-kwarg", "error_rate=0")[0] == 0
    assert sorted(ids(out)) == list(range(40))
    # A command that was refused was none.
    assert here("run", prompts(tmp_path / "other.jsonl", 77), "-o", out, "-q")[0] == 2
    # What was given to one retry only is not repeated by the next.
    assert here("retry", f"{out}.run", "-q", "--limit", "3")[0] == 0
    assert len(ids(out)) == 3
    assert here("retry", f"{out}.run", "-q")[0] == 0
    assert sorted(ids(out)) == list(range(40))
