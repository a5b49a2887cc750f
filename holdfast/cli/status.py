"""What the keepers of this machine hold: the newest committed step of every run, and how many losses it survives.

With --watch the table is shown anew every second until Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
import time

from holdfast.cli.talk import add_json, print_json, say, size, table
from holdfast.environment import Environment
from holdfast.snapshot.cluster import JobStatus, NodeStatus, status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="one run; all of this machine's by default")
    parser.add_argument("--watch", action="store_true", help="show it anew every second")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    while True:
        jobs = status(arguments.name, memory=Environment.read().memory)
        if arguments.watch and sys.stdout.isatty():
            print("\x1b[2J\x1b[H", end="")
        if arguments.json:
            print_json({"runs": jobs})
        elif jobs:
            print("\n\n".join(map(_text, jobs)))
        else:
            say("no run has keepers on this machine")
        if not arguments.watch:
            return 0
        sys.stdout.flush()
        time.sleep(1)


def _text(job: JobStatus) -> str:
    losses = f"{job.survivable_losses} node{'' if job.survivable_losses == 1 else 's'} may be lost"
    checkpoint = f", checkpoint of step {job.checkpoint_step}" if job.checkpoint_step else ""
    head = f"{job.name}: epoch {job.epoch}, step {job.committed_step} is committed{checkpoint}; {losses} now"
    rows = [_row(node) for node in job.nodes]
    return head + "\n" + table(("NODE", "KEEPER", "STEP", "AGE", "MEMORY", "RANKS (PID)"), rows, right=(0, 1, 2, 3, 4))


def _row(node: NodeStatus) -> tuple[str, ...]:
    if not node.alive:
        return (str(node.node), "dead", "", "", size(node.nbytes), "")
    age = "" if node.committed_age_s is None else f"{node.committed_age_s:.1f} s"
    ranks = ", ".join(f"{rank} ({pid})" for rank, pid in sorted(node.ranks.items()))
    return (str(node.node), str(node.pid), str(node.committed_step), age, size(node.nbytes), ranks)
