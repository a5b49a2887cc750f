"""What attention layers ask for the past: K and V of earlier chunks, read from the store and never kept.

Restored, the past of all layers would weigh what packing has saved. So backward does not find it in the graph: it reads the
store once more, layer by layer, rebuilds this layer's attention and sends the past its gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 (its name in every PyTorch program)
from torch.overrides import handle_torch_function, has_torch_function

from holdfast.errors import ConfigError
from holdfast.kernels.attention import random_state, replayed

if TYPE_CHECKING:
    from collections.abc import Hashable

    from holdfast.kernels.sequences.store import ChunkKVStore

Pair = tuple[torch.Tensor, torch.Tensor]


class PastGradients:
    """Gradients of K and V of all chunks before the current one, by layer, waiting until their own chunk is recomputed."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._totals: dict[Hashable, Pair] = {}

    def add(self, layer: Hashable, found: Pair) -> None:
        """`found` belongs to the first tokens of what waits. The last chunk comes first, so nothing later is longer."""
        if layer not in self._totals:
            self._totals[layer] = found[0].to(self._dtype), found[1].to(self._dtype)
            return
        for total, gradient in zip(self._totals[layer], found, strict=True):
            total[:, :, : gradient.shape[2]] += gradient

    def of(self, layer: Hashable, start: int, length: int) -> tuple[torch.Tensor, ...]:
        """What waits for the K and V of tokens `start` to `start + length`; empty if nobody has sent any."""
        return tuple(total[:, :, start : start + length] for total in self._totals.get(layer, ()))

    @property
    def nbytes(self) -> int:
        return sum(total.nbytes for pair in self._totals.values() for total in pair)


class ChunkContext:
    """What attention layers ask for the past. A model's attention calls `attention` (or `extend`) instead of SDPA."""

    def __init__(self, store: ChunkKVStore, chunk: int, gradients: PastGradients | None) -> None:
        self._store, self.chunk, self._gradients = store, chunk, gradients
        self.own: dict[Hashable, Pair] = {}
        self._start: dict[Hashable, int] = {}  # tokens before this chunk
        self._held: dict[Hashable, Pair] = {}  # pasts that `extend` had to hand out

    def attention(
        self, layer: Hashable, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **settings: Any
    ) -> torch.Tensor:
        """Causal attention of this chunk's queries over everything up to them; `settings` go to SDPA. query, key and value are
        (batch, heads, tokens, channels). Saves those three for backward, and nothing of the past."""
        self._enter(layer, key, value)
        return chunk_attention(query, key, value, self, layer, settings)

    def extend(self, layer: Hashable, key: torch.Tensor, value: torch.Tensor) -> Pair:
        """K and V of all chunks up to this one, (batch, heads, tokens so far, channels), for attention of another kind than
        SDPA's. Each layer asks once per chunk. The past of every layer that asks here is held, unpacked, until backward."""
        self._enter(layer, key, value)
        past = self.read(layer)
        if past is None:
            return key, value
        if self._gradients is not None:
            past = past[0].requires_grad_(), past[1].requires_grad_()
            self._held[layer] = past
        return torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)

    def read(self, layer: Hashable) -> Pair | None:
        """K and V of the chunks before this one, restored."""
        past = self._store.past(layer, self.chunk)
        self._start[layer] = 0 if past is None else past[0].shape[2]
        return past

    def send_back(self, layer: Hashable, found: Pair) -> None:
        """Adds to what waits for the past of `layer`."""
        if self._gradients is not None:
            self._gradients.add(layer, found)

    def send_back_held(self) -> None:
        """The same for what `extend` handed out, after backward."""
        for layer, past in self._held.items():
            found = [torch.zeros_like(t) if t.grad is None else t.grad for t in past]
            self.send_back(layer, (found[0], found[1]))

    def roots(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """This chunk's own K and V, each with the gradient that later chunks have sent it."""
        assert self._gradients is not None
        found = []
        for layer, pair in self.own.items():
            waiting = self._gradients.of(layer, self._start[layer], pair[0].shape[2])
            found += [(t, g.to(t.dtype)) for t, g in zip(pair, waiting, strict=False) if t.requires_grad]
        return found

    def _enter(self, layer: Hashable, key: torch.Tensor, value: torch.Tensor) -> None:
        if layer in self.own:
            raise ConfigError(f"layer {layer!r} asked twice in chunk {self.chunk}; give each attention layer its own name")
        self.own[layer] = key, value
        if self._gradients is None:
            self._store.append(layer, key, value)


def chunk_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context: ChunkContext,
    layer: Hashable,
    settings: dict[str, Any],
) -> torch.Tensor:
    """`ChunkContext.attention` as one operation: an activation compressor around it sees its name and packs what it saves."""
    if has_torch_function((query, key, value)):
        arguments = (query, key, value, context, layer, settings)
        return handle_torch_function(chunk_attention, (query, key, value), *arguments)
    return _ChunkAttention.apply(query, key, value, context, layer, settings)  # type: ignore[no-any-return, no-untyped-call]


class _ChunkAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context: ChunkContext,
        layer: Hashable,
        settings: dict[str, Any],
    ) -> torch.Tensor:
        ctx.context, ctx.layer, ctx.settings = context, layer, settings
        ctx.random_state = random_state(query.device) if settings.get("dropout_p") else None
        ctx.save_for_backward(query, key, value)
        return _attend(query, key, value, context.read(layer), settings)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        past = ctx.context.read(ctx.layer)
        needs = ctx.needs_input_grad[:3]
        own = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needs, strict=True)]
        wanted = [t for t, need in zip(own, needs, strict=True) if need]
        reaches_past = past is not None and (needs[1] or needs[2])
        if past is not None and reaches_past:
            wanted += [t.requires_grad_() for t in past]
        with torch.enable_grad(), replayed(ctx.random_state, own[0].device):
            out = _attend(own[0], own[1], own[2], past, ctx.settings)
            found = list(torch.autograd.grad(out, wanted, grads[0]))
        if reaches_past:
            to_value, to_key = found.pop(), found.pop()
            ctx.context.send_back(ctx.layer, (to_key, to_value))
        left = iter(found)
        return (*(next(left) if need else None for need in needs), None, None, None)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, past: Pair | None, settings: dict[str, Any]
) -> torch.Tensor:
    if past is not None:
        key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
    length, total = query.shape[2], key.shape[2]
    if length == total:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, **settings)
    mask = torch.ones(length, total, dtype=torch.bool, device=query.device).tril(total - length)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **settings)
