"""One rank of `snapshot.py`: 256 MiB of model and optimizer, saved in turn by holdfast and by the others, in every round.

    RANK=… WORLD_SIZE=… python benchmarks/_snapshot_ranks.py '{"mode": "save", "n": 5, …}'

Each save is timed twice: with nothing to hide it (`fence`: from the call to the moment from which the optimizer may change
what is saved) and with a pause in which the device would compute (`stall`: what the training thread loses all the same). Rank 0
prints one JSON line, the slowest rank's time for every round.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import holdfast

COMPUTE_S = 0.35
PARAMETERS = 16
PATIENCE_S = 120


class Weights(nn.Module):
    """16 matrices; with Adam's two moments 48 arrays."""

    def __init__(self, nbytes: int, rank: int) -> None:
        super().__init__()
        torch.manual_seed(rank)
        rows = nbytes // (3 * PARAMETERS) // 4096
        self.weights = nn.ParameterList(torch.randn(rows, 1024) for _ in range(PARAMETERS))


class System:
    """One way to save. `call` begins, `fence` returns once the state may change, `complete` once it is safe."""

    def call(self) -> None: ...

    def fence(self) -> None: ...

    def complete(self) -> None: ...

    def close(self) -> None: ...


class Rank:
    def __init__(self, options: dict[str, Any]) -> None:
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.options = options
        self.place = Path(options["place"])
        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE_S))
        self.group = dist.new_group()  # DCP's threads use the default one while the benchmark goes on
        self.model = Weights(options["nbytes"], self.rank)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        self.gradients = [torch.randn_like(param) for param in self.model.parameters()]
        self.update()

    def update(self) -> None:
        for param, grad in zip(self.model.parameters(), self.gradients, strict=True):
            param.grad = grad
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> dict[str, torch.Tensor]:
        """This rank's 48 arrays under names of its own: DCP saves what several ranks have under one name only once."""
        found = {}
        for number, param in enumerate(self.model.parameters()):
            found[f"rank{self.rank}.{number}"] = param.detach()
            found |= {f"rank{self.rank}.{number}.{key}": self.optimizer.state[param][key] for key in ("exp_avg", "exp_avg_sq")}
        return found

    @contextmanager
    def protected(self, **settings: Any) -> Iterator[holdfast.elastic.session.Run]:
        redundancy = holdfast.Redundancy(parity=self.options["parity"], nodes_per_host=self.world)
        state = {"model": self.model, "optim": self.optimizer}
        with holdfast.protect(state, redundancy=redundancy, snapshot_every=1, name=self.options["name"], **settings) as run:
            yield run

    def meet(self) -> None:
        dist.barrier(group=self.group)

    def slowest(self, seconds: list[float]) -> list[float]:
        values = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return [float(value) for value in values]


# -- the systems -------------------------------------------------------------------------------------------------------------


class Holdfast(System):
    def __init__(self, rank: Rank, run: Any) -> None:
        self.rank, self.run = rank, run

    def prepare(self) -> None:
        """The keepers have asked for the next step, on every rank."""
        page = self.run._running().link.page
        wait_until(lambda: page.target[0] == self.run.step + 1, "the keepers ask for a step")

    def call(self) -> None:
        self.run.step_done()

    def fence(self) -> None:
        self.rank.optimizer.step()  # without gradients: its hooks, and nothing else

    def complete(self) -> None:
        wait_until(lambda: self.run.committed_step == self.run.step, "the step is committed")


class Memcpy(System):
    def __init__(self, rank: Rank) -> None:
        self.sources = [tensor.numpy() for tensor in rank.tensors().values()]
        self.targets = [np.ones_like(source) for source in self.sources]

    def call(self) -> None:
        for source, target in zip(self.sources, self.targets, strict=True):
            np.copyto(target, source)


class Dcp(System):
    def __init__(self, rank: Rank, kind: str) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        self.state, self.place, self.number = rank.tensors(), rank.place / f"dcp-{kind.replace(' ', '-')}", 0
        self.meet, self.options = rank.meet, dict[str, Any]()
        if kind == "async staging":
            self.options["async_stager"] = DefaultStager(StagingOptions(True, False, True, False))
        elif kind == "process":
            self.options["async_checkpointer_type"] = AsyncCheckpointerType.PROCESS

    def call(self) -> None:
        import torch.distributed.checkpoint as dcp

        self.number += 1
        self.response = dcp.async_save(self.state, checkpoint_id=self.place / str(self.number), **self.options)

    def fence(self) -> None:
        if hasattr(self.response, "staging_completion"):
            self.response.staging_completion.result()

    def complete(self) -> None:
        getattr(self.response, "upload_completion", self.response).result()
        self.meet()
        if dist.get_rank() == 0:
            shutil.rmtree(self.place)


