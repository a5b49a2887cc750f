"""The store of torchrun's agents: the same contract as TCPStore's, and replicas as real processes that die, stop and come back."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import DistNetworkError, DistStoreError, PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.utils.store import barrier

from holdfast.elastic.rendezvous.ballots import pack, unpack
from holdfast.elastic.rendezvous.endpoints import Endpoints, _listen
from holdfast.elastic.rendezvous.register import Answer, Memory, Register, Value
from holdfast.elastic.rendezvous.replica import Patience, Replica
from holdfast.elastic.rendezvous.replicated import Client, ReplicatedStore
from holdfast.elastic.torchrun import rendezvous_handler
from holdfast.errors import ClusterError, ConfigError

HERE = Path(__file__).parent
QUICK = Patience(found_s=0.5, peer_s=0.5, majority_s=0.5, poll_s=0.3, ask_s=1.2, linger_s=1.0)


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        return [held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(count)]


def some_endpoints(count: int = 3) -> Endpoints:
    return Endpoints(tuple(("127.0.0.1", port) for port in free_ports(count)))


def store_at(endpoints: Endpoints, *, patience_s: float = 20, at: int = 0, run_id: str = "run") -> ReplicatedStore:
    client = Client(endpoints, run_id, patience_s, QUICK)
    client._at = at
    return ReplicatedStore(client, timeout_s=5)


@pytest.fixture
def agent() -> Iterator[Callable[..., ReplicatedStore]]:
    """Makes stores as agents have them."""
    made = []

    def make(endpoints: Endpoints, **options: Any) -> ReplicatedStore:
        made.append(store_at(endpoints, **options))
        return made[-1]

    yield make
    for store in made:
        store.client.close()


@dataclass
class Here:
    """Replicas in this process; closing one is what others see of a process that ends."""

    endpoints: Endpoints
    replicas: dict[int, Replica] = field(default_factory=dict)

    def start(self, *numbers: int) -> None:
        listeners = [_listen(self.endpoints.addresses[number][1]) for number in numbers]
        for number, listener in zip(numbers, listeners, strict=True):
            assert listener is not None
            self.replicas[number] = Replica(self.endpoints, number, listener, "run", QUICK)

    def end(self, *numbers: int) -> None:
        for number in numbers:
            self.replicas.pop(number).close()


@pytest.fixture
def here() -> Iterator[Here]:
    found = Here(some_endpoints())
    yield found
    found.end(*tuple(found.replicas))


@pytest.fixture
def replicas(here) -> list[Replica]:
    here.start(0, 1, 2)
    return list(here.replicas.values())


# -- the contract ------------------------------------------------------------------------------------------------------


class StoreContract:
    """What torch's agent relies on. TCPStore says what is right."""

    def test_a_value_is_what_was_set_last(self, store):
        store.set("k", "v")
        store.set("k", b"\xff\x00")
        assert store.get("k") == b"\xff\x00"
        store.set("k", "")
        assert store.get("k") == b""
        assert store.check(["k"])

    def test_compare_set_on_a_missing_key(self, store):
        assert store.compare_set("a", "x", "v") == b"x"
        assert not store.check(["a"])
        assert store.compare_set("a", "", "v") == b"v"
        assert store.get("a") == b"v"

    def test_compare_set_on_a_key_that_is_there(self, store):
        store.set("a", "v")
        assert store.compare_set("a", "", "w") == b"v"
        assert store.compare_set("a", "x", "w") == b"v"
        assert store.compare_set("a", "v", b"\xfe") == b"\xfe"
        assert store.get("a") == b"\xfe"
        store.set("a", "")
        assert store.compare_set("a", "", "w") == b"w"

    def test_add_counts_and_is_read_as_text(self, store):
        assert store.add("n", 3) == 3
        assert store.add("n", -5) == -2
        assert store.get("n") == b"-2"
        assert store.add("zero", 0) == 0
        assert store.check(["zero"])

    def test_append_begins_with_nothing(self, store):
        store.append("k", "abc")
        store.append("k", "def")
        assert store.get("k") == b"abcdef"

    def test_many_at_once(self, store):
        store.multi_set(["a", "b"], ["1", b"\xff"])
        assert store.multi_get(["b", "a"]) == [b"\xff", b"1"]
        with pytest.raises(DistStoreError):
            store.multi_set(["a"], ["1", "2"])
        assert store.multi_get([]) == []

    def test_a_deleted_key_is_gone(self, store):
        store.set("k", "v")
        before = store.num_keys()
        assert store.delete_key("k")
        assert not store.delete_key("k")
        assert not store.check(["k"])
        assert store.num_keys() == before - 1
        assert store.compare_set("k", "", "again") == b"again"

    def test_nothing_at_all_is_there(self, store):
        assert store.check([])
        store.wait([])

    def test_whoever_waits_is_told_when_it_is_too_late(self, store):
        store.set("there", "1")
        with pytest.raises(DistStoreError, match=r"timeout after 100ms"):
            store.wait(["there", "missing"], timedelta(milliseconds=100))
        store.set_timeout(timedelta(milliseconds=100))
        assert store.timeout == timedelta(milliseconds=100)
        with pytest.raises(DistStoreError, match=r"timeout after 100ms"):
            store.get("missing")
        with pytest.raises(DistStoreError):
            store.multi_get(["there", "missing"])

    def test_whoever_waits_is_told_when_the_key_comes(self, store):
        with ThreadPoolExecutor() as pool:
            got = pool.submit(store.clone().get, "late")
            waited = pool.submit(store.clone().wait, ["late", "later"])
            time.sleep(0.05)
            store.set("late", "v")
            assert got.result() == b"v"
            assert not waited.done()
            store.set("later", "v")
            waited.result()

    def test_torch_builds_its_barrier_and_its_rendezvous_on_it(self, store):
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda _: barrier(store.clone(), 3, "end", barrier_timeout=5), range(3)))
        backend = C10dRendezvousBackend(store, "run")
        assert backend.get_state() is None
        first = backend.set_state(b"one")
        assert first is not None
        assert (first[0], first[2]) == (b"one", True)
        assert backend.set_state(b"two") == (b"one", first[1], False)
        second = backend.set_state(b"two", first[1])
        assert second is not None
        assert (second[0], second[2]) == (b"two", True)


