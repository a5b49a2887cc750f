"""What the detectors look at, gathered from the running job; `verdicts.py` judges it. Each sensor is thin and can be used alone.

Sensors that compare ranks inside the loop (`LossWatch`, `PaceWatch`, `check_replicas`) use the default process group, so every rank
has to call them at the same step, and every rank comes to the same verdict. `HangWatch` cannot: it has a thread and a store of its
own, and works while the training thread is stuck in a collective.
"""

from __future__ import annotations

import json
import logging
import math
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch
import torch.distributed as dist

from holdfast.coding import crc32c
from holdfast.elastic._torch_private import collectives_entered
from holdfast.elastic.pulse import stack_of
from holdfast.elastic.team import Team
from holdfast.environment import Environment
from holdfast.events import emit
from holdfast.snapshot.state import local_part
from holdfast.snapshot.verdicts import (
    Progress,
    Verdict,
    judge_hang,
    judge_losses,
    judge_replicas,
    judge_stragglers,
)

logger = logging.getLogger(__name__)


def announce(verdict: Verdict | None) -> Verdict | None:
    """Log it and tell every subscriber; passes it on."""
    if verdict is not None:
        logger.warning("%s", verdict)
        emit("detector.verdict", **asdict(verdict))
    return verdict


# -- hang ---------------------------------------------------------------------------------------------------------------------


class Board(Protocol):
    """Where ranks leave word for each other; torch's TCPStore is one."""

    def set(self, key: str, value: str, /) -> None: ...
    def check(self, keys: list[str], /) -> bool: ...
    def get(self, key: str, /) -> bytes: ...


class HangWatch:
    """Finds the rank that has not entered a collective which the others wait in. Use as a context manager around training.

    groups: process groups by name, each with its ranks; store: a torch Store for this purpose alone (a client that the training
    thread uses too would be held by it); after_s: how long all of a group has to stand still. `found` is the verdict, once there is
    one, the same on all ranks that are alive.
    """

    def __init__(
        self,
        store: Board,
        rank: int,
        groups: Mapping[str, tuple[dist.ProcessGroup, Sequence[int]]],
        *,
        after_s: float = 30.0,
        every_s: float = 1.0,
        tell: Callable[[Verdict], None] | None = None,
    ) -> None:
        self._store, self._rank, self._groups = store, rank, dict(groups)
        self._after_s, self._every_s, self._tell = after_s, every_s, tell
        self._seen: dict[str, tuple[int, float]] = {}
        self._main = threading.get_ident()
        self._stop = threading.Event()
        self.found: Verdict | None = None
        self._thread = threading.Thread(target=self._watch, name="holdfast-hang", daemon=True)

    def __enter__(self) -> HangWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                self._post()
                verdict = judge_hang(
                    self._read(), {name: ranks for name, (_, ranks) in self._groups.items()}, after_s=self._after_s
                )
            except (RuntimeError, OSError) as error:  # the store is gone, so the job is ending
                logger.warning("the hang detector stops: %s", error)
                return
            if verdict is not None and (self.found is None or self.found.guilty != verdict.guilty):
                self.found = announce(verdict)
                if self._tell is not None:
                    self._tell(verdict)

    def _post(self) -> None:
        now = time.monotonic()
        mine: dict[str, Any] = {}
        for name, (group, _) in self._groups.items():
            entered = collectives_entered(group)
            if self._seen.get(name, (-1, now))[0] != entered:
                self._seen[name] = (entered, now)
            still_s = now - self._seen[name][1]
            mine[name] = {
                "entered": entered,
                "still_s": still_s,
                "stack": stack_of(self._main) if still_s > self._after_s / 2 else (),
            }
        self._store.set(f"watch/{self._rank}", json.dumps({"at": time.time(), "groups": mine}))

    def _read(self) -> dict[str, dict[int, Progress]]:
        """What every rank last said; one that has said nothing for as long as a hang takes has not answered."""
        found: dict[str, dict[int, Progress]] = {name: {} for name in self._groups}
        for rank in sorted({rank for _, ranks in self._groups.values() for rank in ranks}):
            if not self._store.check([f"watch/{rank}"]):
                continue
            told = json.loads(self._store.get(f"watch/{rank}"))
            if time.time() - told["at"] > self._after_s + 2 * self._every_s:
                continue
            for name, item in told["groups"].items():
                if name in found and rank in self._groups[name][1]:
                    found[name][rank] = Progress(item["entered"], item["still_s"], tuple(item["stack"]))
        return found


# -- in the loop ----------------------------------------------------------------------------------------------------------------


class LossWatch:
    """Judges the loss of every step by the vote of all ranks, so that no rank goes on with what another refuses."""

    def __init__(self, *, remember: int = 64, score: float = 10.0) -> None:
        self._score = score
        self._history: deque[float] = deque(maxlen=remember)
        self._team = Team(Environment.read())

    def look(self, loss: float | torch.Tensor) -> Verdict | None:
        """Before `optimizer.step()`: None when all is well. A loss that was judged is not remembered for later ones."""
        told = self._team.gather(json.dumps(float(loss)).encode())
        losses = {rank: float(json.loads(text)) for rank, text in enumerate(told)}
        verdict = announce(judge_losses(losses, self._history, score=self._score))
        if verdict is None:
            self._history.append(math.fsum(losses.values()) / len(losses))
        return verdict


class PaceWatch:
    """Judges who is slow, by the processor time of the training thread: waiting for others in a collective takes none of it.

    For training on the CPU. On a GPU pass the measured seconds of the step's own kernels to `lap`.
    """

    def __init__(self, *, remember: int = 60) -> None:
        self._times: deque[float] = deque(maxlen=remember)
        self._last = time.thread_time()
        self._team = Team(Environment.read())

    def lap(self, seconds: float | None = None) -> None:
        """A step has ended."""
        now = time.thread_time()
        self._times.append(now - self._last if seconds is None else seconds)
        self._last = now

    def look(self) -> Verdict | None:
        """Compare all ranks; every few dozen steps is often enough."""
        told = self._team.gather(json.dumps(list(self._times)).encode())
        verdict = announce(judge_stragglers({rank: json.loads(text) for rank, text in enumerate(told)}))
        self._last = time.thread_time()
        return verdict


def check_replicas(tensors: Mapping[str, torch.Tensor]) -> Verdict | None:
    """Whether all ranks hold the same bytes: parameters and optimizer state of DDP, between two steps. Reads every byte once."""
    crcs = {name: _crc(tensor) for name, tensor in tensors.items()}
    told = Team(Environment.read()).gather(json.dumps(crcs).encode())
    return announce(judge_replicas({rank: json.loads(text) for rank, text in enumerate(told)}))


def _crc(tensor: torch.Tensor) -> int:
    local = local_part(tensor).contiguous().cpu().reshape(-1)
    return crc32c(local.view(torch.uint8).numpy().data) if local.numel() else 0


def probe_links(me: int, addresses: Mapping[int, tuple[str, int]], *, timeout_s: float = 2.0) -> dict[tuple[int, int], bool]:
    """Which ranks' addresses accept a connection from here; gather those of all ranks for `judge_links`."""
    return {(me, rank): _reaches(address, timeout_s) for rank, address in addresses.items() if rank != me}


def _reaches(address: tuple[str, int], timeout_s: float) -> bool:
    try:
        socket.create_connection(address, timeout=timeout_s).close()
    except OSError:
        return False
    return True
