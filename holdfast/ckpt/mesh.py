"""Target meshes as a user writes them, and the ranks in them: `dp=2,tp=4` has eight, the last axis varying fastest.

dp, fsdp   parameters and optimizer state are cut on dimension 0, torch.chunk's way, as FSDP2 does
ddp        every rank holds everything the other axes leave it
tp         tensor parallel: each array is cut where its layout rule says
ep         expert parallel: stacked experts are cut on dimension 0
pp         pipeline stages: whole layers, by their number in the name
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from holdfast.errors import ConfigError

AXES = ("pp", "ddp", "dp", "fsdp", "ep", "tp")
MAX_RANKS = 1 << 20

_AXIS = re.compile(r"([a-z]+)=([0-9]+)")


@dataclass(frozen=True, slots=True)
class Mesh:
    """Named axes and their sizes, in the order in which ranks are counted."""

    axes: tuple[tuple[str, int], ...]

    @classmethod
    def parse(cls, text: str) -> Mesh:
        axes = []
        for part in text.replace(" ", "").split(","):
            match = _AXIS.fullmatch(part)
            if match is None or match[1] not in AXES:
                raise ConfigError(
                    f"mesh {text!r}: {part!r} is not axis=size with an axis of {', '.join(AXES)}; write dp=2,tp=4"
                )
            axes.append((match[1], int(match[2])))
        return cls(tuple(axes))

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        if len(set(names)) < len(names) or {"dp", "fsdp"} <= set(names):
            raise ConfigError(f"mesh {self}: an axis is named twice (dp and fsdp are one)")
        if any(size < 1 for _, size in self.axes) or self.ranks > MAX_RANKS:
            raise ConfigError(f"mesh {self}: sizes have to be at least 1 and make at most {MAX_RANKS} ranks")

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.axes)

    @property
    def ranks(self) -> int:
        return math.prod(size for _, size in self.axes)

    def size(self, *names: str) -> int:
        """The product of the named axes; an axis that is not there counts 1."""
        return math.prod(size for name, size in self.axes if name in names)

    def coordinate(self, rank: int) -> Mapping[str, int]:
        """Where a rank stands on every axis."""
        where: dict[str, int] = {}
        for name, size in reversed(self.axes):
            rank, where[name] = divmod(rank, size)
        return where
