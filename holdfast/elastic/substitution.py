"""The last rung, carried out: a pipeline stage that nothing can give back is made of its neighbours, where the user allowed it.

What a recovery has to know of a stage is noted with every snapshot: its number, its last gradient norm, the losses it was told of.
"""

from __future__ import annotations

import logging
import math
import re
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from holdfast.arrays import FragmentTable
from holdfast.elastic.stages import LR_SCALE, Finding, LossGuard, Recipe, mix, plan_substitution
from holdfast.errors import ConfigError, LayoutMismatch, SnapshotLost, StateError
from holdfast.events import emit
from holdfast.objects import decode_object
from holdfast.redundancy import Stage
from holdfast.snapshot.plan import RestorePlan
from holdfast.snapshot.recovery import SlotSource
from holdfast.snapshot.state import Held, TrackedState, local_part

logger = logging.getLogger(__name__)

NOTE = "stage"
"""The name under which the note is kept; not free for an object of the user's where stages may be substituted."""


class StageNote:
    """An object among the protected ones. `watch` hangs it on the optimizers, whose gradients it measures before each step.

    The norm costs one reading of the gradients per step. It stays on their device until a snapshot is taken.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.losses: deque[float] = deque(maxlen=20)
        self._squares: dict[int, torch.Tensor | float] = {}
        self._guard: LossGuard | None = None

    def watch(self, optimizers: Iterable[Optimizer]) -> None:
        for number, optimizer in enumerate(optimizers):
            optimizer.register_step_pre_hook(lambda found, *_, number=number: self._measure(number, found))

    def _measure(self, number: int, optimizer: Optimizer) -> None:
        params = (param for group in optimizer.param_groups for param in group["params"])
        grads = [local_part(param.grad) for param in params if param.grad is not None]
        grads = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
        if grads:
            self._squares[number] = get_total_norm(grads).float().square()

    def state_dict(self) -> dict[str, Any]:
        square = sum(float(square) for square in self._squares.values())
        return {"number": self.stage.number, "count": self.stage.count, "grad_square": square, "losses": list(self.losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._squares = {0: state["grad_square"]}
        self.losses = deque(state["losses"], maxlen=self.losses.maxlen)

    def guard(self) -> None:
        """From now on, losses are compared with those from before the substitution, where some were told."""
        self._guard = LossGuard(self.losses) if self.losses else None

    def look(self, loss: float) -> None:
        """One more loss; says once whether training has come back from a substitution."""
        self.losses.append(loss)
        if self._guard is None:
            return
        finding = self._guard.look(loss)
        if finding is Finding.WAITING:
            return
        level = logging.INFO if finding is Finding.ACCEPTED else logging.ERROR
        words = "is back" if finding is Finding.ACCEPTED else "has not come back: begin anew, or from an older checkpoint"
        logger.log(level, "after the substitution of a stage the loss %s (%.4g, limit %.4g)", words, loss, self._guard.limit)
        emit(f"substitution.{finding}", loss=loss, limit=self._guard.limit)
        self._guard = None


def noted(state: Mapping[str, Any], note: StageNote) -> dict[str, Any]:
    """The protected objects with the note among them. Raises StateError where its name is taken."""
    if NOTE in state:
        raise StateError(f"protect(): with a stage, the name {NOTE!r} is taken by what is noted of it; rename the object")
    note.watch(item for item in state.values() if isinstance(item, Optimizer))
    return {**state, NOTE: note}


@dataclass(frozen=True, slots=True)
class Remains:
    """What is left of a step: where its bytes are, the fragments, and the texts of the ranks that have some."""

    plan: RestorePlan
    source: SlotSource
    table: FragmentTable
    texts: Mapping[int, Mapping[str, str]]

    def names_of(self, ranks: Iterable[int], of: Iterable[str]) -> list[str]:
        """The arrays of these objects that these ranks hold, in the order of their numbers."""
        wanted, roots = set(ranks), set(of)
        return sorted(
            {row.array for row in self.table if row.rank in wanted and row.array.split("/")[0] in roots}, key=_in_order
        )


def substitute(state: TrackedState, rank: int, stages: Sequence[Stage], elsewhere: Collection[str], remains: Remains) -> str:
    """Fill this rank from what remains: its own, or its neighbours' where its stage is lost. Returns what was done.

    stages: of every rank; elsewhere: what all ranks answer for. Every rank does its part by itself. Raises SnapshotLost where
    neighbours are lost as well, ConfigError and LayoutMismatch where stages are not alike.
    """
    if len(stages) != remains.plan.world:
        raise ConfigError(f"the step was taken by {remains.plan.world} ranks, these are {len(stages)}; start as many as before")
    counts = sorted({stage.count for stage in stages})
    if len(counts) > 1:
        raise ConfigError(f"ranks speak of pipelines of {counts} stages; give all the same count")
    lost = sorted({stages[missing].number for missing in remains.plan.missing})
    recipes = {number: _recipe(number, lost, stages, remains) for number in lost}
    recipe = recipes.get(stages[rank].number)
    if recipe is None:
        for item in state.prepare(remains.source.specs, elsewhere):
            remains.source.load(item, rank)
        state.load_texts(remains.texts[rank], remains.texts.values())
    else:
        _fill(state, rank, recipe, stages, remains)
        first = next(other for other, stage in enumerate(stages) if stage.number == recipe.sources[0][0])
        state.load_texts(state.texts_by_place(remains.texts[first]))
        for optimizer in state.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * LR_SCALE
    return "; ".join(map(str, recipes.values()))


def _recipe(number: int, lost: Sequence[int], stages: Sequence[Stage], remains: Remains) -> Recipe:
    squares: dict[int, float] = {}
    for rank, texts in remains.texts.items():
        if NOTE not in texts:
            raise SnapshotLost("the snapshot knows nothing of stages; it was taken without protect(stage=…)")
        note = decode_object(texts[NOTE])
        if (note["number"], note["count"]) != (stages[rank].number, stages[rank].count):
            raise ConfigError(
                f"rank {rank} held stage {note['number']} of {note['count']} and is now stage {stages[rank].number} of "
                f"{stages[rank].count}; start the ranks as they were"
            )
        squares[note["number"]] = squares.get(note["number"], 0.0) + note["grad_square"]
    return plan_substitution(
        number, stages[0].count, {stage: math.sqrt(square) for stage, square in squares.items()}, also_lost=lost
    )


def _fill(state: TrackedState, rank: int, recipe: Recipe, stages: Sequence[Stage], remains: Remains) -> None:
    """Put the weighted average of its sources into every array of this rank's modules."""
    held = {item.name: item for item in state.prepare_anew(remains.source.specs) if item.name.split("/")[0] in state.modules}
    ours = sorted(held, key=_in_order)
    found: dict[int, dict[str, torch.Tensor]] = {}
    for number, _ in recipe.sources:
        theirs = remains.names_of((rank for rank, stage in enumerate(stages) if stage.number == number), state.modules)
        _check_alike(recipe.lost, ours, number, theirs)
        found[number] = {own: _read(held[own], other, rank, remains.source) for own, other in zip(ours, theirs, strict=True)}
    with torch.no_grad():
        for name, tensor in mix(found, recipe).items():
            held[name].local.copy_(tensor)


def _read(item: Held, name: str, rank: int, source: SlotSource) -> torch.Tensor:
    """The part of another array that this rank has of `item`."""
    tensor = torch.empty_like(item.local)
    source.load(
        replace(item, placement=replace(item.placement, spec=replace(item.placement.spec, name=name)), tensor=tensor), rank
    )
    return tensor


def _check_alike(lost: int, ours: Sequence[str], number: int, theirs: Sequence[str]) -> None:
    if set(ours) & set(theirs):
        raise ConfigError(
            f"stages {lost} and {number} both have {min(set(ours) & set(theirs))!r}; give every stage names of its own, such as "
            "the layers' numbers in the whole model"
        )
    shapes = [_numberless(name) for name in ours], [_numberless(name) for name in theirs]
    if shapes[0] != shapes[1]:
        apart = sorted(set(shapes[0]) ^ set(shapes[1])) or ["another number of layers"]
        raise LayoutMismatch(
            f"stages {lost} and {number} are not alike ({apart[0]}), so there is nothing to substitute it by; only pipelines of "
            "equal stages can"
        )


def _in_order(name: str) -> list[tuple[int, str]]:
    """Names by the numbers in them: layer 9 before layer 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "#", name)
