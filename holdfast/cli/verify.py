"""Read and check every byte of a checkpoint: data, shard indexes, documents.

Ends with 0 when all is as it was saved, with 4 when something is damaged and the parity beside the step can rebuild it, and with 5
when something is lost; the damaged arrays and rows are listed. --all checks every step of the run.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from holdfast.ckpt.catalog import StepInfo, find_step, list_steps, open_checkpoint
from holdfast.ckpt.parity import ParityCheck, check_parity
from holdfast.ckpt.parityfile import parity_files
from holdfast.ckpt.reader import open_directory
from holdfast.ckpt.steps import Address, step_of
from holdfast.ckpt.storage import Place
from holdfast.ckpt.verify import Damage, VerifyReport
from holdfast.cli.talk import add_json, add_path, count, print_json, progress, say, size
from holdfast.errors import CorruptData, HoldfastError, MissingData, NotACheckpoint

REPAIRABLE, LOST = 4, 5
SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser)
    parser.add_argument("--all", action="store_true", help="check every step of the run")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    if not arguments.all:
        outcome = _verify(arguments.path, quiet=arguments.json)
        if arguments.json:
            print_json(_document(outcome))
        else:
            _print(outcome)
        return outcome.code
    address = Address.parse(arguments.path)
    infos = list_steps(address.path)
    if not infos:
        raise NotACheckpoint(f"{address.path}: holds no committed checkpoint")
    outcomes = [_verify_step(info, arguments.json) for info in infos]
    if arguments.json:
        whole = all(outcome.code == 0 for outcome in outcomes)
        print_json({"path": address.path, "whole": whole, "steps": list(map(_document, outcomes))})
    else:
        for outcome in outcomes:
            _print(outcome)
    return max(outcome.code for outcome in outcomes)


@dataclass(frozen=True)
class _Outcome:
    """What was found in one step, and what its parity, if it has any, can do about it."""

    report: VerifyReport
    parity: ParityCheck | None

    @property
    def code(self) -> int:
        if self.report.is_whole and (self.parity is None or self.parity.is_whole):
            return 0
        return REPAIRABLE if self.report.is_whole or (self.parity is not None and self.parity.is_repairable) else LOST


def _verify_step(info: StepInfo, quiet: bool) -> _Outcome:
    """The outcome for one step of many; a step that cannot even be opened is reported, not raised."""
    try:
        open_directory(info.path)
    except HoldfastError as error:
        return _unopened(info.path, info.step, error)
    return _verify(str(info.path), quiet)


def _unopened(path: Place, step: int, error: HoldfastError) -> _Outcome:
    report = VerifyReport(str(path), step, 0, 0, [Damage("", "", 0, 0, (), (), str(error))])
    return _Outcome(report, _parity(path))


def _parity(path: Place) -> ParityCheck | None:
    """What the parity beside a step says; object stores hold none."""
    return check_parity(path) if isinstance(path, Path) and parity_files(path) else None


def _verify(path: str, quiet: bool) -> _Outcome:
    try:
        checkpoint = open_checkpoint(path)
    except (CorruptData, MissingData, NotACheckpoint) as error:
        address = Address.parse(path)
        directory = find_step(address.path, address.step) if address.path.is_dir() else address.path
        if not isinstance(directory, Path) or not parity_files(directory):
            raise
        return _unopened(directory, step_of(directory) or 0, error)
    started_s = time.monotonic()
    with progress(f"verifying step {checkpoint.step}", checkpoint.nbytes) as advance:
        report = checkpoint.verify(advance)
    parity = _parity(checkpoint.path)
    if not quiet:
        seconds = max(time.monotonic() - started_s, 1e-9)
        say(f"read {size(report.checked_nbytes)} in {seconds:.1f} s ({size(report.checked_nbytes / seconds)}/s)")
    return _Outcome(report, parity)


def _document(outcome: _Outcome) -> dict[str, object]:
    report, parity = outcome.report, outcome.parity
    return {
        "path": report.path,
        "step": report.step,
        "whole": report.is_whole,
        "repairable": outcome.code in (0, REPAIRABLE),
        "arrays": report.arrays,
        "checked_nbytes": report.checked_nbytes,
        "damages": report.damages,
        "parity": None
        if parity is None
        else {
            "data": parity.stream.data,
            "parity": parity.stream.parity,
            "repairable_blocks": len(parity.repairable),
            "lost_blocks": len(parity.lost),
            "damaged_files": parity.broken,
        },
    }


def _print(outcome: _Outcome) -> None:
    report, parity = outcome.report, outcome.parity
    if report.is_whole:
        protected = f", parity {parity.stream.data}+{parity.stream.parity}" if parity else ""
        print(
            f"{report.path}: whole ({count(report.arrays, 'array')}, {size(report.checked_nbytes)}, every byte checked{protected})"
        )
    else:
        print(f"{report.path}: DAMAGED in {count(len(report.damages), 'place')}")
        for damage in report.damages[:SHOWN]:
            print(f"  {damage}")
        if len(report.damages) > SHOWN:
            print(f"  … and {len(report.damages) - SHOWN} more (--json lists all)")
        if outcome.code == REPAIRABLE:
            say(f'all of it can be rebuilt from parity: run "holdfast repair {report.path}"')
        elif parity is not None:
            say(
                f"{count(len(parity.lost), 'block')} cannot be rebuilt from parity; repair with --replica, or take another step"
            )
    if parity is not None and parity.broken:
        say(
            f'parity is damaged itself ({", ".join(parity.broken)}): run "holdfast parity {report.path}" once the step is whole'
        )
