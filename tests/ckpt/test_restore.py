"""Any stored layout into any mesh: the parts that ranks get make up exactly what was saved."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from holdfast import ckpt
from holdfast.arrays import ITEMSIZE, ArraySpec, Box, shard_box
from holdfast.ckpt.mesh import Mesh
from holdfast.ckpt.reshard import LocalArray, plan_reshard
from holdfast.ckpt.rules import Rule, Rules, load_rules, rules_from
from holdfast.errors import ConfigError, CorruptData, LayoutMismatch
from tests.ckpt.saving import Sample, assert_holds, model, save

MESHES = [
    "dp=1",
    "dp=2",
    "dp=3",
    "fsdp=5",
    "ddp=2",
    "tp=2",
    "tp=3",
    "dp=2,tp=2",
    "pp=2",
    "pp=2,dp=2",
    "pp=2,dp=3,tp=2",
    "dp=64",
]
STORED = [((0, 4),), ((1, 2),), ((0, 2), (1, 2)), ()]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def put_together(files: Sequence[Path], samples: Sequence[Sample]) -> dict[str, bytes]:
    """The whole arrays, from the boxes that the rank files name."""
    whole = {s.spec.name: np.zeros((*s.spec.shape, ITEMSIZE[s.spec.dtype]), np.uint8) for s in samples}
    touched = {name: np.zeros(array.shape[:-1], bool) for name, array in whole.items()}
    for file in files:
        document = torch.load(file, weights_only=True)
        for name, tensor in document["arrays"].items():
            if not tensor.numel():
                continue
            offset, shape = document["boxes"][name]
            place = tuple(slice(a, a + n) for a, n in zip(offset, shape, strict=True))
            whole[name][place] = np.frombuffer(raw(tensor), np.uint8).reshape(*shape, -1)
            touched[name][place] = True
    assert all(array.all() for array in touched.values())
    return {name: array.tobytes() for name, array in whole.items()}


@pytest.fixture(scope="module", params=range(len(STORED)))
def stored(request, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stored")
    save(root, model(), STORED[request.param])
    return root


@pytest.mark.parametrize("mesh", MESHES)
def test_rank_files_make_up_what_was_saved(tmp_path, mesh, stored):
    samples = model()
    restored = ckpt.restore(stored, mesh, tmp_path / "out")
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == [rank.file for rank in restored.ranks]
    assert len(files) == Mesh.parse(mesh).ranks
    assert put_together(files, samples) == {sample.spec.name: sample.data for sample in samples}


def test_dp_ranks_get_the_chunks_that_torch_would_give_them(tmp_path):
    samples = [Sample.random("model/w", "float32", (10, 3)), Sample.random("model/few", "float32", (2, 3))]
    save(tmp_path / "run", samples)
    ckpt.restore(tmp_path / "run", "dp=4", tmp_path / "out")
    for sample in samples:
        whole = torch.frombuffer(bytearray(sample.data), dtype=torch.float32).reshape(sample.spec.shape)
        for rank in range(4):
            document = torch.load(tmp_path / "out" / f"rank-{rank:05d}.pt", weights_only=True)
            chunks = whole.chunk(4)
            expected = chunks[rank] if rank < len(chunks) else whole[:0]
            assert torch.equal(document["arrays"][sample.spec.name], expected)


def test_a_rank_file_has_what_its_job_needs(tmp_path):
    save(tmp_path / "run", model(), step=7)
    ckpt.restore(tmp_path / "run", "dp=2", tmp_path / "out")
    document = torch.load(tmp_path / "out/rank-00001.pt", weights_only=True)
    assert document["step"] == 7
    assert document["objects"] == {"rng": "[1,7]"}
    assert document["global_shapes"]["model/tok_embeddings.weight"] == [515, 48]
    assert document["boxes"]["model/tok_embeddings.weight"] == [[258, 0], [257, 48]]
    assert document["arrays"]["model/layers.0.wq.weight"].dtype == torch.bfloat16
    assert document["arrays"]["optim/layers.0.wq.weight/step"].shape == ()


def test_a_larger_world_gets_rank_zeros_objects(tmp_path):
    save(tmp_path / "run", model(), world=2)
    ckpt.restore(tmp_path / "run", "dp=4", tmp_path / "out")
    objects = [torch.load(tmp_path / f"out/rank-{rank:05d}.pt", weights_only=True)["objects"] for rank in range(4)]
    assert objects == [{"rng": "[0,1]"}, {"rng": "[1,1]"}, {"rng": "[0,1]"}, {"rng": "[0,1]"}]


def test_state_of_one_rank_goes_back_to_it_and_only_in_the_same_world(tmp_path):
    samples = [Sample.random("model/mean", "float32", (8,)), Sample.random("model/mean@rank-1", "float32", (8,), 9)]
    save(tmp_path / "run", samples, (), world=2)
    ckpt.restore(tmp_path / "run", "ddp=2", tmp_path / "two")
    ckpt.restore(tmp_path / "run", "ddp=3", tmp_path / "three")
    for mesh, expected in (("two", [0, 1]), ("three", [0, 0, 0])):
        for rank, which in enumerate(expected):
            document = torch.load(tmp_path / mesh / f"rank-{rank:05d}.pt", weights_only=True)
            assert list(document["arrays"]) == ["model/mean"]
            assert raw(document["arrays"]["model/mean"]) == samples[which].data


def test_safetensors_is_read_by_its_own_library(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    samples = model()
    save(tmp_path / "run", samples)
    ckpt.restore(tmp_path / "run", "dp=1", tmp_path / "one", "safetensors")
    found = safetensors.load_file(tmp_path / "one/model.safetensors")
    assert {name: raw(tensor) for name, tensor in found.items()} == {sample.spec.name: sample.data for sample in samples}
    ckpt.restore(tmp_path / "run", "dp=2", tmp_path / "two", "safetensors")
    halves = [safetensors.load_file(tmp_path / f"two/rank-0000{rank}.safetensors") for rank in range(2)]
    assert raw(torch.cat([half["model/norm.weight"] for half in halves])) == samples[1].data


def test_universal_is_a_checkpoint_again(tmp_path):
    samples = model()
    save(tmp_path / "run", samples, ((1, 2),), step=6)
    ckpt.restore(tmp_path / "run", "dp=3", tmp_path / "out", "universal")
    assert_holds(tmp_path / "out", samples, 6)
    checkpoint = ckpt.open_checkpoint(tmp_path / "out")
    assert checkpoint.verify().is_whole
    assert checkpoint.layout["mesh"] == {"dp": 3}
    assert sorted(checkpoint.objects) == [0, 1, 2]


def test_a_dry_run_writes_nothing_and_counts_the_same(tmp_path):
    save(tmp_path / "run", model())
    dry = ckpt.restore(tmp_path / "run", "dp=3", tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    wet = ckpt.restore(tmp_path / "run", "dp=3", tmp_path / "out")
    assert (dry.ranks, dry.nbytes, dry.read_nbytes) == (wet.ranks, wet.nbytes, wet.read_nbytes)
    assert sum(rank.nbytes for rank in dry.ranks) == dry.nbytes


def test_a_dry_run_measures_the_storage_and_says_how_long_reading_takes(tmp_path):
    save(tmp_path / "run", [*model(), Sample.random("model/large.weight", "float32", (900, 100))])
    dry = ckpt.restore(tmp_path / "run", "dp=3", tmp_path / "out", dry_run=True)
    assert dry.read_nbytes_per_s > 0
    assert dry.estimated_s == dry.read_nbytes / dry.read_nbytes_per_s
    assert ckpt.restore(tmp_path / "run", "dp=3", tmp_path / "out").estimated_s is None


def test_a_dry_run_that_meets_damage_says_so(tmp_path):
    path = save(tmp_path / "run", [Sample.random("model/large.weight", "float32", (900, 100))])
    with open(path / "model/large.weight/c/0/0", "r+b") as file:
        file.write(b"\xff\xfe")
    with pytest.raises(CorruptData, match=r"model/large\.weight"):
        ckpt.restore(tmp_path / "run", "dp=1", tmp_path / "out", dry_run=True)


def test_replicas_are_read_once_and_each_gets_its_file(tmp_path):
    samples = [*model(), Sample.random("model/large.weight", "float32", (900, 100))]
    save(tmp_path / "run", samples)
    once = ckpt.restore(tmp_path / "run", "dp=2", tmp_path / "out")
    read: list[int] = []
    thrice = ckpt.restore(tmp_path / "run", "ddp=3,dp=2", tmp_path / "copies", progress=read.append)
    assert thrice.read_nbytes == once.read_nbytes
    assert sum(read) == sum(sample.spec.nbytes for sample in samples)
    for rank in range(6):
        copy, original = (
            torch.load(tmp_path / place, weights_only=True)["arrays"]
            for place in (f"copies/rank-{rank:05d}.pt", f"out/rank-{rank % 2:05d}.pt")
        )
        assert {name: raw(tensor) for name, tensor in copy.items()} == {name: raw(tensor) for name, tensor in original.items()}


def test_after_an_error_the_output_is_as_it_was(tmp_path):
    path = save(tmp_path / "run", [*model(), Sample.random("model/large.weight", "float32", (900, 100))])
    with open(path / "model/large.weight/c/0/0", "r+b") as file:
        file.write(b"\xff")
    with pytest.raises(CorruptData, match=r"model/large\.weight"):
        ckpt.restore(tmp_path / "run", "dp=2", tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_only_some_arrays(tmp_path):
    save(tmp_path / "run", model())
    ckpt.restore(tmp_path / "run", "dp=1", tmp_path / "out", only=lambda name: name.startswith("model/"))
    names = torch.load(tmp_path / "out/rank-00000.pt", weights_only=True)["arrays"]
    assert set(names) == {sample.spec.name for sample in model() if sample.spec.name.startswith("model/")}


BOUNDED = """
import resource, sys
from holdfast import ckpt
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ckpt.restore(sys.argv[1], "dp=2", sys.argv[2], "safetensors", max_memory_nbytes=64 << 20)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_stays_below_the_bound(tmp_path):
    """192 MiB through 64 MiB, in a process of its own, by the kernel's account."""
    save(tmp_path / "run", [Sample.random("model/w", "uint8", (192 << 10, 1 << 10))], ((1, 2),))
    environment = {**os.environ, "PYTHONPATH": str(Path(ckpt.__file__).parents[2])}
    command = [sys.executable, "-c", BOUNDED, str(tmp_path / "run"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 64 << 20


@pytest.mark.parametrize(
    ("mesh", "error", "words"),
    [
        ("", ConfigError, "is not axis=size"),
        ("dp=0", ConfigError, "at least 1"),
        ("dp=two", ConfigError, "is not axis=size"),
        ("dp=2,dp=2", ConfigError, "named twice"),
        ("dp=2,fsdp=2", ConfigError, "dp and fsdp are one"),
        ("cp=2", ConfigError, "with an axis of"),
        ("dp=1000000000", ConfigError, "at most"),
        ("pp=3", LayoutMismatch, "3 pipeline stages need as many layers, the checkpoint has 2"),
        ("tp=64", LayoutMismatch, "cannot be cut into 64 parts for tp"),
        ("ep=2", LayoutMismatch, "cut no array of this checkpoint by ep"),
    ],
)
def test_an_impossible_mesh_is_refused(tmp_path, mesh, error, words):
    save(tmp_path / "run", model())
    with pytest.raises(error, match=words):
        ckpt.restore(tmp_path / "run", mesh, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_in_use_is_refused(tmp_path):
    save(tmp_path / "run", model())
    with pytest.raises(ConfigError, match="not empty"):
        ckpt.restore(tmp_path / "run", "dp=1", tmp_path / "run")
    with pytest.raises(ConfigError, match="format 'pickle' is not one of"):
        ckpt.restore(tmp_path / "run", "dp=1", tmp_path / "out", "pickle")
    with pytest.raises(ConfigError, match="of memory are too few"):
        ckpt.restore(tmp_path / "run", "dp=1", tmp_path / "out", max_memory_nbytes=1000)


# -- layout rules ------------------------------------------------------------------------------------------------------


def local_value(local: LocalArray, sources: dict[str, np.ndarray]) -> np.ndarray:
    out = np.zeros(local.shape, next(iter(sources.values())).dtype)
    for part in local.parts:
        place = tuple(slice(a, a + n) for a, n in zip(part.at, part.box.shape, strict=True))
        out[place] = sources[part.array][part.box.slices(Box.whole(sources[part.array].shape))]
    return out


def locals_of(name: str, value: np.ndarray, mesh: str, rules: Rules) -> list[np.ndarray]:
    specs = {name: ArraySpec(name, "int64", value.shape)}
    plan = plan_reshard(specs, Mesh.parse(mesh), rules=rules)
    return [local_value(rank[0], {name: value}) for rank in plan.ranks]


def test_fused_blocks_are_cut_each_for_itself():
    """Grouped attention: 8 query rows, 4 key rows, 4 value rows in one matrix, cut for two tensor-parallel ranks."""
    qkv = np.arange(16 * 3).reshape(16, 3)
    rules = Rules(rules=(Rule(match="*.qkv.weight", tp=0, blocks=(8, 4, 4)),))
    one, two = locals_of("model/layers.0.qkv.weight", qkv, "tp=2", rules)
    assert one.tolist() == np.concatenate([qkv[0:4], qkv[8:10], qkv[12:14]]).tolist()
    assert two.tolist() == np.concatenate([qkv[4:8], qkv[10:12], qkv[14:16]]).tolist()


def test_fsdp_cuts_what_tensor_parallelism_leaves_of_fused_blocks():
    qkv = np.arange(16 * 3).reshape(16, 3)
    rules = Rules(rules=(Rule(match="*.qkv.weight", tp=0, blocks=(8, 4, 4)),))
    tp = locals_of("model/layers.0.qkv.weight", qkv, "tp=2", rules)
    both = locals_of("model/layers.0.qkv.weight", qkv, "dp=3,tp=2", rules)
    for rank, value in enumerate(both):
        dp, shard = divmod(rank, 2)
        box = shard_box(tp[shard].shape, [(0, 3, dp)])
        assert value.tolist() == tp[shard][box.slices(Box.whole(tp[shard].shape))].tolist()


def test_a_padded_vocabulary_is_zero_past_its_end():
    table = np.arange(1, 1 + 10 * 2).reshape(10, 2)
    rules = Rules(rules=(Rule(match="emb.weight", tp=0, pad=4),))
    parts = locals_of("model/emb.weight", table, "tp=2", rules)
    assert [part.shape for part in parts] == [(8, 2), (8, 2)]
    assert np.concatenate(parts)[:10].tolist() == table.tolist()
    assert not np.concatenate(parts)[10:].any()


def test_padding_reaches_the_file_as_zeros(tmp_path):
    sample = Sample.random("model/emb.weight", "float32", (30_000, 10))
    save(tmp_path / "run", [sample])
    rules = Rules(rules=(Rule(match="emb.weight", tp=0, pad=128),))
    ckpt.restore(tmp_path / "run", "tp=2", tmp_path / "out", rules=rules)
    parts = [
        torch.load(tmp_path / f"out/rank-0000{rank}.pt", weights_only=True)["arrays"]["model/emb.weight"] for rank in range(2)
    ]
    whole = torch.cat(parts)
    assert whole.shape == (30_208, 10)
    assert raw(whole[:30_000]) == sample.data
    assert not whole[30_000:].any()


def test_stacked_experts_are_cut_by_expert_parallelism():
    experts = np.arange(8 * 2 * 3).reshape(8, 2, 3)
    parts = locals_of("model/layers.0.moe.experts.w1", experts, "ep=4", Rules(rules=(Rule(match="*.experts.w?", ep=0),)))
    assert [part.tolist() for part in parts] == [experts[2 * rank : 2 * rank + 2].tolist() for rank in range(4)]


def test_pipeline_stages_share_out_the_layers():
    names = ["model/emb.weight", "model/norm.weight", *(f"model/layers.{layer}.w" for layer in range(5))]
    specs = {name: ArraySpec(name, "float32", (4, 4)) for name in names}
    rules = Rules(rules=(Rule(match="norm.weight", stage="all"),))
    plan = plan_reshard(specs, Mesh.parse("pp=2"), rules=rules)
    first, second = ({local.name for local in rank} for rank in plan.ranks)
    assert first == {"model/emb.weight", "model/norm.weight", "model/layers.0.w", "model/layers.1.w"}
    assert second == {"model/norm.weight", "model/layers.2.w", "model/layers.3.w", "model/layers.4.w"}


def test_optimizer_state_is_cut_like_its_parameter_only_when_shaped_like_it():
    specs = {
        "model/a.weight": ArraySpec("model/a.weight", "float32", (8, 6)),
        "optim/a.weight/exp_avg": ArraySpec("optim/a.weight/exp_avg", "float32", (8, 6)),
        "optim/a.weight/row": ArraySpec("optim/a.weight/row", "float32", (8,)),
        "optim/a.weight/step": ArraySpec("optim/a.weight/step", "float32", ()),
    }
    plan = plan_reshard(specs, Mesh.parse("tp=2"), rules=Rules(rules=(Rule(match="a.weight", tp=1),)))
    assert [local.shape for local in plan.ranks[1]] == [(8, 3), (8, 3), (8,), ()]


def test_a_rule_file_says_the_same_as_rules_in_python(tmp_path):
    file = tmp_path / "rules.toml"
    file.write_text(
        'layers = ["encoder"]\n[[rule]]\nmatch = "*.qkv.weight"\ntp = 0\nblocks = [8, 4, 4]\n'
        '[[rule]]\nmatch = "x"\nstage = "all"\n'
    )
    assert load_rules(file) == Rules(
        rules=(Rule(match="*.qkv.weight", tp=0, blocks=(8, 4, 4)), Rule(match="x", stage="all")), layers=("encoder",)
    )


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"rule": [{"match": "*", "shard": 1}]}, "unknown setting 'shard'; known are"),
        ({"rules": []}, "unknown setting 'rules'"),
        ({"rule": [{"tp": 1}]}, "has no match"),
        ({"rule": {"match": "*"}}, r"written as \[\[rule\]\]"),
        ({"rule": [{"match": "*", "tp": -1}]}, "dimension to cut"),
        ({"rule": [{"match": "*", "tp": True}]}, "dimension to cut"),
        ({"rule": [{"match": "*", "blocks": [1, 2]}]}, "blocks need tp"),
        ({"rule": [{"match": "*", "tp": 0, "blocks": [1, 0]}]}, "extents along"),
        ({"rule": [{"match": "*", "tp": 0, "pad": 0}]}, "multiple to pad to"),
        ({"rule": [{"match": "*", "stage": "middle"}]}, "stage is one of"),
        ({"layers": "layers"}, "layers is a list"),
    ],
)
def test_a_wrong_rule_is_refused_with_what_would_be_accepted(document, words):
    with pytest.raises(ConfigError, match=words):
        rules_from(document)


