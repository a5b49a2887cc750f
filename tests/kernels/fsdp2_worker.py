"""One rank of the FSDP2 test: gradients under compression against exact ones, and unsharded weights that are let go."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from holdfast.kernels import ActPolicy, compress_activations


def build(mixed: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(128, 128), nn.GELU()) for _ in range(3)))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if mixed else None)
    for layer in model:
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def gradients(model: nn.Module, x: torch.Tensor, compressor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[no-untyped-def]
    x = x.clone().requires_grad_()
    if compressor is None:
        loss = model(x).float().square().mean()
    else:
        with compressor:
            loss = model(x).float().square().mean()
        assert isinstance(model[0], FSDPModule)
    loss.backward()
    found = torch.cat([p.grad.to_local().reshape(-1).float() for p in model.parameters()])
    model.zero_grad()
    return found, x.grad


def main() -> None:
    dist.init_process_group("gloo")
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(dist.get_rank()))
    for mixed in (False, True):
        model = build(mixed)
        exact, _ = gradients(model, x, None)
        compressor = compress_activations(model, ActPolicy(min_bytes=4096))
        found, _ = gradients(model, x, compressor)
        error = float((exact - found).norm() / exact.norm())
        report = compressor.report()
        assert 0 < error < 0.02, error
        assert report.weights >= 3, report.weights
        # 64 × 128 activations only: no 128 × 128 weight was counted or packed.
        largest = max(row.bytes_before / row.tensors for row in report.rows)
        assert largest <= 64 * 128 * 4, report
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
