"""What a run watches on itself between two steps: that snapshots are being committed, and that what is kept is worth keeping.

All of it is a few words read from and written to the control page, so a step pays microseconds.
"""

from __future__ import annotations

import logging
from collections import deque
from statistics import median

import torch

from holdfast.errors import PoisonedState
from holdfast.events import emit
from holdfast.snapshot.capture import Stats
from holdfast.snapshot.client import Link
from holdfast.snapshot.control import ControlPage
from holdfast.snapshot.state import TrackedState

logger = logging.getLogger(__name__)


class Staleness:
    """Says so when snapshots have stopped being committed; a gap nobody hears of costs the most.

    Stale is what is older than `INTERVALS` times the usual time between two commits, and never less than `FLOOR_S` and
    `STEPS` steps. It is said once a minute for as long as it lasts.
    """

    INTERVALS, STEPS, FLOOR_S, REMIND_S = 10, 20, 60.0, 60.0

    def __init__(self, name: str) -> None:
        self._name = name
        self._committed = -1
        self._since_s = self._said_s = 0.0
        self._intervals_s: deque[float] = deque(maxlen=32)

    def look(self, committed: int, step: int, now_s: float) -> bool:
        """Note where the run is; True when it was said that snapshots are stale."""
        if committed != self._committed:
            if self._committed > 0:
                self._intervals_s.append(now_s - self._since_s)
            self._committed, self._since_s, self._said_s = committed, now_s, float("-inf")
            return False
        age_s = now_s - self._since_s
        if step - committed <= self.STEPS or age_s <= self._allowed_s() or now_s - self._said_s < self.REMIND_S:
            return False
        self._said_s = now_s
        logger.warning(
            "%s: no snapshot has been committed for %.0f s, since step %d, now at %d; see `holdfast status` and the keepers' logs",
            self._name,
            age_s,
            committed,
            step,
        )
        emit("snapshot.stale", job=self._name, committed=committed, step=step, age_s=age_s)
        return True

    def _allowed_s(self) -> float:
        usual_s = median(self._intervals_s) if self._intervals_s else 0.0
        return max(self.FLOOR_S, self.INTERVALS * usual_s)


def watch_parameters(link: Link, state: TrackedState, policy: str) -> None:
    """Have the keeper look at every parameter that is finite now. What is not is meant to be so, and is said."""
    parameters = {id(param) for module in state.modules.values() for param in module.parameters()}
    held = [item for item in state.held() if id(item.tensor) in parameters]
    finite = [item.name for item in held if not item.tensor.is_floating_point() or _all_finite(item.local)]
    left = sorted({item.name for item in held} - set(finite))
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        logger.warning("rank %d: %s%s is not finite from the start, and is not watched for NaN", link.rank, left[0], more)
    link.guard(policy, finite)


def _all_finite(tensor: torch.Tensor) -> bool:
    with torch.no_grad():
        # A sum is finite only if everything in it is; it may overflow all the same, and then every element is looked at.
        return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def refuse_poison(page: ControlPage, step: int) -> None:
    """Raise PoisonedState when the keeper has found that a snapshot of this run was not finite, and the user wants to go back."""
    poisoned = page["poisoned"]
    if poisoned:
        raise PoisonedState(
            f"parameters were NaN or infinite after step {poisoned} (now at {step}); step {page['committed']} is the last clean "
            "snapshot, and the next start goes on from there. If it happens again, look at the data and the learning rate of "
            "that step"
        )


def tell(page: ControlPage, stats: Stats) -> None:
    """Leave this rank's counters where `holdfast status` finds them."""
    page["captured"], page["skipped"], page["dropped"] = stats.captured, stats.skipped, stats.dropped
    page["failed"], page["stall_us"] = stats.failed, int(stats.stall_s * 1e6)
