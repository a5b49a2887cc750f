"""The checkpoint verbs as a person or a script meets them: exit codes, streams, JSON, no torch, no tracebacks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from holdfast import ckpt, cli
from holdfast.cli.talk import parse_size, size
from holdfast.errors import ConfigError
from tests.ckpt import megatron_files, zero_files
from tests.ckpt.saving import Sample, model, save

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")

HOUSE = Path(ckpt.__file__).parents[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    save(root, [*model(seed=1), Sample.random("model/large.weight", "float32", (900, 100))], step=100)
    save(root, [*model(seed=2), Sample.random("model/large.weight", "float32", (900, 100))], step=200)
    return root


@pytest.fixture
def run(tmp_path, saved) -> Path:
    """A run with steps 100 and 200, to be damaged at will."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def call(*words: object) -> int:
    return cli.main([str(word) for word in words])


def as_json(capsys, *words: object, code: int = 0):
    assert call(*words, "--json") == code
    return json.loads(capsys.readouterr().out)


def flip(root: Path, step: int = 200) -> None:
    with open(root / f"step-{step:08d}/model/large.weight/c/0/0", "r+b") as file:
        file.write(b"\xff\xff")


# -- each verb ---------------------------------------------------------------------------------------------------------


def test_ls_lists_the_steps(run, capsys):
    assert call("ls", run) == 0
    out = capsys.readouterr()
    lines = out.out.splitlines()
    assert [line.split()[0] for line in lines] == ["STEP", "100", "200"]
    assert out.err == ""
    found = as_json(capsys, "ls", run)
    assert [info["step"] for info in found["steps"]] == [100, 200]
    assert found["latest"] == 200


def test_ls_tells_what_is_damaged_and_what_never_finished(run, capsys):
    (run / "step-00000300.tmp-x").mkdir()
    (run / "step-00000200/zarr.json").write_text("{}")
    assert call("ls", run) == 0
    out = capsys.readouterr()
    assert "damaged" in out.out.splitlines()[-1]
    assert "1 save never finished (step-00000300.tmp-x)" in out.err
    assert as_json(capsys, "ls", run)["latest"] == 100


def test_ls_ends_with_3_when_there_is_nothing_to_restore(tmp_path, capsys):
    assert call("ls", tmp_path) == 3
    assert "holds no checkpoint that can be restored" in capsys.readouterr().err
    assert call("ls", tmp_path / "nope") == 3


def test_show_draws_a_tree_with_sizes(run, capsys):
    assert call("show", run) == 0
    out = capsys.readouterr().out
    assert "step 200" in out
    assert any(line.split() == ["large.weight", "352", "KiB", "float32", "900×100"] for line in out.splitlines())
    assert out.endswith("objects of 4 ranks: rng\n")
    found = as_json(capsys, "show", f"{run}@100", "--only", "model/large*")
    assert found["step"] == 100
    assert found["arrays"] == [{"name": "model/large.weight", "dtype": "float32", "shape": [900, 100], "nbytes": 360_000}]


def test_show_can_stop_at_a_level(run, capsys):
    assert call("show", run, "--depth", 1) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:] if not line.startswith("objects")]
    assert names == ["model", "optim/layers"]


def test_verify_says_whole_or_names_the_damage(run, capsys):
    assert call("verify", run) == 0
    assert "whole (28 arrays" in capsys.readouterr().out
    flip(run)
    assert call("verify", run) == 5
    out = capsys.readouterr().out
    assert "DAMAGED in 1 place" in out
    assert "model/large.weight rows 0..82: crc32c is" in out
    found = as_json(capsys, "verify", run, code=5)
    assert found["whole"] is False
    assert [damage["array"] for damage in found["damages"]] == ["model/large.weight"]


def test_verify_all_goes_on_past_a_damaged_step(run, capsys):
    (run / "step-00000100/COMMIT").write_text("{}")
    found = as_json(capsys, "verify", run, "--all", code=5)
    assert [(step["step"], step["whole"]) for step in found["steps"]] == [(100, False), (200, True)]


def test_restore_writes_rank_files(run, tmp_path, capsys):
    assert call("restore", run, "--mesh", "dp=2", "--out", tmp_path / "out") == 0
    out = capsys.readouterr()
    assert [line.split()[:2] for line in out.out.splitlines()[1:]] == [["0", "rank-00000.pt"], ["1", "rank-00001.pt"]]
    assert "step 200 wrote" in out.err
    document = torch.load(tmp_path / "out/rank-00000.pt", weights_only=True)
    assert document["step"] == 200


