"""A spare hears before protect() what its trainer heard, and says so where it cannot."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from holdfast.elastic import transcript as notes
from holdfast.elastic.communicator import SwapGroup, _done
from holdfast.elastic.post import RestartNeeded
from holdfast.elastic.transcript import Listening, Repeating, Transcript

ASKING = Path(__file__).with_name("train_on_hearsay.py")


class Heard:
    """A transport that brings what the test says, as another rank would have sent it."""

    def __init__(self, *brings: torch.Tensor) -> None:
        self._brings = list(brings)

    def _bring(self, outputs, *_):
        for output in outputs if isinstance(outputs, list) else [outputs]:
            for tensor in output if isinstance(output, list) else [output]:
                tensor.copy_(self._brings.pop(0))
        return _done(outputs)

    broadcast = allgather = scatter = gather = alltoall_base = _bring


class Silent:
    """What answers in a spare where nothing was kept; it leaves everything as it is."""

    def broadcast(self, outputs, *_):
        return _done(outputs)

    def barrier(self, *_):
        return _done([])


def trainer(*brings: torch.Tensor) -> tuple[Transcript, Listening]:
    transcript = Transcript()
    return transcript, Listening("0", Heard(*brings), transcript)


def spare(transcript: Transcript) -> tuple[Transcript, Repeating]:
    repeated = Transcript.of(transcript.to_bytes())
    return repeated, Repeating("0", Silent(), repeated, _done)


KINDS = [
    torch.tensor(7),
    torch.tensor([True, False]),
    torch.randn(3, 5).to(torch.bfloat16),
    torch.randn(2, 2, dtype=torch.complex64),
    torch.arange(6, dtype=torch.uint8).reshape(2, 3),
    torch.randn(4, 6, dtype=torch.float64).t(),
    torch.empty(0, 3),
]


@pytest.mark.parametrize("told", KINDS, ids=lambda tensor: f"{tensor.dtype}-{list(tensor.shape)}")
def test_every_kind_of_tensor_is_repeated_bit_for_bit(told):
    transcript, group = trainer(told)
    group.broadcast([torch.zeros_like(told)], None)
    repeated, again = spare(transcript)
    heard = torch.zeros_like(told)
    assert again.broadcast([heard], None).wait()
    assert torch.equal(heard, told)
    repeated.check_through()


def test_what_cannot_be_answered_alone_is_repeated_in_order():
    told = [torch.tensor([number]) for number in range(6)]
    transcript, group = trainer(*told)
    group.scatter([torch.zeros(1, dtype=torch.int64)], [[]], None)
    group.gather([[torch.zeros(1, dtype=torch.int64) for _ in range(3)]], [torch.zeros(1)], None)
    group.gather([], [torch.zeros(1)], None)  # a rank that only gives
    group.alltoall_base(torch.zeros(1, dtype=torch.int64), torch.zeros(1), [], [])
    repeated, again = spare(transcript)
    out, gathered = torch.zeros(1, dtype=torch.int64), [torch.zeros(1, dtype=torch.int64) for _ in range(3)]
    again.scatter([out], [[]], None)
    assert out.item() == 0
    again.gather([gathered], [torch.zeros(1)], None)
    assert [tensor.item() for tensor in gathered] == [1, 2, 3]
    again.barrier()  # brings nothing, so it may be left out or added
    again.gather([], [torch.zeros(1)], None)
    again.alltoall_base(out, torch.zeros(1), [], [])
    assert out.item() == 4
    repeated.check_through()


def test_a_parameter_that_needs_a_gradient_is_filled_too():
    transcript, group = trainer(torch.ones(2))
    group.broadcast([torch.zeros(2)])
    _, again = spare(transcript)
    param = torch.nn.Parameter(torch.zeros(2))
    again.broadcast([param])
    assert torch.equal(param, torch.ones(2))


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        (
            lambda group: group.broadcast([torch.zeros(2)]),
            r"broadcast into float32\[2\] .* asked for broadcast into float32\[1\]",
        ),
        (lambda group: group.broadcast([torch.zeros(1, dtype=torch.int32)]), r"int32\[1\] in group '0' where"),
        (lambda group: group.allgather([[torch.zeros(1)]]), r"allgather into float32\[1\] in group '0' where"),
    ],
)
def test_a_spare_that_asks_for_something_else_ends_and_says_what(asked, match):
    transcript, group = trainer(torch.ones(1))
    group.broadcast([torch.zeros(1)])
    repeated, again = spare(transcript)
    with pytest.raises(RestartNeeded, match=match):
        asked(again)
    with pytest.raises(RestartNeeded, match=match):
        repeated.check_through()  # also where the script has caught the first one


def test_a_spare_that_asks_for_more_or_for_less_ends_too():
    transcript, group = trainer(torch.ones(1))
    group.broadcast([torch.zeros(1)])
    repeated, again = spare(transcript)
    with pytest.raises(RestartNeeded, match=r"without asking for broadcast into float32\[1\] in group '0'"):
        repeated.check_through()
    repeated, again = spare(transcript)
    again.broadcast([torch.zeros(1)])
    with pytest.raises(RestartNeeded, match="asked for nothing more"):
        again.broadcast([torch.zeros(1)])


def test_weights_are_not_kept_and_anything_else_so_large_ends_the_spare(monkeypatch):
    monkeypatch.setattr(notes, "KEPT_EACH", 16)
    weights, table, small = torch.randn(5), torch.arange(5), torch.tensor([3])
    transcript, group = trainer(weights, small, table)
    for told in (weights, small, table):
        group.broadcast([torch.zeros_like(told)])
    assert len(transcript.to_bytes()) < 400
    _, again = spare(transcript)
    mine, heard = torch.full((5,), 2.0), torch.zeros_like(small)
    again.broadcast([mine])
    again.broadcast([heard])
    assert torch.equal(mine, torch.full((5,), 2.0))
    assert torch.equal(heard, small)
    with pytest.raises(RestartNeeded, match=r"broadcast into int64\[5\], which is more than spares are told"):
        again.broadcast([torch.zeros_like(table)])


def test_the_largest_are_let_go_first_where_all_are_too_many(monkeypatch):
    monkeypatch.setattr(notes, "KEPT_IN_ALL", 40)
    told = [torch.ones(1), torch.ones(6), torch.ones(4), torch.ones(1)]
    transcript, group = trainer(*told)
    for tensor in told:
        group.broadcast([torch.zeros_like(tensor)])
    _, again = spare(transcript)
    heard = [torch.zeros_like(tensor) for tensor in told]
    for tensor in heard:
        again.broadcast([tensor])
    assert [bool(tensor.any()) for tensor in heard] == [True, False, True, True]


def test_a_script_that_never_stops_asking_is_not_followed(monkeypatch):
    monkeypatch.setattr(notes, "CALLS_LIMIT", 2)
    transcript, group = trainer(*[torch.ones(1)] * 4)
    for _ in range(4):
        group.broadcast([torch.zeros(1)])
    with pytest.raises(RestartNeeded, match="more than 2 times before protect"):
        spare(transcript)
    with pytest.raises(RestartNeeded, match="has left no notes"):
        Transcript.of(b"")


def test_every_collective_that_fills_tensors_is_heard():
    """Those that are not: point to point, barriers, and what does not communicate."""
    others = {
        "send",
        "recv",
        "recv_anysource",
        "barrier",
        "_start_coalescing",
        "_end_coalescing",
        "_get_sequence_number_for_group",
    }
    from holdfast.elastic.communicator import FORWARDED

    assert set(FORWARDED) - others == set(notes.HEARD)


def test_a_real_group_is_listened_to(tmp_path):
    group = SwapGroup(0, 1, "g", datetime.timedelta(seconds=30))
    group.connect(HashStore())
    transcript = Transcript()
    group.inner = Listening("g", group.inner, transcript)
    tensor = torch.arange(3)
    group.broadcast([tensor]).wait()
    group.allgather([[torch.zeros(3, dtype=torch.int64)]], [tensor]).wait()
    head = json.loads(transcript.to_bytes().split(b"\n")[0])
    assert [call[0] for call in head["groups"]["g"]] == ["broadcast", "allgather"]


# -- real ranks --------------------------------------------------------------------------------------------------------------


def assert_same(run, other) -> None:
    assert len(run.states) == len(other.states) == 2
    for mine, theirs in zip(run.states, other.states, strict=True):
        assert mine.keys() == theirs.keys()
        assert not [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert [facts["heard"] for facts in run.facts] == [facts["heard"] for facts in other.facts]


@pytest.fixture
def undisturbed(job):
    return job.run(script=ASKING)


@pytest.mark.timeout(240)
def test_a_replaced_rank_holds_what_its_predecessor_heard_and_drew(job, undisturbed):
    """Both ranks die: the one that drew the seed and told everybody, and one that heard it."""
    died = job.run("--die", "[[5, 1], [9, 0]]", script=ASKING, restarts=0, spares="ready")
    assert all(facts["starts"] >= 1 for facts in died.facts), "the process at the end is another than the first"
    assert_same(died, undisturbed)


@pytest.mark.campaign
@pytest.mark.parametrize("spares", ["import", "none"])
def test_one_that_starts_only_after_the_death_hears_it_too(job, undisturbed, spares):
    assert_same(job.run("--die", "[[5, 0]]", script=ASKING, restarts=0, spares=spares), undisturbed)


@pytest.mark.campaign
def test_a_script_that_asks_for_something_else_the_second_time_is_restarted_whole(job):
    """Its spare says so long before anybody dies; where one does, torchrun restarts all processes."""
    died = job.run("--stray", "--die", "[[5, 1]]", script=ASKING, restarts=1, spares="ready", ok=False)
    assert "before protect() the script asks for allreduce into float32[1] in group '0'" in died.log
    assert "its spare ended with code 75 before it was ready, so a death restarts all processes" in died.log
    assert died.code == 0


def test_a_trainer_that_dies_before_it_has_entered_is_left_to_torchrun(job):
    """Nobody knows yet what it heard, and nothing is lost by starting again."""
    fault = {"at": "trainer.entered", "role": "trainer", "place": 1, "once": str(job.place / "mark")}
    died = job.run(script=ASKING, restarts=1, spares="ready", HOLDFAST_FAULTS=json.dumps([fault]))
    assert (job.place / "mark").exists()
    assert "killed by SIGKILL, and cannot be replaced in place: it had not entered protect() yet" in died.log
    assert [facts["starts"] for facts in died.facts] == [1, 1]
