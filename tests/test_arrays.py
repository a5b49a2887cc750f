"""The vocabulary: boxes cover what they should, exactly once; tables survive the wire; layouts agree with torch's own.

Run as a script, this file is one rank of the world that `test_placements_agree_with_the_shards_torch_makes` starts.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.arrays import (
    ITEMSIZE,
    SCHEMA,
    SMALL_ARRAY_NBYTES,
    ArraySpec,
    Box,
    Fragment,
    FragmentTable,
    Placement,
    check_coverage,
    check_name,
    distinct_fragments,
    flat_range_boxes,
    grid,
    owned_boxes,
    placement_of,
    rank_name,
    shard_box,
    split_rows,
)
from holdfast.errors import CorruptData, LayoutMismatch, StateError

shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)
full_shapes = st.lists(st.integers(1, 6), max_size=4).map(tuple)


@st.composite
def tables(draw: st.DrawFn) -> FragmentTable:
    """Tables whose rows are possible, whatever else they are."""
    rows = []
    for _ in range(draw(st.integers(0, 5))):
        shape = draw(shapes)
        cuts = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
        offset, extent = tuple(a for a, _ in cuts), tuple(b - a for a, b in cuts)
        dtype = draw(st.sampled_from(sorted(ITEMSIZE)))
        name = draw(st.sampled_from(["model/w", "optim/w/exp_avg", "model/a b.c", "größe"]))
        numbers = (draw(st.integers(0, 2**31 - 1)), draw(st.integers(0, 2**63 - 1)))
        crc = draw(st.none() | st.integers(0, 2**32 - 1))
        rows.append(Fragment(name, dtype, shape, offset, extent, *numbers, math.prod(extent) * ITEMSIZE[dtype], crc))
    return FragmentTable.from_rows(rows)


def fragment(array: str = "model/w", *, rank: int = 0, crc32c: int | None = None, offset: int = 0) -> Fragment:
    return Fragment(array, "float32", (4, 2), (offset, 0), (2, 2), rank, 0, 16, crc32c)


def times_covered(shape: tuple[int, ...], boxes: list[Box]) -> np.ndarray:
    count = np.zeros(shape, int)
    for box in boxes:
        count[box.slices(Box.whole(shape))] += 1
    return count


# -- names and specs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w", "model/layers.0.wq.weight", "optim/a/exp_avg", "model/ünï code", "..a", "a.."])
def test_a_name_of_printable_parts_is_accepted(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "/etc/passwd",
        "a//b",
        "a/",
        "..",
        "a/../b",
        ".",
        "a\\b",
        "a\nb",
        "a\0",
        "model/zarr.json",
        "_holdfast/x",
        "COMMIT",
    ],
)
def test_a_name_that_could_leave_the_checkpoint_or_clash_with_its_files_is_refused(name: str) -> None:
    with pytest.raises(StateError, match="cannot be stored"):
        check_name(name)


def test_a_spec_refuses_what_cannot_be_stored() -> None:
    with pytest.raises(StateError, match="dtype object"):
        ArraySpec("w", "object", (1,))
    with pytest.raises(StateError, match="negative"):
        ArraySpec("w", "float32", (2, -1))


def test_item_sizes_are_those_of_torch() -> None:
    assert {name: getattr(torch, name).itemsize for name in ITEMSIZE} == ITEMSIZE


# -- boxes -------------------------------------------------------------------------------------------------------------


@given(full_shapes, st.data())
def test_a_flat_range_becomes_boxes_that_list_its_elements_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    size = math.prod(shape)
    start, stop = sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))
    boxes = flat_range_boxes(shape, start, stop)
    whole = np.arange(size).reshape(shape)
    listed = [whole[box.slices(Box.whole(shape))].ravel() for box in boxes]
    assert np.concatenate([*listed, []]).tolist() == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert all(box.size for box in boxes)


def test_a_flat_range_outside_of_the_array_is_refused() -> None:
    for start, stop in [(-1, 2), (0, 7), (4, 3)]:
        with pytest.raises(LayoutMismatch, match="does not lie"):
            flat_range_boxes((2, 3), start, stop)


@given(st.integers(0, 40), st.integers(1, 9))
def test_shard_box_cuts_as_torch_chunk_does(length: int, parts: int) -> None:
    chunks = torch.arange(length).chunk(parts)
    for index in range(parts):
        box = shard_box((length,), [(0, parts, index)])
        expected = chunks[index].tolist() if index < len(chunks) else []
        assert list(range(box.offset[0], box.end[0])) == expected


@given(shapes.filter(len), st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=3))
def test_shards_of_shards_tile_the_array(shape: tuple[int, ...], cuts: list[tuple[int, int]]) -> None:
    boxes = [Box.whole(shape)]
    for depth in range(len(cuts)):
        places = np.ndindex(*(parts for _, parts in cuts[: depth + 1]))
        boxes = [
            shard_box(shape, [(dim % len(shape), parts, at) for (dim, parts), at in zip(cuts, place, strict=False)])
            for place in places
        ]
    assert (times_covered(shape, boxes) == 1).all()


@given(shapes, st.data())
def test_a_grid_tiles_the_array(shape: tuple[int, ...], data: st.DataObject) -> None:
    parts = [data.draw(st.integers(1, 4)) for _ in shape]
    boxes = grid(shape, parts)
    assert len(boxes) == math.prod(parts)
    assert (times_covered(shape, boxes) == 1).all()


@given(shapes, st.integers(1, 8), st.integers(1, 200))
def test_row_runs_tile_the_box_and_keep_to_the_limit(shape: tuple[int, ...], itemsize: int, limit: int) -> None:
    boxes = split_rows(Box.whole(shape), itemsize, limit)
    assert (times_covered(shape, boxes) == 1).all()
    assert all(box.size * itemsize <= limit or not shape or box.shape[0] == 1 for box in boxes)


@given(full_shapes, st.data())
def test_the_common_part_of_two_boxes_holds_the_elements_of_both(shape: tuple[int, ...], data: st.DataObject) -> None:
    def box() -> Box:
        cuts = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
        return Box(tuple(a for a, _ in cuts), tuple(b - a for a, b in cuts))

    one, other = box(), box()
    both = times_covered(shape, [one, other]) == 2
    common = one.intersect(other)
    assert common == other.intersect(one)
    assert (times_covered(shape, [common] if common else []) == both).all()
    if common:
        assert one.contains(common)
        assert other.contains(common)


# -- ownership ---------------------------------------------------------------------------------------------------------


@given(shapes, st.integers(1, 7), st.sampled_from([1, SMALL_ARRAY_NBYTES]))
def test_replicas_own_every_element_exactly_once(shape: tuple[int, ...], replicas: int, row: int) -> None:
    shape = (*shape[:2], row)  # with long rows the array is large enough to be cut
    spec = ArraySpec("model/w", "uint8", shape)
    boxes = (Box.whole(shape),)
    owned = [box for index in range(replicas) for box in owned_boxes(Placement(spec, boxes, index, replicas))]
    assert (times_covered(shape, owned) == 1).all()


def test_a_large_replicated_array_is_shared_evenly() -> None:
    spec = ArraySpec("model/w", "float32", (1001, 64))
    sizes = [sum(box.size for box in owned_boxes(Placement(spec, (Box.whole(spec.shape),), i, 4))) for i in range(4)]
    assert max(sizes) - min(sizes) <= 64


def test_small_replicated_arrays_are_spread_over_the_replicas() -> None:
    owners = []
    for number in range(400):
        spec = ArraySpec(f"model/layers.{number}.norm", "float32", (16,))
        owners += [i for i in range(4) if owned_boxes(Placement(spec, (Box.whole(spec.shape),), i, 4))]
    assert len(owners) == 400
    assert min(owners.count(i) for i in range(4)) > 60


def test_an_unreplicated_array_belongs_to_its_rank_and_empty_boxes_to_nobody() -> None:
    spec = ArraySpec("model/w", "float32", (4,))
    placement = Placement(spec, (Box((0,), (2,)), Box((4,), (0,))))
    assert owned_boxes(placement) == [Box((0,), (2,))]


# -- coverage ----------------------------------------------------------------------------------------------------------


@given(shapes, st.data())
def test_a_tiling_is_accepted_and_every_hole_and_overlap_found(shape: tuple[int, ...], data: st.DataObject) -> None:
    spec = ArraySpec("model/w", "float32", shape)
    boxes = grid(shape, [data.draw(st.integers(1, 3)) for _ in shape])
    boxes = data.draw(st.permutations(boxes))
    check_coverage([spec], {"model/w": boxes})
    for box in [box for box in boxes if box.size][:3]:
        with pytest.raises(LayoutMismatch, match="are held by some rank"):
            check_coverage([spec], {"model/w": [other for other in boxes if other is not box]})
        with pytest.raises(LayoutMismatch, match="held twice"):
            check_coverage([spec], {"model/w": [*boxes, box]})


def test_a_hole_is_not_hidden_by_an_overlap_of_the_same_size() -> None:
    spec = ArraySpec("model/w", "float32", (4, 4))
    with pytest.raises(LayoutMismatch, match="held twice"):
        check_coverage([spec], {"model/w": [Box((0, 0), (2, 4)), Box((1, 0), (2, 4))]})


def test_a_hole_is_not_hidden_by_elements_outside_of_the_array() -> None:
    spec = ArraySpec("model/w", "float32", (4,))
    with pytest.raises(LayoutMismatch, match="outside"):
        check_coverage([spec], {"model/w": [Box((0,), (2,)), Box((10,), (2,))]})


def test_coverage_of_a_scalar_and_of_an_empty_array() -> None:
    scalar, empty = ArraySpec("step", "float32", ()), ArraySpec("nothing", "float32", (0, 3))
    check_coverage([scalar, empty], {"step": [Box((), ())]})
    with pytest.raises(LayoutMismatch, match="step: 0 of 1"):
        check_coverage([scalar, empty], {})
    with pytest.raises(LayoutMismatch, match="held twice"):
        check_coverage([scalar], {"step": [Box((), ()), Box((), ())]})


# -- the fragment table ------------------------------------------------------------------------------------------------


@given(tables())
def test_a_table_comes_back_from_its_bytes(table: FragmentTable) -> None:
    back = FragmentTable.from_bytes(table.to_bytes())
    assert list(back) == list(table)
    assert len(back) == len(table)
    assert back.nbytes == sum(row.nbytes for row in table)


@given(tables(), tables())
def test_joined_tables_keep_their_rows(one: FragmentTable, other: FragmentTable) -> None:
    assert list(FragmentTable.concat([one, other])) == [*one, *other]


def test_crcs_are_filled_in_row_by_row() -> None:
    table = FragmentTable.from_rows([fragment(), fragment(offset=2)]).with_crcs([7, 2**32 - 1])
    assert [row.crc32c for row in FragmentTable.from_bytes(table.to_bytes())] == [7, 2**32 - 1]


@pytest.mark.parametrize("value", [0x00, 0x80, 0xFF])
def test_a_damaged_byte_anywhere_neither_crashes_nor_yields_an_impossible_row(value: int) -> None:
    """Arrow trusts its own offsets: without a full validation, a damaged one reads outside of the buffer."""
    raw = FragmentTable.from_rows([fragment(), fragment(offset=2, crc32c=5)]).to_bytes()
    for place in range(len(raw)):
        accepts_only_possible_rows(raw[:place] + bytes([value]) + raw[place + 1 :])


@given(tables(), st.data())
def test_damaged_bytes_are_refused_or_still_a_possible_table(table: FragmentTable, data: st.DataObject) -> None:
    raw = bytearray(table.to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    del raw[data.draw(st.integers(0, len(raw))) :]
    accepts_only_possible_rows(bytes(raw))


def accepts_only_possible_rows(raw: bytes) -> None:
    try:
        rows = list(FragmentTable.from_bytes(raw))
    except CorruptData:
        return
    assert all(row.nbytes == row.box.size * ITEMSIZE[row.dtype] for row in rows)


@pytest.mark.parametrize("raw", [b"", b"\0" * 64, b"ARROW1\0\0", b"PK\x03\x04", b"\xff" * 4096])
def test_other_peoples_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(CorruptData, match="fragment table"):
        FragmentTable.from_bytes(raw)


@pytest.mark.parametrize(
    "change",
    [
        {"array": "../../etc/passwd"},
        {"array": ""},
        {"dtype": "object"},
        {"global_shape": [4]},
        {"global_shape": [-4, 2]},
        {"offset": [3, 0]},
        {"offset": [-1, 0]},
        {"offset": []},
        {"shape": [2, 3]},
        {"shape": [2**62, 2**62]},
        {"rank": -1},
        {"slot_offset": -16},
        {"nbytes": 15},
        {"nbytes": 2**62},
        {"array": None},
        {"nbytes": None},
        {"shape": None},
        {"shape": [2, None]},
    ],
)
def test_an_impossible_row_is_refused(change: dict[str, object]) -> None:
    row = FragmentTable.from_rows([fragment()]).table.to_pylist()[0] | change
    nullable = pa.schema([field.with_nullable(True) for field in SCHEMA])
    table = pa.Table.from_pylist([row], nullable).cast(nullable)
    hostile = pa.Table.from_arrays(table.columns, schema=SCHEMA)
    with pytest.raises(CorruptData, match="fragment table"):
        FragmentTable.from_bytes(FragmentTable(hostile).to_bytes())


def test_a_table_with_another_schema_is_refused() -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema([("array", pa.string())])) as stream:
        stream.write_table(pa.table({"array": ["model/w"]}))
    with pytest.raises(CorruptData, match="schema differs"):
        FragmentTable.from_bytes(sink.getvalue().to_pybytes())


def test_ranks_that_built_different_models_are_told_so() -> None:
    other = Fragment("model/w", "float32", (8, 2), (2, 0), (2, 2), 1, 0, 16)
    with pytest.raises(LayoutMismatch, match="rank 1 says"):
        FragmentTable.from_rows([fragment(), other]).specs()


def test_equal_fragments_are_kept_once_and_differing_ones_by_rank() -> None:
    rows = [fragment(rank=r, crc32c=crc) for r, crc in [(2, 5), (0, 5), (1, 9)]] + [fragment(offset=2, rank=1, crc32c=5)]
    kept = distinct_fragments(FragmentTable.from_rows(rows))
    assert sorted((row.array, row.offset, row.rank) for row in kept) == [
        ("model/w", (0, 0), 0),
        ("model/w", (2, 0), 1),
        (rank_name("model/w", 1), (0, 0), 1),
    ]


# -- real tensors ------------------------------------------------------------------------------------------------------


def test_a_plain_tensor_is_held_whole() -> None:
    placement = placement_of("model/w", torch.zeros(3, 2, dtype=torch.bfloat16), replica=1, replicas=4)
    assert placement.spec == ArraySpec("model/w", "bfloat16", (3, 2))
    assert placement.boxes == (Box((0, 0), (3, 2)),)
    assert (placement.replica, placement.replicas) == (1, 4)


def test_placements_agree_with_the_shards_torch_makes(tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(tmp_path / "store")]
    ranks = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(4)
    ]
    try:
        outputs = [rank.communicate(timeout=100)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * 4, "\n".join(outputs)


def be_a_rank(store: str, rank: int) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.FileStore(store, 4), rank=rank, world_size=4)
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    check_distributed_tensors(mesh)
    check_sharded_models(mesh)
    check_partial_sums_are_refused(mesh)
    dist.barrier()
    dist.destroy_process_group()


def check_distributed_tensors(mesh: torch.distributed.DeviceMesh) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    layouts = [(Shard(0), Replicate()), (Replicate(), Shard(0)), (Shard(0), Shard(0)), (Replicate(), Replicate())]
    by_column = [(Shard(1), Shard(0)), (Shard(0), Shard(1)), (Shard(-1), Replicate())]
    for shape in [(1,), (3,), (7,), (1, 4), (5, 2), (8, 8), (9, 3), (13, 2), (2, 3, 5)]:
        full = torch.arange(float(math.prod(shape))).reshape(shape)
        for layout in layouts + (by_column if len(shape) > 1 else []):
            check_tensor(full, distribute_tensor(full, mesh, layout))


def check_sharded_models(mesh: torch.distributed.DeviceMesh) -> None:
    """FSDP over tensor parallelism, where both cut the first dimension of column-parallel weights (_StridedShard)."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for width, hidden in [(8, 12), (6, 10), (7, 5), (9, 13), (5, 3), (11, 9), (1, 1)]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(width, hidden), torch.nn.Linear(hidden, width))
        full = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
        for name, parameter in model.named_parameters():
            check_tensor(full[name], parameter)


def check_tensor(full: torch.Tensor, tensor: torch.Tensor) -> None:
    """Every rank's box holds its real shard, and what the four ranks own covers the array once."""
    import torch.distributed as dist

    placement = placement_of("w", tensor)
    (box,) = placement.boxes
    shard = tensor.detach().to_local()
    where = f"{tensor.placements} of {tuple(full.shape)}: {box} is not {tuple(shard.shape)}"
    assert box.size == shard.numel(), where
    assert not box.size or torch.equal(full[box.slices(Box.whole(full.shape))], shard), where
    assert placement.expected == (0, 1, 2, 3)
    owned: list[list[Box]] = [[] for _ in range(4)]
    dist.all_gather_object(owned, owned_boxes(placement))
    check_coverage([placement.spec], {"w": [box for boxes in owned for box in boxes]})


def check_partial_sums_are_refused(mesh: torch.distributed.DeviceMesh) -> None:
    from torch.distributed.tensor import DTensor, Partial, Replicate

    partial = DTensor.from_local(torch.ones(2), mesh, (Partial(), Replicate()))
    with pytest.raises(StateError, match="partial sum"):
        placement_of("w", partial)


if __name__ == "__main__":
    be_a_rank(sys.argv[1], int(sys.argv[2]))
