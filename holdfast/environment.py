"""The process environment, read in one place, once, at the edge."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from holdfast.errors import ConfigError

BERTH = "HOLDFAST_BERTH"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")


@dataclass(frozen=True, slots=True)
class Environment:
    """Where this process stands in its job. `launch` is equal for processes that belong to one start of the job."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    group_rank: int
    launch: str
    restarts: int
    ray_address: str | None
    memory: Path
    keepers: str
    bind: str

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> Environment:
        env = os.environ if environ is None else environ
        world = _number(env, "WORLD_SIZE", 1)
        return cls(
            rank=_number(env, "RANK", 0),
            world=world,
            local_rank=_number(env, "LOCAL_RANK", 0),
            local_world=_number(env, "LOCAL_WORLD_SIZE", world),
            group_rank=_number(env, "GROUP_RANK", 0),
            launch=env.get("TORCHELASTIC_RUN_ID")
            or f"{socket.gethostname()}-{os.getppid() if world > 1 else uuid.uuid4().hex}",
            restarts=_number(env, "TORCHELASTIC_RESTART_COUNT", 0),
            ray_address=env.get("HOLDFAST_RAY_ADDRESS") or env.get("RAY_ADDRESS") or None,
            memory=Path(env.get("HOLDFAST_MEMORY") or "/dev/shm"),
            keepers=env.get("HOLDFAST_KEEPERS") or "ray",
            bind=env.get("HOLDFAST_BIND") or _address(env),
        )


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name)
    try:
        return int(text) if text else default
    except ValueError as error:
        raise ConfigError(f"the environment says {name}={text!r}; a whole number is needed") from error


def _address(env: Mapping[str, str]) -> str:
    """Where keepers listen: nowhere but here while the job is on one host, else where the other hosts are reached from."""
    master = env.get("MASTER_ADDR", "")
    if _number(env, "GROUP_WORLD_SIZE", 1) == 1 or master in ("", "localhost") or master.startswith("127."):
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((master, 9))  # no packet is sent; the kernel only picks the route
            return str(probe.getsockname()[0])
        except OSError as error:
            raise ConfigError(
                f"no route to MASTER_ADDR={master} ({error}); set HOLDFAST_BIND to this host's address"
            ) from error


def home(memory: Path) -> Path:
    """Where this user's slots live: one folder for each run, in it one for each node."""
    return memory / f"holdfast-{os.getuid()}"


def runtime_dir() -> Path:
    """Where this host keeps what belongs to the local Ray and to launches: small files, gone after `holdfast down`."""
    chosen = os.environ.get("HOLDFAST_RUNTIME")
    return Path(chosen) if chosen else Path("/tmp") / f"holdfast-{os.getuid()}"


def watch_every_s(environ: Mapping[str, str] | None = None) -> float:
    """How often a keeper scrubs its memory and drills a rebuild: HOLDFAST_SCRUB_EVERY_S, a minute if unset; 0 for never."""
    text = (os.environ if environ is None else environ).get("HOLDFAST_SCRUB_EVERY_S") or "60"
    try:
        every_s = float(text)
    except ValueError:
        every_s = -1.0
    if not 0 <= every_s < float("inf"):
        raise ConfigError(f"the environment says HOLDFAST_SCRUB_EVERY_S={text!r}; seconds are needed, or 0 for never")
    return every_s


def check_job_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"run name {name!r}: up to 32 letters, digits, '.', '_' and '-' are accepted, starting with a letter or digit"
        )
    return name


def default_job_name(checkpoints: str | None) -> str:
    """A name that a restart of the same run finds again: from the place of its checkpoints, else from the script."""
    import hashlib

    what = os.path.abspath(checkpoints) if checkpoints and "://" not in checkpoints else checkpoints
    what = what or "\0".join([os.getcwd(), *sys.argv])
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(checkpoints or sys.argv[0] or "run").stem).strip("-._")[:20] or "run"
    return f"{stem}-{hashlib.blake2b(what.encode(), digest_size=4).hexdigest()}"


@dataclass(frozen=True, slots=True)
class Berth:
    """What the launcher tells a process that it starts as a rank's trainer, or as the spare that waits to take its place."""

    role: str
    """"trainer"; "ready" or "import" for a spare that waits at `protect` or before the script; "late" for one needed at once."""
    board: str | tuple[str, int]
    token: str
    channel: int
    """Descriptor of the socket to the launcher."""
    pulse: int
    """Descriptor of the page on which the trainer notes its last completed step."""
    transcript: int
    """Descriptor of the file in memory for what the trainer heard from other ranks before it entered protect()."""
    launcher: int
    cradle: str = ""
    """Where this host's keepers are born, where they are plain processes."""

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> Berth | None:
        text = (os.environ if environ is None else environ).get(BERTH)
        if not text:
            return None
        fields = json.loads(text)
        board = fields.pop("board")
        return cls(board=board if isinstance(board, str) else (board[0], board[1]), **fields)

    def to_text(self) -> str:
        return json.dumps({name: getattr(self, name) for name in self.__slots__})


_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """From here on this process is killed when its parent ends, however that ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)
