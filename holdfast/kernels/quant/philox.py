"""Random bits that are a pure function of (seed, stream, element): Philox4x32-10 (Salmon et al., SC 2011).

Stochastic rounding draws from here, so a replayed step rounds the same way on any device and in any order of blocks.
"""

from __future__ import annotations

import torch

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_U32 = 0xFFFFFFFF


def philox_4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four 32-bit words (in int64) for each counter (int64 tensors holding 32-bit words) under a 64-bit seed."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _U32, (seed >> 32) & _U32
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1  # int64 wraps, the bits are those of the unsigned product
        c0, c1, c2, c3 = ((p1 >> 32) & _U32) ^ c1 ^ k0, p1 & _U32, ((p0 >> 32) & _U32) ^ c3 ^ k1, p0 & _U32
        k0, k1 = (k0 + _W0) & _U32, (k1 + _W1) & _U32
    return c0, c1, c2, c3


def uniform(n_elements: int, seed: int, stream: int, device: torch.device) -> torch.Tensor:
    """`n_elements` float32 in [0, 1) of 24 random bits. Element i takes word i % 4 of counter (i // 4, i >> 34, stream, 0)."""
    quads = torch.arange(-(-n_elements // 4), device=device, dtype=torch.int64)
    zero = torch.zeros_like(quads)
    words = philox_4x32((quads & _U32, quads >> 32, zero + (stream & _U32), zero), seed)
    flat = torch.stack(words, dim=-1).reshape(-1)[:n_elements]
    return (flat >> 8).to(torch.float32) * 2.0**-24
