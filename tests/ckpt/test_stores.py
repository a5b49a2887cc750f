"""Checkpoints in an object store: a real S3 server in a process of its own, spoken to through pyarrow."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow.fs as pafs
import pytest
import torch
import zarr

from holdfast import ckpt, events
from holdfast.arrays import Box
from holdfast.ckpt.dcp import UniversalWriter
from holdfast.ckpt.pruning import Retention, prune
from holdfast.ckpt.steps import Address
from holdfast.ckpt.storage import RemotePath, place
from holdfast.cli import main
from holdfast.errors import ConfigError, CorruptData, MissingData, NotACheckpoint, StorageError
from tests.ckpt.saving import Sample, assert_holds, cut, flat_boxes, grid_boxes, hold, save, write

pytest.importorskip("moto")

POINTS = [
    "ckpt.begun",
    "ckpt.fragments_written",
    "ckpt.fragments_synced",
    "ckpt.journal_written",
    "ckpt.coverage_checked",
    "ckpt.files_completed",
    "ckpt.metadata_written",
    "ckpt.tables_written",
    "ckpt.synced",
    "ckpt.committed",
    "ckpt.latest_written",
]
VISIBLE = {"ckpt.committed", "ckpt.latest_written"}

ROWS = Sample.random("model/rows", "float32", (515, 60))
COLUMNS = Sample.random("model/columns", "bfloat16", (900, 130))
FLAT = Sample.random("model/flat", "float32", (130, 7, 50))
SMALL = [
    Sample.random("model/norm", "float32", (60,)),
    Sample.random("model/scalar", "float32", ()),
    Sample.random("model/none", "float32", (0, 3)),
]
SAMPLES = [ROWS, COLUMNS, FLAT, *SMALL]


@pytest.fixture(scope="session")
def server() -> Iterator[dict[str, str]]:
    """An S3 server, and the environment in which one finds it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert process.poll() is None, "the S3 server died"
                time.sleep(0.05)
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def bucket(server, request, monkeypatch) -> str:
    """A run's address in a bucket of its own."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    name = f"b{abs(hash(request.node.name)) % 10**9}"
    pafs.S3FileSystem(endpoint_override=server["AWS_ENDPOINT_URL"], region="us-east-1", allow_bucket_creation=True).create_dir(
        name
    )
    return f"s3://{name}/runs/exp1"


def mixed() -> dict[str, list[Box]]:
    """Rows, columns, and a flat range that forms no grid."""
    boxes = {sample.spec.name: [Box.whole(sample.spec.shape)] for sample in SAMPLES}
    boxes["model/rows"] = grid_boxes(ROWS.spec, ((0, 4),))
    boxes["model/columns"] = grid_boxes(COLUMNS.spec, ((0, 2), (1, 4)))
    boxes["model/flat"] = flat_boxes(FLAT.spec, [0, 10_000, 10_003, 30_000, 45_500])
    return boxes


def names(uri: str) -> list[str]:
    where = place(uri)
    assert isinstance(where, RemotePath)
    return [name for name, _ in where.files()]


def test_what_was_saved_is_read_back_whatever_its_cut(bucket):
    path = write(bucket, hold(SAMPLES, mixed()), step=7)
    assert str(path) == f"{bucket}/step-00000007-t"
    assert_holds(bucket, SAMPLES)
    assert_holds(f"{bucket}@7", SAMPLES)
    assert_holds(str(path), SAMPLES)
    assert ckpt.open_checkpoint(bucket).verify().is_whole
    assert [info.step for info in ckpt.list_steps(bucket)] == [7]
    assert place(f"{bucket}/LATEST").read_bytes() == b"step-00000007-t\n"
    files = names(str(path))
    assert [name for name in files if name.startswith("model/rows/c/")] == [f"model/rows/c/{row}/0" for row in range(4)]
    assert len([name for name in files if name.startswith("model/columns/c/")]) == 8
    assert not [name for name in files if "pieces" in name or "journal" in name]


def test_zarr_alone_reads_a_copy_and_so_do_we(bucket, tmp_path):
    path = write(bucket, hold(SAMPLES, mixed()), step=7)
    copy = tmp_path / path.name
    copy.mkdir()
    pafs.copy_files(str(path.path), str(copy), source_filesystem=path.fs, destination_filesystem=pafs.LocalFileSystem())
    group = zarr.open_group(str(copy), mode="r")
    for sample in SAMPLES:
        assert group[sample.spec.name][...].tobytes() == sample.data
    assert_holds(tmp_path, SAMPLES)
    assert ckpt.open_checkpoint(tmp_path).verify().is_whole


def test_a_slice_asks_the_store_for_its_own_bytes(bucket, monkeypatch):
    wide = Sample.random("model/wide", "float32", (40_000, 64))
    save(bucket, [wide])
    checkpoint = ckpt.open_checkpoint(bucket)
    asked: list[int] = []
    from holdfast.ckpt import storage

    real = storage.RemoteFile.read_into
    monkeypatch.setattr(
        storage.RemoteFile,
        "read_into",
        lambda file, buffers, at: asked.append(sum(map(len, buffers))) or real(file, buffers, at),
    )
    out = bytearray(1 << 20)
    checkpoint.read_box("model/wide", Box((12_000, 0), (4096, 64)), out)
    assert bytes(out) == wide.data[12_000 * 256 : 16_096 * 256]
    assert sum(asked) <= 1.1 * len(out)


def test_a_save_killed_at_any_point_leaves_the_older_step_and_shows_nothing_of_its_own(bucket, server):
    save(f"{bucket}/run", SMALL)
    script = str(Path(__file__).with_name("dying_in_store.py"))
    house = str(Path(ckpt.__file__).parents[2])
    environment = {**os.environ, **server, "PYTHONPATH": house}
    done = subprocess.run([sys.executable, script, bucket], capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == POINTS
    seen = [info.step for info in ckpt.list_steps(f"{bucket}/run")]
    assert seen == [1, *(number + 2 for number, point in enumerate(POINTS) if point in VISIBLE)]
    assert_holds(f"{bucket}/run@1", SMALL)
    assert all(ckpt.open_checkpoint(f"{bucket}/run@{step}").verify().is_whole for step in seen)
    # A step whose save died is saved again, beside what is left of the dead one.
    save(f"{bucket}/run", SMALL, step=5, token="again")
    assert_holds(f"{bucket}/run@5", SMALL)
    pruned = prune(f"{bucket}/run", Retention(last=99))
    assert len(pruned.leftovers) == len(POINTS) - len(VISIBLE) - 1  # the one that died first had written nothing
    assert prune(f"{bucket}/run", Retention(last=99)).leftovers == ()
    assert [info.step for info in ckpt.list_steps(f"{bucket}/run")] == [1, 5, *seen[1:]]


def test_a_committed_step_is_never_saved_again(bucket):
    save(bucket, SMALL, step=3)
    with pytest.raises(ConfigError, match="step 3 is committed already"):
        save(bucket, SMALL, step=3, token="other")


def test_what_a_failed_save_left_is_removed_and_a_checkpoint_never(bucket):
    saved = cut(SMALL)
    plan = ckpt.plan_write(saved.table, step=2, whole_files=True)
    directory = ckpt.begin(bucket, plan, "t")
    ckpt.write_fragments(directory, plan, 0, saved.table, saved.read)
    assert names(str(directory))
    ckpt.discard(directory)
    assert not names(str(directory))

    def refused(where: RemotePath, data: bytes) -> None:
        raise OSError("the store says no")

    patch = pytest.MonkeyPatch()
    armed = {"ckpt.committed": lambda: patch.setattr(RemotePath, "write_bytes", refused)}
    events.arm(lambda point: armed.get(point, lambda: None)())  # COMMIT is there, LATEST will not be
    try:
        with pytest.raises(StorageError, match="the store says no"):
            save(bucket, SMALL, step=3)
    finally:
        events.arm(None)
        patch.undo()
    ckpt.discard(f"{bucket}/step-00000003-t")
    assert_holds(bucket, SMALL, step=3)


def test_damage_in_a_store_is_found_and_never_handed_out(bucket):
    path = save(bucket, SAMPLES, step=3)
    spoiled = path / "model/rows/c/1/0"
    spoiled.write_bytes(b"\0" * 7 + spoiled.read_bytes()[7:])
    (path / "model/columns/c/2/0").unlink()
    report = ckpt.open_checkpoint(bucket).verify()
    assert {damage.file for damage in report.damages} == {"model/rows/c/1/0", "model/columns/c/2/0"}
    with pytest.raises(CorruptData, match=r"model/rows at \[129, 0\] in s3://.*crc32c"):
        ckpt.open_checkpoint(bucket).read_box("model/rows", None, bytearray(ROWS.spec.nbytes))
    with pytest.raises(MissingData, match=r"s3://.*is missing"):
        ckpt.open_checkpoint(bucket).read_box("model/columns", None, bytearray(COLUMNS.spec.nbytes))


def test_old_steps_are_pruned(bucket):
    for step in (1, 2, 3):
        save(bucket, SMALL, step=step)
    assert prune(bucket, Retention(last=1), dry_run=True).removed == (1, 2)
    pruned = prune(bucket, Retention(last=1))
    assert pruned.removed == (1, 2)
    assert pruned.freed_nbytes > 0
    assert [info.step for info in ckpt.list_steps(bucket)] == [3]
    assert_holds(bucket, SMALL)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_live_objects_go_there_and_back_also_compressed_and_asynchronously(bucket):
    torch.manual_seed(0)
    model = torch.nn.Linear(300, 200)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ckpt.save({"model": model, "epoch": 3}, bucket, step=1, compress={"*": 3})
    ckpt.save_async({"model": model, "epoch": 3}, bucket, step=2).upload_completion.result()
    for step in (1, 2):
        other = torch.nn.Linear(300, 200)
        assert ckpt.load({"model": other}, bucket, step=step) == step
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_the_command_line_takes_addresses(bucket, tmp_path, capsys):
    save(bucket, SAMPLES, step=4)
    assert main(["ls", bucket, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["latest"] == 4
    assert main(["show", f"{bucket}@4"]) == 0
    assert "columns" in capsys.readouterr().out
    assert main(["verify", bucket]) == 0
    assert f"{bucket}/step-00000004-t: whole" in capsys.readouterr().out
    assert main(["restore", bucket, "--mesh", "dp=2", "--out", str(tmp_path / "out")]) == 0
    whole = torch.cat(
        [torch.load(tmp_path / f"out/rank-0000{rank}.pt", weights_only=True)["arrays"]["model/rows"] for rank in (0, 1)]
    )
    assert whole.numpy().tobytes() == ROWS.data
    assert main(["prune", bucket, "--keep", "1", "--yes"]) == 0


PROTECTED = """
import json, sys, torch, holdfast
torch.manual_seed(0)
model = torch.nn.Linear(300, 200)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
seen = []
with holdfast.protect(
    {"model": model, "optim": optimizer}, checkpoints=sys.argv[1], checkpoint_every=2, snapshot_every=1, name="stored"
) as run:
    for step in run.steps(until=int(sys.argv[2])):
        model(torch.full((4, 300), float(step))).square().mean().mul(1e-6).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(step)
