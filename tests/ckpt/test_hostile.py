"""The folder of hostile checkpoints: each is refused by an error that says what is wrong with it, and nothing of it is executed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from holdfast import ckpt, errors
from holdfast.ckpt.importing import open_source
from holdfast.ckpt.repairing import repair
from tests.ckpt.hostile import KEPT

EXPECTED = json.loads((KEPT / "expected.json").read_text())


def try_it(kind: str, path: Path) -> None:
    if kind == "foreign":
        open_source(path)
    elif kind == "parity":
        repair(path)
    else:
        checkpoint = ckpt.open_checkpoint(path)
        for name, spec in checkpoint.specs.items():
            checkpoint.read_box(name, None, bytearray(spec.nbytes))


@pytest.mark.parametrize("what", EXPECTED)
def test_a_kept_hostile_checkpoint_is_refused_by_name(tmp_path, monkeypatch, what):
    case = EXPECTED[what]
    top = case["path"].split("/")[0]
    shutil.copytree(KEPT / top, tmp_path / top, symlinks=True)
    monkeypatch.chdir(tmp_path)  # where a payload would leave its mark
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with pytest.raises(getattr(errors, case["error"]), match=case["words"]):
        try_it(case["kind"], tmp_path / case["path"])
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_the_folder_holds_what_the_list_says():
    assert {case["path"].split("/")[0] for case in EXPECTED.values()} == {path.name for path in KEPT.iterdir() if path.is_dir()}
    assert len(EXPECTED) > 40
