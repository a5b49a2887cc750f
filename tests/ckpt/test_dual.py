"""One file, two formats: safetensors opens what zarr opens, and an export shares the bytes with the checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from holdfast import ckpt
from holdfast.ckpt.dcp import UniversalWriter
from holdfast.ckpt.exporting import export_safetensors
from holdfast.ckpt.importing import import_checkpoint, open_source
from holdfast.ckpt.repairing import repair
from holdfast.ckpt.safetensors import read_header
from holdfast.errors import CorruptData
from tests.ckpt.test_deepspeed import read

safetensors = pytest.importorskip("safetensors")

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")


def tensors() -> dict[str, torch.Tensor]:
    """Large ones that get a shard with an index (a prime number of rows, so the last chunk is padded), and small ones."""
    torch.manual_seed(0)
    return {"a.weight": torch.randn(3001, 1000), "b.weight": torch.randn(4096, 1200).bfloat16(), "norm": torch.randn(300)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("dual")
    torch.save(tensors(), root / "x.pt")
    import_checkpoint(open_source(root / "x.pt"), root / "run", step=2, dual=True)
    return root / "run"


def test_a_shard_is_a_safetensors_file_and_a_zarr_shard(saved):
    zarr = pytest.importorskip("zarr")
    checkpoint = ckpt.open_checkpoint(saved)
    assert checkpoint.verify().is_whole
    assert [name for name, layout in checkpoint.layouts.items() if layout.head_nbytes] == ["model/a.weight", "model/b.weight"]
    for name, tensor in tensors().items():
        assert torch.equal(read(checkpoint, f"model/{name}"), tensor)
    for name in ("a.weight", "b.weight"):
        with safetensors.safe_open(checkpoint.path / f"model/{name}/c/0/0", "pt") as file:
            assert sorted(file.keys()) == ["__zarr_index__", name]
            assert torch.equal(file.get_tensor(name), tensors()[name])
    found = zarr.open_group(checkpoint.path, mode="r")["model/a.weight"]
    assert np.array_equal(found[:], tensors()["a.weight"].numpy())
    assert np.array_equal(found[2990:, 5:7], tensors()["a.weight"].numpy()[2990:, 5:7])


def test_tensorstore_alone_reads_it(saved):
    tensorstore = pytest.importorskip("tensorstore")
    place = {"driver": "file", "path": str(saved / "step-00000002/model/a.weight")}
    store = tensorstore.open({"driver": "zarr3", "kvstore": place}).result()
    assert np.array_equal(store.read().result(), tensors()["a.weight"].numpy())


def test_an_export_shares_the_bytes_and_copies_only_what_is_small(saved, tmp_path_factory):
    out = saved.parent / "out"
    exported = export_safetensors(ckpt.open_checkpoint(saved), out)
    assert exported.linked_nbytes == 3001 * 1000 * 4 + 4096 * 1200 * 2
    assert len(exported.files) == 3
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(tensors())
    for name, tensor in tensors().items():
        with safetensors.safe_open(out / index[name], "pt") as file:
            assert torch.equal(file.get_tensor(name), tensor)
    for name in ("a.weight", "b.weight"):
        assert os.path.samefile(out / index[name], saved / f"step-00000002/model/{name}/c/0/0")
    again = import_checkpoint(open_source(out), saved.parent / "again")
    assert set(ckpt.open_checkpoint(again).specs) == {f"model/{name}" for name in tensors()}


def test_damage_is_found_before_anything_is_linked(tmp_path):
    torch.save(tensors(), tmp_path / "x.pt")
    path = import_checkpoint(open_source(tmp_path / "x.pt"), tmp_path / "run", dual=True)
    with open(path / "model/a.weight/c/0/0", "r+b") as file:
        file.seek(5_000_000)
        file.write(b"\xff\x00\xff")
    with pytest.raises(CorruptData, match=r"model/a\.weight rows"):
        export_safetensors(ckpt.open_checkpoint(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("at", [0, 40, 4000])
def test_a_damaged_header_is_seen_and_repaired(tmp_path, saved, at):
    torch.save(tensors(), tmp_path / "x.pt")
    path = import_checkpoint(open_source(tmp_path / "x.pt"), tmp_path / "run", step=2, dual=True)
    file = path / "model/a.weight/c/0/0"
    sound = file.read_bytes()
    file.write_bytes(sound[:at] + b"\x01" + sound[at + 1 :])
    (damage,) = ckpt.open_checkpoint(path).verify().damages
    assert damage.what == "the safetensors header is damaged"
    assert repair(path, saved, dry_run=True).lost == ()
    assert repair(path, saved).lost == ()
    assert file.read_bytes() == sound


def test_a_save_can_be_dual_and_columns_are_streamed(tmp_path):
    from torch.distributed.checkpoint.state_dict_saver import save

    save({"model": tensors()}, storage_writer=UniversalWriter(tmp_path / "run", step=2, dual=True), no_dist=True)
    exported = export_safetensors(ckpt.open_checkpoint(tmp_path / "run"), tmp_path / "out")
    assert exported.linked_nbytes > 0
    ckpt.restore(tmp_path / "run", "dp=1", tmp_path / "plain", "universal")
    assert export_safetensors(ckpt.open_checkpoint(tmp_path / "plain"), tmp_path / "copied").linked_nbytes == 0


def test_the_header_is_made_of_whole_pages(saved):
    found, _ = read_header(saved / "step-00000002/model/b.weight/c/0/0")
    assert found["b.weight"].offset == 4096
