"""Bytes that are not those that were written, and files that were made to deceive: each refused with an error of its own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from holdfast import ckpt
from holdfast.arrays import Box
from holdfast.ckpt.manifest import DOCUMENTS, CommitRecord, sha256
from holdfast.errors import ConfigError, CorruptData, HoldfastError, MissingData, NotACheckpoint, UnsupportedFormat
from tests.ckpt.saving import Sample, model, save

STEP = "step-00000004"
LARGE = Sample.random("model/large.weight", "float32", (900, 100))
FILE = "model/large.weight/c/0/0"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    save(root, [*model(), LARGE], step=4)
    return root


@pytest.fixture
def run(tmp_path, saved) -> Path:
    """A run with step 4, to be damaged at will."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def load_all(root: Path) -> None:
    checkpoint = ckpt.open_checkpoint(root)
    for name, spec in checkpoint.specs.items():
        checkpoint.read_box(name, None, bytearray(spec.nbytes))


# -- what is not a checkpoint ------------------------------------------------------------------------------------------


def test_paths_that_hold_no_checkpoint_are_told_apart(tmp_path, run):
    file = tmp_path / "file"
    file.write_text("")
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, words in [(tmp_path / "nope", "no such directory"), (file, "not a directory"), (empty, "holds no checkpoint")]:
        with pytest.raises(NotACheckpoint, match=words):
            ckpt.open_checkpoint(path)


def test_a_step_that_is_not_there_is_answered_with_those_that_are(run):
    with pytest.raises(NotACheckpoint, match=r"no committed step-00000005; it has 4"):
        ckpt.open_checkpoint(f"{run}@5")
    with pytest.raises(ConfigError, match="has to be a step number"):
        ckpt.open_checkpoint(f"{run}@newest")
    with pytest.raises(NotACheckpoint, match="holds step 4, not 5"):
        ckpt.open_checkpoint(run / STEP, 5)
    assert ckpt.open_checkpoint(f"{run}@4").step == 4


def test_a_missing_commit_means_no_checkpoint(run):
    (run / STEP / "COMMIT").unlink()
    with pytest.raises(NotACheckpoint, match="its save never finished"):
        ckpt.open_checkpoint(run / STEP)
    with pytest.raises(NotACheckpoint, match=r"1 save.s. were begun there and never finished"):
        ckpt.open_checkpoint(run)
    assert ckpt.list_steps(run) == []


# -- rot ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_flipped_bit_in_a_document_is_refused(run, document):
    flip(run / STEP / document, 20)
    with pytest.raises(CorruptData, match="the file changed after the save"):
        ckpt.open_checkpoint(run)
    assert ckpt.latest(run) is None


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_missing_document_is_refused(run, document):
    (run / STEP / document).unlink()
    with pytest.raises(MissingData, match="is missing"):
        ckpt.open_checkpoint(run)


def test_no_flipped_bit_in_commit_goes_unnoticed(run):
    """Every bit of the file, one after the other; nothing is accepted that says something else."""
    path = run / STEP / "COMMIT"
    sound = path.read_bytes()
    meaning = CommitRecord.from_bytes(sound, "")
    for at in range(len(sound)):
        for bit in range(8):
            data = bytearray(sound)
            data[at] ^= 1 << bit
            try:
                found = CommitRecord.from_bytes(bytes(data), "COMMIT")
            except HoldfastError:
                continue
            assert found == meaning, (at, bit)


def test_a_damaged_newest_step_is_passed_over(run):
    save(run, model(seed=8), step=5)
    flip(run / "step-00000005" / "zarr.json", 100)
    newest = ckpt.latest(run)
    assert newest is not None
    assert newest.step == 4
    assert ckpt.open_checkpoint(run).step == 4
    with pytest.raises(CorruptData):
        ckpt.open_checkpoint(run, 5)


@pytest.mark.parametrize("at", [0, 5, 70_000, 359_999])
def test_a_flipped_bit_in_data_is_named_and_located(run, at):
    flip(run / STEP / FILE, at)
    checkpoint = ckpt.open_checkpoint(run)
    with pytest.raises(
        CorruptData, match=r"step 4, model/large\.weight at \[\d+, 0\] in .*/c/0/0\+\d+: crc32c is \w+, expected \w+"
    ):
        checkpoint.read_box("model/large.weight", None, bytearray(LARGE.spec.nbytes))
    report = checkpoint.verify()
    assert [(damage.array, damage.file) for damage in report.damages] == [("model/large.weight", FILE)]
    (damage,) = report.damages
    assert damage.byte_offset <= at < damage.byte_offset + damage.nbytes
    assert damage.offset[0] <= at // 400 < damage.offset[0] + damage.shape[0]


