"""Saved tensors as regions of storages.

Autograd saves views. Two operations may save two views of one storage, or one storage twice under different shapes, and a
kernel's backward may depend on the strides it was saved with. So what is packed is a region of a storage, once; what comes back
is a view of a storage rebuilt with the same offsets and strides.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch

from holdfast.kernels._torch_private import StorageWatch, storage_key

Dims = tuple[tuple[int, int], ...]  # (size, stride), largest stride first


def region_of(t: torch.Tensor) -> Dims | None:
    """The memory that `t` covers, apart from its offset: merged dimensions in memory order, or None if elements overlap.

    Views that cover the same memory in another shape or order have equal regions. Expanded dimensions count once.
    """
    dims = sorted(((n, s) for n, s in zip(t.shape, t.stride(), strict=True) if n != 1 and s != 0), key=lambda d: -d[1])
    merged: list[tuple[int, int]] = []
    for size, stride in dims:
        if merged and merged[-1][1] < size * stride:
            return None
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return tuple(merged) or ((1, 1),)


def span(region: Dims) -> int:
    """Elements from the first to the last one covered."""
    return 1 + sum((size - 1) * stride for size, stride in region)


@dataclass(eq=False, slots=True, weakref_slot=True)
class Part:
    """One packed region of an image. `restore` returns its elements, in memory order, as a new 1-D tensor; `module` stored it."""

    image: Image
    offset: int
    region: Dims
    restore: Callable[[], torch.Tensor]
    module: str

    def covers(self, offset: int, region: Dims) -> bool:
        dense = len(self.region) == 1 and self.region[0][1] == 1
        if not dense:
            return (offset, region) == (self.offset, self.region)
        return self.offset <= offset and offset + span(region) <= self.offset + self.region[0][0]


@dataclass(eq=False, slots=True, weakref_slot=True)
class Image:
    """One version of one storage: its packed parts, and the storage rebuilt from them while backward uses it."""

    original: StorageWatch  # pins the key: a later storage at the same address must not pass for this one
    dtype: torch.dtype
    device: torch.device
    parts: WeakValueDictionary[int, Part] = field(default_factory=WeakValueDictionary)
    _rebuilt: StorageWatch | None = None
    _rebuilt_range: tuple[int, int] = (0, 0)
    _filled: set[int] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def find(self, offset: int, region: Dims) -> Part | None:
        return next((part for part in list(self.parts.values()) if part.covers(offset, region)), None)

    def add(self, offset: int, region: Dims, restore: Callable[[], torch.Tensor], module: str) -> Part:
        part = Part(self, offset, region, restore, module)
        self.parts[id(part)] = part
        return part

    def view(self, part: Part, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
        """`part` as a tensor of that geometry, on a storage shared with every other view of this image still in use."""
        with self._lock:
            storage = self._rebuilt.get() if self._rebuilt is not None else None
            first, last = self._rebuilt_range
            inside = first <= part.offset and part.offset + span(part.region) <= last
            if storage is None or not inside:
                storage, first = self._rebuild(part)
            elif id(part) not in self._filled:
                self._fill(torch.empty(0, dtype=self.dtype, device=self.device).set_(storage), part)
            result = torch.empty(0, dtype=self.dtype, device=self.device)
            return result.set_(storage, offset - first, shape, strides)

    def _rebuild(self, part: Part) -> tuple[torch.UntypedStorage, int]:
        others = list(self.parts.values())
        first = min(p.offset for p in others)
        last = max(p.offset + span(p.region) for p in others)
        self._rebuilt_range, self._filled = (first, last), set()
        if part.region == ((last - first, 1),):
            flat = part.restore()
            self._filled.add(id(part))
        else:
            flat = torch.empty(last - first, dtype=self.dtype, device=self.device)
            self._fill(flat, part)
        self._rebuilt = StorageWatch(flat.untyped_storage())
        return flat.untyped_storage(), first

    def _fill(self, flat: torch.Tensor, part: Part) -> None:
        sizes, strides = zip(*part.region, strict=True)
        target = flat.as_strided(sizes, strides, part.offset - self._rebuilt_range[0])
        target.copy_(part.restore().view(sizes))
        self._filled.add(id(part))


class Images:
    """All images that some graph still needs, found by storage, version and dtype."""

    def __init__(self) -> None:
        self._images: WeakValueDictionary[tuple[int, int, torch.dtype], Image] = WeakValueDictionary()

    def of(self, t: torch.Tensor) -> Image:
        key = (storage_key(t.untyped_storage()), t._version, t.dtype)
        image = self._images.get(key)
        if image is None:
            image = Image(StorageWatch(t.untyped_storage()), t.dtype, t.device)
            self._images[key] = image
        return image
