"""A capture is the state at the step's boundary, whatever forward and backward do meanwhile, or it is not shipped."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from holdfast import events
from holdfast.arrays import FragmentTable
from holdfast.coding import crc32c
from holdfast.objects import decode_object
from holdfast.snapshot import capture as capture_module
from holdfast.snapshot import replicas
from holdfast.snapshot.capture import Capturer, Shot, copy_of
from holdfast.snapshot.capture_plan import Part, plan_capture, slot_view, source_of
from holdfast.snapshot.fence import Fence
from holdfast.snapshot.replicas import Piece
from holdfast.snapshot.state import TrackedState

PATIENCE_S = 60


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are done sooner by one thread than by several that wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Page(dict[str, int]):
    """The words of a control page, without a file."""

    def __init__(self) -> None:
        super().__init__(completed=0, look=0)
        self.target = (0, 0, 0)

    def order(self, step: int, index: int = 0) -> None:
        self.target = (step, index, self.target[2] + 1)


class Shelf:
    """A keeper's side in small: real bytes for two slots, and a record of what was handed in.

    `gate` is passed before a slot is given out, and `after` when one is handed in, so that a test can hold the copy up.
    """

    def __init__(self) -> None:
        self.page = Page()
        self.bodies = {0: bytearray(), 1: bytearray()}
        self.gate = threading.Event()
        self.gate.set()
        self.filled_steps: dict[int, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {}
        self.given_up: list[tuple[int, str]] = []
        self.before_give_up_returns: Callable[[], None] = lambda: None
        self.takes = True

    def body(self, index: int, nbytes: int) -> memoryview:
        assert self.gate.wait(PATIENCE_S)
        if len(self.bodies[index]) < nbytes:
            self.bodies[index] = bytearray(nbytes)
        return memoryview(self.bodies[index])

    def filled(self, step: int, index: int, nbytes: int, layout: str, table: FragmentTable, objects: dict[str, str]) -> bool:
        body = memoryview(self.bodies[index])
        arrays = {
            row.array: slot_view(body, row.slot_offset, row.nbytes, getattr(torch, row.dtype), row.shape).clone()
            for row in table
        }
        self.filled_steps[step] = arrays, {name: decode_object(text) for name, text in objects.items()}
        return self.takes

    def before_unmap(self, body: memoryview) -> None:
        """A keeper's link calls this before a mapping goes; these bytes stay."""

    def give_up(self, step: int, reason: str) -> None:
        self.given_up.append((step, reason))
        self.before_give_up_returns()


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    made = Shelf()
    yield made
    made.gate.set()


@pytest.fixture
def capturing(shelf: Shelf) -> Iterator[Callable[..., Capturer]]:
    made: list[Capturer] = []

    def build(**objects: Any) -> Capturer:
        made.append(Capturer(TrackedState(objects), shelf, 0))  # type: ignore[arg-type]
        for optimizer in made[-1].state.optimizers.values():
            Fence(optimizer, made[-1].fence, lambda capturer=made[-1]: capturer.is_copying)  # type: ignore[misc]
        return made[-1]

    yield build
    shelf.gate.set()
    for capturer in made:
        capturer.close()


def capture(capturer: Capturer, shelf: Shelf, step: int) -> dict[str, torch.Tensor]:
    shelf.page.order(step, step % 2)
    capturer.step_done(step)
    capturer.settle()
    return shelf.filled_steps[step][0]


def now(state: TrackedState) -> dict[str, torch.Tensor]:
    return {item.name: item.local.clone() for item in state.held()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, update: bool = True) -> None:
    model(torch.randn(6, 8)).square().mean().backward()
    if update:
        optimizer.step()
        optimizer.zero_grad()


# -- whom the fence holds up -----------------------------------------------------------------------------------------------


