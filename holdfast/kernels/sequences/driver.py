"""Backward through a sequence too long for its activations: chunk by chunk, from the last to the first.

SeCO (Li et al., arXiv:2505.16710): a first sweep without gradients stores each chunk's K and V. A second sweep, backwards,
recomputes one chunk at a time against its past K and V; what backward sends into them waits in accumulators until their own
chunk is recomputed. One chunk's activations exist at a time, and the gradient is the one of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from holdfast.errors import ConfigError
from holdfast.kernels.sequences.context import ChunkContext, PastGradients
from holdfast.kernels.sequences.store import ChunkKVStore


@dataclass(frozen=True, slots=True)
class ChunkedResult:
    """`loss` is the sum over chunks, detached. `kv_bytes` and `kv_exact_bytes` are K and V as stored and as computed,
    `gradient_bytes` the gradients of past K and V that waited for their chunk, `backpropagated` the chunks that sent any."""

    loss: torch.Tensor
    kv_bytes: int
    kv_exact_bytes: int
    gradient_bytes: int
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
    waited = _backward_sweep(loss_of, chunks, store, order, states, 1.0 / keep, accumulate_in)
    return ChunkedResult(loss, stored, exact_bytes, waited, tuple(order))


def _forward_sweep(
    loss_of: Callable[[Any, ChunkContext], torch.Tensor], chunks: Sequence[Any], store: ChunkKVStore
) -> tuple[torch.Tensor, list[Any], int]:
    losses, states, exact_bytes = [], [], 0
    with torch.no_grad():
        for number, chunk in enumerate(chunks):
            states.append(_random_states())
            context = ChunkContext(store, number, None)
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
) -> int:
    """Bytes of the gradients of past K and V, which wait to the end."""
    gradients = PastGradients(accumulate_in)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for number in reversed(order):
            _set_random_states(states[number])
            context = ChunkContext(store, number, gradients)
            loss = loss_of(chunks[number], context)
            roots, grads = [loss], [torch.full_like(loss, weight)]
            for tensor, gradient in context.roots():
                roots.append(tensor)
                grads.append(gradient * weight)
            torch.autograd.backward(roots, grads)
            context.send_back_held()
            store.drop(number)
    return gradients.nbytes


def _draw(n: int, keep: float, seed: int) -> list[int]:
    drawn = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    return [i for i in range(n) if drawn[i] < keep]


def _random_states() -> tuple[torch.Tensor, list[torch.Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _set_random_states(states: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])
