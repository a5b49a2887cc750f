"""What all benchmarks share: interleaved rounds, honest ratios, and one JSON object that says what was measured where.

    {"schema": 1, "machine": {…}, "rows": [{"case", "system", "metric", "unit", "n", "median", "min", "max"}],
     "goals": [{"name", "goal", "measured", "met"}]}

Every round runs every system once, so that a machine that slows down slows all of them. A ratio is the median of the ratios
within rounds, never a ratio of medians. A system that is not here is a row with a null median and the reason.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass
class Report:
    """What a benchmark has found so far."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    goals: list[dict[str, Any]] = field(default_factory=list)

    def row(self, case: str, system: str, metric: str, unit: str, values: Sequence[float]) -> None:
        spread = {"n": len(values), "median": statistics.median(values), "min": min(values), "max": max(values)}
        self.rows.append({"case": case, "system": system, "metric": metric, "unit": unit, **spread})

    def absent(self, case: str, system: str, metric: str, unit: str, reason: str) -> None:
        """A system that could not be measured. It keeps its row, so that nobody takes it for forgotten."""
        empty = {"n": 0, "median": None, "min": None, "max": None, "reason": reason}
        self.rows.append({"case": case, "system": system, "metric": metric, "unit": unit, **empty})

    def goal(self, name: str, goal: float, measured: float, *, at_most: bool = False) -> None:
        met = measured <= goal if at_most else measured >= goal
        self.goals.append({"name": name, "goal": f"{'<=' if at_most else '>='} {goal:g}", "measured": measured, "met": met})

    def median(self, case: str, system: str, metric: str) -> float | None:
        """The median of a row that was measured before; None for an absent system."""
        found = (row for row in self.rows if (row["case"], row["system"], row["metric"]) == (case, system, metric))
        value: float | None = next(found)["median"]
        return value

    def show(self, *, as_json: bool, packages: Sequence[str] = ()) -> None:
        """The one JSON object on stdout, or a table of the same."""
        if as_json:
            report = {"schema": 1, "machine": asdict(machine(packages)), "rows": self.rows, "goals": self.goals}
            print(json.dumps(rounded(report), indent=1, ensure_ascii=False))
        else:
            print("\n".join(self._table()))

    def _table(self) -> list[str]:
        lines = []
        for row in self.rows:
            name = f"{row['case']:28} {row['system']:26} {row['metric']:12}"
            if row["median"] is None:
                lines.append(f"{name}        - ({row['reason']})")
            else:
                lines.append(f"{name} {row['median']:8.3g} {row['unit']:6} [{row['min']:.3g} … {row['max']:.3g}] n={row['n']}")
        lines += [f"{g['name']}: {g['measured']:.3g} (goal {g['goal']}): {'met' if g['met'] else 'MISSED'}" for g in self.goals]
        return lines


@dataclass(frozen=True)
class Machine:
    cpu: str
    cores: int
    features: list[str]
    memory_gib: float
    load_before: list[float]
    system: str
    python: str
    huge_pages: str
    packages: dict[str, str]
    command: str


_LOAD = list(os.getloadavg())  # before the benchmark adds its own
_FEATURES = ("avx2", "avx512bw", "avx512vl", "gfni", "vpclmulqdq", "asimd", "sve")


def machine(packages: Sequence[str] = ()) -> Machine:
    """Where the numbers come from, as far as it decides them."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    info = dict(map(str.strip, line.split(":", 1)) for line in text.splitlines() if ":" in line)
    flags = set((info.get("flags") or info.get("Features") or "").split())
    thp = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return Machine(
        cpu=info.get("model name") or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        features=[name for name in _FEATURES if name in flags],
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        load_before=_LOAD,
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        huge_pages=thp.read_text().strip() if thp.exists() else "",
        packages={name: _version(name) for name in packages},
        command=" ".join(["python", *sys.argv]),
    )


def arguments(description: str | None) -> argparse.Namespace:
    """--json and --quick, which every benchmark has."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="smaller and fewer, to see that it runs; not to be quoted")
    return parser.parse_args()


def rounds(
    systems: Mapping[str, Callable[[], object]], count: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every system in every round, on the given clock, after one round of warming up.

    Every other round runs backwards, so that nobody always follows the same neighbour. `time.thread_time` leaves out being
    descheduled, for single-threaded work on a machine that others use too.
    """
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(count + 1):
        names = list(systems) if number % 2 else list(reversed(systems))
        for name in names:
            start = clock()
            systems[name]()
            elapsed = clock() - start
            if number:
                seconds[name].append(elapsed)
    return seconds


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def say(text: str) -> None:
    """Progress, on stderr: stdout is for the result."""
    print(text, file=sys.stderr, flush=True)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def rounded(value: Any) -> Any:
    """Four digits: more would claim a precision that no benchmark has."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value
