"""The Zarr v3 documents of a checkpoint, so that any Zarr reader opens it without knowing holdfast.

Each array is `sharding_indexed` with little-endian chunks, uncompressed unless zstd was asked for; the index stands at the end of
its file, so data begins at byte 0. An array that fits one chunk is stored as that chunk. Nothing here does I/O.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np

from holdfast.arrays import ITEMSIZE, ArraySpec, Box, Shape
from holdfast.ckpt.strips import ArrayLayout, flat_index
from holdfast.coding import crc32c
from holdfast.errors import StateError, UnsupportedFormat

LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
MISSING_CHUNK = 2**64 - 1


def array_document(layout: ArrayLayout) -> dict[str, Any]:
    """zarr.json of one array."""
    shape = layout.spec.shape
    outer = (layout.shard_rows, *(layout.strip if layout.split else _across(layout))) if shape else ()
    codecs = _chunk_codecs(layout.level) if layout.is_plain else [_sharding(layout)]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": layout.spec.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(outer)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": _fill_value(layout.spec.dtype),
        "codecs": codecs,
        "attributes": {} if layout.is_plain else {"holdfast": _placement(layout)},
    }


def _placement(layout: ArrayLayout) -> dict[str, Any]:
    head = {"head_nbytes": layout.head_nbytes} if layout.head_nbytes else {}
    return {"strip": list(layout.strip), **head}


def layout_of(name: str, document: Any) -> ArrayLayout:
    """The layout that `document` was written for; raises UnsupportedFormat unless writing it again gives the same document."""
    try:
        spec = ArraySpec(name, document["data_type"], tuple(map(_extent, document["shape"])))
        outer = tuple(map(_extent, document["chunk_grid"]["configuration"]["chunk_shape"]))
        codec = document["codecs"][0]
        if codec == LITTLE:
            chunk, level = tuple(max(1, extent) for extent in spec.shape), _level(document["codecs"])
            layout = ArrayLayout(spec, spec.shape[1:], chunk, outer[0] if outer else 1, level=level)
        else:
            strip = tuple(map(_extent, document["attributes"]["holdfast"]["strip"]))
            head = _extent(document["attributes"]["holdfast"].get("head_nbytes", 0))
            chunk, level = tuple(map(_extent, codec["configuration"]["chunk_shape"])), _level(codec["configuration"]["codecs"])
            layout = ArrayLayout(spec, strip, chunk, outer[0], level=level, head_nbytes=head)
        _check_grid(layout)
        if spec.nbytes and spec.shape and outer[1:] != _across(layout):
            layout = replace(layout, split=True)
        sound = document == array_document(layout)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, StateError) as error:
        raise UnsupportedFormat(f"{name}/zarr.json breaks the rules of the format: {error!r}") from error
    if not sound:
        raise UnsupportedFormat(f"{name}/zarr.json describes an array that holdfast does not write (other codecs or chunks)")
    return layout


def _across(layout: ArrayLayout) -> Shape:
    """The trailing extents with the last strip's padding: how wide a file is that holds all strips."""
    return tuple(max(1, count * width) for count, width in zip(layout.strip_grid, layout.strip, strict=True))


def _chunk_codecs(level: int | None) -> list[dict[str, Any]]:
    return [LITTLE] if level is None else [LITTLE, {"name": "zstd", "configuration": {"level": level, "checksum": False}}]


def _level(codecs: Any) -> int | None:
    """zstd's level where the chunks are compressed."""
    return _extent(codecs[1]["configuration"]["level"]) if len(codecs) > 1 else None


def _extent(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError(f"{value!r} is not an extent")
    return value


def _check_grid(layout: ArrayLayout) -> None:
    shape, strip, chunk = layout.spec.shape, layout.strip, layout.chunk
    if layout.spec.nbytes == 0 or not shape:
        return
    fits = len(strip) == len(shape) - 1 and len(chunk) == len(shape) and min(*strip, *chunk, layout.shard_rows) > 0
    if not (
        fits
        and all(width <= extent for extent, width in zip(shape[1:], strip, strict=True))
        and all(width % part == 0 for width, part in zip(strip, chunk[1:], strict=True))
        and layout.shard_rows % chunk[0] == 0
    ):
        raise ValueError(f"shape {shape}, strip {strip}, chunk {chunk} and {layout.shard_rows} rows a file do not fit together")


def _sharding(layout: ArrayLayout) -> dict[str, Any]:
    return {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": list(layout.chunk),
            "codecs": _chunk_codecs(layout.level),
            "index_codecs": [LITTLE, {"name": "crc32c"}],
            "index_location": "end",
        },
    }


