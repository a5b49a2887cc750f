"""Writes checkpoints in the layout of Megatron-Core's GPT, cut for tensor, pipeline and expert parallelism, from a state dict.

Megatron is not needed. Everything is cut with torch alone, by what Megatron's documentation says: attention is fused by groups of
heads (for each group its queries, then its key, then its value), gate and up are fused on each rank, the vocabulary is padded, and
every stage counts its layers from 0.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import torch

from tests.ckpt.zero_files import borrowed_names

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    layers: int = 4
    hidden: int = 16
    heads: int = 8
    groups: int = 4
    head: int = 3
    inner: int = 12
    vocabulary: int = 37
    experts: int = 0


class ModelType(Enum):
    encoder_or_decoder = 1


def state(shape: Shape, seed: int = 0) -> Tensors:
    """The model as a checkpoint should hold it: no fusing, no padding, layers counted through."""
    torch.manual_seed(seed)
    found = {"tok_embeddings.weight": torch.randn(shape.vocabulary, shape.hidden)}
    for layer in range(shape.layers):
        at = f"layers.{layer}"
        found[f"{at}.attention_norm.weight"] = torch.randn(shape.hidden)
        found[f"{at}.wq.weight"] = torch.randn(shape.heads * shape.head, shape.hidden)
        found[f"{at}.wk.weight"] = torch.randn(shape.groups * shape.head, shape.hidden)
        found[f"{at}.wv.weight"] = torch.randn(shape.groups * shape.head, shape.hidden)
        found[f"{at}.wo.weight"] = torch.randn(shape.hidden, shape.heads * shape.head)
        lead = (shape.experts,) if shape.experts else ()
        place = f"{at}.experts." if shape.experts else f"{at}."
        end = "" if shape.experts else ".weight"
        found[f"{place}w1{end}"] = torch.randn(*lead, shape.inner, shape.hidden)
        found[f"{place}w3{end}"] = torch.randn(*lead, shape.inner, shape.hidden)
        found[f"{place}w2{end}"] = torch.randn(*lead, shape.hidden, shape.inner)
    found["norm.weight"] = torch.randn(shape.hidden)
    found["output.weight"] = torch.randn(shape.vocabulary, shape.hidden)
    return found


RULES = """
numbering = "local"

[[rule]]
match = "embedding.word_embeddings.weight"
stored = ["tok_embeddings.weight"]
tp = 0
pad = 8
extent = 37
stage = "first"

[[rule]]
match = "output_layer.weight"
stored = ["output.weight"]
tp = 0
pad = 8
extent = 37
stage = "last"

[[rule]]
match = "decoder.final_layernorm.weight"
stored = ["norm.weight"]
stage = "last"

[[rule]]
match = "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight"
stored = ["layers.*.attention_norm.weight"]

[[rule]]
match = "decoder.layers.*.self_attention.linear_qkv.weight"
stored = ["layers.*.wq.weight", "layers.*.wk.weight", "layers.*.wv.weight"]
tp = 0
groups = 4
blocks = [2, 1, 1]

[[rule]]
match = "decoder.layers.*.self_attention.linear_proj.weight"
stored = ["layers.*.wo.weight"]
tp = 1

[[rule]]
match = "decoder.layers.*.mlp.linear_fc1.weight"
stored = ["layers.*.w1.weight", "layers.*.w3.weight"]
tp = 0
blocks = [1, 1]

[[rule]]
match = "decoder.layers.*.mlp.linear_fc2.weight"
stored = ["layers.*.w2.weight"]
tp = 1

[[rule]]
match = "decoder.layers.*.mlp.experts.local_experts.{}.linear_fc1.weight"
stored = ["layers.*.experts.w1", "layers.*.experts.w3"]
tp = 0
blocks = [1, 1]

