"""A rehearsal's witness: what every rank's state was after each step, and what it was after each restore.

Written only when the environment names a folder for it (HOLDFAST_WITNESS), one file for each rank, one line for each fact, and
never read by a run. Whoever judges a rehearsal can tell from it that a restored state is, bit for bit, one that was there before.
The digests cost a pass over the whole state in every step: for rehearsals, not for production.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from holdfast.objects import encode_object
from holdfast.snapshot.state import RNG, TrackedState, rng_states

VARIABLE = "HOLDFAST_WITNESS"


class Witness:
    """Appends what this rank's state is. `start` is equal for all ranks whose processes torchrun started together."""

    def __init__(self, folder: Path, rank: int, start: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._rank, self._start = folder / f"rank-{rank}.jsonl", rank, start

    @classmethod
    def summoned(cls, environ: Mapping[str, str], rank: int) -> Witness | None:
        """The witness that the environment asks for, if it does."""
        if not environ.get(VARIABLE):
            return None
        start = f"{environ.get('TORCHELASTIC_RUN_ID', '')}/{environ.get('TORCHELASTIC_RESTART_COUNT', os.getpid())}"
        return cls(Path(environ[VARIABLE]), rank, start)

    def completed(self, step: int, state: TrackedState) -> None:
        self._write({"fact": "step", "step": step, "digest": digest(state), "rng": rng_digest()})

    def started(self, step: int, rung: str | None, epoch: int, state: TrackedState) -> None:
        """What entering `epoch` has come to: restored from `rung`, or from nothing (None, step 0)."""
        self._start = f"{self._start.partition('#')[0]}#{epoch}"  # survivors of a recovery in place were not started anew
        self._write({"fact": "start", "step": step, "rung": rung, "digest": digest(state), "rng": rng_digest()})

    def ended(self, step: int) -> None:
        """The loop is over, and what comes after it is not our concern."""
        self._write({"fact": "end", "step": step})

    def _write(self, line: dict[str, Any]) -> None:
        text = json.dumps({**line, "rank": self._rank, "start": self._start})
        with self._path.open("a") as file:
            file.write(text + "\n")


def digest(state: TrackedState) -> str:
    """Changes when any bit of what `protect` keeps does: arrays as this rank holds them, and objects."""
    found = hashlib.blake2b(digest_size=16)
    for item in sorted(state.held(), key=lambda item: item.name):
        found.update(f"{item.name} {item.placement.spec}".encode())
        found.update(item.local.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for name, text in sorted(state.texts().items()):
        found.update(f"{name} {text}".encode())
    return found.hexdigest()


def rng_digest() -> str:
    """Changes when a random generator does. Apart from the state, because a job need not seed those that it does not use."""
    return hashlib.blake2b(encode_object(rng_states(), RNG).encode(), digest_size=16).hexdigest()