def test_restore_of_a_certain_step_with_rules_and_memory(run, tmp_path, capsys):
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nmatch = "large.weight"\ntp = 1\n')
    words = ("restore", f"{run}@100", "--mesh", "tp=2", "--rules", rules, "--max-memory", "64MiB", "--only", "model/large*")
    found = as_json(capsys, *words, "--out", tmp_path / "out", "--format", "safetensors")
    assert (found["step"], found["nbytes"], [rank["nbytes"] for rank in found["ranks"]]) == (100, 360_000, [180_000, 180_000])
    assert sorted(os.listdir(tmp_path / "out")) == ["rank-00000.safetensors", "rank-00001.safetensors"]


def test_a_dry_run_of_restore_writes_nothing(run, tmp_path, capsys):
    assert call("restore", run, "--mesh", "dp=2", "--out", tmp_path / "out", "--dry-run") == 0
    assert "would write" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- errors are one readable message -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["verify", "RUN@300"], 3, "has no committed step-00000300; it has 100, 200"),
        (["show", "RUN@x"], 2, "has to be a step number"),
        (["show", "RUN", "--only", "nope*"], 2, "no array is named like 'nope*'"),
        (["restore", "RUN", "--mesh", "dp=x", "--out", "OUT"], 2, "is not axis=size"),
        (["restore", "RUN", "--mesh", "dp=2", "--out", "RUN"], 2, "not empty"),
        (["restore", "RUN", "--mesh", "dp=2", "--out", "OUT", "--max-memory", "lots"], 2, "is not a size"),
        (["restore", "RUN", "--out", "OUT"], 2, "--mesh"),
        (["lss", "RUN"], 2, "did you mean 'ls'?"),
        (["dance"], 2, "there is no verb 'dance'"),
    ],
)
def test_wrong_words_are_answered_with_the_next_step(run, tmp_path, capsys, words, code, message):
    words = [word.replace("RUN", str(run)).replace("OUT", str(tmp_path / "out")) for word in words]
    assert call(*words) == code
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_damage_stops_a_restore_with_5(run, tmp_path, capsys):
    flip(run)
    assert call("restore", run, "--mesh", "dp=2", "--out", tmp_path / "out") == 5
    err = capsys.readouterr().err
    assert "CorruptData: step 200, model/large.weight" in err
    assert not (tmp_path / "out").exists()


def test_help_is_for_people(capsys):
    assert call("--help") == 0
    overview = capsys.readouterr().out
    assert call() == 2
    assert capsys.readouterr().out == overview
    for verb in ("ls", "show", "verify", "restore"):
        assert f"  {verb} " in overview
        assert call(verb, "--help") == 0
        assert "usage: holdfast" in capsys.readouterr().out
    assert call("--version") == 0
    assert capsys.readouterr().out.startswith("holdfast 0.")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("4GiB", 4 << 30), ("512MiB", 512 << 20), ("1.5GB", 1_500_000_000), ("100", 100), ("2k", 2000), ("7 MiB", 7 << 20)],
)
def test_sizes_are_understood(text, nbytes):
    assert parse_size(text) == nbytes