class Turnstile:
    """Lets the copy of each array through when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *closed: str) -> None:
        self.gates = {name: threading.Event() for name in closed}
        self.order: list[str] = []
        copy = capture_module._copy_bytes

        def held_up(source: torch.Tensor, body: memoryview, part: Part) -> None:
            if part.held.name in self.gates:
                assert self.gates[part.held.name].wait(PATIENCE_S)
            self.order.append(part.held.name)
            copy(source, body, part)

        monkeypatch.setattr(capture_module, "_copy_bytes", held_up)

    def open(self) -> None:
        for gate in self.gates.values():
            gate.set()


def test_a_parameter_group_is_updated_while_the_next_one_is_still_copied(
    shelf: Shelf, capturing: Callable[..., Capturer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    groups = [{"params": list(part.parameters()), "lr": rate} for part, rate in ((model[1], 0.1), (model[0], 0.2))]
    optimizer = torch.optim.SGD(groups)
    capturer = capturing(model=model, optim=optimizer)
    turnstile = Turnstile(monkeypatch, "model/0.weight")
    model(torch.randn(2, 8)).sum().backward()
    before = now(capturer.state)
    shelf.page.order(1)
    capturer.step_done(1)
    stepping = threading.Thread(target=optimizer.step)
    stepping.start()
    deadline = time.monotonic() + PATIENCE_S
    while torch.equal(model[1].weight, before["model/1.weight"]):
        assert time.monotonic() < deadline, "the first group is changed"
        time.sleep(0.001)
    assert stepping.is_alive(), "the second one is waited for"
    assert torch.equal(model[0].weight, before["model/0.weight"])
    turnstile.open()
    stepping.join()
    capturer.settle()
    assert same(shelf.filled_steps[1][0], before)
    assert type(optimizer.param_groups) is list
    assert not torch.equal(model[0].weight, before["model/0.weight"])


def test_a_parameter_that_only_another_replica_captures_is_not_changed_while_it_is_summed(
    shelf: Shelf, capturing: Callable[..., Capturer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    capturer = capturing(model=model, optim=optimizer)
    item = next(item for item in capturer.state.held() if item.name == "model/weight")
    begun, go_on, whole, portion = (
        threading.Event(),
        threading.Event(),
        replicas.sums,
        (Piece(item.name, item, 0, 128, (0, 0)),),
    )

    def held_up(*args: Any) -> dict[str, int]:
        begun.set()
        assert go_on.wait(PATIENCE_S)
        return whole(*args)

    plan = capture_module.plan_capture
    monkeypatch.setattr(capture_module, "plan_capture", lambda *args: replace(plan(*args), batches=()))
    monkeypatch.setattr(replicas, "portions", lambda *_: [portion])
    monkeypatch.setattr(replicas, "sums", held_up)
    model(torch.randn(2, 8)).sum().backward()
    before = model.weight.detach().clone()
    shelf.page["look"] = 1
    shelf.page.order(1)
    capturer.step_done(1)
    assert begun.wait(PATIENCE_S)
    stepping = threading.Thread(target=optimizer.step)
    stepping.start()
    stepping.join(0.2)
    assert torch.equal(model.weight, before), "the optimizer waits"
    go_on.set()
    stepping.join()
    capturer.settle()
    assert capturer.take_sums() == [(1, {item.name: crc32c(before.numpy().data)})]
    shelf.page.order(2)
    capturer.step_done(2)
    capturer.settle()
    assert capturer.take_sums() == [], "the keepers have not asked for another portion"


def test_after_a_step_that_failed_between_two_groups_the_optimizer_has_its_own_groups_again(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD([{"params": list(part.parameters()), "lr": 0.1} for part in model])
    capturer = Capturer(TrackedState({"model": model, "optim": optimizer}), shelf, 0)  # type: ignore[arg-type]
    turnstile = Turnstile(monkeypatch, "model/0.weight")
    groups = optimizer.param_groups

    def interrupt(optimizer: torch.optim.Optimizer, group: int | None) -> None:
        raise RuntimeError("a peer has died")

    fence = Fence(optimizer, interrupt, lambda: capturer.is_copying)
    shelf.page.order(1)
    capturer.step_done(1)
    with pytest.raises(RuntimeError, match="a peer has died"):
        optimizer.step()
    fence.remove()
    assert optimizer.param_groups is groups
    fence = Fence(optimizer, interrupt, lambda: capturer.is_copying)
    with pytest.raises(RuntimeError, match="a peer has died"):
        optimizer.step()
    turnstile.open()
    capturer.settle()
    optimizer.step()
    assert optimizer.param_groups is groups
    fence.remove()
    capturer.close()


def test_what_an_optimizer_does_not_change_it_does_not_wait_for(
    shelf: Shelf, capturing: Callable[..., Capturer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen base with an adapter, and a second optimizer."""
    model = nn.ModuleDict({"base": nn.Linear(8, 8), "adapter": nn.Linear(8, 2), "head": nn.Linear(2, 2)})
    model["base"].requires_grad_(False)
    first, second = (torch.optim.Adam(model[name].parameters()) for name in ("adapter", "head"))
    capturer = capturing(model=model, first=first, second=second)
    turnstile = Turnstile(monkeypatch, "model/base.weight", "model/head.weight")
    model["head"](model["adapter"](model["base"](torch.randn(4, 8)))).sum().backward()
    shelf.page.order(1)
    capturer.step_done(1)
    before = now(capturer.state)
    first.step()
    assert not torch.equal(model["adapter"].weight, before["model/adapter.weight"])
    turnstile.gates["model/head.weight"].set()
    second.step()
    turnstile.open()
    capturer.settle()
    assert same(shelf.filled_steps[1][0], before)
    lazy = [name for name in turnstile.order if "base" in name]
    assert turnstile.order[-2:] == lazy, "what nobody waits for is copied last"


