"""Policies, accounting, back-off, wrapping, and the places where weights hide."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its name in every PyTorch program)
from torch import nn

import holdfast
from holdfast.errors import ConfigError
from holdfast.kernels import (
    INT2,
    INT4,
    INT8,
    KEEP,
    KIVI_KEY4,
    ActPolicy,
    Compressor,
    QuantSpec,
    Rule,
    RunningSpec,
    compile_hooks,
    compress_activations,
    gradient_error,
    mixed_policy,
    wrap_activations,
)
from holdfast.kernels.activations.images import region_of
from holdfast.kernels.activations.policy import parse_bytes


class Block(nn.Module):
    def __init__(self, width: int = 64, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(64)
        self.lm_head = None if tied else nn.Linear(64, 96, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        logits = F.linear(x, self.embed.weight) if self.lm_head is None else self.lm_head(x)
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT()


TOKENS = torch.randint(0, 96, (2, 128), generator=torch.Generator().manual_seed(1))


def rows(compressor, op: str) -> list:
    return [row for row in compressor.report().rows if row.op == op]


def test_int8_halves_what_bf16_would_hold_with_error_of_the_size_of_bf16s_own(model: GPT) -> None:
    def amp() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(TOKENS)

    compressor = compress_activations(model, ActPolicy(min_bytes=4096))
    found = gradient_error(model, amp, compressor)
    exact = torch.autograd.grad(model(TOKENS), list(model.parameters()))
    rounded = torch.autograd.grad(amp(), list(model.parameters()))
    own = sum((a - b).square().sum() for a, b in zip(exact, rounded, strict=True)) ** 0.5
    own = own / sum(a.square().sum() for a in exact) ** 0.5
    assert found.loss_is_equal
    assert 0 < found.total < 1.5 * float(own)
    assert compressor.report().ratio < 0.6


def test_what_several_operations_save_is_stored_once(model: GPT) -> None:
    """Attention's output and the out layer's input are two views of one storage; gelu's input is the up layer's output."""
    compressor = compress_activations(model, ActPolicy(min_bytes=1024, attention=None))
    with compressor:
        loss = model(TOKENS)
    assert not rows(compressor, "linear") or all(row.module != "blocks.0.out" for row in rows(compressor, "linear"))
    attention = rows(compressor, "scaled_dot_product_attention")[0]
    activation_bytes = TOKENS.numel() * 64 * 4
    logsumexp_bytes = TOKENS.numel() * 2 * 4
    assert attention.bytes_before == 4 * activation_bytes + logsumexp_bytes
    assert compressor.report().aliases >= 2
    before = compressor.stats.live
    loss.backward()
    del loss
    assert before > 0
    assert compressor.stats.live == 0  # backward let everything go


def test_rebuilt_attention_counts_what_sdpa_would_have_saved(model: GPT) -> None:
    totals = {}
    for attention in (None, INT8):
        compressor = compress_activations(model, ActPolicy(min_bytes=1024, attention=attention))
        with compressor:
            loss = model(TOKENS)
        totals[attention] = compressor.report()
        loss.backward()
        del loss
        assert compressor.stats.live == 0
    assert totals[INT8].bytes_before == totals[None].bytes_before
    assert totals[INT8].bytes_after < totals[None].bytes_after  # no logsumexp


def test_rebuilt_attention_is_closer_than_an_exact_logsumexp(model: GPT) -> None:
    with torch.no_grad():
        for block in model.blocks:
            block.qkv.weight.mul_(4.0)  # sharp attention, as after training
    errors = [
        gradient_error(model, lambda: model(TOKENS), compress_activations(model, ActPolicy(min_bytes=1024, attention=a)))
        for a in (None, INT8)
    ]
    assert all(e.loss_is_equal for e in errors)
    assert errors[1].total < 0.7 * errors[0].total


def test_weights_are_answered_by_themselves_and_not_counted(model: GPT) -> None:
    compressor = compress_activations(model, ActPolicy(default=KEEP))
    with compressor:
        model(TOKENS).backward()
    report = compressor.report()
    assert report.weights > 10
    assert report.ratio == 1.0
    assert report.bytes_before < 3_000_000


@pytest.mark.parametrize("tied", [False, True])
def test_the_output_heads_input_stays_exact_whether_tied_or_named(tied: bool) -> None:
    torch.manual_seed(0)
    model = GPT(tied=tied)
    compressor = compress_activations(model, ActPolicy(min_bytes=1024))
    with compressor:
        model(TOKENS)
    (head,) = [row for row in compressor.report().rows if row.op == "output_head" or row.module == "lm_head"]
    assert head.bytes_after == head.bytes_before == TOKENS.numel() * 64 * 4


def test_rules_choose_by_module_and_operation(model: GPT) -> None:
    policy = ActPolicy(rules=(Rule(module="blocks.0.*", action=KEEP), Rule(op="gelu|layer_norm", action=INT4)), min_bytes=4096)
    compressor = compress_activations(model, policy)
    with compressor:
        model(TOKENS)
    by_place = {(row.module, row.op): row.bytes_after / row.bytes_before for row in compressor.report().rows}
    assert by_place["blocks.0.up", "linear"] == 1.0
    assert by_place["blocks.1", "gelu"] == (0.5 + 4 / 64) / 4
    assert by_place["blocks.1.down", "linear"] == (1 + 2 / 64) / 4
    assert by_place["blocks.1.norm1", "layer_norm"] < 0.2


def test_attention_never_goes_below_8_bits_beside_an_exact_logsumexp(model: GPT) -> None:
    policy = ActPolicy(default=INT4, min_bytes=4096, attention=None)
    assert policy.action("blocks.0", "scaled_dot_product_attention") == INT8
    assert policy.action("blocks.0", "linear") == INT4
    assert ActPolicy(rules=(Rule(action=INT4),)).action("x", "flash_attn_func") == INT8


def test_mixed_policy_is_smaller_than_int8_and_still_close(model: GPT) -> None:
    results = {}
    for name, policy in (("int8", ActPolicy(min_bytes=4096)), ("mixed", mixed_policy())):
        compressor = compress_activations(model, policy)
        error = gradient_error(model, lambda: model(TOKENS), compressor)
        results[name] = (error.total, compressor.report().ratio)
    assert results["mixed"][1] < results["int8"][1]
    assert results["int8"][0] < results["mixed"][0] < 0.1


def ratio_of_one_step(model: GPT, compressor: Compressor) -> float:
    compressor.stats.reset()
    with compressor:
        loss = model(TOKENS)
    loss.backward()
    return compressor.report().ratio


def test_a_module_whose_gradients_are_off_is_backed_off_until_it_is_exact(model: GPT) -> None:
    compressor = compress_activations(model, ActPolicy(default=INT4, min_bytes=4096), sample=1.0, max_error=1e-9)
    ratios = [ratio_of_one_step(model, compressor) for _ in range(4)]
    assert ratios[0] < ratios[1] < ratios[2] == ratios[3] == 1.0  # int4, int8, exact
    assert compressor.backed_off["blocks.0.up"] == 2


def test_only_the_modules_above_the_limit_are_backed_off(model: GPT) -> None:
    rules = (Rule(module="blocks.1.norm2", action=INT2),)  # what up reads was stored by norm2's output, at int8, under up
    compressor = compress_activations(model, ActPolicy(rules=rules, min_bytes=4096), sample=1.0, max_error=0.1)
    for _ in range(2):
        ratio_of_one_step(model, compressor)
    assert set(compressor.backed_off) == {"blocks.1.norm2"}


@pytest.mark.parametrize("amp", [False, True])
def test_sampled_gradient_error_is_what_the_operations_gradients_are_off_by(model: GPT, amp: bool) -> None:
    """Against a step in which the same operation alone is compressed: its weight's gradient then differs by nothing else."""
    policy = ActPolicy(rules=(Rule(module="blocks.1.down", action=INT4),), default=KEEP, min_bytes=4096)
    compressor = compress_activations(model, policy, sample=1.0)

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            return model(TOKENS)

    whole = gradient_error(model, loss, compressor)
    (row,) = [row for row in compressor.report().rows if row.gradient_error is not None]
    assert (row.module, row.op) == ("blocks.1.down", "linear")
    assert row.gradient_error == pytest.approx(whole.by_parameter["blocks.1.down.weight"], rel=0.02)


