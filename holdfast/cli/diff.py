"""Which arrays and rows differ between two checkpoints, and by how much.

  holdfast diff runs/exp1@100 runs/exp1@200
  holdfast diff runs/exp1 runs/exp2 --only 'model/*'

Layouts do not matter: what is compared is the arrays. Ends with 0 when all is equal, with 1 when something differs.
"""

from __future__ import annotations

import argparse
from fnmatch import fnmatchcase

from holdfast.ckpt.catalog import open_checkpoint
from holdfast.ckpt.difference import ArrayDifference, Difference, diff
from holdfast.cli.talk import add_json, add_path, count, print_json, say, size, table

SHOWN = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser, "one")
    add_path(parser, "other")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="only arrays whose name matches, like 'model/*'")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    one, other = open_checkpoint(arguments.one), open_checkpoint(arguments.other)
    found = diff(one, other, lambda name: fnmatchcase(name, arguments.only))
    if arguments.json:
        print_json(found)
    else:
        _print(found)
    return 0 if found.is_same else 1


def _print(found: Difference) -> None:
    rows = [_row(change) for change in found.changed[:SHOWN]]
    if rows:
        print(table(("ARRAY", "ELEMENTS", "ROWS", "FIRST ROW", "LARGEST", ""), rows, right=(1, 2, 3, 4)))
    if len(found.changed) > SHOWN:
        print(f"… and {len(found.changed) - SHOWN} more (--json lists all)")
    for names, where in ((found.only_one, found.one), (found.only_other, found.other)):
        for name in names:
            print(f"{name}  only in {where}")
    for name in found.objects:
        print(f"object {name} differs")
    say(f"{count(found.equal, 'array')} equal, {len(found.changed)} different; read {size(found.read_nbytes)}")


def _row(change: ArrayDifference) -> tuple[str, ...]:
    if change.what != "values":
        return (change.name, "", "", "", "", change.what)
    largest = "" if change.largest is None else f"{change.largest:.3g}"
    return (change.name, f"{change.elements:,}", f"{change.rows:,}", str(change.first_row), largest, "")
