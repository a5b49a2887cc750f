"""torchrun's rendezvous on several hosts at once: any minority of them may be lost, whichever it is.

`--rdzv-endpoint a:29400,b:29400,c:29400` makes the agent of every listed host serve a replica (`replica.py`), and every agent
use them all as one store. Whatever torch does with its store stays as it is: rendezvous, ranks, exit barrier. An agent that
finds no majority goes on trying for `read_timeout` seconds (`--rdzv-conf`, 60), at the start for `join_timeout` (600), and then
fails with the names of the hosts that did not answer.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, cast

from torch._C._distributed_c10d import Store
from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousParameters
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from holdfast.elastic.rendezvous.ballots import pack, unpack
from holdfast.elastic.rendezvous.endpoints import Endpoints
from holdfast.elastic.rendezvous.register import Add, Append, Change, CompareSet, Delete, Op, Set
from holdfast.elastic.rendezvous.replica import Patience, Replica, cause, greet
from holdfast.errors import ClusterError, ConfigError, QuorumLost
from holdfast.snapshot.wire import Connection

logger = logging.getLogger(__name__)

AVOID_S = 30.0
"""How long an agent does without a lower replica that did not answer, though another says that it votes."""
ENDING_S = 5.0
"""How long an agent that ends looks for a majority: the others may have ended before it."""


class Handler(RendezvousHandler):
    """torch's own rendezvous, and the replica of this host beneath it, which leaves last."""

    def __init__(self, rendezvous: RendezvousHandler, store: ReplicatedStore, replica: Replica | None) -> None:
        self._rendezvous, self._store, self._replica = rendezvous, store, replica

    @property
    def use_agent_store(self) -> bool:
        return self._rendezvous.use_agent_store

    def get_backend(self) -> str:
        return self._rendezvous.get_backend()

    def next_rendezvous(self) -> RendezvousInfo:
        return self._rendezvous.next_rendezvous()

    def is_closed(self) -> bool:
        return self._rendezvous.is_closed()

    def set_closed(self) -> None:
        self._rendezvous.set_closed()  # type: ignore[no-untyped-call]  # torch's, without annotations

    def num_nodes_waiting(self) -> int:
        return self._rendezvous.num_nodes_waiting()

    def get_run_id(self) -> str:
        return self._rendezvous.get_run_id()

    def shutdown(self) -> bool:
        self._store.client.patience_s = ENDING_S
        try:
            return self._rendezvous.shutdown()
        finally:
            self._store.client.close()
            if self._replica is not None:
                self._replica.leave()


class Backend(C10dRendezvousBackend):
    """torch's, under the name by which it was asked for: torchrun compares them."""

    @property
    def name(self) -> str:
        return "holdfast"


def create(parameters: RendezvousParameters, patience: Patience | None = None) -> Handler:
    """Serve this host's replica, if it is listed, and join the others; returns once a majority votes."""
    endpoints = Endpoints.parse(parameters.endpoint)
    if os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        logger.warning(
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE is not 1: workers share a store of the first rank-0 host, whose loss ends the job"
        )
    read_s, join_s = (parameters.get_as_int(name, default) for name, default in (("read_timeout", 60), ("join_timeout", 600)))
    if not read_s or not join_s or min(read_s, join_s) < 1:
        raise ConfigError(f"--rdzv-conf: read_timeout and join_timeout have to be a second or more; got {read_s} and {join_s}")
    place = endpoints.take()
    replica = Replica(endpoints, *place, parameters.run_id, patience) if place is not None else None
    store = ReplicatedStore(Client(endpoints, parameters.run_id, max(read_s, join_s), patience), timeout_s=read_s)
    try:
        backend = Backend(store, parameters.run_id)
        store.client.patience_s = read_s
        return Handler(create_handler(store, backend, parameters), store, replica)
    except BaseException:
        store.client.close()
        if replica is not None:
            replica.close()
        raise


class ReplicatedStore(Store):
    """A `torch.distributed.Store` that answers as a TCPStore does; from any thread, and through PrefixStore.

    Raises DistStoreError where a key does not come in time, DistNetworkError where no majority answers. The timeout is torch's:
    `timeout` and `set_timeout` are inherited, because PrefixStore reads and sets them beneath Python.
    """

    def __init__(self, client: Client, *, timeout_s: float) -> None:
        super().__init__()
        self.client = client
        self.set_timeout(timedelta(seconds=timeout_s))

    def set(self, key: str, value: str | bytes) -> None:
        self._change(key, Set(_bytes(value)))

    def compare_set(self, key: str, expected_value: str | bytes, desired_value: str | bytes) -> bytes:
        return bytes(self._change(key, CompareSet(_bytes(expected_value), _bytes(desired_value))))

    def add(self, key: str, value: int) -> int:
        return int(self._change(key, Add(value)))

    def append(self, key: str, value: str | bytes) -> None:
        self._change(key, Append(_bytes(value)))

    def delete_key(self, key: str) -> bool:
        return bool(self._change(key, Delete()))

    def num_keys(self) -> int:
        return int(self._ask("count")[0])

    def get(self, key: str) -> bytes:
        return self._wait((key,))[0]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return self._wait(tuple(keys))

    def multi_set(self, keys: Sequence[str], values: Sequence[str | bytes]) -> None:
        if len(keys) != len(values):
            raise DistStoreError(f"multi_set has {len(keys)} keys and {len(values)} values")
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def check(self, keys: Sequence[str]) -> bool:
        return None not in self._ask("read", keys=tuple(keys), wait_s=0)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        self._wait(tuple(keys), timeout)

    def has_extended_api(self) -> bool:
        return True

    def clone(self) -> ReplicatedStore:
        return self  # threads do not wait for each other here

    deleteKey = delete_key  # noqa: N815  # the names under which PrefixStore looks for these two (torch 2.13)
    getNumKeys = num_keys  # noqa: N815

    def _wait(self, keys: tuple[str, ...], timeout: timedelta | None = None) -> list[bytes]:
        timeout = cast("timedelta", self.timeout) if timeout is None else timeout  # type: ignore[attr-defined]  # torch's stubs lack it
        deadline = time.monotonic() + timeout.total_seconds()
        while keys:
            found = self._ask("read", keys=keys, wait_s=max(0.0, deadline - time.monotonic()))
            if None not in found:
                return list(found)
            if time.monotonic() >= deadline:
                waited_ms = round(timeout.total_seconds() * 1000)
                raise DistStoreError(f"wait timeout after {waited_ms}ms, keys: {', '.join(keys)}")
        return []

    def _change(self, key: str, change: Change) -> Any:
        return self._ask("change", change=change, key=key)[0]

    def _ask(self, verb: str, **fields: Any) -> tuple[Any, ...]:
        try:
            return self.client.ask(verb, **fields)
        except ClusterError as error:  # what torch expects of a store that is out of reach
            raise DistNetworkError(str(error)) from error


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)


