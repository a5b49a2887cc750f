"""A load by many ranks asks the storage for each byte once, and gives every rank all that it wants."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from holdfast.arrays import Box
from holdfast.ckpt.dcp import UniversalReader
from holdfast.ckpt.matrix import _world
from holdfast.ckpt.sharing import MOST_READERS, Wish, share_out
from tests.ckpt.saving import Sample, save

LARGE = [Sample.random(f"model/w{number}", "float32", (1 << 10, 1 << 10), number) for number in range(4)]
SMALL = [Sample.random(f"model/norm{number}", "float32", (300,), number) for number in range(9)]
ODD = [Sample.random("model/scalar", "float32", ()), Sample.random("model/odd", "float32", (37, 1000))]
NBYTES = sum(sample.spec.nbytes for sample in [*LARGE, *SMALL, *ODD])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shared")
    save(root, [*LARGE, *SMALL, *ODD], {"model/w1": ((1, 4),)}, step=5)
    return root


def whole(sample: Sample) -> torch.Tensor:
    return torch.frombuffer(bytearray(sample.data), dtype=torch.float32).reshape(sample.spec.shape)


def read_by_this_process() -> int:
    """Bytes that this process has asked the kernel for, by the kernel's own account."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


def load_as(placements: Any, path: Path) -> list[int]:
    """Load under a 2 × 2 mesh on four ranks; returns what each rank read. Every value is compared on every rank."""
    mesh = init_device_mesh("cpu", (2, 2)) if placements else None
    model: dict[str, Any] = {}
    for sample in [*LARGE, *SMALL, *ODD]:
        zeros = torch.zeros(sample.spec.shape)
        sharded = mesh is not None and sample in LARGE
        model[sample.spec.name.removeprefix("model/")] = distribute_tensor(zeros, mesh, placements) if sharded else zeros
    reader = UniversalReader(path)
    reader.checkpoint  # noqa: B018  documents are read by everyone; what is counted is data
    before = read_by_this_process()
    load({"model": model}, storage_reader=reader)
    count = torch.tensor([read_by_this_process() - before])
    for sample in [*LARGE, *SMALL, *ODD]:
        found = model[sample.spec.name.removeprefix("model/")]
        assert torch.equal(found.full_tensor() if isinstance(found, DTensor) else found, whole(sample)), sample.spec.name
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    return [int(one) for one in counts]


@pytest.mark.parametrize(
    "placements", [None, (Replicate(), Shard(0)), (Shard(0), Replicate())], ids=["DDP", "HSDP", "FSDP then copies"]
)
def test_four_ranks_together_read_each_byte_once(run, tmp_path, placements):
    counts = _world(4, partial(load_as, placements, run), tmp_path)
    documents = sum(
        path.stat().st_size for path in run.rglob("*") if path.name in ("zarr.json", "COMMIT") or path.suffix == ".parquet"
    )
    assert sum(counts) <= 1.1 * NBYTES + 8 * documents
    assert max(counts) <= 0.5 * NBYTES  # and nobody reads for all


def fails(path: Path) -> str:
    model = {sample.spec.name.removeprefix("model/"): torch.zeros(sample.spec.shape) for sample in LARGE}
    with pytest.raises(CheckpointException) as caught:
        load({"model": model}, storage_reader=UniversalReader(path))
    return str(caught.value)


def test_damage_that_one_rank_reads_stops_all_and_leaves_nobody_waiting(tmp_path):
    path = save(tmp_path / "run", LARGE, step=5)
    with open(path / "model/w2/c/0/0", "r+b") as file:
        file.seek(3 << 20)
        file.write(b"\xff\xfe")
    said = _world(4, partial(fails, tmp_path / "run"), tmp_path)
    assert "model/w2 at [" in said
    assert "crc32c is" in said
    assert "could not read its share; its own error says why" in said


# -- who reads what ----------------------------------------------------------------------------------------------------


def wish(name: str, rows: int, row_nbytes: int = 1 << 16) -> Wish:
    return Wish(name, Box((0,), (rows,)), rows * row_nbytes)


def test_every_byte_has_one_reader_and_work_is_even():
    wanted = [
        [wish("a", 64), wish("b", 3), wish("c", 1)],
        [wish("a", 64), wish("b", 3), wish("c", 1)],
        [wish("c", 1)],
        [wish("d", 5)],
    ]
    shared = share_out(wanted)
    assert [one.wish.array for one in shared] == ["a", "b", "c"]
    for one in shared:
        bounds = [(share.start, share.stop) for share in one.shares]
        assert [0, *(stop for _, stop in bounds)] == [*(start for start, _ in bounds), one.wish.nbytes]
        assert {share.reader for share in one.shares} <= set(one.ranks)
    load = [
        sum(share.stop - share.start for one in shared for share in one.shares if share.reader == rank) for rank in range(4)
    ]
    assert load[3] == 0
    assert abs(load[0] - load[1]) <= 1 << 16


def test_a_thousand_replicas_do_not_make_a_thousand_messages():
    (one,) = share_out([[wish("a", 4096)] for _ in range(1000)])
    assert len(one.shares) == MOST_READERS
    (small,) = share_out([[Wish("n", Box((0,), (40,)), 160)] for _ in range(1000)])
    assert len(small.shares) == 1


def test_what_only_one_rank_wants_is_not_shared():
    assert share_out([[wish("a", 4)], [wish("b", 4)], []]) == []
