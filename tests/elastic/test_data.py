"""The loader: whoever is there, each sample is used once, and a step computes the same."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

import holdfast
from holdfast.elastic.batching import Batching, plan_step
from holdfast.elastic.data import Loader


class Numbers(Dataset):
    """Sample i is i, with a random number drawn while reading it."""

    def __init__(self, size: int = 60) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, item: int) -> tuple[int, float, float, float]:
        return item, float(torch.rand(())), float(np.random.rand()), random.random()


def ranks_of(world: int, **options) -> list[Loader]:
    given = {"global_batch": 12, "micro_batch": 2, "seed": 5} | options
    return [Loader(Numbers(), rank=rank, world=world, **given) for rank in range(world)]


def take(loaders: list[Loader], steps: int = 1) -> list[int]:
    """The samples of the next steps, over all ranks, in the order of the stream."""
    found: dict[int, list[int]] = {}
    for _ in range(steps):
        for loader in loaders:
            found |= {batch.position: batch.data[0].tolist() for batch in loader.step() if batch.scale}
    return [sample for position in sorted(found) for sample in found[position]]


@pytest.mark.parametrize("world", [2, 3, 4, 5, 6])
def test_any_world_uses_the_same_samples_in_every_step(world):
    alone, many = ranks_of(1), ranks_of(world)
    for _ in range(3):
        assert take(alone) == take(many)
    assert {loader.position for loader in many} == {36}


def test_every_sample_of_an_epoch_is_used_once():
    assert sorted(take(ranks_of(2), steps=5)) == list(range(60))


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 3), (3, 6), (4, 1)])
def test_a_resize_goes_on_where_the_step_ended(before, after):
    old = ranks_of(before)
    used = take(old, steps=2)
    new = ranks_of(after)
    for loader in new:
        loader.load_state_dict(old[0].state_dict())
    assert sorted(used + take(new, steps=3)) == list(range(60))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 6])
def test_the_mean_over_ranks_of_the_scaled_losses_is_the_mean_over_the_step(world):
    losses = torch.arange(12.0) ** 2
    shares = [list(loader.step()) for loader in ranks_of(world, shuffle=False)]
    assert len({len(share) for share in shares}) == 1
    means = [sum(losses[batch.data[0]].mean() * batch.scale for batch in share) for share in shares]
    assert torch.isclose(torch.stack(means).mean(), losses.mean())
    assert all([batch.is_last for batch in share] == [False] * (len(share) - 1) + [True] for share in shares)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_prefetched_and_not_used_is_read_again(workers):
    options = {"num_workers": workers, **({"prefetch_factor": 4, "multiprocessing_context": "fork"} if workers else {})}
    first = ranks_of(1, **options)
    used = take(first, steps=2)
    state = first[0].state_dict()
    assert state["position"] == 24
    second = ranks_of(1, **options)
    second[0].load_state_dict(state)
    assert sorted(used + take(second, steps=3)) == list(range(60))


def test_a_rollback_in_the_same_process_goes_back():
    loaders = ranks_of(2)
    take(loaders)
    state = loaders[0].state_dict()
    lost = take(loaders, steps=2)
    for loader in loaders:
        loader.load_state_dict(state)
    assert take(loaders, steps=2) == lost


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 under torch 2.13
def test_torchdatas_stateful_loader_reads_as_well():
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    assert take(ranks_of(2, make=stateful), steps=5) == take(ranks_of(2), steps=5)


def test_random_numbers_of_a_sample_depend_on_its_place_alone():
    def drawn(world: int, **options) -> dict[int, list[float]]:
        return {
            int(sample): [float(value) for value in values]
            for loader in ranks_of(world, **options)
            for batch in loader.step()
            for sample, *values in zip(*batch.data, strict=True)
        }

    alone = drawn(1)
    assert len({value for values in alone.values() for value in values}) == 36
    assert drawn(3) == alone
    assert drawn(1, num_workers=1, multiprocessing_context="fork") == alone


def test_reading_takes_nothing_from_the_trainings_own_random_numbers():
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    expected = (torch.rand(()), np.random.rand(), random.random())
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    take(ranks_of(2), steps=3)
    assert (torch.rand(()), np.random.rand(), random.random()) == expected


def test_scale_lr_keeps_each_ranks_work_and_scales_the_learning_rate():
    old = ranks_of(4, global_batch=16, on_resize="scale_lr")
    take(old)
    new = ranks_of(2, global_batch=16, on_resize="scale_lr")
    for loader in new:
        loader.load_state_dict(old[0].state_dict())
    assert [old[0].lr_scale, new[0].lr_scale] == [1.0, 0.5]
    assert [old[0].plan.rounds, new[0].plan.rounds] == [2, 2]
    assert len(take(new)) == 8


def test_the_first_worlds_share_stays_the_micro_batch():
    old = Loader(Numbers(), global_batch=12, rank=0, world=4)
    assert (old.plan.micro_batch, old.plan.rounds) == (3, 1)
    new = Loader(Numbers(), global_batch=12, rank=0, world=2)
    new.load_state_dict(old.state_dict())
    assert (new.plan.micro_batch, new.plan.rounds) == (3, 2)


def test_skipped_steps_are_not_used_and_are_told():
    loaders = ranks_of(2)
    take(loaders)
    for loader in loaders:
        loader.take_uses()
        loader.skip(2, why="loss spike")
    assert sorted(take(loaders)) == sorted(take(ranks_of(1), steps=4)[36:])
    assert [(use.position, use.samples, use.skipped) for use in loaders[0].take_uses()] == [
        (12, 24, "loss spike"),
        (36, 12, ""),
    ]


def test_the_end_of_the_data_is_said():
    (loader,) = ranks_of(1, global_batch=16, epochs=1)
    assert loader.steps_left == 3
    take([loader], steps=3)
    with pytest.raises(holdfast.StateError, match=r"all 1 epoch\(s\) of 60 samples are used \(12 left, a step takes 16\)"):
        loader.step()


def test_a_step_left_in_the_middle_is_an_error():
    (loader,) = ranks_of(1)
    next(loader.step())
    with pytest.raises(holdfast.StateError, match="after 1 of 6 micro-batches"):
        loader.take_uses()
    with pytest.raises(holdfast.StateError, match="left a step after 1 of its 6"):
        loader.step()


def test_a_loader_tells_its_place_before_it_has_read_anything():
    assert [loader.about()["rank"] for loader in ranks_of(3)] == [0, 1, 2]


def test_a_state_of_other_data_is_refused():
    (loader,) = ranks_of(1)
    with pytest.raises(holdfast.LayoutMismatch, match="seed=6 and this loader 5"):
        loader.load_state_dict(ranks_of(1, seed=6)[0].state_dict())


class Endless(IterableDataset):
    def __iter__(self):
        yield 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"global_batch": 10, "micro_batch": 4}, "does not divide"),
        ({"global_batch": 0}, "at least one sample"),
        ({"on_resize": "hope"}, "'accumulate' and 'scale_lr'"),
        ({"batch_size": 4}, "batch_size: the loader decides"),
        ({"in_order": False}, "in_order=False"),
        ({"rank": 0}, "both rank and world"),
        ({"global_batch": 100, "epochs": 1}, "do not fill one global batch"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_read(options, words):
    with pytest.raises(holdfast.ConfigError, match=words):
        holdfast.loader(Numbers(), **{"global_batch": 12} | options)


def test_data_without_numbers_is_refused():
    with pytest.raises(holdfast.ConfigError, match="needs a map-style data set"):
        holdfast.loader(Endless(), global_batch=4)


def test_more_ranks_than_micro_batches_are_refused_with_the_cure():
    with pytest.raises(
        holdfast.ConfigError, match=r"2 micro-batch\(es\) of 4, and there are 4 ranks; use micro_batch=2 or less"
    ):
        plan_step(Batching(global_batch=8, micro_batch=4), world=4, first_world=4)