class TestTCPStore(StoreContract):
    @pytest.fixture
    def store(self):
        return TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5), wait_for_workers=False)


@pytest.fixture(scope="module")
def served():
    served = Here(some_endpoints())
    served.start(0, 1, 2)
    store = store_at(served.endpoints)
    yield store
    store.client.close()
    served.end(0, 1, 2)


class TestReplicatedStore(StoreContract):
    """Beneath two prefixes, as torch uses it; every method is reached through torch's C++ then."""

    @pytest.fixture
    def store(self, served, request):
        return PrefixStore("inner", PrefixStore(request.node.name, served))

    def test_it_is_the_same_without_a_prefix(self, served):
        served.multi_set(["a", "b"], ["1", b"2"])
        assert served.multi_get(["a", "b"]) == [b"1", b"2"]
        assert served.add("n", 1) == 1
        assert served.delete_key("n")
        assert served.num_keys() >= 2
        assert served.compare_set("a", "1", "") == b""
        assert served.has_extended_api()


# -- several proposers, several agents ---------------------------------------------------------------------------------


def test_nothing_is_lost_or_done_twice_when_all_replicas_propose_at_once(replicas, agent):
    stores = [agent(replicas[0].endpoints, at=at) for at in range(3)]
    for store in stores:
        store.client._avoid_until_s = [1e18] * 3  # each keeps to its own replica
    work = [(store, key) for store in stores for key in ("n", "m")]
    with ThreadPoolExecutor(len(work)) as pool:
        counted = list(pool.map(lambda one: [one[0].add(one[1], 1) for _ in range(12)], work))
    for key in (0, 1):
        assert sorted(number for some in counted[key::2] for number in some) == list(range(1, 37))


def test_many_wait_for_one_key_without_asking_all_the_time(replicas, agent):
    asked = []
    vote = replicas[0]._vote
    replicas[0]._vote = lambda request: asked.append(request) or vote(request)
    store = agent(replicas[0].endpoints)
    with ThreadPoolExecutor(40) as pool:
        waiting = [pool.submit(store.wait, ["late"], timedelta(seconds=5)) for _ in range(40)]
        time.sleep(0.6)
        begun = time.monotonic()
        store.set("late", "1")
        for one in waiting:
            one.result()
    assert time.monotonic() - begun < 0.5
    assert len(asked) < 60


