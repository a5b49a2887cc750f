"""List the checkpoints of a run, oldest first.

Only committed steps are listed; what a dead save left behind is mentioned on stderr. Ends with 3 when there is nothing to
restore from.
"""

from __future__ import annotations

import argparse
import time

from holdfast.ckpt.catalog import StepInfo, is_sound, list_steps
from holdfast.ckpt.steps import Address, unfinished
from holdfast.cli.talk import add_json, add_path, complain, count, print_json, say, size, table

NOTHING = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser, about="a run directory")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    root = Address.parse(arguments.path).path
    infos = [_checked(info) for info in list_steps(root)]
    usable = [info for info in infos if info.problem is None]
    dead = [path.name for path in unfinished(root)]
    if arguments.json:
        print_json({"path": root, "steps": infos, "latest": usable[-1].step if usable else None, "unfinished": dead})
    elif infos:
        print(table(("STEP", "SIZE", "ARRAYS", "SAVED", ""), [_row(info) for info in infos], right=(0, 1, 2)))
    if dead and not arguments.json:
        say(f'{count(len(dead), "save")} never finished ({dead[-1]}); "holdfast prune" removes what they left')
    if not usable:
        complain(f"{root}: holds no checkpoint that can be restored")
        return NOTHING
    return 0


def _checked(info: StepInfo) -> StepInfo:
    """The step with its problem, if its documents do not agree with its COMMIT."""
    if info.problem is not None or is_sound(info):
        return info
    return StepInfo(
        info.step, info.path, info.nbytes, info.arrays, info.created_s, f'damaged: see "holdfast verify {info.path}"'
    )


def _row(info: StepInfo) -> tuple[str, str, str, str, str]:
    saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(info.created_s)) if info.created_s else "?"
    return (str(info.step), size(info.nbytes), f"{info.arrays:,}", saved, info.problem or "")
