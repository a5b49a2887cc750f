"""The back end of torch.distributed.checkpoint, with a real model, a real optimizer and real process groups."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import zarr
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from holdfast import ckpt, events
from holdfast.ckpt import disk, lazy
from holdfast.ckpt.dcp import UniversalReader, UniversalWriter
from holdfast.errors import ConfigError, StateError, StorageError

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
WIDTH = 160
"""A square weight is 100 KiB: beyond what is copied at once."""


def build(seed: int, steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 7, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * seed)
    for _ in range(steps):
        train(model, optimizer)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(8, WIDTH)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    parameters, optim = get_state_dict(model, optimizer)
    return {"model": parameters, "optim": optim}


def copied(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def assert_same(one, other) -> None:
    assert isinstance(other, dict) if isinstance(one, dict) else type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def test_a_model_and_its_optimizer_come_back_bit_for_bit(tmp_path):
    model, optimizer = build(1)
    before = copied(state_of(model, optimizer))
    dcp.save(state_of(model, optimizer), storage_writer=UniversalWriter(tmp_path, step=40))
    other, other_optimizer = build(2)
    state = state_of(other, other_optimizer)
    dcp.load(state, storage_reader=UniversalReader(tmp_path))
    set_state_dict(other, other_optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    assert_same(state_of(other, other_optimizer), before)
    assert other_optimizer.param_groups[0]["lr"] == 0.01


def test_names_are_those_of_the_parameters_and_zarr_sees_them(tmp_path):
    model, optimizer = build(1)
    dcp.save(state_of(model, optimizer), storage_writer=UniversalWriter(tmp_path, step=40))
    group = zarr.open_group(str(tmp_path / "step-00000040"), mode="r")
    assert torch.equal(torch.from_numpy(group["model/0.weight"][...]), model[0].weight)
    assert torch.equal(torch.from_numpy(group["optim/3.weight/exp_avg"][...]), optimizer.state[model[3].weight]["exp_avg"])
    assert ckpt.open_checkpoint(tmp_path).verify().is_whole


def test_only_what_is_asked_for_is_loaded(tmp_path):
    model, optimizer = build(1)
    dcp.save(state_of(model, optimizer), storage_writer=UniversalWriter(tmp_path, step=1))
    state = {"model": {"3.weight": torch.zeros(7, WIDTH)}}
    dcp.load(state, storage_reader=UniversalReader(tmp_path))
    assert torch.equal(state["model"]["3.weight"], model[3].weight)


def test_other_dtypes_and_strides_are_converted_on_the_way(tmp_path):
    weight = torch.randn(WIDTH, WIDTH)
    dcp.save({"w": weight}, storage_writer=UniversalWriter(tmp_path, step=1))
    state = {"w": torch.zeros(WIDTH, WIDTH, dtype=torch.float64).t()}
    dcp.load(state, storage_reader=UniversalReader(tmp_path))
    assert torch.equal(state["w"], weight.double())


def test_steps_follow_one_another_when_none_is_given(tmp_path):
    for expected in (0, 1, 2):
        writer = UniversalWriter(tmp_path)
        dcp.save({"w": torch.full((3,), float(expected))}, storage_writer=writer)
        assert writer.checkpoint == tmp_path / f"step-{expected:08d}"
    state = {"w": torch.zeros(3)}
    dcp.load(state, storage_reader=UniversalReader(f"{tmp_path}@1"))
    assert state["w"].tolist() == [1, 1, 1]


def test_a_checkpoint_id_may_name_the_step_directory(tmp_path):
    dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "step-00000012", storage_writer=UniversalWriter("elsewhere"))
    assert ckpt.latest(tmp_path).step == 12
    with pytest.raises(ConfigError, match="directory of step 12, but step=13"):
        UniversalWriter(tmp_path / "step-00000012", step=13)


def test_a_flipped_bit_is_never_loaded(tmp_path):
    """What DCP's own reader loads without a word."""
    dcp.save({"w": torch.ones(WIDTH, WIDTH)}, storage_writer=UniversalWriter(tmp_path, step=1))
    with open(tmp_path / "step-00000001/w/c/0/0", "r+b") as file:
        file.seek(5000)
        file.write(b"\x01")
    with pytest.raises(CheckpointException, match="CorruptData"):
        dcp.load({"w": torch.zeros(WIDTH, WIDTH)}, storage_reader=UniversalReader(tmp_path))


