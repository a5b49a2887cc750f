"""Chunked backward against the gradient of the whole sequence, the KV store, the budget solver."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its name in every PyTorch program)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from holdfast.errors import ConfigError
from holdfast.kernels import (
    INT8,
    KIVI_KEY4,
    KIVI_VALUE4,
    MXINT8,
    ActPolicy,
    QuantSpec,
    Rule,
    compress_activations,
    dequantize,
    quantize,
)
from holdfast.kernels.plan import offload_cost
from holdfast.kernels.sequences import (
    ChunkContext,
    ChunkKVStore,
    GearSpec,
    Group,
    KVSpec,
    Option,
    chunked_backward,
    solve_budget,
)
from holdfast.kernels.sequences.gear import dequantize_gear, quantize_gear

EXACT = KVSpec(key=None, value=None)


class Layer(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.qkv, self.out, self.norm = nn.Linear(32, 96), nn.Linear(32, 32), nn.LayerNorm(32)

    def forward(self, x: torch.Tensor, context: ChunkContext | None) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, 2, 16).permute(2, 0, 3, 1, 4)
        if context is None:
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            a = context.attention(self.number, q, k, v)
        return x + self.out(a.transpose(1, 2).reshape(b, t, 32))


class Model(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(i) for i in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, context: ChunkContext | None = None) -> torch.Tensor:
        for layer in self.layers:
            x = self.dropout(layer(x, context))
        return x.square().sum()


def setup(dtype: torch.dtype = torch.float64, **kwargs: Any) -> tuple[Model, torch.Tensor]:
    torch.manual_seed(0)
    return Model(**kwargs).to(dtype), torch.randn(2, 96, 32, dtype=dtype)


def gradient(model: Model) -> torch.Tensor:
    found = torch.cat([p.grad.reshape(-1) for p in model.parameters()])  # type: ignore[union-attr]
    model.zero_grad()
    return found


def exact_gradient(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    loss = model(x)
    loss.backward()
    return loss.detach(), gradient(model)


@pytest.mark.parametrize("n_chunks", [1, 2, 3, 6])
def test_exact_mode_gives_the_gradient_of_the_whole_sequence(n_chunks: int) -> None:
    model, x = setup()
    loss, exact = exact_gradient(model, x)
    result = chunked_backward(model, x.chunk(n_chunks, dim=1), ChunkKVStore(EXACT), accumulate_in=torch.float64)
    assert torch.allclose(result.loss, loss, rtol=1e-12)
    assert float((gradient(model) - exact).norm() / exact.norm()) < 1e-12


def test_chunks_may_differ_in_length() -> None:
    model, x = setup()
    _, exact = exact_gradient(model, x)
    chunked_backward(model, x.split([10, 50, 1, 35], dim=1), ChunkKVStore(EXACT), accumulate_in=torch.float64)
    assert float((gradient(model) - exact).norm() / exact.norm()) < 1e-12


@pytest.mark.parametrize(
    ("spec", "limit", "ratio"),
    [(KVSpec(key=INT8, value=INT8), 0.01, 0.27), (KVSpec(), 0.1, 0.17), (KVSpec(host=True), 0.1, 0.17)],
)
def test_packed_past_costs_little_gradient(spec: KVSpec, limit: float, ratio: float) -> None:
    model, x = setup(torch.float32)
    torch.manual_seed(1)
    x = torch.randn(2, 320, 32)
    _, exact = exact_gradient(model, x)
    store = ChunkKVStore(spec)
    seen = []
    result = chunked_backward(lambda c, ctx: (model(c, ctx), seen.append(store.nbytes))[0], x.chunk(5, dim=1), store)
    error = float((gradient(model) - exact).norm() / exact.norm())
    assert 1e-5 < error < limit
    newest = result.kv_exact_bytes / 5
    assert result.kv_bytes - newest <= ratio * (result.kv_exact_bytes - newest)


def saved_bytes_by_chunk(model: nn.Module, chunks: Any, store: ChunkKVStore) -> list[int]:
    """What autograd saves for each chunk, in the order of the backward sweep."""
    saved: list[int] = []

    def loss_of(chunk: torch.Tensor, context: ChunkContext) -> torch.Tensor:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.nbytes), t)[1], lambda t: t):
            loss = model(chunk, context)
        saved.append(sum(sizes))
        return loss

    chunked_backward(loss_of, chunks, store)
    return saved[len(chunks) :]


def test_what_a_chunk_saves_does_not_grow_with_its_past() -> None:
    """Restored K and V of every layer, held until backward, would undo their packing."""
    model, x = setup(torch.float32)
    last, *_, first = saved_bytes_by_chunk(model, x.chunk(6, dim=1), ChunkKVStore())
    assert last == first


class Extending(Layer):
    """Attention that is not SDPA's own: it asks for K and V, and grows with its past."""

    def forward(self, x: torch.Tensor, context: ChunkContext | None) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, 2, 16).permute(2, 0, 3, 1, 4)
        if context is not None:
            k, v = context.extend(self.number, k, v)
        future = torch.ones(t, k.shape[2], dtype=torch.bool).triu(k.shape[2] - t + 1)
        a = (q @ k.transpose(-1, -2)).masked_fill(future, -1e9).softmax(-1) @ v
        return x + self.out(a.transpose(1, 2).reshape(b, t, 32))


