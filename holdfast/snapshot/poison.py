"""The guard against poison: a snapshot whose parameters hold NaN or infinity is not what a run wants to return to.

The keeper looks at every parameter while it checksums it, so training does not pay for it. What follows is the user's choice: a
word in the log ("warn"), keeping the last clean snapshot instead ("refuse"), or that and ending the run so that it starts again
from there ("step_back").
"""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING

import numpy as np

from holdfast.arrays import Fragment, FragmentTable
from holdfast.events import emit
from holdfast.snapshot.coordinator import GivenUp

if TYPE_CHECKING:
    from holdfast.snapshot.keeper import Keeper

logger = logging.getLogger(__name__)

POLICIES = ("warn", "refuse", "step_back")
CHUNK = 1 << 16
"""Elements looked at together: their marks stay in the cache."""

REMIND_S = 60.0

_SIXTEEN_BITS = {"bfloat16": 0x7F80, "float16": 0x7C00}
"""The exponent's bits; when all are set the number is not finite."""

_NATIVE = {"float32": np.float32, "float64": np.float64}


def is_finite(data: memoryview, dtype: str) -> bool:
    """No element is NaN or infinite. Types that hold neither, or that are not known here, are finite."""
    if dtype in _NATIVE:
        values = np.frombuffer(data, _NATIVE[dtype])
        return all(bool(np.isfinite(values[at : at + CHUNK]).all()) for at in range(0, values.size, CHUNK))
    if dtype in _SIXTEEN_BITS:
        limit = _SIXTEEN_BITS[dtype] << 1  # without its sign, the number is not finite from here on
        words, scratch = np.frombuffer(data, np.uint16), np.empty(CHUNK, np.uint16)
        for at in range(0, words.size, CHUNK):
            part = words[at : at + CHUNK]
            if int(np.left_shift(part, 1, out=scratch[: part.size]).max()) >= limit:
                return False
    return True


class PoisonGuard:
    """Which arrays of which rank to look at, and what to do about it."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self.policy = "warn"
        self.refused = 0
        self._arrays: dict[int, frozenset[str]] = {}
        self._reminded: float | None = None

    def verb_guard(self, rank: int, attachment: str, policy: str, payload: memoryview) -> None:
        """Look at these parameters of `rank` for NaN and infinity from now on, and do what the policy says."""
        with self._keeper.lock:
            self._keeper.trainers.check(rank, attachment)
            self.policy = policy
            self._arrays[rank] = frozenset(json.loads(bytes(payload)))

    def allows(self, rank: int, step: int, table: FragmentTable, body: memoryview) -> bool:
        """False for a snapshot that the policy keeps from being committed."""
        watched = self._arrays.get(rank)
        if not watched:
            return True
        poisoned = {row.array for row in table if row.array in watched and not is_finite(_bytes_of(row, body), row.dtype)}
        if not poisoned:
            self._reminded = None
            return True
        self._say(rank, step, sorted(poisoned))
        self.refused += self.policy != "warn"
        return self.policy == "warn"

    def refuse(self, step: int, number: int) -> None:
        """Keep the last clean snapshot in this one's stead, and have the trainers of the node step back where the user wants it."""
        with self._keeper.lock:
            if self._keeper.members.view is None:
                return  # keepers are regrouping; the round is void already
            if self.policy == "step_back":
                self._keeper.trainers.say(self._keeper.members.local_ranks, poisoned=step)
            self._keeper.tell(GivenUp(self._keeper.node, step, self._keeper.progress(), "poisoned", number))

    def _say(self, rank: int, step: int, arrays: list[str]) -> None:
        """Once, and then once a minute."""
        emit(
            "snapshot.poisoned",
            job=self._keeper.job,
            rank=rank,
            step=step,
            arrays=arrays[:20],
            count=len(arrays),
            policy=self.policy,
        )
        now = time.monotonic()
        if self._reminded is not None and now - self._reminded < REMIND_S:
            return
        self._reminded = now
        more = f" and {len(arrays) - 1} more" if len(arrays) > 1 else ""
        ending = "it is committed all the same" if self.policy == "warn" else "the last clean snapshot is kept instead"
        logger.warning("rank %d, step %d: %s%s holds NaN or infinity; %s", rank, step, arrays[0], more, ending)


def _bytes_of(row: Fragment, body: memoryview) -> memoryview:
    return body[row.slot_offset : row.slot_offset + row.nbytes]
