"""What happened to a run: every incident by phase, where each second of each rank went, and what follows for its saves.

RUN is the directory given as checkpoints=, or a run's name on this machine; name several where hosts keep their records apart.
With --out the same is drawn as one HTML page that needs nothing else.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from holdfast.cli.talk import add_json, count, print_json, say, table
from holdfast.elastic.drawing import advice_lines, seconds, to_html
from holdfast.elastic.incidents import Incident
from holdfast.elastic.journal import find_records
from holdfast.elastic.report import Report, make_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run directory, or a run's name")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="draw it there")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    report = make_report(arguments.runs[0], [find_records(run) for run in arguments.runs])
    if arguments.out is not None:
        arguments.out.write_text(to_html(report))
        say(f"drawn in {arguments.out}")
    if arguments.json:
        fields = asdict(report)
        fields["account"].pop("spans")  # thousands of lines that --out draws
        print_json(fields)
    elif arguments.out is None:
        print(_text(report))
    return 0


def _text(report: Report) -> str:
    parts = [
        f"{report.run}: {count(report.attempts, 'attempt')}, step {report.last_step}, {report.ettr:.2%} of all rank-seconds were "
        "steps that counted",
        _classes(report),
        *map(_incident, report.incidents),
        "\n".join(advice_lines(report)),
    ]
    return "\n\n".join(parts)


def _classes(report: Report) -> str:
    total = report.account.rank_seconds or 1.0
    found = sorted(report.account.seconds.items(), key=lambda item: -item[1])
    rows = [(str(kind), f"{value:,.1f}", f"{value / total:.2%}") for kind, value in found if value]
    return table(("CLASS", "RANK-SECONDS", "SHARE"), rows, right=(1, 2))


def _incident(item: Incident) -> str:
    rows = [(name, seconds(value)) for name, value in item.phases.items()]
    notes = [f"  {line}" for line in (*item.choice, *item.notes)]
    return "\n".join(
        [str(item), table(("  PHASE", "TIME"), [(f"  {name}", value) for name, value in rows], right=(1,)), *notes]
    )