# -- what is captured ----------------------------------------------------------------------------------------------------


def test_a_capture_is_the_state_at_the_boundary_though_the_next_step_runs_meanwhile(
    shelf: Shelf, capturing: Callable[..., Capturer]
) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    capturer = capturing(model=model, optim=optimizer)
    train(model, optimizer)
    expected, rng = now(capturer.state), torch.get_rng_state()
    shelf.gate.clear()
    shelf.page.order(1)
    capturer.step_done(1)
    train(model, optimizer, update=False)  # BatchNorm's buffers, gradients and the generator move on
    assert not torch.equal(model[1].running_mean, expected["model/1.running_mean"])
    shelf.gate.set()
    optimizer.step()  # waits for the copy
    capturer.settle()
    arrays, objects = shelf.filled_steps[1]
    assert same(arrays, expected)
    assert torch.equal(objects["rng"]["torch"], rng)
    assert objects["optim"]["param_groups"][0]["lr"] == 0.001
    assert not same(now(capturer.state), expected)
    assert (capturer.stats.captured, capturer.stats.dropped, shelf.given_up) == (1, 0, [])


def test_the_optimizer_waits_for_a_copy_under_way_and_the_wait_is_counted(
    shelf: Shelf, capturing: Callable[..., Capturer]
) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    capturer = capturing(model=model, optim=optimizer)
    shelf.gate.clear()
    shelf.page.order(1)
    capturer.step_done(1)
    train(model, optimizer, update=False)
    before = model[0].weight.detach().clone()
    stepping = threading.Thread(target=optimizer.step)
    stepping.start()
    stepping.join(timeout=0.2)
    assert stepping.is_alive(), "the optimizer waits"
    assert torch.equal(model[0].weight, before)
    shelf.gate.set()
    stepping.join()
    capturer.settle()
    assert not torch.equal(model[0].weight, before)
    assert torch.equal(shelf.filled_steps[1][0]["model/0.weight"], before)
    assert capturer.stats.stall_s > 0


