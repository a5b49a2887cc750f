"""Tied weights are stored once by `ckpt.save`, and loaded whichever of their names a checkpoint knows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from holdfast import ckpt

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 64)
        self.head = nn.Linear(64, 300, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens))


def trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(8)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def test_a_tied_weight_is_stored_once_and_fills_both_names(tmp_path):
    model, optimizer = trained(0)
    place = ckpt.save({"model": model, "optim": optimizer}, tmp_path / "run", step=1)
    assert [name for name in ckpt.open_checkpoint(str(place)).specs if name.startswith("model/")] == ["model/embed.weight"]
    fresh, other = trained(1)
    ckpt.load({"model": fresh, "optim": other}, tmp_path / "run")
    assert torch.equal(fresh.embed.weight, model.embed.weight)
    assert fresh.head.weight is fresh.embed.weight
    mine, theirs = (next(iter(o.state.values())) for o in (optimizer, other))
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("name", ["embed", "head"])
def test_a_tied_weight_is_found_under_either_name(tmp_path, name):
    model, _ = trained(0)
    ckpt.save({"model": {f"{name}.weight": model.embed.weight.detach()}}, tmp_path / "run", step=1)
    fresh, _ = trained(1)
    ckpt.load({"model": fresh}, tmp_path / "run")
    assert torch.equal(fresh.head.weight, model.embed.weight)
