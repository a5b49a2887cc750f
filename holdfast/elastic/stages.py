"""A lost pipeline stage put together from its neighbours: the last rung, lossy, and only for who asked for it.

CheckFree (arXiv 2506.15461): where a stage is lost with everything that held it, it becomes the average of the two beside it,
weighted by their last gradient norms, because residual blocks in a row resemble each other and the one that moved more has more to
say. Its optimizer state begins anew with a scaled learning rate. The first and the last stage have one neighbour; in CheckFree+
every second micro-batch runs through the pipeline with the first two and the last two stages swapped, so that each learns to stand
in for the other, and a copy will do. The authors show its worth for language models of 124 M to 1.5 B parameters.

What comes out is not what was lost. `LossGuard` watches whether training recovers from it, and says so when it does not. Here is
what is decided; `substitution.py` carries it out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

import torch

from holdfast.errors import ConfigError, LayoutMismatch, SnapshotLost

LR_SCALE = 1.2
"""By which the learning rate of a substituted stage is raised (the authors' setting for 500 M parameters)."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Make stage `lost` from these stages, with weights that add up to 1. Always lossy."""

    lost: int
    sources: tuple[tuple[int, float], ...]

    def __str__(self) -> str:
        parts = " + ".join(f"{weight:.3f} × stage {stage}" for stage, weight in self.sources)
        return f"stage {self.lost} is substituted by {parts}; this is lossy: its weights are not those that were lost"


def stage_order(stages: int, micro: int, *, swap: bool = True) -> list[int]:
    """In which order micro-batch `micro` runs through the stages: every second one with the first and the last two swapped.

    With fewer than four stages the two swaps would share one, and nothing is swapped.
    """
    order = list(range(stages))
    if swap and micro % 2 and stages >= 4:
        order[:2], order[-2:] = order[1::-1], order[:-3:-1]
    return order


def plan_substitution(lost: int, stages: int, grad_norms: Mapping[int, float], *, also_lost: Iterable[int] = ()) -> Recipe:
    """From which stages to make `lost`. `grad_norms` are the last ones of the stages that are left.

    Raises SnapshotLost when a neighbour that is needed is lost as well, and ConfigError for norms that cannot weigh anything.
    """
    if not 0 <= lost < stages or stages < 2:
        raise ConfigError(f"there is no stage {lost} to substitute in a pipeline of {stages} stages")
    gone = set(also_lost) - {lost}
    wanted = [1] if lost == 0 else [stages - 2] if lost == stages - 1 else [lost - 1, lost + 1]
    missing = [stage for stage in wanted if stage in gone]
    if missing:
        raise SnapshotLost(
            f"stage {lost} cannot be substituted: stage {missing[0]} beside it is lost as well; go back to a checkpoint, or start "
            "anew"
        )
    if len(wanted) == 1:
        return Recipe(lost, ((wanted[0], 1.0),))
    norms = [grad_norms.get(stage, math.nan) for stage in wanted]
    if not all(math.isfinite(norm) and norm >= 0 for norm in norms):
        raise ConfigError(f"the gradient norms of stages {wanted} are {norms}; both have to be finite to weigh the two stages")
    total = sum(norms)
    weights = [norm / total for norm in norms] if total > 0 else [0.5, 0.5]
    return Recipe(lost, tuple(zip(wanted, weights, strict=True)))


def mix(states: Mapping[int, Mapping[str, torch.Tensor]], recipe: Recipe) -> dict[str, torch.Tensor]:
    """The substitute's state dict, in new tensors: weighted averages; what is no floating-point number comes from the first source.

    Raises LayoutMismatch where the stages differ in structure, which an average would hide.
    """
    first, *others = (states[stage] for stage, _ in recipe.sources)
    for (stage, _), other in zip(recipe.sources[1:], others, strict=True):
        _check_alike(recipe.sources[0][0], first, stage, other)
    return {
        name: sum(states[stage][name].double() * weight for stage, weight in recipe.sources).to(tensor.dtype)  # type: ignore[union-attr]
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in first.items()
    }


def _check_alike(one: int, first: Mapping[str, torch.Tensor], two: int, other: Mapping[str, torch.Tensor]) -> None:
    different = sorted(first.keys() ^ other.keys()) or sorted(name for name in first if first[name].shape != other[name].shape)
    if different:
        raise LayoutMismatch(
            f"stages {one} and {two} differ at {different[0]!r}, so there is no average of them; only pipelines of equal stages "
            "can substitute one (name parameters within the stage, not by layer number)"
        )


class Finding(StrEnum):
    """What a LossGuard has come to."""

    WAITING = "waiting"
    ACCEPTED = "accepted"
    REJECTED = "rejected"


class LossGuard:
    """Whether training recovers from a substitution: within `patience` steps the loss has to be back.

    before: losses of the steps before the stage was lost; tolerance: how far above their median counts as back, as a share of it.
    A loss that is not finite rejects at once. Rejected means: fall to the next rung.
    """

    def __init__(self, before: Sequence[float], *, tolerance: float = 0.1, patience: int = 100, window: int = 5) -> None:
        if not before or patience < window or window < 1:
            raise ConfigError("a guard needs losses from before, and patience for at least one window")
        self.limit = median(before) + tolerance * abs(median(before))
        self.finding = Finding.WAITING
        self._patience, self._window = patience, window
        self._after: list[float] = []

    def look(self, loss: float) -> Finding:
        """The finding after one more step; it no longer changes once it is made."""
        if self.finding is not Finding.WAITING:
            return self.finding
        self._after.append(loss)
        recent = self._after[-self._window :]
        if not math.isfinite(loss):
            self.finding = Finding.REJECTED
        elif len(recent) == self._window and median(recent) <= self.limit:
            self.finding = Finding.ACCEPTED
        elif len(self._after) >= self._patience:
            self.finding = Finding.REJECTED
        return self.finding