def test_rows_beside_the_damage_can_still_be_read(run):
    flip(run / STEP / FILE, 100)
    box = Box((400, 0), (500, 100))
    out = bytearray(500 * 400)
    ckpt.open_checkpoint(run).read_box("model/large.weight", box, out)
    assert out == LARGE.part(box)


@pytest.mark.parametrize("flips", range(30))
def test_no_flipped_bit_in_any_data_file_is_ever_loaded(run, flips):
    """A bit anywhere in any file: refused, or what comes back is what was saved, and then `verify` sees the bit."""
    rng = np.random.default_rng(flips)
    files = sorted(path for path in (run / STEP).rglob("*") if path.is_file() and path.stat().st_size)
    victim = files[rng.integers(len(files))]
    flip(victim, int(rng.integers(victim.stat().st_size)))
    try:
        checkpoint = ckpt.open_checkpoint(run)
        for sample in [*model(), LARGE]:
            out = bytearray(sample.spec.nbytes)
            checkpoint.read_box(sample.spec.name, None, out)
            assert out == sample.data, sample.spec.name
    except (CorruptData, MissingData, UnsupportedFormat, NotACheckpoint):
        return
    assert not checkpoint.verify().is_whole, f"verify did not see the flipped bit in {victim}"


def test_a_truncated_file_is_named(run):
    os.truncate(run / STEP / FILE, 200_000)
    with pytest.raises(MissingData, match=r"model/large\.weight at .* the file ends at byte 200000"):
        load_all(run)
    report = ckpt.open_checkpoint(run).verify()
    assert {damage.array for damage in report.damages} == {"model/large.weight"}
    assert any("ends" in damage.what for damage in report.damages)


def test_a_missing_file_is_named(run):
    (run / STEP / FILE).unlink()
    with pytest.raises(MissingData, match="c/0/0 is missing"):
        load_all(run)
    assert not ckpt.open_checkpoint(run).verify().is_whole


def test_verify_sees_what_only_other_readers_use(run):
    """An array's own zarr.json, a group's, a shard index: we do not read them, zarr does."""
    checkpoint = ckpt.open_checkpoint(run)
    for name in ("model/large.weight/zarr.json", "model/zarr.json"):
        path = run / STEP / name
        sound = path.read_bytes()
        path.write_bytes(sound.replace(b'"zarr_format": 3', b'"zarr_format": 2'))
        assert [damage.file for damage in checkpoint.verify().damages] == [name]
        path.unlink()
        assert [damage.file for damage in checkpoint.verify().damages] == [name]
        path.write_bytes(sound)
    assert checkpoint.verify().is_whole


def test_a_damaged_copy_in_objects_is_seen(run):
    """The small arrays' copies: rewritten and signed again, so only comparing them with the data can tell."""
    path = run / STEP / "_holdfast/objects.parquet"
    rows = pq.read_table(path)
    data = [bytes(len(value)) if value else value for value in rows.column("data").to_pylist()]
    pq.write_table(rows.set_column(4, rows.schema.field(4), pa.array(data, pa.binary())), path)
    sign(run / STEP)
    assert any("the copy in objects.parquet" in damage.what for damage in ckpt.open_checkpoint(run).verify().damages)


# -- made to deceive ---------------------------------------------------------------------------------------------------


def sign(directory: Path, **changes: Any) -> None:
    """Make COMMIT agree with the documents again, as an attacker would."""
    record = CommitRecord.from_bytes((directory / "COMMIT").read_bytes(), "")
    digests = {name: sha256((directory / name).read_bytes()) for name in DOCUMENTS}
    (directory / "COMMIT").write_bytes(replace(record, digests=digests, **changes).to_bytes())


def put(name: str, data: bytes, **totals: Any) -> Callable[[Path], None]:
    def spoil(step: Path) -> None:
        (step / name).write_bytes(data)
        sign(step, **totals)

    return spoil


def put_commit(data: bytes) -> Callable[[Path], None]:
    return lambda step: (step / "COMMIT").write_bytes(data) and None


def put_table(name: str, table: pa.Table, **totals: Any) -> Callable[[Path], None]:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return put(name, sink.getvalue().to_pybytes(), **totals)


def strange_object(step: Path) -> None:
    schema = pq.read_schema(step / "_holdfast/objects.parquet")
    row = {"kind": "array", "name": "model/norm.weight", "rank": None, "json": None, "data": b"short"}
    put_table("_holdfast/objects.parquet", pa.Table.from_pylist([row], schema=schema))(step)


def edit_json(name: str, change: Callable[[Any], None], **totals: Any) -> Callable[[Path], None]:
    def spoil(step: Path) -> None:
        document = json.loads((step / name).read_bytes())
        change(document)
        (step / name).write_text(json.dumps(document))
        sign(step, **totals)

    return spoil


