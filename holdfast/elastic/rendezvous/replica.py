"""A replica of torchrun's rendezvous, in the agent of every listed host: it votes, and carries out what agents ask for.

An agent may ask any replica. All ask the lowest that answers, so that one proposer works alone as long as it lives; nothing but
speed depends on that. A reply is sent when a majority has accepted, and the answer to an agent that waits for a key when the
key is there, or after `poll_s`, when it asks again. Knows nothing of torch.
"""

from __future__ import annotations

import hashlib
import logging
import random
import secrets
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from holdfast.elastic.rendezvous.ballots import pack, unpack
from holdfast.elastic.rendezvous.endpoints import Endpoints
from holdfast.elastic.rendezvous.register import (
    BLANK,
    Accept,
    Answer,
    Ballot,
    Change,
    CompareSet,
    Delete,
    Forgetful,
    Get,
    List,
    Listed,
    Look,
    Op,
    Phase,
    Request,
    Result,
    Round,
    Standing,
    Stranger,
    Value,
    Voter,
    apply,
    are_chosen,
    consistent,
    majority,
)
from holdfast.errors import ClusterError, ConfigError, HoldfastError, QuorumLost
from holdfast.snapshot.wire import Connection, Header, Reply, Server

logger = logging.getLogger(__name__)

BATCH = 64
"""Requests to one replica that go into one frame, when so many are waiting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """Seconds. A majority founds a job without hosts that have been silent for `found_s`. A replica gives others `peer_s` to
    answer and looks for a majority for `majority_s`; an agent tries another replica after `ask_s`. Whoever waits for a key asks
    again every `poll_s`. At the end a replica stays for `linger_s` while others may still need it."""

    found_s: float = 20.0
    peer_s: float = 2.0
    majority_s: float = 2.0
    poll_s: float = 2.0
    ask_s: float = 5.0
    linger_s: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.poll_s + self.majority_s < self.ask_s or min(self.found_s, self.peer_s, self.linger_s) < 0:
            raise ConfigError(f"need poll_s + majority_s < ask_s, and nothing below zero; got {self}")


def token(run_id: str) -> str:
    """Keeps another job's agents out; it is no secret to whoever knows the run's id."""
    return hashlib.blake2b(f"rendezvous\0{run_id}".encode(), digest_size=16).hexdigest()


def greet(endpoints: Endpoints, number: int, run_id: str, timeout_s: float, *, is_agent: bool) -> Connection:
    """A connection to a replica that was given the same list; raises ConfigError where it was given another."""
    connection = Connection(endpoints.addresses[number], token(run_id), timeout_s=timeout_s)
    try:
        connection.ask("hello", names=endpoints.names, number=number, agent=is_agent)
    except HoldfastError:
        connection.close()
        raise
    return connection


def cause(error: BaseException) -> str:
    """What went wrong beneath, without the words of the layer that keepers use too."""
    return str(error.__cause__ or error)


class Replica:
    """Serves place `number` of the list at `listener` until `close` or `leave`."""

    def __init__(
        self, endpoints: Endpoints, number: int, listener: socket.socket, run_id: str, patience: Patience | None = None
    ) -> None:
        self.number, self.endpoints = number, endpoints
        self._patience = patience or Patience()
        self._run_id, self._size = run_id, len(endpoints.addresses)
        self._lock = threading.Lock()
        life = secrets.token_hex(8)
        self._voter = Voter(number, self._size, life, found_s=self._patience.found_s, now_s=time.monotonic())
        self._counter = 0
        self._closed = threading.Event()
        self._leaving = False
        self._agents: set[int] = set()
        self._waiting: defaultdict[str, set[threading.Event]] = defaultdict(set)
        self._turns: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._looks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._reads: dict[str, Future[list[bytes | None]]] = {}
        self._peers = [_Peer(self, other) for other in range(self._size) if other != number]
        self._server = Server([listener], token(run_id), self._handle, self._agents.discard)
        threading.Thread(target=self._remember, name="holdfast-remember", daemon=True).start()

    # -- its end --

    def leave(self) -> None:
        """Stay until nobody needs this replica any more: no agent is connected to any, and all others are leaving too."""
        self._leaving = True
        deadline = time.monotonic() + self._patience.linger_s
        while self._agents or not all(peer.can_spare_us() for peer in self._peers):
            if time.monotonic() > deadline:
                logger.info("%s leaves, though others still take part in the rendezvous", self.endpoints.names[self.number])
                break
            time.sleep(0.05)
        self.close()

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            for waiter in [waiter for waiters in self._waiting.values() for waiter in waiters]:
                waiter.set()
        self._server.close()
        for peer in self._peers:
            peer.close()

    # -- answering --

    def _handle(self, verb: str, fields: Header, payload: memoryview) -> Reply | Header:
        connection = fields.pop("connection")
        match verb:
            case "hello":
                self._check(fields["names"], fields["number"])
                if fields["agent"]:
                    self._agents.add(connection)
                return {}
            case "vote":
                answers, blobs = pack(tuple(self._vote(request) for request in unpack(fields["requests"], payload)))
                return {"answers": answers}, blobs
            case "change":
                change, op = unpack(fields["change"], payload)
                return self._reply((self._change(fields["key"], change, op),))
            case "read":
                return self._reply(tuple(self._await(tuple(fields["keys"]), fields["wait_s"])))
            case "count":
                return self._reply((self._count(),))
            case "status":
                return {"leaving": self._leaving, "agents": len(self._agents)}
            case _:
                raise ClusterError(f"a replica does not know the verb {verb!r}; are two releases of holdfast mixed?")

    def _check(self, names: Sequence[str], number: int) -> None:
        if tuple(names) != self.endpoints.names or number != self.number:
            raise ConfigError(
                f"agents were given different lists: --rdzv-endpoint {','.join(names)} here, and "
                f"{','.join(self.endpoints.names)} at the replica of {self.endpoints.names[self.number]}; give all the same list"
            )

    def _reply(self, results: tuple[Result, ...]) -> Reply:
        tree, blobs = pack(results)
        voting = [peer.number for peer in self._peers if peer.votes()]
        return {"results": tree, "era": self._voter.era, "lowest": min([self.number, *voting])}, blobs

    def _vote(self, request: Request) -> Answer:
        with self._lock:
            answer = self._voter.answer(request)
            if isinstance(request, Accept):
                for waiter in self._waiting.get(request.key, ()):
                    waiter.set()
        return answer

    # -- proposing --

    def _change(self, key: str, change: Change, op: Op) -> Result:
        if isinstance(change, CompareSet | Delete) and not op.attempt:  # often there is nothing to change, and many ask at once
            data = self._read((key,))[0]
            value, result = apply(change, Value(data), op)
            if value.data == data:
                return result
        turn = self._turns[key]
        if not turn.acquire(timeout=self._patience.ask_s - self._patience.majority_s):
            raise QuorumLost(f"{self.endpoints.names[self.number]} has too many changes of {key!r} to make")
        try:
            return self._round(key, change, op)
        finally:
            turn.release()

    def _round(self, key: str, change: Change, op: Op) -> Result:
        """One ballot after the other until a majority has accepted. QuorumLost names those that do not answer."""
        deadline, above = time.monotonic() + self._patience.majority_s, 0
        while time.monotonic() < deadline:
            attempt = Round(self._size, self._era(), key, self._next_ballot(above), change, op)
            self._run(attempt, deadline)
            if attempt.phase is Phase.DONE:
                return attempt.result
            above = attempt.outbid_by[0]
            time.sleep(random.uniform(0.005, 0.03))
        raise QuorumLost(self._who_is_missing())

    def _next_ballot(self, above: int) -> Ballot:
        """No number is given twice in one life: two values under one ballot would break everything."""
        with self._lock:
            self._counter = max(self._counter, above) + 1
            return self._counter, self._voter.life

    def _run(self, attempt: Round, deadline: float) -> None:
        answers: SimpleQueue[tuple[int, Answer | None]] = SimpleQueue()
        request: Request | None = attempt.begin()
        while attempt.phase in (Phase.PREPARING, Phase.PROPOSING):
            if request is not None:
                self._ask_all(request, answers)
            try:
                sender, answer = answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                return
            request = attempt.hear(sender, answer)

    def _ask_all(self, request: Request, answers: SimpleQueue[tuple[int, Answer | None]]) -> None:
        for peer in self._peers:
            peer.ask(request, answers)
        answers.put((self.number, self._vote(request)))

    def _era(self) -> str:
        if self._voter.standing is not Standing.VOTING:
            raise QuorumLost(self._voter.plight(self.endpoints.names))
        return self._voter.era

    def _who_is_missing(self) -> str:
        missing = [f"{self.endpoints.names[peer.number]} ({peer.trouble})" for peer in self._peers if peer.trouble]
        return f"{self.endpoints.names[self.number]} finds no majority of the {self._size} listed hosts: " + (
            ", ".join(missing) or "too many proposers"
        )

    # -- reading --

    def _await(self, keys: tuple[str, ...], wait_s: float) -> list[bytes | None]:
        """The values of all keys as soon as all are there; after so many seconds, of those that are."""
        deadline = time.monotonic() + min(wait_s, self._patience.poll_s)
        with self._watch(keys) as accepted:
            while True:
                accepted.clear()
                found = self._read(keys)
                if None not in found or time.monotonic() >= deadline or self._closed.is_set():
                    return found
                while not self._closed.is_set() and accepted.wait(max(0.0, deadline - time.monotonic())):
                    accepted.clear()
                    if self._are_here(keys):
                        break
                else:
                    return found

    @contextmanager
    def _watch(self, keys: tuple[str, ...]) -> Iterator[threading.Event]:
        waiter = threading.Event()
        with self._lock:
            for key in keys:
                self._waiting[key].add(waiter)
        try:
            yield waiter
        finally:
            with self._lock:
                for key in keys:
                    self._waiting[key].discard(waiter)
                    if not self._waiting[key]:
                        del self._waiting[key]

    def _are_here(self, keys: tuple[str, ...]) -> bool:
        with self._lock:
            return all(self._voter.registers.get(key, BLANK).value.data is not None for key in keys)

    def _read(self, keys: tuple[str, ...]) -> list[bytes | None]:
        """The newest values. Whoever asks for the same while others are being told shares the next look with all that do."""
        if len(keys) != 1:
            return self._look(keys)
        with self._lock:
            shared = self._reads.get(keys[0])
            mine: Future[list[bytes | None]] = shared or Future()
            self._reads[keys[0]] = mine
        if shared is None:
            with self._looks[keys[0]]:
                with self._lock:
                    del self._reads[keys[0]]  # whoever comes from here on may have seen something newer already
                try:
                    mine.set_result(self._look(keys))
                except BaseException as error:
                    mine.set_exception(error)
        return mine.result()

    def _look(self, keys: tuple[str, ...]) -> list[bytes | None]:
        """What this replica has, where a majority has the same; where not, what a round finds."""
        answers: SimpleQueue[tuple[int, Answer | None]] = SimpleQueue()
        look = Look(self._era(), keys)
        with self._lock:
            here = [self._voter.registers.get(key, BLANK) for key in keys]
            votes = [self._voter.answer(look)]
        for peer in self._peers:
            peer.ask(look, answers)
        chosen, lost = [False] * len(keys), 0
        deadline = time.monotonic() + self._patience.majority_s
        while not all(chosen) and len(votes) < majority(self._size) and self._size - lost >= majority(self._size):
            with suppress(Empty):
                _, answer = answers.get(timeout=max(0.0, deadline - time.monotonic()))
                if answer is None or isinstance(answer.body, Forgetful | Stranger):
                    lost += 1
                else:
                    votes.append(answer)
            chosen = are_chosen(self._size, [register.accepted for register in here], votes)
            if time.monotonic() > deadline:
                break
        return [
            register.value.data if sure else self._settle(key) for key, register, sure in zip(keys, here, chosen, strict=True)
        ]

    def _settle(self, key: str) -> bytes | None:
        data = self._change(key, Get(), Op(self._voter.life, 0))
        assert data is None or isinstance(data, bytes)
        return data

    def _count(self) -> int:
        """How many keys there are, as a majority knows them."""
        answers: SimpleQueue[tuple[int, Answer | None]] = SimpleQueue()
        self._ask_all(List(self._era()), answers)
        told: list[Answer] = []
        for _ in range(self._size):
            with suppress(Empty):
                answer = answers.get(timeout=self._patience.majority_s)[1]
                told += [answer] if answer is not None and isinstance(answer.body, Listed) else []
        listed = [answer.body.keys for answer in consistent(told) if isinstance(answer.body, Listed)]
        if len(listed) < majority(self._size):
            raise QuorumLost(self._who_is_missing())
        keys = tuple(sorted({key for known in listed for key in known}))
        return sum(data is not None for data in self._read(keys)) if keys else 0

    # -- remembering --

    def _remember(self) -> None:
        """Ask the others until this replica may vote."""
        told_s = time.monotonic()
        while not self._closed.is_set():
            answers: SimpleQueue[tuple[int, Answer | None]] = SimpleQueue()
            with self._lock:
                claim = self._voter.claim()
            for peer in self._peers:
                peer.ask(claim, answers)
            heard: dict[int, Answer | None] = {}
            with suppress(Empty):
                while len(heard) < len(self._peers):
                    sender, answer = answers.get(timeout=2 * self._patience.peer_s)
                    heard[sender] = answer
            with self._lock:
                self._voter.hear(heard, time.monotonic())
                if self._voter.standing is Standing.VOTING:
                    break
            if time.monotonic() - told_s > 10:
                told_s = time.monotonic()
                logger.warning("%s", self._voter.plight(self.endpoints.names))
            self._closed.wait(0.1)
        logger.info("%s votes in the rendezvous", self.endpoints.names[self.number])


class _Peer:
    """The way to another replica. `ask` never blocks; what waits while a request is under way goes together in the next frame."""

    def __init__(self, home: Replica, number: int) -> None:
        self.number, self.trouble = number, "not reached yet"
        self._home = home
        self._queue: SimpleQueue[tuple[Request, SimpleQueue[tuple[int, Answer | None]]] | None] = SimpleQueue()
        self._connection: Connection | None = None
        self._rest_until_s = self._voted_s = -1e18
        threading.Thread(target=self._work, name=f"holdfast-peer-{number}", daemon=True).start()

    def ask(self, request: Request, answers: SimpleQueue[tuple[int, Answer | None]]) -> None:
        """The answer is put into `answers`; None, soon, where there will be none."""
        self._queue.put((request, answers))

    def votes(self) -> bool:
        """Whether it has given a vote just now."""
        return time.monotonic() - self._voted_s < 1

    def can_spare_us(self) -> bool:
        """Whether it is gone, or leaving as well with no agent connected."""
        home = self._home
        try:
            connection = greet(home.endpoints, self.number, home._run_id, home._patience.peer_s, is_agent=False)
            with _closing(connection.close):
                status = connection.ask("status")
        except (ClusterError, ConfigError):
            return True
        return bool(status["leaving"]) and not status["agents"]

    def close(self) -> None:
        self._queue.put(None)

    def _work(self) -> None:
        while True:
            batch = [self._queue.get()]
            while len(batch) < BATCH and not self._queue.empty():
                batch.append(self._queue.get())
            asked = [one for one in batch if one is not None]
            answers = self._exchange(tuple(request for request, _ in asked))
            for (_, reply), answer in zip(asked, answers, strict=True):
                reply.put((self.number, answer))
            if len(asked) < len(batch):
                return self._drop()

    def _exchange(self, requests: tuple[Request, ...]) -> Sequence[Answer | None]:
        if not requests or time.monotonic() < self._rest_until_s:
            return [None] * len(requests)
        home = self._home
        try:
            if self._connection is None:
                self._connection = greet(home.endpoints, self.number, home._run_id, home._patience.peer_s, is_agent=False)
            tree, blobs = pack(requests)
            told = self._connection.ask("vote", blobs, requests=tree)
            header, payload = told if isinstance(told, tuple) else (told, memoryview(b""))
            answers: tuple[Answer, ...] = unpack(header["answers"], payload)
        except (ClusterError, ConfigError) as error:
            if isinstance(error, ConfigError) and self.trouble != str(error):
                logger.error("%s", error)
            self.trouble = str(error) if isinstance(error, ConfigError) else cause(error)
            self._drop()
            self._rest_until_s = time.monotonic() + 0.1
            return [None] * len(requests)
        has_voted = any(not isinstance(answer.body, Forgetful | Stranger) for answer in answers)
        self.trouble = "" if has_voted else "it has begun anew, or belongs to another beginning of this job"
        self._voted_s = time.monotonic() if has_voted else self._voted_s
        return answers

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@contextmanager
def _closing(close: Callable[[], Any]) -> Iterator[None]:
    try:
        yield
    finally:
        close()
