"""The promises of DESIGN §1, kept by real processes that are really killed. Bit for bit means against an uninterrupted run."""

from __future__ import annotations

import json
import shutil

import pytest

from holdfast.environment import home


def deaths(*entries: dict[str, object]) -> list[str]:
    return ["--die", json.dumps(entries)]


# From 3 ranks on, sums depend on how DDP cuts its buckets.
@pytest.mark.parametrize(("layout", "ranks"), [pytest.param("fsdp", 2, marks=pytest.mark.campaign), ("ddp", 3)])
def test_a_killed_trainer_is_restored_bit_for_bit(job, references, layout, ranks):
    entry = {"step": 6, "kind": "trainer", "ranks": [1], "committed": 3}
    died = job.run("--layout", layout, "--nodes", "2", *deaths(entry), ranks=ranks)
    died.assert_equals(references.of(layout, ranks))
    assert [facts["recovery"]["rung"] for facts in died.facts] == ["own keeper"] * ranks


def test_a_node_lost_with_its_memory_is_rebuilt_from_parity(job, references):
    died = job.run("--nodes", "3", *deaths({"step": 6, "kind": "node", "ranks": [1], "committed": 3}), ranks=3)
    died.assert_equals(references.of("fsdp", 3))
    assert {facts["recovery"]["rung"] for facts in died.facts} == {"parity"}
    assert died.facts[0]["recovery"]["step"] >= 3


def test_two_nodes_lost_at_once_are_rebuilt_with_two_parities(job, references):
    entry = {"step": 6, "kind": "node", "ranks": [0, 2], "committed": 3}
    died = job.run("--nodes", "4", "--parity", "2", *deaths(entry), ranks=4)
    died.assert_equals(references.of("fsdp", 4))
    assert {facts["recovery"]["rung"] for facts in died.facts} == {"parity"}


@pytest.mark.campaign
def test_two_deaths_in_one_run_lose_nothing(job, references):
    first = {"step": 4, "kind": "node", "ranks": [0], "committed": 2}
    second = {"step": 9, "kind": "node", "ranks": [1], "committed": 7}
    died = job.run("--nodes", "2", *deaths(first, second))
    died.assert_equals(references.of("fsdp", 2))


def test_more_losses_than_parity_fall_back_to_the_checkpoint(job, references):
    entry = {"step": 8, "kind": "node", "ranks": [0, 1], "committed": 6}
    place = str(job.place / "ckpt")
    arguments = ("--nodes", "3", "--steps", "40", "--checkpoints", place, "--checkpoint-every", "4")
    died = job.run(*arguments, *deaths(entry), ranks=3)
    died.assert_equals(references.of("fsdp", 3, steps=40))
    assert {facts["recovery"]["rung"] for facts in died.facts} == {"universal checkpoint"}
    assert died.facts[0]["recovery"]["step"] % 4 == 0


def test_more_losses_than_parity_without_a_checkpoint_are_said_loudly(job):
    entry = {"step": 5, "kind": "node", "ranks": [0, 1], "committed": 3}
    died = job.run("--nodes", "3", *deaths(entry), ranks=3, restarts=1, ok=False)
    assert died.code != 0
    assert "SnapshotLost: snapshots exist and none can be restored" in died.log
    assert "its parity covers 1" in died.log


def test_one_process_without_torchrun_resumes_after_kill(job, references):
    died = job.run(
        "--layout", "plain", *deaths({"step": 6, "kind": "trainer", "ranks": [0], "committed": 3}), ranks=0, ok=False
    )
    assert died.code == -9
    again = job.run("--layout", "plain", ranks=0, out=died.out)
    again.assert_equals(references.of("plain", 0))
    assert again.facts[0]["recovery"]["kind"] == "trainer"


def test_an_exception_keeps_the_snapshots_and_a_clean_end_gives_all_memory_back(job):
    failed = job.run(
        "--nodes", "2", *deaths({"step": 6, "kind": "exception", "ranks": [0], "committed": 3}), restarts=0, ok=False
    )
    assert failed.code != 0
    assert "the test asked for an exception" in failed.log
    assert list(home(job.memory).glob("t/node-*/slot-*"))
    before = failed.log
    again = job.run("--nodes", "2", out=failed.out)
    assert again.facts[0].get("recovery", {}).get("step", 0) >= 3, before + again.log
    _wait_until(lambda: not list(job.memory.rglob("*")), "memory to be given back")


WORLDS = [("fsdp", 3, 2)]
MORE_WORLDS = [("fsdp", 4, 3), ("ddp", 2, 4), ("fsdp", 4, 2), ("fsdp", 2, 4), ("ddp", 4, 2), ("ddp", 4, 3)]


@pytest.mark.parametrize(
    ("layout", "before", "after"), [*WORLDS, *(pytest.param(*world, marks=pytest.mark.campaign) for world in MORE_WORLDS)]
)
def test_another_number_of_ranks_restores_from_memory(job, layout, before, after):
    """So many ranks stop and another number goes on: the state is that of the committed step, cut anew."""
    entry = {"step": 6, "kind": "exception", "ranks": [0], "committed": 5}
    shape = ("--layout", layout)
    failed = job.run(*shape, "--nodes", str(before), *deaths(entry), ranks=before, restarts=0, ok=False)
    assert failed.code != 0
    changed = job.run(*shape, "--nodes", str(after), "--halt", "0", ranks=after, out=failed.out)
    assert len(changed.states) == after
    restored = changed.facts[0]["recovery"]
    assert restored["step"] >= 5
    assert restored["rung"] == "own keeper"
    bare = job.run(*shape, "--bare", "--halt", str(restored["step"]), "--pace", "0", ranks=before)
    for name, tensor in bare.states[0].items():
        assert tensor.equal(changed.states[0][name]), name
    assert changed.facts[0]["lr"] == bare.facts[0]["lr"]


