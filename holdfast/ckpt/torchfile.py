"""Files that `torch.load(weights_only=True)` reads, written without ever holding their tensors.

torch writes the skeleton with holes where bytes belong (`skip_data`); a torch file is a zip archive of uncompressed records, so
the standard library says where each hole is, and the bytes are streamed into it.
"""

from __future__ import annotations

import math
import struct
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from holdfast.arrays import Shape
from holdfast.ckpt.cuts import LocalArray
from holdfast.errors import CorruptData

_LOCAL_HEADER = struct.Struct("<26xHH")
"""A zip record's own header: 30 bytes that end with the lengths of its name and of its extra field."""


def write_skeleton(
    path: Path, step: int, locals_: Sequence[LocalArray], global_shapes: Mapping[str, Shape], objects: Mapping[str, str]
) -> dict[str, int]:
    """The file with every tensor's bytes zero; returns where in it each tensor begins."""
    with tempfile.TemporaryFile(dir=path.parent) as sparse:
        sparse.truncate(max((local.nbytes for local in locals_), default=0))
        arrays = {local.name: _tensor(f"/proc/self/fd/{sparse.fileno()}", local) for local in locals_}
        document = {
            "step": step,
            "arrays": arrays,
            "boxes": {local.name: [list(box.offset), list(box.shape)] for local in locals_ if (box := local.box)},
            "parts": {local.name: _parts(local) for local in locals_ if local.box is None and local.parts},
            "global_shapes": {name: list(shape) for name, shape in global_shapes.items()},
            "objects": dict(objects),
        }
        with torch.serialization.skip_data():
            torch.save(document, path)
    holes = _holes(path)
    if len(holes) != len(locals_):
        raise CorruptData(f"{path}: torch {torch.__version__} wrote {len(holes)} records for {len(locals_)} tensors")
    return {local.name: hole for local, hole in zip(locals_, holes, strict=True)}


def _tensor(sparse: str, local: LocalArray) -> torch.Tensor:
    """A tensor of the right shape over a file of holes: it takes no memory, and torch will not read it."""
    dtype = getattr(torch, local.dtype)
    size = math.prod(local.shape)
    flat = torch.from_file(sparse, shared=True, size=size, dtype=dtype) if size else torch.empty(0, dtype=dtype)
    return flat.reshape(local.tensor_shape)


def _parts(local: LocalArray) -> list[Any]:
    """For a tensor made of several boxes: where each comes from and where it went."""
    return [[part.array, list(part.box.offset), list(part.box.shape), list(part.at)] for part in local.parts]


def _holes(path: Path) -> list[int]:
    """Where the records data/0, data/1, … begin, which torch numbers in the order of the tensors."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        records = {}
        for info in archive.infolist():
            number = info.filename.rpartition("/data/")[2]
            if number.isdigit() and info.compress_type == zipfile.ZIP_STORED:
                file.seek(info.header_offset)
                name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
                records[int(number)] = info.header_offset + _LOCAL_HEADER.size + name + extra
    return [records[number] for number in sorted(records)]
