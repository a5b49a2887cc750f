"""Stage substitution: the recipe, the average, the fresh start, and a small pipeline that trains on after losing a stage."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from holdfast.elastic.stages import Finding, LossGuard, Recipe, begin_anew, grad_norm, mix, plan_substitution, stage_order
from holdfast.errors import ConfigError, LayoutMismatch, SnapshotLost

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_stages.py"


def test_a_stage_in_the_middle_is_its_neighbours_average_by_gradient_norm():
    assert plan_substitution(2, 5, {1: 1.0, 3: 3.0}) == Recipe(2, ((1, 0.25), (3, 0.75)))
    assert plan_substitution(2, 5, {1: 0.0, 3: 0.0}).sources == ((1, 0.5), (3, 0.5))


def test_the_first_and_the_last_stage_are_copies_of_their_twins():
    assert plan_substitution(0, 5, {}).sources == ((1, 1.0),)
    assert plan_substitution(4, 5, {}).sources == ((3, 1.0),)


def test_a_recipe_says_that_it_is_lossy():
    assert str(plan_substitution(1, 3, {0: 1.0, 2: 3.0})) == (
        "stage 1 is substituted by 0.250 × stage 0 + 0.750 × stage 2; this is lossy: its weights are not those that were lost"
    )


def test_two_lost_stages_in_a_row_are_refused():
    with pytest.raises(SnapshotLost, match="stage 2 beside it is lost as well"):
        plan_substitution(1, 5, {0: 1.0}, also_lost=[2])
    assert plan_substitution(1, 5, {0: 1.0, 2: 1.0}, also_lost=[3]).lost == 1


@pytest.mark.parametrize("norms", [{}, {0: 1.0, 2: math.nan}, {0: math.inf, 2: 1.0}])
def test_norms_that_weigh_nothing_are_refused(norms):
    with pytest.raises(ConfigError, match="have to be finite"):
        plan_substitution(1, 3, norms)


def test_every_second_micro_batch_swaps_the_ends():
    assert stage_order(5, 0) == [0, 1, 2, 3, 4]
    assert stage_order(5, 1) == [1, 0, 2, 4, 3]
    assert stage_order(4, 3) == [1, 0, 3, 2]
    assert stage_order(3, 1) == [0, 1, 2]
    assert stage_order(6, 1, swap=False) == list(range(6))


def test_the_average_keeps_dtypes_and_takes_counters_from_the_first():
    states = {
        0: {"w": torch.tensor([1.0, 2.0]), "half": torch.tensor([1.0], dtype=torch.bfloat16), "seen": torch.tensor(3)},
        2: {"w": torch.tensor([5.0, 6.0]), "half": torch.tensor([3.0], dtype=torch.bfloat16), "seen": torch.tensor(9)},
    }
    found = mix(states, Recipe(1, ((0, 0.25), (2, 0.75))))
    assert found["w"].tolist() == [4.0, 5.0]
    assert (found["half"].dtype, found["half"].item()) == (torch.bfloat16, 2.5)
    assert found["seen"].item() == 3
    assert found["seen"] is not states[0]["seen"]


@pytest.mark.parametrize("other", [{"v": torch.ones(2)}, {"w": torch.ones(3)}])
def test_stages_of_another_structure_are_refused_by_name(other):
    with pytest.raises(LayoutMismatch, match=r"stages 0 and 2 differ at '[vw]'"):
        mix({0: {"w": torch.ones(2)}, 2: other}, Recipe(1, ((0, 0.5), (2, 0.5))))


def test_only_the_substituted_stages_optimizer_state_begins_anew():
    stages = [nn.Linear(2, 2) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": stage.parameters(), "lr": 0.1} for stage in stages])
    stages[1](stages[0](torch.ones(1, 2))).sum().backward()
    assert grad_norm(stages[0]) == pytest.approx(math.sqrt(sum(float(p.grad.square().sum()) for p in stages[0].parameters())))
    optimizer.step()
    begin_anew(optimizer, stages[0], lr_scale=1.5)
    assert not any(param in optimizer.state for param in stages[0].parameters())
    assert all(param in optimizer.state for param in stages[1].parameters())
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.15, 0.1])
    with pytest.raises(ConfigError, match="a group of its own"):
        begin_anew(torch.optim.SGD([*stages[0].parameters(), *stages[1].parameters()], lr=0.1), stages[0])


def test_a_guard_accepts_what_recovers_and_rejects_what_does_not():
    def finding(losses, **options):
        guard = LossGuard([1.0, 1.1, 0.9], patience=10, window=3, **options)
        for loss in losses:
            guard.look(loss)
        return guard.finding

    assert finding([3.0, 2.0]) is Finding.WAITING
    assert finding([3.0, 2.0, 1.2, 1.05, 1.0, 1.0]) is Finding.ACCEPTED
    assert finding([3.0] * 10) is Finding.REJECTED
    assert finding([3.0, math.nan, 1.0, 1.0, 1.0]) is Finding.REJECTED
    with pytest.raises(ConfigError, match="losses from before"):
        LossGuard([])


# -- a small pipeline ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: threads that wait for each other cost a busy machine far more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def loss_of(stages: list[Block], step: int) -> torch.Tensor:
    losses = []
    for micro in range(2):
        x = inputs = torch.randn(64, 16, generator=torch.Generator().manual_seed(2 * step + micro))
        for number in stage_order(len(stages), micro):
            x = stages[number](x)
        losses.append((x - torch.sin(2 * inputs)).square().mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("lost", [0, 2, 4])
def test_a_pipeline_is_back_at_its_loss_after_losing_a_stage(lost):
    torch.manual_seed(4)
    stages = [Block() for _ in range(5)]
    optimizer = torch.optim.AdamW([{"params": stage.parameters(), "lr": 2e-3} for stage in stages])
    losses = []
    norms: dict[int, float] = {}

    def train(steps):
        for step in steps:
            loss = loss_of(stages, step)
            loss.backward()
            norms.update({number: grad_norm(stage) for number, stage in enumerate(stages)})
            optimizer.step()
            optimizer.zero_grad()
            yield float(loss.detach())

    losses = list(train(range(100)))
    torch.manual_seed(5)
    stages[lost].load_state_dict(Block().state_dict())
    broken = float(loss_of(stages, 100).detach())
    states = {number: stage.state_dict() for number, stage in enumerate(stages) if number != lost}
    recipe = plan_substitution(lost, 5, {number: norm for number, norm in norms.items() if number != lost})
    stages[lost].load_state_dict(mix(states, recipe))
    begin_anew(optimizer, stages[lost])
    assert broken > losses[-1] * 1.02  # the stage had learned something
    guard = LossGuard(losses[-10:], tolerance=0.05, patience=100)
    for loss in train(range(100, 200)):
        guard.look(loss)
    assert guard.finding is Finding.ACCEPTED


@pytest.mark.campaign
@pytest.mark.parametrize("lost", [0, 1])
def test_the_example_substitutes_a_stage_between_processes(job, lost):
    def run(how):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", str(EXAMPLE)]
        done = subprocess.run(
            [*command, "--how", how, "--lose", str(lost)], env=job.env, capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout.splitlines()[-1])

    substituted, random = run("substitute"), run("random")
    assert substituted["before"] == random["before"]
    assert substituted["after"] != random["after"]
    assert substituted["guard"] == "accepted"
