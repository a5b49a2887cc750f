"""The processes around a run on one host: a local Ray started as a daemon, the keepers in it, and what is to be seen of them.

A trainer never becomes a Ray driver. One process per host looks whether the keepers of its nodes answer on their sockets, and only
where one does not, a short-lived helper process talks to Ray.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from holdfast.environment import Environment, home, runtime_dir
from holdfast.errors import ClusterError, ConfigError, HoldfastError, KeeperUnreachable, RayUnreachable, error_named
from holdfast.snapshot.birth import Born, ask_cradle, holds_lock
from holdfast.snapshot.client import Endpoint, ask_once
from holdfast.snapshot.control import ControlPage
from holdfast.snapshot.interval import Intervals
from holdfast.snapshot.janitor import sweep

logger = logging.getLogger(__name__)

STARTUP_TIMEOUT_S = 120.0
RAY_RESTART_S = 30.0
ANSWER_S = 5.0
SILENCE_S = 20.0
"""A keeper that lives and leaves the simplest question unanswered for so long hangs."""
Starting = subprocess.Popen[bytes] | Born
OBJECT_STORE_NBYTES = 80 * 2**20  # near Ray's minimum: no payload of ours ever goes through its object store


# -- keepers -------------------------------------------------------------------------------------------------------------


def node_memory(memory: Path, job: str, node: int) -> Path:
    return home(memory) / job / f"node-{node}"


def known_nodes(memory: Path, job: str) -> list[int]:
    """The nodes of the run that have memory on this host."""
    return sorted(int(place.name.removeprefix("node-")) for place in (home(memory) / job).glob("node-*"))


def ensure_keepers(
    job: str, nodes: list[int], memory: Path, *, kind: str, ray_address: str | None, bind: str, cradle: str = ""
) -> None:
    """See that every one of `nodes` on this host has a keeper that answers; starts what is missing and waits for it.

    `kind` is "ray" or "process"; `cradle` is where processes are asked for first. Raises RayUnreachable, KeeperUnreachable or
    ConfigError.
    """
    if kind not in ("ray", "process"):
        raise ConfigError(f"keepers can be 'ray' actors or a plain 'process'; {kind!r} is neither")
    _check_memory(memory)
    places = {node: node_memory(memory, job, node) for node in nodes}
    with _host_lock():
        missing = [node for node, place in places.items() if not _answers(place) and not _comes_to(node, place)]
        if missing:
            sweep(home(memory), but=job)
        started: dict[int, Starting] = {}
        if missing and kind == "ray":
            _start_in_ray(job, [(node, str(places[node])) for node in missing], ray_address, bind)
        elif missing:
            started = {node: _start_process(job, node, places[node], bind, cradle) for node in missing}
        deadline = time.monotonic() + STARTUP_TIMEOUT_S
        try:
            for node in missing:
                _wait_for(node, places[node], deadline, started.get(node))
        finally:
            for process in started.values():
                _let_go(process)


def revive_keeper(
    job: str, node: int, memory: Path, *, kind: str, ray_address: str | None, bind: str, cradle: str = ""
) -> None:
    """See that the keeper of `node`, which has died or hangs, answers again. Ray restarts its actors and is given time to."""
    _comes_to(node, node_memory(memory, job, node))
    deadline = time.monotonic() + RAY_RESTART_S
    while kind == "ray" and time.monotonic() < deadline:
        if _answers(node_memory(memory, job, node)):
            return
        time.sleep(0.2)
    ensure_keepers(job, [node], memory, kind=kind, ray_address=ray_address, bind=bind, cradle=cradle)


def _check_memory(memory: Path) -> None:
    if not os.access(memory, os.W_OK | os.X_OK) or not memory.is_dir():
        raise ConfigError(f"slots cannot live in {memory}: it is not a directory that this user may write to")


def _answers(place: Path) -> bool:
    try:
        ask_once(place, "ping", timeout_s=ANSWER_S)
    except HoldfastError:
        return False
    return True


def _comes_to(node: int, place: Path) -> bool:
    """Whether a keeper of `place` that lives and is slow answers after all. One that does not is ended: its slots outlive it, and
    its successor adopts them."""
    try:
        pid = Endpoint.read(place).pid
    except KeeperUnreachable:
        return False
    if not holds_lock(pid, place):
        return False
    try:
        # Answered in every state, and without the keeper's lock, which it may hold for long.
        ask_once(place, "adrift", timeout_s=SILENCE_S)
    except KeeperUnreachable:
        if holds_lock(pid, place):
            logger.error(
                "the keeper of node %d (pid %d) has said nothing for %.0f s and is ended; another one takes over its memory",
                node,
                pid,
                SILENCE_S,
            )
            os.kill(pid, signal.SIGKILL)
        return False
    return _answers(place)  # not one whose run is over


def _wait_for(node: int, place: Path, deadline: float, process: Starting | None) -> None:
    while not _answers(place):
        if process is not None and process.poll() is not None:
            error, message = _last_words(_log_of(place.parent.name, node))
            if error is not None:
                raise error(f"the keeper of node {node} could not start: {message}")
            raise KeeperUnreachable(
                f"the keeper of node {node} was started and ended with code {process.returncode}; its log is in {runtime_dir()}"
            )
        if time.monotonic() > deadline:
            raise KeeperUnreachable(
                f"the keeper of node {node} was started and does not answer in {place}; its log is in {runtime_dir()} or in Ray's"
            )
        time.sleep(0.01)


def _log_of(job: str, node: int) -> Path:
    return runtime_dir() / f"keeper-{job}-{node}.log"


def _last_words(log: Path) -> tuple[type[HoldfastError] | None, str]:
    """The error with which a keeper refused to start, as the last line of its log tells it."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    name, _, message = (lines[-1] if lines else "").partition(" ERROR root: ")[2].partition(": ")
    return error_named(name), message


