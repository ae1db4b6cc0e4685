"""The figures of a run: over sessions, in the browser, and for programs."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser import browser, needs_browser
from trinfer import Document, InferenceConfig, InferenceRunner
from trinfer.batch.report import render
from trinfer.batch.stats import Prices, Session, statistics, total
from trinfer.batch.summary import Histogram, Summary
from trinfer.durable.manifest import Manifest
from trinfer.errors import InferenceError
from trinfer.results import InferenceResult

if TYPE_CHECKING:
    from pathlib import Path

NASTY = "</pre><script>document.title = 'hacked'</script><img src=x onerror=\"document.title = 'hacked'\">"

FIGURES = """
return [...document.querySelectorAll("figure")].map(figure => {
    const page = document.body.getBoundingClientRect(), svg = figure.querySelector("svg").getBoundingClientRect();
    const inside = each => {
        const box = each.getBoundingClientRect();
        return box.left >= svg.left - 1 && box.right <= svg.right + 1 && box.top >= svg.top - 1
            && box.bottom <= svg.bottom + 1;
    };
    const drawn = [...figure.querySelectorAll("polyline, rect, text")];
    return {
        title: figure.querySelector("figcaption").textContent,
        lines: figure.querySelectorAll("polyline").length,
        bars: figure.querySelectorAll("rect").length,
        fits: drawn.every(inside) && svg.right <= page.right + 1,
        size: [svg.width, svg.height],
        texts: [...figure.querySelectorAll("text")].map(each => each.textContent),
    };
});
"""


@needs_browser
def test_the_report_in_a_browser(tmp_path: Path):
    async def rollout(document: Document, generate: Any) -> Any:
        result = await generate({"messages": [{"role": "user", "content": document.text}], "max_tokens": 40})
        if document.metadata["n"] % 50 == 7:
            raise ValueError(NASTY)
        return result

    source = [Document("word " * (1 + n), f"d{n}", metadata={"n": n}) for n in range(300)]
    config = InferenceConfig("dummy", NASTY[:50], model_kwargs={"latency": 0.05})
    runner = InferenceRunner(
        rollout, config, source, tmp_path / "o.jsonl", on_error="skip", max_concurrent_generations=5
    )
    runner.run_sync()
    run = tmp_path / "o.jsonl.run"
    figures = json.loads((run / "stats.json").read_text())
    assert (figures["output"]["rows"], figures["output"]["failed"]) == (294, 6)
    assert figures["requests"] == 300
    with browser() as page:
        page.open(f"file://{run}/report.html")
        assert page.run("return document.title") == f"Run of {NASTY[:50]}"
        shown = {each["title"]: each for each in page.run(FIGURES)}
        assert all(each["fits"] for each in shown.values()), shown
        assert all(each["size"][0] > 300 and each["size"][1] > 100 for each in shown.values()), shown
        assert shown["rows per second"]["lines"] == 1
        assert shown["latency in seconds: median, and p99 above it"]["lines"] == 2
        for name in ("latency, seconds", "tokens of a prompt", "tokens of a generation"):
            assert shown[name]["bars"] > 1
            assert "0" in shown[name]["texts"]
        text = page.run("return document.body.innerText")
        assert NASTY in text
        facts = dict(line.split("\t") for line in text.splitlines() if line.count("\t") == 1)
        assert facts["rows in the output"] == "294"
        assert facts["rows that failed"] == "6"
        assert facts["tokens in"] == f"{figures['prompt_tokens']:,}"
        assert page.complaints() == []
        # On a telephone, nothing has to be pushed sideways.
        page.call("POST", "/window/rect", {"width": 500, "height": 900})
        page.open(f"file://{run}/report.html")
        assert page.run("return document.documentElement.scrollWidth <= window.innerWidth")


def a_session(rows: int, *, tokens: int = 10, latency: float = 0.5) -> dict[str, Any]:
    summary = Summary(ok=rows)
    for _ in range(rows):
        usage = {"prompt_tokens": 3, "completion_tokens": tokens}
        summary.add_request(InferenceResult("x", "stop", usage), latency)
    summary.add_failure(0, InferenceError("no"))
    return {**Session(summary).to_json(), "seconds": 2.0}


def test_sessions_add_up():
    sessions = [a_session(10), a_session(30, tokens=1000, latency=8.0)]
    prices = Prices(tokens_in=1_000_000, tokens_out=2_000_000, gpu_hour=900, gpus=2)
    figures = statistics(sessions, prices, {"rows": 42})
    assert json.loads(json.dumps(figures)) == figures
    assert figures["output"] == {"rows": 42}
    assert (figures["sessions"], figures["seconds"]) == (2, 4.0)
    assert figures["requests"] == 40
    assert figures["prompt_tokens"] == 120
    assert figures["completion_tokens"] == 100 + 30_000
    assert figures["tokens_out_per_second"] == 30_100 / 4
    assert figures["failures"] == {"InferenceError": {"count": 2, "first": "no"}}
    assert figures["finish_reasons"] == {"stop": 40}
    assert figures["percentiles"]["latency_seconds"]["p50"] == pytest.approx(8.0, rel=0.05)
    assert figures["percentiles"]["completion_tokens"]["p99"] == pytest.approx(1000, rel=0.05)
    assert figures["cost"] == pytest.approx(120 * 1 + 30_100 * 2 + 4 / 3600 * 900 * 2)
    assert statistics(sessions, Prices(), {})["cost"] is None


def test_a_run_of_nothing_has_a_report():
    sessions: list[dict[str, Any]] = []
    figures = statistics(sessions, Prices(), {"rows": 0, "failed": 0, "removed": 0})
    page = render(figures, total(sessions), sessions, Manifest({}))
    assert "too short to tell" in page
    assert figures["rows_per_second"] == 0


def test_percentiles_are_near_and_differences_are_what_came_since():
    histogram = Histogram()
    for value in range(1, 1001):
        histogram.add(value)
    for percent in (1, 25, 50, 90, 99):
        assert histogram.percentile(percent) == pytest.approx(10 * percent, rel=0.1)
    before = Histogram(histogram.counts)
    histogram.add(5.0)
    assert (histogram - before).total == 1
    assert (histogram - before).percentile(50) == pytest.approx(5.0, rel=0.05)
    assert Histogram().percentile(50) is None
    zero = Histogram()
    zero.add(0)
    assert zero.percentile(50) == 0.0
    assert list(zero.bars()) == []


def test_a_long_session_keeps_a_bounded_timeline(monkeypatch):
    monkeypatch.setattr("trinfer.batch.stats.time.monotonic", lambda: now)
    now = 0.0
    summary = Summary()
    session = Session(summary)
    for _ in range(5000):
        now += 1.0
        summary.ok += 3
        session.sample()
    points = session.to_json()["timeline"]
    assert 200 <= len(points) <= 401
    assert points[-1][0] == pytest.approx(5000, abs=20)
    rates = {(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(points)}
    assert rates == {3.0}
