"""Put damaged bytes right, from the parity beside a step or from a replica: another copy of the same step.

  holdfast repair runs/exp1@1200                             from parity (see "holdfast parity")
  holdfast repair runs/exp1@1200 --replica /backup/exp1
  holdfast repair runs/exp1@1200 --replica /backup/exp1 --dry-run

Only bytes whose checksum is the expected one are taken. Ends with 0 when all is whole, with 4 after a dry run that found all damage
repairable, with 5 when something stays lost.
"""

from __future__ import annotations

import argparse

from holdfast.ckpt.catalog import list_steps
from holdfast.ckpt.repairing import repair
from holdfast.ckpt.steps import Address
from holdfast.cli.talk import add_json, add_path, count, print_json, progress, say

REPAIRABLE, LOST = 4, 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser)
    parser.add_argument("--replica", metavar="PATH", help="a run or step directory with the same step")
    parser.add_argument("--dry-run", action="store_true", help="say what could be repaired; write nothing")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    with progress("reading", _nbytes(arguments.path)) as advance:
        found = repair(arguments.path, arguments.replica, dry_run=arguments.dry_run, progress=advance)
    if arguments.json:
        print_json(found)
    else:
        for file in found.files:
            print(file)
        for damage in found.lost:
            print(f"LOST {damage}")
        what = "could repair" if found.dry_run else "repaired"
        say(
            f"step {found.step}: {what} {count(len(found.files), 'file')}, {count(found.blocks, 'block')}; {len(found.lost)} lost"
        )
    if found.lost:
        return LOST
    return REPAIRABLE if found.dry_run and found.files else 0


def _nbytes(path: str) -> int:
    """What there is to read, for the bar; a COMMIT that cannot be read leaves it empty."""
    address = Address.parse(path)
    infos = list_steps(address.path)
    return next((info.nbytes for info in reversed(infos) if address.step in (None, info.step)), 0)