def _start_process(job: str, node: int, place: Path, bind: str, address: str) -> Starting:
    arguments = [job, str(node), str(place), bind]
    born = ask_cradle(address, arguments, _log_of(job, node), _environment()) if address else None
    if born is not None:
        return born
    with _log_of(job, node).open("ab") as output:
        command = [sys.executable, "-m", "holdfast.snapshot.host", *arguments]
        return _start_daemon(command, output, _environment())


def _start_daemon(command: list[str], output: IO[bytes], environ: dict[str, str]) -> subprocess.Popen[bytes]:
    """A process in a session of its own that outlives this one."""
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
    return subprocess.Popen(command, start_new_session=True, env=environ, **streams)


def _let_go(process: Starting) -> None:
    """It is meant to go on without us; Python would warn of a forgotten child when this object goes."""
    process.returncode = 0


def _start_in_ray(job: str, nodes: list[tuple[int, str]], ray_address: str | None, bind: str) -> None:
    address = ray_address or _local_ray()
    request = json.dumps({"address": address, "job": job, "nodes": nodes, "bind": bind})
    _in_helper("start", request)


def _in_helper(verb: str, request: str) -> None:
    """Run one Ray operation in a process of its own, which hands its error back as words."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "holdfast.snapshot.cluster", verb],
            input=request,
            capture_output=True,
            text=True,
            timeout=STARTUP_TIMEOUT_S * 2,
            env=_environment(),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RayUnreachable(
            f"Ray did not answer within {STARTUP_TIMEOUT_S * 2:.0f} s; see its log in {runtime_dir()}"
        ) from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RayUnreachable(lines[-1].removeprefix("RayUnreachable: "))


def _environment() -> dict[str, str]:
    """The caller's environment, with this package found wherever it was imported from, and without torchrun's variables."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "RAY_DEDUP_LOGS": "0"}


# -- the local Ray ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LocalRay:
    """The Ray that holdfast started on this host: its address and the process whose end ends all of it."""

    address: str
    pid: int

    @property
    def alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except OSError:
            return False
        return b"ray" in Path(f"/proc/{self.pid}/cmdline").read_bytes()