def test_attention_of_another_kind_gets_keys_and_values_and_the_exact_gradient() -> None:
    model, x = setup()
    model.layers = nn.ModuleList(Extending(i) for i in range(3)).double()
    _, exact = exact_gradient(model, x)
    result = chunked_backward(model, x.chunk(4, dim=1), ChunkKVStore(EXACT), accumulate_in=torch.float64)
    assert float((gradient(model) - exact).norm() / exact.norm()) < 1e-12
    assert result.gradient_bytes == result.kv_exact_bytes * 3 // 4


def test_a_compressor_packs_what_a_chunks_attention_saves() -> None:
    model, x = setup(torch.float32)
    x = torch.randn(2, 256, 32)
    _, exact = exact_gradient(model, x)
    compressor = compress_activations(model, ActPolicy(min_bytes=1024, rules=(Rule(op="chunk_attention", action=MXINT8),)))

    def loss_of(chunk: torch.Tensor, context: ChunkContext) -> torch.Tensor:
        with compressor:
            return model(chunk, context)

    chunked_backward(loss_of, x.chunk(2, dim=1), ChunkKVStore(EXACT))
    assert 1e-5 < float((gradient(model) - exact).norm() / exact.norm()) < 0.02
    rows = [row for row in compressor.report().rows if row.op == "chunk_attention"]
    assert len(rows) == 3
    assert all(row.bytes_after * 128 == row.bytes_before * 33 for row in rows)  # 8 bits and a byte per 32 elements


