"""Attention whose backward is consistent with what it stored.

Flash backward recomputes probabilities as exp(q·k - logsumexp). With packed q and k and the exact logsumexp the rows no longer
sum to one, and the error grows exponentially with that of the logits. Here q, k and v are stored packed, and backward rebuilds
out and logsumexp from the same packed values: the gradient is the exact one of a slightly different point.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its name in every PyTorch program)

from holdfast.errors import ConfigError
from holdfast.kernels.quant import INT8, Backend, Packed, QuantSpec, dequantize, quantize


def compressed_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    spec: QuantSpec = INT8,
    key_spec: QuantSpec | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, bit for bit in forward, with q, k, v stored packed for backward.

    query (batch, heads, L, E), key (batch, heads, S, E), value (batch, heads, S, Ev); returns (batch, heads, L, Ev). `key_spec`
    stores the key otherwise than the rest (KIVI_KEY4: one scale per channel and 64 tokens). Backward costs one more attention
    forward. A mask that requires a gradient raises ConfigError; other masks are stored as they are.
    """
    if attn_mask is not None and attn_mask.requires_grad:
        raise ConfigError(
            "compressed_sdpa does not differentiate attn_mask; use scaled_dot_product_attention for a learned bias"
        )
    settings = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    return _CompressedSDPA.apply(query, key, value, attn_mask, settings, (spec, key_spec or spec, spec), backend)  # type: ignore[no-any-return, no-untyped-call]


class _CompressedSDPA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None,
        settings: dict[str, Any],
        specs: tuple[QuantSpec, QuantSpec, QuantSpec],
        backend: Backend,
    ) -> torch.Tensor:
        ctx.settings, ctx.backend = settings, backend
        ctx.random_state = random_state(query.device) if settings["dropout_p"] else None
        packed = [quantize(t, spec, backend=backend) for t, spec in zip((query, key, value), specs, strict=True)]
        # save_for_backward and not attributes: the graph frees it, and a second backward without retain_graph is an error.
        ctx.layouts = [
            (p.spec, p.shape, p.dtype, len(p.parts), _memory_order(t)) for p, t in zip(packed, (query, key, value), strict=True)
        ]
        ctx.save_for_backward(attn_mask, *(part for p in packed for part in p.parts))
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **settings)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        attn_mask, *parts = ctx.saved_tensors
        tensors = []
        for spec, shape, dtype, n_parts, order in ctx.layouts:
            own, parts = [*parts[:n_parts], None, None], parts[n_parts:]
            back = dequantize(Packed(spec, shape, dtype, own[0], own[1], own[2]), backend=ctx.backend)
            tensors.append(_in_order(back, order))
        needs = ctx.needs_input_grad[:3]
        with torch.enable_grad(), replayed(ctx.random_state, tensors[0].device):
            leaves = [t.requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
            q, k, v = leaves
            out = F.scaled_dot_product_attention(q, k, v, attn_mask, **ctx.settings)
            wanted = [t for t, need in zip(leaves, needs, strict=True) if need]
            found = iter(torch.autograd.grad(out, wanted, grads[0]))
        return (*(next(found) if need else None for need in needs), None, None, None, None)


def _memory_order(t: torch.Tensor) -> tuple[int, ...]:
    strides = t.stride()
    return tuple(sorted(range(t.ndim), key=lambda d: -strides[d]))


def _in_order(t: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """`t` laid out as the original was: heads next to tokens or tokens next to heads, which kernels may care about."""
    back = sorted(range(len(order)), key=lambda d: order[d])
    return t.permute(order).contiguous().permute(back)


def random_state(device: torch.device) -> torch.Tensor:
    """Of the device's default generator."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


class replayed:  # noqa: N801  # used like a function
    """The random state of forward inside, the present one again outside."""

    def __init__(self, state: torch.Tensor | None, device: torch.device) -> None:
        self._state, self._device = state, device
        self._now: torch.Tensor | None = None

    def __enter__(self) -> None:
        if self._state is not None:
            self._now = random_state(self._device)
            self._set(self._state)

    def __exit__(self, *_: object) -> None:
        if self._now is not None:
            self._set(self._now)

    def _set(self, state: torch.Tensor) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state, self._device)
        else:
            torch.set_rng_state(state)
