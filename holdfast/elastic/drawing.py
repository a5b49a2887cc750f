"""A report as one HTML page that needs nothing else: numbers, a timeline of every rank, and a card for each incident."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from html import escape

from holdfast.elastic.accounting import Kind, Span
from holdfast.elastic.incidents import Incident
from holdfast.elastic.report import Report

COLORS: Mapping[str, str] = {  # Okabe and Ito's, told apart without seeing red and green; good work is the quiet one
    Kind.PRODUCTIVE: "#b9d7ea",
    Kind.STALL: "#f0e442",
    Kind.LOST: "#d55e00",
    Kind.DETECTION: "#cc79a7",
    Kind.RESTART: "#0072b2",
    Kind.STARTUP: "#8a94a0",
    Kind.RESTORE: "#009e73",
    Kind.ENDING: "#d9d2c5",
}
_PHASES = ("#cc79a7", "#0072b2", "#8a94a0", "#009e73", "#56b4e9", "#e69f00", "#004d40", "#d55e00", "#999933", "#b9d7ea")
_WIDTH, _LEFT, _ROW, _MOST_ROWS = 1000, 64, 16, 48
_VISIBLE = 1.5
"""A span is drawn at least this wide, or a ten-second incident would be lost in a week."""

_STYLE = """
:root { --ink: #1d242b; --quiet: #5b6670; --line: #dfe4e8; --paper: #fff; --card: #f6f8f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaed; --quiet: #9aa6b0; --line: #37424b; --paper: #14191d; --card: #1d242a; }
}
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; max-width: 1080px;
  padding: 28px 20px 60px; }
