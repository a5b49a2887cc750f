"""A loader whose samples outlive the ranks that load them: each is used once, whoever is there.

The order is global (`order.py`), the cursor is one number, equal on all ranks and part of the snapshot, and it counts what the
loop was given, not what workers have fetched ahead. Reading is left to `torch.utils.data.DataLoader` or torchdata's
`StatefulDataLoader`, with workers, prefetch and pinned memory as usual.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from holdfast.elastic.batching import Batching, StepPlan, plan_step
from holdfast.elastic.order import NAME, check_size, samples_at
from holdfast.errors import ConfigError, LayoutMismatch, StateError

_OURS = ("batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "generator")


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward works on: `data` as the collate function made it.

    Multiply the mean loss with `scale` before backward; gradients are needed on other ranks only after `is_last` (use DDP's
    `no_sync()` or FSDP2's `set_requires_gradient_sync` for the others). A `scale` of zero is padding: the
    `data` of the one before once more.
    """

    data: Any
    scale: float
    is_last: bool
    position: int


@dataclass(frozen=True, slots=True)
class Use:
    """A run of the stream that a step has used, or that was left out on purpose (`skipped` says why)."""

    position: int
    samples: int
    skipped: str = ""


class Loader:
    """Batches of a map-style data set, in an order that no fault and no resize changes. Give it to `protect` with the model.

    global_batch: samples per step over all ranks; micro_batch: samples per forward of one rank, by default what makes one
    forward per step for the first world. epochs: how often the data is used, None for without end; samples left over at the very
    end, fewer than a step, are not used. rank, world: the data-parallel place, where that is not the whole process group's.
    make: `DataLoader` or a class like it; options are passed on to it (num_workers, collate_fn, pin_memory, …).

    Random numbers that the data set draws (torch's, numpy's and Python's global generators) are seeded from seed and position, so
    augmentation too is independent of world size, workers and faults, and nothing is taken from the training's own generators.

    Raises ConfigError for settings that cannot work, before anything is read.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        global_batch: int,
        micro_batch: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
        on_resize: str = "accumulate",
        rank: int | None = None,
        world: int | None = None,
        make: Callable[..., Any] = DataLoader,
        **options: Any,
    ) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ConfigError(
                f"{type(dataset).__name__} has no length and no numbered samples; a global order needs a map-style data set with "
                "__len__ and __getitem__"
            )
        _check_options(options)
        if (rank is None) != (world is None):
            raise ConfigError("give both rank and world, or neither")
        Batching(global_batch=global_batch, micro_batch=micro_batch or global_batch, on_resize=on_resize)
        self.size = check_size(len(dataset))
        if epochs is not None and epochs * self.size < global_batch:
            raise ConfigError(f"{epochs} epoch(s) of {self.size} samples do not fill one global batch of {global_batch}")
        self._global_batch, self._on_resize = global_batch, on_resize
        self._asked = self._micro_batch = micro_batch
        self._seed, self._shuffle, self._epochs = seed, shuffle, epochs
        self._given = None if rank is None or world is None else (rank, world)
        self._make, self._options = make, options
        self._dataset = _Drawn(dataset, seed)
        self._position = 0
        self._handed = 0
        self._first_world: int | None = None
        self._plan: StepPlan | None = None
        self._rank = 0
        self._batches: Iterator[Any] | None = None
        self._uses: list[Use] = []

    # -- what the loop asks --

    def step(self) -> Iterator[MicroBatch]:
        """This rank's micro-batches of the next step; take all of them. Raises StateError when the data is used up."""
        plan = self.plan
        if self._handed:
            raise StateError(f"the loop left a step after {self._handed} of its {plan.rounds} micro-batches; take them all")
        if self._end is not None and self._position + plan.samples > self._end:
            raise StateError(
                f"all {self._epochs} epoch(s) of {self.size} samples are used ({self._end - self._position} left, a step takes "
                f"{plan.samples}); ask run.steps() for fewer steps, or the loader for more epochs"
            )
        return self._step(plan)

    def _step(self, plan: StepPlan) -> Iterator[MicroBatch]:
        start, mine = self._position, plan.share(self._rank)
        data: Any = None
        for round in range(plan.rounds):
            real, last = round < len(mine), round + 1 == plan.rounds
            if real:
                data = next(self._reading(plan))
            self._handed = 0 if last else round + 1
            if last:  # before it is handed out: a loop that takes one batch with next() never comes back here
                self._count(start, plan.samples)
            at = start + plan.offset(mine[min(round, len(mine) - 1)])
            yield MicroBatch(data, plan.scale if real else 0.0, last, at)

    def skip(self, steps: int = 1, *, why: str = "asked for") -> None:
        """Leave out the next steps' samples, on every rank alike; the audit lists them as left out, with `why`."""
        if self._handed:
            raise StateError("the loop is inside a step; skip between steps")
        self._count(self._position, self.plan.samples * steps, why)
        self._batches = None

    @property
    def epoch(self) -> int:
        return self._position // self.size

    @property
    def position(self) -> int:
        """Samples of the stream that are behind the loop, over all ranks and epochs."""
        return self._position

    @property
    def steps_left(self) -> int | None:
        """Whole steps that the data still holds; None when it never ends."""
        return None if self._end is None else (self._end - self._position) // self.plan.samples

    @property
    def lr_scale(self) -> float:
        """By what the learning rate is to be multiplied; 1 unless on_resize="scale_lr" and the world has changed."""
        return self.plan.lr_scale

    @property
    def plan(self) -> StepPlan:
        """How a step is dealt to the ranks that are here now."""
        if self._plan is None:
            self._rank, world = self._given or _place()
            self._first_world = self._first_world or world
            micro = self._micro_batch or max(1, self._global_batch // self._first_world)
            batching = Batching(global_batch=self._global_batch, micro_batch=micro, on_resize=self._on_resize)
            self._plan, self._micro_batch = plan_step(batching, world, self._first_world), micro
        return self._plan

    # -- what the snapshot asks --

    def state_dict(self) -> dict[str, Any]:
        """The cursor and what it counts; equal on all ranks, good for any number of them."""
        return {
            "order": NAME,
            "size": self.size,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "position": self._position,
            "micro_batch": self._micro_batch,
            "first_world": self._first_world,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, whatever was fetched since. Raises LayoutMismatch for another data set or another order."""
        ours = self.state_dict()
        for key in ("order", "size", "seed", "shuffle"):
            if state[key] != ours[key]:
                raise LayoutMismatch(
                    f"the snapshot's data has {key}={state[key]!r} and this loader {ours[key]!r}; in another order some samples "
                    "would be used twice and others never. Go back to the first, or start anew under another name"
                )
        self._position, self._handed = int(state["position"]), 0
        self._first_world = state["first_world"] or self._first_world
        self._micro_batch = self._asked or state["micro_batch"]
        self._plan, self._batches, self._uses = None, None, []

    def take_uses(self) -> list[Use]:
        """What was used since the last call, for the journal. Raises StateError in the middle of a step."""
        if self._handed:
            raise StateError(
                f"the loop went on to the next step after {self._handed} of {self.plan.rounds} micro-batches; the others would "
                "never be used. Iterate over all of loader.step()"
            )
        taken, self._uses = self._uses, []
        return taken

    def about(self) -> dict[str, Any]:
        """What an audit needs to know who used what."""
        plan = self.plan
        return {**self.state_dict(), "epochs": self._epochs, "rank": self._rank, "plan": asdict(plan)}

    # -- within --

    @property
    def _end(self) -> int | None:
        return None if self._epochs is None else self._epochs * self.size

    def _count(self, position: int, samples: int, skipped: str = "") -> None:
        self._position = position + samples
        self._uses.append(Use(position, samples, skipped))

    def _reading(self, plan: StepPlan) -> Iterator[Any]:
        if self._batches is None:
            fetches = _Fetches(plan, self._rank, self._position, self._end, self.size, self._seed, self._shuffle)
            # A generator of its own: DataLoader would draw a seed from the training's generator at every start of an iterator.
            own = torch.Generator().manual_seed(_seed_of(self._seed, self._position))
            self._batches = iter(self._make(self._dataset, batch_sampler=fetches, generator=own, **self._options))
        return self._batches


@dataclass(frozen=True, slots=True)
class _Fetch:
    """One micro-batch to read: where it stands, and its samples."""

    position: int
    samples: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Fetches:
    """The micro-batches of one rank from a position on, as a batch sampler. Stateless: whoever iterates starts there."""

    plan: StepPlan
    rank: int
    position: int
    end: int | None
    size: int
    seed: int
    shuffle: bool

    def __iter__(self) -> Iterator[_Fetch]:
        start = self.position
        while self.end is None or start + self.plan.samples <= self.end:
            for micro in self.plan.share(self.rank):
                at = start + self.plan.offset(micro)
                ids = samples_at(np.arange(at, at + self.plan.micro_batch), self.size, self.seed, shuffle=self.shuffle)
                yield _Fetch(at, tuple(map(int, ids)))
            start += self.plan.samples


class _Drawn:
    """The user's data set, read by whole micro-batches, each under random numbers of its own."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self._seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, fetch: _Fetch) -> list[Any]:
        with _random_numbers_of(_seed_of(self._seed, fetch.position)):
            together = getattr(self.dataset, "__getitems__", None)
            return list(together(list(fetch.samples)) if together else (self.dataset[item] for item in fetch.samples))


@contextmanager
def _random_numbers_of(seed: int) -> Iterator[None]:
    at_home = get_worker_info() is None  # in the training process, whose own numbers must not move
    kept = (torch.get_rng_state(), np.random.get_state(), random.getstate()) if at_home else None
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)
    try:
        yield
    finally:
        if kept is not None:
            torch.set_rng_state(kept[0])
            np.random.set_state(kept[1])
            random.setstate(kept[2])


def _seed_of(seed: int, position: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=7).digest(), "little")


def _place() -> tuple[int, int]:
    grouped = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)


def _check_options(options: Mapping[str, Any]) -> None:
    taken = [name for name in _OURS if name in options]
    if taken:
        raise ConfigError(
            f"{', '.join(taken)}: the loader decides this from global_batch, micro_batch, seed and shuffle; leave it out"
        )
    if options.get("in_order", True) is False:
        raise ConfigError("in_order=False hands batches out as they come; which samples a step used could not be told")