class TorchCheckpointing(System):
    """PyPI's torch-checkpointing, with direct I/O off: with it on, nothing can be written to ext4 (0.1.1)."""

    def __init__(self, rank: Rank) -> None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self.manager = CheckpointManager.Config(storage_config=storage).build()
        self.meet, self.state, self.place, self.number = rank.meet, rank.tensors(), rank.place / "tc", 0
        self.place.mkdir(exist_ok=True)

    def call(self) -> None:
        self.number += 1
        self.future = self.manager.save(str(self.place / str(self.number)), {"state": self.state})

    def fence(self) -> None:
        self.manager._staging_future.result()

    def complete(self) -> None:
        self.future.result()
        self.meet()
        if dist.get_rank() == 0:
            shutil.rmtree(self.place / str(self.number))

    def close(self) -> None:
        self.manager.close()


class Nvrx(System):
    """NVRx local checkpoints with two copies (F=2), moves to and from CUDA replaced by clones so that it runs on a CPU."""

    def __init__(self, rank: Rank) -> None:
        for name in ("synchronize", "set_device"):
            setattr(torch.cuda, name, lambda *_: None)
        torch.cuda.current_device = lambda: "cpu"
        from nvidia_resiliency_ext.checkpointing.async_ckpt.core import AsyncCallsQueue
        from nvidia_resiliency_ext.checkpointing.local.basic_state_dict import BasicTensorAwareStateDict
        from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager import LocalCheckpointManager
        from nvidia_resiliency_ext.checkpointing.local.replication.strategies import CliqueReplicationStrategy

        class OnCpu(BasicTensorAwareStateDict):
            def __init__(self, state: dict[str, Any]) -> None:
                self.state_dict, self._is_hollow = state, False

            def copy_tensors_to_cpu(self, non_blocking: bool = False) -> None:
                self.state_dict = {name: tensor.clone() for name, tensor in self.state_dict.items()}

        globals()["OnCpu"] = OnCpu  # it is pickled by name
        OnCpu.__qualname__ = "OnCpu"
        self.wrap = OnCpu
        strategy = CliqueReplicationStrategy.from_replication_params(replication_jump=1, replication_factor=2)
        self.manager = LocalCheckpointManager(rank.place / "nvrx", repl_strategy=strategy)
        self.queue = AsyncCallsQueue(persistent=False)
        self.source, self.number = rank.tensors(), 0

    def call(self) -> None:
        self.number += 1
        request = self.manager.save(self.wrap(dict(self.source)), self.number, is_async=True)
        self.queue.schedule_async_request(request)

    def complete(self) -> None:
        self.queue.maybe_finalize_async_calls(blocking=True)


class Torchft(System):
    """torchft's HTTP transport: a live replica hands its state to one that has none. No copy is kept anywhere meanwhile."""

    def __init__(self, rank: Rank) -> None:
        from torchft.checkpointing import http_transport

        http_transport.socket.gethostname = lambda: "localhost"
        self.limit = timedelta(seconds=60)
        self.transport = http_transport.HTTPTransport(timeout=self.limit, num_chunks=0)
        self.state, self.number = rank.tensors(), 0
        self.addresses: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(self.addresses, self.transport.metadata())

    def call(self) -> None:
        self.number += 1
        self.transport.send_checkpoint([0], self.number, self.state, self.limit)

    def fence(self) -> None:
        """Its state may not change before the other has it."""
        dist.barrier()
        source = (dist.get_rank() + 1) % dist.get_world_size()
        self.transport.recv_checkpoint(source, self.addresses[source], self.number, self.limit)
        dist.barrier()
        self.transport.disallow_checkpoint()

    def close(self) -> None:
        self.transport.shutdown(wait=False)


PEERS: dict[str, Callable[[Rank], System]] = {
    "dcp thread": lambda rank: Dcp(rank, "thread"),
    "dcp async staging": lambda rank: Dcp(rank, "async staging"),
    "dcp process": lambda rank: Dcp(rank, "process"),
    "torch-checkpointing": TorchCheckpointing,
    "nvrx local, F=2": Nvrx,
    "torchft http": Torchft,
}