print(json.dumps({"steps": seen, "weight": model.weight.double().sum().item().hex()}))
"""


def protected(address: str, until: int, server: dict[str, str]) -> dict[str, object]:
    """A protected run in a process of its own, with keepers and memory that no other run has."""
    home = Path(tempfile.mkdtemp(prefix="hf-", dir="/tmp"))  # a socket's path has to be short
    house = str(Path(ckpt.__file__).parents[2])
    places = {"HOLDFAST_RUNTIME": str(home), "HOLDFAST_MEMORY": str(home), "HOLDFAST_KEEPERS": "process", "PYTHONPATH": house}
    environment = {**os.environ, **server, **places}
    command = [sys.executable, "-c", PROTECTED, address, str(until)]
    try:
        with open(home / "log", "w") as log:  # keepers keep it open
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, timeout=100).returncode
        text = (home / "log").read_text()
        assert code == 0, text
        return json.loads(text.splitlines()[-1])
    finally:
        for keeper in home.glob("*/*/*/keeper.json"):
            with suppress(ProcessLookupError):
                os.kill(json.loads(keeper.read_text())["pid"], signal.SIGKILL)
        shutil.rmtree(home)


@pytest.mark.campaign
def test_a_protected_run_that_lost_its_machine_goes_on_from_the_store(bucket, server):
    torch.manual_seed(0)
    model = torch.nn.Linear(300, 200)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(1, 7):
        model(torch.full((4, 300), float(step))).square().mean().mul(1e-6).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert protected(bucket, 4, server)["steps"] == [1, 2, 3, 4]
    assert [info.step for info in ckpt.list_steps(bucket)][-1] == 4
    rest = protected(bucket, 6, server)
    assert rest == {"steps": [5, 6], "weight": model.weight.double().sum().item().hex()}


def test_a_bucket_that_is_not_there_is_told(bucket):
    with pytest.raises(StorageError, match=r"s3://no-such-bucket.*check the address, the credentials and the endpoint"):
        save("s3://no-such-bucket/run", SMALL)
    with pytest.raises(NotACheckpoint, match="no such directory"):
        ckpt.open_checkpoint(f"{bucket}/nothing")


def test_plans_for_directories_and_credentials_in_addresses_are_refused(bucket):
    plan = ckpt.plan_write(cut(SMALL).table, step=1)
    with pytest.raises(ConfigError, match="takes only whole files"):
        ckpt.begin(bucket, plan, "t")
    with pytest.raises(ConfigError, match="keep credentials out of addresses"):
        place("s3://key:secret@bucket/run")
    with pytest.raises(ConfigError, match="pyarrow has no filesystem for this"):
        place("nothing://bucket/run")
    with pytest.raises(ConfigError, match="object stores have no links"):
        UniversalWriter(bucket, incremental=True)
    assert Address.parse(f"{bucket}@12") == Address(place(bucket), 12)
