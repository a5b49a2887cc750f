"""What the keepers of this machine hold: the newest committed step of every run, and how many losses it survives.

With --watch it is shown anew every second until Ctrl-C; with --watch --json one object is printed per line and second.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from holdfast.cli.talk import add_json, count, plain, print_json, say, size, table
from holdfast.environment import Environment
from holdfast.snapshot.cluster import JobStatus, NodeStatus, status
from holdfast.snapshot.verdicts import Trouble, Verdict

EVERY_S = 1.0
NOBODY = "no run has keepers on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="one run; all of this machine's by default")
    parser.add_argument("--watch", action="store_true", help="show it anew every second")
    parser.add_argument(
        "--prometheus", action="store_true", help="print gauges in Prometheus' text form, for a textfile collector"
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    def look() -> list[JobStatus]:
        return status(arguments.name, memory=Environment.read().memory)

    if not arguments.watch:
        jobs = look()
        if arguments.prometheus:
            print("\n".join(prometheus(jobs, time.time())))
        elif arguments.json:
            print_json({"runs": jobs})
        elif jobs:
            print("\n\n".join(text_of(job, time.time()) for job in jobs))
        else:
            say(NOBODY)
        return 0
    with _screen(arguments.json) as show:
        while True:  # until Ctrl-C, which ends the screen cleanly and the command with 130
            show(look())
            time.sleep(EVERY_S)


def _screen(as_json: bool) -> AbstractContextManager[Callable[[list[JobStatus]], None]]:
    if as_json:
        return _lines(lambda jobs: json.dumps({"time_s": time.time(), "runs": jobs}, default=plain))
    if not sys.stdout.isatty():
        return _lines(lambda jobs: _page(jobs) + "\n")
    return _live()


@contextmanager
def _lines(form: Callable[[list[JobStatus]], str]) -> Iterator[Callable[[list[JobStatus]], None]]:
    yield lambda jobs: print(form(jobs), flush=True)


@contextmanager
def _live() -> Iterator[Callable[[list[JobStatus]], None]]:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(), auto_refresh=False) as live:

        def show(jobs: list[JobStatus]) -> None:
            text = Text(_page(jobs), no_wrap=True)
            text.highlight_regex(r"(?m)^no node may be lost now.*|dead|NO, .*|\d+ damaged", "bold red")
            text.highlight_regex(r"(?m)^\d+ nodes? may be lost now", "bold green")
            text.highlight_regex(r"(?m)^\S+: .*", "bold")
            live.update(text, refresh=True)

        yield show


def _page(jobs: list[JobStatus]) -> str:
    return "\n\n".join(text_of(job, time.time()) for job in jobs) if jobs else NOBODY


# -- one run as text -----------------------------------------------------------------------------------------------------


def text_of(job: JobStatus, now_s: float) -> str:
    """A run for people: where it is, what it survives, what was watched, and a line for every keeper."""
    head = f"{job.name}: {count(job.world, 'rank')} at step {job.step}, epoch {job.epoch}"
    rows = [_row(node) for node in job.nodes]
    columns = ("NODE", "KEEPER", "COMMITTED", "AGE", "MEMORY", "SKIPPED", "DROPPED", "FAILED", "RANKS (PID)")
    return "\n".join(
        [
            head,
            _losses(job),
            _safe(job),
            *_often(job),
            *_troubles(job, now_s),
            *_bereft(job.nodes, now_s),
            *_watched(job.nodes, now_s),
            "",
            table(columns, rows, right=range(len(columns) - 1)),
        ]
    )


def _losses(job: JobStatus) -> str:
    if not job.committed_step:
        return "no node may be lost now: nothing is committed yet"
    if job.survivable_losses:
        return f"{count(job.survivable_losses, 'node')} may be lost now without losing step {job.committed_step}"
    dead = [str(node.node) for node in job.nodes if not node.alive]
    reason = f": the keeper of node {', '.join(dead)} is gone" if dead else ""
    damaged = any(node.damaged for node in job.nodes)
    reason = reason or (": damaged memory could not be repaired" if damaged else ": there is no parity to rebuild it from")
    return f"no node may be lost now{reason}; trainers may die, and go on from step {job.committed_step}"


def _safe(job: JobStatus) -> str:
    behind = job.step - job.committed_step
    ages = [node.committed_age_s for node in job.nodes if node.committed_age_s is not None]
    age = f", {_duration(max(ages))} ago" if ages else ""
    refused = sum(node.refused for node in job.nodes)
    nan = f"; {count(refused, 'snapshot')} with NaN refused" if refused else ""
    checkpoint = f"checkpoint of step {job.checkpoint_step}" if job.checkpoint_step else "no checkpoint yet"
    return f"step {job.committed_step} is committed{age}, {count(max(0, behind), 'step')} behind; {checkpoint}{nan}"


def _often(job: JobStatus) -> list[str]:
    return [] if job.intervals is None else [str(job.intervals)]


def _troubles(job: JobStatus, now_s: float) -> list[str]:
    """The last verdict, and how many there were before it."""
    if not job.verdicts:
        return []
    last = job.verdicts[-1]
    found = Verdict(Trouble(last["trouble"]), tuple(last["guilty"]), last["confidence"], tuple(last["evidence"]))
    more = f" ({count(len(job.verdicts) - 1, 'verdict')} before)" if len(job.verdicts) > 1 else ""
    return [f"{_ago([last], now_s)}{more}: {found}"]


def _bereft(nodes: list[NodeStatus], now_s: float) -> list[str]:
    """Nodes that began anew without memory while their trainers went on."""
    return [
        f"node {node.node} lost its keeper and all that it held {_ago([node.bereft], now_s)}, after step {node.bereft['step']}; "
        + ("a new one is in its place" if node.world else "a new one waits to be taken into the run")
        for node in nodes
        if node.alive and node.bereft
    ]


def _watched(nodes: list[NodeStatus], now_s: float) -> list[str]:
    """The oldest of the nodes' last scrubs and drills: what has been looked at everywhere since then."""
    lines = []
    scrubs = [node.last_scrub for node in nodes if node.alive and node.last_scrub]
    if scrubs:
        rotten, repaired = (sum(scrub[word] for scrub in scrubs) for word in ("rotten", "repaired"))
        found = "nothing rotten" if not rotten else f"{count(rotten, 'region')} rotten, {repaired} repaired"
        nbytes = sum(scrub["nbytes"] for scrub in scrubs)
        lines.append(f"last scrub {_ago(scrubs, now_s)}: {size(nbytes)} read, {found}")
    drills = [node.last_drill for node in nodes if node.alive and node.last_drill]
    if drills:
        agree = all(drill["agrees"] for drill in drills)
        verdict = "rebuilt blocks agree" if agree else "NO, a rebuilt block is not what is there; see the keepers' logs"
        lines.append(f"last drill {_ago(drills, now_s)}: {verdict}")
    return lines or ["nothing has been scrubbed or drilled yet"]


