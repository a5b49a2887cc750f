"""Where bytes go: every element has one place, and writers' boxes are single ranges wherever a regular grid allows it."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from holdfast.arrays import ITEMSIZE, ArraySpec, Box, flat_range_boxes
from holdfast.ckpt import strips
from holdfast.ckpt.strips import ArrayLayout, choose_layout, contiguous_parts, is_contiguous
from holdfast.ckpt.zarrdoc import array_document, layout_of, shard_index
from tests.ckpt.saving import flat_boxes, grid_boxes

SHAPES = [(64,), (7, 5), (16, 12), (5, 8, 6), (1, 10), (4, 3, 2, 5), (33, 1), (2, 64, 3)]
CUTS = [(), ((0, 4),), ((1, 2),), ((0, 2), (1, 2)), ((1, 3),), ((2, 2),), ((0, 3), (2, 3))]


def spec_of(shape: tuple[int, ...], dtype: str = "float32") -> ArraySpec:
    return ArraySpec("model/w", dtype, shape)


def element_places(layout: ArrayLayout, boxes: list[Box]) -> dict[tuple[int, ...], tuple[str, int]]:
    """(file, byte) of every element, by walking the runs."""
    itemsize = ITEMSIZE[layout.spec.dtype]
    places: dict[tuple[int, ...], tuple[str, int]] = {}
    for box in boxes:
        for run in layout.runs(box):
            for number, inside in enumerate(np.ndindex(*run.held.shape)):
                element = tuple(a + b for a, b in zip(run.held.offset, inside, strict=True))
                if any(a >= b for a, b in zip(element, layout.spec.shape, strict=True)):
                    continue  # padding
                assert element not in places
                places[element] = (run.file, run.byte_offset + number * itemsize)
    return places


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cuts", CUTS)
def test_every_element_has_a_place_of_its_own_whatever_box_asks(shape, cuts):
    spec = spec_of(shape)
    boxes = grid_boxes(spec, cuts)
    layout = choose_layout(spec, boxes)
    places = element_places(layout, boxes)
    assert len(places) == math.prod(shape)
    assert len(set(places.values())) == len(places)
    assert element_places(layout, [Box.whole(shape)]) == places  # the reader's question has the writers' answer


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cuts", CUTS)
def test_a_box_of_a_grid_is_one_range_even_when_the_cut_is_uneven(shape, cuts):
    spec = spec_of(shape)
    layout = choose_layout(spec, grid_boxes(spec, cuts))
    assert all(len(layout.runs(box)) == 1 for box in grid_boxes(spec, cuts) if box.size)


def test_flat_ranges_are_written_as_they_are():
    spec = spec_of((11, 6, 5))
    bounds = [0, 17, 18, 200, 330]
    layout = choose_layout(spec, flat_boxes(spec, bounds))
    ends = [run.byte_offset for box in flat_boxes(spec, bounds) for run in layout.runs(box)]
    assert layout.strip == (6, 5)
    assert ends == sorted(ends)
    for start, stop in pairwise(bounds):
        runs = [run for box in flat_range_boxes(spec.shape, start, stop) for run in layout.runs(box)]
        assert runs[0].byte_offset == start * 4
        assert sum(run.box.size for run in runs) == stop - start


@pytest.mark.parametrize("shape", [(70, 30), (9, 8, 12), (100,)])
@pytest.mark.parametrize("cuts", [(), ((1, 2),), ((1, 4),), ((1, 5), (2, 5))])
def test_the_shard_index_points_at_the_elements(shape, cuts, monkeypatch):
    """Small chunks and shards, so that several files, padding and strips all occur."""
    monkeypatch.setattr(strips, "MAX_CHUNK_NBYTES", 800)
    monkeypatch.setattr(strips, "GOOD_CHUNK_NBYTES", 400)
    monkeypatch.setattr(strips, "MIN_CHUNK_NBYTES", 100)
    monkeypatch.setattr(strips, "MAX_SHARD_NBYTES", 2000)
    spec = spec_of(shape)
    layout = choose_layout(spec, grid_boxes(spec, cuts))
    places = element_places(layout, [Box.whole(shape)])
    outer = array_document(layout)["chunk_grid"]["configuration"]["chunk_shape"]
    grid = tuple(extent // part for extent, part in zip(outer, layout.chunk, strict=True))
    found = {}
    for shard in range(layout.shards):
        index = np.frombuffer(shard_index(layout, shard)[:-4], "<u8").reshape(*grid, 2)
        for where in np.ndindex(*grid):
            if index[where][0] == 2**64 - 1:
                continue
            for number, inside in enumerate(np.ndindex(*layout.chunk)):
                element = tuple(w * c + i for w, c, i in zip(where, layout.chunk, inside, strict=True))
                element = (element[0] + shard * layout.shard_rows, *element[1:])
                if all(a < b for a, b in zip(element, shape, strict=True)):
                    found[element] = (layout.file(shard), int(index[where][0]) + number * 4)
    assert found == places
    assert layout.shards > 1 or layout.chunk[0] >= shape[0]  # a chunk as tall as the array leaves nothing to split


def test_chunks_stay_between_one_and_eight_mib_and_waste_little():
    for rows, width in [(4099, 1000), (100_003, 257), (7919, 4096), (32000, 1024), (128_256, 4096)]:
        layout = choose_layout(spec_of((rows, width)), [])
        chunk_nbytes = math.prod(layout.chunk) * 4
        assert 1 << 20 <= chunk_nbytes <= 8 << 20
        assert layout.stored_rows(0) - min(rows, layout.shard_rows) <= rows // 1000 + 1


def test_a_row_larger_than_a_chunk_is_cut_inside():
    layout = choose_layout(spec_of((8, 1024, 14336)), [])
    assert layout.chunk[0] == 1
    assert 1 << 20 <= math.prod(layout.chunk) * 4 <= 8 << 20


def test_arrays_beyond_four_gib_get_several_files():
    layout = choose_layout(spec_of((3_000_000, 1024)), [])
    assert layout.shards == 3
    assert layout.data_nbytes(0) <= 4 << 30
    assert layout.shard_rows % layout.chunk[0] == 0


@pytest.mark.parametrize("shape", [*SHAPES, (), (0, 3), (3, 0), (4099, 1000)])
@pytest.mark.parametrize("cuts", [(), ((1, 2),)])
def test_a_document_gives_its_layout_back(shape, cuts):
    layout = choose_layout(spec_of(shape), grid_boxes(spec_of(shape), cuts))
    assert layout_of("model/w", array_document(layout)) == layout


def test_contiguous_parts_make_up_the_box():
    rng = np.random.default_rng(1)
    for _ in range(300):
        shape = tuple(rng.integers(1, 6, rng.integers(1, 5)).tolist())
        low = [int(rng.integers(0, extent)) for extent in shape]
        high = [int(rng.integers(a + 1, extent + 1)) for a, extent in zip(low, shape, strict=True)]
        box, within = Box(tuple(low), tuple(b - a for a, b in zip(low, high, strict=True))), Box.whole(shape)
        flat = np.arange(math.prod(shape)).reshape(shape)
        parts = contiguous_parts(box, within)
        assert (
            np.concatenate([flat[part.slices(within)].ravel() for part in parts]).tolist()
            == flat[box.slices(within)].ravel().tolist()
        )
        for part in parts:
            assert np.all(np.diff(flat[part.slices(within)].ravel()) == 1)
        jumps = np.count_nonzero(np.diff(flat[box.slices(within)].ravel()) != 1)
        assert is_contiguous(box, within) == (jumps == 0)