def test_sizes_are_shown_with_three_digits():
    assert [size(n) for n in (0, 1023, 1024, 1536, 150 << 10, 5 << 30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 KiB",
        "150 KiB",
        "5.0 GiB",
    ]
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size("-1")


# -- the process itself ------------------------------------------------------------------------------------------------


def process(*words: object, code: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "holdfast.cli"]
    environment = {**os.environ, "PYTHONPATH": str(HOUSE)}
    return subprocess.run([*command, *map(str, words)], capture_output=True, text=True, env=environment, timeout=60)


NO_TORCH = """
import sys
from holdfast.cli import main
restore = ["--mesh", "dp=2", "--out", "x", "--dry-run"]
for verb, words in (("ls", []), ("show", []), ("verify", []), ("restore", restore)):
    assert main([verb, sys.argv[1], *words]) == 0
    loaded = [name for name in ("torch", "ray", "zarr") if name in sys.modules]
    assert not loaded, (words, loaded)
"""


def test_ls_show_verify_import_neither_torch_nor_ray(run):
    done = process(run, code=NO_TORCH)
    assert done.returncode == 0, done.stderr


def test_the_module_is_the_command(run):
    done = process("ls", run, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["latest"] == 200
    assert process("verify", run / "nope").returncode == 3


def test_a_closed_pipe_is_no_error(run):
    done = subprocess.run(
        f"{sys.executable} -m holdfast.cli show {run} | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HOUSE)},
        timeout=60,
    )
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


INTERRUPTED = """
import os, signal, sys, threading
from holdfast.ckpt import reader
slow = reader.Checkpoint.read_boxes
def read_boxes(self, *arguments, **keywords):
    print("reading", flush=True)
    threading.Event().wait(30)
reader.Checkpoint.read_boxes = read_boxes
from holdfast.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_ends_with_130_and_leaves_nothing(run, tmp_path):
    command = [
        sys.executable,
        "-c",
        INTERRUPTED,
        "restore",
        str(run),
        "--mesh",
        "dp=1",
        "--out",
        str(tmp_path / "out"),
        "--format",
        "safetensors",
    ]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(HOUSE)}
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "reading\n"
    time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err == "holdfast: interrupted\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


# -- afterwards --------------------------------------------------------------------------------------------------------


def test_diff_tells_what_changed_and_ends_with_1(run, capsys):
    assert call("diff", f"{run}@100", f"{run}@100") == 0
    capsys.readouterr()
    found = as_json(capsys, "diff", f"{run}@100", f"{run}@200", code=1)
    assert "model/norm.weight" in [change["name"] for change in found["changed"]]
    assert "model/large.weight" not in [change["name"] for change in found["changed"]]
    assert call("diff", f"{run}@100", f"{run}@200", "--only", "model/norm*") == 1
    assert capsys.readouterr().out.splitlines()[1].startswith("model/norm.weight")


def test_prune_asks_unless_told_not_to(run, capsys):
    assert call("prune", run, "--keep", 1, "--dry-run") == 0
    assert capsys.readouterr().out == "100\n"
    assert process("prune", run, "--keep", "1").returncode == 2
    assert call("prune", run, "--keep", 1, "--yes") == 0
    assert capsys.readouterr().out == "100\n"
    assert sorted(path.name for path in run.iterdir()) == ["LATEST", "step-00000200"]


def test_convert_goes_there_and_back(run, tmp_path, capsys):
    assert call("convert", run, tmp_path / "hf", "--to", "safetensors") == 0
    assert capsys.readouterr().out == "model.safetensors\n"
    found = as_json(capsys, "convert", tmp_path / "hf", tmp_path / "again", "--step", 5)
    assert found["path"] == str(tmp_path / "again/step-00000005")
    assert call("diff", run, tmp_path / "again", "--only", "model/*", "--json") == 1  # the objects of the ranks are not in it
    assert json.loads(capsys.readouterr().out)["changed"] == []
    assert call("convert", tmp_path / "nope", tmp_path / "x") == 3


def test_repair_ends_with_4_when_it_could_and_0_when_it_did(run, saved, capsys):
    flip(run)
    assert call("repair", run, "--replica", saved, "--dry-run") == 4
    assert call("repair", run, "--replica", saved) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "model/large.weight/c/0/0"
    assert call("verify", run) == 0
    assert call("repair", run, "--replica", run / "nope") == 3


def test_convert_reads_deepspeed_and_writes_dcp(tmp_path, capsys):
    net = torch.nn.Linear(7, 5)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(2, 7)).sum().backward()
    optimizer.step()
    zero_files.write(tmp_path / "ds", net, optimizer, stage=2, ranks=3, step=12)
    found = as_json(capsys, "convert", tmp_path / "ds", tmp_path / "run", "--dry-run")
    assert (found["kind"], found["step"], found["path"]) == ("deepspeed", 12, None)
    assert not (tmp_path / "run").exists()
    assert call("convert", tmp_path / "ds", tmp_path / "run") == 0
    assert capsys.readouterr().out.strip().endswith("step-00000012")
    assert call("convert", tmp_path / "run", tmp_path / "dcp", "--to", "dcp", "--only", "model/*") == 0
    wanted = {"model": {"weight": torch.zeros(5, 7), "bias": torch.zeros(5)}}
    dcp.load(wanted, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert torch.equal(wanted["model"]["weight"], net.weight)


def test_convert_by_rules_says_what_it_leaves_out(tmp_path, capsys):
    shape = megatron_files.Shape()
    megatron_files.write(tmp_path / "megatron", megatron_files.state(shape), shape, tp=2)
    (tmp_path / "rules.toml").write_text(megatron_files.RULES)
    assert call("convert", tmp_path / "megatron", tmp_path / "run", "--rules", tmp_path / "rules.toml") == 0
    assert "left out: the optimizer's state" in capsys.readouterr().err
    assert call("show", tmp_path / "run") == 0
    assert "wq.weight" in capsys.readouterr().out


def test_parity_protects_and_verify_tells_repairable_from_lost(run, capsys):
    about = as_json(capsys, "parity", f"{run}@200", "--data", 4, "--dry-run")
    assert about["dry_run"]
    assert call("verify", f"{run}@200") == 0
    assert call("parity", f"{run}@200", "--data", 4) == 0
    flip(run)
    assert call("verify", f"{run}@200") == 4
    assert call("repair", f"{run}@200", "--dry-run") == 4
    assert call("repair", f"{run}@200") == 0
    assert call("verify", run, "--all") == 0
    capsys.readouterr()
    assert call("repair", f"{run}@100") == 2
    assert "has no sound parity beside it; give --replica" in capsys.readouterr().err
