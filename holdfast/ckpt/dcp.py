"""The universal checkpoint behind torch.distributed.checkpoint: one argument changes, everything else stays.

    dcp.save(state_dict, storage_writer=UniversalWriter("runs/exp1", step=1200))
    dcp.load(state_dict, storage_reader=UniversalReader("runs/exp1"))
    dcp.async_save(state_dict, storage_writer=UniversalWriter("runs/exp1", step=1200))

Public interfaces of torch only (tested with 2.11 and 2.13). Optimizer state is stored under its parameter's name, so what DCP
wrote is read by `holdfast`, and what keepers wrote is read by DCP. Nothing that was stored is ever unpickled.
"""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future as PoolFuture
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from holdfast.arrays import ITEMSIZE, Box, Fragment, FragmentTable, dtype_name
from holdfast.ckpt.catalog import latest, open_checkpoint
from holdfast.ckpt.dual import with_heads, write_heads
from holdfast.ckpt.lazy import LazyCapture, local_of
from holdfast.ckpt.plan import PARENT, WritePlan, plan_write
from holdfast.ckpt.reader import Checkpoint
from holdfast.ckpt.sharing import Shared, Wish, agree, can_share, exchange, share_out
from holdfast.ckpt.steps import step_of
from holdfast.ckpt.storage import Place, is_remote, local, place
from holdfast.ckpt.views import as_bytes
from holdfast.ckpt.write import begin, commit, write_fragments
from holdfast.errors import ConfigError, MissingData, StateError
from holdfast.events import emit
from holdfast.objects import decode_object, encode_object

NAMES = "dcp"
"""Where layout.json keeps which of DCP's flat keys is which array or object."""


# -- names -------------------------------------------------------------------------------------------------------------


def array_name(path: Sequence[Any]) -> str:
    """Where a leaf of a state dict is stored: ("optim", "state", "w", "exp_avg") as `optim/w/exp_avg`."""
    parts = [str(part) for part in path]
    if len(parts) > 3 and parts[1] == "state":
        del parts[1]
    return "/".join(parts)


def _keys_of(name: str) -> list[str]:
    """The flat keys under which DCP may ask for an array that it did not write."""
    parts = name.split("/")
    keys = [".".join(parts)]
    if len(parts) > 2:
        keys.append(".".join([parts[0], "state", *parts[1:]]))
    return keys


# -- writing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """What the coordinator tells a rank: where to write, the layouts of its own arrays, and the names of its items."""

    directory: str
    plan: WritePlan
    rank: int
    names: dict[str, str]
    parent: int | None


