"""How files are written: compressed, inherited from an earlier step, past the page cache, and beyond 4 GiB."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr

from holdfast import ckpt, events
from holdfast.arrays import Box, Fragment, FragmentTable
from holdfast.ckpt import disk
from holdfast.ckpt.difference import diff
from holdfast.ckpt.pruning import Retention, prune
from holdfast.ckpt.repairing import repair
from holdfast.errors import ConfigError, CorruptData, HoldfastError, StateError, StorageError, UnsupportedFormat
from tests.ckpt.saving import Sample, assert_holds, cut, flat_boxes, grid_boxes, hold, save, write
from tests.ckpt.test_damage import edit_json, edit_runs

# -- compressed --------------------------------------------------------------------------------------------------------


def smooth(name: str, dtype: str, shape: tuple[int, ...]) -> Sample:
    """An array that compresses well."""
    noise = Sample.random(name, dtype, shape)
    data = np.frombuffer(noise.data, np.uint8).copy()
    data[: len(data) // 2] = 0
    return Sample(noise.spec, data.tobytes())


ROWS = smooth("optim/rows", "float32", (515, 600))
COLUMNS = smooth("optim/columns", "bfloat16", (900, 130))
TALL = smooth("optim/tall", "float32", (30_011, 128))
FLAT = smooth("optim/flat", "float32", (130, 7, 50))
SMALL = Sample.random("optim/small", "float32", (60,))
PLAIN = Sample.random("model/plain", "float32", (515, 60))
SAMPLES = [ROWS, COLUMNS, TALL, FLAT, SMALL, PLAIN]


def mixed() -> dict[str, list[Box]]:
    boxes = {sample.spec.name: [Box.whole(sample.spec.shape)] for sample in SAMPLES}
    boxes["optim/rows"] = grid_boxes(ROWS.spec, ((0, 4),))
    boxes["optim/columns"] = grid_boxes(COLUMNS.spec, ((0, 2), (1, 4)))
    boxes["optim/tall"] = grid_boxes(TALL.spec, ((0, 3),))
    boxes["optim/flat"] = flat_boxes(FLAT.spec, [0, 10_000, 10_003, 30_000, 45_500])
    return boxes


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("packed")
    write(root, hold(SAMPLES, mixed()), step=1, compress={"optim/*": 3})
    return root


def test_compressed_arrays_are_smaller_and_read_back_whole(packed):
    assert_holds(packed, SAMPLES)
    checkpoint = ckpt.open_checkpoint(packed)
    assert checkpoint.verify().is_whole
    levels = {name: layout.level for name, layout in checkpoint.layouts.items() if layout.is_packed}
    assert levels == {"optim/rows": 3, "optim/columns": 3, "optim/tall": 3}  # a flat range's grid is none, and small is small
    stored = sum(path.stat().st_size for path in (checkpoint.path / "optim/rows/c").rglob("*") if path.is_file())
    assert stored < 0.65 * ROWS.spec.nbytes


def test_slices_of_compressed_arrays_are_right(packed):
    checkpoint = ckpt.open_checkpoint(packed)
    rng = np.random.default_rng(0)
    for sample in (ROWS, COLUMNS, TALL):
        for _ in range(5):
            low = [int(rng.integers(0, extent)) for extent in sample.spec.shape]
            high = [int(rng.integers(start + 1, extent + 1)) for start, extent in zip(low, sample.spec.shape, strict=True)]
            box = Box(tuple(low), tuple(b - a for a, b in zip(low, high, strict=True)))
            out = bytearray(len(sample.part(box)))
            checkpoint.read_box(sample.spec.name, box, out)
            assert out == sample.part(box)


def test_zarr_and_tensorstore_alone_read_compressed_arrays(packed):
    step = packed / "step-00000001"
    group = zarr.open_group(str(step), mode="r")
    for sample in SAMPLES:
        assert group[sample.spec.name][...].tobytes() == sample.data
    for sample in (ROWS, COLUMNS, TALL):
        where = {"driver": "file", "path": str(step / sample.spec.name)}
        found = tensorstore.open({"driver": "zarr3", "kvstore": where}, read=True).result().read().result()
        assert np.ascontiguousarray(found).tobytes() == sample.data


def test_damage_in_compressed_chunks_is_found_and_never_handed_out(tmp_path):
    write(tmp_path, hold(SAMPLES, mixed()), step=1, compress={"optim/*": 1})
    spoil(tmp_path / "step-00000001/optim/tall/c/1/0", 5000)
    index = tmp_path / "step-00000001/optim/rows/c/0/0"
    spoil(index, index.stat().st_size - 6)
    report = ckpt.open_checkpoint(tmp_path).verify()
    assert sorted((damage.array, damage.what.split(" ")[0]) for damage in report.damages) == [
        ("optim/rows", "the"),
        ("optim/tall", "crc32c"),
    ]
    with pytest.raises(CorruptData, match=r"optim/tall.*crc32c"):
        ckpt.open_checkpoint(tmp_path).read_box("optim/tall", None, bytearray(TALL.spec.nbytes))


def first(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return next(row for row in rows if row["array"] == "optim/tall")


def grown(row: dict[str, Any]) -> None:
    row.update(nbytes=64 << 20, block_crc32c=[0] * 2048)


HOSTILE: dict[str, tuple[Callable[[Path], None], type[HoldfastError], str]] = {
    "a chunk where none is": (
        edit_runs(lambda rows: first(rows).update(offset=[1, 0])),
        CorruptData,
        "is no chunk of this array",
    ),
    "a chunk of another file": (
        edit_runs(lambda rows: first(rows).update(file="optim/tall/c/2/0")),
        CorruptData,
        "is no chunk of this array",
    ),
    "a chunk of a file outside": (
        edit_runs(lambda rows: first(rows).update(file="../../etc/passwd")),
        CorruptData,
        "is no chunk of this array",
    ),
    "a chunk larger than it can be": (
        edit_runs(lambda rows: grown(first(rows))),
        CorruptData,
        "larger compressed than it can be",
    ),
    "a chunk at another offset": (edit_runs(lambda rows: first(rows).update(byte_offset=8)), CorruptData, "crc32c"),
    "a level that is none": (
        edit_json("zarr.json", lambda root: tall_codecs(root)[1]["configuration"].update(level="9")),
        UnsupportedFormat,
        "breaks the rules",
    ),
    "another compression": (
        edit_json("zarr.json", lambda root: tall_codecs(root)[1].update(name="gzip")),
        UnsupportedFormat,
        "does not write",
    ),
}


def tall_codecs(root: Any) -> list[dict[str, Any]]:
    array = root["consolidated_metadata"]["metadata"]["optim/tall"]
    return array["codecs"][0]["configuration"]["codecs"]


@pytest.mark.parametrize("what", HOSTILE)
def test_a_compressed_checkpoint_is_refused_when(packed, tmp_path, what):
    change, error, words = HOSTILE[what]
    step = tmp_path / "step-00000001"
    shutil.copytree(packed / "step-00000001", step)
    change(step)
    with pytest.raises(error, match=words):
        ckpt.open_checkpoint(step).read_box("optim/tall", None, bytearray(TALL.spec.nbytes))


def test_a_frame_that_unpacks_to_something_else_is_refused():
    from holdfast.ckpt.packing import pack, unpack

    frame = memoryview(pack(memoryview(bytes(5000)), 3))
    assert unpack(frame, 5000, "here") == bytes(5000)
    for wrong in (4999, 5001, 10**6):
        with pytest.raises(CorruptData, match="here: is no zstd frame"):
            unpack(frame, wrong, "here")
    with pytest.raises(CorruptData, match="here: is no zstd frame"):
        unpack(memoryview(b"x" * 50), 5000, "here")


def test_a_replica_that_was_compressed_alike_repairs_chunks_and_indexes(packed, tmp_path):
    write(tmp_path, hold(SAMPLES, mixed()), step=1, compress={"optim/*": 3})
    step = tmp_path / "step-00000001"
    sound = {path.relative_to(step): path.read_bytes() for path in step.rglob("*") if path.is_file()}
    spoil(step / "optim/tall/c/1/0", 5000)
    spoil(step / "optim/rows/c/0/0", (step / "optim/rows/c/0/0").stat().st_size - 6)
    repaired = repair(f"{tmp_path}@1", packed)
    assert (repaired.blocks, repaired.lost) == (1, ())
    assert {path.relative_to(step): path.read_bytes() for path in step.rglob("*") if path.is_file()} == sound


def test_levels_that_zstd_does_not_have_are_refused():
    with pytest.raises(ConfigError, match="zstd level 20: it has to be 1 to 19"):
        ckpt.plan_write(cut([PLAIN]).table, step=1, compress={"*": 20})


def test_compressed_and_plain_copies_do_not_differ(packed, tmp_path):
    save(tmp_path, SAMPLES)
    assert diff(ckpt.open_checkpoint(packed), ckpt.open_checkpoint(tmp_path)).is_same


# -- incremental -------------------------------------------------------------------------------------------------------


def spoil(path: Path, at: int) -> None:
    """Flip a bit where it lies: in this file, and in whatever shares its bytes."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


