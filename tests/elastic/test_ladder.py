"""The ladder: which rung is tried first, why, and what happens when it breaks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

import holdfast
from holdfast import ckpt
from holdfast.elastic.incidents import Incident
from holdfast.elastic.ladder import Offer, Prices, Rung, measured_prices, plan_ladder


def order(*offers: Offer, **prices) -> list[str]:
    return [choice.offer.rung for choice in plan_ladder(offers, Prices(**prices))]


def test_of_one_step_the_cheaper_source_is_taken():
    offers = [Offer(Rung.CHECKPOINT, 10), Offer(Rung.PARITY, 10), Offer(Rung.REPLICA, 10), Offer(Rung.RETRY, 10)]
    assert order(*offers) == ["retry", "DP replica", "parity", "universal checkpoint"]


def test_a_source_that_proved_slow_comes_after_the_others():
    offers = [Offer(Rung.PARITY, 10), Offer(Rung.CHECKPOINT, 10)]
    assert order(*offers, restore_s={"parity": 90.0, "universal checkpoint": 12.0}) == ["universal checkpoint", "parity"]


def test_a_committed_step_is_not_given_up_for_a_small_saving():
    offers = [Offer(Rung.CHECKPOINT, 9), Offer(Rung.PARITY, 10)]
    assert order(*offers, restore_s={"universal checkpoint": 0.1, "parity": 25.0}, step_s=1.0) == [
        "parity",
        "universal checkpoint",
    ]
    assert order(*offers, restore_s={"universal checkpoint": 0.1, "parity": 95.0}, step_s=1.0) == [
        "universal checkpoint",
        "parity",
    ]


def test_work_to_be_done_again_is_part_of_the_price():
    offers = [Offer(Rung.CHECKPOINT, 100), Offer(Rung.PARITY, 200)]
    assert order(*offers, restore_s={"universal checkpoint": 5.0, "parity": 60.0}, step_s=2.0)[0] == "parity"
    (first, second) = plan_ladder(offers, Prices({"universal checkpoint": 5.0, "parity": 60.0}, step_s=2.0, reached_step=203))
    assert (first.seconds, second.seconds) == (66.0, 211.0)
    assert second.why == ("universal checkpoint, step 100: 5.00 s to restore (measured) and 103 step(s) to do again, 206.0 s")


def test_what_is_lossy_comes_last_however_cheap():
    offers = [Offer(Rung.SUBSTITUTE, 500, is_lossy=True), Offer(Rung.CHECKPOINT, 100)]
    assert order(*offers, step_s=10.0) == ["universal checkpoint", "stage substitution"]
    assert order(offers[0]) == ["stage substitution"]


def test_nothing_to_offer_is_no_plan():
    assert plan_ladder([], Prices()) == []


def test_prices_are_the_medians_of_what_was_measured():
    base = Incident("t", 2, 0.0, "node", "parity", 2, 2, 5, 4, (1,), {}, {"detected": 9.0, "rebuild": 1.0, "load": 2.0})
    others = [replace(base, phases={"rebuild": 3.0, "load": 4.0}), replace(base, phases={"load": 5.0})]
    other = replace(base, rung="own keeper", phases={"load": 0.25, "first_step": 3.0})
    prices = measured_prices([base, *others, other], step_s=2.0, reached_step=9)
    assert prices == Prices({"parity": 5.0, "own keeper": 0.25}, 2.0, 9)
    assert prices.of(Rung.CHECKPOINT) == (30.0, "assumed")


# -- climbed -----------------------------------------------------------------------------------------------------------------


def train(place: Path, steps: int) -> tuple[torch.Tensor, holdfast.elastic.session.Run]:
    torch.manual_seed(1)
    model = torch.nn.Linear(160, 160)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with holdfast.protect({"model": model, "optim": optimizer}, checkpoints=str(place), name="l", checkpoint_every=1) as run:
        for _ in run.steps(until=steps):
            model(torch.ones(2, 160)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.weight.detach().clone(), run


def test_a_damaged_checkpoint_falls_to_the_one_before_and_training_repeats_the_bits(job, monkeypatch):
    for name, value in job.env.items():
        if name.startswith("HOLDFAST_"):
            monkeypatch.setenv(name, value)
    place = job.place / "ckpt"
    train(place, 2)
    undisturbed, _ = train(place, 4)
    steps = ckpt.list_steps(place)
    assert len(steps) > 1
    newest = steps[-1].path
    (chunk,) = [path for path in (newest / "model" / "weight").rglob("c/*/*") if path.is_file()]
    damaged = bytearray(chunk.read_bytes())
    damaged[100] ^= 1
    chunk.write_bytes(damaged)

    again, run = train(place, 4)
    assert run.recovery.rung == "universal checkpoint"
    assert run.recovery.step == steps[-2].step
    assert any(f"the checkpoint of step {steps[-1].step} cannot be used" in note for note in run.recovery.notes)
    assert run.recovery.choice[0].startswith(f"universal checkpoint, step {run.recovery.step}")
    assert torch.equal(again, undisturbed)