[[rule]]
match = "decoder.layers.*.mlp.experts.local_experts.{}.linear_fc2.weight"
stored = ["layers.*.experts.w2"]
tp = 1
"""


def rank_state(full: Tensors, shape: Shape, tp: tuple[int, int], pp: tuple[int, int], ep: tuple[int, int] = (0, 1)) -> Tensors:
    """What the rank (index, size) along each axis holds, under Megatron's names."""
    (t, ts), (p, ps), (e, es) = tp, pp, ep
    each = shape.layers // ps
    found: Tensors = {}
    if p == 0:
        found["embedding.word_embeddings.weight"] = _vocabulary(full["tok_embeddings.weight"], t, ts)
    for local, layer in enumerate(range(p * each, (p + 1) * each)):
        at, to = f"layers.{layer}", f"decoder.layers.{local}"
        found[f"{to}.self_attention.linear_qkv.layer_norm_weight"] = full[f"{at}.attention_norm.weight"]
        found[f"{to}.self_attention.linear_qkv.weight"] = _fused_attention(full, at, shape).chunk(ts)[t]
        found[f"{to}.self_attention.linear_proj.weight"] = full[f"{at}.wo.weight"].chunk(ts, 1)[t]
        if shape.experts:
            mine = shape.experts // es
            for number, expert in enumerate(range(e * mine, (e + 1) * mine)):
                w1, w2, w3 = (full[f"{at}.experts.w{index}"][expert] for index in (1, 2, 3))
                name = f"{to}.mlp.experts.local_experts.{number}"
                found[f"{name}.linear_fc1.weight"] = torch.cat([w1.chunk(ts)[t], w3.chunk(ts)[t]])
                found[f"{name}.linear_fc2.weight"] = w2.chunk(ts, 1)[t]
        else:
            gate_up = [full[f"{at}.{name}.weight"].chunk(ts)[t] for name in ("w1", "w3")]
            found[f"{to}.mlp.linear_fc1.weight"] = torch.cat(gate_up)
            found[f"{to}.mlp.linear_fc2.weight"] = full[f"{at}.w2.weight"].chunk(ts, 1)[t]
    if p == ps - 1:
        found["decoder.final_layernorm.weight"] = full["norm.weight"]
        found["output_layer.weight"] = _vocabulary(full["output.weight"], t, ts)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _vocabulary(weight: torch.Tensor, t: int, ts: int) -> torch.Tensor:
    padded = torch.cat([weight, torch.zeros(-len(weight) % (8 * ts), weight.shape[1])])
    return padded.chunk(ts)[t]


def _fused_attention(full: Tensors, at: str, shape: Shape) -> torch.Tensor:
    per_group = shape.heads // shape.groups
    q = full[f"{at}.wq.weight"].reshape(shape.groups, per_group * shape.head, shape.hidden)
    k = full[f"{at}.wk.weight"].reshape(shape.groups, shape.head, shape.hidden)
    v = full[f"{at}.wv.weight"].reshape(shape.groups, shape.head, shape.hidden)
    return torch.cat([q, k, v], 1).reshape(-1, shape.hidden)


def write(root: Path, full: Tensors, shape: Shape, *, tp: int = 1, pp: int = 1, ep: int = 1, chunks: int = 1) -> Path:
    """`root/iter_0000007` and the file that names it; with `chunks` every rank holds several pipeline stages."""
    directory = root / "iter_0000007"
    with borrowed_names(megatron__core__enums__ModelType=ModelType):
        for t in range(tp):
            for p in range(pp):
                for e in range(ep):
                    name = f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 or ep > 1 else "") + (f"_{e:03d}" if ep > 1 else "")
                    (directory / name).mkdir(parents=True)
                    stages = [c * pp + p for c in range(chunks)]
                    parts = [rank_state(full, shape, (t, tp), (stage, pp * chunks), (e, ep)) for stage in stages]
                    models = {"model": parts[0]} if chunks == 1 else {f"model{c}": part for c, part in enumerate(parts)}
                    torch.save({**_about(shape), **models}, directory / name / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("7")
    return directory


def _about(shape: Shape) -> dict[str, object]:
    arguments = argparse.Namespace(swiglu=True, vocab_size=shape.vocabulary, model_type=ModelType.encoder_or_decoder)
    return {
        "args": arguments,
        "checkpoint_version": 3.0,
        "iteration": 7,
        "rng_state": [{"np_rng_state": np.arange(4), "random_rng_state": (3, (1, 2))}],
        "optimizer": {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
    }