h1 { font-size: 24px; margin: 0 0 2px; } h2 { font-size: 17px; margin: 34px 0 10px; }
p { margin: 4px 0; } .quiet { color: var(--quiet); }
.numbers { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0; }
.numbers div { background: var(--card); border-radius: 8px; padding: 10px 16px; min-width: 120px; }
.numbers b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } td, th { padding: 3px 14px 3px 0; text-align: left; }
td.n, th.n { text-align: right; } tr + tr td { border-top: 1px solid var(--line); }
svg { width: 100%; height: auto; display: block; margin-bottom: 12px; }
svg text { font: 11px system-ui, sans-serif; fill: var(--quiet); }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 6px; }
.legend span { margin-right: 16px; white-space: nowrap; }
.incident { background: var(--card); border-radius: 8px; padding: 12px 16px; margin: 10px 0; } .incident b { font-size: 16px; }
"""


def to_html(report: Report) -> str:
    """The page. It loads nothing, runs no script, and can be sent by mail."""
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(report.run)}: holdfast report</title>",
        f'<meta name=viewport content="width=device-width"><style>{_STYLE}</style>',
        f"<h1>{escape(report.run)}</h1><p class=quiet>{_when(report.began_s)} to {_when(report.ended_s)}</p>",
        *_numbers(report),
        "<h2>Where the time went</h2>",
        *_timeline(report),
        *_classes(report),
        "<h2>Incidents</h2>",
        *(_incident(item) for item in report.incidents),
        "" if report.incidents else "<p>None.</p>",
        "<h2>What follows</h2>",
        *_advice(report),
        "</html>",
    ]
    return "\n".join(parts)


def seconds(value: float) -> str:
    """0.25 s, 12.1 s, 3 min 20 s, 2 h 05 min, 3 d 4 h."""
    if value < 120:
        return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
    if value < 7200:
        return f"{int(value // 60)} min {int(value % 60):02d} s"
    if value < 172_800:
        return f"{int(value // 3600)} h {int(value % 3600 // 60):02d} min"
    return f"{int(value // 86_400)} d {int(value % 86_400 // 3600)} h"


def _when(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))


def _numbers(report: Report) -> Iterator[str]:
    worlds = [str(world) for place, world in enumerate(report.worlds) if not place or world != report.worlds[place - 1]]
    lost = sum(incident.steps_lost for incident in report.incidents)
    items = {
        "effective training time": f"{report.ettr:.2%}",
        "last step": f"{report.last_step:,}",
        "ranks": " → ".join(worlds),
        "incidents": str(len(report.incidents)),
        "steps done twice": str(lost),
        "a step": seconds(report.account.step_s),
    }
    yield "<div class=numbers>"
    yield from (f"<div><b>{escape(value)}</b>{name}</div>" for name, value in items.items())
    yield "</div>"


# -- the timeline ------------------------------------------------------------------------------------------------------------


def _timeline(report: Report) -> Iterator[str]:
    ranks = sorted({span.rank for span in report.account.spans})
    shown = ranks[:_MOST_ROWS]
    whole = max(report.ended_s - report.began_s, 1e-9)
    scale = (_WIDTH - _LEFT) / whole
    height = len(shown) * _ROW + 34
    yield f'<svg viewBox="0 0 {_WIDTH} {height}" role=img aria-label="timeline of every rank">'
    for place, rank in enumerate(shown):
        y = 18 + place * _ROW
        yield f'<text x="{_LEFT - 8}" y="{y + 10}" text-anchor="end">rank {rank}</text>'
        spans = sorted(
            (span for span in report.account.spans if span.rank == rank), key=lambda span: span.kind != Kind.PRODUCTIVE
        )
        yield from (_bar(span, report.began_s, scale, y) for span in spans)
    for incident in report.incidents:
        x = _LEFT + (incident.time_s - report.began_s) * scale
        yield f'<path d="M{x:.1f} 14V{height - 16}" stroke="var(--ink)" stroke-dasharray="2 2"/>'
        yield f'<text x="{x:.1f}" y="10" text-anchor="middle">{incident.attempt - 1}</text>'
    yield from _axis(whole, scale, height)
    yield "</svg>"
    if len(ranks) > len(shown):
        yield f"<p class=quiet>and {len(ranks) - len(shown)} more ranks, counted below</p>"


def _bar(span: Span, began_s: float, scale: float, y: int) -> str:
    x, width = _LEFT + (span.start_s - began_s) * scale, max(span.seconds * scale, _VISIBLE)
    title = f"rank {span.rank}, attempt {span.attempt}: {span.kind}, {seconds(span.seconds)}"
    return (
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_ROW - 4}" fill="{COLORS[span.kind]}">'
        f"<title>{title}</title></rect>"
    )


def _axis(whole_s: float, scale: float, height: int) -> Iterator[str]:
    steps = (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21_600, 43_200, 86_400, 604_800)
    step = next((size for size in steps if whole_s / size <= 10), steps[-1])
    for place in range(int(whole_s // step) + 1):
        label = f"{place * step} s" if whole_s < 120 else seconds(place * step)
        yield f'<text x="{_LEFT + place * step * scale:.1f}" y="{height - 3}" text-anchor="middle">{label}</text>'


def _classes(report: Report) -> Iterator[str]:
    total = report.account.rank_seconds or 1.0
    yield "<table><tr><th>class<th class=n>rank-seconds<th class=n>share"
    for kind, value in sorted(report.account.seconds.items(), key=lambda item: -item[1]):
        if value:
            key = f'<i class=key style="background:{COLORS[kind]}"></i>{kind}'
            yield f"<tr><td>{key}<td class=n>{value:,.1f}<td class=n>{value / total:.2%}"
    yield "</table>"


# -- incidents ---------------------------------------------------------------------------------------------------------------


def _incident(item: Incident) -> str:
    world = (
        f"{item.world_before} → {item.world_after} ranks"
        if item.world_before != item.world_after
        else f"{item.world_after} ranks"
    )
    lines = [
        f"<div class=incident><p><b>{item.attempt - 1}. {escape(item.kind)} lost, back from {escape(item.rung or 'nothing')}</b> "
        f"in {seconds(item.seconds)}</p>",
        f"<p class=quiet>{_when(item.time_s)}; {item.who} without a word after step {item.reached_step}; back at step "
        f"{item.restored_step} ({item.steps_lost} to do again), {world}</p>",
        *_phases(item.phases),
        *(f"<p class=quiet>rank {rank}: {escape(why)}</p>" for rank, why in list(item.said.items())[:4]),
        *(f"<p>{escape(note)}</p>" for note in (*item.choice, *item.notes)),
        "</div>",
    ]
    return "\n".join(lines)


def _phases(phases: Mapping[str, float]) -> Iterator[str]:
    whole, x = max(sum(phases.values()), 1e-9), 0.0
    yield f'<svg viewBox="0 0 {_WIDTH} 14" role=img aria-label="phases">'
    for color, (name, value) in zip(_PHASES * 2, phases.items(), strict=False):
        width = value / whole * _WIDTH
        title = f"<title>{escape(name)} {seconds(value)}</title>"
        yield f'<rect x="{x:.1f}" width="{width:.1f}" height="12" fill="{color}">{title}</rect>'
        x += width
    yield "</svg><p class=legend>"
    for color, (name, value) in zip(_PHASES * 2, phases.items(), strict=False):
        yield f'<span><i class=key style="background:{color}"></i>{escape(name)} {seconds(value)}</span>'
    yield "</p>"


def _advice(report: Report) -> Iterator[str]:
    yield from (f"<p>{escape(line)}</p>" for line in advice_lines(report))


def advice_lines(report: Report) -> list[str]:
    """What the failures and costs so far say, in sentences."""
    advice = report.advice
    lines = [
        f"{advice.failures} failure(s) in {advice.gpu_hours:.3g} rank-hours, with what is published for large clusters: one every "
        f"{seconds(advice.mtbf_s)} is expected of this job (90 % between {seconds(advice.mtbf_low_s)} and "
        f"{seconds(advice.mtbf_high_s)})."
    ]
    if advice.cost_s > 0:
        lines.append(
            f"A snapshot holds training for {advice.cost_s * 1000:.2f} ms, so one every {seconds(advice.daly_s)} loses least "
            f"(Daly; Young {seconds(advice.young_s)}); more often costs more than it saves."
        )
    return lines
