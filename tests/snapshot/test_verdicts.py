"""Verdicts from observations: who is named, how surely, and when nobody is."""

from __future__ import annotations

import math
import random
import signal

import pytest
import torch.distributed as dist

from holdfast.elastic._torch_private import collectives_entered
from holdfast.snapshot.verdicts import (
    Exit,
    Progress,
    judge_exits,
    judge_hang,
    judge_leases,
    judge_links,
    judge_losses,
    judge_replicas,
    judge_stragglers,
)


def guilty(verdict) -> tuple[int, ...] | None:
    return None if verdict is None else verdict.guilty


def test_the_rank_that_a_signal_ended_is_guilty_and_not_those_it_tore_down():
    exits = [Exit(0, 1, 10.01), Exit(2, -signal.SIGKILL, 10.02), Exit(1, -signal.SIGTERM, 10.3)]
    verdict = judge_exits(exits)
    assert guilty(verdict) == (2,)
    assert "SIGKILL, as the kernel does when memory runs out" in str(verdict)


def test_of_several_exceptions_the_first_is_guilty():
    verdict = judge_exits([Exit(3, 1, 5.0), Exit(1, 1, 5.2), Exit(0, 0, 4.0)])
    assert guilty(verdict) == (3,)
    assert verdict.confidence < 0.9


def test_ranks_that_ended_well_are_no_trouble():
    assert judge_exits([Exit(0, 0, 1.0)]) is None


def test_a_silent_rank_has_lost_its_lease_and_who_hears_nobody_is_cut_off_itself():
    assert guilty(judge_leases({0: 0.1, 1: 0.2, 2: 3.0, 3: 0.1}, lease_s=1.0, me=0)) == (2,)
    assert guilty(judge_leases({0: 0.0, 1: 3.2, 2: 3.0, 3: 0.1}, lease_s=1.0, me=0)) == (0,)
    assert judge_leases({0: 0.0, 1: 0.2, 2: 0.9}, lease_s=1.0, me=0) is None


def stuck(**entered: int) -> dict[int, Progress]:
    return {
        int(rank[1:]): Progress(count, 40.0, ("forward (model.py:12)", "main (train.py:80)")) for rank, count in entered.items()
    }


def test_the_rank_that_did_not_enter_is_named_with_its_stack():
    verdict = judge_hang({"dp": stuck(r0=12, r1=12, r2=11, r3=12)}, {"dp": range(4)}, after_s=30)
    assert guilty(verdict) == (2,)
    assert verdict.evidence == (
        "group dp: collective 12 was entered by 3 of 4 ranks 40.0 s ago",
        "rank 2 has entered 11, not 12",
        "rank 2 is in forward (model.py:12) ← main (train.py:80)",
        "rank 0 waits in forward (model.py:12) ← main (train.py:80)",
    )


def test_a_rank_that_does_not_answer_is_named():
    assert guilty(judge_hang({"dp": stuck(r0=12, r1=12)}, {"dp": range(3)}, after_s=30)) == (2,)


def test_a_group_that_moves_is_no_hang():
    progress = {"dp": {**stuck(r0=12, r1=12), 2: Progress(11, 2.0)}}
    assert judge_hang(progress, {"dp": range(3)}, after_s=30) is None


def test_all_inside_one_collective_convicts_nobody():
    verdict = judge_hang({"dp": stuck(r0=12, r1=12)}, {"dp": range(2)}, after_s=30)
    assert guilty(verdict) == ()
    assert verdict.confidence == 0.5


def test_of_two_groups_the_clear_one_is_told():
    """Ranks 0 and 1 wait for 2 in tp; 3 waits in dp for 1, which is stuck in tp."""
    progress = {"tp": stuck(r0=7, r1=7, r2=6), "dp": stuck(r1=3, r3=4)}
    assert guilty(judge_hang(progress, {"tp": range(3), "dp": (1, 3)}, after_s=30)) in ((1,), (2,))
    assert guilty(judge_hang({"tp": progress["tp"]}, {"tp": range(3)}, after_s=30)) == (2,)


def paces(slow: dict[int, float], steps: int = 30) -> dict[int, list[float]]:
    dice = random.Random(3)
    return {rank: [slow.get(rank, 1.0) * dice.gauss(0.1, 0.001) for _ in range(steps)] for rank in range(8)}


def test_a_steadily_slow_rank_is_a_straggler():
    verdict = judge_stragglers(paces({5: 1.3}))
    assert guilty(verdict) == (5,)
    assert "rank 5 computes 1.30 × as long" in verdict.evidence[0]


def test_one_slow_moment_is_no_straggler():
    compute = paces({})
    compute[2][-4:] = [0.3] * 4
    assert judge_stragglers(compute) is None


@pytest.mark.parametrize("compute", [{}, {0: [1.0] * 9, 1: [9.0] * 9}, {rank: [1.0] for rank in range(4)}])
def test_too_little_to_compare_convicts_nobody(compute):
    assert judge_stragglers(compute) is None


def test_ranks_that_are_all_alike_are_no_stragglers():
    assert judge_stragglers(paces({})) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_ranks_broken_loss_is_everybodys(bad):
    assert guilty(judge_losses({0: 1.0, 1: bad, 2: 1.0}, [])) == (1,)
    assert guilty(judge_losses({0: bad, 1: bad}, [])) == ()


def test_a_spike_is_seen_against_the_steps_before():
    dice = random.Random(1)
    history = [2.0 + dice.gauss(0, 0.02) for _ in range(32)]
    assert judge_losses({0: 2.05, 1: 2.01}, history) is None
    assert guilty(judge_losses({0: 4.0, 1: 4.1}, history)) == ()
    assert guilty(judge_losses({0: 2.0, 1: 9.0}, history)) == (1,)
    assert judge_losses({0: 9.0, 1: 9.0}, history[:8]) is None


def test_the_minority_replica_is_wrong():
    crcs = {rank: {"w": 1, "b": 2} for rank in range(3)}
    assert judge_replicas(crcs) is None
    verdict = judge_replicas(crcs | {1: {"w": 1, "b": 9}})
    assert guilty(verdict) == (1,)
    assert verdict.evidence == ("b: rank 1 differs from 2 others",)


def test_two_replicas_that_differ_convict_nobody():
    assert guilty(judge_replicas({0: {"w": 1}, 1: {"w": 2}})) == ()


def test_a_rank_that_nobody_reaches_is_named_and_one_bad_line_is_not():
    everybody = {(a, b): True for a in range(4) for b in range(4) if a != b}
    assert judge_links(everybody) is None
    assert guilty(judge_links(everybody | {(a, b): False for a, b in everybody if 2 in (a, b)})) == (2,)
    assert guilty(judge_links(everybody | {(0, 3): False})) == ()


def test_torch_still_counts_collectives(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        before = collectives_entered(dist.group.WORLD)
        dist.barrier()
        assert collectives_entered(dist.group.WORLD) > before
    finally:
        dist.destroy_process_group()
