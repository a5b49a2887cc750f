"""Names and places: where the checkpoints of a run live, and how a user points at one.

A run directory holds `step-00001200/` directories and `LATEST`. A save in progress is `step-00001200.tmp-<token>/`; it becomes
visible by a rename and valid by the COMMIT that follows. Object stores cannot rename: there a save writes to
`step-00001200-<token>/` from the start, and COMMIT alone decides.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from holdfast.ckpt.storage import Place, is_remote, place
from holdfast.errors import ConfigError, NotACheckpoint

COMMIT = "COMMIT"
LATEST = "LATEST"
INTERNAL = "_holdfast"
FRAGMENTS = f"{INTERNAL}/fragments.parquet"
OBJECTS = f"{INTERNAL}/objects.parquet"
LAYOUT = f"{INTERNAL}/layout.json"
JOURNALS = f"{INTERNAL}/journal"

_STEP = re.compile(r"step-(\d{8,18})(-[A-Za-z0-9_.-]{1,64})?")
_DEAD = re.compile(r"step-\d{8,18}\.tmp-[A-Za-z0-9_.-]+")
_TOKEN = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class Address:
    """`PATH` or `PATH@STEP` as a user writes it."""

    path: Place
    step: int | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        path, at, step = text.rpartition("@")
        if not at or (not is_remote(text) and place(text).exists()):  # a directory may have an @ in its name
            return cls(place(text))
        if not step.isdigit():
            raise ConfigError(f"{text}: what follows @ has to be a step number, as in runs/exp1@1200")
        return cls(place(path), int(step))

    def __str__(self) -> str:
        return f"{self.path}" if self.step is None else f"{self.path}@{self.step}"


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def temporary_name(step: int, token: str) -> str:
    if not _TOKEN.fullmatch(token):
        raise ConfigError(f"a save's token is made of letters, digits, '.', '_' and '-', at most 64; got {token!r}")
    return f"{step_name(step)}.tmp-{token}"


def bucket_name(step: int, token: str) -> str:
    """Where a save to an object store writes: its own prefix, so that no other save, dead or alive, writes there too."""
    temporary_name(step, token)  # for its check
    return f"{step_name(step)}-{token}"


def step_of(directory: Place) -> int | None:
    """The step that a directory's name says it holds."""
    match = _STEP.fullmatch(directory.name)
    return int(match[1]) if match else None


def step_directories(root: Place) -> list[Place]:
    """Every `step-*` directory of a run, oldest first, committed or not; links are not followed."""
    found = [path for path in root.iterdir() if step_of(path) is not None and path.is_dir() and not path.is_symlink()]
    return sorted(found, key=lambda path: (step_of(path) or 0, path.name))


def unfinished(root: Place) -> list[Place]:
    """Directories that a save left behind when it died."""
    return sorted((path for path in root.iterdir() if _DEAD.fullmatch(path.name) and path.is_dir()), key=lambda path: path.name)


def check_directory(path: Place) -> None:
    if not path.exists():
        raise NotACheckpoint(f"{path}: no such directory; name a run directory or one of its step-* directories")
    if not path.is_dir():
        raise NotACheckpoint(f"{path}: not a directory; a checkpoint is a directory named step-*, inside its run's directory")
