"""Break a job on purpose and see what becomes of it: `python -m holdfast.elastic.faults --schedule FILE`.

Every schedule of the file is one run of a real job under torchrun, with real kills, and its end is compared with an undisturbed
run. Ends with 0 when every run recovered or failed with a clear error, and 1 otherwise. With --script it is your own job: any
script that uses holdfast.protect and, for the full comparison, trains the same way each time.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holdfast.elastic.faults.report import as_json, is_good, report_lines
from holdfast.elastic.faults.schedule import Plan, load_plan
from holdfast.elastic.faults.stage import rehearse
from holdfast.errors import HoldfastError

USAGE, INTERRUPTED = 2, 130


def main(words: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    # By way of every `finally`, which ends what was started.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        plan = _plan(arguments)
        if arguments.list:
            print("\n".join(f"{s.name}: {'; '.join(fault.text() for fault in s.faults)}" for s in plan.schedules))
            return 0
        outcomes = rehearse(plan, keep=arguments.keep, say=lambda text: print(text, file=sys.stderr, flush=True))
    except HoldfastError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; everything that was started has been ended", file=sys.stderr)
        return INTERRUPTED
    print(json.dumps(as_json(outcomes), indent=1) if arguments.json else "\n".join(report_lines(outcomes)))
    return 0 if is_good(outcomes) else 1


def _plan(arguments: argparse.Namespace) -> Plan:
    chosen: dict[str, Any] = {
        "keepers": arguments.keepers,
        "script": arguments.script,
        "ranks": arguments.ranks,
        "nodes": arguments.nodes,
        "deterministic": False if arguments.not_deterministic else None,
        "timeout_s": arguments.timeout_s,
    }
    plan = load_plan(arguments.schedule, **{name: value for name, value in chosen.items() if value is not None})
    return plan.only(arguments.only) if arguments.only else plan


def _parser() -> argparse.ArgumentParser:
    about, _, more = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="python -m holdfast.elastic.faults", description=about, epilog=more.strip())
    parser.add_argument("--schedule", type=Path, required=True, metavar="FILE", help="a TOML file, see docs/faults.md")
    parser.add_argument("--only", metavar="WORD", help="the schedules with this in their name")
    parser.add_argument("--list", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument("--script", metavar="'train.py …'", help="your own training script, with its arguments")
    parser.add_argument("--ranks", type=int, help="trainers that torchrun starts")
    parser.add_argument("--nodes", type=int, help="nodes that the script has this machine play (Redundancy.nodes_per_host)")
    parser.add_argument("--not-deterministic", action="store_true", help="the script does not end with the same bits each time")
    parser.add_argument("--keepers", choices=("process", "ray"), help="default: what the file says, else plain processes")
    parser.add_argument("--timeout-s", type=float, help="after which a run counts as hung")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave every run's log and testimony in this new folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
