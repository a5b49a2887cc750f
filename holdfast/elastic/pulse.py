"""A trainer's pulse: a thread that tells the node's keeper how far this rank is, while the training thread does its work.

The training thread pays for reading two counters at the end of a step, and never waits. `holdfast.snapshot.diagnosis` compares.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from holdfast.elastic._torch_private import collectives_entered, groups_of_this_rank
from holdfast.errors import HoldfastError, KeeperUnreachable
from holdfast.snapshot import diagnosis
from holdfast.snapshot.client import connect
from holdfast.snapshot.state import Held
from holdfast.snapshot.verdicts import Trouble, Verdict
from holdfast.snapshot.wire import Connection

logger = logging.getLogger(__name__)

PULSE_S = (0.05, 2.0)
"""The shortest and the longest time between two pulses."""

Sums = Callable[[], Sequence[tuple[int, Mapping[str, int]]]]
Tell = Callable[[Verdict], None]


class Heart:
    """Beats from when it is built until `close`. To be built on the training thread, which then calls `step_done`.

    who: rank and attachment, as they are now; after_s: how long nothing moves before that is called a hang; sums: what was summed
    of the state since it was last called, by step; tell: called, on the heart's thread, with every verdict that does not name this
    rank and that no lower such rank is there to say.
    """

    def __init__(
        self,
        memory: Path,
        who: Callable[[], Mapping[str, Any]],
        *,
        step: int,
        after_s: float,
        held: Iterable[Held],
        sums: Sums,
        tell: Tell,
    ) -> None:
        self._memory, self._who, self._after_s, self._sums, self._tell = memory, who, after_s, sums, tell
        self._rank = int(who()["rank"])
        tensors = list(held)
        self._peers = work_of(tensors)
        # While a GPU computes, its thread waits or spins; what it takes of a processor says nothing.
        self._is_on_cpu = all(item.tensor.device.type == "cpu" for item in tensors)
        self._groups: dict[str, tuple[dist.ProcessGroup, tuple[int, ...]]] = {}
        self._moved: tuple[Any, float] = ((), time.monotonic())
        self._losses: deque[tuple[int, float]] = deque(maxlen=diagnosis.LOSSES_KEPT)
        self._heard = 0
        self._main = threading.get_ident()
        self._look()
        self._at_step: tuple[int, float, dict[str, int]] = (step, time.thread_time(), self._entered())
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="holdfast-pulse", daemon=True)
        self._thread.start()

    def step_done(self, step: int) -> None:
        """On the training thread: this step is complete."""
        self._at_step = step, time.thread_time(), self._entered()

    def note_loss(self, step: int, loss: float) -> None:
        """On the training thread: compared with other ranks' and those of earlier steps, by the lowest node's keeper."""
        self._losses.append((step, loss))

    def stop(self) -> None:
        """Beat once more and no longer. Returns at once: a recovery does not wait for a keeper that is slow to answer."""
        self._closed.set()

    def close(self) -> None:
        """The loop has ended: what this rank does now holds nobody up."""
        self.stop()
        self._thread.join(timeout=1)

    def _entered(self) -> dict[str, int]:
        try:
            return {name: collectives_entered(group) for name, (group, _) in self._groups.items()}
        except RuntimeError:  # a transport is just being replaced
            return {}

    def _look(self) -> None:
        found = groups_of_this_rank()
        if [group for _, group, _ in found] != [group for group, _ in self._groups.values()]:
            self._groups = {_name_of(name, ranks): (group, ranks) for name, group, ranks in found}

    # -- on the heart's thread --

    def _beat(self) -> None:
        every_s = min(PULSE_S[1], max(PULSE_S[0], self._after_s / diagnosis.PULSES))
        line: Connection | None = None
        while True:
            left = self._closed.wait(every_s)
            last = self._pulse(left) if left else None
            if left:
                # Whoever still has the run must not keep gloo's threads alive: one that is busy when Python ends aborts the
                # process. Before a keeper is asked, which may be slow to answer.
                self._groups = {}
            try:
                line = line or connect(self._memory, timeout_s=10)
                answer = line.ask("pulse", said=asdict(last or self._pulse(left)), heard=self._heard, **self._who())
            except KeeperUnreachable:  # the lifeline says so, and has it started again
                line = None
            except (HoldfastError, OSError) as error:
                logger.info("rank %d is no longer watched: %s", self._rank, error)
                break
            else:
                self._heard = answer["heard"]
                self._hear(answer["verdicts"])
            if left:
                break
        self._groups = {}
        if line is not None:
            line.close()

    def _pulse(self, left: bool) -> diagnosis.Pulse:
        self._look()
        entered, now_s = self._entered(), time.monotonic()
        step, busy_s, at_step = self._at_step
        if self._moved[0] != (step, entered):
            self._moved = (step, entered), now_s
        is_still = now_s - self._moved[1] > self._after_s / 2
        return diagnosis.Pulse(
            step=step,
            entered=entered,
            at_step=at_step,
            groups={name: diagnosis.pack(ranks) for name, (_, ranks) in self._groups.items() if name in entered},
            busy_s=busy_s if self._is_on_cpu else None,
            peers=self._peers,
            sums=self._sums(),
            losses=[self._losses.popleft() for _ in range(len(self._losses))],
            stack=stack_of(self._main) if is_still else (),
            left=left,
            after_s=self._after_s,
        )

    def _hear(self, verdicts: Iterable[dict[str, Any]]) -> None:
        for fields in verdicts:
            verdict = Verdict(
                Trouble(fields["trouble"]), tuple(fields["guilty"]), fields["confidence"], tuple(fields["evidence"])
            )
            speaker = next(rank for rank in range(len(verdict.guilty) + 1) if rank not in verdict.guilty)
            if speaker == self._rank:
                self._tell(verdict)


def _name_of(name: str, ranks: Sequence[int]) -> str:
    """For people, and the same on all members: two groups may have one name, or one set of ranks."""
    first, *rest = diagnosis.pack(ranks)
    if first == -1:
        return f"{name} of ranks {', '.join(map(str, rest))}"
    end, stride = rest
    return f"{name} of ranks {first} to {end - 1}{f' by {stride}' if stride > 1 else ''}"


def work_of(held: Iterable[Held]) -> str:
    """Equal for ranks that hold parts of the same parameters, and so do the same work."""
    specs = sorted((item.placement.spec.name, item.placement.spec.shape) for item in held if item.lazy)
    return hashlib.blake2b(json.dumps(specs).encode(), digest_size=8).hexdigest()


def stack_of(thread: int) -> tuple[str, ...]:
    """Where a thread of this process is, innermost first."""
    frame = sys._current_frames().get(thread)
    frames = traceback.extract_stack(frame)[::-1] if frame is not None else []
    return tuple(f"{item.name} ({Path(item.filename).name}:{item.lineno})" for item in frames[:8])