def edit_runs(change: Callable[[list[dict[str, Any]]], None]) -> Callable[[Path], None]:
    def spoil(step: Path) -> None:
        path = step / "_holdfast/fragments.parquet"
        table = pq.read_table(path)
        rows = table.to_pylist()
        change(rows)
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
        sign(step, runs=len(rows))

    return spoil


def rename_array(old: str, new: str) -> Callable[[Any], None]:
    def change(root: Any) -> None:
        nodes = root["consolidated_metadata"]["metadata"]
        nodes[new] = nodes.pop(old)

    return change


def link_file(step: Path) -> None:
    (step / FILE).rename(step / "elsewhere")
    (step / FILE).symlink_to(step / "elsewhere")


def link_directory(step: Path) -> None:
    (step / "model/large.weight").rename(step.parent / "elsewhere")
    (step / "model/large.weight").symlink_to(step.parent / "elsewhere")


def link_document(step: Path) -> None:
    shutil.copy(step / "zarr.json", step.parent / "elsewhere")
    (step / "zarr.json").unlink()
    (step / "zarr.json").symlink_to(step.parent / "elsewhere")


def oversize(step: Path) -> None:
    os.truncate(step / "zarr.json", 5 << 30)


def oversize_commit(step: Path) -> None:
    os.truncate(step / "COMMIT", 2 << 20)


def nodes(root: Any) -> Any:
    return root["consolidated_metadata"]["metadata"]


def set_array(key: str, value: Any) -> Callable[[Any], None]:
    return lambda root: nodes(root)["model/large.weight"].__setitem__(key, value)


