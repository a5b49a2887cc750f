"""Which checkpoints a run has, and which one a user means."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.ckpt.manifest import read_commit
from holdfast.ckpt.reader import Checkpoint, open_directory
from holdfast.ckpt.steps import COMMIT, LATEST, Address, check_directory, step_directories, step_name, step_of, unfinished
from holdfast.ckpt.storage import Place, place
from holdfast.errors import HoldfastError, NotACheckpoint


@dataclass(frozen=True, slots=True)
class StepInfo:
    """One committed step; `problem` says why it cannot be used, where that is already known."""

    step: int
    path: Place
    nbytes: int
    arrays: int
    created_s: float
    problem: str | None = None


def list_steps(root: str | Place) -> list[StepInfo]:
    """Every committed step of a run, oldest first; one whose COMMIT is damaged is listed with its problem.

    A step directory gives a list of itself. Reads only COMMIT records; data is checked by `verify`. Uncommitted directories are
    left out, for they are no checkpoints.
    """
    root = place(root)
    check_directory(root)
    if step_of(root) is not None and (root / COMMIT).exists():
        return [_info(root)]
    return [_info(path) for path in step_directories(root) if (path / COMMIT).exists()]


def _info(path: Place) -> StepInfo:
    step = step_of(path)
    assert step is not None
    try:
        record = read_commit(path)
    except HoldfastError as error:
        return StepInfo(step, path, 0, 0, 0.0, str(error))
    problem = None if record.step == step else f"{path}: COMMIT says step {record.step}"
    return StepInfo(step, path, record.nbytes, record.arrays, record.created_s, problem)


def latest(root: str | Place) -> StepInfo | None:
    """The newest step whose COMMIT and documents are sound, or None; a damaged one is passed over.

    LATEST is a hint for people and other tools: it may be one step behind after a crash, so it is not what decides here.
    """
    return next((info for info in reversed(list_steps(root)) if is_sound(info)), None)


def open_checkpoint(path: str | Place, step: int | None = None) -> Checkpoint:
    """The checkpoint at `path`: a step directory, or a run directory (then `step`, or the newest valid one).

    `PATH@STEP` is understood too. Raises NotACheckpoint, UnsupportedFormat, MissingData or CorruptData.
    """
    address = Address.parse(str(path))
    problem: HoldfastError | None = None
    for directory in _candidates(address.path, address.step if step is None else step):
        try:
            return open_directory(directory)
        except HoldfastError as error:
            problem = problem or error  # if all are damaged, what is wrong with the newest is said
    assert problem is not None
    raise problem


def is_sound(info: StepInfo) -> bool:
    return info.problem is None and _opens(info.path)


def _opens(directory: Place) -> bool:
    try:
        open_directory(directory)
    except HoldfastError:
        return False
    return True


def find_step(path: Place, step: int | None) -> Place:
    """The step directory that `path` and `step` mean; raises NotACheckpoint with what there is instead."""
    newest, *older = _candidates(path, step)
    return next((directory for directory in (newest, *older) if _opens(directory)), newest) if older else newest


def _candidates(path: Place, step: int | None) -> list[Place]:
    """The directories that could be meant, the first sound one of which is."""
    check_directory(path)
    if (path / COMMIT).exists() or step_of(path) is not None or _looks_like_step(path):
        if step is not None and step_of(path) not in (None, step):
            raise NotACheckpoint(f"{path}: holds step {step_of(path)}, not {step}")
        return [path]
    infos = list_steps(path)
    if not infos:
        raise NotACheckpoint(f"{path}: {_nothing_here(path)}")
    if step is not None:
        found = next((info for info in infos if info.step == step), None)
        if found is None:
            raise NotACheckpoint(f"{path}: has no committed {step_name(step)}; it has {_steps(infos)}")
        return [found.path]
    damaged = [info.path for info in reversed(infos) if info.problem is not None]
    return [info.path for info in reversed(infos) if info.problem is None] or damaged


def _looks_like_step(path: Place) -> bool:
    return (path / "_holdfast").is_dir()


def _nothing_here(path: Place) -> str:
    dead = len(unfinished(path)) + len(step_directories(path))
    if dead:
        return f"holds no committed checkpoint; {dead} save(s) were begun there and never finished"
    return (
        f"is a directory, but holds no checkpoint (no step-* directory{', only ' + LATEST if (path / LATEST).exists() else ''})"
    )


def _steps(infos: list[StepInfo]) -> str:
    shown = ", ".join(str(info.step) for info in infos[-8:])
    return f"{'…, ' if len(infos) > 8 else ''}{shown}"
