"""Write parity beside a step, so that it can be repaired without any other copy.

  holdfast parity runs/exp1@1200                          one sixteenth of its size; survives the loss of as much
  holdfast parity runs/exp1@1200 --data 8 --parity 2      a quarter; any two of ten parts
  holdfast parity runs/exp1@1200 --dry-run                what it would cost

The step is verified first. "holdfast verify" then tells what is repairable (4) from what is lost (5); "holdfast repair" repairs it.
"""

from __future__ import annotations

import argparse

from holdfast.ckpt.catalog import open_checkpoint
from holdfast.ckpt.parity import add_parity
from holdfast.ckpt.parityfile import Parity
from holdfast.ckpt.storage import local
from holdfast.cli.talk import add_json, add_path, count, print_json, progress, say, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser)
    parser.add_argument("--data", type=int, default=16, metavar="K", help="segments that the step is cut into (default: 16)")
    parser.add_argument(
        "--parity", type=int, default=1, metavar="M", help="segments of parity: as many may be lost (default: 1)"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what it would cost; write nothing")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    parity = Parity(data=arguments.data, parity=arguments.parity)
    checkpoint = open_checkpoint(arguments.path)
    with progress("computing parity", checkpoint.nbytes) as advance:
        added = add_parity(local(checkpoint.path, "parity"), parity, dry_run=arguments.dry_run, progress=advance)
    if arguments.json:
        print_json(added)
        return 0
    print(f"{added.path}/_holdfast/parity")
    would = "would protect" if added.dry_run else "protects"
    say(
        f"{size(added.nbytes)} of parity {would} {count(added.files, 'file')}, {size(added.protected_nbytes)}: "
        f"any {added.parity} of {added.data + added.parity} segments may be lost"
    )
    return 0
