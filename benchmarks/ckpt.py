"""How fast checkpoints are written, read, cut and captured, beside plain files and beside the libraries one would otherwise use.

    python benchmarks/ckpt.py [--json] [--quick]

The state is 1 GB of float32 in 40 tensors (two of 32000×1024, 28 of 2560×2560, ten of 2560). A save counts until every file is
fsynced (by us, where the library does not); a load is with the page cache warm, into buffers that exist. `2 ranks` are two
processes with gloo, FSDP2's layout; the resharded load wants each rank's half of the columns. Stall is the time that the training
thread waits for an asynchronous save: in the call, and before the optimizer's step, with half a second of matmul in between.
`holdfast` is given live objects there, the others a state dict that was made before the clock started.

torch-checkpointing 0.1.1 runs with use_direct_io=False: as shipped it fails on ext4.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import zarr
from _harness import Report, arguments, ratios, rounds, say
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from holdfast import ckpt, events
from holdfast.arrays import Box, Fragment, FragmentTable
from holdfast.ckpt.dcp import UniversalReader, UniversalWriter
from holdfast.coding import crc32c

if TYPE_CHECKING:
    from collections.abc import Callable

PACKAGES = ["torch", "numpy", "zarr", "pyarrow", "safetensors", "tensorstore", "torch-checkpointing"]
REPORT = Report()
TC = "torch-checkpointing"
NO_TC_RANKS = "0.1.1 needs CUDA where two ranks declare a resharder (metadata_manager.py)"


def main() -> None:
    options = arguments(__doc__)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    scale, n = (4, 2) if options.quick else (1, 5)
    directory = Path(tempfile.mkdtemp(prefix="holdfast-bench-"))
    try:
        two_ranks(directory, scale, n)  # first: it forks, and this process has no threads yet
        torch.manual_seed(0)
        state = {name: torch.randn(shape) for name, shape in shapes(scale)}
        saves(directory, state, n)
        loads(directory, state, n)
        slices(directory, scale)
        asynchronous(directory, state, n)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    REPORT.show(as_json=options.json, packages=PACKAGES)


def shapes(scale: int) -> list[tuple[str, tuple[int, ...]]]:
    wide = [(f"embedding.{number}", (32000 // scale, 1024)) for number in range(2)]
    square = [(f"layers.{number}.weight", (2560 // scale, 2560)) for number in range(28)]
    return wide + square + [(f"layers.{number}.norm", (2560,)) for number in range(10)]


def nbytes_of(state: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in state.values())


def view(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


# -- ours, without torch's planner -------------------------------------------------------------------------------------


def table_of(state: dict[str, torch.Tensor]) -> FragmentTable:
    """As a keeper has it: one process, every array whole, checksums known since the capture."""
    return FragmentTable.from_rows(
        Fragment(f"model/{name}", "float32", (*t.shape,), (0,) * t.dim(), (*t.shape,), 0, 0, t.nbytes, crc32c(view(t)))
        for name, t in state.items()
    )


def save_ours(root: Path, table: FragmentTable, state: dict[str, torch.Tensor], *, direct: bool = False) -> None:
    plan = ckpt.plan_write(table, step=1)
    directory = ckpt.begin(root, plan, "bench")
    ckpt.write_fragments(directory, plan, 0, table, lambda row: view(state[row.array.removeprefix("model/")]), direct=direct)
    ckpt.commit(root, directory, plan, nodes=[0], objects={0: {}})


# -- save --------------------------------------------------------------------------------------------------------------


def save_raw(place: Path, state: dict[str, torch.Tensor], threads: int) -> None:
    place.mkdir()

    def one(item: tuple[str, torch.Tensor]) -> None:
        with open(place / item[0], "wb") as file:
            file.write(view(item[1]))
            file.flush()
            os.fsync(file.fileno())

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, state.items()))


def save_zarr(place: Path, state: dict[str, torch.Tensor]) -> None:
    group = zarr.open_group(str(place), mode="w")
    for name, tensor in state.items():
        array = group.create_array(
            name, shape=tuple(tensor.shape), dtype="float32", chunks=tuple(tensor.shape), compressors=None
        )
        array[...] = tensor.numpy()
    sync_tree(place)


def save_safetensors(place: Path, state: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    place.mkdir()
    save_file(state, place / "model.safetensors")
    sync_tree(place)


def save_tensorstore(place: Path, state: dict[str, torch.Tensor]) -> None:
    import tensorstore

    for name, tensor in state.items():
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(place / name)}}
        store = tensorstore.open(spec, create=True, dtype="float32", shape=tuple(tensor.shape)).result()
        store[...] = tensor.numpy()
    sync_tree(place)


def sync_tree(place: Path) -> None:
    for path in place.rglob("*"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def manager_of(*, asynchronous: bool) -> Any:
    from torch_checkpointing import CheckpointManager
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    make = CheckpointManager.Config.with_async_save if asynchronous else CheckpointManager.Config.with_sync_save
    config = make()
    config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
    return config.build()


def save_tc(place: Path, state: dict[str, torch.Tensor], manager: Any) -> None:
    manager.save(str(place), {"model": state})
    sync_tree(place)


def saves(directory: Path, state: dict[str, torch.Tensor], n: int) -> None:
    table, number = table_of(state), count()

    def fresh(save: Callable[[Path], None]) -> Callable[[], None]:
        def run() -> None:
            save(directory / f"save-{next(number)}")

        return run

    systems: dict[str, Callable[[], object]] = {
        "raw write+fsync": fresh(partial(save_raw, state=state, threads=1)),
        "raw, 2 threads": fresh(partial(save_raw, state=state, threads=2)),
        "holdfast": fresh(partial(save_ours, table=table, state=state)),
        "holdfast, O_DIRECT": fresh(partial(save_ours, table=table, state=state, direct=True)),
        "dcp.save": fresh(lambda place: dcp.save(state, checkpoint_id=place)),
        "dcp.save, UniversalWriter": fresh(lambda place: dcp.save(state, storage_writer=UniversalWriter(place))),
        "zarr-python": fresh(partial(save_zarr, state=state)),
    }
    systems |= {"safetensors": fresh(partial(save_safetensors, state=state))} if has("safetensors") else {}
    systems |= {"tensorstore": fresh(partial(save_tensorstore, state=state))} if has("tensorstore") else {}
    if has("torch_checkpointing"):
        systems[TC] = fresh(partial(save_tc, state=state, manager=manager_of(asynchronous=False)))
    seconds = timed("save", systems, n, nbytes_of(state), clean=lambda: [shutil.rmtree(p) for p in directory.glob("save-*")])
    absent("save")
    REPORT.goal("save_vs_raw", 1.15, statistics.median(ratios(seconds["holdfast"], seconds["raw write+fsync"])), at_most=True)


def timed(
    case: str, systems: dict[str, Callable[[], object]], n: int, nbytes: int, clean: Callable[[], object] | None = None
) -> dict[str, list[float]]:
    """Rounds of all systems; with `clean`, what a run left is removed and flushed before the next one, off the clock."""
    say(f"{case}: {', '.join(systems)}")
    if clean is None:
        seconds = rounds(systems, n)
    else:
        seconds = {name: [] for name in systems}
        for number in range(n + 1):
            for name in systems if number % 2 else reversed(systems):
                os.sync()
                started = time.perf_counter()
                systems[name]()
                if number:
                    seconds[name].append(time.perf_counter() - started)
                clean()
    for name, values in seconds.items():
        REPORT.row(case, name, "time", "s", values)
        REPORT.row(case, name, "speed", "GB/s", [nbytes / value / 1e9 for value in values])
    return seconds


def absent(case: str) -> None:
    """A row for every peer that is not here."""
    for package, system in (("safetensors", "safetensors"), ("tensorstore", "tensorstore"), ("torch_checkpointing", TC)):
        if not has(package):
            REPORT.absent(case, system, "time", "s", "not installed")


def has(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


# -- load --------------------------------------------------------------------------------------------------------------


def loads(directory: Path, state: dict[str, torch.Tensor], n: int) -> None:
    save_ours(directory / "ours", table_of(state), state)
    dcp.save(state, checkpoint_id=directory / "dcp")
    save_raw(directory / "raw", state, 1)
    save_zarr(directory / "zarr", state)
    targets = {name: torch.zeros_like(tensor) for name, tensor in state.items()}

    def memcpy() -> None:
        for name, tensor in state.items():
            targets[name].copy_(tensor)

    def pread() -> None:
        for name, tensor in targets.items():
            fd, done, out = os.open(directory / "raw" / name, os.O_RDONLY), 0, view(tensor)
            while done < len(out):
                done += os.preadv(fd, [out[done:]], done)
            os.close(fd)

    def ours() -> None:
        checkpoint = ckpt.open_checkpoint(directory / "ours")
        checkpoint.read_boxes(
            (f"model/{name}", Box.whole(tuple(tensor.shape)), view(tensor)) for name, tensor in targets.items()
        )

    def zarr_python() -> None:
        group = zarr.open_group(str(directory / "zarr"), mode="r")
        for name, tensor in targets.items():
            tensor.copy_(torch.from_numpy(group[name][...]))

    systems: dict[str, Callable[[], object]] = {
        "memcpy": memcpy,
        "pread": pread,
        "holdfast": ours,
        "dcp.load": lambda: dcp.load(targets, checkpoint_id=directory / "dcp"),
        "zarr-python": zarr_python,
    }
    if has("safetensors"):
        from safetensors import safe_open

        save_safetensors(directory / "safetensors", state)

        def safetensors() -> None:
            with safe_open(directory / "safetensors/model.safetensors", "pt") as file:
                for name, tensor in targets.items():
                    tensor.copy_(file.get_tensor(name))

        systems["safetensors"] = safetensors
    if has("tensorstore"):
        import tensorstore

        def read_tensorstore() -> None:
            for name, tensor in targets.items():
                where = {"driver": "file", "path": str(directory / "ours/step-00000001/model" / name)}
                tensor.copy_(torch.from_numpy(tensorstore.open({"driver": "zarr3", "kvstore": where}).result().read().result()))

        systems["tensorstore, our files"] = read_tensorstore
    if has("torch_checkpointing"):
        manager = manager_of(asynchronous=False)
        save_tc(directory / "tc", state, manager)
        systems[TC] = lambda: manager.load(str(directory / "tc"), into={"model": targets})
    absent("load, warm")
    seconds = timed("load, warm", systems, n, nbytes_of(state))
    for tensor in targets.values():
        tensor.zero_()
    ours()
    assert all(torch.equal(targets[name], tensor) for name, tensor in state.items())
    REPORT.goal("load_vs_pread", 1.3, statistics.median(ratios(seconds["holdfast"], seconds["pread"])), at_most=True)
    REPORT.goal("load_vs_dcp", 2.0, statistics.median(ratios(seconds["dcp.load"], seconds["holdfast"])))


# -- slices ------------------------------------------------------------------------------------------------------------


def slices(directory: Path, scale: int) -> None:
    """16 slices of 1 MiB, anywhere in one array of 256 MiB; the kernel counts what was read."""
    rows = 65536 // scale
    state = {"wide": torch.randn(rows, 1024)}
    save_ours(directory / "slices", table_of(state), state)
    dcp.save(state, checkpoint_id=directory / "slices-dcp")
    starts = np.random.default_rng(0).integers(0, rows - 256, 16).tolist()
    checkpoint = ckpt.open_checkpoint(directory / "slices")
    before = read_so_far()
    for start in starts:
        out = bytearray(1 << 20)
        checkpoint.read_box("model/wide", Box((start, 0), (256, 1024)), out)
        assert bytes(out) == bytes(view(state["wide"][start : start + 256].contiguous()))
    amplification = (read_so_far() - before) / (16 << 20)
    REPORT.row("16 slices of 1 MiB", "holdfast", "read", "×", [amplification])
    REPORT.goal("slice_read_amplification", 1.1, amplification, at_most=True)


def read_so_far() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


# -- two ranks ---------------------------------------------------------------------------------------------------------


def two_ranks(directory: Path, scale: int, n: int) -> None:
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    children = [context.Process(target=rank_main, args=(rank, directory, scale, n, results)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert not any(child.exitcode for child in children)
    REPORT.absent("save, 2 ranks", TC, "time", "s", NO_TC_RANKS)
    for case, seconds, nbytes in results.get():
        for name, values in seconds.items():
            REPORT.row(case, name, "time", "s", values)
            REPORT.row(case, name, "speed", "GB/s", [nbytes / value / 1e9 for value in values])
        if "columns" in case:
            REPORT.goal("reshard_load_vs_dcp", 1.5, statistics.median(ratios(seconds["dcp"], seconds["holdfast"])))


def rank_main(rank: int, directory: Path, scale: int, n: int, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    rows = {name: distribute_tensor(torch.randn(shape), mesh, [Shard(0)]) for name, shape in shapes(scale)}
    columns = {name: distribute_tensor(torch.zeros(shape), mesh, [Shard(len(shape) - 1)]) for name, shape in shapes(scale)}
    nbytes = nbytes_of(rows)
    number = count()

    def together(work: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            dist.barrier()
            work()
            dist.barrier()

        return run

    local = {name: tensor.to_local().contiguous() for name, tensor in rows.items()}
    copies = {name: torch.zeros_like(tensor) for name, tensor in local.items()}

    def memcpy() -> None:
        for name, tensor in local.items():
            copies[name].copy_(tensor)

    def pread(place: Path) -> None:
        for name, tensor in copies.items():
            fd, done, out = os.open(place / name, os.O_RDONLY), 0, view(tensor)
            while done < len(out):
                done += os.preadv(fd, [out[done:]], done)
            os.close(fd)

    writers = {
        "raw write+fsync": together(lambda: save_raw(directory / f"two-{rank}-{next(number)}", local, 1)),
        "dcp": together(lambda: dcp.save(rows, checkpoint_id=directory / f"two-{next(number)}")),
        "holdfast": together(lambda: dcp.save(rows, storage_writer=UniversalWriter(directory / f"two-{next(number)}"))),
    }
    found = [("save, 2 ranks", rounds(writers, n), nbytes)]
    save_raw(directory / f"two-raw-{rank}", local, 1)
    dcp.save(rows, checkpoint_id=directory / "two-dcp")
    dcp.save(rows, storage_writer=UniversalWriter(directory / "two-ours"))
    for case, target in (("load, 2 ranks", rows), ("load columns, 2 ranks", columns)):
        readers = {
            "memcpy": together(memcpy),
            "pread": together(lambda: pread(directory / f"two-raw-{rank}")),
            "dcp": together(partial(dcp.load, target, checkpoint_id=directory / "two-dcp")),
            "holdfast": together(
                lambda target=target: dcp.load(target, storage_reader=UniversalReader(directory / "two-ours"))
            ),
        }
        found.append((case, rounds(readers, n), nbytes))
    assert all(torch.equal(tensor.full_tensor(), rows[name].full_tensor()) for name, tensor in columns.items())
    dist.barrier()
    if rank == 0:
        for place in directory.glob("two-*"):
            shutil.rmtree(place)
        results.put(found)
    dist.barrier()
    os._exit(0)


# -- asynchronous ------------------------------------------------------------------------------------------------------


class Holder(torch.nn.Module):
    """The state as a model's parameters."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in state.items():
            self.register_parameter(name.replace(".", "_"), torch.nn.Parameter(tensor))


