"""Writes the example checkpoints that stay in the repository: `python -m tests.ckpt.keep first|files|store`,
once for each version of the format.

Never run it again for a version that was released: the point of a kept file is that it was written by the code of its day.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from holdfast import ckpt
from holdfast.arrays import ArraySpec, Box
from holdfast.ckpt.manifest import VERSION, sha256
from tests.ckpt.saving import Sample, flat_boxes, grid_boxes, hold, model, write

KEPT = Path(__file__).with_name("kept")


def keep_first() -> None:
    """Plain files of every dtype and cut."""
    samples = [
        *model(),
        *(
            Sample.random(f"dtypes/{dtype}", dtype, (3, 5))
            for dtype in ("bool", "int64", "uint16", "float8_e4m3fn", "complex64")
        ),
        Sample.random("cut/columns", "int32", (70, 40)),
        Sample.random("cut/uneven", "int16", (33, 50)),
        Sample.random("cut/flat", "float32", (13, 7, 5)),
        Sample.random("cut/large", "float32", (300, 60)),
        Sample.random("own/mean@rank-1", "float64", (4,)),
    ]
    boxes = {sample.spec.name: grid_boxes(sample.spec, ((0, 4),)) for sample in samples}
    boxes |= {sample.spec.name: [Box.whole(sample.spec.shape)] for sample in samples if not sample.spec.shape}
    by_name = {sample.spec.name: sample.spec for sample in samples}
    boxes["cut/columns"] = grid_boxes(by_name["cut/columns"], ((1, 4),))
    boxes["cut/uneven"] = grid_boxes(by_name["cut/uneven"], ((1, 4),))
    boxes["cut/flat"] = flat_boxes(by_name["cut/flat"], [0, 100, 103, 300, 455])
    root = KEPT / f"version-{VERSION}"
    write(root, hold(samples, boxes), step=42)
    note(root, samples)


def wave(name: str, dtype: str, shape: tuple[int, ...], seed: int = 0) -> Sample:
    """Large enough to be compressed or cut, and small in a repository."""
    nbytes = Sample.random(name, dtype, shape).spec.nbytes
    data = np.arange(nbytes, dtype=np.int64) // 512 % 251 + seed
    return Sample(ArraySpec(name, dtype, shape), data.astype(np.uint8).tobytes())


def keep_files() -> None:
    """Compressed arrays, and what a step inherited from the one before it."""
    root = KEPT / f"version-{VERSION}-files"
    samples = [
        wave("model/frozen", "float32", (300, 64)),
        wave("model/touched", "float32", (300, 64)),
        wave("optim/rows", "float32", (301, 64)),
        wave("optim/columns", "bfloat16", (500, 130)),
        Sample.random("model/norm", "float32", (60,)),
    ]
    boxes = {sample.spec.name: grid_boxes(sample.spec, ((0, 4),)) for sample in samples}
    boxes["optim/columns"] = grid_boxes(samples[3].spec, ((0, 2), (1, 4)))
    write(root, hold(samples, boxes), step=41, compress={"optim/*": 3})
    samples[1] = Sample(samples[1].spec, bytes(100) + samples[1].data[100:])
    write(root, hold(samples, boxes), step=42, compress={"optim/*": 3}, parent=ckpt.open_checkpoint(root, 41))
    note(root, samples)


def keep_store() -> None:
    """As an object store has it: every file from one writer, the save's token in the name."""
    root = KEPT / f"version-{VERSION}-store"
    samples = [
        wave("model/rows", "float32", (301, 64)),
        wave("model/columns", "bfloat16", (500, 130)),
        wave("model/whole", "float32", (300, 64)),
        Sample.random("model/norm", "float32", (60,)),
    ]
    boxes = {sample.spec.name: grid_boxes(sample.spec, ((0, 4),)) for sample in samples}
    boxes["model/columns"] = grid_boxes(samples[1].spec, ((0, 2), (1, 4)))
    boxes["model/whole"] = [Box.whole(samples[2].spec.shape)]
    path = write(root, hold(samples, boxes), step=42, whole_files=True)
    path.rename(root / f"{path.name}-b1f0")
    (root / "LATEST").write_text(f"{path.name}-b1f0\n")
    note(root, samples)


def note(root: Path, samples: list[Sample]) -> None:
    known = {s.spec.name: {"dtype": s.spec.dtype, "shape": s.spec.shape, "sha256": sha256(s.data)} for s in samples}
    (root / "expected.json").write_text(json.dumps(known, indent=1))


KEEPERS = {"first": keep_first, "files": keep_files, "store": keep_store}


if __name__ == "__main__":
    for what in sys.argv[1:]:
        KEEPERS[what]()
