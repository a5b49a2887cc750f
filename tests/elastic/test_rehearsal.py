"""A spare rehearses the optimizer's step: torch has then met all of its operations, and nothing of the script's was touched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from holdfast.elastic import rehearsal
from holdfast.elastic.rehearsal import rehearse


@pytest.fixture
def model() -> Iterator[nn.Module]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(6, 5))
    fully_shard(model)
    yield model
    dist.destroy_process_group()


def worked_out(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations that torch works out from now on, as each is met for the first time."""
    found: list[str] = []
    propagator = DTensor._op_dispatcher.sharding_propagator
    work_out = propagator.propagate_op_sharding_non_cached
    monkeypatch.setattr(
        propagator, "propagate_op_sharding_non_cached", lambda schema: found.append(str(schema.op)) or work_out(schema)
    )
    return found


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_that_was_rehearsed_has_nothing_new_in_it_and_the_same_result(
    model: nn.Module, kind: type[torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    optimizer = kind(model.parameters(), lr=0.125)
    optimizer.register_step_pre_hook(lambda *_: heard.append("hook"))
    before = [param.full_tensor().clone() for param in model.parameters()]
    drawn = torch.get_rng_state()
    rehearse([optimizer])
    assert heard == []
    assert not optimizer.state
    assert all(param.grad is None for param in model.parameters())
    assert all(torch.equal(param.full_tensor(), old) for param, old in zip(model.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), drawn)

    model(torch.ones(2, 6)).sum().backward()
    met = worked_out(monkeypatch)
    optimizer.step()
    assert met == []
    assert heard == ["hook"]


def test_what_cannot_be_rehearsed_is_left_alone(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(torch.optim.SGD):
        def step(self, closure: object = None) -> None:
            raise AssertionError("a class of the user's is not called")

    broken = torch.optim.SGD(model.parameters(), lr=0.1)
    broken.param_groups[0].pop("momentum")
    rehearse([Own(model.parameters()), torch.optim.SGD(nn.Linear(2, 2).parameters()), broken])
    assert "momentum" not in broken.param_groups[0]
    monkeypatch.setattr(rehearsal, "LARGEST_NBYTES", 1)
    assert list(rehearsal._stand_ins(model.parameters())) == []