def _fill_value(dtype: str) -> Any:
    if dtype == "bool":
        return False
    if dtype.startswith("complex"):
        return [0.0, 0.0]
    return 0.0 if "float" in dtype else 0


def group_document(attributes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes or {})}


def root_document(layouts: Iterable[ArrayLayout], attributes: Mapping[str, Any]) -> dict[str, Any]:
    """zarr.json of the whole checkpoint, with every array's document inside, so that opening it is one read."""
    layouts = list(layouts)
    nodes = {name: group_document() for name in groups(layout.spec.name for layout in layouts)}
    nodes |= {layout.spec.name: array_document(layout) for layout in layouts}
    consolidated = {"kind": "inline", "must_understand": False, "metadata": dict(sorted(nodes.items()))}
    return {**group_document(attributes), "consolidated_metadata": consolidated}


def groups(names: Iterable[str]) -> list[str]:
    """Every group above the named arrays, without the root."""
    return sorted({group for name in names for group in accumulate(name.split("/")[:-1], lambda a, b: f"{a}/{b}")})


def to_json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=1, allow_nan=False).encode()


def shard_index(layout: ArrayLayout, shard: int) -> bytes:
    """Zarr's index of one shard file: offset and length of every inner chunk, row-major, then the CRC32C of that."""
    box = layout.shard_box(shard)
    tall = layout.chunk[0]
    chunk_nbytes = math.prod(layout.chunk) * ITEMSIZE[layout.spec.dtype]
    strip_nbytes = layout.stored_rows(shard) * layout.row_nbytes
    down = np.arange(layout.shard_rows // tall, dtype=np.uint64)
    across = _chunks_across(layout, strip_nbytes, chunk_nbytes)
    offsets = np.uint64(layout.head_nbytes) + down[:, None] * np.uint64(tall * layout.row_nbytes) + across[None, :]
    index = np.full((*offsets.shape, 2), chunk_nbytes, "<u8")
    index[:, :, 0] = offsets
    index[-(-box.shape[0] // tall) :] = MISSING_CHUNK  # chunks past the array's end
    return _sealed(index)


def packed_index(layout: ArrayLayout, shard: int, chunks: Iterable[tuple[Box, int, int]]) -> bytes:
    """The same index where the chunks are compressed: (box of the chunk, its offset, its length) for each that is stored."""
    outer = (layout.shard_rows, *(layout.strip if layout.split else _across(layout)))
    counts = tuple(extent // part for extent, part in zip(outer, layout.chunk, strict=True))
    index = np.full((*counts, 2), MISSING_CHUNK, "<u8")
    corner = layout.shard_box(shard).offset
    for box, at, nbytes in chunks:
        where = tuple((a - b) // part for a, b, part in zip(box.offset, corner, layout.chunk, strict=True))
        index[where] = (at, nbytes)
    return _sealed(index)


def _sealed(index: np.ndarray[Any, Any]) -> bytes:
    data = index.tobytes()
    return data + crc32c(data).to_bytes(4, "little")


def _chunks_across(layout: ArrayLayout, strip_nbytes: int, chunk_nbytes: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Offsets of the chunks of one band of rows, in the order of Zarr's grid over the trailing dimensions."""
    per_strip = tuple(width // part for width, part in zip(layout.strip, layout.chunk[1:], strict=True))
    strips = (1,) * len(layout.strip) if layout.split else layout.strip_grid
    grid = tuple(many * count for many, count in zip(strips, per_strip, strict=True))
    offsets = np.zeros(grid, np.uint64)
    for where in np.ndindex(*grid):
        strip = tuple(index // count for index, count in zip(where, per_strip, strict=True))
        inside = tuple(index % count for index, count in zip(where, per_strip, strict=True))
        at = flat_index(strip, strips) * strip_nbytes + flat_index(inside, per_strip) * chunk_nbytes
        offsets[where] = at
    return offsets.reshape(-1)
