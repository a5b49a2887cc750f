"""Megatron's checkpoints: cut for any parallelism, they come in as one model, and go out again as they were."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from holdfast import ckpt
from holdfast.ckpt.importing import import_checkpoint, open_source
from holdfast.errors import LayoutMismatch, MissingData
from tests.ckpt import megatron_files
from tests.ckpt.megatron_files import RULES, Shape, Tensors, rank_state, state
from tests.ckpt.test_deepspeed import read

DENSE, EXPERTS = Shape(), Shape(experts=8)


@pytest.fixture
def rules(tmp_path) -> ckpt.Rules:
    (tmp_path / "rules.toml").write_text(RULES)
    return ckpt.load_rules(tmp_path / "rules.toml")


def assert_model(path: Path, full: Tensors) -> None:
    checkpoint = ckpt.open_checkpoint(path)
    assert checkpoint.verify().is_whole
    assert set(checkpoint.specs) == {f"model/{name}" for name in full}
    for name, tensor in full.items():
        assert torch.equal(read(checkpoint, f"model/{name}"), tensor), name


CUTS = [(1, 1, 1, 1), (2, 1, 1, 1), (4, 1, 1, 1), (1, 4, 1, 1), (2, 2, 1, 1), (2, 2, 1, 2), (1, 1, 1, 4)]


@pytest.mark.parametrize(("tp", "pp", "ep", "chunks"), CUTS)
def test_a_dense_model_comes_in_whatever_it_was_cut_for(tmp_path, rules, tp, pp, ep, chunks):
    full = state(DENSE)
    megatron_files.write(tmp_path / "megatron", full, DENSE, tp=tp, pp=pp, ep=ep, chunks=chunks)
    source = open_source(tmp_path / "megatron", rules=rules)
    assert (source.kind, source.step) == ("megatron", 7)
    assert any("optimizer" in what for what in source.left_out)
    assert_model(import_checkpoint(source, tmp_path / "run"), full)


@pytest.mark.parametrize(("tp", "pp", "ep"), [(1, 1, 1), (1, 1, 4), (2, 2, 2)])
def test_experts_are_stacked_whoever_held_them(tmp_path, rules, tp, pp, ep):
    full = state(EXPERTS)
    megatron_files.write(tmp_path / "megatron", full, EXPERTS, tp=tp, pp=pp, ep=ep)
    assert_model(import_checkpoint(open_source(tmp_path / "megatron", rules=rules), tmp_path / "run"), full)


@pytest.mark.parametrize(
    ("shape", "mesh", "tp", "pp", "ep"),
    [(DENSE, "pp=2,tp=2", 2, 2, 1), (DENSE, "tp=4", 4, 1, 1), (EXPERTS, "pp=2,ep=2,tp=2", 2, 2, 2)],
)
def test_a_restore_by_the_same_rules_gives_each_rank_its_own_names_and_bytes(tmp_path, rules, shape, mesh, tp, pp, ep):
    full = state(shape)
    megatron_files.write(tmp_path / "megatron", full, shape)
    import_checkpoint(open_source(tmp_path / "megatron", rules=rules), tmp_path / "run")
    ckpt.restore(tmp_path / "run", mesh, tmp_path / "out", rules=rules)
    ranks = [(p, e, t) for p in range(pp) for e in range(ep) for t in range(tp)]
    for rank, (p, e, t) in enumerate(ranks):
        found = torch.load(tmp_path / f"out/rank-{rank:05d}.pt", weights_only=True)["arrays"]
        expected = rank_state(full, shape, (t, tp), (p, pp), (e, ep))
        assert set(found) == {f"model/{name}" for name in expected}
        for name, tensor in expected.items():
            assert torch.equal(found[f"model/{name}"], tensor), (rank, name)


def test_without_rules_megatrons_own_names_are_kept_and_joined(tmp_path):
    full = state(DENSE)
    megatron_files.write(tmp_path / "megatron", full, DENSE, tp=2, pp=2)
    checkpoint = ckpt.open_checkpoint(import_checkpoint(open_source(tmp_path / "megatron"), tmp_path / "run"))
    expected = rank_state(full, DENSE, (0, 1), (0, 1))
    expected["embedding.word_embeddings.weight"] = full["tok_embeddings.weight"]
    expected["output_layer.weight"] = full["output.weight"]
    assert set(checkpoint.specs) == {f"model/{name}" for name in expected}
    for name, tensor in expected.items():
        assert torch.equal(read(checkpoint, f"model/{name}"), tensor), name


def test_ranks_that_differ_where_they_should_not_are_named_with_the_rule_to_give(tmp_path, rules):
    full = state(DENSE)
    directory = megatron_files.write(tmp_path / "megatron", full, DENSE, tp=2)
    file = directory / "mp_rank_01/model_optim_rng.pt"
    models = [rank_state(full, DENSE, (t, 2), (0, 1)) for t in range(2)]
    name = "decoder.layers.2.self_attention.linear_qkv.layer_norm_weight"
    models[1][name] = models[1][name] + 0.5
    torch.save({"model": models[1], "iteration": 7}, file)
    with pytest.raises(LayoutMismatch, match=r"layers\.2\.attention_norm\.weight: tensor rank 0, .* average = true"):
        import_checkpoint(open_source(tmp_path / "megatron", rules=rules), tmp_path / "run")
    assert not list((tmp_path / "run").glob("step-*"))
    averaged = ckpt.Rule(match="decoder.layers.*.layer_norm_weight", average=True, stored=("layers.*.norm.weight",))
    both = ckpt.Rules(rules=(averaged, *rules.rules), numbering="local")
    checkpoint = ckpt.open_checkpoint(import_checkpoint(open_source(tmp_path / "megatron", rules=both), tmp_path / "run"))
    mean = ((models[0][name].double() + models[1][name].double()) / 2).float()
    assert torch.equal(read(checkpoint, "model/layers.2.self_attention.linear_qkv.norm.weight"), mean)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "do not say whether linear_fc1 is gated"),
        ({"swiglu": True, "group_query_attention": True, "num_query_groups": 1}, "1 query groups on 2 tensor ranks"),
    ],
)
def test_what_the_files_leave_open_is_asked_for_and_not_guessed(tmp_path, monkeypatch, arguments, words):
    about = {"args": argparse.Namespace(**arguments), "iteration": 7}
    monkeypatch.setattr(megatron_files, "_about", lambda shape: about)
    megatron_files.write(tmp_path / "megatron", state(DENSE), DENSE, tp=2)
    with pytest.raises(LayoutMismatch, match=words):
        open_source(tmp_path / "megatron")


def test_a_missing_rank_is_named(tmp_path, rules):
    directory = megatron_files.write(tmp_path / "megatron", state(DENSE), DENSE, tp=2, pp=2)
    (directory / "mp_rank_01_000/model_optim_rng.pt").unlink()
    with pytest.raises(MissingData, match="tensor rank 1, stage 0, expert rank 0 is missing"):
        open_source(tmp_path / "megatron", rules=rules)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (ckpt.Rule(match="*.linear_proj.weight", tp=0), r"hold different values|should hold|elements are held"),
        (ckpt.Rule(match="*.linear_qkv.weight", tp=0, blocks=(5, 2)), "do not add up"),
        (ckpt.Rule(match="*.linear_qkv.weight", tp=4), "cuts dimension 4, its shape is"),
        (ckpt.Rule(match="*word_embeddings.weight", tp=0, pad=8), "say how many rows are real"),
        (ckpt.Rule(match="*word_embeddings.weight", tp=0, extent=4000), "4000 rows are real, the ranks hold 48"),
    ],
)
def test_rules_that_do_not_fit_what_the_ranks_hold_are_refused(tmp_path, rule, words):
    megatron_files.write(tmp_path / "megatron", state(DENSE), DENSE, tp=2)
    if "different" in words:
        source = open_source(tmp_path / "megatron", rules=ckpt.Rules(rules=(rule,)))
        with pytest.raises(LayoutMismatch, match=words):
            import_checkpoint(source, tmp_path / "run")
        return
    with pytest.raises(LayoutMismatch, match=words):
        open_source(tmp_path / "megatron", rules=ckpt.Rules(rules=(rule,)))