# -- messages ----------------------------------------------------------------------------------------------------------


def test_messages_survive_the_wire_and_strange_ones_are_refused():
    value = Value(b"\x00\xff", {"s": (1, 0, True, 5)})
    messages = (Answer(1, "era", (1, 2), Memory("life", 2, {"k": Register((3, "x"), (2, "y"), value, False)})), None, b"x", 7)
    tree, blobs = pack(messages)
    assert unpack(json.loads(json.dumps(tree)), memoryview(blobs)) == messages
    for bad in ({"is": "Popen", "with": []}, {"is": "Look", "with": []}, {"bytes": 99}, {"with": 1}):
        with pytest.raises(ClusterError, match="not understood"):
            unpack([bad], memoryview(b"1234"))
    with pytest.raises(ClusterError, match="belong to nothing"):
        unpack([], memoryview(b"1234"))


# -- what is listed ----------------------------------------------------------------------------------------------------


def test_endpoints_are_names_with_ports_and_have_a_default():
    found = Endpoints.parse("hostA:1, 10.0.0.2 ,c.example.org:65535")
    assert found.names == ("hosta:1", "10.0.0.2:29400", "c.example.org:65535")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a:1,b:2,A:1", "a:1 more than once"),
        ("a,b,a:29400", "a:29400 more than once"),
        ("a:1,b:x,c:3", "port of 'b:x'"),
        ("a:1,b:70000,c:3", "port of 'b:70000'"),
        ("a:1,b:0,c:3", "port of 'b:0'"),
        ("a:1,,c:3", "'' is no host:port"),
        ("a:1,[::1]:2,c:3", "is no host:port"),
        ("a:1,b c:2,c:3", "'b c:2' is no host:port"),
    ],
)
def test_lists_that_cannot_be_meant_are_refused(text, words):
    with pytest.raises(ConfigError, match=words.replace("[", r"\[")):
        Endpoints.parse(text)
    with pytest.raises(ConfigError):
        rendezvous_handler()(RendezvousParameters("holdfast", text, "run", 1, 3))


def test_an_even_number_of_hosts_is_warned_about(caplog):
    Endpoints.parse("a,b,c,d")
    assert "an odd number is better" in caplog.text


def test_an_agent_takes_the_first_place_of_its_machine_that_is_free():
    ports = free_ports(2)
    endpoints = Endpoints((("192.0.2.1", ports[0]), ("127.0.0.1", ports[0]), ("localhost", ports[1])))
    first, second = endpoints.take(), endpoints.take()
    assert first is not None
    assert second is not None
    assert (first[0], second[0]) == (1, 2)
    assert endpoints.take() is None
    for _, listener in (first, second):
        listener.close()


def test_agents_that_were_given_different_lists_are_told(replicas, agent):
    right = replicas[0].endpoints
    swapped = Endpoints((right.addresses[1], right.addresses[0], right.addresses[2]))
    with pytest.raises(ConfigError, match="agents were given different lists"):
        agent(swapped).set("k", "v")


def test_another_jobs_agents_are_kept_out(replicas, agent):
    store = agent(replicas[0].endpoints, run_id="another run", patience_s=0.3)
    with pytest.raises(DistNetworkError, match="belongs to another run"):
        store.set("k", "v")


def test_one_endpoint_is_c10d_as_ever():
    (port,) = free_ports(1)
    parameters = RendezvousParameters("holdfast", f"127.0.0.1:{port}", "run", 1, 1, local_addr="127.0.0.1")
    handler = rendezvous_handler()(parameters)
    assert handler.get_backend() == "holdfast"
    info = handler.next_rendezvous()
    assert (info.rank, info.world_size) == (0, 1)
    assert handler.shutdown()


# -- the end -----------------------------------------------------------------------------------------------------------


def test_replicas_leave_together_at_once(replicas):
    begun = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(Replica.leave, replicas))
    assert time.monotonic() - begun < 1.5


def test_replicas_stay_until_the_last_agent_is_done(replicas, agent):
    store = agent(replicas[0].endpoints)
    store.set("k", "v")
    with ThreadPoolExecutor(3) as pool:
        leaving = [pool.submit(replica.leave) for replica in replicas]
        time.sleep(0.4)
        assert not any(one.done() for one in leaving)
        assert store.get("k") == b"v"
        store.client.close()


