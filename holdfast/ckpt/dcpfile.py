"""A universal checkpoint as a torch.distributed.checkpoint directory, written by torch's own writer through its public interface.

torch asks a planner for one item after the other; ours reads it from the checkpoint at that moment, checked, and takes its memory
back when the next one is asked for. So memory is bounded by one item, however large the checkpoint.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

from holdfast.arrays import ITEMSIZE, ArraySpec, Box, split_rows
from holdfast.ckpt.reader import Checkpoint
from holdfast.ckpt.reading import Progress
from holdfast.ckpt.stream import check_memory
from holdfast.objects import decode_object

Boxes = Mapping[str, Iterable[Box]]


def write_dcp(
    checkpoint: Checkpoint,
    boxes: Boxes,
    out: Path,
    *,
    max_memory_nbytes: int,
    threads: int = 2,
    progress: Progress | None = None,
) -> None:
    """`out` is a DCP checkpoint of the named arrays, cut into `boxes`, and of the lowest rank's objects.

    Keys are those that `get_model_state_dict` and `get_optimizer_state_dict` give: `model.<name>`, `optim.state.<name>.<state>`.
    """
    check_memory(max_memory_nbytes)
    planner = _Planner(checkpoint, boxes, max_memory_nbytes // 4, threads, progress)
    # One file, one thread and nothing copied ahead: each item is written before the next one is asked for.
    writer = FileSystemWriter(out, single_file_per_rank=True, thread_count=1, per_thread_copy_ahead=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        save({}, storage_writer=writer, planner=planner, no_dist=True)


class _Planner(SavePlanner):
    """Plans from the checkpoint's documents, and reads an item when torch is about to write it."""

    def __init__(self, checkpoint: Checkpoint, boxes: Boxes, item_nbytes: int, threads: int, progress: Progress | None) -> None:
        self.checkpoint, self.boxes, self.item_nbytes = checkpoint, boxes, item_nbytes
        self.threads, self.progress = threads, progress
        self.written: torch.Tensor | None = None

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        paths = {name: path_of(name, _known_keys(self.checkpoint)) for name in self.boxes}
        self.names = {_key(path): name for name, path in paths.items()}
        self.values, self.paths = _objects(self.checkpoint)
        self.paths |= {_key(path): path for path in paths.values()}

    def create_local_plan(self) -> SavePlan:
        items = [item for key, name in self.names.items() for item in self._items(key, name)]
        items += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self.values if key not in self.names]
        return SavePlan(items, planner_data=self.paths)

    def _items(self, key: str, name: str) -> Iterator[WriteItem]:
        spec = self.checkpoint.specs[name]
        for number, box in enumerate(self._pieces(spec, self.boxes[name])):
            chunk = ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape))
            properties = TensorProperties(dtype=getattr(torch, spec.dtype))
            data = TensorWriteData(chunk, properties, torch.Size(spec.shape))
            yield WriteItem(MetadataIndex(key, chunk.offsets, number), WriteItemType.SHARD, tensor_data=data)

    def _pieces(self, spec: ArraySpec, boxes: Iterable[Box]) -> list[Box]:
        itemsize = ITEMSIZE[spec.dtype]
        found = [piece for box in boxes if box.size for piece in split_rows(box, itemsize, self.item_nbytes)]
        return found or [Box.whole(spec.shape)]

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        entries: dict[str, Any] = {}
        for item in all_plans[0].items:
            if item.tensor_data is None:
                entries[item.index.fqn] = BytesStorageMetadata()
            else:
                data = item.tensor_data
                entry = entries.setdefault(item.index.fqn, TensorStorageMetadata(data.properties, data.size, []))
                entry.chunks.append(data.chunk)
        return all_plans, Metadata(entries, planner_data=self.paths)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.tensor_data is None:
            file = io.BytesIO()
            torch.save(self.values[write_item.index.fqn], file)
            file.seek(0)
            return file
        if self.written is not None:
            self.written.untyped_storage().resize_(0)  # torch keeps the tensor until its file is complete; we need the memory
        chunk = write_item.tensor_data.chunk
        name = self.names[write_item.index.fqn]
        tensor = torch.empty(chunk.sizes, dtype=write_item.tensor_data.properties.dtype)
        if tensor.numel():
            # By way of a buffer: a tensor that numpy has seen could not give its memory back.
            buffer = bytearray(tensor.nbytes)
            request = (name, Box(tuple(chunk.offsets), tuple(chunk.sizes)), buffer)
            self.checkpoint.read_boxes([request], threads=self.threads, progress=self.progress)
            tensor.copy_(torch.frombuffer(buffer, dtype=tensor.dtype).reshape(tensor.shape))
        self.written = tensor
        return tensor


# -- keys --------------------------------------------------------------------------------------------------------------


def path_of(name: str, known: Mapping[str, str]) -> tuple[Any, ...]:
    """Where an array or object stood in the state dict that DCP was, or would have been, given."""
    parts = tuple(name.split("/"))
    candidates = [(parts[0], "state", *parts[1:]), parts] if len(parts) > 2 else [parts]
    key = known.get(name)
    if key is None:
        return candidates[0]
    return next((path for path in candidates if _key(path) == key), (key,))


def _key(path: Iterable[Any]) -> str:
    return ".".join(map(str, path))


def _known_keys(checkpoint: Checkpoint) -> dict[str, str]:
    """The keys under which DCP gave us what it gave us."""
    keys = checkpoint.layout.get("dcp", {})
    return {str(name): str(key) for key, name in keys.items()} if isinstance(keys, dict) else {}


def _objects(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
    """The lowest rank's objects as DCP flattens them: values and paths by key."""
    known = _known_keys(checkpoint)
    texts = checkpoint.objects.get(min(checkpoint.objects, default=0), {})
    values: dict[str, Any] = {}
    paths: dict[str, tuple[Any, ...]] = {}
    for name, text in sorted(texts.items()):
        path = (known[name],) if name in known else tuple(name.split("/"))
        flat = DefaultSavePlanner()
        flat.set_up_planner(_nested(path, decode_object(text)), is_coordinator=True)
        values |= flat.state_dict
        paths |= flat.mappings
    return values, paths


def _nested(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    for part in reversed(path):
        value = {part: value}
    return dict(value)
