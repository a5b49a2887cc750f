"""Which steps of a run are the best, by a number that was saved with them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from holdfast.ckpt.catalog import is_sound, list_steps
from holdfast.ckpt.reader import Checkpoint, open_directory
from holdfast.errors import ConfigError
from holdfast.objects import decode_object


def best_steps(root: str | Path, by: str, count: int = 1, *, highest: bool = False) -> list[int]:
    """The `count` sound steps with the lowest (or highest) value of the object `by`, best first; a later step wins a tie.

    `by` is an object's name, or a path into it: `metrics.loss`. Steps without it, and NaN, are never best. Raises ConfigError when
    no step has it.
    """
    if count < 1:
        raise ConfigError(f"keep the best {count} steps: it has to be 1 or more")
    scores: dict[int, float] = {}
    known: set[str] = set()
    for info in list_steps(root):
        if is_sound(info):
            numbers = _numbers(open_directory(info.path))
            known |= set(numbers)
            if by in numbers and not math.isnan(numbers[by]):
                scores[info.step] = numbers[by]
    if not scores:
        have = ", ".join(sorted(known)[:12]) or "none at all"
        raise ConfigError(f"{root}: no step has a number {by!r} among its objects; there are: {have}")
    sign = -1 if highest else 1
    return sorted(scores, key=lambda step: (sign * scores[step], -step))[:count]


def _numbers(checkpoint: Checkpoint) -> dict[str, float]:
    """Every number in the lowest rank's objects, by its path."""
    found: dict[str, float] = {}
    for name, text in checkpoint.objects.get(min(checkpoint.objects, default=0), {}).items():
        _collect(name.replace("/", "."), decode_object(text), found)
    return found


def _collect(path: str, value: Any, found: dict[str, float]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _collect(f"{path}.{key}", item, found)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        found[path] = float(value)
