"""What goes in comes out, through our reader and through others, for every dtype, shape and way to cut."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr

from holdfast import ckpt
from holdfast.arrays import ITEMSIZE, ArraySpec, Box, Fragment, FragmentTable
from holdfast.ckpt import strips
from holdfast.ckpt.disk import write_at
from holdfast.ckpt.plan import WritePlan
from holdfast.ckpt.strips import choose_layout
from holdfast.coding import crc32c
from holdfast.errors import ConfigError, CorruptData, LayoutMismatch, MissingData, StateError
from tests.ckpt.saving import Sample, assert_holds, cut, flat_boxes, hold, model, save, write

NUMPY = sorted(set(ITEMSIZE) - {"bfloat16", "float8_e4m3fn", "float8_e5m2"})
SHAPES = [(), (0,), (0, 5), (5, 0, 2), (1,), (1000,), (40, 10), (5, 6, 7), (513, 700), (3, 2, 40_000)]
CUTS = [(), ((0, 4),), ((1, 4),), ((0, 2), (1, 2)), ((2, 3),)]


@pytest.fixture
def tiny_chunks(monkeypatch):
    """Chunks and files so small that every small array has many."""
    for name, nbytes in (("MAX_CHUNK_NBYTES", 8 << 10), ("GOOD_CHUNK_NBYTES", 4 << 10), ("MIN_CHUNK_NBYTES", 1 << 10)):
        monkeypatch.setattr(strips, name, nbytes)
    monkeypatch.setattr(strips, "MAX_SHARD_NBYTES", 64 << 10)


@pytest.mark.parametrize("cuts", CUTS)
def test_any_shape_and_cut_is_read_back_by_us_and_by_zarr(tmp_path, cuts, tiny_chunks):
    samples = [Sample.random(f"model/a{number}", "float32", shape) for number, shape in enumerate(SHAPES)]
    path = save(tmp_path, samples, cuts)
    assert_holds(tmp_path, samples)
    group = zarr.open_group(str(path), mode="r")
    for sample in samples:
        found = group[sample.spec.name]
        assert found.shape == sample.spec.shape
        assert found[...].tobytes() == sample.data
    assert ckpt.open_checkpoint(path).verify().is_whole


@pytest.mark.parametrize("dtype", sorted(ITEMSIZE))
def test_every_dtype_is_read_back(tmp_path, dtype):
    samples = [Sample.random("a/x", dtype, (37, 11)), Sample.random("a/s", dtype, ())]
    path = save(tmp_path, samples, ((0, 3),))
    assert_holds(tmp_path, samples)
    if dtype in NUMPY:
        found = zarr.open_group(str(path), mode="r")["a/x"]
        assert found.dtype == np.dtype(dtype)
        assert found[...].tobytes() == samples[0].data


def test_random_boxes_are_read_back(tmp_path, tiny_chunks):
    samples = [
        Sample.random("m/rows", "float32", (200, 90)),
        Sample.random("m/cols", "int16", (64, 96)),
        Sample.random("m/cube", "int64", (12, 9, 20)),
    ]
    save(tmp_path, samples, {"m/rows": ((0, 3),), "m/cols": ((1, 4),), "m/cube": ((0, 2), (2, 2))})
    checkpoint, rng = ckpt.open_checkpoint(tmp_path), np.random.default_rng(5)
    requests = []
    for _ in range(400):
        sample = samples[rng.integers(len(samples))]
        low = [int(rng.integers(0, extent)) for extent in sample.spec.shape]
        shape = tuple(int(rng.integers(1, extent - a + 1)) for a, extent in zip(low, sample.spec.shape, strict=True))
        box = Box(tuple(low), shape)
        requests.append((sample, box, bytearray(box.size * ITEMSIZE[sample.spec.dtype])))
    checkpoint.read_boxes([(sample.spec.name, box, out) for sample, box, out in requests])
    for sample, box, out in requests:
        assert out == sample.part(box), (sample.spec.name, box)


def test_flat_ranges_of_zero_and_fsdp1_are_read_back(tmp_path, tiny_chunks):
    sample = Sample.random("model/w", "float32", (53, 11, 13))
    boxes = flat_boxes(sample.spec, [0, 1000, 1003, 4001, 53 * 11 * 13])
    write(tmp_path, hold([sample], {"model/w": boxes}))
    assert_holds(tmp_path, [sample])


def test_a_fragment_that_lies_across_the_strips_is_gathered(tmp_path, tiny_chunks):
    """One writer holds all columns of the upper rows, four hold a quarter of the lower ones each."""
    sample = Sample.random("model/w", "float32", (40, 64))
    lower = [Box((16, 16 * part), (24, 16)) for part in range(4)]
    write(tmp_path, hold([sample], {"model/w": [Box((0, 0), (16, 64)), *lower]}))
    assert_holds(tmp_path, [sample])
    found = zarr.open_group(str(tmp_path / "step-00000001"), mode="r")["model/w"]
    assert found[...].tobytes() == sample.data


def test_state_of_one_rank_is_kept_under_its_rank(tmp_path):
    samples = [Sample.random("model/mean", "float32", (64,)), Sample.random("model/mean@rank-2", "float32", (64,), 9)]
    save(tmp_path, samples, ())
    assert_holds(tmp_path, samples)


def test_objects_and_layout_come_back(tmp_path):
    save(tmp_path, model(), step=5)
    checkpoint = ckpt.open_checkpoint(tmp_path)
    assert checkpoint.objects == {rank: {"rng": f"[{rank},5]"} for rank in range(4)}
    assert checkpoint.layout["mesh"] == {"dp": 4}
    assert (checkpoint.step, checkpoint.world) == (5, 4)
    assert checkpoint.nbytes == sum(sample.spec.nbytes for sample in model())


def test_an_array_beyond_four_gib_is_written_and_read_sparsely(tmp_path):
    """9 GiB of holes with known bytes at the ends: offsets past 2^32 and several files."""

    spec = ArraySpec("model/huge", "uint8", (9 << 20, 1 << 10))
    layout = choose_layout(spec, [])
    assert layout.shards == 3
    last = Box((spec.shape[0] - 2, 0), (2, 1 << 10))
    (run,) = layout.runs(last)
    assert run.file == "model/huge/c/2/0"
    assert run.byte_offset == (spec.shape[0] - 2 - 2 * layout.shard_rows) << 10
    path = tmp_path / "x" / run.file
    path.parent.mkdir(parents=True)
    data = bytes(range(256)) * 8
    write_at(path, run.byte_offset, memoryview(data))
    with open(path, "r+b") as file:
        file.truncate(layout.data_nbytes(2))
        file.seek(run.byte_offset)
        assert file.read()[: len(data)] == data
    assert WritePlan(1, {spec.name: layout}).nbytes == 9 << 30


# -- readers that know nothing of holdfast -----------------------------------------------------------------------------

ZARR_ALONE = """
import sys, json, importlib.metadata as metadata
others = [found for found in metadata.distributions() if found.metadata["Name"] != "holdfast"]
metadata.entry_points = lambda: metadata.EntryPoints(entry for found in others for entry in found.entry_points)
import zarr  # as on a machine where holdfast is not installed
group = zarr.open_group(sys.argv[1], mode="r")
arrays = {name: list(node.shape) for name, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}
assert "holdfast" not in sys.modules
print(json.dumps(arrays))
"""


def test_zarr_python_alone_lists_every_array_with_its_shape(tmp_path):
    samples = [sample for sample in model() if sample.spec.dtype != "bfloat16"]
    path = save(tmp_path, samples)
    done = subprocess.run([sys.executable, "-c", ZARR_ALONE, str(path)], capture_output=True, text=True, check=True, cwd="/")
    assert json.loads(done.stdout) == {sample.spec.name: list(sample.spec.shape) for sample in samples}


BITS = """
import sys, zarr
group = zarr.open_group(sys.argv[1], mode="r")
for name in sys.argv[2:]:
    sys.stdout.buffer.write(group[name][...].tobytes())
