"""Parity beside a step: whatever rots, as far as promised, comes back bit for bit; beyond that it is called lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from holdfast import ckpt, events
from holdfast.ckpt.parity import add_parity, check_parity
from holdfast.ckpt.parityfile import PLACE, ParityHeader, Stream, parity_files, read_header
from holdfast.ckpt.repairing import repair
from holdfast.cli.dispatch import main
from holdfast.errors import ConfigError, CorruptData, HoldfastError, UnsupportedFormat
from tests.ckpt.saving import Sample, model, save

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")

WIDE = Sample.random("model/wide", "float32", (4000, 60))
STEP = "step-00000008"
WIDE_FILE = "model/wide/c/0/0"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Step 8 with parity 4+2 beside it."""
    root = tmp_path_factory.mktemp("parity")
    save(root, [WIDE, *model()], {"model/wide": ((1, 3),)}, step=8)
    added = add_parity(root / STEP, ckpt.Parity(data=4, parity=2))
    assert added.nbytes >= added.protected_nbytes // 2
    return root


@pytest.fixture
def run(tmp_path, saved) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def contents(root: Path) -> dict[Path, bytes]:
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def overwrite(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "one bit": lambda step: overwrite(step / WIDE_FILE, 500_000, b"\xff"),
    "a third of the step": lambda step: overwrite(step / WIDE_FILE, 100_000, os.urandom(330_000)),
    "a truncated file": lambda step: os.truncate(step / WIDE_FILE, 700_000),
    "a longer file": lambda step: overwrite(step / WIDE_FILE, (step / WIDE_FILE).stat().st_size, b"more"),
    "a missing small file": lambda step: (step / "model/norm.weight/c/0").unlink(),
    "a missing directory": lambda step: shutil.rmtree(step / "optim"),
    "COMMIT": lambda step: (step / "COMMIT").unlink(),
    "all documents": lambda step: [empty(step / name) for name in ("zarr.json", "COMMIT", "_holdfast/fragments.parquet")],
    "one parity file and data": lambda step: (
        empty(step / PLACE / "000.parity"),
        overwrite(step / WIDE_FILE, 0, b"\x00" * 9),
    ),
}


ONE_FILE = {"one bit": WIDE_FILE, "a truncated file": WIDE_FILE, "a longer file": WIDE_FILE, "COMMIT": "COMMIT"}
"""Files share blocks; only those that are damaged are touched."""


@pytest.mark.parametrize("what", DAMAGE)
def test_what_rots_comes_back_bit_for_bit(run, saved, what, capsys):
    DAMAGE[what](run / STEP)
    assert main(["verify", str(run / STEP)]) == 4
    assert "holdfast repair" in capsys.readouterr().err
    dry = repair(run / STEP, dry_run=True)
    assert dry.files
    repaired = repair(run / STEP)
    assert (repaired.files, repaired.lost) == (dry.files, ())
    if what in ONE_FILE:
        assert repaired.files == (ONE_FILE[what],)
    parity = {Path(STEP) / PLACE / "000.parity"} if "parity" in what else set()
    found, expected = contents(run), contents(saved)
    assert {path for path in expected if found.get(path) != expected[path]} == parity
    assert found.keys() == expected.keys()
    assert ckpt.open_checkpoint(run).verify().is_whole


def test_damage_beyond_the_parity_is_lost_and_the_rest_still_comes_back(run, saved, capsys):
    stream = check_parity(run / STEP).stream
    starts = [
        [(segment * stream.columns + column) * stream.block_nbytes + 99 for segment in range(1, 4)]
        for column in range(stream.columns)
    ]
    in_wide = [all(WIDE_FILE in [name for name, *_ in stream.pieces(at, at + 1)] for at in column) for column in starts]
    beyond, within = (starts[column] for column in np.flatnonzero(in_wide)[:2])
    for at in (*beyond, within[1]):  # the same column in three of four segments, with parity for two; and one block elsewhere
        overwrite(run / STEP / WIDE_FILE, next(stream.pieces(at, at + 1))[1], b"\xaa\xbb\xcc")
    assert main(["verify", str(run / STEP)]) == 5
    assert "cannot be rebuilt from parity" in capsys.readouterr().err
    repaired = repair(run / STEP)
    assert repaired.blocks == 1
    assert len(repaired.lost) == 3
    assert main(["repair", str(run / STEP)]) == 5
    assert repair(run / STEP, saved).lost == ()
    assert ckpt.open_checkpoint(run).verify().is_whole


