"""A checkpoint of every version of the format stays readable, bit for bit."""

from __future__ import annotations

import json

import pytest

from holdfast import ckpt
from holdfast.ckpt.manifest import VERSION, sha256
from tests.ckpt.keep import KEPT


@pytest.mark.parametrize(
    "name", [f"version-{number}{kind}" for number in range(1, VERSION + 1) for kind in ("", "-files", "-store")]
)
def test_the_kept_checkpoint_of(name):
    root = KEPT / name
    expected = json.loads((root / "expected.json").read_text())
    checkpoint = ckpt.open_checkpoint(root)
    assert checkpoint.step == 42
    assert checkpoint.verify().is_whole
    assert checkpoint.objects == {rank: {"rng": f"[{rank},42]"} for rank in range(4)}
    found = {}
    for name, spec in checkpoint.specs.items():
        out = bytearray(spec.nbytes)
        checkpoint.read_box(name, None, out)
        found[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "sha256": sha256(out)}
    assert found == expected
