"""Progress and summary: what they say, and where."""

from __future__ import annotations

import sys

import pytest

from trinfer import BadRequestError, InferenceResult
from trinfer.batch.summary import Summary
from trinfer.observe import progress
from trinfer.observe.progress import LineProgress, SilentProgress, describe, show_progress


def summary(ok: int = 0, failed: int = 0) -> Summary:
    made = Summary(engine="ready")
    for _ in range(ok):
        made.ok += 1
        made.bytes_read += 10
        made.add_request(InferenceResult("x", "stop", {"prompt_tokens": 2, "completion_tokens": 5}), 0.5)
    for number in range(failed):
        made.add_failure(10, BadRequestError(f"no\n  {number}" + "!" * 1000))
    return made


def test_a_summary_tells_rows_tokens_reasons_and_the_first_failure_of_each_kind():
    made = summary(ok=8, failed=2)
    made.ready_after = 1.25
    lines = describe(made, 4.0).splitlines()
    assert lines[0] == "10 rows in 4.0 s: 8 ok, 2 failed (engine ready after 1.2 s)"
    assert lines[1] == "tokens: 16 in, 40 out, 10 out per second"
    assert lines[2].startswith("latency: p50 0.5")
    assert lines[3] == "finished by: stop 8"
    assert lines[4].startswith("failed: BadRequestError 2, first: no 0!")
    assert len(lines) == 5
    assert len(lines[4]) < 400
    made.skipped, made.cache_hits, made.removed = 7, 3, 1
    said = describe(made, 4.0, cost=1.5)
    for part in ("; 7 were done before", "answers used again: 3", "cost: 1.5000", "1 without results"):
        assert part in said


def test_an_empty_run_of_no_time():
    assert describe(Summary(), 0.0).splitlines()[0] == "0 rows in 0.0 s: 0 ok, 0 failed"


def test_lines_come_now_and_then_with_rate_and_time_left(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    lines = LineProgress(total_bytes=1000)
    for second in range(1, 21):
        clock[0] = 100.0 + second
        lines.update(summary(ok=second))
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 4
    assert err.splitlines()[-1] == (
        " 20 %  20 rows  1.0 rows/s  2 in, 5 out tokens/s  0 in flight  80 rows, 0:01:20 left"
    )


def test_neither_the_start_of_the_engine_nor_earlier_sessions_count_for_the_time_left(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    lines = LineProgress(total_bytes=2000)
    made = summary(ok=50)
    made.ready_after, made.skipped = 300.0, 50
    made.bytes_read += 500
    clock[0] += 310.0
    lines.update(made)
    assert capsys.readouterr().err.endswith("50 done before  100 rows, 0:00:20 left\n")


def test_without_a_known_size_there_is_no_time_left(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    lines = LineProgress(total_bytes=None)
    clock[0] = 110.0
    lines.update(summary(ok=1, failed=1))
    err = capsys.readouterr().err
    assert "left" not in err
    assert "1 failed" in err


def test_what_is_shown_depends_on_where_it_goes():
    with show_progress(10, wanted=False) as shown:
        assert isinstance(shown, SilentProgress)
        shown.update(Summary())
    assert not sys.stderr.isatty()
    with show_progress(10, wanted=True) as shown:
        assert isinstance(shown, LineProgress)


@pytest.mark.parametrize("total", [None, 0, 100])
def test_a_bar_shows_counts_and_is_gone_afterwards(monkeypatch, capsys, total):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with show_progress(total, wanted=True) as bar:
        bar.update(summary(ok=3))
        clock[0] += 0.05
        bar.update(summary(ok=4))  # too soon: not drawn
        clock[0] += 0.1
        bar.update(summary(ok=5))
    err = capsys.readouterr().err
    assert "3 rows  " in err
    assert "4 rows  " not in err
    assert "5 rows  " in err
    assert ("5 rows, 0:00:00 left" in err) == bool(total)


def test_what_the_engine_is_doing_is_said_while_nothing_else_happens(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    lines = LineProgress(total_bytes=100)
    clock[0] = 160.0
    lines.update(Summary(engine="load weights"))
    assert capsys.readouterr().err.startswith("engine: load weights, 60 s  0 rows")
