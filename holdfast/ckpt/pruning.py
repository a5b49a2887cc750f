"""Retention: which steps to keep, and how to remove the others so that a crash never leaves half a checkpoint that looks whole."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.ckpt.catalog import StepInfo, is_sound, list_steps
from holdfast.ckpt.durable import disk_errors, sync_path
from holdfast.ckpt.steps import COMMIT, step_directories, unfinished
from holdfast.ckpt.storage import Place, RemotePath, place
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


def prune(root: str | Place, retention: Retention, *, dry_run: bool = False, leftovers: bool = True) -> Pruned:
    """Only what `retention` keeps is left; with `leftovers` also what dead saves left behind is removed.

    Only sound steps count as kept, so rot cannot make the last good checkpoint go; the newest sound one is never removed. Bytes
    that a kept step inherited stay: they are hard links, which the filesystem counts.
    """
    root = place(root)
    infos = list_steps(root)
    sound = [info.step for info in infos if is_sound(info)]
    kept = retention.keeps(sound)
    doomed = [info for info in infos if info.step not in kept and info.step in sound]
    dead = _dead(root, infos) if leftovers else []
    freed = _freed_nbytes([*(info.path for info in doomed), *dead])
    if not dry_run:
        with disk_errors("removing from", root):
            for path in (*(info.path for info in doomed), *dead):
                _remove(path)
            if isinstance(root, Path):
                sync_path(root)
    return Pruned(
        str(root), tuple(sorted(kept)), tuple(info.step for info in doomed), tuple(path.name for path in dead), freed, dry_run
    )


def _dead(root: Place, infos: Iterable[StepInfo]) -> list[Place]:
    """What dead saves left: temporary directories, and a step that was renamed but never committed."""
    committed = {info.path for info in infos}
    return [*unfinished(root), *(path for path in step_directories(root) if path not in committed)]


def _freed_nbytes(places: Iterable[Place]) -> int:
    """Bytes that go when these go: files that nobody outside links to."""
    links: Counter[tuple[int, int]] = Counter()
    found: dict[tuple[int, int], os.stat_result] = {}
    remote = 0
    for path in places:
        if isinstance(path, RemotePath):
            remote += sum(nbytes for _, nbytes in path.files())
            continue
        for where, _, names in os.walk(path):
            for info in (os.lstat(os.path.join(where, name)) for name in names):
                links[info.st_dev, info.st_ino] += 1
                found[info.st_dev, info.st_ino] = info
    return remote + sum(info.st_blocks * 512 for key, info in found.items() if info.st_nlink <= links[key])


def _remove(path: Place) -> None:
    # COMMIT first, and durably: what is half removed is no checkpoint any more.
    if (path / COMMIT).exists():
        (path / COMMIT).unlink()
        if isinstance(path, Path):
            sync_path(path)
    if isinstance(path, RemotePath):
        path.remove_tree()
    else:
        shutil.rmtree(path)
