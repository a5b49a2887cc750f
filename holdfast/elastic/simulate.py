"""What a job of a given size would live through, and whether the protocol does: `python -m holdfast.elastic.simulate`.

    … --gpus 16384 [--from RUN] [--json]             the ETTR to expect, by Monte Carlo, with every input and its source
    … --members 10000 --faults 1000 [--burst 20]     the shipped state machines under a virtual clock and random faults

The second ends with 1 when something that must hold did not; it then cuts the schedule down and prints a script that fails again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import Any

from holdfast.elastic.ettr import Forecast, forecast, published_job, ways
from holdfast.elastic.journal import find_records
from holdfast.elastic.report import make_report
from holdfast.elastic.simulation import Outcome, cut_down, random_faults, script, simulate, timing_of
from holdfast.errors import HoldfastError


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m holdfast.elastic.simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, help="forecast the ETTR of a job of so many GPUs")
    parser.add_argument("--days", type=float, default=30.0, help="how long the job lasts; 30 days")
    parser.add_argument("--runs", type=int, default=200, help="lives per forecast; 200")
    parser.add_argument("--from", dest="measured", metavar="RUN", help="take the costs from this run's own records")
    parser.add_argument("--members", type=int, help="simulate the protocol with so many members")
    parser.add_argument("--faults", type=int, default=1000, help="how many faults they live through; 1000")
    parser.add_argument("--gap", type=float, default=20.0, metavar="S", help="virtual seconds between (bursts of) faults; 20")
    parser.add_argument("--burst", type=int, default=1, metavar="N", help="faults that come together; 1")
    parser.add_argument(
        "--beat", type=float, default=1.5, metavar="S", help="virtual seconds between two beats of a member; 1.5"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    arguments = parser.parse_args(words)
    if (arguments.gpus is None) == (arguments.members is None):
        parser.error("give --gpus for a forecast, or --members for the protocol")
    try:
        return _forecast(arguments) if arguments.gpus is not None else _protocol(arguments)
    except HoldfastError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


def _forecast(arguments: argparse.Namespace) -> int:
    job = published_job(arguments.gpus, arguments.days)
    report = make_report(arguments.measured, [find_records(arguments.measured)]) if arguments.measured else None
    found = [forecast(job, way, runs=arguments.runs, seed=arguments.seed) for way in ways(job, report)]
    if arguments.json:
        inputs = {"mtbf_s": job.mtbf_s, "runs": arguments.runs, "seed": arguments.seed}
        print(json.dumps({"job": asdict(job), **inputs, "forecasts": [asdict(item) for item in found]}, indent=1))
        return 0
    print(
        f"{job.gpus:,} GPUs for {job.days:g} days, a failure every {job.mtbf_s / 3600:.2f} h ({job.gpu_hours_per_failure.source})\n"
    )
    print("\n".join(map(_line, found)))
    print(f"\nhanging: {job.hang_share.value:.0%} of failures ({job.hang_share.source})")
    for item in found:
        print(f"\n{item.way.name}")
        named = {name: value for name, value in asdict(item.way).items() if name not in ("name", "recovery_s")}
        for name, value in {
            **named,
            **{f"recovery_s, {kind}": cost for kind, cost in asdict(item.way)["recovery_s"].items()},
        }.items():
            print(f"  {name:<22} {value['value']:>10.4g}  {value['source']}")
    return 0


def _line(item: Forecast) -> str:
    lost = ", ".join(f"{name} {share:.2%}" for name, share in item.shares.items() if name != "productive")
    return f"{item.way.name:<36} ETTR {item.ettr:.2%} ({item.ettr_low:.2%} to {item.ettr_high:.2%}); {lost}"


def _protocol(arguments: argparse.Namespace) -> int:
    faults = random_faults(arguments.seed, arguments.faults, gap_s=arguments.gap, burst=arguments.burst)
    started = time.perf_counter()
    timing = timing_of(arguments.beat)
    found = simulate(arguments.members, faults, seed=arguments.seed, timing=timing)
    seconds = time.perf_counter() - started
    left = cut_down(found, faults, timing=timing) if found.broken else ()
    again = script(found, left, arguments.beat) if found.broken else None
    if arguments.json:
        told: dict[str, Any] = {**asdict(found), "seconds": round(seconds, 1)}
        print(json.dumps({**told, "script": again}, indent=1))
    else:
        print(_text(found, seconds))
        if found.broken:
            print(f"\n{found.broken[0]}\n{len(left)} of {len(faults)} faults matter; this fails again:\n\n{again}")
    return 1 if found.broken else 0


def _text(found: Outcome, seconds: float) -> str:
    events = ", ".join(f"{count} {kind}" for kind, count in found.events.items())
    end = "BROKEN" if found.broken else "all that must hold held"
    stuck = "; a majority of electors was lost between two views, so the run ended there" if found.events["quorum lost"] else ""
    return (
        f"{found.members:,} members, {found.faults:,} faults ({events}): {end}{stuck}\n"
        f"{found.views:,} views, {found.commits:,} commits, {found.rebuilt:,} members rebuilt from parity, {found.fell_back} times "
        f"more was lost than parity covers\n"
        f"{found.virtual_s:,.0f} virtual seconds, {found.messages:,} messages, in {seconds:.1f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
