"""Backward through a sequence too long for its activations: chunk by chunk, from the last to the first.

SeCO (Li et al., arXiv:2505.16710): a first sweep without gradients stores each chunk's K and V. A second sweep, backwards,
recomputes one chunk at a time with its past K and V as leaves; what backward sends into them waits in accumulators until
their own chunk is recomputed. One chunk's activations exist at a time, and the gradient is the one of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its name in every PyTorch program)

from holdfast.errors import ConfigError
from holdfast.kernels.sequences.store import ChunkKVStore


class ChunkContext:
    """What attention layers ask for the past. A model's attention calls `attention` (or `extend`) instead of SDPA."""

    def __init__(self, store: ChunkKVStore, chunk: int, *, with_gradients: bool) -> None:
        self._store, self.chunk, self._with_gradients = store, chunk, with_gradients
        self.own: dict[Hashable, tuple[torch.Tensor, torch.Tensor]] = {}
        self.past: dict[Hashable, tuple[torch.Tensor, torch.Tensor]] = {}

    def extend(self, layer: Hashable, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of all chunks up to this one, (batch, heads, tokens so far, channels). Each layer asks once per chunk."""
        if layer in self.own:
            raise ConfigError(f"layer {layer!r} asked twice in chunk {self.chunk}; give each attention layer its own name")
        self.own[layer] = key, value
        past = self._store.past(layer, self.chunk)
        if not self._with_gradients:
            self._store.append(layer, key, value)
        if past is None:
            return key, value
        if self._with_gradients:
            past = past[0].requires_grad_(), past[1].requires_grad_()
            self.past[layer] = past
        return torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)

    def attention(
        self, layer: Hashable, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **settings: Any
    ) -> torch.Tensor:
        """Causal attention of this chunk's queries over everything up to them; `settings` go to SDPA."""
        keys, values = self.extend(layer, key, value)
        length, total = query.shape[2], keys.shape[2]
        mask = torch.ones(length, total, dtype=torch.bool, device=query.device).tril(total - length)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, **settings)


@dataclass(frozen=True, slots=True)
class ChunkedResult:
    """`loss` is the sum over chunks, detached. `kv_bytes` and `kv_exact_bytes` are K and V as stored and as computed,
    `backpropagated` the chunks that sent gradients."""

    loss: torch.Tensor
    kv_bytes: int
    kv_exact_bytes: int
    backpropagated: tuple[int, ...]


def chunked_backward(
    loss_of: Callable[[Any, ChunkContext], torch.Tensor],
    chunks: Sequence[Any],
    store: ChunkKVStore | None = None,
    *,
    keep: float = 1.0,
    seed: int = 0,
    selected: Sequence[int] | None = None,
    accumulate_in: torch.dtype = torch.float32,
) -> ChunkedResult:
    """Adds to `.grad` the gradient of the sum of `loss_of(chunk, context)` over all chunks, as one backward of the whole would.

    `loss_of` runs the model on one chunk and returns a scalar; its attention layers take past tokens from `context`. It is
    called twice per chunk, with the same random state. With an exact store the gradient is that of the
    full sequence up to rounding.

    `keep` < 1 is SpaCO's sparse mode: each chunk is backpropagated with that probability, and what it sends is divided by it,
    which makes the gradient unbiased. Chunks left out are not recomputed. `selected` gives the chunks instead of drawing them.
    """
    if not chunks:
        raise ConfigError("chunked_backward needs at least one chunk")
    if not 0.0 < keep <= 1.0:
        raise ConfigError(f"keep is the probability of a chunk, in (0, 1]; got {keep}")
    store = store or ChunkKVStore()
    order = sorted(
        set(range(len(chunks)) if keep == 1.0 else _draw(len(chunks), keep, seed)) if selected is None else set(selected)
    )
    if order and not 0 <= order[0] <= order[-1] < len(chunks):
        raise ConfigError(f"selected names chunks {order}; there are {len(chunks)}")
    loss, states, exact_bytes = _forward_sweep(loss_of, chunks, store)
    stored = store.nbytes
    _backward_sweep(loss_of, chunks, store, order, states, 1.0 / keep, accumulate_in)
    return ChunkedResult(loss, stored, exact_bytes, tuple(order))


def _forward_sweep(
    loss_of: Callable[[Any, ChunkContext], torch.Tensor], chunks: Sequence[Any], store: ChunkKVStore
) -> tuple[torch.Tensor, list[Any], int]:
    losses, states, exact_bytes = [], [], 0
    with torch.no_grad():
        for number, chunk in enumerate(chunks):
            states.append(_random_states())
            context = ChunkContext(store, number, with_gradients=False)
            losses.append(loss_of(chunk, context).detach())
            exact_bytes += sum(t.nbytes for pair in context.own.values() for t in pair)
    return torch.stack(losses).sum(), states, exact_bytes


def _backward_sweep(
    loss_of: Callable[[Any, ChunkContext], torch.Tensor],
    chunks: Sequence[Any],
    store: ChunkKVStore,
    order: Sequence[int],
    states: Sequence[Any],
    weight: float,
    accumulate_in: torch.dtype,
) -> None:
    waiting: dict[Hashable, tuple[torch.Tensor, torch.Tensor]] = {}  # gradients of K and V of all chunks before the current
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for number in reversed(order):
            _set_random_states(states[number])
            context = ChunkContext(store, number, with_gradients=True)
            loss = loss_of(chunks[number], context)
            roots, grads = [loss], [torch.full_like(loss, weight)]
            for layer, pair in context.own.items():
                start = context.past[layer][0].shape[2] if layer in context.past else 0
                for tensor, gradient in zip(pair, waiting.get(layer, ()), strict=False):
                    if tensor.requires_grad:
                        roots.append(tensor)
                        grads.append(gradient[:, :, start : start + tensor.shape[2]].to(tensor.dtype) * weight)
            torch.autograd.backward(roots, grads)
            _collect(context, waiting, accumulate_in)
            store.drop(number)


def _collect(context: ChunkContext, waiting: dict[Hashable, tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype) -> None:
    for layer, past in context.past.items():
        found = [torch.zeros_like(t) if t.grad is None else t.grad for t in past]
        if layer not in waiting:
            waiting[layer] = found[0].to(dtype), found[1].to(dtype)
            continue
        for total, gradient in zip(waiting[layer], found, strict=True):
            total[:, :, : gradient.shape[2]] += gradient


def _draw(n: int, keep: float, seed: int) -> list[int]:
    drawn = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    return [i for i in range(n) if drawn[i] < keep]


def _random_states() -> tuple[torch.Tensor, list[torch.Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _set_random_states(states: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])