def test_an_object_without_a_typed_form_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointException, match=r"strange .*which has no typed form"):
        dcp.save({"strange": object()}, storage_writer=UniversalWriter(tmp_path, step=1))
    assert ckpt.latest(tmp_path) is None


def test_what_keepers_wrote_is_read_by_dcp(tmp_path):
    """Arrays as `protect` names them, and an optimizer's groups as it keeps them."""
    from holdfast.arrays import Fragment, FragmentTable
    from holdfast.objects import encode_object

    values = {"model/w": torch.randn(4, 3), "optim/w/exp_avg": torch.randn(4, 3)}
    data = {name: memoryview(value.numpy()).cast("B") for name, value in values.items()}
    rows = [Fragment(name, "float32", (4, 3), (0, 0), (4, 3), 0, 0, 48) for name in values]
    plan = ckpt.plan_write(FragmentTable.from_rows(rows), step=3)
    directory = ckpt.begin(tmp_path, plan, "t")
    ckpt.write_fragments(directory, plan, 0, rows, lambda row: data[row.array])
    groups = encode_object({"param_groups": [{"lr": 0.5, "params": ["w"]}], "scalars": {}})
    ckpt.commit(tmp_path, directory, plan, nodes=[0], objects={0: {"optim": groups}})
    state = {"model": {"w": torch.zeros(4, 3)}, "optim": {"state": {"w": {"exp_avg": torch.zeros(4, 3)}}}}
    dcp.load(state, storage_reader=UniversalReader(tmp_path))
    assert torch.equal(state["model"]["w"], values["model/w"])
    assert torch.equal(state["optim"]["state"]["w"]["exp_avg"], values["optim/w/exp_avg"])


# -- async -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slow_copies(monkeypatch):
    """Copying in the background waits until the event is set, so that what the loop does meanwhile is certain."""
    go = threading.Event()
    run = lazy.LazyCapture._run

    def held_back(self, *arguments):
        assert go.wait(30)
        return run(self, *arguments)

    monkeypatch.setattr(lazy.LazyCapture, "_run", held_back)
    return go


