"""A communicator that can be replaced beneath living objects: DDP, FSDP2, meshes and variables keep the process group they hold.

`SwapGroup` is a ProcessGroup that passes every collective on to an inner one. When a rank dies, the launcher publishes a new epoch
on the board; a watcher thread then shuts the sockets of the inner groups, which is the only thing that wakes a rank out of a gloo
collective, and `connect` makes new inner groups under the new epoch. Nobody who holds the outer group notices.

A spare builds its model before there is anyone to talk to: until it connects, its groups repeat what its trainer heard
(`transcript`), and answer alone what was too large to be kept, as if every other rank held what it holds. That is for weights,
which the restore overwrites.

All private names of torch.distributed that this package touches are here, tested with torch 2.11 and 2.13.
"""

from __future__ import annotations

import datetime
import logging
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch._C._distributed_c10d import HashStore, ProcessGroup, ProcessGroupGloo, Store

from holdfast.elastic.board import Address, reach
from holdfast.elastic.post import RestartNeeded
from holdfast.elastic.transcript import HEARD, Listening, Repeating, Transcript
from holdfast.errors import HoldfastError, StaleEpoch

logger = logging.getLogger(__name__)

BACKEND = "holdfast"
TIMEOUT = datetime.timedelta(minutes=30)  # gloo's own default
CONNECT_TIMEOUT_S = 120.0
"""How long ranks wait for each other while they connect: a cold replacement imports torch and builds its model in this time."""

_CPU = torch.device("cpu")


class Superseded(RuntimeError):
    """The epoch that was being entered is over: somebody else has died meanwhile."""


class Communicator:
    """This process's groups and the epoch they are connected under."""

    def __init__(self, board: Address, token: str, rank: int, transcript: Transcript, *, alone: bool = False) -> None:
        self.rank, self.alone = rank, alone
        self.epoch = 0
        self._transcript: Transcript | None = transcript
        self._groups: list[SwapGroup] = []
        self._sockets: set[int] = set()
        self._board = reach(board, token)
        self._watcher = reach(board, token)
        self._changed = threading.Condition()
        self._newest, self._reason, self._lost = 0, "", ""
        threading.Thread(target=self._watch, name="holdfast-watch", daemon=True).start()

    # -- what others ask --

    @property
    def is_stale(self) -> bool:
        """A newer epoch has been published than the one the groups are connected under."""
        return self._newest > self.epoch

    @property
    def is_used(self) -> bool:
        """Whether the default process group is one of ours."""
        return bool(dist.is_initialized() and isinstance(dist.distributed_c10d._get_default_group(), SwapGroup))

    @property
    def reason(self) -> str:
        """Why the newest epoch was begun."""
        return self._reason

    def wait_stale(self, timeout_s: float) -> bool:
        """Whether a newer epoch is published within `timeout_s`. Raises RestartNeeded once a launcher is gone: none can be then."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_stale or self._lost, timeout_s)
        if self._lost:
            raise RestartNeeded(self._lost)
        return self.is_stale

    def await_epoch(self, epoch: int) -> None:
        """Return once `epoch` is known here: whoever calls may be ahead of the board's word."""
        with self._changed:
            self._changed.wait_for(lambda: self._newest >= epoch, CONNECT_TIMEOUT_S)

    def connect(self) -> int:
        """Replace the inner groups under the newest epoch; returns it. Blocks until all ranks have come.

        Raises Superseded when yet another epoch begins meanwhile, ClusterError when a rank does not come.
        """
        epoch = self.epoch = self._newest
        before, self._sockets = _open_sockets(), set()
        try:
            for group in self._groups:
                group.connect(self._store(epoch, group))
        except (RuntimeError, HoldfastError) as error:
            if self.wait_stale(0.1) or isinstance(error, StaleEpoch):
                raise Superseded(f"epoch {epoch} is over: {self._reason}") from error
            raise
        self.alone = False
        with self._changed:
            self._sockets = _open_sockets() - before
            if self.is_stale:
                self._abort()
        return epoch

    def adopt(self, group: SwapGroup) -> None:
        """Take a new group in; unless this process is still alone, connect it. All its ranks do the same."""
        self._groups.append(group)
        if not self.alone:
            before = _open_sockets()
            group.connect(self._store(self.epoch, group))
            with self._changed:
                self._sockets |= _open_sockets() - before
        if self._transcript is not None:
            name, inner = group.name_of_group, group.inner
            group.inner = (
                Repeating(name, inner, self._transcript, _done) if self.alone else Listening(name, inner, self._transcript)
            )

    def forget(self, group: SwapGroup) -> None:
        """The script has destroyed this group; later epochs are without it."""
        if group in self._groups:
            self._groups.remove(group)

    def end_prologue(self) -> bytes | None:
        """The script has reached protect(). What this rank heard until then; None where it is known, or was repeated.

        Raises RestartNeeded in a spare whose script did not do what it did in the trainer.
        """
        transcript, self._transcript = self._transcript, None
        if transcript is None:
            return None
        if self.alone:
            transcript.check_through()
            return None
        for group in self._groups:
            group.inner = group.inner.inner
        return transcript.to_bytes()

    def leave(self) -> None:
        """Say that this rank's run has ended well: nobody needs to wait for it in a later epoch."""
        with suppress(HoldfastError):
            self._board.ask("over", reason=f"rank {self.rank} has completed the run")

    # -- inside --

    def _store(self, epoch: int, group: SwapGroup) -> _EpochStore:
        return _EpochStore(self._board, epoch, f"{epoch}/{group.name_of_group}")

    def _watch(self) -> None:
        while True:
            try:
                told = self._watcher.ask("watch", epoch=self._newest)
            except HoldfastError as error:
                told = {"epoch": 0, "over": True, "lost": f"the launcher of rank 0, with the board, is gone ({error})"}
            with self._changed:
                if told["epoch"] > self._newest:
                    self._newest, self._reason = told["epoch"], told["reason"]
                    self._abort()
                if told["lost"]:
                    self._lost = told["lost"]
                    self._abort()
                self._changed.notify_all()
            if told["over"]:
                return

    def _abort(self) -> None:
        """Wake every thread of this process that is inside a collective: shut its sockets.

        Never a listening one: gloo's listener thread would end the process. Those have no peer.
        """
        for fd in self._sockets:
            with suppress(OSError), socket.socket(fileno=os.dup(fd)) as sock:
                sock.getpeername()
                sock.shutdown(socket.SHUT_RDWR)


