"""Tied weights are loaded whichever of their names a checkpoint knows: keepers and importers store them once."""

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


def made(seed: int) -> Tied:
    torch.manual_seed(seed)
    return Tied()


@pytest.mark.parametrize("name", ["embed", "head"])
def test_a_tied_weight_is_found_under_either_name(tmp_path, name):
    model = made(0)
    ckpt.save({"model": {f"{name}.weight": model.embed.weight.detach()}}, tmp_path / "run", step=1)
    fresh = made(1)
    ckpt.load({"model": fresh}, tmp_path / "run")
    assert torch.equal(fresh.head.weight, model.embed.weight)
    assert fresh.head.weight is fresh.embed.weight
