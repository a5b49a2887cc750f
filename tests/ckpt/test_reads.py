"""How much is read for what is wanted: counted by the plan, and by the kernel."""

from __future__ import annotations

import os

import numpy as np
import pytest

from holdfast import ckpt
from holdfast.arrays import Box
from holdfast.ckpt.blocks import BLOCK_NBYTES, block_crcs, combine
from holdfast.ckpt.reads import READ_NBYTES, aligned, nbytes_read
from holdfast.coding import crc32c
from tests.ckpt.saving import Sample, save


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("reads")
    save(root, [ROWS, COLUMNS], {"m/rows": ((0, 4),), "m/columns": ((1, 4),)})
    return root


ROWS = Sample.random("m/rows", "float32", (16_384, 256))
COLUMNS = Sample.random("m/columns", "float32", (4096, 1024))


class Counted:
    """os.preadv that adds up what it returns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nbytes, self.calls, real = 0, 0, os.preadv

        def counting(fd, buffers, offset):
            got = real(fd, buffers, offset)
            self.nbytes, self.calls = self.nbytes + got, self.calls + 1
            return got

        monkeypatch.setattr(os, "preadv", counting)


def test_slices_read_little_more_than_themselves(run, monkeypatch):
    """16 slices of 1 MiB anywhere in a 16 MiB array: at most 1.1 times their bytes, and the kernel agrees with the plan."""
    checkpoint, rng = ckpt.open_checkpoint(run), np.random.default_rng(3)
    starts = rng.integers(0, 16_384 - 1024, 16)
    boxes = [Box((int(start), 0), (1024, 256)) for start in starts]
    for box in boxes:
        counted = Counted(monkeypatch)
        out = bytearray(1 << 20)
        checkpoint.read_box("m/rows", box, out)
        assert out == ROWS.part(box)
        assert counted.nbytes == nbytes_read(checkpoint.plan([("m/rows", box)]))
        assert counted.nbytes <= 1.1 * len(out)


def test_a_column_of_row_storage_is_read_in_few_long_reads(run, monkeypatch):
    checkpoint, counted = ckpt.open_checkpoint(run), Counted(monkeypatch)
    box = Box((0, 64), (16_384, 64))
    out = bytearray(4 << 20)
    checkpoint.read_box("m/rows", box, out)
    assert out == ROWS.part(box)
    assert counted.calls <= 8
    assert counted.nbytes <= ROWS.spec.nbytes


def test_a_column_of_column_storage_is_read_alone(run, monkeypatch):
    checkpoint, counted = ckpt.open_checkpoint(run), Counted(monkeypatch)
    box = Box((0, 256), (4096, 256))
    out = bytearray(4 << 20)
    checkpoint.read_box("m/columns", box, out)
    assert out == COLUMNS.part(box)
    assert counted.nbytes == len(out)


def test_all_columns_wanted_at_once_are_read_once(run, monkeypatch):
    """Four ranks' columns in one request: rows are fetched once and cut four times."""
    checkpoint, counted = ckpt.open_checkpoint(run), Counted(monkeypatch)
    boxes = [Box((0, 64 * rank), (16_384, 64)) for rank in range(4)]
    outs = [bytearray(4 << 20) for _ in boxes]
    checkpoint.read_boxes([("m/rows", box, out) for box, out in zip(boxes, outs, strict=True)])
    assert outs == [ROWS.part(box) for box in boxes]
    assert counted.nbytes <= 1.1 * ROWS.spec.nbytes


def test_many_small_neighbours_are_read_together(run, monkeypatch):
    checkpoint, counted = ckpt.open_checkpoint(run), Counted(monkeypatch)
    boxes = [Box((row, 0), (1, 256)) for row in range(1000, 2000)]
    outs = [bytearray(1024) for _ in boxes]
    checkpoint.read_boxes([("m/rows", box, out) for box, out in zip(boxes, outs, strict=True)])
    assert outs == [ROWS.part(box) for box in boxes]
    assert counted.calls <= 2


def test_a_narrow_slice_of_a_wide_gap_skips_the_gap(tmp_path, monkeypatch):
    sample = Sample.random("m/wide", "uint8", (4, 4 << 20))
    save(tmp_path, [sample], ())
    counted = Counted(monkeypatch)
    box = Box((0, 1 << 20), (4, 1000))
    out = bytearray(4000)
    ckpt.open_checkpoint(tmp_path).read_box("m/wide", box, out)
    assert out == sample.part(box)
    assert counted.nbytes <= 8 * BLOCK_NBYTES


def test_no_read_is_larger_than_the_bound(run):
    checkpoint = ckpt.open_checkpoint(run)
    wants = [
        ("m/rows", Box.whole((16_384, 256))),
        ("m/columns", Box.whole((4096, 1024))),
        ("m/rows", Box((5, 3), (16_000, 200))),
    ]
    for read in checkpoint.plan(wants):
        start, stop = aligned(read)
        assert stop - start <= READ_NBYTES + 2 * BLOCK_NBYTES


def test_progress_adds_up_to_the_bytes(run):
    done: list[int] = []
    checkpoint = ckpt.open_checkpoint(run)
    outs = {name: bytearray(spec.nbytes) for name, spec in checkpoint.specs.items()}
    checkpoint.read_boxes(
        [(name, Box.whole(checkpoint.specs[name].shape), out) for name, out in outs.items()], progress=done.append
    )
    assert sum(done) == checkpoint.nbytes


def test_the_crc_of_a_whole_follows_from_its_blocks():
    data = np.random.default_rng(0).integers(0, 256, 11 * BLOCK_NBYTES + 77, dtype=np.uint8).tobytes()
    for nbytes in (0, 1, BLOCK_NBYTES - 1, BLOCK_NBYTES, BLOCK_NBYTES + 1, 7 * BLOCK_NBYTES, len(data)):
        part = memoryview(data)[:nbytes]
        assert combine(block_crcs(part), nbytes) == crc32c(part)
