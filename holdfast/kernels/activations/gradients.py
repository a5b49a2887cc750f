"""How far compressed gradients are from exact ones, measured by running both."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class GradientError:
    """`total` is ‖g - ĝ‖ / ‖g‖ over all parameters together, `by_parameter` the same for each, `loss_is_equal` whether both
    forwards ended in the same bits."""

    total: float
    by_parameter: dict[str, float]
    loss_is_equal: bool

    @property
    def worst(self) -> float:
        return max(self.by_parameter.values(), default=0.0)


def gradient_error(
    model: torch.nn.Module, loss_of: Callable[[], torch.Tensor], context: AbstractContextManager[object]
) -> GradientError:
    """The error of one step under `context` (a compressor, say) against the same step without it, same random numbers.

    `loss_of` runs one forward pass and returns the loss. Costs two steps and a second set of gradients; `.grad` of every
    parameter is put back as it was.
    """
    held = {name: p.grad for name, p in model.named_parameters()}
    exact_loss, exact = _gradients(model, loss_of)
    with context:
        model.zero_grad(set_to_none=True)
        with _same_random_numbers():
            loss = loss_of()
    loss.backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    squared = {name: (g.float() - found[name].float()).square().sum() for name, g in exact.items()}
    norms = {name: g.float().square().sum() for name, g in exact.items()}
    for name, p in model.named_parameters():
        p.grad = held[name]
    by_parameter = {n: float((squared[n] / norms[n].clamp(min=1e-30)).sqrt()) for n in exact}
    total = float((torch.stack(list(squared.values())).sum() / torch.stack(list(norms.values())).sum()).sqrt())
    return GradientError(total, by_parameter, bool(torch.equal(exact_loss, loss.detach())))


def _gradients(model: torch.nn.Module, loss_of: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    with _same_random_numbers():
        loss = loss_of()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _same_random_numbers() -> AbstractContextManager[None]:
    """Leaves the generators as they are now, so that a second pass draws what the first one drew."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))