def test_the_fence_stays_down_while_a_refusal_of_another_step_is_being_told(
    shelf: Shelf, capturing: Callable[..., Capturer]
) -> None:
    """The keeper may order the next capture before its answer to a refusal has come back."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    capturer = capturing(model=model, optim=optimizer)
    told, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        told.set()
        assert go_on.wait(PATIENCE_S)

    shelf.before_give_up_returns = hold
    shelf.page.order(1)
    capturer.step_done(2)  # passed: told on the capture thread
    assert told.wait(PATIENCE_S)
    shelf.gate.clear()
    shelf.page.order(3)
    capturer.step_done(3)
    go_on.set()
    train(model, optimizer, update=False)
    before = model[0].weight.detach().clone()
    stepping = threading.Thread(target=optimizer.step)
    stepping.start()
    stepping.join(timeout=0.2)
    assert stepping.is_alive(), "step 3 is not copied yet"
    shelf.gate.set()
    stepping.join()
    capturer.settle()
    assert torch.equal(shelf.filled_steps[3][0]["model/0.weight"], before)


@pytest.mark.parametrize("kind", ["channels_last", "transposed", "strided"])
def test_tensors_that_are_not_contiguous_are_captured_in_row_major_order(
    shelf: Shelf, capturing: Callable[..., Capturer], kind: str
) -> None:
    model = nn.Conv2d(8, 16, 3)
    if kind == "channels_last":
        model.to(memory_format=torch.channels_last)
    elif kind == "transposed":
        model.weight = nn.Parameter(torch.randn(3, 3, 8, 16).permute(3, 2, 0, 1))
    else:
        model.weight = nn.Parameter(torch.randn(32, 8, 3, 3)[::2])
    assert not model.weight.is_contiguous()
    optimizer = torch.optim.Adam(model.parameters())
    capturer = capturing(model=model, optim=optimizer)
    model(torch.randn(2, 8, 6, 6)).sum().backward()
    optimizer.step()
    assert same(capture(capturer, shelf, 1), now(capturer.state))
    assert capturer.stats.dropped == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_every_dtype_is_captured_bit_for_bit(shelf: Shelf, capturing: Callable[..., Capturer], dtype: torch.dtype) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(7, 5).to(dtype))
    module.register_buffer("mask", torch.rand(9) > 0.5)
    module.register_buffer("nothing", torch.empty(0, 3))
    capturer = capturing(model=module, optim=torch.optim.SGD(module.parameters(), lr=0.1))
    arrays = capture(capturer, shelf, 1)
    assert torch.equal(arrays["model/weight"].view(torch.uint8), module.weight.detach().view(torch.uint8))
    assert torch.equal(arrays["model/mask"], module.mask)


def test_nan_and_negative_zero_are_no_change(shelf: Shelf, capturing: Callable[..., Capturer]) -> None:
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.fill_(float("nan"))
        model.bias.fill_(-0.0)
    capturer = capturing(model=model, optim=torch.optim.SGD(model.parameters(), lr=0.1))
    assert capture(capturer, shelf, 1)["model/weight"].isnan().all()
    assert capturer.stats.dropped == 0


# -- what is dropped -------------------------------------------------------------------------------------------------------


def test_a_parameter_changed_outside_of_the_optimizer_drops_the_capture(
    shelf: Shelf, capturing: Callable[..., Capturer], caplog: pytest.LogCaptureFixture
) -> None:
    model = network()
    capturer = capturing(model=model, optim=torch.optim.SGD(model.parameters(), lr=0.1))
    heard: list[events.Event] = []
    unsubscribe = events.subscribe(heard.append)
    shelf.gate.clear()
    shelf.page.order(1)
    capturer.step_done(1)
    with torch.no_grad():
        model[3].weight[0, 0] += 1
    shelf.gate.set()
    capturer.settle()
    unsubscribe()
    assert shelf.filled_steps == {}
    assert shelf.given_up == [(1, "mutated")]
    assert (capturer.stats.dropped, capturer.stats.captured) == (1, 0)
    assert "model/3.weight changed while step 1 was captured" in caplog.text
    assert [(event.name, event.fields["array"]) for event in heard] == [("snapshot.dropped", "model/3.weight")]
    assert same(capture(capturer, shelf, 2), now(capturer.state)), "and the next one is taken"


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_sharded_parameter_changed_by_foreach_drops_the_capture_though_its_version_stands(
    shelf: Shelf, capturing: Callable[..., Capturer], one_process_group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(32, 32)
    fully_shard(model, mesh=one_process_group)
    optimizer = torch.optim.Adam(model.parameters())
    capturer = capturing(model=model, optim=optimizer)
    copy = capture_module._copy_bytes

    def copy_then_change(*args: Any) -> None:
        copy(*args)
        with torch.no_grad():
            torch._foreach_add_(list(model.parameters()), 1.0)

    monkeypatch.setattr(capture_module, "_copy_bytes", copy_then_change)
    shelf.page.order(1)
    capturer.step_done(1)
    capturer.settle()
    assert shelf.given_up == [(1, "mutated")]
    monkeypatch.undo()
    model(torch.randn(2, 32)).sum().backward()
    optimizer.step()
    assert same(capture(capturer, shelf, 2), now(capturer.state))


# -- changing structure ------------------------------------------------------------------------------------------------------


class Rebinding(torch.optim.Optimizer):
    """Makes its state tensors anew at every step, as functional optimizers do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            state["mean"] = state.get("mean", torch.zeros_like(param)) * 0.9 + param.grad
            param -= 0.1 * state["mean"]