class UniversalWriter(StorageWriter):
    """Writes a state dict as a universal checkpoint, committed when `dcp.save` returns.

    `path` is the run's directory or the URI of a prefix in an object store, or a step directory in it. Without `step` the number
    after the newest one is taken. With `dcp.async_save` the writer is its own stager: the call returns at once, tensors are copied
    behind the forward pass, and the next optimizer step waits for what is not copied yet.

    direct: write past the page cache (O_DIRECT), where the filesystem lets it.
    compress: zstd levels by shell pattern over stored names, such as {"optim/*": 3}; off by default.
    incremental: what the newest sound step has already becomes a hard link to it (directories only).
    dual: large arrays are safetensors files at the same time, and are exported without a copy (directories only).
    """

    _synchronize_after_execute = False  # torch takes an object without this name for no stager at all

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        step: int | None = None,
        threads: int = 2,
        direct: bool = False,
        compress: Mapping[str, int] | None = None,
        incremental: bool = False,
        dual: bool = False,
    ) -> None:
        super().__init__()
        self.threads, self.direct, self.compress, self.incremental = threads, direct, compress, incremental
        self.dual = dual
        self._step = step
        self._capture: LazyCapture | None = None
        self.background: Any = None
        self.set_path(path)

    def set_step(self, step: int | None) -> None:
        """The step of the next save; None: the one after the newest."""
        self._step = self.step = step

    def set_path(self, path: str | os.PathLike[str]) -> None:
        where = place(path)
        named = step_of(where)
        self.root, self.step = (where, self._step) if named is None else (where.parent, named)
        if named is not None and self._step not in (None, named):
            raise ConfigError(f"{where} is the directory of step {named}, but step={self._step} was given")
        if self.incremental and is_remote(where):
            raise ConfigError(f"{where}: object stores have no links; incremental saves need a directory")
        if self.dual and (self.incremental or is_remote(where)):
            raise ConfigError(f"{where}: dual=True works in directories, and not with incremental=True")

    # -- the interface of DCP --

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self.set_path(checkpoint_id)
        self.checkpoint: Place | None = None
        self._task: _Task | None = None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # torch looks for this very name
        if kwargs.get("use_collectives", True) is False:
            raise ConfigError(
                "a universal checkpoint is one checkpoint of all ranks; it cannot be written with use_collectives=False"
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator: one plan for all ranks, and the directory."""
        names = {key: array_name(path) for plan in plans for key, path in (plan.planner_data or {}).items()}
        rows = [_fragment(item, names, rank) for rank, plan in enumerate(plans) for item in plan.items if item.tensor_data]
        keys = {item.index.fqn: names.get(item.index.fqn, item.index.fqn) for plan in plans for item in plan.items}
        newest = self._newest_step()
        step = self.step if self.step is not None else 0 if newest is None else newest + 1
        parent = newest if self.incremental else None
        layout = {"world": len(plans), NAMES: keys, **({PARENT: parent} if parent is not None else {})}
        table, remote = FragmentTable.from_rows(rows), is_remote(self.root)
        write = plan_write(table, step=step, layout=layout, whole_files=remote, compress=self.compress)
        write = with_heads(write) if self.dual else write
        directory = begin(self.root, write, f"dcp-{os.getpid()}-{os.urandom(4).hex()}")
        if self.dual:
            write_heads(local(directory, "dual"), write)
        self._task = _Task(str(directory), write, 0, keys, parent)
        return [replace(plan, storage_data=_task_for(plan, self._task, rank)) for rank, plan in enumerate(plans)]

    def _newest_step(self) -> int | None:
        if self.step is not None and not self.incremental:
            return None
        newest = latest(self.root) if self.root.is_dir() else None
        return None if newest is None else newest.step

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        task: _Task = plan.storage_data
        rows = [_fragment(item, task.names, task.rank) for item in _tensor_items(plan)]
        resolved = (self._captured(planner.resolve_data(item)) for item in _tensor_items(plan))
        sources = {(row.array, row.box): tensor for row, tensor in zip(rows, resolved, strict=True)}

        def read(row: Fragment) -> memoryview:
            return _bytes_of(sources[row.array, row.box])

        write_fragments(
            task.directory,
            task.plan,
            task.rank,
            rows,
            read,
            threads=self.threads,
            direct=self.direct,
            parent=self._parent(task),
        )
        results = [self._result(item, task, planner) for item in plan.items]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _result(self, item: WriteItem, task: _Task, planner: SavePlanner) -> WriteResult:
        """Objects travel with the results, as typed text; they are small."""
        if item.type != WriteItemType.BYTE_IO:
            return WriteResult(item.index, item.tensor_storage_size() or 0, None)
        text = encode_object(_object_of(planner, item), item.index.fqn)
        return WriteResult(item.index, len(text), (task.names.get(item.index.fqn, item.index.fqn), text))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        assert self._task is not None
        # DCP takes an object for equal on all ranks and lets any one of them write it.
        texts = dict(result.storage_data for written in results for result in written if result.storage_data is not None)
        objects = {rank: texts if rank == 0 else {} for rank in range(len(results))}
        nodes, parent = range(len(results)), self._parent(self._task)
        self.checkpoint = commit(self.root, self._task.directory, self._task.plan, nodes=nodes, objects=objects, parent=parent)

    def _parent(self, task: _Task) -> Checkpoint | None:
        return None if task.parent is None else open_checkpoint(self.root, task.parent)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return bool(str(checkpoint_id))

    # -- the interface of DCP's stagers --

    @property
    def should_synchronize_after_execute(self) -> bool:
        return False

    def stage(self, state_dict: dict[str, Any]) -> PoolFuture[dict[str, Any]]:
        """Begin to copy the tensors; what is not a tensor is copied before this returns."""
        self._capture = self._capture or LazyCapture()
        tensors: list[tuple[str, torch.Tensor]] = []
        staged = _without_live_values(state_dict, "", tensors)
        captured = self._capture.start(tensors)
        result: PoolFuture[dict[str, Any]] = PoolFuture()

        def hand_over(done: PoolFuture[None]) -> None:
            error = done.exception()
            if error is None:
                result.set_result(staged)
            else:
                result.set_exception(error)

        captured.add_done_callback(hand_over)
        return result

    def synchronize_staging(self) -> None:
        if self._capture is not None:
            self._capture.fence()

    def close(self) -> None:
        """Let threads and buffers go, after the saves that were begun have ended."""
        if self.background is not None:
            self.background.close()
            self.background = None
        if self._capture is not None:
            self._capture.close()
            self._capture = None

    def _captured(self, value: Any) -> torch.Tensor:
        tensor: torch.Tensor = value.detach()
        return tensor if self._capture is None else self._capture.copy_of(tensor)


def save_state_dict(state_dict: dict[str, Any], writer: UniversalWriter, group: Any, *, alone: bool) -> None:
    """`dcp.save`, raising what went wrong itself; torch wraps it in an exception that `except Exception` does not catch."""
    try:
        save(state_dict, storage_writer=writer, process_group=group, no_dist=alone)
    except CheckpointException as error:
        first = next(iter(error.failures.values()), None)
        raise (error if first is None else first[0]) from error


def _tensor_items(plan: SavePlan) -> list[WriteItem]:
    return [item for item in plan.items if item.tensor_data]


def _task_for(plan: SavePlan, task: _Task, rank: int) -> _Task:
    own = {item.index.fqn: task.names[item.index.fqn] for item in plan.items}
    arrays = {own[item.index.fqn] for item in _tensor_items(plan)}
    return replace(task, plan=task.plan.part(arrays), rank=rank, names=own)


def _fragment(item: WriteItem, names: Mapping[str, str], rank: int) -> Fragment:
    data = item.tensor_data
    assert data is not None
    dtype = str(data.properties.dtype).removeprefix("torch.")
    nbytes = data.chunk.sizes.numel() * data.properties.dtype.itemsize
    name = names.get(item.index.fqn, item.index.fqn)
    return Fragment(name, dtype, tuple(data.size), tuple(data.chunk.offsets), tuple(data.chunk.sizes), rank, 0, nbytes)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return _view(tensor.detach().contiguous().cpu())


def _view(tensor: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's own bytes."""
    flat = tensor.reshape(-1)
    return as_bytes(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(bytearray())


def _object_of(planner: SavePlanner, item: WriteItem) -> Any:
    look_up: Callable[[MetadataIndex], Any] | None = getattr(planner, "lookup_object", None)
    if look_up is None:
        raise StateError(
            f"{item.index.fqn}: planner {type(planner).__name__} gives objects only as pickles; use DefaultSavePlanner"
        )
    return look_up(item.index)


def _without_live_values(value: Any, path: str, tensors: list[tuple[str, torch.Tensor]]) -> Any:
    """The same nest of containers: tensors are noted and stay, everything else is copied."""
    if isinstance(value, torch.Tensor):
        tensors.append((path, local_of(value)))
        return value
    if isinstance(value, Mapping):
        return {key: _without_live_values(item, f"{path}.{key}".lstrip("."), tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without_live_values(item, f"{path}.{place}", tensors) for place, item in enumerate(value))
    return copy.deepcopy(value)


# -- reading -----------------------------------------------------------------------------------------------------------


class UniversalReader(StorageReader):
    """Reads a universal checkpoint into whatever the state dict holds: any mesh, any placement, each byte checked.

    `path` is a run's directory, a step directory, or `RUN@STEP`; it may have been written by keepers, by `UniversalWriter` or by
    `holdfast convert`. Where a process group carries CPU tensors (gloo), bytes that several ranks want are read by one of them
    and sent to the others; give `process_group` if `dcp.load` is given one.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        step: int | None = None,
        threads: int = 2,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.path, self.step, self.threads, self.group = str(path), step, threads, process_group
        self.read_nbytes = 0
        self._opened: Checkpoint | None = None

    @property
    def checkpoint(self) -> Checkpoint:
        if self._opened is None:
            self._opened = open_checkpoint(self.path, self.step)
        return self._opened

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self.path = str(checkpoint_id)
        self._opened = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Every array as one chunk, so that planning costs the same however many ranks saved."""
        entries: dict[str, Any] = {}
        for key, name in self._arrays().items():
            spec = self.checkpoint.specs[name]
            size = torch.Size(spec.shape)
            whole = ChunkStorageMetadata(offsets=torch.Size([0] * len(spec.shape)), sizes=size)
            properties = TensorProperties(dtype=getattr(torch, spec.dtype))
            entries[key] = TensorStorageMetadata(properties=properties, size=size, chunks=[whole])
        objects = {key: BytesStorageMetadata() for key in self._objects()}
        return Metadata(state_dict_metadata={**objects, **entries})  # a part of an object never hides an array

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """On the coordinator: who reads what several ranks want. The ranks follow what their plans say."""
        if not can_share(self.group) or len(plans) != dist.get_world_size(self.group):
            return plans
        arrays = self._arrays()
        shared = share_out([[self._wish(item, arrays) for item in _tensor_reads(plan)] for plan in plans])
        return [replace(plan, storage_data=[one for one in shared if rank in one.ranks]) for rank, plan in enumerate(plans)]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        arrays, objects = self._arrays(), self._objects()
        landings: dict[Wish, list[_Landing]] = {}
        failure: Exception | None = None
        shared: list[Shared] = plan.storage_data or []
        try:
            for item in plan.items:
                if item.type == LoadItemType.BYTE_IO:
                    planner.load_bytes(item, _as_torch_file(objects[item.storage_index.fqn]()))
            for item in _tensor_reads(plan):
                wish = self._wish(item, arrays)
                landings.setdefault(wish, []).append(_Landing.of(item, planner, self.checkpoint.specs[wish.array].dtype))
            self._read(landings, shared)
        except Exception as error:
            failure = error
        if plan.storage_data is not None:
            self._share(landings, shared, failure)
        if failure is not None:
            raise failure
        for held in landings.values():
            for landing in held:
                landing.settle(planner, held[0])
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, landings: Mapping[Wish, Sequence[_Landing]], shared: Sequence[Shared]) -> None:
        """What no other rank wants, and this rank's shares of what others want too."""
        me = dist.get_rank(self.group) if shared else 0
        together = {one.wish: one.shares for one in shared}
        requests = [(wish.array, wish.box, held[0].view) for wish, held in landings.items() if wish not in together]
        requests += [
            (wish.array, share.rows, landings[wish][0].view[share.start : share.stop])
            for wish, shares in together.items()
            for share in shares
            if share.reader == me
        ]
        self.checkpoint.read_boxes(requests, threads=self.threads)
        self.read_nbytes = sum(len(view) for _, _, view in requests)

    def _share(self, landings: Mapping[Wish, Sequence[_Landing]], shared: Sequence[Shared], failure: Exception | None) -> None:
        """Nobody waits for a rank that could not read: all agree first on whether all could."""
        failed = agree(failure is not None, self.group)
        if failed is None:
            received = exchange(shared, lambda wish: landings[wish][0].flat, self.group)
            emit("ckpt.shared", step=self.checkpoint.step, read_nbytes=self.read_nbytes, received_nbytes=received)
        elif failure is None:
            raise MissingData(f"{self.checkpoint.path}: rank {failed} could not read its share; its own error says why")

    def _wish(self, item: ReadItem, arrays: Mapping[str, str]) -> Wish:
        name, box = arrays[item.storage_index.fqn], Box(tuple(item.storage_offsets), tuple(item.lengths))
        return Wish(name, box, box.size * ITEMSIZE[self.checkpoint.specs[name].dtype])

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return bool(str(checkpoint_id))

    def _names(self) -> dict[str, str]:
        names = self.checkpoint.layout.get(NAMES, {})
        return {str(key): str(name) for key, name in names.items()} if isinstance(names, dict) else {}

    def _arrays(self) -> dict[str, str]:
        """Array by flat key: as DCP wrote it, or as DCP would have."""
        known = {key: name for key, name in self._names().items() if name in self.checkpoint.specs}
        others = set(self.checkpoint.specs) - set(known.values())
        found = known | {key: name for name in sorted(others) for key in _keys_of(name)}
        return found | {key: found[of] for key, of in self._tied().items() if of in found and key not in found}

    def _tied(self) -> dict[str, str]:
        """Keys of parameters that are stored under another parameter's name."""
        pairs = self.checkpoint.layout.get("tied", {})
        return {f"model.{name}": f"model.{of}" for name, of in pairs.items()} if isinstance(pairs, dict) else {}

    def _objects(self) -> dict[str, Callable[[], Any]]:
        """How to get the value of every object, by flat key."""
        texts = self.checkpoint.objects.get(min(self.checkpoint.objects, default=0), {})
        known = self._names()
        found: dict[str, Callable[[], Any]] = {
            key: partial(decode_object, texts[name]) for key, name in known.items() if name in texts
        }
        for name, text in texts.items():
            if name not in known.values():
                found = _objects_of_others(name, text) | found
        return found


def _objects_of_others(name: str, text: str) -> dict[str, Callable[[], Any]]:
    """What keepers and importers stored as one object, whole and by its parts: DCP asks for `optim.param_groups.0.lr`."""
    return {key: partial(copy.deepcopy, value) for key, value in _parts_of(name.replace("/", "."), decode_object(text))}


def _parts_of(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    yield key, value
    if isinstance(value, dict | list):
        for inner, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _parts_of(f"{key}.{inner}", item)


@dataclass(frozen=True)
class _Landing:
    """Where one item's bytes go: the tensor itself where it is contiguous, on the CPU and of the stored dtype; else a buffer."""

    item: ReadItem
    target: torch.Tensor
    buffer: torch.Tensor

    @classmethod
    def of(cls, item: ReadItem, planner: LoadPlanner, stored: str) -> _Landing:
        target = planner.resolve_tensor(item).detach()
        direct = target.device.type == "cpu" and target.is_contiguous() and dtype_name(target) == stored
        buffer = target if direct else torch.empty(target.shape, dtype=getattr(torch, stored))
        return cls(item, target, buffer)

    @property
    def view(self) -> memoryview:
        return _view(self.buffer)

    @property
    def flat(self) -> torch.Tensor:
        return self.buffer.reshape(-1).view(torch.uint8)

    def settle(self, planner: LoadPlanner, read: _Landing) -> None:
        """The target holds what was read, into this landing or into another one for the same box."""
        if read.buffer is not self.target:
            self.target.copy_(read.buffer)
        planner.commit_tensor(self.item, self.target)


def _tensor_reads(plan: LoadPlan) -> list[ReadItem]:
    return [item for item in plan.items if item.type != LoadItemType.BYTE_IO]


def _as_torch_file(value: Any) -> io.BytesIO:
    """An object in the form in which DCP's planner takes it. It was decoded from text, so nothing foreign is pickled here."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file