class Client:
    """Asks the lowest replica that answers. Each request is done once, however often it has to be sent."""

    def __init__(self, endpoints: Endpoints, run_id: str, patience_s: float, patience: Patience | None = None) -> None:
        self.patience_s = patience_s
        self._endpoints, self._run_id, self._patience = endpoints, run_id, patience or Patience()
        self._at, self._era = 0, ""
        self._trouble = ["not asked yet"] * len(endpoints.addresses)
        self._avoid_until_s = [-1e18] * len(endpoints.addresses)
        self._idle: list[_Session] = []
        self._told_s = time.monotonic()

    def ask(self, verb: str, *, change: Change | None = None, **fields: Any) -> tuple[Any, ...]:
        """The results, one by one. Raises QuorumLost after `patience_s`, ConfigError where agents were given different lists."""
        try:
            session = self._idle.pop()
        except IndexError:
            session = _Session()
        session.number += 1
        deadline, attempt = time.monotonic() + self.patience_s, 0
        while True:
            try:
                results = self._try(session, attempt, verb, change, fields)
                break
            except ClusterError as error:
                session.close()
                attempt += 1
                self._move_on(session.at, error, attempt, deadline)
            except BaseException:
                session.close()
                raise
        self._idle.append(session)
        return results

    def close(self) -> None:
        """Let go of connections that nobody uses."""
        while self._idle:
            self._idle.pop().close()

    def _try(
        self, session: _Session, attempt: int, verb: str, change: Change | None, fields: dict[str, Any]
    ) -> tuple[Any, ...]:
        payload = b""
        if change is not None:
            fields["change"], payload = pack((change, Op(session.name, session.number, attempt)))
        connection = session.reach(self._at, self._endpoints, self._run_id, self._patience.ask_s)
        told = connection.ask(verb, payload, **fields)
        header, body = told if isinstance(told, tuple) else (told, memoryview(b""))
        if header["era"] != (self._era or header["era"]):
            raise _Forsaken(
                "the rendezvous has begun anew without this agent, because a majority of the listed hosts lost its memory or was "
                "cut off from this one; start this agent again to join it"
            )
        self._era = header["era"]
        lowest = header["lowest"]
        if lowest < self._at and time.monotonic() > self._avoid_until_s[lowest]:
            self._at = lowest
        results: tuple[Any, ...] = unpack(header["results"], body)
        return results

    def _move_on(self, failed: int, error: ClusterError, attempt: int, deadline: float) -> None:
        """Turn to the next replica, with growing pauses where all were asked in vain. Raises QuorumLost after the deadline."""
        if isinstance(error, _Forsaken):
            raise error
        now_s, count = time.monotonic(), len(self._trouble)
        self._trouble[failed] = str(error) if isinstance(error, QuorumLost) else cause(error)
        self._avoid_until_s[failed] = now_s + AVOID_S
        plight = "; ".join(f"{name}: {trouble}" for name, trouble in zip(self._endpoints.names, self._trouble, strict=True))
        if now_s > deadline:
            raise QuorumLost(
                f"no majority of the hosts of the rendezvous has answered for {self.patience_s:.0f} s. {plight}"
            ) from error
        if now_s > self._told_s + 10:
            self._told_s = now_s
            logger.warning("waiting for a majority of the hosts of the rendezvous. %s", plight)
        if self._at == failed:
            self._at = (failed + 1) % count
        if attempt % count == 0:
            time.sleep(random.uniform(0.5, 1) * min(2.0, 0.05 * 2 ** min(10, attempt // count)))


class _Forsaken(QuorumLost):
    """The others have begun anew; there is nothing to wait for."""


class _Session:
    """One connection at a time, and a name under which replicas know its operations apart."""

    def __init__(self) -> None:
        self.name, self.number, self.at = secrets.token_hex(8), 0, -1
        self._connection: Connection | None = None

    def reach(self, number: int, endpoints: Endpoints, run_id: str, timeout_s: float) -> Connection:
        if self._connection is None or self.at != number:
            self.close()
            self.at = number
            self._connection = greet(endpoints, number, run_id, timeout_s, is_agent=True)
        return self._connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