def test_an_optimizer_that_rebinds_its_state_is_captured_as_it_is_now(shelf: Shelf, capturing: Callable[..., Capturer]) -> None:
    model = network()
    optimizer = Rebinding(model.parameters())
    capturer = capturing(model=model, optim=optimizer)
    for step in range(1, 5):
        train(model, optimizer)
        assert same(capture(capturer, shelf, step), now(capturer.state))
    assert capturer.stats.captured == 4


def test_an_optimizer_that_loaded_a_state_dict_is_captured_as_it_is_now(
    shelf: Shelf, capturing: Callable[..., Capturer]
) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    capturer = capturing(model=model, optim=optimizer)
    train(model, optimizer)
    kept = optimizer.state_dict()
    capture(capturer, shelf, 1)
    optimizer.load_state_dict(
        {
            "state": {k: {n: v.clone() for n, v in s.items()} for k, s in kept["state"].items()},
            "param_groups": kept["param_groups"],
        }
    )
    train(model, optimizer)
    assert same(capture(capturer, shelf, 2), now(capturer.state))


def test_a_replaced_layer_is_captured_as_it_is_now(shelf: Shelf, capturing: Callable[..., Capturer]) -> None:
    model = network()
    capturer = capturing(model=model)
    capture(capturer, shelf, 1)
    model[3] = nn.Linear(16, 4)
    assert same(capture(capturer, shelf, 2), now(capturer.state))
    model[0].weight = nn.Parameter(torch.randn(16, 8))
    assert same(capture(capturer, shelf, 3), now(capturer.state))


def test_the_plan_is_kept_while_the_structure_is_and_made_anew_when_it_changes(
    shelf: Shelf, capturing: Callable[..., Capturer]
) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    capturer = capturing(model=model, optim=optimizer)
    before = capturer.plan()
    train(model, optimizer)
    first = capturer.plan()
    assert first is not before, "Adam's state has appeared"
    assert len(first.parts) > len(before.parts)
    train(model, optimizer)
    assert capturer.plan() is first
    model.append(nn.Linear(4, 2))
    optimizer.add_param_group({"params": list(model[4].parameters())})
    train(model, optimizer)
    assert capturer.plan() is not first
    assert same(capture(capturer, shelf, 3), now(capturer.state))


