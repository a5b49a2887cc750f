r"""torchft's row of benchmarks/elastic.py: four replica groups of one rank each, one of which kills itself.

    python benchmarks/_elastic_torchft.py --out FOLDER

prints the seconds from the kill -9 to the end of the first new step on the slowest survivor. torchft goes on with the survivors
instead of replacing the dead at once, so that step is one with three ranks. The model, its 64 MB of state and the batches are those
of _elastic_job.py; gradients are averaged in one go by `Manager.allreduce`, because torchft's own DistributedDataParallel does not
survive a failure on torch 2.13. The lighthouse takes a rank for dead after two seconds without a heartbeat (its default is five)
and waits one second for others to join (its default is a minute).

torchft asks for a torch of its own; it is measured with ours, from a folder on PYTHONPATH:

    pip install --no-deps --target FOLDER torchft-nightly opentelemetry-{api,sdk,proto,semantic-conventions} importlib-metadata \
        zipp opentelemetry-exporter-{otlp-common,otlp-proto-common,otlp-proto-http,http-transport} googleapis-common-protos
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

from _elastic_job import AFTERWARDS, KILL_AT, LAYERS, WIDTH

RANKS = 4
HEARTBEAT_TIMEOUT_MS, JOIN_TIMEOUT_MS = 2000, 1000


def conduct(place: Path) -> float:
    """Run the job; what its ranks say is in `place`."""
    from torch.distributed import TCPStore
    from torchft.coordination import LighthouseServer

    gate = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    lighthouse = LighthouseServer(
        bind="[::]:0", min_replicas=2, join_timeout_ms=JOIN_TIMEOUT_MS, heartbeat_timeout_ms=HEARTBEAT_TIMEOUT_MS
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHFT_LIGHTHOUSE": lighthouse.address()}
    ranks = []
    for rank in range(RANKS):
        command = [sys.executable, __file__, "--rank", str(rank), "--gate", str(gate.port), "--out", str(place)]
        with (place / f"log-{rank}").open("w") as log:
            ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    try:
        codes = [process.wait(300) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
        lighthouse.shutdown()
    for rank, code in enumerate(codes):
        if code != (-signal.SIGKILL if rank == 1 else 0):
            sys.exit(f"torchft's rank {rank} ended with {code}:\n{(place / f'log-{rank}').read_text()[-3000:]}")
    return first_new_step_s(place)


def first_new_step_s(place: Path) -> float:
    notes = {rank: [json.loads(line) for line in (place / f"rank-{rank}").read_text().splitlines()] for rank in range(RANKS)}
    killed = notes.pop(1)[-1]
    assert killed["what"] == "kill"
    new = [next(note for note in survivor if note["step"] > KILL_AT) for survivor in notes.values()]
    assert {note["ranks"] for note in new} == {RANKS - 1}
    return float(max(note["at"] for note in new) - killed["at"])


def train(rank: int, gate_port: int, out: Path) -> None:
    import torch
    from torch import nn
    from torch.distributed import ReduceOp, TCPStore
    from torchft.manager import Manager
    from torchft.process_group import ProcessGroupGloo

    torch.set_num_threads(1)
    torch.manual_seed(0)
    log = (out / f"rank-{rank}").open("a", buffering=1)

    def note(what: str, **more: object) -> None:
        log.write(json.dumps({"what": what, "at": time.time(), **more}) + "\n")

    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=30)),
        load_state_dict=lambda state: (model.load_state_dict(state["model"]), optimizer.load_state_dict(state["optim"])),
        state_dict=lambda: {"model": model.state_dict(), "optim": optimizer.state_dict()},
        min_replica_size=2,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        replica_id=f"rank-{rank}",
        hostname="127.0.0.1",
        init_sync=False,  # all draw the same weights
        timeout=timedelta(seconds=30),
    )
    gate = TCPStore("127.0.0.1", gate_port, is_master=False, wait_for_workers=False)
    gate.set(f"here-{rank}", "")
    gate.wait([f"here-{other}" for other in range(RANKS)], timedelta(seconds=120))

    while manager.current_step() < KILL_AT + AFTERWARDS:
        manager.start_quorum()
        step = manager.current_step() + 1
        batch = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(step * 64 + rank))
        model(batch).square().mean().backward()
        gradients = torch.cat([param.grad.flatten() for param in model.parameters()])
        manager.allreduce(gradients, reduce_op=ReduceOp.AVG).wait()
        ranks = manager.num_participants()
        if manager.should_commit():
            for param, grad in zip(model.parameters(), gradients.split([p.numel() for p in model.parameters()]), strict=True):
                param.grad.copy_(grad.view_as(param))
            optimizer.step()
            note("step", step=step, ranks=ranks)
            if rank == 1 and step == KILL_AT:
                note("kill")
                os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
    log.close()
    os._exit(0)  # nobody needs the threads that Manager.shutdown would wait for


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--gate", type=int)
    options = parser.parse_args()
    if options.rank is None:
        print(conduct(options.out))
    else:
        train(options.rank, options.gate, options.out)
