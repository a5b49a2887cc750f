"""States to save and a way to save them: real files, any layout, no trainer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from holdfast import ckpt
from holdfast.arrays import ITEMSIZE, ArraySpec, Box, Fragment, FragmentTable, flat_range_boxes, shard_box
from holdfast.ckpt.storage import is_remote
from holdfast.ckpt.views import contiguous_bytes
from holdfast.coding import crc32c

Cuts = Sequence[tuple[int, int]]
"""(dim, parts) pairs: how an array is cut before it is saved."""


@dataclass(frozen=True)
class Sample:
    """An array with known bytes."""

    spec: ArraySpec
    data: bytes

    @classmethod
    def random(cls, name: str, dtype: str, shape: Sequence[int], seed: int = 0) -> Sample:
        nbytes = math.prod(shape) * ITEMSIZE[dtype]
        rng = np.random.default_rng([seed, *name.encode()])
        real = {"float16": "f2", "float32": "f4", "float64": "f8", "complex64": "f4", "complex128": "f8"}.get(dtype)
        if real is None:
            raw = rng.integers(0, 2 if dtype == "bool" else 256, nbytes, dtype=np.uint8)
        else:
            raw = rng.standard_normal(nbytes // np.dtype(real).itemsize).astype(real)
        return cls(ArraySpec(name, dtype, tuple(shape)), raw.tobytes())

    def part(self, box: Box) -> bytes:
        return bytes(contiguous_bytes(memoryview(self.data), Box.whole(self.spec.shape), box, self.spec.dtype))


@dataclass
class Saved:
    """Fragments of all ranks with their bytes, ready to be written."""

    table: FragmentTable
    data: dict[tuple[str, Box], bytes]

    def read(self, row: Fragment) -> memoryview:
        return memoryview(self.data[row.array, row.box])


def cut(samples: Sequence[Sample], cuts: Mapping[str, Cuts] | Cuts = (), world: int = 4) -> Saved:
    """Every array cut into boxes, box i held by rank i % world."""
    boxes = {
        sample.spec.name: grid_boxes(sample.spec, cuts.get(sample.spec.name, ()) if isinstance(cuts, Mapping) else cuts)
        for sample in samples
    }
    return hold(samples, boxes, world)


def grid_boxes(spec: ArraySpec, cuts: Cuts) -> list[Box]:
    fitting = [(dim, parts) for dim, parts in cuts if dim < len(spec.shape)]
    places = itertools.product(*(range(parts) for _, parts in fitting))
    return [
        shard_box(spec.shape, [(dim, parts, index) for (dim, parts), index in zip(fitting, where, strict=True)])
        for where in places
    ]


def flat_boxes(spec: ArraySpec, bounds: Sequence[int]) -> list[Box]:
    return [box for a, b in itertools.pairwise(bounds) for box in flat_range_boxes(spec.shape, a, b)]


def hold(samples: Sequence[Sample], boxes: Mapping[str, Sequence[Box]], world: int = 4) -> Saved:
    rows, data = [], {}
    for sample in samples:
        spec = sample.spec
        held = [box for box in boxes[spec.name] if box.size] or [Box.whole(spec.shape)]
        for index, box in enumerate(held):
            part = sample.part(box) if box.size else b""
            rows.append(
                Fragment(spec.name, spec.dtype, spec.shape, box.offset, box.shape, index % world, 0, len(part), crc32c(part))
            )
            data[spec.name, box] = part
    return Saved(FragmentTable.from_rows(rows), data)


def write(
    root: Path | str,
    saved: Saved,
    step: int = 1,
    nodes: int = 2,
    world: int = 4,
    token: str = "t",
    compress: Mapping[str, int] | None = None,
    parent: ckpt.Checkpoint | None = None,
    direct: bool = False,
    whole_files: bool = False,
) -> Any:
    layout = {"world": world, "mesh": {"dp": world}, **({} if parent is None else {"parent": parent.step})}
    whole_files = whole_files or is_remote(root)
    plan = ckpt.plan_write(saved.table, step=step, layout=layout, whole_files=whole_files, compress=compress)
    directory = ckpt.begin(root, plan, token)
    for node in range(nodes):
        rows = [row for row in saved.table if row.rank % nodes == node]
        ckpt.write_fragments(directory, plan, node, rows, saved.read, parent=parent, direct=direct)
    objects = {rank: {"rng": f"[{rank},{step}]"} for rank in range(world)}
    return ckpt.commit(root, directory, plan, nodes=range(nodes), objects=objects, parent=parent)


def save(
    root: Path | str,
    samples: Sequence[Sample],
    cuts: Mapping[str, Cuts] | Cuts = ((0, 4),),
    step: int = 1,
    world: int = 4,
    **options: Any,
) -> Any:
    return write(root, cut(samples, cuts, world), step, world=world, **options)


def model(seed: int = 0) -> list[Sample]:
    """A small transformer's state: matrices, norms, scalars, optimizer state, something empty."""
    samples = [
        Sample.random("model/tok_embeddings.weight", "float32", (515, 48), seed),
        Sample.random("model/norm.weight", "float32", (48,), seed),
        Sample.random("model/empty", "float32", (0, 7), seed),
    ]
    for layer in range(2):
        for kind, shape in (("wq", (48, 48)), ("wo", (48, 48)), ("w1", (128, 48)), ("w2", (48, 128))):
            name = f"layers.{layer}.{kind}.weight"
            samples.append(Sample.random(f"model/{name}", "bfloat16", shape, seed))
            samples.append(Sample.random(f"optim/{name}/exp_avg", "float32", shape, seed))
            samples.append(Sample.random(f"optim/{name}/step", "float32", (), seed))
    return samples


def assert_holds(path: Path | str, samples: Sequence[Sample], step: int | None = None) -> None:
    """The checkpoint holds exactly these arrays, byte for byte."""
    checkpoint = ckpt.open_checkpoint(path, step)
    assert set(checkpoint.specs) == {sample.spec.name for sample in samples}
    for sample in samples:
        out = bytearray(sample.spec.nbytes)
        checkpoint.read_box(sample.spec.name, None, out)
        assert checkpoint.specs[sample.spec.name] == sample.spec
        assert out == sample.data, sample.spec.name
