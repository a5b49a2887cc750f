"""Text to train on that every machine has: the sources of Python's own standard library, read as bytes.

Sample number `n` of a seed is always the same window of the text, whoever reads it. Ranks share out the samples of a batch, so
the order of samples does not depend on how many ranks there are, and a cursor is one number.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def stdlib_text(nbytes: int = 4_000_000) -> Tensor:
    """The first `nbytes` of the standard library's sources in alphabetical order, as a uint8 tensor."""
    root = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        if not {"site-packages", "dist-packages", "test", "tests"} & set(path.relative_to(root).parts):
            text += path.read_bytes()
        if len(text) >= nbytes:
            break
    return torch.frombuffer(text[:nbytes], dtype=torch.uint8)


class Loader:
    """Gives this rank its part of one batch after another; its state is the number of samples all ranks have used."""

    def __init__(self, text: Tensor, *, seed: int, batch: int, context: int, rank: int = 0, world_size: int = 1) -> None:
        if batch % world_size:
            raise ValueError(f"a batch of {batch} samples cannot be shared evenly by {world_size} ranks")
        self.text, self.seed, self.batch, self.context = text, seed, batch, context
        self.rank, self.share = rank, batch // world_size
        self.samples_used = 0

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Tokens and the bytes that follow each of them, both (share of the batch, context) int64."""
        first = self.samples_used + self.rank * self.share
        self.samples_used += self.batch
        windows = torch.stack([self._sample(number) for number in range(first, first + self.share)]).long()
        return windows[:, :-1], windows[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "samples_used": self.samples_used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seed, self.samples_used = state["seed"], state["samples_used"]

    def _sample(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed << 40) + number)
        start = int(torch.randint(len(self.text) - self.context, (), generator=generator))
        return self.text[start : start + self.context + 1]
