"""How a keeper comes to serve a node: alone, listening, and found by the address it leaves."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from holdfast.errors import ConfigError
from holdfast.snapshot.view import Member

ENDPOINT = "keeper.json"
SOCKET = "keeper.sock"
LOCK = "keeper.lock"
LOCK_PATIENCE_S = 15.0
CRADLE_PATIENCE_S = 5.0
_PEER = struct.Struct("3i")


def only_one(memory: Path) -> int:
    """Hold the node's lock for as long as this process lives; waits a little for a predecessor that is just ending."""
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        memory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(memory / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink:  # a predecessor removes its memory, lock file and all
                return fd
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(f"a keeper already serves {memory}") from error
        os.close(fd)
        time.sleep(0.05)


def holds_lock(pid: int, memory: Path) -> bool:
    """Whether that process, of this user, is the keeper that serves `memory`: its number may have gone to somebody else."""
    try:
        return any(os.readlink(entry) == str(memory / LOCK) for entry in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class Identity:
    """What peers know a keeper by."""

    port: int
    token: str


def identity(memory: Path) -> Identity:
    """A predecessor's, where one has left its address: peers find the keeper that takes its place without being told."""
    try:
        fields = json.loads((memory / ENDPOINT).read_text())
        return Identity(int(fields["port"]), str(fields["token"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Identity(0, secrets.token_hex(16))


def listen(path: Path, bind: str, port: int = 0) -> tuple[list[socket.socket], int]:
    """A UNIX socket at `path`, and a network socket at `port` or, where that is taken, at any other."""
    path.unlink(missing_ok=True)
    local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        local.bind(str(path))
    except OSError as error:
        local.close()
        raise ConfigError(
            f"cannot listen at {path} ({error}); a socket's path may have 107 characters, choose a shorter one"
        ) from error
    os.chmod(path, 0o600)
    network = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    network.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        network.bind((bind, port))
    except OSError:
        network.bind((bind, 0))
    for listener in (local, network):
        listener.listen(128)
    return [local, network], int(network.getsockname()[1])


def advertised(bind: str) -> str:
    return socket.gethostbyname(socket.gethostname()) if bind in ("", "0.0.0.0") else bind


def host_identity(memory: Path) -> str:
    """Equal for two keepers exactly when they can map each other's files below their `memory`.

    Two containers of one machine may have one hostname, as with Kubernetes' host network, and each a /dev/shm of its own.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}/{boot.read_text().strip() if boot.exists() else ''}/{memory.stat().st_dev}"


def write_endpoint(memory: Path, member: Member) -> None:
    fresh = memory / f"{ENDPOINT}.new"
    fresh.touch(mode=0o600)
    fresh.write_text(json.dumps({**member.to_json(), "pid": os.getpid()}))
    fresh.rename(memory / ENDPOINT)


def leave_address(memory: Path, member: Member, pid: int) -> None:
    """See that a keeper that begins here has the port and token by which peers know its predecessor; not where one is there."""
    memory.mkdir(mode=0o700, parents=True, exist_ok=True)
    mine = memory / f"{ENDPOINT}.{os.getpid()}.new"
    mine.touch(mode=0o600)
    mine.write_text(json.dumps({**member.to_json(), "pid": pid}))
    with suppress(FileExistsError):
        os.link(mine, memory / ENDPOINT)
    mine.unlink(missing_ok=True)


def is_alive(pid: int, *, or_zombie: bool = False) -> bool:
    """Whether the process runs; with `or_zombie` also until it has been waited for, because threads of it may still be ending."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return or_zombie or Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


# -- born of a process that waits (cradle.py) --------------------------------------------------------------------------------


class Born:
    """A keeper that a cradle has started: somebody else's child, of which it is known only whether it is alive."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and not is_alive(self.pid):
            self.returncode = 1
        return self.returncode


def ask_cradle(address: str, arguments: list[str], log: Path, environ: Mapping[str, str]) -> Born | None:
    """Have a keeper started with these arguments of `host`; None where no cradle of ours answers at `address`."""
    wanted = {"arguments": arguments, "log": str(log), "environ": dict(environ), "cwd": os.getcwd()}
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(CRADLE_PATIENCE_S)
            sock.connect(f"\0{address}")
            if user_of(sock) != os.getuid():
                return None
            sock.sendall(json.dumps(wanted).encode() + b"\n")
            with sock.makefile() as answer:
                return Born(int(answer.readline()))
    except (OSError, ValueError):
        return None


def user_of(sock: socket.socket) -> int:
    """Anybody on this host may use a name in the kernel."""
    return int(_PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))[1])
