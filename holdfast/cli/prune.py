"""Remove old checkpoints, by a rule.

  holdfast prune runs/exp1 --keep 3                    the newest three
  holdfast prune runs/exp1 --keep 3 --every 1000       and every thousandth step
  holdfast prune runs/exp1 --keep 1 --also 4200 --dry-run
  holdfast prune runs/exp1 --best 2 --by metrics.loss  and the two with the lowest saved loss (--highest: accuracy)

The newest sound checkpoint is never removed, and damaged ones are left for you to look at. What dead saves left behind goes too
(do not prune while a save is running). Without --yes it asks.
"""

from __future__ import annotations

import argparse
import sys

from holdfast.ckpt.pruning import Pruned, Retention, prune
from holdfast.ckpt.scores import best_steps
from holdfast.cli.talk import add_json, add_path, count, print_json, say, size
from holdfast.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser, about="a run directory")
    parser.add_argument("--keep", type=int, default=3, metavar="N", help="keep the newest N steps (default: 3)")
    parser.add_argument("--every", type=int, metavar="N", help="keep every step that N divides")
    parser.add_argument("--also", type=int, nargs="*", default=[], metavar="STEP", help="keep these too")
    parser.add_argument("--best", type=int, metavar="N", help="keep the N steps with the lowest --by")
    parser.add_argument("--by", metavar="NAME", help="a number among the saved objects, like metrics.loss")
    parser.add_argument("--highest", action="store_true", help="the highest --by is the best")
    parser.add_argument("--dry-run", action="store_true", help="say what would be removed; remove nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    best = _best(arguments)
    retention = Retention(last=arguments.keep, every=arguments.every, also=frozenset([*arguments.also, *best]))
    planned = prune(arguments.path, retention, dry_run=True)
    if arguments.dry_run or not (planned.removed or planned.leftovers):
        return _show(planned, arguments.json)
    if not arguments.yes:
        _ask(planned)
    return _show(prune(arguments.path, retention), arguments.json)


def _best(arguments: argparse.Namespace) -> list[int]:
    if (arguments.best is None) != (arguments.by is None):
        raise ConfigError("--best and --by go together: --best 2 --by metrics.loss")
    if arguments.best is None:
        return []
    return best_steps(arguments.path, arguments.by, arguments.best, highest=arguments.highest)


def _ask(planned: Pruned) -> None:
    say(f"This removes {_about(planned)}.")
    if not sys.stdin.isatty():
        raise ConfigError("nobody is there to ask; give --yes")
    print("Go on? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ConfigError("nothing was removed")


def _show(pruned: Pruned, as_json: bool) -> int:
    if as_json:
        print_json(pruned)
        return 0
    say(
        f"{'would remove' if pruned.dry_run else 'removed'} {_about(pruned)}; kept {', '.join(map(str, pruned.kept)) or 'none'}"
    )
    for step in pruned.removed:
        print(step)
    return 0


def _about(pruned: Pruned) -> str:
    steps = f"{count(len(pruned.removed), 'step')} ({', '.join(map(str, pruned.removed))})" if pruned.removed else "no step"
    dead = f" and {count(len(pruned.leftovers), 'leftover')} of dead saves" if pruned.leftovers else ""
    return f"{steps}{dead}, {size(pruned.freed_nbytes)}"