def asynchronous(directory: Path, state: dict[str, torch.Tensor], n: int) -> None:
    """The training thread's own time in an asynchronous save, against the peers' with their best stagers."""
    model = Holder(state)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    live = {name: parameter.detach() for name, parameter in model.named_parameters()}
    stager, number = DefaultStager(StagingOptions(True, False, True, False)), count()
    manager = manager_of(asynchronous=True) if has("torch_checkpointing") else None
    matrix = torch.randn(1024, 1024)

    def compute(seconds: float = 0.5) -> None:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            matrix @ matrix

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.zeros(1).expand(parameter.shape)
        optimizer.step()

    def ours(place: Path) -> tuple[float, float]:
        waited: list[float] = []
        unsubscribe = events.subscribe(
            lambda event: waited.append(event.fields["seconds"]) if event.name == "ckpt.fenced" else None
        )
        started = time.perf_counter()
        response = ckpt.save_async({"model": model}, directory / "async", step=next(number))
        called = time.perf_counter() - started
        compute()
        step()
        response.upload_completion.result()
        unsubscribe()
        return called, sum(waited)

    def theirs(place: Path) -> tuple[float, float]:
        started = time.perf_counter()
        response = dcp.async_save(live, checkpoint_id=place, async_stager=stager)
        called = time.perf_counter() - started
        compute()
        started = time.perf_counter()
        response.staging_completion.result()
        waited = time.perf_counter() - started
        step()
        response.upload_completion.result()
        return called, waited

    def manager_save(place: Path) -> tuple[float, float]:
        started = time.perf_counter()
        written = manager.save(str(place), {"model": live})
        called = time.perf_counter() - started
        compute()
        started = time.perf_counter()
        with manager.lock():
            waited = time.perf_counter() - started
            step()
        written.result()
        return called, waited

    systems = {"holdfast": ours, "dcp, async staging": theirs} | ({TC: manager_save} if manager is not None else {})
    calls: dict[str, list[float]] = {name: [] for name in systems}
    stalls: dict[str, list[float]] = {name: [] for name in systems}
    say(f"async: {', '.join(systems)}")
    for _ in range(n + 1):
        for name, save in systems.items():
            called, waited = save(directory / f"async-{next(number)}")
            calls[name].append(called)
            stalls[name].append(called + waited)
            for done in (*directory.glob("async-*"), *(directory / "async").glob("step-*")):
                shutil.rmtree(done)
    for name in systems:
        REPORT.row("async save", name, "call", "ms", [1e3 * value for value in calls[name][1:]])
        REPORT.row("async save", name, "stall", "ms", [1e3 * value for value in stalls[name][1:]])
    REPORT.goal("async_call_ms", 1.0, 1e3 * statistics.median(calls["holdfast"][1:]), at_most=True)
    stall = statistics.median(ratios(stalls["holdfast"][1:], stalls["dcp, async staging"][1:]))
    REPORT.goal("async_stall_vs_dcp", 0.3, stall, at_most=True)
    if manager is not None:
        manager.close()


if __name__ == "__main__":
    main()
