"""What we write as torch.distributed.checkpoint is loaded by it alone, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict, set_optimizer_state_dict

from holdfast import ckpt
from holdfast.ckpt.importing import import_checkpoint, open_source
from holdfast.errors import ConfigError
from tests.ckpt.saving import Sample, assert_holds, model, save
from tests.ckpt.test_deepspeed import Model, optimizer_of, train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")


@pytest.fixture
def trained(tmp_path) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model that has learned, saved as a universal checkpoint in tmp_path/run."""
    net = Model()
    optimizer = optimizer_of(net)
    train(net, optimizer, range(3))
    ckpt.save({"model": net, "optim": optimizer, "step": 3, "nest": {"a": [1, {"b": (2, 3)}]}}, tmp_path / "run", step=3)
    return net, optimizer


@pytest.mark.parametrize("mesh", ["dp=1", "dp=3", "tp=1,ddp=2"])
def test_dcp_loads_it_into_a_live_model_and_training_goes_on(tmp_path, trained, mesh):
    net, optimizer = trained
    ckpt.restore(tmp_path / "run", mesh, tmp_path / "dcp", "dcp")
    other = Model(seed=1)
    others = optimizer_of(other)
    train(other, others, range(1))
    wanted = {
        "model": get_model_state_dict(other),
        "optim": get_optimizer_state_dict(other, others),
        "step": 0,
        "nest": {"a": [0, {"b": 0}]},
    }
    dcp.load(wanted, checkpoint_id=tmp_path / "dcp")
    set_optimizer_state_dict(other, others, wanted["optim"])
    assert (wanted["step"], wanted["nest"]) == (3, {"a": [1, {"b": (2, 3)}]})
    train(net, optimizer, range(3, 5))
    train(other, others, range(3, 5))
    for (name, mine), theirs in zip(net.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_every_dtype_and_shape_goes_out_and_comes_back(tmp_path):
    samples = [
        *model(),
        *(
            Sample.random(f"model/{dtype}", dtype, (7, 5))
            for dtype in ("bool", "int64", "uint16", "float8_e4m3fn", "complex64")
        ),
        Sample.random("model/columns", "bfloat16", (70, 40)),
    ]
    save(tmp_path / "run", samples, {"model/columns": ((1, 4),)}, step=9)
    ckpt.restore(tmp_path / "run", "dp=3", tmp_path / "dcp", "dcp")
    assert_holds(import_checkpoint(open_source(tmp_path / "dcp"), tmp_path / "again"), samples)


def test_what_keepers_stored_as_one_object_is_loaded_in_parts(tmp_path):
    state = {
        "model": {"w": torch.ones(3)},
        "optim": {"state": {"w": {"m": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": ["w"]}]},
    }
    torch.save(state, tmp_path / "x.pt")
    import_checkpoint(open_source(tmp_path / "x.pt"), tmp_path / "run")
    ckpt.restore(tmp_path / "run", "dp=1", tmp_path / "dcp", "dcp")
    wanted = {"optim": {"state": {"w": {"m": torch.zeros(3)}}, "param_groups": [{"lr": 0.0, "params": []}]}}
    dcp.load(wanted, checkpoint_id=tmp_path / "dcp")
    assert wanted["optim"]["param_groups"] == [{"lr": 0.1, "params": ["w"]}]
    assert wanted["optim"]["state"]["w"]["m"].tolist() == [1, 1, 1]


BOUNDED = """
import resource, sys, torch
import torch.distributed.checkpoint.state_dict_saver
from holdfast import ckpt
from holdfast.ckpt import dcpfile
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ckpt.restore(sys.argv[1], "dp=1", sys.argv[2], "dcp", max_memory_nbytes=64 << 20)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_stays_below_the_bound_however_many_arrays_there_are(tmp_path):
    """192 MiB in 24 arrays through 64 MiB: torch keeps what it has written, and we take its memory back."""
    save(tmp_path / "run", [Sample.random(f"model/w{number}", "uint8", (8 << 10, 1 << 10)) for number in range(24)], ())
    environment = {**os.environ, "PYTHONPATH": str(Path(ckpt.__file__).parents[2])}
    command = [sys.executable, "-c", BOUNDED, str(tmp_path / "run"), str(tmp_path / "dcp")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 64 << 20
    wanted = {"model": {"w23": torch.zeros(8 << 10, 1 << 10, dtype=torch.uint8)}}
    dcp.load(wanted, checkpoint_id=tmp_path / "dcp")
    expected = Sample.random("model/w23", "uint8", (8 << 10, 1 << 10))
    assert wanted["model"]["w23"].numpy().tobytes() == expected.data


def test_an_output_that_is_in_use_is_refused(tmp_path):
    save(tmp_path / "run", model())
    with pytest.raises(ConfigError, match="not empty"):
        ckpt.restore(tmp_path / "run", "dp=1", tmp_path / "run", "dcp")
