"""The report of a run: one HTML page with its figures as SVG, without scripts and without anything from elsewhere."""

from __future__ import annotations

import json
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trinfer.batch.summary import Histogram, Summary
    from trinfer.durable.manifest import Manifest

__all__ = ["render"]

WIDTH, HEIGHT = 500, 170
LEFT, BOTTOM, TOP = 64, 24, 12
MAX_BARS = 60
DARK, LIGHT = "#2f6fab", "#d08a3c"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #1c2733; }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse } td, th { padding: .2em 1em .2em 0; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
figure { display: inline-block; margin: 0 1em 1.2em 0; max-width: 100% } figcaption { font-weight: 600 }
svg { max-width: 100%; height: auto; display: block }
svg text { font: 11px system-ui, sans-serif; fill: #55606b } pre { background: #f4f6f8; padding: 1em; overflow: auto }
"""


def render(
    figures: Mapping[str, Any], summary: Summary, sessions: Sequence[Mapping[str, Any]], manifest: Manifest
) -> str:
    """The page, whole."""
    line = _timelines(sessions)
    title = f"Run of {escape(str(manifest.job.get('model') or manifest.job.get('engine') or 'a model'))}"
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>',
        f"<body><h1>{title}</h1>",
        _table(_facts(figures)),
        "<h2>Over time</h2>",
        _curve("rows per second", line["rate"]),
        _curve("tokens per second, in and out", line["tokens"]),
        _curve("latency in seconds: median, and p99 above it", line["p50"], line["p99"]),
        _curve("requests in flight", line["in_flight"]),
        "<h2>Distributions</h2>",
        _bars("latency, seconds", summary.latency),
        _bars("tokens of a prompt", summary.prompt_lengths),
        _bars("tokens of a generation", summary.completion_lengths),
        "<h2>How generations ended</h2>",
        _table([(reason, f"{count:,}") for reason, count in summary.finish_reasons.most_common()]),
    ]
    if summary.failures:
        parts += ["<h2>Failures</h2>", _failures(summary)]
    job = escape(json.dumps(dict(manifest.job), indent=1, default=str))
    parts += ["<h2>What was run</h2>", f"<pre>{job}</pre></body></html>"]
    return "\n".join(parts) + "\n"


def _facts(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    output = figures["output"]
    latency = figures["percentiles"]["latency_seconds"]
    facts = [
        ("rows in the output", f"{output['rows']:,}"),
        ("rows that failed", f"{output['failed']:,}"),
        ("rows without results", f"{output['removed']:,}"),
        ("sessions", f"{figures['sessions']:,}"),
        ("time", f"{figures['seconds']:,.1f} s"),
        ("rows per second", f"{figures['rows_per_second']:,.1f}"),
        ("requests", f"{figures['requests']:,}"),
        ("answers used again", f"{figures['cache_hits']:,}"),
        ("tokens in", f"{figures['prompt_tokens']:,}"),
        ("tokens out", f"{figures['completion_tokens']:,} ({figures['tokens_out_per_second']:,.0f} per second)"),
        ("restarts of the engine", f"{figures['engine_restarts']:,}"),
        ("latency", ", ".join(f"{name} {value:.3g} s" for name, value in latency.items() if value is not None)),
    ]
    if figures["cost"] is not None:
        facts.append(("cost", f"{figures['cost']:,.4f}"))
    return facts


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td>{escape(name)}<td class=n>{escape(value)}" for name, value in rows)
    return f"<table>{cells}</table>"


def _failures(summary: Summary) -> str:
    rows = "".join(
        f"<tr><td>{escape(kind)}<td class=n>{count:,}<td>{escape(first[:300])}"
        for kind, (count, first) in sorted(summary.failures.items())
    )
    return f"<table><tr><th>kind<th>rows<th>the first{rows}</table>"


def _timelines(sessions: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Points (seconds of work, value) of all sessions, one after the other."""
    lines: dict[str, list[tuple[float, float]]] = {name: [] for name in ("rate", "tokens", "in_flight", "p50", "p99")}
    start = 0.0
    for session in sessions:
        points = session["timeline"]
        for before, point in pairwise(points):
            seconds = point[0] - before[0]
            if seconds > 0:
                at = start + point[0]
                lines["rate"].append((at, (point[1] - before[1]) / seconds))
                lines["tokens"].append((at, (point[2] - before[2]) / seconds))
                lines["in_flight"].append((at, point[3]))
                if point[5]:  # anything was answered
                    lines["p50"].append((at, point[4]))
                    lines["p99"].append((at, point[5]))
        start += session["seconds"]
    return lines


def _curve(title: str, points: Sequence[tuple[float, float]], above: Sequence[tuple[float, float]] = ()) -> str:
    if len(points) < 2:
        return _figure(title, '<text x="64" y="90">too short to tell</text>')
    first, last = points[0][0], points[-1][0]
    highest = max(value for _, value in (*points, *above)) or 1.0

    def place(at: float, value: float) -> str:
        x = LEFT + (WIDTH - LEFT) * (at - first) / ((last - first) or 1.0)
        y = HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * value / highest
        return f"{x:.1f},{y:.1f}"

    drawn = ""
    for line, colour in ((above, LIGHT), (points, DARK)):
        if line:
            corners = " ".join(place(at, value) for at, value in line)
            drawn += f'<polyline points="{corners}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
    return _figure(title, drawn + _axes(_duration(first), _duration(last), highest))


def _bars(title: str, histogram: Histogram) -> str:
    bars = list(histogram.bars())
    while len(bars) > MAX_BARS:
        bars = [(bars[n][0], sum(count for _, count in bars[n : n + 2])) for n in range(0, len(bars), 2)]
    if not bars:
        return _figure(title, '<text x="64" y="90">none</text>')
    highest = max(count for _, count in bars)
    width = (WIDTH - LEFT) / len(bars)
    drawn = ""
    for number, (middle, count) in enumerate(bars):
        tall = (HEIGHT - BOTTOM - TOP) * count / highest
        x, y = LEFT + number * width, HEIGHT - BOTTOM - tall
        drawn += (
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(1.0, width - 1):.1f}" height="{tall:.1f}" fill="{DARK}">'
            f"<title>{_number(middle)}: {count:,}</title></rect>"
        )
    return _figure(title, drawn + _axes(_number(bars[0][0]), _number(bars[-1][0]), highest))


def _axes(first: str, last: str, highest: float) -> str:
    base = HEIGHT - BOTTOM
    return (
        f'<path d="M{LEFT},{TOP}V{base}H{WIDTH}" fill="none" stroke="#c3cad1"/>'
        f'<text x="{LEFT - 5}" y="{TOP + 8}" text-anchor="end">{_number(highest)}</text>'
        f'<text x="{LEFT - 5}" y="{base}" text-anchor="end">0</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 6}">{first}</text>'
        f'<text x="{WIDTH}" y="{HEIGHT - 6}" text-anchor="end">{last}</text>'
    )


def _figure(title: str, drawn: str) -> str:
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" role="img">{drawn}</svg>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