FROZEN = Sample.random("model/frozen", "float32", (6000, 128))
TOUCHED = Sample.random("model/touched", "float32", (6000, 128))
LIVE = Sample.random("model/live", "float32", (600, 128))


def later(sample: Sample, seed: int = 9, rows: slice = slice(None)) -> Sample:
    """The array with other values in some rows."""
    values = np.frombuffer(sample.data, "f4").reshape(sample.spec.shape).copy()
    values[rows] += seed
    return Sample(sample.spec, values.tobytes())


SECOND = [FROZEN, later(TOUCHED, 9, slice(0, 10)), later(LIVE)]


def incremental(root: Path, samples: list[Sample], step: int, parent: int, **options: object) -> list[events.Event]:
    told: list[events.Event] = []
    unsubscribe = events.subscribe(told.append)
    save(root, samples, step=step, parent=ckpt.open_checkpoint(root, parent), **options)
    unsubscribe()
    return told


def test_unchanged_files_are_linked_and_unchanged_runs_are_not_written(tmp_path):
    save(tmp_path, [FROZEN, TOUCHED, LIVE], step=1)
    (told,) = incremental(tmp_path, SECOND, 2, 1)
    assert told.fields["inherited_nbytes"] == FROZEN.spec.nbytes + TOUCHED.spec.nbytes * 3 // 4
    one, two = (tmp_path / f"step-0000000{step}" for step in (1, 2))
    assert (one / "model/frozen/c/0/0").samefile(two / "model/frozen/c/0/0")
    assert not (one / "model/touched/c/0/0").samefile(two / "model/touched/c/0/0")
    assert_holds(tmp_path, SECOND, step=2)
    assert_holds(tmp_path, [FROZEN, TOUCHED, LIVE], step=1)
    second = ckpt.open_checkpoint(tmp_path, 2)
    assert second.verify().is_whole
    assert {run.inherited_from for run in second.runs("model/frozen")} == {1}
    assert [run.inherited_from for run in second.runs("model/touched")] == [None, 1, 1, 1]
    assert {run.inherited_from for run in second.runs("model/live")} == {None}
    assert zarr.open_group(str(two), mode="r")["model/touched"][...].tobytes() == SECOND[1].data