def test_dropout_inside_attention_is_the_same_in_backward() -> None:
    leaves = [torch.randn(1, 2, 24, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    torch.manual_seed(3)
    F.scaled_dot_product_attention(*leaves, is_causal=True, dropout_p=0.4).sum().backward()
    exact = [t.grad.clone() for t in leaves]
    for t in leaves:
        t.grad = None
    torch.manual_seed(3)
    chunked_backward(lambda c, ctx: ctx.attention(0, *c, dropout_p=0.4).sum(), [leaves])
    assert all(torch.allclose(t.grad, e) for t, e in zip(leaves, exact, strict=True))


def test_random_numbers_are_the_same_in_both_sweeps_and_the_generator_moves_on_once() -> None:
    model, x = setup(dropout=0.3)
    torch.manual_seed(3)
    result = chunked_backward(model, [x], ChunkKVStore(EXACT))
    found, after = gradient(model), torch.rand(1)
    torch.manual_seed(3)
    loss, exact = exact_gradient(model, x)
    assert torch.equal(torch.rand(1), after)
    assert torch.allclose(result.loss, loss)
    assert torch.allclose(found, exact)


def test_sparse_mode_is_unbiased() -> None:
    """The mean over every possible selection, weighted by its probability, is the exact gradient."""
    model, x = setup()
    _, exact = exact_gradient(model, x)
    keep, chunks = 0.6, x.chunk(4, dim=1)
    mean, spread = torch.zeros_like(exact), 0.0
    for picked in itertools.product([False, True], repeat=4):
        selected = [i for i in range(4) if picked[i]]
        chunked_backward(model, chunks, ChunkKVStore(EXACT), keep=keep, selected=selected, accumulate_in=torch.float64)
        if not selected:
            continue
        found = gradient(model)
        probability = keep ** len(selected) * (1 - keep) ** (4 - len(selected))
        mean += probability * found
        spread = max(spread, float((found - exact).norm() / exact.norm()))
    assert float((mean - exact).norm() / exact.norm()) < 1e-12
    assert spread > 0.1  # a single draw is not exact: the mean had something to average


def test_sparse_mode_recomputes_only_what_it_drew() -> None:
    model, x = setup(torch.float32)
    calls: list[int] = []

    def loss_of(chunk: torch.Tensor, context: ChunkContext) -> torch.Tensor:
        calls.append(context.chunk)
        return model(chunk, context)

    result = chunked_backward(loss_of, x.chunk(6, dim=1), keep=0.5, seed=2)
    assert calls == [*range(6), *reversed(result.backpropagated)]
    assert 0 < len(result.backpropagated) < 6


def test_bad_arguments_are_refused() -> None:
    model, x = setup()
    with pytest.raises(ConfigError, match="at least one chunk"):
        chunked_backward(model, [])
    with pytest.raises(ConfigError, match=r"in \(0, 1\]"):
        chunked_backward(model, [x], keep=0.0)
    with pytest.raises(ConfigError, match="there are 1"):
        chunked_backward(model, [x], selected=[3])
    with pytest.raises(ConfigError, match="asked twice"):
        chunked_backward(lambda c, ctx: model(c, ctx) + model(c, ctx), [x])
    with pytest.raises(ConfigError, match=r"\(batch, heads, tokens, channels\)"):
        ChunkKVStore().append(0, torch.zeros(3, 4), torch.zeros(3, 4))
    with pytest.raises(ConfigError, match="needs key and value"):
        KVSpec(key=None, gear=GearSpec())


def test_the_newest_chunk_is_exact_and_older_ones_are_packed() -> None:
    store = ChunkKVStore()
    k, v = torch.randn(1, 2, 64, 64), torch.randn(1, 2, 64, 64)
    store.append("a", k, v)
    assert store.nbytes == k.nbytes + v.nbytes
    store.append("a", k + 1, v + 1)
    packed = quantize(k, KIVI_KEY4).nbytes * 2
    assert store.nbytes == k.nbytes + v.nbytes + packed
    past = store.past("a", 1)
    assert past is not None
    assert torch.equal(past[0], dequantize(quantize(k, KIVI_KEY4)))
    assert store.past("a", 0) is None
    store.seal()
    assert store.nbytes == 2 * packed
    store.drop(1)
    assert store.chunks("a") == 1


def test_low_rank_and_outliers_take_error_out_of_int4() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 256, 64) + 8 * torch.randn(1, 4, 256, 1) @ torch.randn(1, 4, 1, 64)
    x[0, 0, 10, 3], x[0, 2, 100, 60] = 500.0, -700.0
    plain = float((dequantize(quantize(x, KIVI_KEY4)) - x).norm())
    packed = quantize_gear(x, KIVI_KEY4, GearSpec(rank=4, outliers=0.01))
    back = dequantize_gear(packed)
    assert float((back - x).norm()) < 0.6 * plain
    assert back[0, 0, 10, 3] == 500.0
    assert torch.equal(back, dequantize_gear(quantize_gear(x, KIVI_KEY4, GearSpec(rank=4, outliers=0.01))))
    assert packed.nbytes < 0.3 * x.nbytes


@pytest.mark.parametrize("kind", [MXINT8, QuantSpec(kind="int4", block=32)], ids=lambda spec: spec.kind)
def test_sorted_channels_take_error_out_of_block_formats_and_come_back_in_place(kind: QuantSpec) -> None:
    torch.manual_seed(0)
    k, v = torch.randn(2, 4, 128, 64), torch.randn(2, 4, 128, 64)
    k[:, :, :, ::2] *= 50  # large channels among small ones: every block holds both
    small = torch.ones(64, dtype=torch.bool)
    small[::2] = False
    spec = dataclasses.replace(kind, axis=(-1,))
    errors = []
    for reorder in (False, True):
        store = ChunkKVStore(KVSpec(key=spec, reorder=reorder))
        store.append(0, k, v)
        past = store.past(0, 1)
        assert past is not None
        errors.append(float((past[0] - k)[..., small].norm() / k[..., small].norm()))
    assert errors[1] < 0.2 * errors[0]
    assert store.nbytes == quantize(k, spec).nbytes + quantize(v, KIVI_VALUE4).nbytes + 4 * 64 * 2
    with pytest.raises(ConfigError, match="reorder sorts channels"):
        KVSpec(reorder=True)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_solver_is_never_beaten_by_exhaustive_search(data: st.DataObject) -> None:
    groups = [
        Group(
            name=str(g),
            tokens=4,
            options=tuple(
                Option(name=str(i), nbytes=data.draw(st.integers(0, 8)), cost=data.draw(st.integers(0, 9)))
                for i in range(data.draw(st.integers(1, 3)))
            ),
        )
        for g in range(data.draw(st.integers(1, 2)))
    ]
    budget = data.draw(st.integers(0, 60))
    whole = [list(itertools.combinations_with_replacement(g.options, g.tokens)) for g in groups]
    fitting = [
        sum(o.cost for part in picks for o in part)
        for picks in itertools.product(*whole)
        if sum(o.nbytes for part in picks for o in part) <= budget
    ]
    if not fitting:
        with pytest.raises(ConfigError, match="smallest options"):
            solve_budget(groups, budget)
        return
    plan = solve_budget(groups, budget)
    assert plan.nbytes <= budget
    assert sum(c.tokens for c in plan.choices) == 4 * len(groups)
    # Tokens are whole: rounding the one split group up to a token may cost up to one token's step.
    assert min(fitting) <= plan.cost <= min(fitting) + 9


def test_a_tight_budget_splits_one_group_by_tokens() -> None:
    options = (
        Option(name="keep", nbytes=10, cost=0),
        Option(name="int8", nbytes=5, cost=1),
        Option(name="offload", nbytes=0, cost=offload_cost(10, 1.0, 4.0)),
        Option(name="recompute", nbytes=0, cost=20),
    )
    groups = [Group(name=name, tokens=100, options=options) for name in ("a", "b")]
    plan = solve_budget(groups, 1250)
    assert [(c.group, c.option, c.tokens) for c in plan.choices] == [("a", "int8", 100), ("b", "keep", 50), ("b", "int8", 50)]
    assert (plan.nbytes, plan.cost) == (1250, 150)


def test_store_accepts_specs_by_head() -> None:
    store = ChunkKVStore(KVSpec(key=QuantSpec(axis=(-2, -1), block=None), value=INT8))
    for _ in range(2):
        store.append(0, torch.randn(1, 2, 32, 16), torch.randn(1, 2, 32, 16))
    past = store.past(0, 2)
    assert past is not None
    assert past[0].shape == (1, 2, 64, 16)
