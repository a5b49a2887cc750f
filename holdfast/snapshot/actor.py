"""The keeper as a Ray actor: detached, named, pinned to its node, started again by Ray when it dies.

Ray is the control plane only: it places the process and restarts it. What the keeper holds lives in /dev/shm, and what it says to
others goes over its own sockets.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from holdfast.environment import watch_every_s
from holdfast.errors import RayUnreachable
from holdfast.snapshot.host import DOMAIN, LOG_FORMAT, arm_faults, on_sigterm
from holdfast.snapshot.keeper import Keeper
from holdfast.snapshot.priority import priority

NAMESPACE = "holdfast"
DOMAIN_LABEL = "holdfast-domain"
"""`ray start --labels holdfast-domain=rack-7` says which nodes fail together."""


def actor_name(job: str, node: int, host: str) -> str:
    """`host` is Ray's id of the machine: where another one takes a node over, its keeper is another actor."""
    return f"{job}/node-{node}@{host}"


class KeeperActor:
    """Hosts one Keeper. Ray builds it again after a crash, and the keeper adopts the slots that it finds."""

    def __init__(self, job: str, node: int, memory: str, bind: str) -> None:
        logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
        priority.lower()
        arm_faults(node)
        self._keeper = Keeper(job, node, Path(memory), bind=bind, domain=_domain(), watch_every_s=watch_every_s())
        on_sigterm(self._keeper.preempt.told_to_end)
        threading.Thread(target=self._leave, args=(actor_name(job, node, _here()),), name="holdfast-leave", daemon=True).start()

    def ready(self) -> int:
        return self._keeper.node

    def _leave(self, name: str) -> None:
        """When the keeper closes, this actor ends for good; an exit alone makes Ray start it again."""
        self._keeper.wait()
        if self._keeper.is_robbed:
            os._exit(1)
        ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)


def _domain() -> str:
    """The failure domain of this node: from the environment, else the label that Ray's node carries."""
    here = _here()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    labels = next((node.get("Labels") or {} for node in nodes if node["NodeID"] == here), {})
    return os.environ.get(DOMAIN) or str(labels.get(DOMAIN_LABEL, ""))


def start_keepers(address: str, job: str, nodes: list[tuple[int, str]], bind: str) -> None:
    """Have a keeper actor for every (node, memory) on this host; waits until each serves. Raises RayUnreachable."""
    connect(address)
    try:
        here = _here()
        _forget_elsewhere(job, [node for node, _ in nodes], here)
        placement = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=False)
        actors = [
            ray.remote(KeeperActor)
            .options(
                name=actor_name(job, node, here),
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                num_cpus=0,
                max_restarts=-1,
                max_task_retries=-1,
                scheduling_strategy=placement,
            )
            .remote(job, node, memory, bind)
            for node, memory in nodes
        ]
        ray.get([actor.ready.remote() for actor in actors], timeout=120)  # type: ignore[attr-defined]
    except (ray.exceptions.RayError, OSError, ValueError) as error:
        raise RayUnreachable(f"Ray at {address} could not start the keepers of {job}: {error}") from error
    finally:
        ray.shutdown()


def _here() -> str:
    return str(ray.get_runtime_context().get_node_id())


def _forget_elsewhere(job: str, nodes: list[int], here: str) -> None:
    """End what Ray remembers of keepers of these nodes on other machines: one that is lost it would try to start there for ever."""
    names = tuple(actor_name(job, node, "") for node in nodes)
    for entry in ray.util.list_named_actors(all_namespaces=True):
        name = entry["name"]
        if entry["namespace"] == NAMESPACE and name.startswith(names) and not name.endswith(f"@{here}"):
            with suppress(ValueError):  # it has ended meanwhile
                ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)


def kill_keepers(address: str) -> None:
    """End every keeper actor of this cluster for good."""
    connect(address)
    try:
        for entry in ray.util.list_named_actors(all_namespaces=True):
            if entry["namespace"] == NAMESPACE:
                ray.kill(ray.get_actor(entry["name"], namespace=NAMESPACE), no_restart=True)
    finally:
        ray.shutdown()


def connect(address: str) -> None:
    _probe(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    try:
        ray.init(address=address, namespace=NAMESPACE, **options)
    except (ConnectionError, OSError, RuntimeError, ValueError, TimeoutError) as error:
        raise _unreachable(address, error) from error


def _probe(address: str) -> None:
    """Knock first: Ray itself would try for minutes at an address where nobody listens."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "://" in address:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: BaseException) -> RayUnreachable:
    return RayUnreachable(
        f"no Ray answers at {address} ({error}); check the address, or unset RAY_ADDRESS so that a local Ray is started"
    )