@pytest.mark.campaign
@pytest.mark.parametrize("ranks", [3, 6])  # one trainer or two on each node
def test_a_node_that_loses_its_memory_under_living_trainers_protects_again(job, references, ranks):
    """The trainers go on; then another node is lost, trainers and all, and is rebuilt with the first one's help."""
    alone = {"step": 6, "kind": "memory", "ranks": [1], "committed": 3}
    lost = {"step": 16, "kind": "node", "ranks": [2], "committed": 14}
    arguments = ("--nodes", "3", "--steps", "24", "--keep-up", "--pace", "0.2", *deaths(alone, lost))
    died = job.run(*arguments, ranks=ranks, restarts=1)
    died.assert_equals(references.of("fsdp", ranks, steps=24))
    assert died.log.count("has a place with its new keeper") == ranks // 3
    assert {facts["recovery"]["rung"] for facts in died.facts} == {"parity"}
    assert died.facts[0]["recovery"]["step"] >= 14


@pytest.mark.campaign
@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
def test_a_node_lost_after_a_change_of_world_is_rebuilt_though_no_snapshot_was_due(job, references, layout):
    """Four ranks become three, with a node's memory lost; a second node is lost before the interval brings a snapshot."""
    entry = {"step": 6, "kind": "exception", "ranks": [0], "committed": 5}
    shape = ("--layout", layout, "--steps", "30")
    failed = job.run(*shape, "--nodes", "4", *deaths(entry), ranks=4, restarts=0, ok=False)
    assert failed.code != 0
    job.kill_keepers(job.memory)
    shutil.rmtree(home(job.memory) / "t" / "node-3")
    undisturbed = job.memory / "copy"
    shutil.copytree(home(job.memory), undisturbed / home(job.memory).name, ignore=shutil.ignore_patterns("keeper.sock"))
    smaller = (*shape, "--nodes", "3", "--snapshot-every", "1000")
    alone = job.run(*smaller, ranks=3, HOLDFAST_MEMORY=str(undisturbed), HOLDFAST_RUNTIME=str(job.place / "elsewhere"))
    restored = alone.facts[0]["recovery"]["step"]
    assert restored >= 5
    loss = {"step": restored + 4, "kind": "node", "ranks": [1], "committed": restored + 1}
    died = job.run(*smaller, *deaths(loss), ranks=3)
    died.assert_equals(alone)
    assert {facts["recovery"]["rung"] for facts in died.facts} == {"parity"}
    assert restored < died.facts[0]["recovery"]["step"] <= restored + 3


def test_a_death_before_anything_was_committed_begins_anew(job, references):
    """Rank 0's keeper holds the first step, and rank 1 dies without having captured it."""
    where = {"at": "capture.begun", "role": "trainer", "place": 1}
    waits = {**where, "do": "delay", "seconds": 3, "once": str(job.place / "waited")}
    dies = {**where, "once": str(job.place / "died")}
    died = job.run("--nodes", "2", restarts=1, HOLDFAST_FAULTS=json.dumps([waits, dies]))
    died.assert_equals(references.of("fsdp", 2))
    assert all("1" in facts["losses"] for facts in died.facts)


def test_a_flipped_bit_in_a_slot_is_found_and_repaired_from_parity(job, references):
    failed = job.run(
        "--nodes", "3", *deaths({"step": 6, "kind": "exception", "ranks": [0], "committed": 5}), ranks=3, restarts=0, ok=False
    )
    assert failed.code != 0
    for slot in home(job.memory).glob("t/node-1/slot-1-*"):
        with slot.open("r+b") as file:
            file.seek(4096 + 40)
            byte = file.read(1)[0]
            file.seek(4096 + 40)
            file.write(bytes([byte ^ 4]))
    again = job.run("--nodes", "3", ranks=3, out=failed.out)
    again.assert_equals(references.of("fsdp", 3))
    assert {facts["recovery"]["rung"] for facts in again.facts} == {"parity"}
    assert any("crc32c" in note for note in again.facts[0]["recovery"]["notes"])


@pytest.mark.campaign
def test_a_rank_whose_bytes_were_rebuilt_elsewhere_while_its_node_was_away_is_restored_once(job, references):
    failed = job.run(
        "--nodes", "3", *deaths({"step": 6, "kind": "exception", "ranks": [0], "committed": 5}), ranks=3, restarts=0, ok=False
    )
    assert failed.code != 0
    job.kill_keepers(job.memory)
    own = home(job.memory) / "t"
    for slot in own.glob("node-2/slot-2-*"):  # what a rebuild on node 0 leaves there, and node 2 is back with its memory
        shutil.copy(slot, own / "node-0")
    again = job.run("--nodes", "3", ranks=3, out=failed.out)
    again.assert_equals(references.of("fsdp", 3))
    assert {facts["recovery"]["rung"] for facts in again.facts} == {"own keeper"}


def _wait_until(true, what: str) -> None:
    import time

    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)
