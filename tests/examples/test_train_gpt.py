"""The example trains, the same way each time, and goes on from restored files on another number of ranks.

The training under protection, with faults, is rehearsed by `holdfast demo` and its test.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from holdfast.arrays import shard_box

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = ["--layers", "2", "--width", "32", "--heads", "2", "--context", "16", "--batch", "4"]


@pytest.fixture
def gpt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return example("gpt", monkeypatch)


@pytest.fixture
def stdlib_text(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return example("stdlib_text", monkeypatch)


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return __import__(name)


def train(ranks: int, folder: Path, *options: Any) -> list[dict[str, Any]]:
    """Run the script under torchrun without holdfast; returns its log. The final state is in `folder`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(EXAMPLES / "train_gpt.py"), *TINY, "--bare", "--out", str(folder), "--log-file", str(folder / "log")]
    folder.mkdir()
    done = subprocess.run([*command, *map(str, options)], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "log").read_text().splitlines()]


def final_state(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"rank-{rank:05d}.pt", weights_only=True)["arrays"]


# -- the script --------------------------------------------------------------------------------------------------------


def test_a_job_goes_on_from_restored_files_on_fewer_ranks(tmp_path: Path) -> None:
    log = train(2, tmp_path / "two", "--steps", 6)
    assert [line["step"] for line in log[1:]] == [1, 2, 3, 4, 5, 6]
    reshard(tmp_path / "two", ranks=2, into=tmp_path / "restored", parts=1)
    more = train(1, tmp_path / "one", "--steps", 9, "--resume", tmp_path / "restored")
    assert [line["step"] for line in more[1:]] == [7, 8, 9]
    losses = [line["loss"] for line in log[1:] + more[1:]]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    assert final_state(tmp_path / "one", 0)["optim/embed.weight/step"] == 9


def reshard(source: Path, *, ranks: int, into: Path, parts: int) -> None:
    """What `holdfast restore --format torch` does for these files, done by hand: all of them are sharded by rows."""
    states = [final_state(source, rank) for rank in range(ranks)]
    into.mkdir()
    for part in range(parts):
        arrays = {}
        for name, first in states[0].items():
            whole = torch.cat([state[name] for state in states]) if first.dim() else first
            box = shard_box(whole.shape, [(0, parts, part)] if first.dim() else [])
            arrays[name] = whole[tuple(slice(a, b) for a, b in zip(box.offset, box.end, strict=True))]
        torch.save({"step": 6, "arrays": arrays}, into / f"rank-{part:05d}.pt")


@pytest.mark.campaign
def test_two_runs_are_bit_identical(tmp_path: Path) -> None:
    """The reference of `holdfast demo` stands on this; there it is checked with every run."""
    one, other = (train(4, tmp_path / name, "--steps", 8) for name in ("one", "other"))
    assert [line["loss_hex"] for line in one[1:]] == [line["loss_hex"] for line in other[1:]]
    for rank in range(4):
        first, second = final_state(tmp_path / "one", rank), final_state(tmp_path / "other", rank)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


# -- the model ---------------------------------------------------------------------------------------------------------


def test_the_default_model_has_more_than_three_million_parameters(gpt: ModuleType) -> None:
    assert sum(parameter.numel() for parameter in gpt.GPT(gpt.GPTConfig()).parameters()) > 3_000_000


def test_a_prediction_does_not_see_what_follows(gpt: ModuleType) -> None:
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(layers=2, width=32, heads=2, context=16)).eval()
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 256
    ignore_the_rest = torch.full((1, 16), -100)
    ignore_the_rest[0, :12] = tokens[0, 1:13]
    assert model(tokens, ignore_the_rest) == model(changed, ignore_the_rest)


def test_a_model_that_knows_nothing_predicts_every_byte_alike(gpt: ModuleType) -> None:
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig())
    tokens = torch.randint(256, (2, 64))
    assert float(model(tokens, tokens.roll(1)).detach()) == pytest.approx(math.log(256), abs=0.5)


# -- the text ----------------------------------------------------------------------------------------------------------


def test_the_order_of_samples_does_not_depend_on_the_number_of_ranks(stdlib_text: ModuleType) -> None:
    text = stdlib_text.stdlib_text(100_000)

    def batches(world_size: int) -> list[torch.Tensor]:
        loaders = [
            stdlib_text.Loader(text, seed=3, batch=4, context=16, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        return [torch.cat([loader.next_batch()[0] for loader in loaders]) for _ in range(3)]

    alone = batches(1)
    for world_size in (2, 4):
        assert all(map(torch.equal, batches(world_size), alone))
    assert not torch.equal(alone[0], alone[1])


def test_a_loader_goes_on_where_its_state_was_taken(stdlib_text: ModuleType) -> None:
    text = stdlib_text.stdlib_text(100_000)
    loader = stdlib_text.Loader(text, seed=3, batch=4, context=16)
    loader.next_batch()
    other = stdlib_text.Loader(text, seed=0, batch=4, context=16)
    other.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    for one, two in zip(loader.next_batch(), other.next_batch(), strict=True):
        assert torch.equal(one, two)


def test_targets_are_the_bytes_that_follow(stdlib_text: ModuleType) -> None:
    tokens, targets = stdlib_text.Loader(torch.arange(200, dtype=torch.uint8), seed=1, batch=2, context=8).next_batch()
    assert torch.equal(targets, tokens + 1)


def test_the_text_is_the_same_each_time_and_as_long_as_asked(stdlib_text: ModuleType) -> None:
    one, other = stdlib_text.stdlib_text(50_000), stdlib_text.stdlib_text(50_000)
    assert one.shape == (50_000,)
    assert torch.equal(one, other)


def test_a_batch_that_cannot_be_shared_evenly_is_refused(stdlib_text: ModuleType) -> None:
    with pytest.raises(ValueError, match="cannot be shared evenly"):
        stdlib_text.Loader(torch.zeros(100, dtype=torch.uint8), seed=0, batch=3, context=8, world_size=2)
