"""Stage substitution: the recipe, the average, the fresh start, and a small pipeline that trains on after losing a stage."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import holdfast
from holdfast.elastic.stages import Finding, LossGuard, Recipe, mix, plan_substitution, stage_order
from holdfast.elastic.substitution import StageNote
from holdfast.errors import ConfigError, LayoutMismatch, SnapshotLost, StateError
from holdfast.redundancy import Stage

LAYOUTS = Path(__file__).with_name("train_layouts.py")
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


def test_a_note_measures_the_gradients_of_all_optimizers_and_remembers_the_losses_it_was_told():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    note = StageNote(Stage(1, 3))
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in model]
    note.watch(optimizers)
    model(torch.ones(1, 2)).sum().backward()
    square = sum(float(param.grad.square().sum()) for param in model.parameters())
    for optimizer in optimizers:
        optimizer.step()
    note.look(0.5)
    assert note.state_dict()["grad_square"] == pytest.approx(square)
    fresh = StageNote(Stage(1, 3))
    fresh.load_state_dict(note.state_dict())
    assert fresh.state_dict() == note.state_dict()


def test_a_note_says_once_whether_the_loss_is_back(caplog):
    note = StageNote(Stage(0, 2))
    for _ in range(5):
        note.look(1.0)
    note.guard()
    with caplog.at_level("INFO"):
        for loss in (3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0):
            note.look(loss)
    assert [record.message.split(" (")[0] for record in caplog.records] == [
        "after the substitution of a stage the loss is back"
    ]
    note.guard()
    note.look(math.nan)
    assert "has not come back" in caplog.text


@pytest.mark.parametrize(("number", "count"), [(2, 2), (-1, 2), (0, 1)])
def test_a_stage_that_cannot_be_is_refused(number, count):
    with pytest.raises(ConfigError, match="Stage needs a number"):
        Stage(number, count)


def test_the_name_of_the_note_is_taken_where_stages_are_given():
    model = nn.Linear(2, 2)
    with pytest.raises(StateError, match="the name 'stage' is taken"):
        holdfast.protect({"stage": model}, stage=Stage(0, 2))


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


def grad_norm(stage: nn.Module) -> float:
    return math.sqrt(sum(float(param.grad.square().sum()) for param in stage.parameters()))


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
    for param in stages[lost].parameters():
        del optimizer.state[param]
    assert broken > losses[-1] * 1.02  # the stage had learned something
    guard = LossGuard(losses[-10:], tolerance=0.05, patience=100)
    for loss in train(range(100, 200)):
        guard.look(loss)
    assert guard.finding is Finding.ACCEPTED


# -- under protect -------------------------------------------------------------------------------------------------------------


def lose_stage(job, number, *, parity=0):
    """Three stages end after a few steps, and the node of one is lost with its memory; how they start again."""
    shape = ("--mesh", "pp=3", "--nodes", "3", "--parity", str(parity), "--stage")
    entry = {"step": 4, "kind": "exception", "ranks": [0], "committed": 4}
    failed = job.run(*shape, "--die", json.dumps([entry]), ranks=3, restarts=0, ok=False, script=LAYOUTS)
    assert failed.code != 0
    node = next(job.memory.glob(f"*/t/node-{number}"))
    job.kill_keepers(node)
    shutil.rmtree(node)
    return (*shape, "--halt", "0"), failed.out


def test_a_stage_that_nothing_can_give_back_is_the_average_of_its_neighbours_and_the_others_are_what_they_were(job):
    shape, out = lose_stage(job, 1)
    again = job.run(*shape, ranks=3, out=out, script=LAYOUTS)
    found = again.facts[0]["recovery"]
    assert (found["kind"], found["rung"]) == ("stage", "stage substitution")
    weights = [float(weight) for weight in re.findall(r"([0-9.]+) × stage", found["notes"][-1])]
    assert sum(weights) == pytest.approx(1, abs=2e-3)
    bare = job.run("--mesh", "pp=3", "--bare", "--halt", str(found["step"]), ranks=3, script=LAYOUTS).states
    for rank in (0, 2):
        assert not [name for name in bare[rank] if not torch.equal(bare[rank][name], again.states[rank][name])]
    substitute = again.states[1]
    assert not [name for name in substitute if "/" in name], "its optimizer has taken no step"
    for name, tensor in substitute.items():
        layer = int(name.split(".")[1])
        sides = [bare[rank][name.replace(f"layers.{layer}", f"layers.{layer + 2 * rank - 2}")] for rank in (0, 2)]
        torch.testing.assert_close(
            tensor, weights[0] * sides[0] + weights[1] * sides[1], rtol=2e-3, atol=2e-3
        )  # the weights are told with three digits
    assert again.facts[1]["lr"][0] == pytest.approx(1.2 * again.facts[0]["lr"][0])


@pytest.mark.campaign
def test_parity_comes_before_substitution(job):
    shape, out = lose_stage(job, 1, parity=1)
    again = job.run(*shape, ranks=3, out=out, script=LAYOUTS)
    assert {facts["recovery"]["rung"] for facts in again.facts} == {"parity"}


@pytest.mark.campaign
def test_a_stage_whose_neighbour_is_lost_as_well_is_said_loudly(job):
    shape, out = lose_stage(job, 1)
    node = next(job.memory.glob("*/t/node-2"))
    job.kill_keepers(node)
    shutil.rmtree(node)
    again = job.run(*shape, ranks=3, out=out, restarts=0, ok=False, script=LAYOUTS)
    assert again.code != 0
    assert "stage 1 cannot be substituted: stage 2 beside it is lost as well" in again.log


@pytest.mark.campaign
@pytest.mark.parametrize("lost", [0, 1])
def test_the_example_goes_on_after_losing_a_stage(job, lost):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "--max-restarts=1"]
    done = subprocess.run(
        [*command, str(EXAMPLE), "--lose", str(lost)], env=job.env, capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["from"] == "stage substitution"
    assert told["last_loss"] < told["first_loss"]
    assert "after the substitution of a stage the loss is back" in done.stderr