def test_probes_change_no_gradient_and_no_random_number(model: GPT) -> None:
    model.blocks[0].up = nn.Sequential(model.blocks[0].up, nn.Dropout(0.2), nn.ReLU(inplace=True))
    results = []
    for sample in (0.0, 1.0):
        torch.manual_seed(3)
        compressor = compress_activations(model, ActPolicy(min_bytes=1024), sample=sample)
        with compressor:
            loss = model(TOKENS)
        results.append([*torch.autograd.grad(loss, list(model.parameters())), torch.rand(3)])
        del loss
        assert compressor.stats.live == 0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    measured = [row.gradient_error for row in compressor.report().rows if row.gradient_error is not None]
    assert len(measured) > 8
    assert 0 < max(measured) < 0.05


def test_sampled_error_is_reported_and_about_half_a_percent_at_int8(model: GPT) -> None:
    compressor = compress_activations(model, ActPolicy(min_bytes=4096), sample=1.0)
    with compressor:
        model(TOKENS)
    errors = [row.error for row in compressor.report().rows if row.error is not None]
    assert len(errors) > 5
    assert all(0.001 < error < 0.01 for error in errors)
    assert "blocks.0.up" in str(compressor.report())


def test_a_wrapped_model_compresses_every_call_until_unwrapped(model: GPT) -> None:
    exact = torch.autograd.grad(model(TOKENS), list(model.parameters()))
    compressor = wrap_activations(model, ActPolicy(min_bytes=4096))
    wrapped = torch.autograd.grad(model(TOKENS), list(model.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(exact, wrapped, strict=True))
    with pytest.raises(IndexError):
        model(torch.tensor([[1000]]))
    compressor.unwrap()
    again = torch.autograd.grad(model(TOKENS), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(exact, again, strict=True))


def test_running_ranges_can_be_the_scheme(model: GPT) -> None:
    policy = ActPolicy(default=RunningSpec(heads=2), min_bytes=4096)
    compressor = compress_activations(model, policy)
    first = gradient_error(model, lambda: model(TOKENS), compressor)
    assert first.loss_is_equal
    assert 0 < first.total < 0.1


def test_running_ranges_are_those_of_single_heads_in_written_out_attention() -> None:
    """A head 1000 times smaller than its neighbour would be one code wide in a common range."""
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor([1.0, 1e-3])[:, None, None]
    leaf = (torch.randn(3, 2, 64, 32, generator=generator) * size).requires_grad_()
    weight = torch.randn(64, 64, generator=generator)

    def product() -> torch.Tensor:
        q = leaf * 1.0
        return ((q @ q.transpose(-1, -2)) * weight).sum()

    exact = torch.autograd.grad(product(), leaf)[0]
    with compress_activations(nn.Identity(), ActPolicy(default=RunningSpec(heads=2), min_bytes=1024)):
        out = product()
    found = torch.autograd.grad(out, leaf)[0]
    errors = (found - exact).square().sum(dim=(0, 2, 3)).sqrt() / exact.square().sum(dim=(0, 2, 3)).sqrt()
    assert float(errors.max()) < 0.02


def test_stochastic_rounding_replays_bit_for_bit_from_its_seed(model: GPT) -> None:
    policy = ActPolicy(default=QuantSpec(kind="int4", symmetric=False, rounding="stochastic"), min_bytes=4096)

    def gradients(seed: int) -> list[torch.Tensor]:
        with compress_activations(model, policy, seed=seed):
            loss = model(TOKENS)
        return list(torch.autograd.grad(loss, list(model.parameters())))

    first, replay, other = gradients(1), gradients(1), gradients(2)
    assert all(torch.equal(a, b) for a, b in zip(first, replay, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_an_exception_in_forward_leaves_no_hook_behind(model: GPT) -> None:
    compressor = compress_activations(model, ActPolicy(min_bytes=4096))
    with pytest.raises(IndexError), compressor:
        model(torch.tensor([[1000]]))
    packs = compressor.stats.tallies.copy()
    model(TOKENS).backward()
    assert compressor.stats.tallies == packs
    with compressor:
        model(TOKENS)
    assert {row.module for row in compressor.report().rows} >= {"blocks.0.up", "blocks.1.down"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch while it compiles
@pytest.mark.parametrize("spec", [INT8, INT4], ids=["int8", "int4"])
def test_compiled_hooks_pack_inside_the_compiled_graphs(model: GPT, spec: QuantSpec) -> None:
    torch._dynamo.reset()
    exact_loss = model(TOKENS)
    exact = torch.autograd.grad(exact_loss, list(model.parameters()))
    compiled = torch.compile(model, backend="aot_eager")
    with torch.autograd.graph.saved_tensors_hooks(*compile_hooks(ActPolicy(default=spec, min_bytes=4096))):
        loss = compiled(TOKENS)
    assert torch.allclose(loss, exact_loss, rtol=1e-6)
    saved = [t for t in held_by(loss) if not any(t is p for p in model.parameters())]
    assert any(t.dtype == torch.uint8 for t in saved)
    found = torch.autograd.grad(loss, list(model.parameters()))
    error = sum((a - b).square().sum() for a, b in zip(exact, found, strict=True)) / sum(a.square().sum() for a in exact)
    assert 1e-4 < float(error.sqrt()) < 0.15
    torch._dynamo.reset()


def held_by(loss: torch.Tensor) -> list[torch.Tensor]:
    """What the compiled backward of `loss` has saved."""
    return list(loss.grad_fn.saved_tensors)  # type: ignore[union-attr]


def test_fsdp2_weights_are_recognised_and_given_back() -> None:
    """Two processes, bfloat16 mixed precision: packing an unsharded weight would keep it alive and quantize it."""
    if not torch.distributed.is_available():
        pytest.skip("torch is built without distributed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    root = str(Path(holdfast.__file__).parents[1])
    common = {**os.environ, "PYTHONPATH": root, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fsdp2_worker.py"))],
            env={**common, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=100)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)


def test_regions_of_views_of_the_same_memory_are_equal() -> None:
    x = torch.zeros(4, 6, 8)
    same = [x, x.view(-1), x.permute(2, 0, 1), x.view(24, 8).t(), x[None], x.view(4, 6, 8, 1).expand(4, 6, 8, 5)]
    assert {region_of(t) for t in same} == {((192, 1),)}
    assert region_of(x[:, :, :4]) == ((24, 8), (4, 1))
    assert region_of(torch.zeros(10).as_strided((4, 4), (2, 1))) is None
    assert region_of(torch.tensor(1.0)) == ((1, 1),)


@pytest.mark.parametrize(("size", "expected"), [("256KiB", 262144), (77, 77), ("1.5 MB", 1_500_000), ("2gib", 2**31)])
def test_sizes_are_read_as_people_write_them(size: int | str, expected: int) -> None:
    assert parse_bytes(size) == expected


def test_settings_that_make_no_sense_are_refused(model: GPT) -> None:
    with pytest.raises(ConfigError, match="a size is"):
        ActPolicy(min_bytes="many")
    with pytest.raises(ConfigError, match="offload must be"):
        compress_activations(model, offload="disk")
    with pytest.raises(ConfigError, match="between 0 and 1"):
        compress_activations(model, sample=2.0)
    with pytest.raises(ConfigError, match="needs sample"):
        compress_activations(model, max_error=0.1)
    with pytest.raises(ConfigError, match="without axis"), compress_activations(model, ActPolicy(default=KIVI_KEY4)):
        model(TOKENS)
    with pytest.raises(ConfigError, match="without rules"):
        compile_hooks(ActPolicy(rules=(Rule(action=KEEP),)))
    with pytest.raises(ConfigError, match="without axis"):
        compile_hooks(ActPolicy(default=KIVI_KEY4))
