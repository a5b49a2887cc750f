"""Shards that are two things at once: a Zarr shard and a safetensors file, of the same bytes.

safetensors wants a header in front and every byte after it to belong to a tensor; Zarr finds chunks wherever its index says, and
the index at the end. So the file begins with a header of whole pages, the array follows as it always lies, and padding and index
are a tensor of their own, `__zarr_index__`. An export can then link to the file instead of copying it.

A shard can be dual when it is the whole array in row-major order: one file, one strip, uncompressed, of a dtype safetensors knows.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import replace
from pathlib import Path

from holdfast.ckpt.plan import WritePlan
from holdfast.ckpt.safetensors import CODES
from holdfast.ckpt.strips import ArrayLayout

INDEX = "__zarr_index__"
PAGE = 4096


def with_heads(plan: WritePlan) -> WritePlan:
    """The same plan with room for a safetensors header in front of every shard that can have one."""
    arrays = {name: _with_head(layout) if can_be_dual(layout) else layout for name, layout in plan.arrays.items()}
    return replace(plan, arrays=arrays)


def can_be_dual(layout: ArrayLayout) -> bool:
    one_file = layout.shards == 1 and not layout.is_plain and not layout.split and layout.level is None
    return one_file and layout.strip == layout.spec.shape[1:] and layout.spec.dtype in CODES


def _with_head(layout: ArrayLayout) -> ArrayLayout:
    return replace(layout, head_nbytes=len(head(replace(layout, head_nbytes=0))))


def head(layout: ArrayLayout) -> bytes:
    """What stands in front of the data: safetensors' length and header, padded with spaces to whole pages."""
    nbytes = layout.spec.nbytes
    rest = layout.data_nbytes(0) - layout.head_nbytes - nbytes + _index_nbytes(layout)
    entries = {
        "__metadata__": {"format": "pt"},
        tensor_name(layout): {
            "dtype": CODES[layout.spec.dtype],
            "shape": list(layout.spec.shape),
            "data_offsets": [0, nbytes],
        },
        INDEX: {"dtype": "U8", "shape": [rest], "data_offsets": [nbytes, nbytes + rest]},
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return struct.pack("<Q", len(text)) + text


def tensor_name(layout: ArrayLayout) -> str:
    """What the array is called in its safetensors file: its name without the group."""
    return layout.spec.name.partition("/")[2] or layout.spec.name


def _index_nbytes(layout: ArrayLayout) -> int:
    chunks = layout.shard_rows // layout.chunk[0]
    for width, part in zip(layout.strip, layout.chunk[1:], strict=True):
        chunks *= width // part
    return 16 * chunks * math.prod(layout.strip_grid) + 4


def write_heads(directory: Path, plan: WritePlan) -> None:
    """The headers stand in their files, before any data is written; they become durable with the data."""
    for layout in plan.arrays.values():
        if layout.head_nbytes:
            fd = os.open(directory / layout.file(0), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.pwrite(fd, head(layout), 0)
            finally:
                os.close(fd)
