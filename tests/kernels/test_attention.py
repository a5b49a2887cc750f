"""compressed_sdpa: exact forward, consistent backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its name in every PyTorch program)

from holdfast.errors import ConfigError
from holdfast.kernels import INT4, INT8, KIVI_KEY4, compressed_sdpa, dequantize, quantize
from holdfast.kernels.quant import QuantSpec


def qkv(*shape: int, scale: float = 1.0, seed: int = 0, kv_heads: int | None = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    b, h, t, d = shape
    heads = (h, kv_heads or h, kv_heads or h)
    return [(torch.randn(b, n, t, d, generator=generator) * scale).requires_grad_() for n in heads]


def gradients(out: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    return list(torch.autograd.grad((out * weight).sum(), leaves))


def error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return float(sum((a - b).square().sum() for a, b in zip(found, exact, strict=True)) ** 0.5
                 / sum(b.square().sum() for b in exact) ** 0.5)  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [{}, {"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}, {"attn_mask": torch.rand(96, 96) > 0.3}],
    ids=["plain", "causal", "scale", "gqa", "mask"],
)
def test_forward_is_bit_exact_and_backward_is_that_of_the_stored_values(settings: dict) -> None:
    leaves = qkv(2, 4, 96, 32, kv_heads=2 if "enable_gqa" in settings else None)
    out = compressed_sdpa(*leaves, **settings, spec=INT4)
    assert torch.equal(out, F.scaled_dot_product_attention(*leaves, **settings))
    stored = [dequantize(quantize(t, INT4)).requires_grad_() for t in leaves]
    expected = gradients(F.scaled_dot_product_attention(*stored, **settings), stored)
    assert all(torch.equal(a, b) for a, b in zip(gradients(out, leaves), expected, strict=True))


def test_rebuilding_beats_an_exact_logsumexp_where_logits_are_large() -> None:
    """The failure that this function exists for: rows of exp(q̂·k̂ - logsumexp) that sum to far more than one."""
    leaves = qkv(1, 4, 256, 64, scale=1.4)
    with torch.no_grad():
        leaves[1][..., 3] *= 8  # an outlier channel in the keys, as large models have
    exact = gradients(F.scaled_dot_product_attention(*leaves), leaves)
    rebuilt = error(gradients(compressed_sdpa(*leaves, spec=INT4), leaves), exact)

    def pack(t: torch.Tensor):  # type: ignore[no-untyped-def]
        return quantize(t, INT4) if t.ndim == 4 else t  # q, k, v and out packed beside an exact logsumexp

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda s: s if isinstance(s, torch.Tensor) else dequantize(s)):
        out = F.scaled_dot_product_attention(*leaves)
    beside_exact = error(gradients(out, leaves), exact)
    assert rebuilt < 0.6 * beside_exact
    per_channel = error(gradients(compressed_sdpa(*leaves, spec=INT4, key_spec=KIVI_KEY4), leaves), exact)
    assert per_channel < rebuilt


def test_dropout_draws_the_same_mask_in_backward_and_moves_the_generator_once() -> None:
    leaves = qkv(1, 2, 64, 32)
    fine = QuantSpec(scale="fp32", block=32)
    torch.manual_seed(4)
    exact_out = F.scaled_dot_product_attention(*leaves, dropout_p=0.4)
    exact, after = gradients(exact_out, leaves), torch.rand(1)
    torch.manual_seed(4)
    out = compressed_sdpa(*leaves, dropout_p=0.4, spec=fine)
    assert torch.equal(out, exact_out)
    assert error(gradients(out, leaves), exact) < 0.02
    assert torch.equal(torch.rand(1), after)


def test_only_what_needs_a_gradient_gets_one() -> None:
    q, k, v = qkv(1, 2, 64, 32)
    out = compressed_sdpa(q, k.detach(), v, spec=INT8)
    out.sum().backward()
    assert q.grad is not None
    assert v.grad is not None
    with pytest.raises(ConfigError, match="does not differentiate attn_mask"):
        compressed_sdpa(q, k, v, attn_mask=torch.zeros(64, 64, requires_grad=True))


def test_memory_order_of_the_inputs_is_kept_for_backward() -> None:
    base = torch.randn(2, 64, 4, 32, requires_grad=True)
    q = base.transpose(1, 2)
    seen = []
    original = F.scaled_dot_product_attention

    def spy(*args: torch.Tensor, **kwargs: object) -> torch.Tensor:
        seen.append(args[0].stride())
        return original(*args, **kwargs)  # type: ignore[arg-type]

    F.scaled_dot_product_attention = spy  # type: ignore[assignment]
    try:
        compressed_sdpa(q, q, q, spec=INT8).sum().backward()
    finally:
        F.scaled_dot_product_attention = original
    assert seen == [q.stride(), q.stride()]