def wait_until(claim: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not claim():
        if time.monotonic() > deadline:
            raise TimeoutError(f"in vain: {what}")
        time.sleep(0.001)


# -- saving ------------------------------------------------------------------------------------------------------------------


def save(rank: Rank) -> dict[str, Any]:
    """Every system in every round, forwards and backwards by turns."""
    found: dict[str, dict[str, list[float]]] = {}
    missing: dict[str, str] = {}
    with rank.protected() as run:
        systems: dict[str, System] = {"memcpy": Memcpy(rank), "holdfast": Holdfast(rank, run)}
        for name in rank.options["peers"]:
            try:
                systems[name] = PEERS[name](rank)
            except Exception as error:
                missing[name] = f"{type(error).__name__}: {error}"
        for number in range(rank.options["n"] + 1):
            for name in list(systems) if number % 2 else list(reversed(systems)):
                try:
                    times = one_save(rank, systems[name], hidden=False) | one_save(rank, systems[name], hidden=True)
                except Exception as error:
                    missing[name] = f"{type(error).__name__}: {error}"
                    del systems[name]
                    continue
                slowest = dict(zip(times, rank.slowest(list(times.values())), strict=True))
                for metric, value in slowest.items() if number else ():
                    found.setdefault(name, {}).setdefault(metric, []).append(value)
        overhead = steps(rank, run, systems) if rank.options["steps"] else {}
        for system in systems.values():
            system.close()
        stats = {name: getattr(run.stats, name) for name in ("captured", "skipped", "dropped", "failed")}
    return {"times": found, "missing": missing, "overhead": overhead, "stats": stats}


def one_save(rank: Rank, system: System, *, hidden: bool) -> dict[str, float]:
    rank.update()
    if isinstance(system, Holdfast):
        system.prepare()
    rank.meet()
    started = time.perf_counter()
    system.call()
    called = time.perf_counter()
    if hidden:
        time.sleep(COMPUTE_S)
    fencing = time.perf_counter()
    system.fence()
    fenced = time.perf_counter()
    system.complete()
    safe = time.perf_counter()
    rank.meet()
    if hidden:
        return {"stall": called - started + fenced - fencing}
    return {"call": called - started, "fence": fenced - started, "safe": safe - started}


def steps(rank: Rank, run: Any, systems: dict[str, System]) -> dict[str, list[float]]:
    """Seconds of a step, in blocks: bare, and with a save after every step that finds the last one done."""
    left, right = torch.randn(768, 768), torch.randn(768, 768)
    found: dict[str, list[float]] = {}
    kinds = ["bare", "holdfast", *(name for name in ("dcp async staging", "torch-checkpointing") if name in systems)]

    def block(name: str) -> float:
        system = systems.get(name)
        pending = False
        rank.meet()
        started = time.perf_counter()
        for _ in range(rank.options["steps"]):
            for _ in range(8):
                left @ right
            if pending and system is not None and not isinstance(system, Holdfast):
                system.fence()
            rank.update()
            if isinstance(system, Holdfast):
                system.call()
            elif system is not None and not pending:
                system.call()
                pending = True
            elif system is not None and rank.slowest([float(not is_done(system))])[0] == 0:
                system.complete()
                pending = False
        rank.meet()
        seconds = (time.perf_counter() - started) / rank.options["steps"]
        if isinstance(system, Holdfast):
            run._running().settle()
        elif pending and system is not None:
            system.complete()
        rank.meet()
        return seconds

    for number in range(rank.options["n"] + 1):
        for name in kinds if number % 2 else list(reversed(kinds)):
            value = rank.slowest([block(name)])[0]
            if number:
                found.setdefault(name, []).append(value)
    return found


def is_done(system: Any) -> bool:
    future = system.response.upload_completion if isinstance(system, Dcp) else system.future
    return bool(future.done())


# -- recovering ----------------------------------------------------------------------------------------------------------------


def train(rank: Rank) -> dict[str, Any]:
    """Enter, say what was restored, commit two steps more and die: the next start finds what a crash leaves."""
    with rank.protected(checkpoints=rank.options.get("checkpoints"), checkpoint_every=1) as run:
        recovery = run.recovery
        goal = run.step + 2
        system = Holdfast(rank, run)
        while run.step < goal:
            rank.update()
            system.prepare()
            rank.meet()
            run.step_done()
            system.complete()
            rank.meet()
        if rank.options.get("checkpoints"):
            page = run._running().link.page
            wait_until(lambda: page["checkpoint"] > 0, "a checkpoint is written")
            rank.meet()
        found: dict[str, Any] = {"recovery": None}
        if recovery is not None:
            seconds = rank.slowest([recovery.seconds])[0]
            found["recovery"] = {"rung": recovery.rung, "seconds": seconds, "phases": dict(recovery.phases or {})}
        finish(rank, found)
    raise AssertionError("not reached")


def finish(rank: Rank, found: dict[str, Any]) -> None:
    if rank.rank == 0:
        Path(rank.options["out"]).write_text(json.dumps(found))
    rank.meet()
    os._exit(0)


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rank = Rank(json.loads(sys.argv[1]))
    finish(rank, {"save": save, "train": train}[rank.options["mode"]](rank))


if __name__ == "__main__":
    main()
