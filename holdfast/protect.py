"""The context manager around the training loop, and the loader to go with it: all that most users ever call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from holdfast.errors import ConfigError
from holdfast.redundancy import Redundancy, Stage

if TYPE_CHECKING:
    from holdfast.elastic.data import Loader
    from holdfast.elastic.session import Run


def protect(
    state: Mapping[str, Any],
    *,
    checkpoints: str | None = None,
    redundancy: Redundancy | None = None,
    snapshot_every: int | str = "auto",
    checkpoint_every: int | str = "auto",
    name: str | None = None,
    memory_dir: str | None = None,
    on_nan: str = "refuse",
    grace_s: float = 20.0,
    diagnose: float | str = "auto",
    stage: Stage | None = None,
) -> Run:
    """Keep `state` safe while the loop inside runs, and put it back to the newest recoverable step on entering.

    `state` maps short names to anything with `state_dict` and `load_state_dict`; random generators are added by themselves.
    Entering blocks: it starts or finds the keepers, restores, and reserves memory. In the loop a step costs about a millisecond.
    Leaving after the last step waits until that step is committed (and is a checkpoint, where `checkpoints` is given), then
    gives the memory back; leaving by an exception keeps the snapshots for the next start.

    snapshot_every: a number of steps, or "auto": every step at first, then as often as loses least time, from the measured cost of
        a snapshot and the failure rate, and never faster than the keepers can follow.
    checkpoint_every: a number of steps, or "auto": 1000 at first, then what loses least time, from what writing one takes and how
        often this run has failed so far, between ten seconds and an hour. The last step always becomes a checkpoint.
    name: what a restart finds its snapshots by; by default derived from `checkpoints`, or from the script and its arguments.
    memory_dir: where slots live, /dev/shm by default.
    on_nan: what becomes of a snapshot whose parameters hold NaN or infinity: "refuse" keeps the last clean one in its stead,
        "step_back" does that and raises PoisonedState, so that a restart goes on from there, "warn" commits it with a word.
    grace_s: seconds in which, after SIGTERM, the newest committed snapshot may become a checkpoint; 0 ends at once. Trainers wait
        for it, unless another one has died and the launcher is only starting the run again.
    diagnose: seconds in which no rank completes a step before it is said which rank has not entered which collective; "auto" is 30,
        "off" says nothing. Ranks that compute longer than their peers and replicas with other bytes are named as well. Nothing is
        ended because of it.
    stage: which stage of a pipeline this rank holds. One that neither memory nor a checkpoint can give back is then made of its
        neighbours, which is lossy and said so (CheckFree); see `Run.note_loss`.

    Raises ConfigError and StateError for what the caller can change, LayoutMismatch when ranks disagree, RayUnreachable,
    OutOfSharedMemory, and SnapshotLost when snapshots exist, cannot be restored, and no checkpoint is left.
    """
    from holdfast.elastic.session import Run, Settings

    every = _steps("snapshot_every", snapshot_every, auto=1)
    settings = Settings(
        checkpoints=None if checkpoints is None else str(checkpoints),
        redundancy=redundancy or Redundancy(),
        snapshot_every=every,
        snapshot_adaptive=snapshot_every == "auto",
        checkpoint_every=_steps("checkpoint_every", checkpoint_every, auto=1000),
        checkpoint_adaptive=checkpoint_every == "auto",
        name=name,
        memory_dir=memory_dir,
        on_nan=_policy(on_nan),
        grace_s=_seconds("grace_s", grace_s),
        diagnose_s=_patience(diagnose),
    )
    return Run(state, settings, stage)


def loader(
    dataset: Any,
    *,
    global_batch: int,
    micro_batch: int | None = None,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    **options: Any,
) -> Loader:
    """A loader whose samples are used exactly once, across faults and any number of ranks. Give it to `protect` as "data".

    for batch in loader.step(): (model(batch.data).loss * batch.scale).backward()

    `dataset` is map-style; `global_batch` samples make a step, in forwards of `micro_batch`. With fewer ranks each does more
    forwards and the step stays the same; on_resize="scale_lr" lets the batch shrink instead (see `loader.lr_scale`). Other options
    go to `torch.utils.data.DataLoader`, or to `make`, such as torchdata's StatefulDataLoader. Raises ConfigError.
    """
    from holdfast.elastic.data import Loader

    options |= {"seed": seed, "shuffle": shuffle, "epochs": epochs}
    return Loader(dataset, global_batch=global_batch, micro_batch=micro_batch, **options)


def _steps(name: str, value: int | str, *, auto: int) -> int:
    if value == "auto":
        return auto
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} takes a number of steps from 1 on, or 'auto'; got {value!r}")
    return value


def _policy(value: str) -> str:
    from holdfast.snapshot.poison import POLICIES

    if value not in POLICIES:
        raise ConfigError(f"on_nan takes one of {', '.join(map(repr, POLICIES))}; got {value!r}")
    return value


def _seconds(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 86400:
        raise ConfigError(f"{name} takes a number of seconds from 0 up to a day; got {value!r}")
    return float(value)


def _patience(value: float | str) -> float:
    """Seconds, and 0 for never."""
    if isinstance(value, str):
        if value in _PATIENCE_S:
            return _PATIENCE_S[value]
    elif not isinstance(value, bool) and 1 <= value < 86400:
        return float(value)
    raise ConfigError(f"diagnose takes a number of seconds from 1 up to a day, 'auto' or 'off'; got {value!r}")


_PATIENCE_S = {"auto": 30.0, "off": 0.0}
