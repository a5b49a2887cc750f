"""What all ranks hold together, and whether it fits: they build the same arrays, under the same names and settings.

Ranks of a pipeline hold stages, and those of experts hold theirs, so what one rank holds is not what all do.
"""

from __future__ import annotations

import json
from typing import Any

from holdfast.elastic.team import Team
from holdfast.errors import ConfigError, LayoutMismatch


def compare(team: Team, structure: bytes, digests: list[str]) -> frozenset[str]:
    """What all ranks hold together, by name; they differ where each holds a stage, or experts. `digests` are of their structures.

    Raises LayoutMismatch for the first thing about which two ranks disagree; layouts that differ by design pass.
    """
    told: list[bytes] = [structure]
    if len(set(digests)) > 1:  # each structure once, however many ranks have it
        told = team.gather(structure if digests.index(digests[team.rank]) == team.rank else b"")
    found = {digest: json.loads(data) for digest, data in zip(digests, told, strict=False) if data}
    ranks = [found[digest] for digest in digests]
    _check_alike(ranks)
    return frozenset(name for one in found.values() for name in (*one["arrays"], *one["optimized"]))


def _check_alike(ranks: list[dict[str, Any]]) -> None:
    first = ranks[0]
    for rank, other in enumerate(ranks):
        if other["objects"] != first["objects"]:
            raise LayoutMismatch(
                f"rank 0 protects {first['objects']}, rank {rank} {other['objects']}; give every rank the same objects"
            )
        if (other["name"], other["settings"]) != (first["name"], first["settings"]):
            raise ConfigError(
                f"rank 0 and rank {rank} call protect() with different settings: {first['name']}, {first['settings']} and "
                f"{other['name']}, {other['settings']}"
            )
    known: dict[str, tuple[int, Any]] = {}
    for rank, one in enumerate(ranks):
        for name, (dtype, shape, expected) in one["arrays"].items():
            before = known.setdefault(name, (rank, [dtype, shape]))
            if before[1] != [dtype, shape]:
                raise LayoutMismatch(
                    f"{name} is {before[1][0]}{before[1][1]} on rank {before[0]} and {dtype}{shape} on rank {rank}; all ranks have "
                    "to build the same model"
                )
            lacking = [holder for holder in expected if name not in ranks[holder]["arrays"]]
            if lacking:
                raise LayoutMismatch(
                    f"{name} is on rank {rank} and missing on rank {lacking[0]}, which its layout says holds a part"
                )