assert zarr.create_array({}, shape=(1,), dtype="uint16").dtype == "uint16"  # ordinary integers stay what they are
"""
HOUSE = Path(ckpt.__file__).parents[2]


def test_zarr_python_reads_bfloat16_and_float8_where_holdfast_is_installed(tmp_path):
    """The entry points of pyproject.toml, as an installed distribution states them, in a process of their own."""
    samples = [Sample.random(f"model/{dtype}", dtype, (33, 5)) for dtype in ("bfloat16", "float8_e4m3fn", "float8_e5m2")]
    path = save(tmp_path / "run", samples)
    installed = tmp_path / "site" / "holdfast_points-1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: holdfast-points\nVersion: 1.0\n")
    groups = tomllib.loads((HOUSE / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [
        f"[{group}]\n{name} = {where}\n"
        for group in groups
        if group.startswith("zarr")
        for name, where in groups[group].items()
    ]
    (installed / "entry_points.txt").write_text("".join(lines))
    command = [sys.executable, "-c", BITS, str(path), *(sample.spec.name for sample in samples)]
    done = subprocess.run(command, capture_output=True, env={"PYTHONPATH": f"{HOUSE}:{installed.parent}"})
    assert done.stdout == b"".join(sample.data for sample in samples), done.stderr.decode()


def test_the_data_type_entry_points_name_the_types():
    """zarr-python 3.1 collects these and never loads them; when it does, they have to be right."""
    points = tomllib.loads((HOUSE / "pyproject.toml").read_text())["project"]["entry-points"]["zarr.data_type"]
    for name, where in points.items():
        kind = EntryPoint(name, where, "zarr.data_type").load()
        assert kind._zarr_v3_name == name
        assert kind().to_json(zarr_format=3) == name


def test_tensorstore_alone_reads_every_array(tmp_path, tiny_chunks):
    tensorstore = pytest.importorskip("tensorstore")
    samples = [*model(), Sample.random("model/cols", "float32", (64, 80))]
    path = save(tmp_path, samples, {**{sample.spec.name: ((0, 4),) for sample in samples}, "model/cols": ((1, 4),)})
    for sample in samples:
        if not sample.spec.nbytes:
            continue
        store = tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / sample.spec.name)}}, open=True
        ).result()
        assert store.dtype.name == sample.spec.dtype
        assert np.ascontiguousarray(store.read().result()).tobytes() == sample.data


def test_pyarrow_alone_reads_the_fragments(tmp_path):
    """The Parquet rows lead to the bytes, and the checksums are those of the bytes."""
    samples = model()
    path = save(tmp_path, samples)
    wanted = {sample.spec.name: sample for sample in samples}
    rows = pq.read_table(path / "_holdfast/fragments.parquet").to_pylist()
    assert {row["array"] for row in rows} == {name for name, sample in wanted.items() if sample.spec.nbytes}
    for row in rows:
        with open(path / row["file"], "rb") as file:
            file.seek(row["byte_offset"])
            data = file.read(row["nbytes"])
        assert data == wanted[row["array"]].part(Box(tuple(row["offset"]), tuple(row["shape"])))
        assert crc32c(data) == row["crc32c"]
        assert row["block_crc32c"] == [crc32c(data[at : at + 32768]) for at in range(0, len(data), 32768)]
    objects = pq.read_table(path / "_holdfast/objects.parquet").to_pylist()
    assert {row["name"]: row["data"] for row in objects if row["kind"] == "array"} == {
        name: sample.data for name, sample in wanted.items() if sample.spec.nbytes < 64 << 10
    }


# -- writing refuses what is wrong -------------------------------------------------------------------------------------


def test_memory_that_changed_after_capture_is_not_stored(tmp_path):
    samples = model()
    saved = cut(samples, ((0, 4),))
    victim = next(row for row in saved.table if row.array == "model/layers.0.w1.weight" and row.rank == 2)
    rotten = bytearray(saved.data[victim.array, victim.box])
    rotten[7] ^= 1
    saved.data[victim.array, victim.box] = bytes(rotten)
    with pytest.raises(CorruptData, match=r"model/layers\.0\.w1\.weight of rank 2 .* the fragment table says"):
        write(tmp_path, saved)
    assert ckpt.latest(tmp_path) is None


def test_a_hole_is_refused_before_anything_is_written(tmp_path):
    saved = cut(model(), ((0, 4),))
    rows = [row for row in saved.table if not (row.array == "model/norm.weight" and row.rank == 3)]
    with pytest.raises(LayoutMismatch, match=r"model/norm\.weight: 36 of 48 elements"):
        ckpt.plan_write(FragmentTable.from_rows(rows), step=1)


def test_a_node_that_did_not_write_is_named(tmp_path):
    saved = cut(model(), ((0, 4),))
    plan = ckpt.plan_write(saved.table, step=1)
    directory = ckpt.begin(tmp_path, plan, "t")
    ckpt.write_fragments(directory, plan, 0, [row for row in saved.table if row.rank < 2], saved.read)
    with pytest.raises(MissingData, match="node 1 left no journal"):
        ckpt.commit(tmp_path, directory, plan, nodes=[0, 1], objects={})
    with pytest.raises(LayoutMismatch, match="elements are held by some rank"):
        ckpt.commit(tmp_path, directory, plan, nodes=[0], objects={})
    assert ckpt.latest(tmp_path) is None


def test_nodes_with_different_plans_are_refused(tmp_path):
    saved, other = cut(model(), ((0, 4),)), cut(model()[:-1], ((0, 4),))
    plan = ckpt.plan_write(saved.table, step=1)
    directory = ckpt.begin(tmp_path, plan, "t")
    small = ckpt.plan_write(other.table, step=1)
    ckpt.write_fragments(directory, small, 0, other.table, other.read)
    with pytest.raises(LayoutMismatch, match="wrote plan"):
        ckpt.commit(tmp_path, directory, plan, nodes=[0], objects={})


def test_a_token_is_used_once_and_a_step_committed_once(tmp_path):
    saved = cut(model(), ((0, 4),))
    plan = ckpt.plan_write(saved.table, step=1)
    ckpt.begin(tmp_path, plan, "t")
    with pytest.raises(ConfigError, match="another save has used this token"):
        ckpt.begin(tmp_path, plan, "t")
    with pytest.raises(ConfigError, match="token"):
        ckpt.begin(tmp_path, plan, "../out")
    write(tmp_path, saved, token="u")
    with pytest.raises(ConfigError, match="committed already"):
        ckpt.begin(tmp_path, plan, "v")
    assert_holds(tmp_path, model())


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["model/w", "model/w/scale"], "would lie inside array model/w"),
        (["model/" + "x" * 300], "longer than 200 bytes"),
    ],
)
def test_names_that_cannot_be_directories_are_refused(names, why):
    rows = [Fragment(name, "float32", (4,), (0,), (4,), 0, 0, 16, 0) for name in names]
    with pytest.raises(StateError, match=why):
        ckpt.plan_write(FragmentTable.from_rows(rows), step=1)


def test_plans_are_equal_on_all_ranks_whatever_the_order_of_rows():
    rows = list(cut(model(), ((0, 4),)).table)
    one, other = (ckpt.plan_write(FragmentTable.from_rows(order), step=3) for order in (rows, rows[::-1]))
    assert one.digest == other.digest
    assert ckpt.plan_write(FragmentTable.from_rows(rows), step=4).digest != one.digest
