"""Boxes of elements inside buffers of bytes, as numpy views; dtypes matter only by their size."""

from __future__ import annotations

from typing import Any

import numpy as np

from holdfast.arrays import ITEMSIZE, Box
from holdfast.ckpt.strips import Run, flat_offset, is_contiguous

_CARRIERS: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("u2"),
    4: np.dtype("u4"),
    8: np.dtype("u8"),
    16: np.dtype("c16"),
}


def box_view(buffer: memoryview, within: Box, part: Box, dtype: str, start_nbytes: int = 0) -> np.ndarray[Any, Any]:
    """The elements of `part` where `buffer` holds bytes of `within` in row-major order, from byte `start_nbytes` of it on.

    The view shares the buffer's memory and is writable when the buffer is. The caller sees to it that all of `part` is there.
    """
    itemsize = ITEMSIZE[dtype]
    strides = [itemsize] * len(within.shape)
    for dim in range(len(strides) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * within.shape[dim + 1]
    at = flat_offset(part, within) * itemsize - start_nbytes
    return np.ndarray(part.shape, _CARRIERS[itemsize], buffer, at, strides)


def copy_box(source: memoryview, source_box: Box, target: memoryview, target_box: Box, part: Box, dtype: str) -> None:
    """Copy the elements of `part` from a buffer that holds `source_box` to one that holds `target_box`."""
    box_view(target, target_box, part, dtype)[...] = box_view(source, source_box, part, dtype)


def run_bytes(view: memoryview, within: Box, run: Run, dtype: str) -> memoryview:
    """What a run stores, from a buffer that holds `within`: a part of it where the bytes are side by side, else a copy."""
    if run.held == run.box and is_contiguous(run.box, within):
        at = flat_offset(run.box, within) * ITEMSIZE[dtype]
        return view[at : at + run.box.size * ITEMSIZE[dtype]]
    if run.held == run.box:
        return contiguous_bytes(view, within, run.box, dtype)
    padded = memoryview(bytearray(run.held.size * ITEMSIZE[dtype]))
    copy_box(view, within, padded, run.held, run.box, dtype)
    return padded


def contiguous_bytes(view: memoryview, within: Box, part: Box, dtype: str) -> memoryview:
    """The bytes of `part` in row-major order: a copy, for parts that are not side by side in `view`."""
    return as_bytes(np.ascontiguousarray(box_view(view, within, part, dtype)))


def as_bytes(buffer: Any) -> memoryview:
    """Any C-contiguous buffer as a flat memoryview of bytes."""
    view = memoryview(buffer)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")