def test_a_replica_leaves_after_a_while_though_others_go_on(replicas):
    begun = time.monotonic()
    replicas[2].leave()
    assert QUICK.linger_s <= time.monotonic() - begun < QUICK.linger_s + 3


# -- replicas that die -------------------------------------------------------------------------------------------------


@dataclass
class Hosts:
    """Replicas in processes of their own."""

    endpoints: Endpoints
    processes: dict[int, subprocess.Popen] = field(default_factory=dict)

    def start(self, *numbers: int) -> None:
        for number in numbers:
            command = [sys.executable, str(HERE / "replicas.py"), ",".join(self.endpoints.names), "run", str(number)]
            environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
            self.processes[number] = subprocess.Popen([*command, json.dumps(asdict(QUICK))], env=environment)

    def kill(self, *numbers: int) -> None:
        for number in numbers:
            process = self.processes.pop(number)
            process.kill()
            process.wait()


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    found = Hosts(some_endpoints())
    yield found
    found.kill(*tuple(found.processes))


def test_any_host_may_be_killed_stopped_and_come_back_empty(hosts, agent):
    """One after the other, while an agent counts: no addition is lost, none is done twice, none takes long."""
    hosts.start(0, 1, 2)
    store = agent(hosts.endpoints)
    done, took, stop = [], [], threading.Event()

    def count() -> None:
        while not stop.is_set():
            begun = time.monotonic()
            done.append(store.add("n", 1))
            took.append(time.monotonic() - begun)
            time.sleep(0.002)

    def more(count: int = 20) -> None:
        target, deadline = len(done) + count, time.monotonic() + 15
        while len(done) < target and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(done) >= target

    store.set("kept", "v")
    with ThreadPoolExecutor(1) as pool:
        counting = pool.submit(count)
        try:
            more()
            hosts.kill(0)
            more()
            hosts.start(0)  # it knows nothing, and is told by both others
            wait_for_vote(agent, hosts.endpoints, 0)
            hosts.kill(1)
            more()
            hosts.start(1)
            wait_for_vote(agent, hosts.endpoints, 1)
            hosts.processes[0].send_signal(signal.SIGSTOP)
            more()
            hosts.processes[0].send_signal(signal.SIGCONT)
            more()
            hosts.kill(2)
            more()
        finally:
            hosts.processes[0].send_signal(signal.SIGCONT)
            stop.set()
        counting.result()
    assert done == list(range(1, len(done) + 1))
    assert store.get("kept") == b"v"
    assert max(took) < 10


def wait_for_vote(agent: Callable[..., ReplicatedStore], endpoints: Endpoints, number: int) -> None:
    """Until that replica carries out what it is asked for."""
    store = agent(endpoints, at=number)
    store.client._move_on = lambda *failed: time.sleep(0.02)  # it asks no other
    store.client._avoid_until_s = [1e18] * 3
    store.check(["kept"])


def test_without_a_majority_the_error_names_who_is_missing(here, agent):
    here.start(0, 1, 2)
    store = agent(here.endpoints)
    wait_for_vote(agent, here.endpoints, 1)
    store.set("k", "v")
    here.end(0, 2)
    store.client.patience_s = 0.7
    with pytest.raises(DistNetworkError) as caught:
        store.get("k")
    for number in (0, 2):
        assert f"{here.endpoints.names[number]} ([Errno 111] Connection refused)" in str(caught.value)
    here.start(0)  # the one that is left remembers, and that is not enough
    store.client.patience_s = 1.5
    with pytest.raises(DistNetworkError, match=f"{here.endpoints.names[1]} remembers the job"):
        store.set("k", "w")


def test_a_job_begins_without_a_host_that_never_comes(here, agent):
    here.start(1, 2)
    begun = time.monotonic()
    store = agent(here.endpoints)
    store.set("k", "v")
    assert time.monotonic() - begun > QUICK.found_s * 0.9
    here.start(0)
    wait_for_vote(agent, here.endpoints, 0)
    here.end(1)
    assert store.get("k") == b"v"


def test_an_agent_of_a_job_that_has_begun_anew_is_told(here, agent):
    here.start(0, 1)
    store = agent(here.endpoints)
    store.set("k", "v")
    here.end(0, 1)
    here.start(0, 1)
    with pytest.raises(DistNetworkError, match="begun anew without this agent"):
        store.set("k", "w")
