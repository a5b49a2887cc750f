"""Policies fitted to a byte budget, and plans by tokens carried out."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its name in every PyTorch program)
from torch import nn

from holdfast.errors import ConfigError
from holdfast.kernels import KEEP, OFFLOAD, ActPolicy, compress_activations, fit_policy, gradient_error
from holdfast.kernels.sequences import Choice, TokenWise, measure_treatments, solve_budget


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(96, 64), nn.Linear(64, 96)
        self.norm, self.qkv = nn.LayerNorm(64), nn.Linear(64, 192)
        self.mlp = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, 2, 32).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d)
        return F.cross_entropy(self.lm_head(x + self.mlp(x)).flatten(0, 1), tokens.flatten())


TOKENS = torch.randint(0, 96, (2, 128), generator=torch.Generator().manual_seed(1))
BASE = ActPolicy(min_bytes=4096)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def exact_bytes(model: Model) -> int:
    compressor = compress_activations(model, ActPolicy(default=KEEP))
    gradient_error(model, lambda: model(TOKENS), compressor)
    return compressor.report().bytes_after


def test_a_fitted_policy_keeps_the_budget_and_a_smaller_budget_costs_more_error(model: Model) -> None:
    whole = exact_bytes(model)
    fits = [fit_policy(model, lambda: model(TOKENS), int(share * whole), base=BASE) for share in (1.0, 0.7, 0.45)]
    for fit, share in zip(fits, (1.0, 0.7, 0.45), strict=True):
        assert fit.nbytes <= share * whole
        again = gradient_error(model, lambda: model(TOKENS), compress_activations(model, fit.policy))
        assert again.total == fit.error
    assert fits[0].error == 0.0
    assert "linear" in str(fits[1])
    assert {choice.option for choice in fits[1].plan.choices} <= {"exact", "int8", "int4"}
    assert fits[0].error < fits[1].error < fits[2].error < 0.2


def test_a_fitted_policy_is_not_worse_than_the_default_at_the_bytes_of_the_default(model: Model) -> None:
    compressor = compress_activations(model, BASE)
    error = gradient_error(model, lambda: model(TOKENS), compressor).total
    fit = fit_policy(model, lambda: model(TOKENS), compressor.report().bytes_after, base=BASE)
    assert fit.nbytes <= compressor.report().bytes_after
    assert fit.error <= 1.05 * error


def test_offloading_fits_any_budget_without_error(model: Model) -> None:
    """What stays is what must: the loss, the head's input, the statistics."""
    fit = fit_policy(model, lambda: model(TOKENS), int(0.45 * exact_bytes(model)), candidates=(OFFLOAD,), base=BASE)
    assert fit.error == 0.0
    compressor = compress_activations(model, fit.policy)
    with compressor:
        model(TOKENS).backward()
    report = compressor.report()
    assert report.bytes_after - report.on_host == fit.nbytes
    assert report.on_host > 0


def test_a_budget_that_nothing_fits_is_refused(model: Model) -> None:
    with pytest.raises(ConfigError, match="the budget is 1000"):
        fit_policy(model, lambda: model(TOKENS), 1000)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))


def gradients(function, module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=x.dtype)
    return list(torch.autograd.grad((function(x) * weight).sum(), [x, *module.parameters()]))


def test_kept_offloaded_and_recomputed_tokens_give_the_gradient_of_the_whole() -> None:
    module = mlp().double()
    x = torch.randn(2, 300, 32, dtype=torch.float64, requires_grad=True)
    choices = [
        Choice("mlp", "keep", 10),
        Choice("mlp", "recompute", 15),
        Choice("mlp", "offload", 0),
        Choice("mlp", "offload", 5),
    ]
    cut = TokenWise(module, choices)
    assert torch.allclose(cut(x), module(x), rtol=1e-12)
    for a, b in zip(gradients(cut, module, x), gradients(module, module, x), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_only_the_packed_tokens_differ() -> None:
    module = mlp()
    x = torch.randn(1, 512, 32, requires_grad=True)
    cut = TokenWise(module, [Choice("mlp", "keep", 256), Choice("mlp", "int8", 256)])
    exact, found = gradients(module, module, x)[0], gradients(cut, module, x)[0]
    assert torch.allclose(found[:, :256], exact[:, :256], rtol=1e-5, atol=1e-6)
    error = float((found - exact)[:, 256:].norm() / exact[:, 256:].norm())
    assert 1e-5 < error < 0.01
    assert cut.savers["int8"].report().ratio < 0.3


def test_a_measured_plan_is_carried_out_within_its_budget() -> None:
    """Measured on 512 tokens, solved for 2048, and what 2048 tokens then hold is what the plan says."""
    module, ticks = mlp(), itertools.count()
    sample = torch.randn(1, 512, 32)
    options = ("keep", "int8", "recompute")
    group = measure_treatments("mlp", module, sample, tokens=2048, options=options, rounds=1, clock=lambda: float(next(ticks)))
    keep, int8, recompute = group.options
    assert keep.nbytes > 3 * int8.nbytes
    assert recompute.nbytes == 32 * 4
    plan = solve_budget([group], 2048 * (keep.nbytes + recompute.nbytes) / 2)
    cut = TokenWise(module, plan.choices)
    cut(torch.randn(1, 2048, 32, requires_grad=True))
    recomputed = sum(c.tokens for c in plan.choices if c.option == "recompute")
    held = sum(saver.report().bytes_after for saver in cut.savers.values()) + recomputed * 32 * 4
    assert held <= plan.nbytes * 1.01


def test_plans_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="no treatment is called"):
        TokenWise(mlp(), [Choice("mlp", "int3", 4)])
    with pytest.raises(ConfigError, match="at least one choice"):
        TokenWise(mlp(), [Choice("mlp", "keep", 0)])


def test_an_offloaded_tensor_changed_in_place_is_reported() -> None:
    model = nn.Identity()
    x = torch.randn(64, 256, requires_grad=True)
    with compress_activations(model, ActPolicy(default=OFFLOAD)):
        y = x * 1.0
        z = y.sin()
        view = y.view(-1)
    del y
    view.detach().add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()