def test_a_step_outlives_the_steps_it_inherited_from(tmp_path):
    save(tmp_path, [FROZEN, TOUCHED, LIVE], step=1)
    incremental(tmp_path, SECOND, 2, 1)
    incremental(tmp_path, [*SECOND[:2], later(LIVE, 5)], 3, 2)
    assert {run.inherited_from for run in ckpt.open_checkpoint(tmp_path, 3).runs("model/frozen")} == {1}
    freed = prune(tmp_path, Retention(last=1), dry_run=True).freed_nbytes
    assert freed < 2 * (TOUCHED.spec.nbytes + LIVE.spec.nbytes) + FROZEN.spec.nbytes // 2  # the frozen array stays
    pruned = prune(tmp_path, Retention(last=1))
    assert pruned.removed == (1, 2)
    assert_holds(tmp_path, [*SECOND[:2], later(LIVE, 5)])
    assert ckpt.open_checkpoint(tmp_path).verify().is_whole


def test_rot_is_never_inherited(tmp_path):
    """The parent's bytes are read and compared: what its checksums promise is not enough."""
    path = save(tmp_path, [FROZEN, TOUCHED, LIVE], step=1)
    spoil(path / "model/frozen/c/0/0", 1_000_000)
    incremental(tmp_path, [FROZEN, TOUCHED, LIVE], 2, 1)
    assert_holds(tmp_path, [FROZEN, TOUCHED, LIVE], step=2)
    second = ckpt.open_checkpoint(tmp_path, 2)
    assert second.verify().is_whole
    assert [run.inherited_from for run in second.runs("model/frozen")] == [1, None, 1, 1]


