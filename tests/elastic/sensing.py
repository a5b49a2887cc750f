"""Three ranks with something wrong, for the tests of the sensors: each prints the verdicts that it comes to."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from holdfast.elastic.sensors import HangWatch, LossWatch, PaceWatch, check_replicas


def stuck_in_my_own_code(until: Path) -> None:
    while not until.exists():
        time.sleep(0.02)


def main() -> None:
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(1)
    place = Path(os.environ["SENSING"])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {}

    tensors = {"w": torch.ones(5000), "b": torch.ones(3, dtype=torch.bfloat16), "none": torch.empty(0)}
    found["replicas fine"] = check_replicas(tensors)
    if rank == 2:
        tensors["w"].view(torch.int32)[1234] ^= 1 << 7
    found["replicas"] = check_replicas(tensors)

    losses = LossWatch()
    found["loss fine"] = losses.look(torch.tensor(1.0))
    found["loss"] = losses.look(torch.tensor(float("nan") if rank == 1 else 1.0))

    pace = PaceWatch()
    for _ in range(12):
        pace.lap(0.1 if rank else 0.2)
    found["pace"] = pace.look()

    store = dist.TCPStore("127.0.0.1", int(os.environ["SENSING_PORT"]), is_master=rank == 0, wait_for_workers=False)
    with HangWatch(store, rank, {"world": (dist.group.WORLD, range(3))}, after_s=1.0, every_s=0.1) as watch:
        if rank == 1:
            stuck_in_my_own_code(place / "seen")
        if rank == 0:
            work = dist.barrier(async_op=True)
            deadline = time.monotonic() + 60
            while watch.found is None and time.monotonic() < deadline:
                time.sleep(0.02)
            (place / "seen").touch()
            work.wait()
        else:
            dist.barrier()
        found["hang"] = watch.found
        dist.barrier()
    (place / f"{rank}.json").write_text(
        json.dumps({name: verdict and [verdict.trouble, verdict.guilty, verdict.evidence] for name, verdict in found.items()})
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
