"""What the launcher decides, what the board tells whom, and that torch still has the names the communicator stands on."""

from __future__ import annotations

import datetime
import inspect
import mmap
import os
import signal
import socket
import threading
import time

import pytest
import torch
from torch._C._distributed_c10d import ProcessGroup
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from holdfast.elastic import run
from holdfast.elastic.board import Board, board_address, cradle_name, reach
from holdfast.elastic.communicator import FORWARDED, SwapGroup
from holdfast.elastic.post import Post, RestartNeeded
from holdfast.elastic.run import STRIKES, Record, judge
from holdfast.environment import Berth
from holdfast.errors import ClusterError, ConfigError, KeeperUnreachable, StaleEpoch

NOT_FORWARDED = {
    "abort", "bound_device_id", "boxed", "get_group_store", "group_desc", "group_name", "merge_remote_group", "monitored_barrier",
    "name", "rank", "set_timeout", "shutdown", "size", "split_group", "unbox", "use_pg_for_symm_mem_rendezvous",
}  # fmt: skip
"""Public names of a ProcessGroup that are no collectives, or (monitored_barrier) are gloo's own."""


# -- judging ---------------------------------------------------------------------------------------------------------------


def test_a_killed_trainer_is_replaced_and_one_that_is_stopped_is_not():
    assert judge(-signal.SIGKILL, Record(), stopping=False, obstacle="").action == "replace"
    assert judge(1, Record(), stopping=False, obstacle="").action == "replace"
    assert judge(0, Record(), stopping=False, obstacle="").code == 0
    assert judge(-signal.SIGTERM, Record(), stopping=False, obstacle="").code == 128 + signal.SIGTERM
    assert judge(-signal.SIGKILL, Record(), stopping=True, obstacle="").action == "leave"


def test_a_trainer_that_asks_for_a_restart_or_has_no_spare_is_left_to_torchrun():
    assert judge(75, Record(), stopping=False, obstacle="").action == "leave"
    without = judge(1, Record(), stopping=False, obstacle="its spare has failed")
    assert (without.action, without.code) == ("leave", 1)
    assert "its spare has failed" in without.reason


def test_deaths_without_progress_count_and_progress_forgives_them():
    record = Record()
    for _ in range(STRIKES):
        record = record.after_death_at(7)
    verdict = judge(1, record, stopping=False, obstacle="")
    assert verdict.action == "leave"
    assert "without a step beyond 7" in verdict.reason
    assert judge(1, record.after_death_at(8), stopping=False, obstacle="").action == "replace"


# -- the board -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def board(tmp_path):
    found = Board(str(tmp_path / "b.sock"), "secret")
    yield found
    found.close()


def test_a_note_is_waited_for(board):
    reader, writer = reach(board.address, "secret"), reach(board.address, "secret")
    found = []
    waiter = threading.Thread(target=lambda: found.append(bytes(reader.ask("get", key="a", epoch=0, timeout_s=60)[1])))
    waiter.start()
    writer.ask("set", b"here", key="a")
    waiter.join(60)
    assert found == [b"here"]
    reader.close()
    writer.close()


def test_a_death_is_told_to_whoever_waits_in_the_old_epoch(board):
    survivor, watcher, launcher = (reach(board.address, "secret") for _ in range(3))
    told, refused = [], []

    def wait():
        with pytest.raises(StaleEpoch, match="rank 3 was killed") as caught:
            survivor.ask("get", key="never", epoch=0, timeout_s=60)
        refused.append(str(caught.value))

    threads = [threading.Thread(target=wait), threading.Thread(target=lambda: told.append(watcher.ask("watch", epoch=0)))]
    for thread in threads:
        thread.start()
    launcher.ask("advance", reason="rank 3 was killed by SIGKILL")
    for thread in threads:
        thread.join(60)
    assert told == [{"epoch": 1, "reason": "rank 3 was killed by SIGKILL", "over": "", "lost": ""}]
    assert refused
    for connection in (survivor, watcher, launcher):
        connection.close()


def test_nobody_waits_for_a_rank_that_has_completed_or_never_comes(board):
    connection = reach(board.address, "secret")
    with pytest.raises(ClusterError, match="nobody left the note 'a'"):
        connection.ask("get", key="a", epoch=0, timeout_s=0.01)
    connection.ask("over", reason="rank 1 has completed the run")
    with pytest.raises(ClusterError, match="rank 1 has completed the run"):
        connection.ask("get", key="a", epoch=0, timeout_s=60)
    connection.close()


def test_a_launcher_that_goes_without_a_word_ends_recovery_in_place(board):
    watcher, another, lost = (reach(board.address, "secret") for _ in range(3))
    told = []
    waiter = threading.Thread(target=lambda: told.append(watcher.ask("watch", epoch=0)))
    waiter.start()
    lost.ask("attend", rank=2)
    lost.close()
    waiter.join(60)
    assert [item["lost"] for item in told] == ["the launcher of rank 2 is gone"]
    with pytest.raises(ClusterError, match="nobody can be replaced any more: the launcher of rank 2 is gone"):
        another.ask("advance", reason="rank 1 was killed")
    watcher.close()
    another.close()


