"""From the pulses of ranks to a verdict: who is late, who is silent, who is slow; and when nothing is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.snapshot.diagnosis import UNSURE, Ledger, Pulse, pack, unpack
from holdfast.snapshot.verdicts import Trouble
from tests.snapshot.nodes import Nodes

AFTER_S = 30.0


def pulse(step: int, entered: int, /, **fields: Any) -> Pulse:
    """Two collectives in every step of one group of three; `entered` counts those of the step in hand."""
    known: dict[str, Any] = {"entered": {"dp": 2 * step + entered}, "at_step": {"dp": 2 * step}, "groups": {"dp": [0, 3, 1]}}
    return Pulse(**{"step": step, "busy_s": 0.1 * step, "peers": "all", "after_s": AFTER_S, **known, **fields})


def trained(steps: int = 3, ranks: int = 3, **fields: Any) -> Ledger:
    """One step each second, and then nothing: the time is `steps`."""
    ledger = Ledger()
    for step in range(steps + 1):
        for rank in range(ranks):
            ledger.hear(rank, pulse(step, 0, **fields), float(step))
    return ledger


def still(ledger: Ledger, pulses: dict[int, Pulse], seconds: int) -> Ledger:
    for second in range(3, seconds + 1):
        for rank, said in pulses.items():
            ledger.hear(rank, said, float(second))
    return ledger


def test_who_has_not_entered_is_named_once_no_step_was_completed_for_long_enough() -> None:
    ledger = still(trained(), {0: pulse(3, 1), 1: pulse(3, 0), 2: pulse(3, 1)}, 40)
    assert ledger.hang(3 + AFTER_S - 1) is None
    verdict = ledger.hang(40.0)
    assert verdict is not None
    assert (verdict.trouble, verdict.guilty) == (Trouble.HANG, (1,))
    assert "rank 1 has entered 6, not 7" in verdict.evidence


def test_a_rank_that_says_nothing_is_named_although_its_last_word_was_no_later_than_the_others() -> None:
    verdict = still(trained(), {0: pulse(3, 1), 2: pulse(3, 1)}, 40).hang(40.0)
    assert verdict is not None
    assert verdict.guilty == (1,)
    assert "rank 1 has said nothing for 37.0 s, and had entered 6 by then" in verdict.evidence


def test_a_job_that_completes_steps_does_not_hang() -> None:
    assert trained(100).hang(101.0) is None


def test_steps_that_always_take_minutes_are_waited_for() -> None:
    ledger = Ledger()
    for step in range(4):
        for rank in range(3):
            ledger.hear(rank, pulse(step, 0), 60.0 * step)
    for rank in range(3):
        ledger.hear(rank, pulse(3, rank % 2), 181.0)
    assert ledger.hang(180 + 100.0) is None
    assert ledger.hang(180 + 200.0) is not None


def test_the_first_step_may_compile() -> None:
    ledger = Ledger()
    for second in range(int(UNSURE * AFTER_S) + 40):
        for rank in range(3):
            ledger.hear(rank, pulse(0, rank % 2), float(second))
        assert (ledger.hang(float(second)) is not None) is (second >= UNSURE * AFTER_S)


def test_long_work_of_all_ranks_is_said_late_and_convicts_nobody() -> None:
    ledger = still(trained(), {rank: pulse(3, 0) for rank in range(3)}, int(UNSURE * AFTER_S) + 20)
    assert ledger.hang(100.0) is None
    verdict = ledger.hang(UNSURE * AFTER_S + 10)
    assert verdict is not None
    assert verdict.guilty == ()


def test_who_has_left_the_loop_holds_nobody_up() -> None:
    ledger = still(trained(), {0: pulse(3, 1), 1: pulse(3, 0, left=True), 2: pulse(3, 1)}, 40)
    assert ledger.hang(40.0) is None


def test_a_group_that_nobody_waits_in_says_nothing_about_the_one_in_which_somebody_is_late() -> None:
    groups = {"dp": [0, 3, 1], "idle": [0, 3, 1]}
    both = {"groups": groups, "at_step": {"dp": 6, "idle": 4}}
    late, waiting = ({"entered": {"dp": count, "idle": 4}} for count in (6, 7))
    ledger = still(trained(), {0: pulse(3, 0, **both, **waiting), 1: pulse(3, 0, **both, **late)}, 40)
    for second in range(3, 41):
        ledger.hear(2, pulse(3, 0, **both, **waiting), float(second))
    verdict = ledger.hang(40.0)
    assert verdict is not None
    assert verdict.guilty == (1,)


def test_groups_whose_ranks_count_differently_by_design_are_not_compared() -> None:
    """Sends and receives count as well: the stages of a pipeline enter different numbers of them in every step."""
    ledger = Ledger()
    for second in range(60):
        for rank in range(3):
            count = {"dp": min(second, 3) * (rank + 1)}
            ledger.hear(rank, pulse(min(second, 3), 0, entered=count, at_step=count), float(second))
    assert ledger.hang(59.0) is None


def paced(costs: dict[int, float], peers: dict[int, str] | None = None, step_s: float = 1.0) -> Ledger:
    ledger = Ledger()
    for step in range(100):
        for rank, cost_s in costs.items():
            ledger.hear(rank, pulse(step, 0, busy_s=step * cost_s, peers=(peers or {}).get(rank, "all")), step * step_s)
    return ledger


def test_a_rank_that_computes_longer_than_its_peers_is_a_straggler() -> None:
    verdict = paced({0: 0.5, 1: 0.5, 2: 0.9, 3: 0.5}).straggler()
    assert verdict is not None
    assert (verdict.trouble, verdict.guilty) == (Trouble.STRAGGLER, (2,))


@pytest.mark.parametrize(
    "ledger",
    [
        paced({0: 0.5, 1: 0.5, 2: 0.55}),
        paced({0: 0.01, 1: 0.01, 2: 0.05}),
        paced({0: 0.5, 1: 0.5, 2: 0.9, 3: 0.9}, {2: "last stage", 3: "last stage"}),
        trained(100, busy_s=None),
        trained(5),
    ],
    ids=["a tenth more", "nothing of a step", "another stage", "a GPU's thread", "too few steps"],
)
def test_who_computes_no_longer_than_its_work_or_holds_nobody_up_is_none(ledger: Ledger) -> None:
    assert ledger.straggler() is None


@given(st.lists(st.integers(0, 100), min_size=2, unique=True).map(sorted))
def test_a_groups_ranks_come_back_from_what_is_sent(ranks: list[int]) -> None:
    assert list(unpack(pack(ranks))) == ranks


def test_the_ranks_of_a_mesh_are_three_numbers() -> None:
    assert pack(range(3, 16_384, 8)) == [3, 16_380, 8]


@pytest.mark.parametrize("silent", [False, True])
def test_keepers_tell_each_other_what_they_find_and_trainers_hear_of_it_once(
    shm: Path, wait_until: Callable[..., None], silent: bool
) -> None:
    nodes = Nodes(shm, 3, 1, mapped=True)
    try:
        nodes.enter()
        heard = dict.fromkeys(nodes.keepers, 0)
        got: dict[int, list[Any]] = {node: [] for node in nodes.keepers}

        def tell(step: int, entered: int, ranks: tuple[int, ...]) -> bool:
            for node in ranks:
                said = asdict(replace(pulse(step, entered if node != 1 else 0), after_s=0.3))
                answer = nodes.ask(node, "pulse", said=said, heard=heard[node], **nodes.links[node].who)
                got[node] += answer["verdicts"]
                heard[node] = answer["heard"]
            return all(got[node] for node in ranks)

        for step in range(3):
            tell(step, 0, (0, 1, 2))
        ranks = (0, 2) if silent else (0, 1, 2)
        wait_until(lambda: tell(2, 1, ranks), "every trainer that speaks has heard the verdict")
        for _ in range(5):
            tell(2, 1, ranks)
        for node in ranks:
            (verdict,) = got[node]
            assert (verdict["trouble"], verdict["guilty"]) == ("hang", [1])
            assert any("rank 1: its process" in line for line in verdict["evidence"])
            assert len(nodes.ask(node, "status")["verdicts"]) == 1
        nodes.enter()
        assert nodes.ask(0, "status")["verdicts"] == [], "of the epoch before"
    finally:
        nodes.close()


def summed(steps: dict[int, dict[str, int]], rank: int, flipped: int = -1) -> Pulse:
    return pulse(
        3, 0, sums=[(step, {name: crc + (rank == flipped) for name, crc in told.items()}) for step, told in steps.items()]
    )


def test_the_replica_with_other_bytes_is_named_once_all_have_summed_the_same_step() -> None:
    ledger = trained()
    ledger.hear(0, summed({7: {"w": 5}, 9: {"b": 6}}, 0), 4.0)
    ledger.hear(2, summed({7: {"w": 5}}, 2), 4.0)
    assert ledger.corruption() is None
    ledger.hear(1, summed({7: {"w": 5}}, 1, flipped=1), 4.0)
    verdict = ledger.corruption()
    assert verdict is not None
    assert (verdict.trouble, verdict.guilty) == (Trouble.CORRUPTION, (1,))
    assert verdict.evidence == ("after step 7", "w: rank 1 differs from 2 others")
    assert ledger.corruption() is None, "it is said of every step once"


def test_equal_replicas_are_not_spoken_of_and_shards_are_compared_with_their_own_replicas_only() -> None:
    ledger = trained(ranks=4)
    for rank in range(4):
        ledger.hear(rank, summed({7: {f"w at [{rank % 2}]": 10 + rank % 2}}, rank), 4.0)
    assert ledger.corruption() is None


def test_steps_that_some_rank_has_not_summed_are_forgotten() -> None:
    ledger = trained()
    for step in range(100):
        ledger.hear(0, summed({step: {"w": 1}}, 0), 4.0)
        assert ledger.corruption() is None
    assert len(ledger._sums) <= 16


def told(losses: dict[int, dict[int, float]]) -> Ledger:
    """By step, what each rank tells of its loss."""
    ledger = Ledger()
    for step, of_ranks in losses.items():
        for rank, loss in of_ranks.items():
            ledger.hear(rank, pulse(step, 0, losses=[(step, loss)]), float(step))
    return ledger


def test_a_loss_far_above_those_before_is_said_with_its_step_and_the_rank_that_stands_out() -> None:
    well = {step: dict.fromkeys(range(3), 1.0 + 0.01 * (step % 3)) for step in range(1, 21)}
    assert told(well).loss() is None
    ledger = told({**well, 21: {0: 1.0, 1: 90.0, 2: 1.0}, 22: well[1]})
    verdict = ledger.loss()
    assert verdict is not None
    assert (verdict.trouble, verdict.guilty) == (Trouble.LOSS, (1,))
    assert verdict.evidence[0] == "in step 21"
    assert ledger.loss() is None


def test_one_ranks_nan_is_its_own_and_of_all_ranks_is_nobodys() -> None:
    nan = float("nan")
    alone, of_all = told({3: {0: 1.0, 1: nan}}).loss(), told({3: {0: nan, 1: nan}}).loss()
    assert alone is not None
    assert of_all is not None
    assert (alone.guilty, of_all.guilty) == ((1,), ())


def test_losses_are_judged_once_all_who_tell_any_have_told_and_not_waited_for_for_ever() -> None:
    ledger = told({1: {2: 1.0, 5: 1.0}, 2: {2: float("nan")}})
    assert ledger.loss() is None, "rank 5 has not told of step 2 yet"
    ledger.hear(5, pulse(2, 0, losses=[(2, 1.0)]), 2.0)
    assert ledger.loss() is not None
    late = told({1: {0: 1.0, 1: 1.0}, **{step: {0: float("nan")} for step in range(2, 80)}})
    assert late.loss() is not None, "rank 1 tells nothing any more"