def local_ray() -> LocalRay | None:
    """The recorded local Ray, when it is alive."""
    try:
        found = LocalRay(**json.loads((runtime_dir() / "ray.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.alive else None


def _local_ray() -> str:
    found = local_ray() or _start_ray()
    return found.address


def _start_ray() -> LocalRay:
    """A Ray head that outlives this process and serves nobody but the keepers."""
    place = runtime_dir()
    port = _free_port()
    log = (place / "ray.log").open("wb")
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *(f"--port={port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false", "--num-cpus=1"),
        *(f"--object-store-memory={OBJECT_STORE_NBYTES}", f"--temp-dir={place / 'ray'}"),
    ]
    environ = {**_environment(), "RAY_memory_monitor_refresh_ms": "0"}
    with log:
        process = _start_daemon(command, log, environ)
    started = LocalRay(f"127.0.0.1:{port}", process.pid)
    deadline = time.monotonic() + STARTUP_TIMEOUT_S
    while not _listens(port):
        if process.poll() is not None or time.monotonic() > deadline:
            tail = (place / "ray.log").read_text(errors="replace").strip().splitlines()[-3:]
            raise RayUnreachable(
                f"a local Ray did not start ({' / '.join(tail) or 'no output'}); its log is {place / 'ray.log'}"
            )
        time.sleep(0.1)
    _let_go(process)
    (place / "ray.json").write_text(json.dumps({"address": started.address, "pid": started.pid}))
    logger.info("started a local Ray at %s (pid %d)", started.address, started.pid)
    return started


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        sock.settimeout(1)
        return sock.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def _host_lock() -> Iterator[None]:
    """One starter at a time on this host."""
    place = runtime_dir()
    place.mkdir(mode=0o700, exist_ok=True)
    if place.stat().st_uid != os.getuid():
        raise ConfigError(f"{place} belongs to another user; remove it")
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# -- up, down, status ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One keeper. `step` is the newest that its ranks have completed; the counters are summed over its ranks, `refused` are
    snapshots that held NaN. `last_scrub` and `last_drill` say when (`time_s`) and what came of it."""

    node: int
    pid: int
    alive: bool
    memory: str
    nbytes: int
    epoch: int
    committed_step: int
    committed_age_s: float | None
    checkpoint_step: int
    survivable_losses: int
    ranks: dict[int, int]
    step: int = 0
    world: int = 0
    captured: int = 0
    skipped: int = 0
    dropped: int = 0
    failed: int = 0
    refused: int = 0
    stall_s: float = 0.0
    damaged: int = 0
    parity: int = 0
    group: tuple[int, ...] = ()
    last_scrub: dict[str, Any] | None = None
    last_drill: dict[str, Any] | None = None
    intervals: dict[str, Any] | None = None
    verdicts: tuple[dict[str, Any], ...] = ()
    bereft: dict[str, Any] | None = None
    """Where the node's trainers have come to this keeper because all that the last one held was gone: when (`time_s`), and the
    `step` that it had committed."""


@dataclass(frozen=True, slots=True)
class JobStatus:
    """One run as its keepers on this host see it. `committed_step` is the newest that all of them have committed.

    `survivable_losses` counts what is there now: a keeper that does not answer or has damaged memory protects nobody.
    """

    name: str
    epoch: int
    world: int
    step: int
    committed_step: int
    checkpoint_step: int
    survivable_losses: int
    nodes: list[NodeStatus]
    intervals: Intervals | None = None
    """How often the run saves and why, where the keeper that decides it is on this host and has seen enough."""
    verdicts: tuple[dict[str, Any], ...] = ()
    """Who was found to hold the run up since it last started, with `time_s` and the evidence; oldest first."""


def status(name: str | None = None, *, memory: Path | None = None) -> list[JobStatus]:
    """Every run with keepers on this host, or the one called `name`."""
    base = home(memory or Environment.read().memory)
    jobs = sorted(path for path in base.iterdir() if path.is_dir()) if base.is_dir() else []
    return [_job_status(path) for path in jobs if name is None or path.name == name]


def _job_status(place: Path) -> JobStatus:
    nodes = [_node_status(path) for path in sorted(place.glob("node-*"), key=lambda path: int(path.name.removeprefix("node-")))]
    alive = [node for node in nodes if node.alive]
    return JobStatus(
        name=place.name,
        epoch=max((node.epoch for node in alive), default=0),
        world=max((node.world for node in alive), default=0),
        step=max((node.step for node in alive), default=0),
        committed_step=min((node.committed_step for node in alive), default=0),
        checkpoint_step=max((node.checkpoint_step for node in alive), default=0),
        survivable_losses=min((_losses_left(node, nodes) for node in alive), default=0),
        nodes=nodes,
        intervals=next((Intervals(**node.intervals) for node in alive if node.intervals), None),
        verdicts=max((node.verdicts for node in alive), key=len, default=()),
    )


def _losses_left(node: NodeStatus, here: list[NodeStatus]) -> int:
    """What the keeper says, or less where a member of its group is dead that it has not missed yet."""
    dead = sum(not other.alive for other in here if other.node in node.group)
    return min(node.survivable_losses, max(0, node.parity - dead))


def _node_status(place: Path) -> NodeStatus:
    node = int(place.name.removeprefix("node-"))
    try:
        found = ask_once(place, "status", timeout_s=ANSWER_S)
    except HoldfastError:
        return NodeStatus(node, 0, False, str(place), _size(place), 0, 0, None, 0, 0, {})
    return NodeStatus(
        node=node,
        pid=found["pid"],
        alive=True,
        memory=str(place),
        nbytes=found["nbytes"],
        epoch=found["epoch"],
        committed_step=found["committed_step"],
        committed_age_s=found["committed_age_s"],
        checkpoint_step=found["checkpoint_step"],
        survivable_losses=found["survivable_losses"],
        ranks={int(rank): pid for rank, pid in found["ranks"].items()},
        step=max((counts["completed"] for counts in found["counts"].values()), default=0),
        world=found["world"],
        stall_s=sum(counts["stall_us"] for counts in found["counts"].values()) / 1e6,
        refused=found["refused"],
        damaged=found["damaged"],
        parity=found["parity"],
        group=tuple(found["group"]),
        last_scrub=found["last_scrub"],
        last_drill=found["last_drill"],
        intervals=found["intervals"],
        verdicts=tuple(found["verdicts"]),
        bereft=found["bereft"],
        **{
            word: sum(counts[word] for counts in found["counts"].values())
            for word in ("captured", "skipped", "dropped", "failed")
        },
    )


def has_trainers(job: JobStatus) -> bool:
    """Some rank of the run is alive on this host."""
    return any(not _gone(pid) for node in job.nodes for pid in node.ranks.values())


def _size(place: Path) -> int:
    return sum(path.stat().st_size for path in place.glob("*") if path.is_file())


def up() -> LocalRay:
    """Start the local Ray, or find the one that runs."""
    with _host_lock():
        return local_ray() or _start_ray()


@dataclass(frozen=True, slots=True)
class Cleared:
    """What `down` ended and removed."""

    keepers: int
    ray: bool
    nbytes: int


def down(*, memory: Path | None = None, ray_address: str | None = None) -> Cleared:
    """End every keeper of this user on this host and the local Ray, and remove their memory and files.

    Snapshots in memory are gone afterwards; checkpoints are not touched.
    """
    with _host_lock():
        memory = memory or Environment.read().memory
        base = home(memory)
        nbytes = sum(_size(place) for place in base.glob("*/node-*"))
        nodes = [node for job in status(memory=memory) for node in job.nodes if node.alive]
        for page in base.glob("*/node-*/control-*"):
            _say_gone(page)
        ray = local_ray()
        for address in filter(None, [ray.address if ray else None, ray_address]):
            _in_helper("kill", json.dumps({"address": address}))
        for node in nodes:
            _shut_down(Path(node.memory))
        for node in nodes:
            _end(node.pid)
        if ray is not None:
            _end_session(ray.pid)
        shutil.rmtree(base, ignore_errors=True)
    shutil.rmtree(runtime_dir(), ignore_errors=True)
    return Cleared(len(nodes), ray is not None, nbytes)


def _say_gone(path: Path) -> None:
    """Trainers that live on do not have this keeper started again."""
    with suppress(OSError):
        page = ControlPage(path)
        page["gone"] = 1
        page.close()


def _shut_down(place: Path) -> None:
    """Ask a keeper to end and give its memory back; a signal alone would have it save its snapshots first."""
    with suppress(HoldfastError):
        ask_once(place, "shutdown", timeout_s=ANSWER_S)


def _end(pid: int) -> None:
    _signal_until_gone(pid, lambda number: os.kill(pid, number))


def _end_session(pid: int) -> None:
    """Ray's head with all its processes: they share the session that was made for them, whatever groups they are in."""
    members = [int(path.name) for path in Path("/proc").glob("[0-9]*") if _session(path) == pid]
    _signal_until_gone(pid, lambda number: os.kill(pid, number))
    for member in members:
        _end(member)


def _session(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rsplit(")", 1)[1].split()[3])
    except (OSError, ValueError, IndexError):
        return -1


def _signal_until_gone(pid: int, send: Any, *, patience_s: float = 10.0) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            send(number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            if _gone(pid):
                return
            time.sleep(0.05)
    raise ClusterError(f"process {pid} cannot be ended")


def _gone(pid: int) -> bool:
    with suppress(OSError):
        os.waitpid(pid, os.WNOHANG)  # ours, where we started it; a zombie would count as alive
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


# -- the helper process ------------------------------------------------------------------------------------------------------


def _helper(verb: str) -> int:
    from holdfast.snapshot import actor

    request = json.loads(sys.stdin.read())
    try:
        if verb == "start":
            nodes = [(int(node), str(memory)) for node, memory in request["nodes"]]
            actor.start_keepers(request["address"], request["job"], nodes, request["bind"])
        else:
            actor.kill_keepers(request["address"])
    except HoldfastError as error:
        print(f"{type(error).__name__}: {error}".replace("\n", " "), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_helper(sys.argv[1]))
