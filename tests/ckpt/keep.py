"""Writes the example checkpoints that stay in the repository: `python -m tests.ckpt.keep` once for each version of the format.

Never run it again for a version that was released: the point of a kept file is that it was written by the code of its day.
"""

from __future__ import annotations

import json
from pathlib import Path

from holdfast.arrays import Box
from holdfast.ckpt.manifest import VERSION, sha256
from tests.ckpt.saving import Sample, flat_boxes, grid_boxes, hold, model, write

KEPT = Path(__file__).with_name("kept")


def main() -> None:
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
    known = {s.spec.name: {"dtype": s.spec.dtype, "shape": s.spec.shape, "sha256": sha256(s.data)} for s in samples}
    (root / "expected.json").write_text(json.dumps(known, indent=1))


if __name__ == "__main__":
    main()