def test_another_layout_inherits_nothing_and_is_whole(tmp_path):
    save(tmp_path, [FROZEN, TOUCHED], {"model/frozen": ((1, 2),), "model/touched": ((0, 2),)}, step=1)
    incremental(tmp_path, [FROZEN, TOUCHED], 2, 1)
    second = ckpt.open_checkpoint(tmp_path, 2)
    assert_holds(tmp_path, [FROZEN, TOUCHED], step=2)
    assert {run.inherited_from for run in second.runs("model/frozen")} == {None}  # columns became rows: other files
    assert {run.inherited_from for run in second.runs("model/touched")} == {1}  # other cuts of the same file


def test_compressed_arrays_are_inherited_by_file(tmp_path):
    save(tmp_path, [ROWS, TALL], step=1, compress={"*": 3})
    incremental(tmp_path, [later(ROWS, 2, slice(0, 5)), TALL], 2, 1, compress={"*": 3})
    assert_holds(tmp_path, [later(ROWS, 2, slice(0, 5)), TALL], step=2)
    one, two = (tmp_path / f"step-0000000{step}/optim" for step in (1, 2))
    assert [(one / f"rows/c/{row}/0").samefile(two / f"rows/c/{row}/0") for row in range(4)] == [False, True, True, True]
    assert ckpt.open_checkpoint(tmp_path, 2).verify().is_whole


def test_without_hard_links_the_bytes_are_copied(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    save(tmp_path, [FROZEN], step=1)
    monkeypatch.setattr(os, "link", refuse)
    incremental(tmp_path, [FROZEN], 2, 1)
    assert_holds(tmp_path, [FROZEN], step=2)
    assert ckpt.open_checkpoint(tmp_path, 2).verify().is_whole


def test_a_commit_that_was_not_given_the_earlier_step_is_refused(tmp_path):
    save(tmp_path, [FROZEN], step=1)
    parent, saved = ckpt.open_checkpoint(tmp_path, 1), cut([FROZEN])
    plan = ckpt.plan_write(saved.table, step=2, layout={"parent": 1})
    directory = ckpt.begin(tmp_path, plan, "t")
    ckpt.write_fragments(directory, plan, 0, saved.table, saved.read, parent=parent)
    with pytest.raises(StateError, match="inherited model/frozen/c/0/0 from an earlier step"):
        ckpt.commit(tmp_path, directory, plan, nodes=[0], objects={})
    assert [info.step for info in ckpt.list_steps(tmp_path)] == [1]


# -- past the page cache -----------------------------------------------------------------------------------------------


def test_direct_writes_store_the_same_bytes_whatever_their_alignment(tmp_path, monkeypatch):
    opened: list[int] = []
    real = os.open

    def watching(path, flags, *arguments, **keywords):
        opened.append(flags)
        return real(path, flags, *arguments, **keywords)

    monkeypatch.setattr(os, "open", watching)
    uneven = Sample.random("model/uneven", "int16", (70_001, 33))
    write(tmp_path, cut([FROZEN, uneven, LIVE], ((0, 5),)), direct=True)
    assert any(flags & os.O_DIRECT for flags in opened)
    assert_holds(tmp_path, [FROZEN, uneven, LIVE])
    assert ckpt.open_checkpoint(tmp_path).verify().is_whole


@pytest.mark.parametrize("refusing", ["open", "pwrite"])
def test_a_filesystem_that_refuses_direct_writes_gets_buffered_ones(tmp_path, monkeypatch, caplog, refusing):
    real = getattr(os, refusing)
    direct: set[int] = set()
    real_open = os.open

    def opening(path, flags, *arguments, **keywords):
        if flags & os.O_DIRECT and refusing == "open":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fd = real_open(path, flags, *arguments, **keywords)
        (direct.add if flags & os.O_DIRECT else direct.discard)(fd)
        return fd

    def writing(fd, *arguments):
        if fd in direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, *arguments)

    monkeypatch.setattr(os, "open", opening)
    if refusing == "pwrite":
        monkeypatch.setattr(os, "pwrite", writing)
    with caplog.at_level(logging.DEBUG, disk.__name__):
        write(tmp_path, cut([FROZEN], ((0, 4),)), direct=True)
    assert "refuses O_DIRECT (Invalid argument)" in caplog.text
    assert_holds(tmp_path, [FROZEN])


