"""DeepSpeed's ZeRO checkpoints: every parameter and every piece of optimizer state comes in, bit for bit, and training goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from holdfast import ckpt
from holdfast.ckpt.foreign.deepspeed import FlatRange, ranges_of_stage_2, ranges_of_stage_3
from holdfast.ckpt.importing import import_checkpoint, open_source
from holdfast.errors import CorruptData, HoldfastError, MissingData, UnsupportedFormat
from holdfast.objects import decode_object
from tests.ckpt import zero_files

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")


class Model(nn.Module):
    """Odd extents, a bias, tied weights and a buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(37, 11)
        self.up = nn.Linear(11, 23)
        self.down = nn.Linear(23, 11, bias=False)
        self.norm = nn.BatchNorm1d(11)
        self.head = nn.Linear(11, 37, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(tokens) + self.down(self.up(self.embed(tokens)).relu())))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0, "lr": 3e-3},
    ]
    return torch.optim.AdamW(groups, lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(0, 37, (16,), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(tokens), tokens.flip(0)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def trained() -> tuple[Model, torch.optim.Optimizer]:
    model = Model()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    return model, optimizer


def read(checkpoint: ckpt.Checkpoint, name: str) -> torch.Tensor:
    spec = checkpoint.specs[name]
    tensor = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
    checkpoint.read_box(name, None, tensor.reshape(-1).view(torch.uint8).numpy())
    return tensor


@pytest.mark.parametrize(("stage", "ranks"), [(1, 1), (1, 3), (2, 2), (2, 4), (3, 1), (3, 2), (3, 5)])
def test_every_stage_and_number_of_ranks_comes_in_bit_for_bit(tmp_path, trained, stage, ranks):
    model, optimizer = trained
    zero_files.write(tmp_path / "ds", model, optimizer, stage=stage, ranks=ranks, step=3)
    source = open_source(tmp_path / "ds")
    assert (source.kind, source.step) == ("deepspeed", 3)
    checkpoint = ckpt.open_checkpoint(import_checkpoint(source, tmp_path / "run"))
    assert checkpoint.step == 3
    assert checkpoint.verify().is_whole
    for name, parameter in model.named_parameters():
        assert torch.equal(read(checkpoint, f"model/{name}"), parameter)
        assert torch.equal(read(checkpoint, f"optim/{name}/master"), parameter)
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(read(checkpoint, f"optim/{name}/{key}"), value), (name, key)
    for name, buffer in model.named_buffers():
        assert torch.equal(read(checkpoint, f"model/{name}"), buffer)
    assert checkpoint.layout["tied"] == {"head.weight": "embed.weight"}
    assert decode_object(checkpoint.objects[0]["deepspeed/note"]) == {"user": "kept"}


@pytest.mark.parametrize(("stage", "ranks"), [(2, 3), (3, 3)])
def test_training_goes_on_from_it_as_if_nothing_had_happened(tmp_path, trained, stage, ranks):
    model, optimizer = trained
    zero_files.write(tmp_path / "ds", model, optimizer, stage=stage, ranks=ranks, step=3)
    import_checkpoint(open_source(tmp_path / "ds"), tmp_path / "run")
    other = Model(seed=1)
    others = optimizer_of(other)
    assert ckpt.load({"model": other, "optim": others}, tmp_path / "run") == 3
    train(model, optimizer, range(3, 6))
    train(other, others, range(3, 6))
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_frozen_parameters_of_stage_3_come_in(tmp_path):
    model = Model()
    model.down.weight.requires_grad_(False)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    zero_files.write(tmp_path / "ds", model, optimizer, stage=3, ranks=4, step=2)
    checkpoint = ckpt.open_checkpoint(import_checkpoint(open_source(tmp_path / "ds"), tmp_path / "run"))
    assert torch.equal(read(checkpoint, "model/down.weight"), model.down.weight)
    assert "optim/down.weight/master" not in checkpoint.specs


def test_a_parameter_that_lies_across_ranks_is_cut_where_the_ranks_are():
    found = ranges_of_stage_2([{"a": 5, "b": 9}], [[6], [6], [4]])
    assert found == {
        "a": (0, [FlatRange(0, 0, 0, 5, 0)]),
        "b": (0, [FlatRange(0, 0, 0, 1, 5), FlatRange(1, 0, 1, 7, 0), FlatRange(2, 0, 7, 9, 0)]),
    }


def test_stage_3_cuts_each_parameter_by_itself_and_pads_the_last_part():
    found = ranges_of_stage_3([{"a": 5}, {"b": 4}], [[3, 2], [3, 2]])
    assert found == {
        "a": (0, [FlatRange(0, 0, 0, 3, 0), FlatRange(1, 0, 3, 5, 0)]),
        "b": (1, [FlatRange(0, 1, 0, 2, 0), FlatRange(1, 1, 2, 4, 0)]),
    }


@pytest.mark.parametrize(
    ("shapes", "held", "stage"), [([{"a": 9}], [[4], [4]], 2), ([{"a": 9}], [[4], [4]], 3), ([{"a": 4, "b": 8}], [[4, 2]], 3)]
)
def test_partitions_that_are_too_short_are_refused(shapes, held, stage):
    with pytest.raises(CorruptData, match=r"of another save|never puts it"):
        (ranges_of_stage_3 if stage == 3 else ranges_of_stage_2)(shapes, held)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_missing_rank_is_named_before_anything_is_written(tmp_path, trained, stage):
    directory = zero_files.write(tmp_path / "ds", *trained, stage=stage, ranks=3, step=3)
    (directory / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(MissingData, match="optim_states file of rank 1 is missing"):
        open_source(tmp_path / "ds")
    (directory / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(MissingData, match="3 ranks saved, optim_states files of 1 are there"):
        open_source(directory)


def test_a_truncated_file_is_refused(tmp_path, trained):
    directory = zero_files.write(tmp_path / "ds", *trained, stage=2, ranks=2, step=3)
    file = directory / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(UnsupportedFormat, match="or is truncated"):
        open_source(tmp_path / "ds")


def test_model_parallel_files_are_refused_with_a_way_out(tmp_path, trained):
    directory = zero_files.write(tmp_path / "ds", *trained, stage=2, ranks=1, step=3)
    file = directory / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    file.rename(directory / "zero_pp_rank_0_mp_rank_01_optim_states.pt")
    with pytest.raises(UnsupportedFormat, match=r"ds_to_universal\.py"):
        open_source(tmp_path / "ds")


class Payload:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self):
        return touch, (self.mark,)


def touch(path: str) -> None:
    Path(path).write_text("executed")


def test_a_strange_class_is_named_and_can_be_passed_over_but_never_runs(tmp_path, trained):
    directory = zero_files.write(tmp_path / "ds", *trained, stage=2, ranks=1, step=3)
    file = directory / "mp_rank_00_model_states.pt"
    document = torch.load(file, weights_only=True)
    torch.save({**document, "client": Payload(str(tmp_path / "mark"))}, file)
    name = f"{touch.__module__}.touch"
    with pytest.raises(UnsupportedFormat, match=rf"it holds objects of {name}.*--inert {name}"):
        open_source(tmp_path / "ds")
    source = open_source(tmp_path / "ds", inert=[name])
    assert source.left_out == ("client holds objects that were not loaded",)
    checkpoint = ckpt.open_checkpoint(import_checkpoint(source, tmp_path / "run"))
    assert torch.equal(read(checkpoint, "model/up.weight"), trained[0].up.weight)
    assert not (tmp_path / "mark").exists()


def test_a_latest_that_leads_elsewhere_is_not_followed(tmp_path, trained):
    zero_files.write(tmp_path / "ds", *trained, stage=2, ranks=1, step=3)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/latest").write_text("../ds/global_step3")
    with pytest.raises(HoldfastError, match="neither safetensors"):
        open_source(tmp_path / "run")