def test_an_adapter_that_is_added_and_a_base_that_is_frozen_midway_are_captured_as_they_are_now(
    shelf: Shelf, capturing: Callable[..., Capturer]
) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    capturer = capturing(model=model, optim=optimizer)
    train(model, optimizer)
    capture(capturer, shelf, 1)
    model.requires_grad_(False)
    model.append(nn.Linear(4, 2))
    optimizer.add_param_group({"params": list(model[4].parameters()), "lr": 0.1})
    for step in (2, 3):
        train(model, optimizer)
        assert same(capture(capturer, shelf, step), now(capturer.state))
    assert capturer.stats.dropped == 0
    assert "optim/4.weight/exp_avg" in shelf.filled_steps[3][0]


def test_an_expert_that_gets_its_first_tokens_late_is_captured_with_its_state(
    shelf: Shelf, capturing: Callable[..., Capturer]
) -> None:
    experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
    optimizer = torch.optim.Adam(experts.parameters())
    capturer = capturing(experts=experts, optim=optimizer)
    for step, chosen in enumerate(([0], [0, 2], [1], [3], [2]), 1):
        for number in chosen:
            experts[number](torch.randn(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert same(capture(capturer, shelf, step), now(capturer.state))
    assert capturer.stats.captured == 5


@pytest.mark.parametrize("order", ["compile(DDP)", "DDP(compile)", "DDP"])
def test_ddp_is_recognised_on_either_side_of_compile(one_process_group: Any, order: str) -> None:
    model = network()
    if order == "compile(DDP)":
        wrapped: Any = torch.compile(DistributedDataParallel(model), backend="eager")
    else:
        wrapped = DistributedDataParallel(torch.compile(model, backend="eager") if "compile" in order else model)
    state = TrackedState({"model": wrapped, "optim": torch.optim.SGD(wrapped.parameters(), lr=0.1)})
    held = {item.name: item for item in state.held()}
    assert held["model/0.weight"].placement.expected == (0,), "the ranks that have to hold it are known"
    assert held.keys() == {f"model/{name}" for name in model.state_dict()}


def test_a_tensor_learning_rate_is_captured_and_comes_back_into_the_same_tensor(
    shelf: Shelf, capturing: Callable[..., Capturer]
) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.25), foreach=False)
    capturer = capturing(model=model, optim=optimizer)
    train(model, optimizer)
    capture(capturer, shelf, 1)
    texts = {"optim": capturer.state.texts()["optim"]}
    rate = optimizer.param_groups[0]["lr"]
    rate.fill_(0.5)
    capturer.state.load_texts(texts)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.25


class Growing:
    """A plain object whose tensor outgrows what is kept inside texts."""

    def __init__(self) -> None:
        self.rows = torch.zeros(2, 100)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = state["rows"]


def test_a_plain_object_that_grows_large_is_captured_whole_at_once(shelf: Shelf, capturing: Callable[..., Capturer]) -> None:
    model, buffer = network(), Growing()
    capturer = capturing(model=model, buffer=buffer)
    assert "buffer/rows" not in capture(capturer, shelf, 1)
    assert torch.equal(shelf.filled_steps[1][1]["buffer"]["rows"], buffer.rows)
    for step in (2, 3):
        buffer.rows = torch.randn(300 * step, 100)
        assert torch.equal(capture(capturer, shelf, step)["buffer/rows"], buffer.rows)


# -- what is given up ------------------------------------------------------------------------------------------------------


def test_a_passed_target_is_given_up_once(shelf: Shelf, capturing: Callable[..., Capturer]) -> None:
    capturer = capturing(model=network())
    shelf.page.order(3)
    for step in (1, 2, 4, 5, 6):
        capturer.step_done(step)
    capturer.settle()
    capture(capturer, shelf, 7)
    assert shelf.given_up == [(3, "passed")]
    assert list(shelf.filled_steps) == [7]
    assert shelf.page["completed"] == 7