@pytest.fixture
def gloo(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_an_async_save_stores_the_state_of_the_call_whatever_the_loop_does(tmp_path, gloo, slow_copies):
    """Forward and backward run while nothing is copied yet; the optimizer's step waits by itself."""
    model, optimizer = build(1)
    before = copied(state_of(model, optimizer))
    response = dcp.async_save(state_of(model, optimizer), storage_writer=UniversalWriter(tmp_path / "run", step=1))
    assert not response.staging_completion.done()
    loss = model(torch.randn(8, WIDTH)).square().mean()  # changes BatchNorm's buffers
    loss.backward()
    stepped = threading.Thread(target=optimizer.step)
    stepped.start()
    stepped.join(0.2)
    assert stepped.is_alive(), "the step did not wait for the capture"
    slow_copies.set()
    stepped.join(30)
    response.upload_completion.result()
    assert not torch.equal(model[0].weight, before["model"]["0.weight"])
    state = copied(state_of(*build(3)))
    dcp.load(state, storage_reader=UniversalReader(tmp_path / "run"))
    assert_same(state, before)


def test_a_capture_that_saw_a_change_is_dropped(tmp_path, gloo, slow_copies):
    model, optimizer = build(1)
    response = dcp.async_save(state_of(model, optimizer), storage_writer=UniversalWriter(tmp_path / "run", step=1))
    with torch.no_grad():
        model[0].weight.add_(1)  # not an optimizer's step: nothing can wait for it
    slow_copies.set()
    with pytest.raises(StateError, match=r"model\.0\.weight and 0 more changed while they were captured"):
        response.upload_completion.result()
    assert not (tmp_path / "run").exists()


def test_buffers_are_used_again(tmp_path, gloo):
    model, optimizer = build(1)
    writer = UniversalWriter(tmp_path / "run")
    held = []
    for _ in range(3):
        dcp.async_save(state_of(model, optimizer), storage_writer=writer).upload_completion.result()
        held.append({buffer.data_ptr() for buffer in writer._capture._buffers.values()})
        train(model, optimizer)
    assert held[0] == held[1] == held[2]
    assert [info.step for info in ckpt.list_steps(tmp_path / "run")] == [0, 1, 2]
    writer.close()


# -- without DCP's names -----------------------------------------------------------------------------------------------


class Counter:
    def __init__(self, count: int) -> None:
        self.count = count

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def test_live_objects_are_saved_and_loaded(tmp_path):
    model, optimizer = build(1)
    before = copied(state_of(model, optimizer))
    path = ckpt.save({"model": model, "optim": optimizer, "data": Counter(5)}, tmp_path, step=3)
    assert path == tmp_path / "step-00000003"
    assert "optim/0.weight/exp_avg" in ckpt.open_checkpoint(path).specs
    other, other_optimizer = build(2, steps=0)
    counter = Counter(0)
    assert ckpt.load({"model": other, "optim": other_optimizer, "data": counter}, tmp_path) == 3
    assert_same(state_of(other, other_optimizer), before)
    assert counter.count == 5


def test_live_objects_are_saved_behind_the_loop(tmp_path, slow_copies):
    model, optimizer = build(1)
    before = copied(state_of(model, optimizer))
    response = ckpt.save_async({"model": model, "optim": optimizer}, tmp_path, step=3)
    stepped = threading.Thread(target=train, args=(model, optimizer))
    stepped.start()
    stepped.join(0.2)
    assert stepped.is_alive(), "the step did not wait for the capture"
    slow_copies.set()
    response.upload_completion.result()
    stepped.join(30)
    other, other_optimizer = build(2)
    ckpt.load({"model": other, "optim": other_optimizer}, tmp_path)
    assert_same(state_of(other, other_optimizer), before)


OPTIMIZERS = {
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "one by one": lambda parameters: torch.optim.SGD(parameters, lr=0.1, foreach=False),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_capture_that_saw_an_optimizer_step_past_the_fence_is_dropped(tmp_path, slow_copies, kind):
    """Every kind of step is seen by its traces in the tensors, should the fence ever fail."""
    model, _ = build(1)
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer)
    response = ckpt.save_async({"model": model, "optim": optimizer}, tmp_path / "run", step=1)
    model(torch.randn(8, WIDTH)).square().mean().backward()
    type(optimizer).step.__wrapped__(optimizer)  # without the hooks, as nobody should
    slow_copies.set()
    with pytest.raises(StateError, match="changed while they were captured"):
        response.upload_completion.result()
    assert ckpt.latest(tmp_path / "run") is None if (tmp_path / "run").exists() else True


def test_every_async_save_holds_the_state_of_its_own_call(tmp_path):
    """What is remembered between saves is never what was: values, learning rates, new tensors, other objects."""
    model, optimizer = build(1)
    state = {"model": model, "optim": optimizer, "data": Counter(0)}
    kept = {}
    for step in range(1, 6):
        train(model, optimizer)
        optimizer.param_groups[0]["lr"] = 0.01 * step
        state["data"].count = step
        if step == 3:
            model[0].weight.data = model[0].weight.data.clone() * 2  # another memory under the same parameter
        if step == 4:
            optimizer.state[model[0].weight]["exp_avg"] = torch.full((WIDTH, WIDTH), 7.0)
        kept[step] = copied(state_of(model, optimizer))
        ckpt.save_async(state, tmp_path, step=step).upload_completion.result()
    for step, before in kept.items():
        other, other_optimizer = build(2)
        counter = Counter(0)
        ckpt.load({"model": other, "optim": other_optimizer, "data": counter}, tmp_path, step=step)
        assert_same(state_of(other, other_optimizer), before)
        assert counter.count == step


def test_a_save_waits_for_the_one_before_it_and_never_overwrites_its_buffers(tmp_path, monkeypatch):
    model, optimizer = build(1)
    go, waiting = threading.Event(), threading.Event()
    write = disk.write_at

    def held_back(*arguments):
        waiting.set()
        assert go.wait(30)
        write(*arguments)

    monkeypatch.setattr(disk, "write_at", held_back)
    before = copied(state_of(model, optimizer))
    first = ckpt.save_async({"model": model, "optim": optimizer}, tmp_path, step=1)
    assert waiting.wait(30)
    train(model, optimizer)  # the disk is slow, and training goes on
    second: list[object] = []
    saving = threading.Thread(
        target=lambda: second.append(ckpt.save_async({"model": model, "optim": optimizer}, tmp_path, step=2))
    )
    saving.start()
    saving.join(0.2)
    assert saving.is_alive(), "two saves shared their buffers"
    go.set()
    saving.join(30)
    first.upload_completion.result()
    second[0].upload_completion.result()
    other, other_optimizer = build(2)
    ckpt.load({"model": other, "optim": other_optimizer}, tmp_path, step=1)
    assert_same(state_of(other, other_optimizer), before)


def test_an_async_save_that_fails_is_told_and_training_and_the_older_step_go_on(tmp_path, monkeypatch, caplog):
    model, optimizer = build(1)
    state = {"model": model, "optim": optimizer}
    before = copied(state_of(model, optimizer))
    ckpt.save_async(state, tmp_path, step=1).upload_completion.result()
    told: list[events.Event] = []
    unsubscribe = events.subscribe(told.append)
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        patch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(full))
        response = ckpt.save_async(state, tmp_path, step=2)
        train(model, optimizer)
        with pytest.raises(StorageError, match="no space left"):
            response.upload_completion.result()
        train(model, optimizer)
    unsubscribe()
    assert "ckpt.failed" in {event.name for event in told}
    assert "training goes on" in caplog.text
    assert [info.step for info in ckpt.list_steps(tmp_path)] == [1]
    ckpt.save_async(state, tmp_path, step=3).upload_completion.result()
    other, other_optimizer = build(2)
    ckpt.load({"model": other, "optim": other_optimizer}, tmp_path, step=1)
    assert_same(state_of(other, other_optimizer), before)


