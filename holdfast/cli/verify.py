"""Read and check every byte of a checkpoint: data, shard indexes, documents.

Ends with 0 when all is as it was saved, and with 5 when something is lost; the damaged arrays and rows are listed. --all checks
every step of the run.
"""

from __future__ import annotations

import argparse
import time

from holdfast.ckpt.catalog import StepInfo, list_steps, open_checkpoint
from holdfast.ckpt.reader import open_directory
from holdfast.ckpt.steps import Address
from holdfast.ckpt.verify import Damage, VerifyReport
from holdfast.cli.talk import add_json, add_path, count, print_json, progress, say, size
from holdfast.errors import HoldfastError, NotACheckpoint

LOST = 5
SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser)
    parser.add_argument("--all", action="store_true", help="check every step of the run")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    if not arguments.all:
        report = _verify(arguments.path, quiet=arguments.json)
        if arguments.json:
            print_json(_document(report))
        else:
            _print(report)
        return 0 if report.is_whole else LOST
    address = Address.parse(arguments.path)
    infos = list_steps(address.path)
    if not infos:
        raise NotACheckpoint(f"{address.path}: holds no committed checkpoint")
    reports = [_verify_step(info, arguments.json) for info in infos]
    if arguments.json:
        print_json(
            {"path": address.path, "whole": all(report.is_whole for report in reports), "steps": list(map(_document, reports))}
        )
    else:
        for report in reports:
            _print(report)
    return 0 if all(report.is_whole for report in reports) else LOST


def _verify_step(info: StepInfo, quiet: bool) -> VerifyReport:
    """The report of one step of many; a step that cannot even be opened is reported, not raised."""
    try:
        open_directory(info.path)
        return _verify(str(info.path), quiet)
    except HoldfastError as error:
        return VerifyReport(str(info.path), info.step, info.arrays, 0, [Damage("", "", 0, info.nbytes, (), (), str(error))])


def _verify(path: str, quiet: bool) -> VerifyReport:
    checkpoint = open_checkpoint(path)
    started_s = time.monotonic()
    with progress(f"verifying step {checkpoint.step}", checkpoint.nbytes) as advance:
        report = checkpoint.verify(advance)
    if not quiet:
        seconds = max(time.monotonic() - started_s, 1e-9)
        say(f"read {size(report.checked_nbytes)} in {seconds:.1f} s ({size(report.checked_nbytes / seconds)}/s)")
    return report


def _document(report: VerifyReport) -> dict[str, object]:
    return {
        "path": report.path,
        "step": report.step,
        "whole": report.is_whole,
        "arrays": report.arrays,
        "checked_nbytes": report.checked_nbytes,
        "damages": report.damages,
    }


def _print(report: VerifyReport) -> None:
    if report.is_whole:
        print(f"{report.path}: whole ({count(report.arrays, 'array')}, {size(report.checked_nbytes)}, every byte checked)")
        return
    print(f"{report.path}: DAMAGED in {count(len(report.damages), 'place')}")
    for damage in report.damages[:SHOWN]:
        print(f"  {damage}")
    if len(report.damages) > SHOWN:
        print(f"  … and {len(report.damages) - SHOWN} more (--json lists all)")
