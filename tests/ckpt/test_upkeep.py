"""What is done with checkpoints afterwards: compare, and remove."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from holdfast import ckpt
from holdfast.ckpt.difference import diff
from holdfast.ckpt.pruning import Retention, prune
from holdfast.errors import ConfigError
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
