"""How one step's samples are dealt to the ranks there are, so that a resize changes who computes and not what is computed.

The unit is the micro-batch: one forward of one rank. A step is a fixed run of the stream, cut into micro-batches and dealt in
turn. With fewer ranks each does more of them (gradient accumulation), and the mean gradient stays that of the same samples.
"""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.errors import ConfigError

ON_RESIZE = ("accumulate", "scale_lr")


@dataclass(frozen=True, kw_only=True, slots=True)
class Batching:
    """`global_batch` samples per step in forwards of `micro_batch`; `on_resize` says what gives way when the world changes.

    "accumulate": nothing; ranks do more or fewer micro-batches, and the global batch stays.
    "scale_lr": the global batch; every rank keeps its number of micro-batches, and `lr_scale` follows the batch linearly
    (Goyal et al. 2017, arXiv 1706.02677, §2.1).
    """

    global_batch: int
    micro_batch: int
    on_resize: str = "accumulate"

    def __post_init__(self) -> None:
        if self.on_resize not in ON_RESIZE:
            raise ConfigError(f"on_resize={self.on_resize!r} is not known; accepted are {' and '.join(map(repr, ON_RESIZE))}")
        if self.global_batch < 1 or self.micro_batch < 1:
            raise ConfigError(f"batches have at least one sample; got {self.global_batch} in forwards of {self.micro_batch}")
        if self.global_batch % self.micro_batch:
            raise ConfigError(
                f"a global batch of {self.global_batch} does not divide into micro-batches of {self.micro_batch}; every forward "
                "has to be of one size, or the mean gradient would depend on the number of ranks"
            )


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step for a world of ranks: `micro_batches` of `micro_batch` samples, at most `rounds` of them on any rank."""

    micro_batch: int
    micro_batches: int
    world: int
    lr_scale: float = 1.0

    @property
    def samples(self) -> int:
        return self.micro_batch * self.micro_batches

    @property
    def rounds(self) -> int:
        """Forwards of every rank. Where the micro-batches do not go up evenly, the last is padding on some ranks: with FSDP
        every forward is a collective, so nobody may do fewer."""
        return -(-self.micro_batches // self.world)

    @property
    def scale(self) -> float:
        """What the mean loss of a micro-batch is multiplied with, so that the mean over ranks is the mean over the step."""
        return self.world / self.micro_batches

    def share(self, rank: int) -> range:
        """The micro-batches of `rank`, by number."""
        return range(rank, self.micro_batches, self.world)

    def offset(self, micro: int) -> int:
        """Where in the step the samples of a micro-batch start."""
        return micro * self.micro_batch


def plan_step(batching: Batching, world: int, first_world: int) -> StepPlan:
    """The step for `world` ranks of a run that began with `first_world`. Raises ConfigError when a rank would have nothing."""
    whole = batching.global_batch // batching.micro_batch
    if batching.on_resize == "scale_lr":
        count = -(-whole // first_world) * world
        return StepPlan(batching.micro_batch, count, world, count / whole)
    if whole < world:
        raise ConfigError(
            f"a global batch of {batching.global_batch} is {whole} micro-batch(es) of {batching.micro_batch}, and there are "
            f"{world} ranks; use micro_batch={max(1, batching.global_batch // world)} or less, a larger global_batch, or "
            "on_resize='scale_lr'"
        )
    return StepPlan(batching.micro_batch, whole, world)
