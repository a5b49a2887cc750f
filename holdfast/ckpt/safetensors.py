"""The safetensors format: eight bytes of length, a JSON header, and the tensors' bytes one after the other."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.arrays import ITEMSIZE, ArraySpec
from holdfast.errors import ConfigError, CorruptData, MissingData, StateError, UnsupportedFormat

MAX_HEADER_NBYTES = 100_000_000
"""The format's own limit."""

DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}
CODES = {name: code for code, name in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: its bytes are [offset, offset + nbytes)."""

    spec: ArraySpec
    path: Path
    offset: int


def header(specs: Sequence[ArraySpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the tensors, and where each tensor begins in the file."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    # Widest elements first, as the reference writer does: every tensor is then aligned to its element.
    ordered = sorted(specs, key=lambda spec: (-ITEMSIZE[spec.dtype], spec.name))
    at, begins = 0, {}
    for spec in ordered:
        if spec.dtype not in CODES:
            raise ConfigError(f"{spec.name} is {spec.dtype}, which safetensors cannot hold; export it with another format")
        entries[spec.name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [at, at + spec.nbytes]}
        begins[spec.name] = at
        at += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: base + begin for name, begin in begins.items()}


def write_skeleton(path: Path, specs: Sequence[ArraySpec], metadata: Mapping[str, str]) -> dict[str, int]:
    """A file with its header and room for every tensor; returns where each begins."""
    head, begins = header(specs, metadata)
    with open(path, "xb") as file:
        file.write(head)
        file.truncate(len(head) + sum(spec.nbytes for spec in specs))
    return begins


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Every tensor of a file, and its metadata. Raises a StorageError for a header that breaks the format."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_NBYTES + 1
            if length > min(MAX_HEADER_NBYTES, size - 8):
                raise UnsupportedFormat(f"{path}: not a safetensors file (its header would be {length} bytes of {size})")
            document = json.loads(file.read(length))
    except OSError as error:
        raise MissingData(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UnsupportedFormat(f"{path}: the safetensors header is not JSON ({error})") from error
    base = 8 + length
    try:
        metadata = {str(key): str(value) for key, value in document.pop("__metadata__", {}).items()}
        tensors = {name: _tensor(path, name, entry, base, size) for name, entry in document.items()}
    except (KeyError, TypeError, ValueError, AttributeError, StateError) as error:
        raise UnsupportedFormat(f"{path}: the safetensors header is broken ({error!r})") from error
    _check_no_overlap(path, tensors)
    return tensors, metadata


def _tensor(path: Path, name: str, entry: Mapping[str, Any], base: int, size: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise UnsupportedFormat(f"{path}: {name} has dtype {entry['dtype']!r}, which holdfast does not store")
    shape = tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    if not all(type(value) is int and value >= 0 for value in (*shape, start, stop)):
        raise ValueError(f"{name}: offsets and extents have to be whole numbers")
    spec = ArraySpec(name, DTYPES[entry["dtype"]], shape)
    if stop - start != math.prod(shape) * ITEMSIZE[spec.dtype]:
        raise UnsupportedFormat(f"{path}: {name} has {stop - start} bytes, its shape needs {spec.nbytes}")
    if base + stop > size:
        raise CorruptData(f"{path}: {name} ends at byte {base + stop}, the file at {size}; it is truncated")
    return StoredTensor(spec, path, base + start)


def _check_no_overlap(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    end, last = 0, ""
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.spec.nbytes)):
        if tensor.offset < end and tensor.spec.nbytes:
            raise UnsupportedFormat(f"{path}: {tensor.spec.name} and {last} share bytes; the header is broken")
        end, last = max(end, tensor.offset + tensor.spec.nbytes), tensor.spec.name
