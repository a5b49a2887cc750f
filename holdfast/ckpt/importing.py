"""Other people's checkpoints as universal ones: safetensors, torch files and torch.distributed.checkpoint directories.

Streaming, so that memory does not grow with the model, and without executing anything: safetensors is plain data, torch files are
loaded with `weights_only`, and DCP's `.metadata` goes through an unpickler that knows the few classes it needs.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.arrays import ITEMSIZE, ArraySpec, Box, Fragment, FragmentTable, split_rows
from holdfast.ckpt.durable import disk_errors
from holdfast.ckpt.plan import plan_write
from holdfast.ckpt.reader import Progress
from holdfast.ckpt.safetensors import StoredTensor, read_header
from holdfast.ckpt.storage import Place, is_remote
from holdfast.ckpt.strips import flat_offset
from holdfast.ckpt.write import begin, commit, write_fragments
from holdfast.errors import ConfigError, CorruptData, MissingData, NotACheckpoint, UnsupportedFormat
from holdfast.objects import encode_object

PIECE_NBYTES = 64 << 20
"""What is held of a source at a time, per writing thread."""

KINDS = ("safetensors", "torch", "dcp")


@dataclass(frozen=True)
class SourceArray:
    """An array that can be had in pieces: `boxes` it is stored in, and the bytes of a run of rows of one of them."""

    spec: ArraySpec
    boxes: tuple[Box, ...]
    read: Callable[[Box], memoryview]


@dataclass(frozen=True)
class Source:
    """A foreign checkpoint, opened."""

    kind: str
    arrays: Mapping[str, SourceArray]
    objects: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(array.spec.nbytes for array in self.arrays.values())


def open_source(path: str | Path, kind: str | None = None) -> Source:
    """The foreign checkpoint at `path`, its kind recognized by what is there. Raises NotACheckpoint when it is none of ours."""
    path = Path(path)
    if not path.exists():
        raise NotACheckpoint(f"{path}: no such file or directory")
    kind = kind or _recognize(path)
    openers = {"safetensors": _open_safetensors, "torch": _open_torch, "dcp": _open_dcp}
    if kind not in openers:
        raise ConfigError(f"{kind!r} is not one of {', '.join(KINDS)}")
    with disk_errors("reading", path):
        return openers[kind](path)


def _recognize(path: Path) -> str:
    if path.suffix == ".safetensors" or (path.is_dir() and any(path.glob("*.safetensors"))):
        return "safetensors"
    if path.is_dir() and (path / ".metadata").exists():
        return "dcp"
    if path.is_file() and path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        return "torch"
    raise NotACheckpoint(f"{path}: neither safetensors, nor a torch file, nor a torch.distributed.checkpoint directory")


def import_checkpoint(
    source: Source,
    root: str | Path,
    *,
    step: int = 0,
    group: str = "model",
    threads: int = 2,
    progress: Progress | None = None,
) -> Place:
    """The source as a committed step of the run at `root`. Names without a group are put under `group`."""
    named = {_grouped(name, group): array for name, array in source.arrays.items()}
    rows, arrays = [], {}
    for name, array in named.items():
        for box in array.boxes:
            for piece in split_rows(box, ITEMSIZE[array.spec.dtype], PIECE_NBYTES):
                nbytes = piece.size * ITEMSIZE[array.spec.dtype]
                rows.append(Fragment(name, array.spec.dtype, array.spec.shape, piece.offset, piece.shape, 0, 0, nbytes))
        arrays[name] = array
    layout = {"world": 1, "imported_from": source.kind}
    plan = plan_write(FragmentTable.from_rows(rows), step=step, layout=layout, whole_files=is_remote(root))
    directory = begin(root, plan, f"import-{os.getpid()}-{os.urandom(4).hex()}")
    write_fragments(directory, plan, 0, rows, lambda row: arrays[row.array].read(row.box), threads=threads, progress=progress)
    objects = {name: encode_object(value, name) for name, value in source.objects.items()}
    return commit(root, directory, plan, nodes=[0], objects={0: objects})


def _grouped(name: str, group: str) -> str:
    return name if "/" in name or not group else f"{group}/{name}"


# -- safetensors -------------------------------------------------------------------------------------------------------


def _open_safetensors(path: Path) -> Source:
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    arrays: dict[str, SourceArray] = {}
    for file in files:
        tensors, _ = read_header(file)
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


# -- torch files -------------------------------------------------------------------------------------------------------


def _open_torch(path: Path) -> Source:
    import torch

    try:
        document = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedFormat(f"{path}: cannot be loaded without executing code that it brings along ({reason})") from error
    arrays: dict[str, SourceArray] = {}
    objects: dict[str, Any] = {}
    for path_to, value in _leaves(document, ()):
        name = _dcp_name(path_to)
        if isinstance(value, torch.Tensor):
            arrays[name] = _tensor_source(name, value)
        else:
            objects[name] = value
    if not arrays:
        raise NotACheckpoint(f"{path}: holds no tensors")
    return Source("torch", arrays, objects)


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Tensors and objects by where they stand; a dictionary without a tensor in it is one object."""
    if isinstance(value, dict) and (not path or _holds_tensor(value)):
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)))
    else:
        yield path or ("value",), value


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_tensor, value.values()))
    return hasattr(value, "untyped_storage")


def _tensor_source(name: str, tensor: Any) -> SourceArray:
    import torch

    spec = ArraySpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    def read(rows: Box) -> memoryview:
        part = tensor[rows.slices(Box.whole(spec.shape))] if spec.shape else tensor
        flat = part.detach().contiguous().reshape(-1)
        return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")

    return SourceArray(spec, (Box.whole(spec.shape),), read)


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
            name = _dcp_name(paths.get(key, (key,)))
            if hasattr(entry, "chunks"):
                arrays[name] = _dcp_array(path, name, key, entry, places)
            else:
                objects[name] = _dcp_load(path, places[key, ()])
    except (AttributeError, KeyError, TypeError) as error:
        raise CorruptData(f"{path / '.metadata'}: not DCP's metadata ({error!r})") from error
    return Source("dcp", arrays, objects)


def _dcp_name(path: Iterable[Any]) -> str:
    from holdfast.ckpt.dcp import array_name

    return array_name([str(part).replace("/", ".") for part in path])


def _dcp_array(path: Path, name: str, key: str, entry: Any, places: Mapping[tuple[str, tuple[int, ...]], Any]) -> SourceArray:
    spec = ArraySpec(name, str(entry.properties.dtype).removeprefix("torch."), tuple(entry.size))
    chunks = {Box(tuple(chunk.offsets), tuple(chunk.sizes)): places[key, tuple(chunk.offsets)] for chunk in entry.chunks}
    held: dict[Box, Any] = {}

    def read(rows: Box) -> memoryview:
        box = next(box for box in chunks if box.contains(rows))
        if box not in held:  # one chunk at a time: DCP stores it as a torch file that is read whole
            held.clear()
            held[box] = _tensor_source(name, _dcp_load(path, chunks[box]))
        moved = Box(tuple(low - base for low, base in zip(rows.offset, box.offset, strict=True)), rows.shape)
        return held[box].read(moved)  # type: ignore[no-any-return]

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