def _row(node: NodeStatus) -> tuple[str, ...]:
    if not node.alive:
        return (str(node.node), "dead", "", "", size(node.nbytes), "", "", "", "")
    age = "" if node.committed_age_s is None else _duration(node.committed_age_s)
    ranks = ", ".join(f"{rank} ({pid})" for rank, pid in sorted(node.ranks.items()))
    counts = (str(node.skipped), str(node.dropped), str(node.failed))
    memory = size(node.nbytes) + (f", {node.damaged} damaged" if node.damaged else "")
    return (str(node.node), str(node.pid), str(node.committed_step), age, memory, *counts, ranks)


def _ago(done: list[dict[str, Any]], now_s: float) -> str:
    return f"{_duration(now_s - min(item['time_s'] for item in done))} ago"


def _duration(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# -- gauges ----------------------------------------------------------------------------------------------------------------


def prometheus(jobs: list[JobStatus], now_s: float) -> list[str]:
    """Every number as a gauge, labelled with its run and, where it is a keeper's, its node."""
    lines = []
    for job in jobs:
        run = {"run": job.name}
        words = ("step", "committed_step", "checkpoint_step", "survivable_losses", "epoch", "world")
        lines += [_gauge(word, run, getattr(job, word)) for word in words]
        lines.append(_gauge("verdicts", run, len(job.verdicts)))
        for node in job.nodes:
            lines += [_gauge(name, {**run, "node": str(node.node)}, value) for name, value in _numbers(node, now_s).items()]
    return lines


def _numbers(node: NodeStatus, now_s: float) -> dict[str, float]:
    if not node.alive:
        return {"keeper_up": 0}
    found: dict[str, float] = {"keeper_up": 1, "memory_bytes": node.nbytes, "stall_seconds": node.stall_s}
    found |= {f"snapshots_{word}": getattr(node, word) for word in ("captured", "skipped", "dropped", "failed", "refused")}
    found["damaged_slots"] = node.damaged
    if node.committed_age_s is not None:
        found["committed_age_seconds"] = node.committed_age_s
    if node.last_scrub is not None:
        found |= {"scrub_age_seconds": now_s - node.last_scrub["time_s"], "scrub_rotten": node.last_scrub["rotten"]}
    if node.last_drill is not None:
        found |= {"drill_age_seconds": now_s - node.last_drill["time_s"], "drill_agrees": float(node.last_drill["agrees"])}
    return found


def _gauge(name: str, labels: dict[str, str], value: float) -> str:
    return f"holdfast_{name}{{{','.join(f'{key}={json.dumps(text)}' for key, text in labels.items())}}} {value:g}"
