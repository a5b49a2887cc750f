"""How often to take a snapshot: from what one costs the training, how fast keepers follow, and how often something fails. Pure."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from holdfast.snapshot.control import ControlPage

AFFORDABLE = 0.002
"""Part of the training time that snapshots may always take: so little is well spent on losing less when something fails."""

FAILURES_PER_NODE_S = 419 / (54 * 86400 * 2048)
"""Assumed until failures are observed: Llama 3's training, 419 unplanned interruptions in 54 days on 2048 nodes of 8 GPUs."""


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
    optimal_s = math.sqrt(2 * stall_s / failures_per_s) if failures_per_s > 0 else math.inf
    wanted_s = min(optimal_s, stall_s / AFFORDABLE)
    return max(1, math.ceil(measured.exchange_s / measured.step_s), round(wanted_s / measured.step_s))


def lost_per_s(interval_s: float, stall_s: float, failures_per_s: float) -> float:
    """The part of the time that is lost, to saving and to work that has to be repeated."""
    return stall_s / interval_s + failures_per_s * interval_s / 2


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

    def steps(self, nodes: int, failures_per_s: float | None = None) -> int:
        """Steps between snapshots; a failure rate that has been observed replaces the assumed one."""
        if len(self._step_s) < self.ENOUGH:
            return 1
        middle = statistics.median
        measured = Measured(stall_s=middle(self._stall_s), exchange_s=middle(self._exchange_s), step_s=middle(self._step_s))
        return steps_between(measured, nodes * FAILURES_PER_NODE_S if failures_per_s is None else failures_per_s)
