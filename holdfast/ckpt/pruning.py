"""Retention: which steps to keep, and how to remove the others so that a crash never leaves half a checkpoint that looks whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.ckpt.catalog import StepInfo, is_sound, list_steps
from holdfast.ckpt.durable import disk_errors, sync_path
from holdfast.ckpt.steps import COMMIT, step_directories, unfinished
from holdfast.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """Keep the newest `last` steps, every step that `every` divides, and the steps named in `also`."""

    last: int = 3
    every: int | None = None
    also: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.last < 1:
            raise ConfigError(f"keep the last {self.last} steps: it has to be 1 or more, the newest is never removed")
        if self.every is not None and self.every < 1:
            raise ConfigError(f"keep every {self.every}th step: it has to be 1 or more")

    def keeps(self, steps: Sequence[int]) -> set[int]:
        """Which of these steps stay."""
        newest = sorted(steps)[-self.last :]
        return {step for step in steps if step in newest or step in self.also or (self.every and step % self.every == 0)}


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was removed, or would be."""

    path: str
    kept: tuple[int, ...]
    removed: tuple[int, ...]
    leftovers: tuple[str, ...]
    freed_nbytes: int
    dry_run: bool


def prune(root: str | Path, retention: Retention, *, dry_run: bool = False, leftovers: bool = True) -> Pruned:
    """Only what `retention` keeps is left; with `leftovers` also what dead saves left behind is removed.

    Only sound steps count as kept, so rot cannot make the last good checkpoint go; the newest sound one is never removed. Hard
    links are the filesystem's to count: bytes that a kept step shares stay.
    """
    root = Path(root)
    infos = list_steps(root)
    sound = [info.step for info in infos if is_sound(info)]
    kept = retention.keeps(sound)
    doomed = [info for info in infos if info.step not in kept and info.step in sound]
    dead = _dead(root, infos) if leftovers else []
    freed = sum(_unshared_nbytes(path) for path in (*(info.path for info in doomed), *dead))
    if not dry_run:
        with disk_errors("removing from", root):
            for path in (*(info.path for info in doomed), *dead):
                _remove(path)
            sync_path(root)
    return Pruned(
        str(root), tuple(sorted(kept)), tuple(info.step for info in doomed), tuple(path.name for path in dead), freed, dry_run
    )


def _dead(root: Path, infos: Iterable[StepInfo]) -> list[Path]:
    """What dead saves left: temporary directories, and a step that was renamed but never committed."""
    committed = {info.path for info in infos}
    return [*unfinished(root), *(path for path in step_directories(root) if path not in committed)]


def _unshared_nbytes(path: Path) -> int:
    """Bytes that go when the directory goes: files that no other directory links to."""
    files = (Path(place) / name for place, _, names in os.walk(path) for name in names)
    return sum(info.st_blocks * 512 for file in files if (info := file.lstat()).st_nlink == 1)


def _remove(path: Path) -> None:
    # COMMIT first, and durably: what is half removed is no checkpoint any more.
    if (path / COMMIT).exists():
        (path / COMMIT).unlink()
        sync_path(path)
    shutil.rmtree(path)
