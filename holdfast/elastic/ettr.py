"""What share of its time a large job trains, by Monte Carlo: failures as they come, recoveries at what they were measured to cost.

Every input has a source that is reported with the result, because an ETTR without its inputs says nothing.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from holdfast.elastic.report import Report
from holdfast.errors import ConfigError
from holdfast.snapshot.interval import PUBLISHED_GPU_HOURS_PER_FAILURE, daly


@dataclass(frozen=True, slots=True)
class Input:
    """A number and where it comes from."""

    value: float
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """One way to live with failures. Seconds; `recovery_s` is by what was lost, from the fault to the first new step without the
    detection and without the work done again."""

    name: str
    save_every_s: Input
    save_cost_s: Input
    lag_s: Input
    """How long after a step a save of it is safe: work that young is lost as well."""
    detection_s: Input
    hang_detection_s: Input
    recovery_s: Mapping[str, Input]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    gpus: int
    days: float
    gpu_hours_per_failure: Input
    hang_share: Input
    losses: Mapping[str, Input]
    """How often a failure is of which kind; shares that add up to 1."""

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.days <= 0:
            raise ConfigError(f"a job has at least one GPU and lasts; got {self.gpus} GPUs for {self.days} days")
        if abs(sum(share.value for share in self.losses.values()) - 1) > 1e-6:
            raise ConfigError(f"the shares of the losses have to add up to 1; got {sum(s.value for s in self.losses.values())}")

    @property
    def mtbf_s(self) -> float:
        return 3600 * self.gpu_hours_per_failure.value / self.gpus


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of one way: the median ETTR over the runs, the range that nine of ten lie in, and where the time went (shares)."""

    way: Way
    ettr: float
    ettr_low: float
    ettr_high: float
    failures: float
    shares: Mapping[str, float] = field(default_factory=dict)


def forecast(job: Job, way: Way, *, runs: int = 200, seed: int = 0) -> Forecast:
    """Live through the job's time `runs` times."""
    dice = random.Random(seed)
    lives = [_live(job, way, dice) for _ in range(runs)]
    total_s = job.days * 86_400
    ratios = sorted(life["productive"] / total_s for life in lives)
    shares = {name: sum(life[name] for life in lives) / (runs * total_s) for name in lives[0] if name != "failures"}
    low, high = ratios[int(runs * 0.05)], ratios[min(runs - 1, int(runs * 0.95))]
    failures = sum(life["failures"] for life in lives) / runs
    return Forecast(way, median(ratios), low, high, failures, {name: round(share, 6) for name, share in shares.items()})


def _live(job: Job, way: Way, dice: random.Random) -> dict[str, float]:
    """One life of the job. A failure while recovering starts the recovery over."""
    spent = dict.fromkeys(("productive", "saving", "lost work", "detection", "recovery", "failures"), 0.0)
    kinds, weights = zip(*((kind, share.value) for kind, share in job.losses.items()), strict=True)
    every_s, left_s = way.save_every_s.value, job.days * 86_400
    efficiency = every_s / (every_s + way.save_cost_s.value)
    while left_s > 0:
        running_s = min(left_s, dice.expovariate(1 / job.mtbf_s))
        left_s -= running_s
        worked_s = running_s * efficiency
        spent["saving"] += running_s - worked_s
        if left_s <= 0:
            spent["productive"] += worked_s
            break
        spent["failures"] += 1
        lost_s = min(worked_s, dice.uniform(0, every_s) + way.lag_s.value)
        spent["lost work"] += lost_s
        spent["productive"] += worked_s - lost_s
        left_s = _come_back(job, way, dice, spent, left_s, dice.choices(kinds, weights)[0])
    return spent


def _come_back(job: Job, way: Way, dice: random.Random, spent: dict[str, float], left_s: float, kind: str) -> float:
    while left_s > 0:
        hung = dice.random() < job.hang_share.value
        for name, seconds in (
            ("detection", (way.hang_detection_s if hung else way.detection_s).value),
            ("recovery", way.recovery_s[kind].value),
        ):
            spent[name] += min(seconds, left_s)
            left_s -= seconds
        if dice.expovariate(1 / job.mtbf_s) > way.recovery_s[kind].value:
            break
        spent["failures"] += 1
    return max(0.0, left_s)


# -- inputs ------------------------------------------------------------------------------------------------------------------

