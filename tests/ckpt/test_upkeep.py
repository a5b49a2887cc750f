"""What is done with checkpoints afterwards: compare, remove, repair."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from holdfast import ckpt
from holdfast.ckpt.difference import diff
from holdfast.ckpt.foreign.source import Source, tensor_source
from holdfast.ckpt.importing import import_checkpoint
from holdfast.ckpt.pruning import Retention, prune
from holdfast.ckpt.repairing import repair
from holdfast.ckpt.scores import best_steps
from holdfast.cli.dispatch import main
from holdfast.errors import ConfigError, LayoutMismatch
from tests.ckpt.saving import Sample, model, save

# -- diff --------------------------------------------------------------------------------------------------------------


def changed(sample: Sample, rows: dict[int, float]) -> Sample:
    values = np.frombuffer(sample.data, "f4").reshape(sample.spec.shape).copy()
    for row, by in rows.items():
        values[row, 0] += by
    return Sample(sample.spec, values.tobytes())


def test_equal_checkpoints_do_not_differ_whatever_their_layout(tmp_path):
    save(tmp_path / "one", model(), ((0, 4),))
    save(tmp_path / "two", model(), ((1, 2),))
    found = diff(ckpt.open_checkpoint(tmp_path / "one"), ckpt.open_checkpoint(tmp_path / "two"))
    assert found.is_same
    assert found.equal == len(model())


def test_equal_layouts_are_compared_without_reading(tmp_path):
    save(tmp_path / "one", model())
    save(tmp_path / "two", model())
    assert diff(ckpt.open_checkpoint(tmp_path / "one"), ckpt.open_checkpoint(tmp_path / "two")).read_nbytes == 0


def test_changed_rows_are_counted_and_measured(tmp_path):
    wide = Sample.random("model/wide", "float32", (50_000, 60))
    save(tmp_path / "one", [wide, *model()])
    save(tmp_path / "two", [changed(wide, {3: 1.0, 40_000: -2.5}), *model()])
    found = diff(ckpt.open_checkpoint(tmp_path / "one"), ckpt.open_checkpoint(tmp_path / "two"))
    (change,) = found.changed
    assert (change.name, change.elements, change.rows, change.first_row) == ("model/wide", 2, 2, 3)
    assert change.largest == pytest.approx(2.5, rel=1e-4)


def test_other_arrays_shapes_and_objects_are_named(tmp_path):
    save(tmp_path / "one", [Sample.random("a/x", "float32", (4,)), Sample.random("a/only", "int8", (2,))], step=1)
    save(tmp_path / "two", [Sample.random("a/x", "float32", (5,)), Sample.random("a/new", "int8", (2,))], step=2)
    found = diff(ckpt.open_checkpoint(tmp_path / "one"), ckpt.open_checkpoint(tmp_path / "two"))
    assert [change.what for change in found.changed] == ["float32[4] became float32[5]"]
    assert (found.only_one, found.only_other) == (["a/only"], ["a/new"])
    assert found.objects == [f"rng of rank {rank}" for rank in range(4)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e5m2", "complex64", "bool", "int64", "float16"])
def test_every_dtype_can_be_compared(tmp_path, dtype):
    save(tmp_path / "one", [Sample.random("a/x", dtype, (40, 3), 1)])
    save(tmp_path / "two", [Sample.random("a/x", dtype, (40, 3), 2)])
    found = diff(ckpt.open_checkpoint(tmp_path / "one"), ckpt.open_checkpoint(tmp_path / "two"))
    assert found.changed[0].elements > 20


# -- prune -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path) -> Path:
    for step in (100, 150, 200, 250, 300):
        save(tmp_path, [Sample.random("a/x", "float32", (100,), step)], step=step)
    return tmp_path


def steps(root: Path) -> list[int]:
    return [info.step for info in ckpt.list_steps(root)]


def test_the_newest_and_every_kth_stay(run):
    pruned = prune(run, Retention(last=1, every=100, also=frozenset({150})))
    assert steps(run) == [100, 150, 200, 300]
    assert pruned.removed == (250,)
    assert pruned.freed_nbytes > 0
    assert ckpt.open_checkpoint(run).verify().is_whole


def test_a_dry_run_removes_nothing(run):
    assert prune(run, Retention(last=2), dry_run=True).removed == (100, 150, 200)
    assert steps(run) == [100, 150, 200, 250, 300]


def test_damaged_steps_do_not_count_as_kept_and_are_left(run):
    (run / "step-00000300/zarr.json").write_text("{}")
    prune(run, Retention(last=1))
    assert steps(run) == [250, 300]
    assert ckpt.latest(run).step == 250


def test_leftovers_of_dead_saves_go(run):
    (run / "step-00000400.tmp-x/model").mkdir(parents=True)
    (run / "step-00000500").mkdir()
    pruned = prune(run, Retention(last=9))
    assert sorted(pruned.leftovers) == ["step-00000400.tmp-x", "step-00000500"]
    assert sorted(path.name for path in run.iterdir()) == [
        "LATEST",
        *(f"step-{step:08d}" for step in (100, 150, 200, 250, 300)),
    ]


def test_the_newest_is_never_removed():
    with pytest.raises(ConfigError, match="1 or more"):
        Retention(last=0)
    with pytest.raises(ConfigError, match="1 or more"):
        Retention(every=0)


# -- repair ------------------------------------------------------------------------------------------------------------

WIDE = Sample.random("model/wide", "float32", (4000, 60))
UNEVEN = Sample.random("model/uneven", "int16", (900, 50))


@pytest.fixture
def twins(tmp_path) -> tuple[Path, Path]:
    """One step, saved twice from different layouts."""
    samples = [WIDE, UNEVEN, *model()]
    save(tmp_path / "one", samples, {"model/wide": ((0, 3),), "model/uneven": ((1, 4),)}, step=8)
    save(tmp_path / "two", samples, {"model/wide": ((1, 2),), "model/uneven": ((0, 2),)}, step=8)
    return tmp_path / "one", tmp_path / "two"


def spoil(root: Path, file: str, at: int = 1000, length: int = 3) -> None:
    with open(root / "step-00000008" / file, "r+b") as opened:
        opened.seek(at)
        data = opened.read(length)
        opened.seek(at)
        opened.write(bytes(byte ^ 0xFF for byte in data))


SPOILED = {
    "data": lambda root: spoil(root, "model/wide/c/0/0", 400_000),
    "a strip with padding": lambda root: spoil(root, "model/uneven/c/0/0", 80_000),
    "both ends of a block": lambda root: spoil(root, "model/wide/c/0/0", 32_760, 20),
    "the shard index": lambda root: spoil(
        root, "model/uneven/c/0/0", (root / "step-00000008/model/uneven/c/0/0").stat().st_size - 5
    ),
    "a truncated file": lambda root: (root / "step-00000008/model/wide/c/0/0").write_bytes(
        (root / "step-00000008/model/wide/c/0/0").read_bytes()[:500_000]
    ),
    "a missing file": lambda root: (root / "step-00000008/model/wide/c/0/0").unlink(),
    "an array's document": lambda root: (root / "step-00000008/model/wide/zarr.json").unlink(),
    "a group's document": lambda root: (root / "step-00000008/model/zarr.json").write_text("{}"),
    "layout.json": lambda root: (root / "step-00000008/_holdfast/layout.json").unlink(),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_replica_of_another_layout_repairs(twins, what):
    one, two = twins
    sound = {path.relative_to(one): path.read_bytes() for path in one.rglob("*") if path.is_file()}
    SPOILED[what](one)
    dry = repair(one, two, dry_run=True)
    assert dry.files
    assert not dry.lost
    repaired = repair(one, two)
    assert (repaired.files, repaired.lost) == (dry.files, ())
    assert ckpt.open_checkpoint(one).verify().is_whole
    assert {path.relative_to(one): path.read_bytes() for path in one.rglob("*") if path.is_file()} == sound


def test_what_is_damaged_in_both_stays_lost_and_the_rest_is_repaired(twins):
    one, two = twins
    spoil(one, "model/wide/c/0/0", 0)
    spoil(one, "model/wide/c/0/0", 900_000)
    spoil(two, "model/wide/c/0/0", 0)
    assert len(repair(one, two, dry_run=True).lost) == 1
    repaired = repair(one, two)
    assert repaired.blocks == 1
    assert [damage.byte_offset for damage in repaired.lost] == [0]


def test_another_checkpoint_is_no_replica(twins, tmp_path):
    one, _ = twins
    spoil(one, "model/wide/c/0/0")
    save(tmp_path / "other", model(), step=8)
    with pytest.raises(LayoutMismatch, match="holds other arrays"):
        repair(one, tmp_path / "other")
    changed_wide = changed(WIDE, {4: 1.0})
    save(tmp_path / "drifted", [changed_wide, UNEVEN, *model()], step=8)
    assert len(repair(one, tmp_path / "drifted").lost) == 1  # its bytes are sound, but not the ones that were saved


# -- the best ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def scored(tmp_path) -> Path:
    for step, loss in ((1, 3.0), (2, 1.5), (3, 1.5), (4, float("nan")), (5, 2.0)):
        source = Source("torch", {"a/x": tensor_source("a/x", torch.ones(3))}, {"metrics": {"loss": loss, "note": "x"}})
        import_checkpoint(source, tmp_path, step=step)
    return tmp_path


def test_the_best_are_those_with_the_lowest_number_and_later_wins(scored):
    assert best_steps(scored, "metrics.loss", 2) == [3, 2]
    assert best_steps(scored, "metrics.loss", highest=True) == [1]
    (scored / "step-00000003/zarr.json").write_text("{}")  # what cannot be restored is not best
    assert best_steps(scored, "metrics.loss") == [2]


def test_a_number_that_no_step_has_is_answered_with_those_that_are_there(scored):
    with pytest.raises(ConfigError, match=r"no step has a number 'loss' among its objects; there are: metrics\.loss"):
        best_steps(scored, "loss")
    with pytest.raises(ConfigError, match="1 or more"):
        best_steps(scored, "metrics.loss", 0)


def test_prune_keeps_the_best_from_the_command_line(scored, capsys):
    assert main(["prune", str(scored), "--keep", "1", "--best", "1", "--by", "metrics.loss", "--yes", "--json"]) == 0
    assert steps(scored) == [3, 5]
    assert main(["prune", str(scored), "--best", "1"]) == 2
    assert "--best and --by go together" in capsys.readouterr().err
