"""A run that chooses its own intervals, after incidents of earlier starts: `choosing.py OUT`.

Leaves what the keepers have chosen, as `holdfast status` has it, in OUT/chosen.json.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

import holdfast
from holdfast.elastic.incidents import Incident, write_incident
from holdfast.elastic.journal import DONE, Begin, Recorder
from holdfast.snapshot.cluster import status

FAILURES = 20
out = Path(sys.argv[1])


def record_failures(records: Path) -> None:
    """An hour of one rank, with one incident in every three minutes."""
    began_s = time.time() - 3600
    Recorder(records, Begin(1, 0, 1, step=0, time_s=began_s, born_s=began_s, entered_s=began_s)).end(0, DONE)
    for attempt in range(FAILURES):
        known = {"rung": "own keeper", "reached_step": 5, "restored_step": 5, "silent": (0,), "said": {}, "phases": {}}
        write_incident(records, Incident("b", attempt, began_s, "trainer", world_before=1, world_after=1, **known))


record_failures(out / "records")
torch.manual_seed(1)
model = torch.nn.Linear(6, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
with holdfast.protect({"model": model, "optim": optimizer}, name="b", checkpoints=str(out)) as run:
    chosen = None
    for step in run.steps(until=5000):
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(0.01)
        chosen = status("b")[0].intervals if step % 20 == 0 else None
        if chosen is not None:
            break
    assert chosen is not None, "nothing was chosen in 5000 steps"
    (out / "chosen.json").write_text(json.dumps(asdict(chosen)))
