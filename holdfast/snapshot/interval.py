"""How often to take a snapshot, and how often to write a checkpoint: from what each costs and how often something fails. Pure.

Young 1974 (CACM 17(9)) gives the first order, Daly 2006 (FGCS 22(3), eq. 37) the higher one, which stays right when failures are
almost as frequent as saves.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from holdfast.errors import ConfigError
from holdfast.snapshot.control import ControlPage

AFFORDABLE = 0.002
"""Part of the training time that snapshots may always take: so little is well spent on losing less when something fails."""

PUBLISHED_GPU_HOURS_PER_FAILURE = 50_700.0
"""419 unexpected interruptions in 54 days of 16,384 GPUs (Llama 3, arXiv 2407.21783, §3.3.4)."""

ASSUMED_CHECKPOINT_S = 30.0
"""What writing a checkpoint is taken to need until this run has written one."""

LEAST_S, MOST_S = 10.0, 3600.0
"""Work between two checkpoints where holdfast chooses: below, directories pile up for nothing; above, a person would ask why."""

NEWS = 1.25
"""An interval that differs from the last one by less than this factor is the same: measurements waver."""


# -- formulas ------------------------------------------------------------------------------------------------------------


def young(cost_s: float, mtbf_s: float) -> float:
    """Seconds of work between saves that cost `cost_s` each, to first order."""
    check_costs(cost_s, mtbf_s)
    return math.sqrt(2 * cost_s * mtbf_s)


def daly(cost_s: float, mtbf_s: float) -> float:
    """The same to higher order; the mean time between failures itself where a save costs half of that or more."""
    check_costs(cost_s, mtbf_s)
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = cost_s / (2 * mtbf_s)
    return young(cost_s, mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_s


def check_costs(cost_s: float, mtbf_s: float) -> None:
    if cost_s < 0 or mtbf_s <= 0:
        raise ConfigError(f"a save costs at least 0 s and failures are more than 0 s apart; got {cost_s} and {mtbf_s}")


# -- checkpoints ---------------------------------------------------------------------------------------------------------


def checkpoint_seconds(cost_s: float, mtbf_s: float) -> float:
    """Seconds of work between checkpoints that take the keepers `cost_s` to write: Daly's interval, within bounds.

    Training does not wait for the keepers, so the cost is an upper bound, and what it stands for is the storage and network that
    are busy. Every failure counts: that memory would cure most of them is what a checkpoint is there to doubt.
    """
    return min(MOST_S, max(LEAST_S, cost_s, daly(cost_s, mtbf_s)))


def is_news(chosen: int, before: int) -> bool:
    """Whether an interval has changed by more than measurements waver."""
    return max(chosen, before) >= NEWS * min(chosen, before) and chosen != before


# -- snapshots -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a snapshot has been seen to take, `stall_s` of the trainer and `exchange_s` from capture to commit; and a step."""

    stall_s: float
    exchange_s: float
    step_s: float


def steps_between(measured: Measured, failures_per_s: float) -> int:
    """Steps from one snapshot to the next, at least 1.

    Young's optimum: with T between snapshots, stall/T is lost to saving and failures_per_s · T/2 to repeating work, least at
    T = sqrt(2 · stall / failures_per_s). Never slower than that; faster where all snapshots together stay AFFORDABLE; and never
    faster than keepers can follow, because what they cannot is skipped. Young 1974, Daly 2006 (first order).
    """
    if measured.step_s <= 0:
        return 1
    stall_s = max(0.0, measured.stall_s)
    # What costs nothing, or will hardly ever be needed, has no optimum to compute: 0 times infinity.
    optimal_s = young(stall_s, 1 / failures_per_s) if failures_per_s > 0 and stall_s > 0 else math.inf
    wanted_s = min(optimal_s, stall_s / AFFORDABLE)
    return max(1, math.ceil(measured.exchange_s / measured.step_s), round(wanted_s / measured.step_s))


def lost_per_s(interval_s: float, stall_s: float, failures_per_s: float) -> float:
    """The part of the time that is lost, to saving and to work that has to be repeated."""
    return stall_s / interval_s + failures_per_s * interval_s / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Intervals:
    """What was chosen, in steps, and the measurements that it follows from. `checkpoint_every` 0: none are written;
    `checkpoint_s` 0: none has been written yet."""

    snapshot_every: int
    checkpoint_every: int
    mtbf_s: float
    stall_s: float
    exchange_s: float
    step_s: float
    checkpoint_s: float

    def differs(self, other: Intervals) -> bool:
        return is_news(self.snapshot_every, other.snapshot_every) or is_news(self.checkpoint_every, other.checkpoint_every)

    def __str__(self) -> str:
        text = (
            f"a snapshot every {self.snapshot_every} step(s), which stalls for {1e3 * self.stall_s:.1f} ms and is committed in "
            f"{1e3 * self.exchange_s:.0f} ms; "
        )
        if self.checkpoint_every:
            wrote = f"takes {self.checkpoint_s:.1f} s" if self.checkpoint_s else f"is taken for {ASSUMED_CHECKPOINT_S:.0f} s"
            text += (
                f"a checkpoint every {self.checkpoint_every} steps ({self.checkpoint_every * self.step_s:.0f} s), "
                f"writing one {wrote}; "
            )
        return text + f"a step takes {self.step_s:.3g} s and a failure is expected every {self.mtbf_s / 3600:.3g} h"


class Pace:
    """What the last snapshots have taken, and the interval that follows from it. Every step until ENOUGH have been seen."""

    ENOUGH = 32

    def __init__(self) -> None:
        self._exchange_s: deque[float] = deque(maxlen=self.ENOUGH)
        self._stall_s: deque[float] = deque(maxlen=self.ENOUGH)
        self._step_s: deque[float] = deque(maxlen=self.ENOUGH)

    def add(self, exchange_s: float, pages: Iterable[ControlPage | Mapping[str, int]]) -> None:
        """One more commit, `exchange_s` after the last rank had its capture ready; `pages` are what trainers say of themselves."""
        told = [(page["capture_us"], page["step_us"]) for page in pages]
        if told:
            self._exchange_s.append(exchange_s)
            self._stall_s.append(max(stall for stall, _ in told) / 1e6)
            self._step_s.append(max(step for _, step in told) / 1e6)

    def measured(self) -> Measured | None:
        """None until enough have been seen."""
        if len(self._step_s) < self.ENOUGH:
            return None
        middle = statistics.median
        return Measured(stall_s=middle(self._stall_s), exchange_s=middle(self._exchange_s), step_s=middle(self._step_s))

    def steps(self, failures_per_s: float) -> int:
        """Steps between snapshots."""
        measured = self.measured()
        return 1 if measured is None else steps_between(measured, failures_per_s)