@pytest.mark.parametrize("seed", range(5))
def test_any_two_blocks_of_a_column_can_be_lost(run, saved, seed):
    """Random damage within what is promised, data and parity alike: repaired, every time."""
    rng = np.random.default_rng(seed)
    check = check_parity(run / STEP)
    stream = check.stream
    for column in range(stream.columns):
        for place in rng.choice(stream.data + stream.parity, 2, replace=False):
            inside = int(rng.integers(stream.block_nbytes - 8))
            if place < stream.data:
                start = (int(place) * stream.columns + column) * stream.block_nbytes + inside
                for name, offset, _ in list(stream.pieces(start, start + 1)):
                    overwrite(run / STEP / name, offset, b"\x5a")
            else:
                path, _, begins = check.headers[int(place) - stream.data]
                overwrite(path, begins + column * stream.block_nbytes + inside, b"\x5a")
    assert repair(run / STEP).lost == ()
    data = {path: data for path, data in contents(run).items() if PLACE not in str(path)}
    assert data == {path: data for path, data in contents(saved).items() if PLACE not in str(path)}


def test_a_whole_step_with_parity_is_whole_and_says_so(run, capsys):
    assert main(["verify", str(run), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["parity"] == {"data": 4, "parity": 2, "repairable_blocks": 0, "lost_blocks": 0, "damaged_files": []}
    assert repair(run / STEP).files == ()


def test_parity_that_rots_is_told_and_can_be_made_anew(run, capsys):
    overwrite(run / STEP / PLACE / "001.parity", 60_000, b"rot")
    assert main(["verify", str(run)]) == 4
    assert "parity is damaged itself (001.parity)" in capsys.readouterr().err
    assert main(["parity", str(run), "--data", "4", "--parity", "2"]) == 0
    assert main(["verify", str(run)]) == 0


def test_parity_is_not_made_over_damage(run):
    overwrite(run / STEP / WIDE_FILE, 5, b"x")
    before = contents(run)
    with pytest.raises(CorruptData, match="repair the step before parity is made over it"):
        add_parity(run / STEP, ckpt.Parity())
    assert contents(run) == before


def test_a_dry_run_writes_nothing(tmp_path):
    path = save(tmp_path, model(), step=8)
    before = contents(tmp_path)
    added = add_parity(path, ckpt.Parity(data=2, parity=1), dry_run=True)
    assert added.nbytes > 0
    assert contents(tmp_path) == before
    with pytest.raises(ConfigError, match="no sound parity beside it; give --replica"):
        repair(path)


@pytest.mark.parametrize("point", ["ckpt.parity_encoded", "ckpt.parity_written"])
def test_a_kill_while_parity_is_made_leaves_the_step_whole(tmp_path, point):
    path = save(tmp_path, model(), step=8)
    child = os.fork()
    if child == 0:
        events.arm(lambda name: os.kill(os.getpid(), signal.SIGKILL) if name == point else None)
        add_parity(path, ckpt.Parity(data=2))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert ckpt.open_checkpoint(path).verify().is_whole
    assert len(parity_files(path)) == (point == "ckpt.parity_written")
    add_parity(path, ckpt.Parity(data=2))
    assert check_parity(path).is_whole


def test_saving_with_parity_is_one_argument(tmp_path):
    path = ckpt.save({"x": {"a": 1}, "model": {"w": torch.ones(70, 300)}}, tmp_path, parity=ckpt.Parity(data=3))
    assert check_parity(path).is_whole


def hostile(name: str = "model/norm.weight/c/0", size: int = 40, **changes: int) -> ParityHeader:
    stream = Stream(((name, size),), 1, 1, 32768)
    crcs = np.zeros(stream.columns * 2, np.uint32)
    return ParityHeader(8, changes.get("index", 0), stream, crcs)


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (b"", CorruptData, "not a parity file"),
        (b"HFPARITY" + bytes(100), UnsupportedFormat, "parity of version 0"),
        (b"HFPARITY\x01\x00\x00\x00" + b"\xff" * 12, CorruptData, "its header would be"),
        (hostile().to_bytes()[:20] + b"\x00\x00\x00\x00" + hostile().to_bytes()[24:], CorruptData, "crc32c is not"),
        (hostile("../../../etc/passwd").to_bytes(), UnsupportedFormat, "is no file of a checkpoint"),
        (hostile("/etc/passwd").to_bytes(), UnsupportedFormat, "is no file of a checkpoint"),
        (hostile("a/../../b").to_bytes(), UnsupportedFormat, "is no file of a checkpoint"),
        (hostile(index=7).to_bytes(), CorruptData, "contradicts itself"),
        (hostile(size=-5).to_bytes(), UnsupportedFormat, "is no file of a checkpoint"),
    ],
)
def test_hostile_parity_is_refused(tmp_path, data, error, words):
    (tmp_path / "000.parity").write_bytes(data + bytes(8192))
    with pytest.raises(error, match=words):
        read_header(tmp_path / "000.parity")


def test_a_repair_does_not_write_through_a_link(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    shutil.rmtree(run / STEP / "optim")
    (run / STEP / "optim").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HoldfastError, match="is a symbolic link"):
        repair(run / STEP)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_parity_setting_that_cannot_be_is_refused():
    for data, parity in ((0, 1), (4, 0), (250, 6), (4.0, 1)):
        with pytest.raises(ConfigError, match="need data >= 1, parity >= 1"):
            ckpt.Parity(data=data, parity=parity)