def _open_sockets() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                found.add(int(name))
    return found


class _EpochStore(Store):
    """Where gloo's ranks find each other: notes on the board, given up as soon as a newer epoch is published."""

    def __init__(self, board: Any, epoch: int, prefix: str) -> None:
        super().__init__()
        self._board, self._epoch, self._prefix = board, epoch, prefix

    def set(self, key: str, value: Any) -> None:
        self._board.ask("set", bytes(value), key=f"{self._prefix}/{key}")

    def get(self, key: str) -> bytes:
        fields = {"key": f"{self._prefix}/{key}", "epoch": self._epoch, "timeout_s": CONNECT_TIMEOUT_S}
        answer = self._board.ask("get", **fields)
        return bytes(answer[1]) if isinstance(answer, tuple) else b""

    def wait(self, keys: list[str], timeout: Any = None) -> None:
        for key in keys:
            self.get(key)

    def check(self, keys: list[str]) -> bool:
        return bool(self._board.ask("check", keys=[f"{self._prefix}/{key}" for key in keys])["found"])

    def add(self, key: str, amount: int) -> int:
        return int(self._board.ask("add", key=f"{self._prefix}/{key}", amount=amount)["value"])


# -- the group -------------------------------------------------------------------------------------------------------------

FORWARDED = (
    *HEARD,
    "send",
    "recv",
    "recv_anysource",
    "barrier",
    "_start_coalescing",
    "_end_coalescing",
    "_get_sequence_number_for_group",
)
"""Every collective of a ProcessGroup; a test compares it with what torch has, since 2.13 renamed four of them."""


class SwapGroup(ProcessGroup):
    """A process group whose transport can be replaced. Made by torch for every group of the backend "holdfast"."""

    def __init__(self, rank: int, size: int, name: str, timeout: datetime.timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg] # the stub lacks this form
        self._rank, self._size, self._timeout = rank, size, timeout
        self.at_end: Callable[[SwapGroup], None] = lambda _: None
        """Told when the script has destroyed this group."""
        self.name_of_group = name
        self.inner: Any = _Alone(rank, size)

    def connect(self, store: Store) -> None:
        gloo = ProcessGroupGloo(store, self._rank, self._size, self._timeout)
        gloo._set_sequence_number_for_group()
        inner = ProcessGroup(HashStore(), self._rank, self._size)
        inner._set_default_backend(ProcessGroup.BackendType.GLOO)
        inner._register_backend(_CPU, ProcessGroup.BackendType.GLOO, gloo)
        inner._set_group_name(self.name_of_group)  # type: ignore[arg-type] # a NewType of str
        self.inner = inner

    # What torch asks of a group, under the names that C++ and those that Python look up.

    def getRank(self) -> int:  # noqa: N802 - looked up by the C++ trampoline
        return self._rank

    def getSize(self) -> int:  # noqa: N802
        return self._size

    def getBackendName(self) -> str:  # noqa: N802
        return BACKEND

    def getGroupName(self) -> str:  # noqa: N802
        return self.name_of_group

    rank, size, name = getRank, getSize, getBackendName
    group_name = property(getGroupName)
    group_desc = property(getGroupName)

    @property
    def _device_types(self) -> list[torch.device]:
        return [_CPU]

    def _set_group_name(self, name: str) -> None:
        self.name_of_group = name

    def _get_backend(self, device: torch.device) -> Any:
        return self.inner._get_backend(device)

    def shutdown(self) -> None:
        """By `destroy_process_group`. The transport's threads end with it: one that is busy when Python ends aborts the process."""
        self.inner = _Ended()
        self.at_end(self)

    def _nothing(self, *_: Any, **__: Any) -> None:
        """A transport ends with its epoch, or with the group."""

    _set_group_desc = abort = _nothing


