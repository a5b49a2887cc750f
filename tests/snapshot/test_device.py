"""Captures from a GPU: the state at the boundary, in pinned slot memory, and a CPU that never waits for the device."""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from holdfast.arrays import FragmentTable
from holdfast.objects import decode_object
from holdfast.snapshot.capture import Capturer
from holdfast.snapshot.capture_plan import slot_view
from holdfast.snapshot.device import DeviceCopies
from holdfast.snapshot.fence import Fence
from holdfast.snapshot.state import TrackedState

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


class Mapped:
    """A keeper's side in small, with slots as trainers have them: mappings, which are replaced by larger ones."""

    def __init__(self) -> None:
        self.page: Any = Page()
        self.maps: dict[int, mmap.mmap] = {}
        self.before_unmap: Callable[[memoryview], None] = lambda body: None
        self.filled_steps: dict[int, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {}
        self.given_up: list[tuple[int, str]] = []
        self.gate = threading.Event()
        self.gate.set()

    def body(self, index: int, nbytes: int) -> memoryview:
        assert self.gate.wait(60)
        known = self.maps.get(index)
        if known is None or len(known) < nbytes:
            if known is not None:
                self.before_unmap(memoryview(known))
            self.maps[index] = mmap.mmap(-1, max(nbytes, 4096))
        return memoryview(self.maps[index])

    def filled(self, step: int, index: int, nbytes: int, layout: str, table: FragmentTable, objects: dict[str, str]) -> bool:
        body = memoryview(self.maps[index])
        arrays = {
            row.array: slot_view(body, row.slot_offset, row.nbytes, getattr(torch, row.dtype), row.shape).clone()
            for row in table
        }
        self.filled_steps[step] = arrays, {name: decode_object(text) for name, text in objects.items()}
        return True

    def give_up(self, step: int, reason: str) -> None:
        self.given_up.append((step, reason))


class Page(dict[str, int]):
    target = (0, 0, 0)

    def __init__(self) -> None:
        super().__init__(look=0)

    def order(self, step: int) -> None:
        self.target = step, step % 2, self.target[2] + 1


@pytest.fixture
def shelf() -> Iterator[Mapped]:
    made = Mapped()
    yield made
    made.gate.set()


@pytest.fixture
def capturing(shelf: Mapped) -> Iterator[Callable[..., Capturer]]:
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


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 16)).cuda()


def train(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    model(torch.randn(8, 64, device="cuda")).square().mean().backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


def now(state: TrackedState) -> dict[str, torch.Tensor]:
    torch.cuda.synchronize()
    return {item.name: item.local.cpu().clone() for item in state.held()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


KINDS: dict[str, dict[str, Any]] = {
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable, tensor lr": {"capturable": True, "lr": torch.tensor(0.01)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_capture_is_the_state_at_the_boundary_whatever_the_device_does_next(
    shelf: Mapped, capturing: Callable[..., Capturer], kind: str
) -> None:
    settings = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in KINDS[kind].items()}
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), **settings)
    capturer = capturing(model=model, optim=optimizer)
    train(model, optimizer)
    for step in range(1, 6):
        expected = now(capturer.state)
        shelf.page.order(step)
        capturer.step_done(step)
        for _ in range(3):
            train(model, optimizer)
        capturer.settle()
        assert same(shelf.filled_steps[step][0], expected)
    assert (capturer.stats.captured, capturer.stats.dropped) == (5, 0)


def test_the_cpu_runs_ahead_of_a_device_that_has_not_come_to_the_capture_yet(
    shelf: Mapped, capturing: Callable[..., Capturer]
) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    capturer = capturing(model=model, optim=optimizer)
    train(model, optimizer)
    shelf.page.order(1)
    capturer.step_done(1)
    capturer.settle()  # plan, stream and pinned memory are there
    expected = now(capturer.state)
    train(model, None)
    torch.cuda.synchronize()
    torch.cuda._sleep(10_000_000_000)  # some seconds of work before the boundary
    behind = torch.cuda.Event()
    behind.record()
    shelf.page.order(2)
    capturer.step_done(2)
    optimizer.step()
    assert not behind.query(), "step_done and the fence have both returned, and the device is still before them"
    capturer.settle()
    arrays = shelf.filled_steps[2][0]
    assert torch.equal(arrays["model/0.weight"], expected["model/0.weight"])
    assert not torch.equal(arrays["model/0.weight"], now(capturer.state)["model/0.weight"])


def test_a_parameter_changed_outside_of_the_optimizer_drops_the_capture(
    shelf: Mapped, capturing: Callable[..., Capturer]
) -> None:
    model = network()
    capturer = capturing(model=model, optim=torch.optim.SGD(model.parameters(), lr=0.1))
    shelf.gate.clear()
    shelf.page.order(1)
    capturer.step_done(1)
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    shelf.gate.set()
    capturer.settle()
    assert shelf.given_up == [(1, "mutated")]
    shelf.page.order(2)
    capturer.step_done(2)
    capturer.settle()
    assert same(shelf.filled_steps[2][0], now(capturer.state))


def test_a_slot_is_pinned_while_it_is_mapped_and_a_larger_one_after_it(
    shelf: Mapped, capturing: Callable[..., Capturer], caplog: pytest.LogCaptureFixture
) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    capturer = capturing(model=model, optim=optimizer)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 7):
            shelf.page.order(step)
            capturer.step_done(step)
            capturer.settle()
            body = memoryview(shelf.maps[step % 2])
            assert torch.frombuffer(body, dtype=torch.uint8).is_pinned()
            assert same(shelf.filled_steps[step][0], now(capturer.state))
            train(model, optimizer)  # after the first step Adam's state has appeared, and the slots are too small
    assert caplog.text == ""


def test_state_that_a_user_has_offloaded_to_the_cpu_is_captured_beside_that_on_the_gpu(
    shelf: Mapped, capturing: Callable[..., Capturer]
) -> None:
    model, offloaded = network(), nn.Linear(32, 32)
    optimizer = torch.optim.Adam([*model.parameters(), *offloaded.parameters()])
    capturer = capturing(model=model, offloaded=offloaded, optim=optimizer)
    offloaded(torch.randn(2, 32)).sum().backward()
    train(model, optimizer)
    expected = now(capturer.state)
    shelf.page.order(1)
    capturer.step_done(1)
    offloaded(torch.randn(2, 32)).sum().backward()
    train(model, optimizer)
    capturer.settle()
    assert same(shelf.filled_steps[1][0], expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_copies_run_on_the_device_of_the_rank_and_not_on_the_first() -> None:
    copies = DeviceCopies()
    assert copies.mark([torch.ones(3, device="cuda:1")]) is not None
    assert copies._stream is not None
    assert copies._stream.device == torch.device("cuda:1")
