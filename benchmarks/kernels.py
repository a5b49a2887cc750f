"""Compressed activations and KV: bytes, gradient error, loss curves; on a GPU also bandwidth, step time and peak memory.

    python benchmarks/kernels.py [--json] [--quick]          on the CPU, about fifteen minutes on two cores
    python benchmarks/kernels.py --gpu [--json] [--quick]    on one CUDA device, about three minutes

The model is a byte-level GPT trained on Python's standard library, so that activations and gradients are those of a model that
has learned something. Bytes are unique regions of memory that autograd holds, weights left out.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its name in every PyTorch program)
from _harness import Report, machine, rounded, say
from torch import nn
from torch.utils.checkpoint import checkpoint

from holdfast.kernels import (
    INT4,
    INT8,
    KEEP,
    MXFP8,
    MXINT8,
    ActPolicy,
    QuantSpec,
    RunningSpec,
    compress_activations,
    dequantize,
    gradient_error,
    mixed_policy,
    quantize,
)
from holdfast.kernels.sequences import ChunkContext, ChunkKVStore, GearSpec, KVSpec, chunked_backward

# Mesa replaces the layers of a model, not its loss; its attention is written out as matmul, softmax, matmul.
MESA = {"attention": None, "keep_losses": True, "keep_heads": True}
ALONG_CHANNELS = QuantSpec(kind="mxint8", block=32, scale="e8m0", axis=(-1,))
EXPLICIT = " (explicit attention)"
POLICIES: dict[str, ActPolicy | None] = {
    "exact": None,
    "exact" + EXPLICIT: None,
    "mesa as published" + EXPLICIT: ActPolicy(default=RunningSpec(heads=4, clamp=False), **MESA),
    "mesa with clamp" + EXPLICIT: ActPolicy(default=RunningSpec(heads=4), **MESA),
    "int8": ActPolicy(),
    "int8" + EXPLICIT: ActPolicy(),
    "int4, attention rebuilt at int4": ActPolicy(default=INT4, attention=INT4),
    "mixed int4/int8": mixed_policy(),
    "int8, attention not rebuilt": ActPolicy(attention=None),
    "int8, fp32 scales": ActPolicy(default=QuantSpec(scale="fp32"), attention=QuantSpec(scale="fp32")),
    "mxint8": ActPolicy(default=MXINT8, attention=MXINT8),
    "mxfp8": ActPolicy(default=MXFP8, attention=MXFP8),
}


# -- the report --------------------------------------------------------------------------------------------------------


class Bench(Report):
    """Says each row as it is measured, and keeps all of them in `save`, so that an interrupted run has not measured in vain."""

    def __init__(self, save: Path | None) -> None:
        super().__init__()
        self._save = save

    def row(self, case: str, system: str, metric: str, unit: str, values: Sequence[float]) -> None:
        super().row(case, system, metric, unit, values)
        say(f"{case:<17} {system:<40} {metric:<31} {self.rows[-1]['median']:.4g} {unit}")
        self._keep()

    def absent(self, case: str, system: str, metric: str, unit: str, reason: str) -> None:
        super().absent(case, system, metric, unit, reason)
        say(f"{case:<17} {system:<40} {metric:<31} - ({reason})")
        self._keep()

    def goal(self, name: str, goal: float, measured: float, *, at_most: bool = True) -> None:
        super().goal(name, goal, measured, at_most=at_most)
        found = self.goals[-1]
        say(f"goal {name}: {measured:.4g} ({found['goal']}) {'met' if found['met'] else 'MISSED'}")
        self._keep()

    def _keep(self) -> None:
        if self._save:
            self._save.write_text(self.as_json())

    def as_json(self) -> str:
        report = {"schema": 1, "machine": hardware(), "rows": self.rows, "goals": self.goals}
        return json.dumps(rounded(report), indent=1, ensure_ascii=False)


def hardware() -> dict[str, Any]:
    """The machine of all benchmarks, and the GPU and the threads that decide here."""
    found = asdict(machine(("torch", "triton", "numpy")))
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30), "cuda": torch.version.cuda}
    return {**found, "threads": torch.get_num_threads()}


# -- the model ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, number: int, width: int, heads: int) -> None:
        super().__init__()
        self.number, self.heads, self.explicit = number, heads, False
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, context: ChunkContext | None) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        if self.explicit:
            future = torch.ones(t, t, dtype=torch.bool).triu(1)
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            a = F.softmax(scores.masked_fill(future, float("-inf")), dim=-1) @ v
        elif context is None:
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            a = context.attention(self.number, q, k, v)
        x = x + self.out(a.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


class GPT(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, context: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(i, width, heads) for i in range(layers))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, 256, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self, tokens: torch.Tensor, targets: torch.Tensor, start: int = 0, context: ChunkContext | None = None
    ) -> torch.Tensor:
        x = self.embed(tokens) + self.position(torch.arange(start, start + tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x, context)
        return F.cross_entropy(self.lm_head(self.norm(x)).flatten(0, 1), targets.flatten())


def with_attention(model: GPT, name: str) -> GPT:
    """The model with its attention written as the named system needs it."""
    for block in model.blocks:
        block.explicit = name.endswith(EXPLICIT)
    return model


def text(nbytes: int = 2_000_000) -> torch.Tensor:
    found = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        found += path.read_bytes()
    return torch.frombuffer(found[:nbytes], dtype=torch.uint8).long()


def batch(source: torch.Tensor, size: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    starts = torch.randint(0, len(source) - length - 1, (size,), generator=generator).tolist()
    windows = torch.stack([source[s : s + length + 1] for s in starts])
    return windows[:, :-1], windows[:, 1:]


def train(
    model: GPT, source: torch.Tensor, steps: int, seed: int, context: AbstractContextManager[object] | None, length: int
) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=50)  # as recipes have it; running ranges need it
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        tokens, targets = batch(source, max(1, 512 // length), length, generator)
        with context or nullcontext():
            loss = model(tokens, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warm_up.step()
        losses.append(float(loss.detach()))
    return losses


# -- on the CPU --------------------------------------------------------------------------------------------------------


@cache
def trained(*, quick: bool) -> tuple[torch.Tensor, GPT]:
    """A text and a model that has seen 150 windows of it, of the length it is measured at: its positions are learned."""
    length = 256 if quick else 1024
    torch.manual_seed(0)
    source, model = text(), GPT(256, 4, 4, length)
    train(model, source, 5 if quick else 150, 1, None, length)
    return source, model


def bytes_and_errors(bench: Bench, *, quick: bool) -> None:
    """One step of 1024 tokens, after some training: in float32, under autocast, and with everything in bfloat16."""
    source, model = trained(quick=quick)
    length = model.position.num_embeddings
    batches = [batch(source, 1, length, torch.Generator().manual_seed(100 + i)) for i in range(1 if quick else 3)]
    models = {"fp32": model, "amp": model, "bf16": copy.deepcopy(model).bfloat16()}
    for precision, subject in models.items():
        for name in POLICIES:
            if precision == "amp" or name in ("exact", "int8", "mixed int4/int8"):  # autocast is the yardstick
                one_system(bench, precision, name, with_attention(subject, name), source, batches)
    own = amp_error(with_attention(model, "exact"), batches)
    bench.row("amp", "bf16 autocast itself", "gradient_error", "ratio", own)
    bench.goal("int8_bytes_vs_bf16", 0.55, measured(bench, "amp", "int8", "saved_vs_exact"))
    bench.goal("mixed_bytes_vs_bf16", 0.40, measured(bench, "amp", "mixed int4/int8", "saved_vs_exact"))
    bench.goal("int8_error_vs_amp", 1.0, measured(bench, "amp", "int8", "gradient_error") / statistics.median(own))


def one_system(
    bench: Bench,
    precision: str,
    name: str,
    model: GPT,
    source: torch.Tensor,
    batches: list[tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Rows of one way to save: bytes by those of exact SDPA in the same precision, error by the same model's exact gradient."""
    policy, amp = POLICIES[name], precision == "amp"
    saved, errors, worst = [], [], []
    for tokens, targets in batches:

        def loss_of(tokens: torch.Tensor = tokens, targets: torch.Tensor = targets) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                return model(tokens, targets)  # type: ignore[no-any-return]

        compressor = compress_activations(model, policy or ActPolicy(default=KEEP))
        if policy is not None and isinstance(policy.default, RunningSpec):
            warm_up(compressor, model, source, tokens.shape[1], amp=amp)
        found = gradient_error(model, loss_of, compressor)
        assert found.loss_is_equal, f"{name} changed forward"
        saved.append(compressor.report().bytes_after / 1e6)
        errors.append(found.total)
        worst.append(found.worst)
    bench.row(precision, name, "saved", "MB", saved)
    if name != "exact":
        exact = measured(bench, precision, "exact", "saved")
        bench.row(precision, name, "saved_vs_exact", "ratio", [total / exact for total in saved])
    if policy is not None:
        bench.row(precision, name, "gradient_error", "ratio", errors)
        bench.row(precision, name, "gradient_error_worst_parameter", "ratio", worst)


