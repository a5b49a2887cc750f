"""Other people's checkpoints as universal ones: safetensors, torch files, torch.distributed.checkpoint, DeepSpeed and Megatron.

Streaming, so that memory does not grow with the model, and without executing anything: safetensors is plain data, torch files are
loaded with `weights_only`, and DCP's `.metadata` goes through an unpickler that knows the few classes it needs.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from holdfast.arrays import ITEMSIZE, ArraySpec, Box, Fragment, FragmentTable, split_rows
from holdfast.ckpt.dual import INDEX, with_heads, write_heads
from holdfast.ckpt.durable import disk_errors
from holdfast.ckpt.foreign.deepspeed import find_deepspeed, open_deepspeed
from holdfast.ckpt.foreign.join import Held, join
from holdfast.ckpt.foreign.megatron import find_megatron, open_megatron
from holdfast.ckpt.foreign.source import Source, SourceArray, tensor_source
from holdfast.ckpt.foreign.torchfiles import array_name_of, open_torch
from holdfast.ckpt.plan import plan_write
from holdfast.ckpt.reading import Progress
from holdfast.ckpt.rules import Rules
from holdfast.ckpt.safetensors import StoredTensor, read_header
from holdfast.ckpt.storage import Place, is_remote, local, place
from holdfast.ckpt.strips import flat_offset
from holdfast.ckpt.write import begin, commit, discard, write_fragments
from holdfast.errors import ConfigError, CorruptData, MissingData, NotACheckpoint, UnsupportedFormat
from holdfast.objects import encode_object

PIECE_NBYTES = 64 << 20
"""What is held of a source at a time, per writing thread, unless a caller's memory is smaller."""

KINDS = ("safetensors", "torch", "dcp", "deepspeed", "megatron")


def open_source(
    path: str | Path,
    kind: str | None = None,
    *,
    rules: Rules | None = None,
    inert: Sequence[str] = (),
    group: str = "model",
) -> Source:
    """The foreign checkpoint at `path`, its kind recognized by what is there. Raises NotACheckpoint when it is none of ours.

    `rules` say how a trainer's arrays become those of a checkpoint; names without a group are put under `group`. `inert` names
    classes (or their modules) whose objects in torch files are passed over; nothing of them is executed.
    """
    path = Path(path)
    if not path.exists():
        raise NotACheckpoint(f"{path}: no such file or directory")
    kind = kind or _recognize(path)
    if kind not in KINDS:
        raise ConfigError(f"{kind!r} is not one of {', '.join(KINDS)}")
    with disk_errors("reading", path):
        if kind == "megatron":
            return open_megatron(path, inert, rules, group)
        if kind == "torch":
            return _grouped(open_torch(path, inert), rules, group)
        if kind == "deepspeed":
            return _grouped(open_deepspeed(path, inert), rules, group)
        return _grouped(_open_safetensors(path) if kind == "safetensors" else _open_dcp(path), rules, group)


def _recognize(path: Path) -> str:
    if path.suffix == ".safetensors" or (path.is_dir() and any(path.glob("*.safetensors"))):
        return "safetensors"
    if path.is_dir() and (path / ".metadata").exists():
        return "dcp"
    if find_deepspeed(path) is not None:
        return "deepspeed"
    if find_megatron(path) is not None:
        return "megatron"
    if path.is_file() and path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        return "torch"
    raise NotACheckpoint(
        f"{path}: neither safetensors, nor a torch file, nor a checkpoint of torch.distributed.checkpoint, DeepSpeed or Megatron"
    )


def _grouped(source: Source, rules: Rules | None, group: str) -> Source:
    """The source with its names under a group, and put through the rules as one rank's state."""
    named = {name if "/" in name or not group else f"{group}/{name}": array for name, array in source.arrays.items()}
    arrays = {name: replace(array, spec=replace(array.spec, name=name)) for name, array in named.items()}
    return replace(source, arrays=arrays if rules is None else join([Held(source.kind, arrays)], rules))


