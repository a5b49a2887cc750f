"""Was every sample used exactly once, across faults and resizes? Proved from the journals of all ranks.

RUN is the directory given as checkpoints=, or a run's name on this machine; name several where hosts keep their records apart.
Ends with 0 when it is proved and 1 when it is not.
"""

from __future__ import annotations

import argparse

from holdfast.cli.talk import add_json, complain, count, print_json, say
from holdfast.elastic.audit import Audit, DataAudit, audit, uses_of
from holdfast.elastic.journal import find_records, read_journals


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run directory, or a run's name")
    parser.add_argument("--sample", type=int, help="say in which steps this sample was used, instead")
    parser.add_argument("--loader", default="data", help="with --sample: the loader's name in protect(); data by default")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    journals = read_journals([find_records(run) for run in arguments.runs])
    if arguments.sample is not None:
        uses = [{"epoch": epoch, "step": step} for epoch, step in uses_of(journals, arguments.loader, arguments.sample)]
        if arguments.json:
            print_json({"sample": arguments.sample, "uses": uses})
        else:
            print("\n".join(f"epoch {use['epoch']}: step {use['step']}" for use in uses) or "not used")
        return 0
    found = audit(journals)
    if arguments.json:
        print_json({"proved": found.is_proved, "audit": found})
    else:
        print(_text(found))
    if not found.data:
        complain("this run has no holdfast loader, so nothing tells which samples a step used; see docs/elastic.md")
    return 0 if found.is_proved else 1


def _text(found: Audit) -> str:
    worlds = " → ".join(map(str, (w for place, w in enumerate(found.worlds) if not place or w != found.worlds[place - 1])))
    head = f"{count(found.attempts, 'attempt')}, world {worlds}, last step {found.last_step}; "
    head += f"{count(found.rolled_back, 'step')} taken back by recoveries and done again"
    return "\n\n".join([head, *map(_loader, found.data)])


def _loader(item: DataAudit) -> str:
    lines = [
        f"{item.name}: {item.samples:,} uses in {count(item.steps, 'step')}, {item.epochs:.2f} epochs of {item.size:,} samples"
    ]
    lines += [f"  left out on purpose before step {s.step}: {s.samples} samples ({s.why})" for s in item.skipped]
    if item.left_over:
        lines.append(f"  not used yet: {count(item.left_over, 'sample')} at the end of the last epoch")
    if item.is_proved:
        how = "counted one by one" if item.counted else "runs joined without gap or overlap; too many to count one by one"
        lines.append(f"  every sample was used exactly once in every epoch ({how})")
    else:
        say(f"{item.name}: NOT proved")
        lines += [f"  problem: {problem}" for problem in item.problems[:20]]
        lines += [f"  and {len(item.problems) - 20} more"] if len(item.problems) > 20 else []
    return "\n".join(lines)