def first(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return next(row for row in rows if row["array"] == "model/large.weight")


HOSTILE: dict[str, tuple[Callable[[Path], None], type[HoldfastError], str]] = {
    "a data file is a link": (link_file, UnsupportedFormat, "is a symbolic link"),
    "a directory on the way is a link": (link_directory, UnsupportedFormat, "symbolic link"),
    "a document is a link": (link_document, UnsupportedFormat, "is a symbolic link"),
    "a document of 5 GiB": (oversize, UnsupportedFormat, "more than the"),
    "a COMMIT of 2 MiB": (oversize_commit, UnsupportedFormat, "more than the"),
    "a version of the future": (
        lambda step: (step / "COMMIT").write_text((step / "COMMIT").read_text().replace('"version": 1', '"version": 2')),
        UnsupportedFormat,
        "version 2; this release reads .* version 1",
    ),
    "a format of somebody else": (
        lambda step: (step / "COMMIT").write_text((step / "COMMIT").read_text().replace("holdfast-checkpoint", "other")),
        UnsupportedFormat,
        "format 'other'",
    ),
    "COMMIT is not JSON": (put_commit(b"\x80\x04pickled"), CorruptData, "not a commit record"),
    "COMMIT is a deep nest": (put_commit(b"[" * 100_000), CorruptData, "not a commit record"),
    "COMMIT is empty": (put_commit(b""), CorruptData, "not a commit record"),
    "the totals lie": (lambda step: sign(step, nbytes=10**15), CorruptData, "COMMIT says"),
    "the step is another": (lambda step: sign(step, step=5), UnsupportedFormat, r"expected 1, 5"),
    "zarr.json is not JSON": (
        put("zarr.json", b"{"),
        CorruptData,
        "not JSON",
    ),
    "zarr.json lists nothing": (edit_json("zarr.json", lambda root: nodes(root).clear()), CorruptData, "lists 0 arrays"),
    "zarr.json is a list": (
        put("zarr.json", b"[]"),
        CorruptData,
        "not the root of a universal checkpoint",
    ),
    "a name leaves the directory": (
        edit_json("zarr.json", rename_array("model/large.weight", "../../etc/passwd")),
        UnsupportedFormat,
        "cannot be stored",
    ),
    "a name is absolute": (
        edit_json("zarr.json", rename_array("model/large.weight", "/etc/passwd")),
        UnsupportedFormat,
        "cannot be stored",
    ),
    "a name holds a null byte": (
        edit_json("zarr.json", rename_array("model/large.weight", "model/a\x00b")),
        UnsupportedFormat,
        "cannot be stored",
    ),
    "an array inside an array": (
        edit_json("zarr.json", rename_array("model/large.weight", "model/norm.weight/inner")),
        UnsupportedFormat,
        "would lie inside array",
    ),
    "an unknown dtype": (edit_json("zarr.json", set_array("data_type", "object")), UnsupportedFormat, "breaks the rules"),
    "a negative shape": (edit_json("zarr.json", set_array("shape", [-900, 100])), UnsupportedFormat, "breaks the rules"),
    "a shape of floats": (edit_json("zarr.json", set_array("shape", [900.0, 100])), UnsupportedFormat, "breaks the rules"),
    "a shape of 2^60 rows": (
        edit_json("zarr.json", set_array("shape", [2**60, 100])),
        UnsupportedFormat,
        "do not fit together",
    ),
    "another codec": (
        edit_json("zarr.json", set_array("codecs", [{"name": "pickle"}])),
        UnsupportedFormat,
        "breaks the rules",
    ),
    "chunks of nothing": (
        edit_json("zarr.json", set_array("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [0, 0]}})),
        UnsupportedFormat,
        "large.weight",
    ),
    "a run in a file outside": (
        edit_runs(lambda rows: first(rows).update(file="../../../etc/passwd")),
        CorruptData,
        "where the format does not put it",
    ),
    "a run at another offset": (
        edit_runs(lambda rows: first(rows).update(byte_offset=8)),
        CorruptData,
        "where the format does not put it",
    ),
    "a run past the array": (
        edit_runs(lambda rows: first(rows).update(shape=[10**9, 100])),
        CorruptData,
        "lies outside the array",
    ),
    "a run of another rank": (edit_runs(lambda rows: first(rows).update(offset=[0])), CorruptData, "lies outside the array"),
    "a run of nothing": (edit_runs(lambda rows: first(rows).update(nbytes=0)), CorruptData, "is impossible"),
    "too few checksums": (edit_runs(lambda rows: first(rows).update(block_crc32c=[1])), CorruptData, "is impossible"),
    "a run twice": (edit_runs(lambda rows: rows.insert(rows.index(first(rows)), dict(first(rows)))), CorruptData, "held twice"),
    "a run is missing": (edit_runs(lambda rows: rows.remove(first(rows))), CorruptData, "elements are held by some rank"),
    "runs of an unknown array": (
        edit_runs(lambda rows: first(rows).update(array="model/unknown")),
        CorruptData,
        "does not list the runs",
    ),
    "runs out of order": (edit_runs(lambda rows: rows.append(rows.pop(0))), CorruptData, "side by side|does not list"),
    "fragments.parquet is not Parquet": (
        put("_holdfast/fragments.parquet", b"PAR1" + bytes(100) + b"PAR1"),
        CorruptData,
        "not a readable Parquet file",
    ),
    "fragments.parquet has other columns": (
        put_table("_holdfast/fragments.parquet", pa.table({"a": [1]}), runs=1),
        UnsupportedFormat,
        "has columns",
    ),
    "objects.parquet names a strange array": (strange_object, CorruptData, "is impossible"),
    "layout.json is a list": (
        put("_holdfast/layout.json", b"[]"),
        CorruptData,
        "not a JSON object",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile(run, what):
    spoil, error, words = HOSTILE[what]
    load_all(run)
    spoil(run / STEP)
    with pytest.raises(error, match=words):
        load_all(run / STEP)


def test_a_claim_of_many_rows_is_refused_before_they_are_read(run):
    """A Parquet bomb: a megabyte that unpacks to hundreds of gigabytes is refused by its own footer."""
    path = run / STEP / "_holdfast/fragments.parquet"
    schema = pq.read_schema(path)
    row = {**pq.read_table(path).to_pylist()[0], "array": "x" * 1000}
    table = pa.Table.from_pylist([row] * 1000, schema=schema)
    from holdfast.ckpt import manifest

    with pytest.MonkeyPatch.context() as patch:
        pq.write_table(table, path, compression="zstd", use_dictionary=False)
        sign(run / STEP, runs=1000)
        patch.setattr(manifest, "MAX_DOCUMENT_NBYTES", 500_000)
        assert path.stat().st_size < 500_000
        with pytest.raises(CorruptData, match="more than any checkpoint has"):
            ckpt.open_checkpoint(run / STEP)


# -- callers -----------------------------------------------------------------------------------------------------------


def test_a_caller_is_told_what_was_wrong_with_the_question(run):
    checkpoint = ckpt.open_checkpoint(run)
    with pytest.raises(ConfigError, match="has no array 'model/nope'"):
        checkpoint.read_box("model/nope", None, bytearray(4))
    with pytest.raises(ConfigError, match="does not lie in shape"):
        checkpoint.read_box("model/large.weight", Box((890, 0), (11, 100)), bytearray(4400))
    with pytest.raises(ConfigError, match="has to be writable and of 400 bytes"):
        checkpoint.read_box("model/large.weight", Box((0, 0), (1, 100)), bytearray(399))
    with pytest.raises(ConfigError, match="has to be writable"):
        checkpoint.read_box("model/large.weight", Box((0, 0), (1, 100)), bytes(400))
