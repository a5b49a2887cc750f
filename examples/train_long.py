"""Train on sequences that get longer and longer, and see what memory that takes, with and without compression.

    python examples/train_long.py [--lengths 512,1024,2048,4096] [--steps 3] [--plot memory.svg]

Four ways to take the same step: as PyTorch does it, with activations at int8, with int4 and int8 mixed, and chunk by chunk with
past keys and values at int4 and the chunk's own activations at int8. Printed for each length: the most bytes autograd held for
backward at one time (for the chunked way also packed keys and values, their gradients, and one layer's past restored), and the
loss, which compression of activations leaves as it is in the first step. On a CUDA device the allocator's peak is printed too.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (its name in every PyTorch program)
from torch import Tensor, nn

from holdfast.kernels import KEEP, ActPolicy, compress_activations, mixed_policy
from holdfast.kernels.sequences import ChunkContext, ChunkKVStore, chunked_backward

CHUNK = 256


class Block(nn.Module):
    """A pre-norm transformer block. The one change for chunks: attention asks the context for the past."""

    def __init__(self, number: int, width: int, heads: int) -> None:
        super().__init__()
        self.number, self.heads = number, heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, context: ChunkContext | None) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        if context is None:
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            a = context.attention(self.number, q, k, v)
        x = x + self.out(a.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Bytes in, the summed cross entropy of the next bytes out."""

    def __init__(self, longest: int, width: int = 128, heads: int = 4, layers: int = 4) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, width), nn.Embedding(longest, width)
        self.blocks = nn.ModuleList(Block(i, width, heads) for i in range(layers))
        self.norm = nn.RMSNorm(width)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, piece: tuple[Tensor, int], context: ChunkContext | None = None) -> Tensor:
        tokens, start = piece
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.embed(inputs) + self.position(torch.arange(start, start + inputs.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x, context)
        return F.cross_entropy(F.linear(self.norm(x), self.embed.weight).flatten(0, 1), targets.flatten(), reduction="sum")


def whole(policy: ActPolicy) -> Callable[[GPT, Tensor], tuple[Tensor, int]]:
    """One forward and backward of the whole sequence under `policy`: the loss and the most bytes held."""

    def step(model: GPT, tokens: Tensor) -> tuple[Tensor, int]:
        compressor = compress_activations(model, policy)
        with compressor:
            loss = model((tokens, 0))
        loss.backward()
        return loss.detach(), compressor.report().peak_live

    return step


def by_chunks(model: GPT, tokens: Tensor) -> tuple[Tensor, int]:
    """The same gradient from chunks: at most one chunk's activations beside packed K and V and their gradients."""
    length = tokens.shape[1] - 1
    chunks = [(tokens[:, i : i + CHUNK + 1], i) for i in range(0, length, CHUNK)]
    compressor = compress_activations(model, ActPolicy())

    def loss_of(piece: tuple[Tensor, int], context: ChunkContext) -> Tensor:
        with compressor:
            return model(piece, context)

    result = chunked_backward(loss_of, chunks, ChunkKVStore())
    restored = result.kv_exact_bytes // len(model.blocks)  # the past of one layer at a time
    return result.loss, compressor.report().peak_live + result.kv_bytes + result.gradient_bytes + restored


WAYS = {
    "plain": whole(ActPolicy(default=KEEP)),
    "int8": whole(ActPolicy()),
    "mixed": whole(mixed_policy()),
    "chunks": by_chunks,
}


def text() -> Tensor:
    """Python's standard library as bytes: text that every machine has."""
    source = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    return torch.frombuffer(bytearray(source), dtype=torch.uint8).long()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lengths", default="512,1024,2048,4096", help="sequence lengths, multiples of 256")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps per length and way")
    parser.add_argument("--plot", type=Path, help="write memory against sequence length to this SVG file")
    options = parser.parse_args()
    lengths = [int(n) for n in options.lengths.split(",")]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source, curves = text(), {name: [] for name in WAYS}
    print(f"{'tokens':>7} {'way':<16} {'held MB':>9} {'loss/byte':>10}" + ("  allocator MB" if device == "cuda" else ""))
    for length in lengths:
        for name, step in WAYS.items():
            torch.manual_seed(0)
            model = GPT(max(lengths)).to(device)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            for number in range(options.steps):
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                tokens = source[number * length : (number + 1) * length + 1][None].to(device)
                loss, held = step(model, tokens)
                optimizer.step()
                optimizer.zero_grad()
            peak = f" {torch.cuda.max_memory_allocated() / 1e6:13.1f}" if device == "cuda" else ""
            print(f"{length:>7} {name:<16} {held / 1e6:>9.1f} {float(loss) / length:>10.4f}{peak}", flush=True)
            curves[name].append(held / 1e6)
    if options.plot:
        options.plot.write_text(plot(lengths, curves))


def plot(lengths: list[int], curves: dict[str, list[float]]) -> str:
    """Memory against sequence length as an SVG picture, both axes logarithmic; no plotting package needed."""
    from math import log2

    left, right, top, bottom = 70, 470, 30, 330
    values = [v for curve in curves.values() for v in curve]
    low, high = log2(min(values)), log2(max(values))

    def x(n: int) -> float:
        return left + (right - left) * (log2(n) - log2(lengths[0])) / max(log2(lengths[-1] / lengths[0]), 1e-9)

    def y(v: float) -> float:
        return bottom - (bottom - top) * (log2(v) - low) / max(high - low, 1e-9)

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 390" font-family="sans-serif" font-size="13">',
        '<rect width="640" height="390" fill="white"/>',
        f'<text x="{left}" y="18">bytes held for backward, MB</text>',
        f'<text x="{(left + right) / 2}" y="380" text-anchor="middle">tokens in the sequence</text>',
    ]
    for n in lengths:
        parts.append(f'<line x1="{x(n)}" y1="{top}" x2="{x(n)}" y2="{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x(n)}" y="{bottom + 20}" text-anchor="middle">{n}</text>')
    for v in sorted({min(values), max(values), *curves[next(iter(curves))]}):
        parts.append(f'<line x1="{left}" y1="{y(v)}" x2="{right}" y2="{y(v)}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y(v) + 4}" text-anchor="end">{v:.0f}</text>')
    for (name, curve), colour in zip(curves.items(), ("#444", "#1b6ca8", "#2a9d5c", "#c1571a"), strict=False):
        points = " ".join(f"{x(n):.1f},{y(v):.1f}" for n, v in zip(lengths, curve, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{right + 8}" y="{y(curve[-1]) + 4}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    main()
