"""Every rule file in docs/ckpt.md does what the page says it does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from holdfast import ckpt
from holdfast.arrays import ArraySpec
from holdfast.ckpt.exporting import export_safetensors
from holdfast.ckpt.foreign.join import Held, join
from holdfast.ckpt.foreign.source import Source, tensor_source
from holdfast.ckpt.importing import import_checkpoint, open_source
from holdfast.ckpt.mesh import Mesh
from holdfast.ckpt.reshard import plan_reshard
from holdfast.ckpt.rules import load_rules
from holdfast.errors import LayoutMismatch
from tests.ckpt.test_deepspeed import read

PAGE = (Path(__file__).parents[2] / "docs/ckpt.md").read_text()
EXAMPLES = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
FUSED, STACKED, SEPARATE, PADDED, AVERAGED, MEGATRON = range(6)


@pytest.fixture
def rules_of(tmp_path):
    def load(number: int) -> ckpt.Rules:
        (tmp_path / f"{number}.toml").write_text(EXAMPLES[number])
        return load_rules(tmp_path / f"{number}.toml")

    return load


def save(root: Path, tensors: dict[str, torch.Tensor]) -> Path:
    named = {f"model/{name}": tensor_source(f"model/{name}", tensor) for name, tensor in tensors.items()}
    return import_checkpoint(Source("torch", named, {}), root)


def ranks(root: Path, mesh: str, rules: ckpt.Rules, out: Path) -> list[dict[str, torch.Tensor]]:
    ckpt.restore(root, mesh, out, rules=rules)
    files = sorted(out.iterdir())
    return [torch.load(file, weights_only=True)["arrays"] for file in files]


def test_the_page_has_the_examples_that_are_tested_here():
    assert len(EXAMPLES) == 6


def test_fused_blocks_are_cut_each_for_itself(tmp_path, rules_of):
    qkv, gate_up = torch.randn(6144, 4), torch.randn(96, 4)
    o, down = torch.randn(4, 64), torch.randn(4, 24)
    at = "layers.0"
    names = ("qkv_proj", "gate_up_proj", "o_proj", "down_proj")
    run = save(tmp_path / "run", {f"{at}.{name}.weight": t for name, t in zip(names, (qkv, gate_up, o, down), strict=True)})
    one, two = ranks(run, "tp=2", rules_of(FUSED), tmp_path / "out")
    q, k, v = qkv.split([4096, 1024, 1024])
    assert torch.equal(one[f"model/{at}.qkv_proj.weight"], torch.cat([q[:2048], k[:512], v[:512]]))
    assert torch.equal(two[f"model/{at}.gate_up_proj.weight"], torch.cat([gate_up[24:48], gate_up[72:]]))
    assert torch.equal(two[f"model/{at}.o_proj.weight"], o[:, 32:])
    assert torch.equal(one[f"model/{at}.down_proj.weight"], down[:, :12])
    with pytest.raises(LayoutMismatch, match="in units of 128 cannot be cut into 16 equal parts"):
        ckpt.restore(run, "tp=16", tmp_path / "heads", rules=rules_of(FUSED))


def test_stacked_experts_are_dealt_out(tmp_path, rules_of):
    w1 = torch.randn(8, 6, 5)
    run = save(tmp_path / "run", {"layers.0.experts.w1": w1})
    found = ranks(run, "ep=4", rules_of(STACKED), tmp_path / "out")
    assert all(torch.equal(rank["model/layers.0.experts.w1"], part) for rank, part in zip(found, w1.chunk(4), strict=True))


def test_experts_of_their_own_are_stacked_and_taken_apart(tmp_path, rules_of):
    safetensors = pytest.importorskip("safetensors.torch")
    name = "model.layers.{}.block_sparse_moe.experts.{}.w1.weight".format
    tensors = {name(layer, expert): torch.randn(6, 5) for layer in range(2) for expert in range(11)}
    safetensors.save_file({**tensors, "norm": torch.ones(3)}, tmp_path / "model.safetensors")
    source = open_source(tmp_path / "model.safetensors", rules=rules_of(SEPARATE))
    checkpoint = ckpt.open_checkpoint(import_checkpoint(source, tmp_path / "run"))
    assert set(checkpoint.specs) == {"model/layers.0.experts.w1", "model/layers.1.experts.w1", "model/norm"}
    stacked = torch.stack([tensors[name(1, expert)] for expert in range(11)])
    assert torch.equal(read(checkpoint, "model/layers.1.experts.w1"), stacked)
    export_safetensors(checkpoint, tmp_path / "out", rules=rules_of(SEPARATE))
    found = safetensors.load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == {*tensors, "norm"}
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


def test_a_vocabulary_is_padded_on_the_ranks_and_not_in_the_checkpoint(tmp_path, rules_of):
    table = torch.randn(32000, 2)
    found = ranks(save(tmp_path / "run", {"embed_tokens.weight": table}), "tp=3", rules_of(PADDED), tmp_path / "out")
    parts = [rank["model/embed_tokens.weight"] for rank in found]
    assert [len(part) for part in parts] == [32256 // 3] * 3
    whole = torch.cat(parts)
    assert torch.equal(whole[:32000], table)
    assert not whole[32000:].any()
    held = [Held(f"rank {i}", {"model/embed_tokens.weight": tensor_source("e", part)}, tp=i) for i, part in enumerate(parts)]
    again = join(held, rules_of(PADDED))["model/embed_tokens.weight"]
    assert again.spec == ArraySpec("model/embed_tokens.weight", "float32", (32000, 2))
    checkpoint = ckpt.open_checkpoint(import_checkpoint(Source("torch", {again.spec.name: again}, {}), tmp_path / "again"))
    assert torch.equal(read(checkpoint, "model/embed_tokens.weight"), table)


def test_copies_that_drifted_apart_are_averaged(tmp_path, rules_of):
    copies = [torch.randn(40).bfloat16() for _ in range(3)]
    held = [Held(f"rank {i}", {"model/norm.weight": tensor_source("n", copy)}, tp=i) for i, copy in enumerate(copies)]
    joined = join(held, rules_of(AVERAGED))
    checkpoint = ckpt.open_checkpoint(import_checkpoint(Source("torch", joined, {}), tmp_path / "run"))
    mean = torch.stack(copies).double().mean(0).bfloat16()
    assert torch.equal(read(checkpoint, "model/norm.weight"), mean)
    with pytest.raises(LayoutMismatch, match="rank 0 and rank 1 hold different values"):
        import_checkpoint(Source("torch", join(held, ckpt.Rules()), {}), tmp_path / "strict")


def test_pipeline_stages_get_the_names_and_parts_that_megatron_has(tmp_path, rules_of):
    hidden, head, groups = 4, 2, 8
    full = {"tok_embeddings.weight": torch.randn(32000, hidden), "norm.weight": torch.randn(hidden)}
    for layer in range(4):
        for name, rows in (("wq", 4 * groups * head), ("wk", groups * head), ("wv", groups * head), ("w1", 6), ("w3", 6)):
            full[f"layers.{layer}.{name}.weight"] = torch.randn(rows, hidden)
        full[f"layers.{layer}.wo.weight"], full[f"layers.{layer}.w2.weight"] = torch.randn(hidden, 64), torch.randn(hidden, 6)
    found = ranks(save(tmp_path / "run", full), "pp=2,tp=2", rules_of(MEGATRON), tmp_path / "out")
    first, last = found[0], found[3]
    assert "model/embedding.word_embeddings.weight" in first
    assert len(first["model/embedding.word_embeddings.weight"]) == 16000
    assert "model/decoder.final_layernorm.weight" in last
    parts = [full[f"layers.2.{name}.weight"].reshape(groups, -1, hidden) for name in ("wq", "wk", "wv")]
    fused = torch.cat(parts, 1).reshape(-1, hidden)
    assert torch.equal(found[2]["model/decoder.layers.0.self_attention.linear_qkv.weight"], fused.chunk(2)[0])
    gate_up = torch.cat([full[f"layers.3.{name}.weight"][3:] for name in ("w1", "w3")])
    assert torch.equal(last["model/decoder.layers.1.mlp.linear_fc1.weight"], gate_up)
    held = [
        Held(f"{i}", {n: tensor_source(n, t) for n, t in rank.items()}, tp=i % 2, pp=i // 2) for i, rank in enumerate(found)
    ]
    again = ckpt.open_checkpoint(import_checkpoint(Source("torch", join(held, rules_of(MEGATRON)), {}), tmp_path / "again"))
    assert set(again.specs) == {f"model/{name}" for name in full}
    assert all(torch.equal(read(again, f"model/{name}"), tensor) for name, tensor in full.items())


# -- more of the language ----------------------------------------------------------------------------------------------


def test_uneven_stages_are_as_the_rules_say():
    specs = {f"model/layers.{n}.w": ArraySpec(f"model/layers.{n}.w", "float32", (4,)) for n in range(5)}
    plan = plan_reshard(specs, Mesh.parse("pp=2"), rules=ckpt.Rules(stages=(1, 4), numbering="local"))
    assert [[local.name[-3:] for local in rank] for rank in plan.ranks] == [["0.w"], ["0.w", "1.w", "2.w", "3.w"]]
    with pytest.raises(LayoutMismatch, match="2 stages with 6 layers, the checkpoint has 5"):
        plan_reshard(specs, Mesh.parse("pp=2"), rules=ckpt.Rules(stages=(2, 4)))


def test_half_of_a_fused_array_is_no_fused_array():
    specs = {"model/q": ArraySpec("model/q", "float32", (8, 2))}
    rules = ckpt.Rules(rules=(ckpt.Rule(match="qk", tp=0, blocks=(1, 1), stored=("q", "k")),))
    with pytest.raises(LayoutMismatch, match="the checkpoint lacks model/k"):
        plan_reshard(specs, Mesh.parse("tp=2"), rules=rules)


def test_optimizer_state_follows_its_parameter_through_fusing():
    names = [f"{group}{p}{state}" for p in "qk" for group, state in (("model/", ""), ("optim/", "/exp_avg"))]
    specs = {name: ArraySpec(name, "float32", (8, 2)) for name in names}
    specs |= {f"optim/{p}/step": ArraySpec(f"optim/{p}/step", "float32", ()) for p in "qk"}
    rules = ckpt.Rules(rules=(ckpt.Rule(match="qk", tp=0, blocks=(1, 1), stored=("q", "k")),))
    plan = plan_reshard(specs, Mesh.parse("tp=2"), rules=rules)
    assert {local.name: local.shape for local in plan.ranks[1]} == {
        "model/qk": (8, 2),
        "optim/qk/exp_avg": (8, 2),
        "optim/qk/step": (),
    }