def measured(bench: Bench, case: str, system: str, metric: str) -> float:
    value = bench.median(case, system, metric)
    assert value is not None
    return value


def warm_up(compressor: Any, model: GPT, source: torch.Tensor, length: int, *, amp: bool) -> None:
    """Four batches for the running ranges to settle on, then the counters start again."""
    generator = torch.Generator().manual_seed(55)
    for _ in range(4):
        tokens, targets = batch(source, 1, length, generator)
        with compressor, torch.autocast("cpu", torch.bfloat16, enabled=amp):
            model(tokens, targets)
    compressor.stats.reset()


def amp_error(model: GPT, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    errors = []
    for tokens, targets in batches:
        grads = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = model(tokens, targets)
            grads.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))]))
        errors.append(float((grads[1] - grads[0]).norm() / grads[0].norm()))
    return errors


def loss_curves(bench: Bench, *, quick: bool) -> None:
    """Three seeds of 300 steps, each system from the same weights on the same batches. What counts is how far the mean loss of
    the last 50 lies from the exact run's of the same seed, against what another seed changes in exact runs."""
    source = text()
    seeds, steps, window = ((0,), 10, 5) if quick else ((0, 1, 2), 300, 50)
    names = ("exact", "int8", "mixed int4/int8", "mesa as published" + EXPLICIT)
    curves: dict[str, list[list[float]]] = {name: [] for name in names}
    for seed in seeds:
        for name in names:
            torch.manual_seed(seed)
            model = with_attention(GPT(128, 4, 2, 128), name)
            policy = POLICIES[name]
            context = None if policy is None else compress_activations(model, policy, seed=seed)
            losses = train(model, source, steps, seed + 10, context, 128)
            curves[name].append([statistics.mean(losses[i : i + window]) for i in range(0, steps, window)])
            say(f"seed {seed} {name}: " + " ".join(f"{mean:.4f}" for mean in curves[name][-1]))
    for name in names:
        for i in range(steps // window):
            bench.row("loss", name, f"steps {i * window + 1} to {(i + 1) * window}", "nats", [c[i] for c in curves[name]])
    exact = [curve[-1] for curve in curves["exact"]]
    noise = max(exact) - min(exact)
    bench.row("loss", "exact", "range of the last over seeds", "nats", [noise])
    for name in names[1:]:
        shifts = [curve[-1] - own for curve, own in zip(curves[name], exact, strict=True)]
        bench.row("loss", name, "shift of the last, same seed", "nats", shifts)
        if noise and not name.startswith("mesa"):
            short = name.partition(" ")[0]
            bench.goal(f"{short}_loss_shift_vs_seed_noise", 1.0, max(map(abs, shifts)) / noise)


def chunked(bench: Bench, *, quick: bool) -> None:
    """Four chunks; earlier chunks' K and V packed."""
    source, model = trained(quick=quick)
    with_attention(model, "exact")
    length = model.position.num_embeddings
    chunk = length // 4

    def gradients() -> torch.Tensor:
        found = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return found

    specs = {
        "exact": KVSpec(key=None, value=None),
        "int8": KVSpec(key=INT8, value=INT8),
        "int4, KIVI layout": KVSpec(),
        "int4, KIVI layout, GEAR": KVSpec(gear=GearSpec()),
        "mxfp8": KVSpec(key=MXFP8, value=MXFP8),
        "mxint8 along channels": KVSpec(key=ALONG_CHANNELS, value=ALONG_CHANNELS),
        "mxint8 along channels, sorted": KVSpec(key=ALONG_CHANNELS, value=ALONG_CHANNELS, reorder=True),
    }
    errors: dict[str, list[float]] = {name: [] for name in specs}
    ratios: dict[str, float] = {}
    for seed in (77,) if quick else (77, 78, 79):
        tokens, targets = batch(source, 1, length, torch.Generator().manual_seed(seed))
        pieces = [(tokens[:, i : i + chunk], targets[:, i : i + chunk], i) for i in range(0, length, chunk)]
        model.zero_grad()
        (4 * model(tokens, targets)).backward()
        exact = gradients()
        for name, spec in specs.items():
            result = chunked_backward(lambda piece, context: model(*piece, context), pieces, ChunkKVStore(spec))
            errors[name].append(float((gradients() - exact).norm() / exact.norm()))
            newest = result.kv_exact_bytes / 4
            ratios[name] = (result.kv_bytes - newest) / (result.kv_exact_bytes - newest)
    for name in specs:
        bench.row("chunked", name, "gradient_error", "ratio", errors[name])
        bench.row("chunked", name, "past_kv_bytes_vs_fp32", "ratio", [ratios[name]])
    bench.goal("kv_int4_error", 1e-2, statistics.median(errors["int4, KIVI layout"]))
    bench.goal("kv_int4_bytes_vs_bf16", 0.30, 2 * ratios["int4, KIVI layout"])


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def bandwidth(bench: Bench, *, quick: bool) -> None:
    """Bytes read and written by second against a device-to-device copy of the same tensor, interleaved."""
    n = 1 << (26 if quick else 29)
    x = torch.randn(n, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(x)
    specs = {"int8 block 64": INT8, "int4 asymmetric block 64": INT4, "mxint8": MXINT8, "mxfp8": MXFP8}
    packed = {name: quantize(x, spec) for name, spec in specs.items()}
    jobs: dict[str, tuple[Callable[[], object], int]] = {"copy": (lambda: target.copy_(x), 2 * x.nbytes)}
    for name, spec in specs.items():
        moved = x.nbytes + packed[name].nbytes
        jobs[f"quantize {name}"] = (lambda spec=spec: quantize(x, spec), moved)  # type: ignore[misc]
        jobs[f"dequantize {name}"] = (lambda name=name: dequantize(packed[name]), moved)  # type: ignore[misc]
    speeds: dict[str, list[float]] = {name: [] for name in jobs}
    for round_ in range(3 + (5 if quick else 15)):
        for name, (job, moved) in jobs.items():
            seconds = timed(job)
            if round_ >= 3:
                speeds[name].append(moved / seconds / 1e9)
    for name, values in speeds.items():
        bench.row("bandwidth", name, "moved", "GB/s", values)
        if name != "copy":
            share = [a / b for a, b in zip(values, speeds["copy"], strict=True)]
            bench.row("bandwidth", name, "vs copy", "ratio", share)
    for kind in ("quantize", "dequantize"):
        share = [a / b for a, b in zip(speeds[f"{kind} int8 block 64"], speeds["copy"], strict=True)]
        bench.goal(f"{kind}_int8_vs_copy", 0.8, statistics.median(share), at_most=False)


def timed(job: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    job()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


class LlamaBlock(nn.Module):
    """One layer of Llama-3-8B: RMSNorm, grouped attention of 32 query and 8 key heads, SwiGLU of 14336."""

    def __init__(self, width: int = 4096, heads: int = 32, kv_heads: int = 8, hidden: int = 14336) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        h = self.norm1(x)
        q = self.q(h).view(b, t, self.heads, self.head_dim).transpose(1, 2)
        k, v = self.kv(h).view(b, t, 2, self.kv_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(a.transpose(1, 2).reshape(b, t, d))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))  # type: ignore[no-any-return]


class Stack(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(LlamaBlock() for _ in range(layers))
        self.checkpointed: str | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            if self.checkpointed is None:
                x = block(x)
            else:
                kwargs = {} if self.checkpointed == "full" else {"context_fn": selective}
                x = checkpoint(block, x, use_reentrant=False, **kwargs)
        return x.float().square().mean()


def selective() -> Any:
    """torch's selective checkpointing: keep matrix products and attention, recompute the rest."""
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    ops = torch.ops.aten
    kept = [ops.mm.default, ops._scaled_dot_product_flash_attention.default, ops._scaled_dot_product_cudnn_attention.default]
    return create_selective_checkpoint_contexts(kept)


@contextlib.contextmanager
def system(name: str, model: Stack) -> Iterator[AbstractContextManager[object]]:
    model.checkpointed = {"full checkpointing": "full", "selective checkpointing": "selective"}.get(name)
    model.checkpointed = "full" if name.startswith("checkpointing + ") else model.checkpointed
    if name == "offload (save_on_cpu)":
        yield torch.autograd.graph.save_on_cpu(pin_memory=True)
    elif name in ("plain", "full checkpointing", "selective checkpointing"):
        yield nullcontext()
    else:
        policy = (
            mixed_policy() if "mixed" in name else ActPolicy(default=INT4, attention=INT4) if "int4" in name else ActPolicy()
        )
        yield compress_activations(model, policy, offload="cpu" if "offload" in name else None)
    model.checkpointed = None


SYSTEMS = (
    "plain",
    "int8",
    "mixed int4/int8",
    "int4 + rebuilt attention",
    "selective checkpointing",
    "full checkpointing",
    "checkpointing + int8 boundaries",
    "offload (save_on_cpu)",
    "int8 + offload",
)


def one_step(model: Stack, x: torch.Tensor, context: AbstractContextManager[object]) -> None:
    with context:
        loss = model(x)
    loss.backward()
    model.zero_grad(set_to_none=True)


def block_stack(bench: Bench, *, quick: bool) -> None:
    """Forward and backward of four Llama-3-8B layers in bfloat16, equal batch for all."""
    model = Stack(4).to("cuda", torch.bfloat16)
    x = torch.randn(1, 4096 if quick else 16384, 4096, device="cuda", dtype=torch.bfloat16)
    tokens = x.shape[1]
    held = torch.cuda.memory_allocated()
    seconds: dict[str, list[float]] = {name: [] for name in SYSTEMS}
    for name in SYSTEMS:
        with system(name, model) as context:
            try:
                for round_ in range(2 + (2 if quick else 5)):
                    torch.cuda.reset_peak_memory_stats()
                    took = timed(lambda context=context: one_step(model, x, context))  # type: ignore[misc]
                    if round_ >= 2:
                        seconds[name].append(took)
                peak = torch.cuda.max_memory_allocated() - held
            except (RuntimeError, torch.OutOfMemoryError) as error:
                bench.absent("llama stack", name, "step", "ms", str(error).splitlines()[0])
                continue
        bench.row("llama stack", name, "step", "ms", [s * 1e3 for s in seconds[name]])
        bench.row(
            "llama stack", name, "step vs plain", "ratio", [s / statistics.median(seconds["plain"]) for s in seconds[name]]
        )
        bench.row("llama stack", name, "peak above weights", "GiB", [peak / 2**30])
        bench.row("llama stack", name, "peak per token-layer", "KiB", [peak / 2**10 / tokens / 4])
        torch.cuda.empty_cache()


def longest_sequence(bench: Bench, *, quick: bool) -> None:
    """The longest sequence, in steps of 8192 tokens, whose step fits in 40 GiB with four layers."""
    if quick:
        return
    model = Stack(4).to("cuda", torch.bfloat16)
    limit = 40 * 2**30
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)

    def fits(name: str, tokens: int) -> bool:
        torch.cuda.empty_cache()
        try:
            x = torch.randn(1, tokens, 4096, device="cuda", dtype=torch.bfloat16)
            with system(name, model) as context:
                one_step(model, x, context)
        except torch.OutOfMemoryError:
            model.zero_grad(set_to_none=True)
            return False
        return True

    for name in ("plain", "int8", "mixed int4/int8", "full checkpointing", "checkpointing + int8 boundaries"):
        low, high = 0, 64  # in units of 8192 tokens
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(name, middle * 8192) else (low, middle)
        bench.row("longest sequence", name, "tokens in 40 GiB", "tokens", [low * 8192])
    torch.cuda.set_per_process_memory_fraction(1.0)


PARTS = {"bytes": bytes_and_errors, "chunks": chunked, "loss": loss_curves}


GPU_ROWS = (
    ("bandwidth", "quantize vs copy", "ratio"),
    ("bandwidth", "dequantize vs copy", "ratio"),
    ("llama stack", "step vs plain", "ratio"),
    ("llama stack", "peak above weights", "GiB"),
    ("longest sequence", "tokens in 40 GiB", "tokens"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of progress alone")
    parser.add_argument("--quick", action="store_true", help="smaller and fewer, to see that it runs; not to be quoted")
    parser.add_argument("--only", choices=sorted(PARTS), help="one part of the measurement on the CPU")
    parser.add_argument("--save", type=Path, help="write what has been measured so far to this file, row by row")
    parser.add_argument("--gpu", action="store_true", help="measure on a CUDA device instead of the CPU")
    options = parser.parse_args()
    bench, start = Bench(options.save), time.perf_counter()
    if options.gpu and not torch.cuda.is_available():
        for case, metric, unit in GPU_ROWS:
            bench.absent(case, "int8", metric, unit, "unmeasured: no CUDA device here")
    elif options.gpu:
        for part in (bandwidth, block_stack, longest_sequence):
            part(bench, quick=options.quick)
    else:
        for name, part in PARTS.items():
            if options.only in (None, name):
                part(bench, quick=options.quick)
    say(f"{time.perf_counter() - start:.0f} s")
    if options.json:
        print(bench.as_json())


if __name__ == "__main__":
    main()