def test_rules_that_do_not_fit_the_arrays_are_refused():
    specs = {"model/qkv.weight": ArraySpec("model/qkv.weight", "float32", (16, 3))}
    for rule, words in [
        (Rule(match="*", tp=0, blocks=(8, 4)), "do not add up to dimension 0"),
        (Rule(match="*", tp=5), "cuts dimension 5 by tp, its shape is"),
    ]:
        with pytest.raises(LayoutMismatch, match=words):
            plan_reshard(specs, Mesh.parse("tp=2"), rules=Rules(rules=(rule,)))


def test_a_rule_file_that_is_not_toml_is_refused(tmp_path):
    (tmp_path / "bad.toml").write_text("[[rule")
    with pytest.raises(ConfigError, match="not TOML"):
        load_rules(tmp_path / "bad.toml")
    with pytest.raises(ConfigError, match="No such file"):
        load_rules(tmp_path / "none.toml")


def test_every_element_is_held_by_somebody_on_any_mesh():
    specs = {sample.spec.name: sample.spec for sample in model()}
    for mesh in MESHES:
        plan = plan_reshard(specs, Mesh.parse(mesh))
        for name, spec in specs.items():
            held = np.zeros(spec.shape, int)
            for rank in plan.ranks:
                for local in rank:
                    for part in local.parts if local.name == name else ():
                        held[part.box.slices(Box.whole(spec.shape))] += 1
            assert held.size == math.prod(spec.shape)
            assert (held > 0).all(), (mesh, name)