def test_a_launcher_that_departs_is_not_missed(board):
    done, another = reach(board.address, "secret"), reach(board.address, "secret")
    done.ask("attend", rank=2)
    done.ask("depart")
    done.close()
    time.sleep(0.1)
    assert another.ask("advance", reason="rank 1 was killed") == {"epoch": 1}
    another.close()


def test_a_stranger_is_turned_away(board):
    with pytest.raises((ClusterError, KeeperUnreachable)):
        reach(board.address, "guess", patience_s=0)


def test_every_process_of_an_attempt_finds_the_same_board_and_another_attempt_another():
    env = {"MASTER_ADDR": "h", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "0"}
    assert board_address(env) == board_address({**env, "RANK": "3"})
    assert board_address(env) != board_address({**env, "TORCHELASTIC_RESTART_COUNT": "1"})
    assert board_address({**env, "GROUP_WORLD_SIZE": "2"}) == ("h", 1)
    with pytest.raises(ConfigError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        board_address({**env, "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"})


def test_a_berth_survives_the_environment():
    for board in ("/tmp/b.sock", ("10.0.0.1", 29500)):
        berth = Berth("ready", board, "secret", 5, 6, 7, 8)
        assert Berth.read({"HOLDFAST_BERTH": berth.to_text()}) == berth
    assert Berth.read({}) is None


@pytest.fixture
def line():
    """A spare's line to its launcher, and the launcher's end of it."""
    ours, theirs = socket.socketpair()
    pulse, transcript = os.memfd_create("pulse"), os.memfd_create("transcript")
    os.ftruncate(pulse, mmap.PAGESIZE)
    post = Post(Berth("ready", "/tmp/b.sock", "secret", theirs.detach(), pulse, transcript, 1))
    yield post, ours
    for end in (ours, post._channel):
        end.close()
    for fd in (pulse, transcript):
        os.close(fd)


def test_a_spare_waits_to_be_called_and_learns_for_which_epoch(line):
    post, launcher = line
    launcher.sendall(b"12\n")
    assert post.await_call() == 12
    assert launcher.recv(64) == b"ready\n"
    assert post.await_call() == 0, "nobody calls a second time"


def test_the_first_step_after_each_entry_is_told_and_no_other(line):
    """Then a spare is started, which would take that step's cores."""
    post, launcher = line
    for _ in range(2):
        post.entered()
        for step in (1, 2, 3):
            post.completed(step)
    assert launcher.recv(4096) == b"running\nstepping\n" * 2


def test_the_first_launcher_of_a_host_holds_a_cradle_and_what_it_forks_has_lost_no_thread(monkeypatch):
    for name, value in {"HOLDFAST_KEEPERS": "process", "LOCAL_RANK": "1", "MASTER_PORT": str(os.getpid())}.items():
        monkeypatch.setenv(name, value)
    assert run._start_cradle() is None
    monkeypatch.setenv("LOCAL_RANK", "0")
    cradle = run._start_cradle()
    assert cradle is not None
    try:
        deadline = time.monotonic() + 60
        with socket.socket(socket.AF_UNIX) as sock:
            while sock.connect_ex(f"\0{cradle_name(os.environ)}"):
                assert time.monotonic() < deadline, "no cradle within a minute"
                time.sleep(0.05)
        assert os.listdir(f"/proc/{cradle.pid}/task") == [str(cradle.pid)]
    finally:
        cradle.kill()
        cradle.wait()
    monkeypatch.setenv("HOLDFAST_KEEPERS", "ray")
    assert run._start_cradle() is None


# -- what torch has to have --------------------------------------------------------------------------------------------------


def test_every_collective_of_torch_is_passed_on():
    public = {name for name in dir(ProcessGroup) if not name.startswith("_") and inspect.isroutine(getattr(ProcessGroup, name))}
    assert public - NOT_FORWARDED - set(FORWARDED) == set()


def test_the_private_names_are_there():
    for name in ("_register_backend", "_set_default_backend", "_set_group_name", "_get_backend"):
        assert hasattr(ProcessGroup, name)
    for name in (
        "_build_params_for_reducer",
        "_ddp_init_helper",
        "_build_debug_param_to_name_mapping",
        "_get_ddp_logging_data",
    ):
        assert hasattr(DistributedDataParallel, name)
    assert hasattr(FSDPModule, "_get_fsdp_state")
    assert callable(fully_shard)


def test_a_group_alone_answers_as_if_all_ranks_held_the_same():
    group = SwapGroup(1, 4, "g", datetime.timedelta(seconds=1))
    tensor, gathered, part = torch.arange(4.0), torch.zeros(16), torch.zeros(1)
    group.allreduce([tensor]).wait()
    group.all_gather_single(gathered, tensor).wait() if hasattr(group, "all_gather_single") else None
    group._reduce_scatter_base(part, tensor).wait()
    assert torch.equal(gathered, torch.arange(4.0).repeat(4))
    assert part.item() == 1.0
    with pytest.raises(RestartNeeded, match="asks to send with other ranks, which cannot be repeated"):
        group.send([tensor], 0, 0)
