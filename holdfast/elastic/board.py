"""The board: where the processes of a job on all hosts leave each other notes, and where a death is published.

It lives in the launcher of rank 0, outside every trainer, and outlives them. It knows one number, the epoch of the communicator: a
launcher whose trainer has died advances it, and whoever waits for something of an older epoch is told at once that it is over.
Launchers attend it for as long as they run; where one goes without having said so, with its host perhaps, nobody can take the
place of its rank, and all are told that every process has to start again. Knows nothing of torch.
"""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from holdfast.environment import runtime_dir
from holdfast.errors import ClusterError, ConfigError, StaleEpoch
from holdfast.snapshot.wire import Connection, Header, Reply, Server

Address = str | tuple[str, int]


def board_address(env: Mapping[str, str]) -> Address:
    """Where this attempt's board is, as every process of the job works it out from what torchrun told it.

    A socket file where the job is on one host. On several, the port that torchrun reserved for a store on rank 0's host; raises
    ConfigError where torchrun uses that port itself.
    """
    port = int(env["MASTER_PORT"])
    if int(env.get("GROUP_WORLD_SIZE", "1")) == 1:
        return str(runtime_dir() / f"board-{_digest(env)[:12]}.sock")
    if env.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true":
        raise ConfigError(
            "torchrun serves a store of its own at MASTER_PORT; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where it is started, so "
            "that the port is free for holdfast"
        )
    return env["MASTER_ADDR"], port


def board_token(env: Mapping[str, str]) -> str:
    """Keeps another job's processes out; it is no secret to whoever can read this job's environment."""
    return env.get("HOLDFAST_TOKEN") or _digest(env)


def cradle_name(env: Mapping[str, str]) -> str:
    """Where the processes of this attempt on this host ask for keepers."""
    return f"holdfast-{os.getuid()}-{_digest(env)}-{env.get('GROUP_RANK', '0')}"


def _digest(env: Mapping[str, str]) -> str:
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    return hashlib.blake2b("\0".join(env.get(name, "") for name in names).encode(), digest_size=16).hexdigest()


class Board:
    """Serves the notes of one attempt at `address` until `close`."""

    def __init__(self, address: Address, token: str) -> None:
        self.address = address
        self._changed = threading.Condition()
        self._notes: dict[str, bytes] = {}
        self._epoch, self._reason = 0, ""
        self._over = self._lost = ""
        self._attending: dict[int, int] = {}
        """Ranks, by the connection of their launcher."""
        self._server = Server([_listen(address)], token, self._handle, self._hung_up)

    def close(self) -> None:
        with self._changed:
            self._over = self._over or "the launcher of rank 0 has ended"
            self._changed.notify_all()
        self._server.close()
        if isinstance(self.address, str):
            Path(self.address).unlink(missing_ok=True)

    def _handle(self, verb: str, fields: Header, payload: memoryview) -> Reply | Header | None:
        connection = fields.pop("connection")
        with self._changed:
            match verb:
                case "attend":
                    self._attending[connection] = fields["rank"]
                case "depart":
                    self._attending.pop(connection, None)
                case "set":
                    self._notes[fields["key"]] = bytes(payload)
                case "add":
                    return {"value": self._add(fields["key"], fields["amount"])}
                case "check":
                    return {"found": all(key in self._notes for key in fields["keys"])}
                case "get":
                    return {}, self._wait_for(**fields)
                case "advance":
                    if self._lost:
                        raise ClusterError(f"nobody can be replaced any more: {self._lost}")
                    self._epoch, self._reason = self._epoch + 1, fields["reason"]
                case "watch":
                    self._changed.wait_for(lambda: self._epoch > fields["epoch"] or self._over)
                    return {"epoch": self._epoch, "reason": self._reason, "over": self._over, "lost": self._lost}
                case "over":
                    self._over = fields["reason"]
                case _:
                    raise ClusterError(f"the board does not know the verb {verb!r}; are two releases of holdfast mixed?")
            self._changed.notify_all()
            return {"epoch": self._epoch}

    def _hung_up(self, connection: int) -> None:
        with self._changed:
            rank = self._attending.pop(connection, None)
            if rank is not None and not self._over:
                self._over = self._lost = f"the launcher of rank {rank} is gone"
                self._changed.notify_all()

    def _add(self, key: str, amount: int) -> int:
        value = int(self._notes.get(key, b"0")) + int(amount)
        self._notes[key] = str(value).encode()
        self._changed.notify_all()
        return value

    def _wait_for(self, key: str, epoch: int, timeout_s: float) -> bytes:
        self._changed.wait_for(lambda: key in self._notes or self._epoch > epoch or bool(self._over), timeout_s)
        if self._epoch > epoch:
            raise StaleEpoch(f"epoch {epoch} of the communicator is over: {self._reason}")
        if self._over:
            raise ClusterError(f"nobody will come any more: {self._over}")
        if key not in self._notes:
            raise ClusterError(f"nobody left the note {key!r} within {timeout_s:.0f} s; a rank is missing or stuck")
        return self._notes[key]


def _listen(address: Address) -> socket.socket:
    if isinstance(address, str):
        Path(address).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        Path(address).unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    else:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address if isinstance(address, str) else ("", address[1]))
    except OSError as error:
        listener.close()
        raise ConfigError(f"the board cannot listen at {address}: {error}") from error
    listener.listen(1024)
    return listener


def reach(address: Address, token: str, *, patience_s: float = 60.0) -> Connection:
    """A connection to the board; waits for it to come up. One request at a time: a watcher needs its own."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return Connection(address, token, timeout_s=3600 * 24 * 30)
        except ClusterError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