def _forward(name: str) -> Callable[..., Any]:
    def collective(self: SwapGroup, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.inner, name)(*args, **kwargs)

    collective.__name__ = name
    return collective


for _name in FORWARDED:
    if hasattr(ProcessGroup, _name):
        setattr(SwapGroup, _name, _forward(_name))


class _Alone:
    """Answers collectives as if every rank held what this one does. Only for a spare that waits for its call."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def allreduce(self, tensors: Any, *_: Any) -> Any:
        return _done(tensors)

    allreduce_coalesced = broadcast = reduce = allreduce

    def barrier(self, *_: Any, **__: Any) -> Any:
        return _done([])

    def allgather(self, outputs: Any, inputs: Any, *_: Any) -> Any:
        for copies, tensor in zip(outputs, inputs, strict=True):
            for copy in copies:
                copy.copy_(tensor)
        return _done(outputs)

    def all_gather_single(self, output: torch.Tensor, tensor: torch.Tensor, *_: Any) -> Any:
        output.view(self._size, -1).copy_(tensor.reshape(1, -1).expand(self._size, -1))
        return _done([output])

    _allgather_base = all_gather_single

    def reduce_scatter_single(self, output: torch.Tensor, tensor: torch.Tensor, *_: Any) -> Any:
        output.view(-1).copy_(tensor.reshape(self._size, -1)[self._rank])
        return _done([output])

    _reduce_scatter_base = reduce_scatter_single

    def _get_sequence_number_for_group(self) -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        raise RestartNeeded(
            f"before protect() the script asks to {name} with other ranks, which cannot be repeated for a spare"
        )


class _Ended:
    """In the place of a transport whose group was destroyed."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"{name} is asked of a process group that was destroyed")


def _done(result: Any) -> Any:
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(result)
    return c10d._create_work_from_future(future)  # type: ignore[attr-defined] # missing in torch's stubs


# -- making it the one that scripts get -----------------------------------------------------------------------------------


def install(communicator: Communicator) -> None:
    """From here on, gloo groups of this process are made by us: `init_process_group("gloo")` and `new_group` need no change."""

    def create(options: Any, _: Any) -> SwapGroup:
        group = SwapGroup(options.group_rank, options.group_size, options.group_id, options.timeout or TIMEOUT)
        communicator.adopt(group)
        group.at_end = communicator.forget
        return group

    dist.Backend.register_backend(BACKEND, create, extended_api=True, devices=["cpu"])
    initialise, new_group, broadcast_objects = dist.init_process_group, dist.new_group, dist.broadcast_object_list

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        if args or not _is_gloo(backend):
            logger.warning("backend %r is not replaceable: a fault restarts all processes", backend)
            return initialise(backend, *args, **kwargs)
        for name in ("init_method", "store", "rank", "world_size"):
            kwargs.pop(name, None)
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        return initialise(BACKEND, store=HashStore(), rank=rank, world_size=world, **kwargs)

    def new_swap_group(*args: Any, **kwargs: Any) -> Any:
        if dist.get_backend() == BACKEND and _is_gloo(kwargs.get("backend")):
            kwargs["backend"] = BACKEND
        return new_group(*args, **kwargs)

    def broadcast_object_list(
        object_list: list[Any], src: int | None = None, group: Any = None, device: Any = None, group_src: int | None = None
    ) -> None:
        swap = group or dist.group.WORLD
        if communicator.alone and isinstance(swap, SwapGroup) and swap.size() > 1:
            # The source does not read what it has sent. A spare has to, so that it holds what its trainer drew and told the others.
            src, group_src = None, (swap.rank() + 1) % swap.size()
        broadcast_objects(object_list, src, group, device, group_src)

    dist.init_process_group = dist.distributed_c10d.init_process_group = init_process_group
    dist.new_group = dist.distributed_c10d.new_group = new_swap_group
    dist.broadcast_object_list = dist.distributed_c10d.broadcast_object_list = broadcast_object_list
    global active
    active = communicator


def _is_gloo(backend: str | None) -> bool:
    return backend in (None, "gloo", "cpu:gloo", BACKEND) and (backend is not None or not torch.cuda.is_available())


active: Communicator | None = None
"""The communicator of this process, where the launcher has started it."""
