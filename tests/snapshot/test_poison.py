"""NaN and infinity are found in every float type and nowhere else, and a poisoned snapshot replaces no clean one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from holdfast.arrays import Fragment, FragmentTable
from holdfast.snapshot.keeper import Keeper
from holdfast.snapshot.poison import CHUNK, is_finite
from tests.snapshot.test_keeper import Cluster, Rank, wait_until

FLOATS = ("float16", "bfloat16", "float32", "float64")


def raw(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy().tobytes())


@given(
    dtype=st.sampled_from(FLOATS),
    words=st.lists(st.integers(0, 2**64 - 1), max_size=40),
)
def test_it_agrees_with_torch_on_any_bits(dtype: str, words: list[int]) -> None:
    data = np.array(words, np.uint64).tobytes()
    tensor = torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)) if data else torch.empty(0)
    assert is_finite(memoryview(data), dtype) == bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("place", [0, CHUNK - 1, CHUNK, 2 * CHUNK + 4])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_one_bad_element_among_many_is_found(dtype: str, place: int, value: float) -> None:
    tensor = torch.full((2 * CHUNK + 5,), -1.5, dtype=getattr(torch, dtype))
    assert is_finite(raw(tensor), dtype)
    tensor[place] = value
    assert not is_finite(raw(tensor), dtype)


def test_integers_are_finite_whatever_their_bits_are() -> None:
    assert is_finite(memoryview(b"\xff" * 64), "int32")


# -- in a keeper -------------------------------------------------------------------------------------------------------


class FloatRank(Rank):
    """A trainer in small whose parameter is NaN at the steps in `bad`."""

    bad = range(0)

    def __init__(self, memory: Path, rank: int, nbytes: int) -> None:
        super().__init__(memory, rank, nbytes // 4 * 4)
        row = Fragment(f"model/w{rank}", "float32", (self.nbytes // 4,), (0,), (self.nbytes // 4,), rank, 0, self.nbytes)
        self.table = FragmentTable.from_rows([row])

    def bytes_at(self, step: int) -> bytes:
        values = np.random.default_rng([self.rank, step]).standard_normal(self.nbytes // 4).astype(np.float32)
        if step in self.bad and self.rank == 1:
            values[7] = np.nan
        return values.tobytes()


@pytest.fixture
def start(shm: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Cluster]]:
    monkeypatch.setattr("tests.snapshot.test_keeper.Rank", FloatRank)
    made: list[Cluster] = []

    def build(policy: str, arrays: tuple[str, ...] = ("model/w0", "model/w1")) -> Cluster:
        made.append(Cluster(shm, 2, parity=1))
        made[-1].enter(1)
        for rank in made[-1].ranks.values():
            rank.link.guard(policy, list(arrays))
        return made[-1]

    yield build
    for cluster in made:
        cluster.close()


def train_through(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, done: Callable[[], bool]) -> int:
    """Commit something clean, then let rank 1 be NaN for ever; returns the last step before that."""
    cluster.train(until_committed=2)
    clean = cluster.step
    monkeypatch.setattr(FloatRank, "bad", range(clean + 1, 10**9))

    def go_on() -> bool:
        cluster.step += 1
        for rank in cluster.ranks.values():
            rank.complete(cluster.step)
        return done()

    wait_until(go_on, "the keeper to see it")
    return clean


@pytest.mark.parametrize("policy", ["refuse", "step_back"])
def test_a_poisoned_snapshot_replaces_no_clean_one(
    start: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    cluster = start(policy)
    clean = train_through(cluster, monkeypatch, lambda: cluster.keepers[1].poison.refused >= 3)
    assert all(rank.link.page["committed"] <= clean for rank in cluster.ranks.values())
    assert (cluster.ranks[1].link.page["poisoned"] > clean) == (policy == "step_back")
    # When the run is clean again, so are its snapshots.
    monkeypatch.setattr(FloatRank, "bad", range(0))
    assert cluster.train(until_committed=cluster.step + 1) > clean


def test_with_warn_it_is_committed_with_a_word(
    start: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = start("warn")
    seen_bad = "holds NaN or infinity"
    clean = train_through(cluster, monkeypatch, lambda: seen_bad in caplog.text)
    assert cluster.train(until_committed=clean + 1) > clean
    assert next(r.message for r in caplog.records if "holds NaN or infinity" in r.message).endswith("committed all the same")
    assert cluster.keepers[1].poison.refused == 0


def test_arrays_that_nobody_asked_to_watch_may_be_what_they_like(
    start: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = start("refuse", arrays=("model/w0",))
    monkeypatch.setattr(FloatRank, "bad", range(10**9))
    assert cluster.train(until_committed=3) >= 3


def test_a_keeper_that_was_started_again_hears_of_the_guard_with_the_first_word(start: Callable[..., Cluster]) -> None:
    cluster = start("refuse")
    guard, link = cluster.keepers[1].poison, cluster.ranks[1].link
    guard._arrays.clear()
    link._connection.close()
    link.ask("ping")
    assert guard._arrays == {1: {"model/w0", "model/w1"}}


def test_a_guard_that_is_set_while_the_keeper_is_away_is_the_first_thing_it_hears(start: Callable[..., Cluster]) -> None:
    """A keeper may die between the begin of the run and this; that costs no start."""
    cluster = start("warn")
    cluster.keepers[1].close(free=False)
    link = cluster.ranks[1].link
    link.guard("refuse", ["model/w1"])
    cluster.keepers[1] = Keeper("job", 1, cluster.places[1])
    link.ask("ping")
    assert cluster.keepers[1].poison._arrays == {1: {"model/w1"}}
