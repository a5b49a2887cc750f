"""What every foreign checkpoint is opened as."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from holdfast.arrays import ArraySpec, Box
from holdfast.ckpt.strips import flat_offset


@dataclass(frozen=True)
class SourceArray:
    """An array that can be had in pieces: `boxes` it is stored in, and the bytes of a part of one of them, row-major."""

    spec: ArraySpec
    boxes: tuple[Box, ...]
    read: Callable[[Box], memoryview]


@dataclass(frozen=True)
class Source:
    """A foreign checkpoint, opened. `left_out` says what of it does not come along, in words for a person."""

    kind: str
    arrays: Mapping[str, SourceArray]
    objects: Mapping[str, Any]
    step: int | None = None
    layout: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(array.spec.nbytes for array in self.arrays.values())


def tensor_source(name: str, tensor: Any) -> SourceArray:
    """A tensor, most often one mapped from a file: only what is asked for is touched."""
    spec = ArraySpec(name, dtype_of(tensor), tuple(tensor.shape))

    def read(box: Box) -> memoryview:
        return tensor_bytes(tensor[box.slices(Box.whole(spec.shape))] if spec.shape else tensor)

    return SourceArray(spec, (Box.whole(spec.shape),), read)


def flat_source(spec: ArraySpec, pieces: Mapping[Box, tuple[Any, int]]) -> SourceArray:
    """An array whose boxes are ranges of flat tensors: where the first element of each box is, in which tensor."""

    def read(box: Box) -> memoryview:
        held = next(held for held in pieces if held.contains(box))
        tensor, start = pieces[held]
        start += flat_offset(box, held)
        return tensor_bytes(tensor[start : start + box.size])

    return SourceArray(spec, tuple(pieces) or (Box.whole(spec.shape),), read)


def tensor_bytes(tensor: Any) -> memoryview:
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def dtype_of(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")
