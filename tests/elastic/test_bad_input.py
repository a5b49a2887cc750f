"""What a user can get wrong, or a machine: each ends with a clear error of its own, on every rank, and never with a hang."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import holdfast
from holdfast.environment import home


@pytest.fixture
def here(job, monkeypatch):
    """This process may call protect() itself, with keepers in the test's own place."""
    for name, value in job.env.items():
        if name.startswith("HOLDFAST_"):
            monkeypatch.setenv(name, value)
    return job


def small() -> dict[str, object]:
    model = torch.nn.Linear(3, 2)
    return {"model": model, "optim": torch.optim.SGD(model.parameters(), lr=0.1)}


def test_no_state_is_refused():
    with pytest.raises(holdfast.StateError, match="given no state"):
        holdfast.protect({})


def test_an_object_without_state_dict_is_refused_by_name():
    with pytest.raises(holdfast.StateError, match=r"'counter' is a dict without state_dict and load_state_dict"):
        holdfast.protect({"counter": {}})


def test_the_name_of_the_random_generators_is_taken():
    with pytest.raises(holdfast.StateError, match="'rng' is taken"):
        holdfast.protect({"rng": torch.nn.Linear(2, 2)})


@pytest.mark.parametrize("name", ["a/b", "", "..", "x@rank-1"])
def test_a_name_that_cannot_be_stored_is_refused(name):
    with pytest.raises(holdfast.StateError):
        holdfast.protect({name: torch.nn.Linear(2, 2)})


def test_two_tensors_of_one_name_are_refused():
    class Loader:
        def state_dict(self):
            return {"a/b": torch.zeros(20_000), "a": {"b": torch.zeros(20_000)}}

        def load_state_dict(self, state): ...

    with pytest.raises(holdfast.StateError, match="two tensors would be stored as 'data/a/b'"):
        holdfast.protect({"data": Loader()})


@pytest.mark.parametrize("setting", [{"snapshot_every": 0}, {"checkpoint_every": "often"}, {"snapshot_every": True}])
def test_settings_say_what_they_accept(setting):
    with pytest.raises(holdfast.ConfigError, match="a number of steps from 1 on, or 'auto'"):
        holdfast.protect(small(), **setting)


def test_a_run_name_that_cannot_be_a_folder_is_refused():
    with pytest.raises(holdfast.ConfigError, match="run name"):
        holdfast.protect(small(), name="../other")


def test_steps_before_entering_are_refused():
    with pytest.raises(holdfast.StateError, match="has not been entered"):
        holdfast.protect(small(), name="x").step_done()


def test_a_world_without_a_process_group_is_said_at_once(here, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(holdfast.ConfigError, match="init_process_group"), holdfast.protect(small(), name="x"):
        pass


def test_checkpoints_that_are_a_file_are_refused(here):
    place = here.place / "file"
    place.write_text("not a directory")
    with pytest.raises(holdfast.ConfigError, match="cannot be a directory"), holdfast.protect(small(), checkpoints=str(place)):
        pass


def test_a_memory_directory_that_is_none_is_refused(here):
    with pytest.raises(holdfast.ConfigError, match="slots cannot live in"), holdfast.protect(small(), memory_dir="/nowhere"):
        pass


def test_a_small_shared_memory_is_said_at_the_start_with_the_cure(here):
    place = here.memory / "small"
    place.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        with pytest.raises(holdfast.OutOfSharedMemory, match="--ipc=host"), holdfast.protect(small(), memory_dir=str(place)):
            pass
    finally:
        here.kill_keepers(place)
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_ray_that_does_not_answer_is_said_with_its_address(here, monkeypatch):
    monkeypatch.setenv("HOLDFAST_KEEPERS", "ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(holdfast.RayUnreachable, match=r"no Ray answers at 127\.0\.0\.1:1"), holdfast.protect(small(), name="x"):
        pass


def test_another_live_run_of_the_same_name_is_refused(here):
    script = (
        "import time, torch, holdfast\n"
        "model = torch.nn.Linear(3, 2)\n"
        "with holdfast.protect({'model': model}, name='twin') as run:\n"
        "    print('in', flush=True)\n"
        "    time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", script], env=here.env, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with (
            pytest.raises(holdfast.ConfigError, match="another run named 'twin' is alive"),
            holdfast.protect(small(), name="twin"),
        ):
            pass
    finally:
        other.kill()
        other.communicate()


DISAGREE = """
import os, torch, torch.distributed as dist, holdfast
dist.init_process_group("gloo")
rank = dist.get_rank()
model = torch.nn.Linear(3, 2 + rank)
state = {"model": model} if os.environ["CASE"] == "shape" else ({"model": model} if rank else {"model": model, "more": model})
try:
    with holdfast.protect(state, name="x"):
        pass
except holdfast.LayoutMismatch as error:
    print(f"rank {rank}: {error}", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("case", "words"),
    [("shape", "model/bias is float32[2] on rank 0 and float32[3] on rank 1"), ("objects", "rank 0 protects")],
)
def test_ranks_that_disagree_about_the_state_all_stop(job, case, words):
    script = job.place / "disagree.py"
    script.write_text(DISAGREE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, env={**job.env, "CASE": case}, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(words) == 2


LEAVE = """
import glob, os, holdfast, torch, torch.distributed as dist
dist.init_process_group("gloo")
model = torch.nn.Linear(3, 2)
with holdfast.protect({"model": model}, name="x") as run:
    for step in run.steps(until=2):
        with step:
            dist.barrier()
dist.destroy_process_group()
left = [path for path in glob.glob("/proc/self/task/*/comm") if "gloo" in open(path).read()]
os.write(1, f"left: {left}\\n".encode())  # at once: two ranks share the pipe
"""


@pytest.mark.parametrize(("ranks", "launcher"), [(1, ()), (2, ()), (2, ("-m", "holdfast.elastic.run"))])
def test_a_group_that_is_destroyed_after_a_run_leaves_no_thread_that_could_abort_the_end_of_the_process(job, ranks, launcher):
    """Also while the run is still at hand."""
    script = job.place / "leave.py"
    script.write_text(LEAVE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*torchrun, *launcher, str(script)]
    done = subprocess.run(command, env=job.env, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (0, "left: []\n" * ranks), done.stderr


def train_until_committed(model: torch.nn.Module) -> None:
    with holdfast.protect({"model": model}, name="x") as run:
        for _ in run.steps(until=1000):
            time.sleep(0.05)
            if run.committed_step:
                raise RuntimeError("stop")


def test_a_snapshot_of_another_model_is_refused_by_array(here):
    model = torch.nn.Linear(3, 2)
    with pytest.raises(RuntimeError, match="stop"):
        train_until_committed(model)
    with (
        pytest.raises(holdfast.ClusterError, match="model/weight is float32"),
        holdfast.protect({"model": torch.nn.Linear(4, 2)}, name="x"),
    ):
        pass
    assert list(home(Path(here.env["HOLDFAST_MEMORY"])).glob("x/node-0/slot-*"))
