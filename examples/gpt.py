"""A small byte-level GPT: pre-norm, rotary positions, SwiGLU, tied embedding. 3.2 M parameters with the defaults.

Shapes: B batch, T bytes of context, C width, H heads, D width of a head (C = H·D).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (its name in every PyTorch program)
from torch import Tensor, nn

VOCABULARY = 256  # one token per byte: no tokenizer to install, every file is valid text


@dataclass(frozen=True, kw_only=True, slots=True)
class GPTConfig:
    layers: int = 4
    width: int = 256
    heads: int = 4
    context: int = 64
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(f"width {self.width} must be an even multiple of heads, {self.heads}")

    @property
    def hidden(self) -> int:
        """Width inside the SwiGLU: 8/3 of the width, so that its three matrices cost what a plain MLP's two do."""
        return -(-8 * self.width // 3 // 16) * 16


class GPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.apply(_initialize)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The mean cross entropy, in nats per byte."""
        x_BTC = self.dropout(self.embed(tokens_BT))
        for block in self.blocks:
            x_BTC = block(x_BTC)
        logits_BTV = F.linear(self.norm(x_BTC), self.embed.weight)
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width)
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.dropout(self.attention(self.attention_norm(x_BTC)))
        return x_BTC + self.dropout(self.mlp(self.mlp_norm(x_BTC)))


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        cos_TD, sin_TD = _rotations(config.context, config.width // config.heads)
        self.register_buffer("cos_TD", cos_TD, persistent=False)
        self.register_buffer("sin_TD", sin_TD, persistent=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        q_BHTD, k_BHTD, v_BHTD = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x_BTC).chunk(3, dim=-1)
        )
        mixed_BHTD = F.scaled_dot_product_attention(self._rotate(q_BHTD), self._rotate(k_BHTD), v_BHTD, is_causal=True)
        return self.out(mixed_BHTD.transpose(1, 2).flatten(2))

    def _rotate(self, x_BHTD: Tensor) -> Tensor:
        length = x_BHTD.shape[-2]
        left, right = x_BHTD.chunk(2, dim=-1)
        return x_BHTD * self.cos_TD[:length] + torch.cat((-right, left), dim=-1) * self.sin_TD[:length]


class SwiGLU(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTC)) * self.up(x_BTC))


def _rotations(length: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, for rotary embedding in halves."""
    frequency = 10_000.0 ** (-torch.arange(0, width, 2) / width)
    angle = torch.outer(torch.arange(length).float(), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