def test_a_target_during_a_capture_is_given_up_as_busy(shelf: Shelf, capturing: Callable[..., Capturer]) -> None:
    capturer = capturing(model=network())
    shelf.gate.clear()
    shelf.page.order(1)
    capturer.step_done(1)
    shelf.page.order(2)
    capturer.step_done(2)
    shelf.gate.set()
    capturer.close()
    assert list(shelf.filled_steps) == [1]
    assert shelf.given_up == [(2, "busy")]
    assert (capturer.stats.captured, capturer.stats.skipped) == (1, 1)


def test_a_step_ordered_once_more_is_captured_once_more(shelf: Shelf, capturing: Callable[..., Capturer]) -> None:
    capturer = capturing(model=network())
    capture(capturer, shelf, 1)
    capturer.step_done(1)
    capturer.settle()
    assert capturer.stats.captured == 1
    capture(capturer, shelf, 1)
    assert capturer.stats.captured == 2


def test_a_snapshot_that_the_keeper_no_longer_wants_is_counted_as_skipped(
    shelf: Shelf, capturing: Callable[..., Capturer]
) -> None:
    capturer = capturing(model=network())
    shelf.takes = False
    capture(capturer, shelf, 1)
    assert (capturer.stats.captured, capturer.stats.skipped) == (0, 1)


class Failing(Growing):
    def state_dict(self) -> dict[str, Any]:
        if self.rows.numel() == 0:
            raise RuntimeError("my state is gone")
        return super().state_dict()


def test_a_snapshot_that_fails_never_fails_the_training(
    shelf: Shelf, capturing: Callable[..., Capturer], caplog: pytest.LogCaptureFixture
) -> None:
    model, item = network(), Failing()
    capturer = capturing(model=model, item=item)
    item.rows = torch.empty(0)
    with caplog.at_level(logging.ERROR):
        shelf.page.order(1)
        capturer.step_done(1)
    item.rows = torch.ones(3)
    capture(capturer, shelf, 2)
    assert shelf.given_up == [(1, "failed")]
    assert (capturer.stats.failed, capturer.stats.captured) == (1, 1)
    assert "my state is gone" in caplog.text


def test_every_fragment_of_a_plan_is_aligned_and_apart_from_the_others() -> None:
    state = TrackedState({"model": network()})
    plan = plan_capture(state.held(), 0)
    ends = 0
    for part in plan.parts:
        assert isinstance(part, Part)
        assert part.offset % 64 == 0
        assert part.offset >= ends
        assert source_of(part).nbytes == part.nbytes
        ends = part.offset + part.nbytes
    assert plan.nbytes >= ends
    assert plan.layout == plan_capture(state.held(), 0).layout
    assert plan.layout != plan_capture(state.held(), 1).layout


def test_lone_numbers_are_copied_together_by_type_and_each_lands_in_its_place() -> None:
    model = nn.Module()
    for place in range(4):
        model.register_buffer(f"count{place}", torch.tensor(10**15 + place))
        model.register_buffer(f"ratio{place}", torch.tensor(float("nan") if place == 2 else -0.0))
    model.register_buffer("row", torch.arange(3.0))
    plan = plan_capture(TrackedState({"model": model}).held(), 0)
    assert sorted(map(len, plan.eager)) == [1, 4, 4]
    shot = Shot(1, 0, plan, [(parts, copy_of(parts)) for parts in plan.eager], {}, {}, {}, None, {})
    copies = {part.held.name: copy for part, copy in shot.copies()}
    for name, tensor in model.named_buffers():
        copy = copies[f"model/{name}"]
        assert (copy.dtype, copy.shape) == (tensor.dtype, tensor.shape)
        assert copy.reshape(1, -1).view(torch.uint8).equal(tensor.reshape(1, -1).view(torch.uint8))
        assert copy.data_ptr() != tensor.data_ptr()