def import_checkpoint(
    source: Source,
    root: str | Path,
    *,
    step: int | None = None,
    threads: int = 2,
    max_memory_nbytes: int | None = None,
    dual: bool = False,
    progress: Progress | None = None,
) -> Place:
    """The source as a committed step of the run at `root`: `step`, or the one that the source says it is, or 0.

    With `dual` large arrays are safetensors files at the same time, and can be exported without a copy. After an error nothing of
    it is left behind.
    """
    piece = min(PIECE_NBYTES, max(1 << 20, (max_memory_nbytes or 1 << 40) // (8 * threads)))
    rows = list(_rows(source.arrays, piece))
    number = source.step if step is None else step
    layout = {**source.layout, "world": 1, "imported_from": source.kind}
    plan = plan_write(FragmentTable.from_rows(rows), step=number or 0, layout=layout, whole_files=is_remote(root))
    if dual:
        local(place(root), "a dual import")
        plan = with_heads(plan)
    directory = begin(root, plan, f"import-{os.getpid()}-{os.urandom(4).hex()}")

    def read(row: Fragment) -> memoryview:
        return source.arrays[row.array].read(row.box)

    try:
        with disk_errors("importing to", directory):
            if dual:
                write_heads(local(directory, "a dual import"), plan)
        write_fragments(directory, plan, 0, rows, read, threads=threads, progress=progress)
        objects = {name: encode_object(value, name) for name, value in source.objects.items()}
        return commit(root, directory, plan, nodes=[0], objects={0: objects})
    except BaseException:
        discard(directory)
        raise


def _rows(arrays: Mapping[str, SourceArray], piece_nbytes: int) -> Iterable[Fragment]:
    for name, array in arrays.items():
        spec = array.spec
        for box in array.boxes:
            for part in split_rows(box, ITEMSIZE[spec.dtype], piece_nbytes):
                yield Fragment(name, spec.dtype, spec.shape, part.offset, part.shape, 0, 0, part.size * ITEMSIZE[spec.dtype])


# -- safetensors -------------------------------------------------------------------------------------------------------


def _open_safetensors(path: Path) -> Source:
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    arrays: dict[str, SourceArray] = {}
    for file in files:
        tensors, _ = read_header(file)
        tensors.pop(INDEX, None)  # the Zarr side of a shard that is both
        data = _mapped(file)
        for name, tensor in tensors.items():
            if name in arrays:
                raise UnsupportedFormat(f"{file}: {name} is in another file of {path} too")
            arrays[name] = SourceArray(tensor.spec, (Box.whole(tensor.spec.shape),), _reader(data, tensor))
    if not arrays:
        raise NotACheckpoint(f"{path}: holds no tensors")
    return Source("safetensors", arrays, {})


def _mapped(path: Path) -> memoryview:
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))


def _reader(data: memoryview, tensor: StoredTensor) -> Callable[[Box], memoryview]:
    itemsize, whole = ITEMSIZE[tensor.spec.dtype], Box.whole(tensor.spec.shape)

    def read(rows: Box) -> memoryview:
        start = tensor.offset + flat_offset(rows, whole) * itemsize
        return data[start : start + rows.size * itemsize]

    return read


# -- torch.distributed.checkpoint --------------------------------------------------------------------------------------

_DCP_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict", "defaultdict"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "builtins": {"set", "frozenset", "dict", "list", "tuple"},
}


class _Metadata(pickle.Unpickler):
    """Knows what a `.metadata` file of DCP is made of, and nothing else that could be called."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _DCP_CLASSES.get(module, ()) and not (module == "torch" and name in ITEMSIZE):
            raise UnsupportedFormat(f".metadata asks for {module}.{name}, which no DCP checkpoint needs; it is not unpickled")
        return super().find_class(module, name)


def read_dcp_metadata(path: Path) -> Any:
    """DCP's `.metadata`, without executing anything that the file asks for."""
    try:
        return _Metadata(io.BytesIO((path / ".metadata").read_bytes())).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, IndexError, ValueError, ImportError) as error:
        raise CorruptData(f"{path / '.metadata'}: not DCP's metadata ({error})") from error


def _open_dcp(path: Path) -> Source:
    metadata = read_dcp_metadata(path)
    arrays: dict[str, SourceArray] = {}
    objects: dict[str, Any] = {}
    try:
        places = {(index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}
        paths = metadata.planner_data or {}
        for key, entry in metadata.state_dict_metadata.items():
            name = array_name_of(paths.get(key, (key,)))
            if hasattr(entry, "chunks"):
                arrays[name] = _dcp_array(path, name, key, entry, places)
            else:
                objects[name] = _dcp_load(path, places[key, ()])
    except (AttributeError, KeyError, TypeError) as error:
        raise CorruptData(f"{path / '.metadata'}: not DCP's metadata ({error!r})") from error
    return Source("dcp", arrays, objects)


def _dcp_array(path: Path, name: str, key: str, entry: Any, places: Mapping[tuple[str, tuple[int, ...]], Any]) -> SourceArray:
    spec = ArraySpec(name, str(entry.properties.dtype).removeprefix("torch."), tuple(entry.size))
    chunks = {Box(tuple(chunk.offsets), tuple(chunk.sizes)): places[key, tuple(chunk.offsets)] for chunk in entry.chunks}
    held: dict[Box, SourceArray] = {}

    def read(rows: Box) -> memoryview:
        box = next(box for box in chunks if box.contains(rows))
        if box not in held:  # one chunk at a time: DCP stores it as a torch file that is read whole
            held.clear()
            held[box] = tensor_source(name, _dcp_load(path, chunks[box]))
        moved = Box(tuple(low - base for low, base in zip(rows.offset, box.offset, strict=True)), rows.shape)
        return held[box].read(moved)

    return SourceArray(spec, tuple(box for box in chunks if box.size) or (Box.whole(spec.shape),), read)


def _dcp_load(path: Path, info: Any) -> Any:
    """One stored item: a torch file inside a file, loaded with `weights_only`."""
    import torch

    name = str(info.relative_path)
    if "/" in name or name in ("", ".", ".."):
        raise UnsupportedFormat(f"{path / '.metadata'}: {name!r} is no file of the checkpoint")
    try:
        with open(path / name, "rb") as file:
            file.seek(info.offset)
            data = file.read(info.length)
        if len(data) != info.length:
            raise MissingData(f"{path / name}: ends before byte {info.offset + info.length}; it is truncated")
        return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        raise MissingData(f"{path / name}: is missing") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CorruptData(f"{path / name}+{info.offset}: not a torch file that loads without executing code") from error