def test_an_incremental_save_links_what_is_frozen(tmp_path):
    model, optimizer = build(1)
    model[0].requires_grad_(False)
    ckpt.save({"model": model}, tmp_path, step=1)
    train(model, optimizer)
    path = ckpt.save({"model": model}, tmp_path, step=2, incremental=True)
    assert (path / "model/0.weight/c/0/0").samefile(tmp_path / "step-00000001/model/0.weight/c/0/0")
    other, _ = build(2)
    ckpt.load({"model": other}, tmp_path)
    assert_same(dict(other.state_dict()), dict(model.state_dict()))


def test_an_optimizer_without_its_module_is_refused(tmp_path):
    _, optimizer = build(1)
    with pytest.raises(StateError, match="belong to no module in the state"):
        ckpt.save({"optim": optimizer}, tmp_path)
    with pytest.raises(StateError, match="there is no state"):
        ckpt.save({}, tmp_path)


# -- many processes ----------------------------------------------------------------------------------------------------


def test_every_layout_loads_into_every_other_on_two_ranks():
    house = str(Path(ckpt.__file__).parents[2])
    command = [sys.executable, "-m", "holdfast.ckpt.matrix", "--ranks", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": house}, timeout=100)
    assert done.returncode == 0, done.stderr
    cells = json.loads(done.stdout)["cells"]
    assert len(cells) == 5 * (3 + 5)
    assert all(cell["equal"] for cell in cells)
    assert {cell["saved"] for cell in cells} == {"DDP2", "FSDP2", "TP2", "FSDP1×TP2", "PP2×FSDP1"}