# -- slow, small and huge ----------------------------------------------------------------------------------------------


def test_a_slow_disk_holds_the_writer_back_before_it_takes_more_memory(tmp_path, monkeypatch):
    """A disk that takes one write at a time: at any moment only a few fragments are on their way."""
    samples = [Sample.random(f"model/w{number}", "float32", (400, 100), number) for number in range(24)]
    saved, taken, written = cut(samples, ()), [], []
    most = 0
    real = disk.write_at

    def slow(path: Path, at: int, data: memoryview) -> None:
        nonlocal most
        most = max(most, len(taken) - len(written))
        time.sleep(0.005)
        real(path, at, data)
        written.append(path)

    monkeypatch.setattr(disk, "write_at", slow)

    def read(row: Fragment) -> memoryview:
        taken.append(row)
        return saved.read(row)

    plan = ckpt.plan_write(saved.table, step=1)
    directory = ckpt.begin(tmp_path, plan, "t")
    ckpt.write_fragments(directory, plan, 0, saved.table, read, threads=1)
    assert len(taken) == 24
    assert most <= 2 * 1 + 2


def test_an_array_of_5_gib_is_saved_in_two_files_and_read_at_offsets_around_4_gib(tmp_path, monkeypatch):
    """Every byte passes the whole path, from one page of zeros: the disk keeps the file sparse, and memory stays small."""
    shape, row_nbytes = (5 << 10, 1 << 20), 1 << 20
    monkeypatch.setattr(disk, "write_at", sparse_write_at)
    zeros = memoryview(bytes(64 * row_nbytes))
    marked = memoryview(bytes(range(256)) * (64 * row_nbytes // 256))
    boxes = [Box((row, 0), (64, shape[1])) for row in range(0, shape[0], 64)]
    rows = [Fragment("model/huge", "uint8", shape, box.offset, box.shape, 0, 0, 64 * row_nbytes) for box in boxes]
    wanted = {64 * 63, 64 * 64, 64 * 79}  # below, at and beyond 2**32 bytes
    plan = ckpt.plan_write(FragmentTable.from_rows(rows), step=1)
    directory = ckpt.begin(tmp_path, plan, "t")
    ckpt.write_fragments(directory, plan, 0, rows, lambda row: marked if row.offset[0] in wanted else zeros)
    path = ckpt.commit(tmp_path, directory, plan, nodes=[0], objects={})
    assert sorted(file.name for file in (path / "model/huge/c").iterdir()) == ["0", "1"]
    checkpoint = ckpt.open_checkpoint(path)
    assert checkpoint.nbytes == 5 << 30
    for start in (64 * 62, *sorted(wanted)):
        out = bytearray(2 * row_nbytes)
        checkpoint.read_box("model/huge", Box((start + 3, 0), (2, shape[1])), out)
        assert out == (marked if start in wanted else zeros)[: 2 * row_nbytes]
    used = sum(file.stat().st_blocks * 512 for file in path.rglob("*") if file.is_file())
    assert used < 512 << 20


def sparse_write_at(path: Path, at: int, data: memoryview) -> None:
    """As `disk.write_at`, but zeros only make the file longer."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        if any(data[:256]):
            os.pwrite(fd, data, at)
        elif os.fstat(fd).st_size < at + len(data):
            os.ftruncate(fd, at + len(data))
    finally:
        os.close(fd)


def test_a_directory_that_loses_its_permissions_or_its_room_is_told_and_the_older_step_stays(tmp_path, monkeypatch):
    refusals = {errno.EACCES: "has to be able to write there", errno.EDQUOT: "no space left", errno.EROFS: "Read-only"}
    for number, words in refusals.items():
        root = tmp_path / str(number)
        save(root, [LIVE], step=1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", lambda *_, number=number: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
            with pytest.raises(StorageError, match=words):
                save(root, [LIVE], step=2)
        assert_holds(root, [LIVE])
        assert [info.step for info in ckpt.list_steps(root)] == [1]
