"""A run whose parameters turn NaN after step 8: `poisoned.py OUT POLICY [--spoil]`. Dies at step 30 if nobody stops it before."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

import holdfast

out, policy, spoil = Path(sys.argv[1]), sys.argv[2], "--spoil" in sys.argv
torch.manual_seed(1)
model = torch.nn.Linear(6, 3)
model.register_parameter("mask", torch.nn.Parameter(torch.full((3,), float("-inf")), requires_grad=False))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
with holdfast.protect({"model": model, "optim": optimizer}, name="t", on_nan=policy) as run:
    restored = run.step
    for step in run.steps(until=30):
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if spoil and step == 8:
            while run.committed_step < 3:
                time.sleep(0.01)
        if spoil and step > 8:
            with torch.no_grad():
                model.weight[0, 0] = float("nan")
        if spoil and step == 30:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
(out / "facts.json").write_text(json.dumps({"restored": restored, "finite": bool(torch.isfinite(model.weight).all())}))