_DEMO = "measured: `holdfast demo` on 2 shared CPU cores, 3.2 M parameters (README)"
_ASSUMED = "assumed"
_AT_SIZE = "published: FlashRecovery, arXiv 2509.03047, 4,800 devices restarted in 150 s; not measured with holdfast"
_LLAMA = "published: Llama 3, arXiv 2407.21783"


def published_job(gpus: int, days: float = 30.0) -> Job:
    """Fails as often as was published; four of five failures take a node's memory with them, one in a thousand more than parity."""
    return Job(
        gpus=gpus,
        days=days,
        gpu_hours_per_failure=Input(PUBLISHED_GPU_HOURS_PER_FAILURE, f"{_LLAMA}, 419 failures in 54 days of 16,384 GPUs"),
        hang_share=Input(0.1, _ASSUMED),
        losses={
            "trainer": Input(0.219, f"{_LLAMA}, Table 5: what was not confirmed as hardware's, about 22 %"),
            "node": Input(0.78, f"{_LLAMA}, §3.3.4: about 78 % hardware; taken as loss of the node"),
            "more": Input(0.001, _ASSUMED),
        },
    )


def restart_way(*, step_s: float = 10.0) -> Way:
    """holdfast's restart depth with a snapshot at every step; what has not been measured at size is marked."""
    return Way(
        name="holdfast, processes restarted",
        save_every_s=Input(step_s, "a snapshot at every step; the step's length is assumed" if step_s == 10.0 else "given"),
        save_cost_s=Input(0.012, _DEMO + ": stall per step"),
        lag_s=Input(step_s, "a step is committed while the next one runs"),
        detection_s=Input(0.19, _DEMO),
        hang_detection_s=Input(60.0, _ASSUMED),
        recovery_s={
            "trainer": Input(150.0, _AT_SIZE),
            "node": Input(152.0, f"{_AT_SIZE}; and 2 s to decode a node, {_ASSUMED}"),
            "more": Input(600.0, f"{_ASSUMED}: loading a checkpoint and the work since it"),
        },
    )


def checkpoint_way(job: Job, *, save_cost_s: float = 20.0, load_s: float = 120.0) -> Way:
    """What most jobs do: checkpoints to storage at Daly's interval. The restart is as quick as with holdfast, and then it loads."""
    return Way(
        name="checkpoints alone",
        save_every_s=Input(round(daly(save_cost_s, job.mtbf_s), 1), "Daly's interval for the two numbers"),
        save_cost_s=Input(save_cost_s, _ASSUMED),
        lag_s=Input(0.0, "training waits for the save"),
        detection_s=Input(1.0, _ASSUMED),
        hang_detection_s=Input(600.0, "torch's default timeout of a NCCL collective"),
        recovery_s={kind: Input(150.0 + load_s, f"{_AT_SIZE}; and {load_s:g} s to load, {_ASSUMED}") for kind in job.losses},
    )


def measured_way(report: Report) -> Way:
    """This run's own costs, where it has any; what is assumed or published in the other places."""
    base, source = restart_way(), f"measured: {report.run}"
    recoveries: dict[str, Input] = dict(base.recovery_s)
    for kind, key in (("trainer", "trainer"), ("node", "node"), ("checkpoint", "more")):
        seen = [item for item in report.incidents if item.kind == kind]
        if seen:
            after = median(item.seconds - item.phases.get("detected", 0.0) for item in seen)
            recoveries[key] = Input(round(after, 3), f"{source}, median of {len(seen)}")
    noticed = [item.phases["detected"] for item in report.incidents if item.phases.get("detected", 0.0) > 0]
    step_s = report.account.step_s
    return Way(
        name=f"as measured in {report.run}",
        save_every_s=Input(round(step_s, 4), source + ", median step") if step_s else base.save_every_s,
        save_cost_s=Input(round(report.account.stall_per_step_s, 6), source) if step_s else base.save_cost_s,
        lag_s=Input(round(step_s, 4), base.lag_s.source) if step_s else base.lag_s,
        detection_s=Input(median(noticed), source) if noticed else base.detection_s,
        hang_detection_s=base.hang_detection_s,
        recovery_s=recoveries,
    )


def ways(job: Job, report: Report | None) -> Sequence[Way]:
    return [checkpoint_way(job), restart_way(), *([measured_way(report)] if report is not None else [])]
