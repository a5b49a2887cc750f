"""Channels sorted by size before they are cut into blocks.

Keys have channels many times larger than the rest, and always the same ones. A block along the channels that holds one of them
spends its codes on it and rounds its neighbours away. Sorted, large channels share blocks with large ones.
"""

from __future__ import annotations

import torch


def channel_order(x: torch.Tensor) -> torch.Tensor:
    """(heads, channels) int16: for each head of `x` (batch, heads, tokens, channels) its channels from the smallest largest
    magnitude to the largest; equals keep their order, so that a replay packs the same bytes."""
    largest = x.detach().abs().amax(dim=(0, 2))
    return torch.sort(largest, dim=-1, stable=True).indices.to(torch.int16)


def reordered(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """`x` with the channels of each head in `order`."""
    return x.gather(-1, order.long()[None, :, None, :].expand(x.shape))


def restored(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The inverse of `reordered`."""
    return reordered(x, torch.argsort(order.long(), dim=-1))
