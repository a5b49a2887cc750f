"""The gradient error of single operations, measured during training at the gradients that training really sends them.

An operation drawn for a sample keeps its arguments. When its gradient arrives, it runs twice more: once saving exactly, once
reading back what was stored for the step itself. The difference is what compression did to this operation's gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from holdfast.kernels._torch_private import without_torch_function
from holdfast.kernels.attention import random_state, replayed

Operation = Callable[..., Any]


class GradientProbe:
    """One call of an operation, from before it runs until its gradient comes."""

    def __init__(self, exact: Operation, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._exact, self._args, self._kwargs = exact, _detached(args), _detached(dict(kwargs))
        self._inputs = list(_tensors((args, dict(kwargs))))
        self._versions = [t._version for t in self._inputs]
        self._device = self._inputs[0].device if self._inputs else torch.device("cpu")
        self._random_state = random_state(self._device)
        kind = self._device.type
        self._autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def attach(
        self, out: Any, found: Operation, unpack: Sequence[Callable[[], torch.Tensor]], tell: Callable[..., None]
    ) -> None:
        """Measures when the gradient of `out` arrives and calls `tell(error)` with a scalar tensor: ‖g - ĝ‖ / ‖g‖ over those of
        the operation's gradients that differ at all. `found` is the operation as it ran, `unpack` what it saved, in order.

        Operations that write to their arguments cannot run again and are left out.
        """
        if type(out) is not torch.Tensor or not out.requires_grad or not self._is_unchanged():
            return
        self._inputs = [t.detach() for t in self._inputs]  # same versions, but not the graph behind them

        def measure(gradient: torch.Tensor) -> None:
            if self._is_unchanged():
                tell(self._error(gradient, found, unpack))

        out.register_hook(measure)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def _is_unchanged(self) -> bool:
        return [t._version for t in self._inputs] == self._versions

    def _error(self, gradient: torch.Tensor, found: Operation, unpack: Sequence[Callable[[], torch.Tensor]]) -> torch.Tensor:
        exact_grads = self._gradients(self._exact, gradient, torch.autograd.graph.saved_tensors_hooks(_same, _same))
        numbers = iter(range(len(unpack)))
        stored = torch.autograd.graph.saved_tensors_hooks(lambda _: next(numbers), lambda number: unpack[number]())
        pairs = zip(exact_grads, self._gradients(found, gradient, stored), strict=True)
        off, size = torch.zeros((), device=self._device), torch.zeros((), device=self._device)
        for a, b in pairs:
            differs = (a != b).any()
            off += (a.float() - b.float()).square().sum()
            size += torch.where(differs, a.float().square().sum(), 0.0)
        return (off / size.clamp(min=1e-30)).sqrt()

    def _gradients(
        self, operation: Operation, gradient: torch.Tensor, hooks: AbstractContextManager[Any]
    ) -> tuple[torch.Tensor, ...]:
        args, kwargs = _leaves((self._args, self._kwargs))
        enabled, dtype = self._autocast
        with (
            without_torch_function(),
            torch.enable_grad(),
            torch.autocast(self._device.type, dtype, enabled=enabled, cache_enabled=False),
            replayed(self._random_state, self._device),
        ):
            with hooks:
                out = operation(*args, **kwargs)
            wanted = [t for t in _tensors((args, kwargs)) if t.requires_grad]
            return torch.autograd.grad(out, wanted, gradient, materialize_grads=True)


def _same(t: torch.Tensor) -> torch.Tensor:
    return t


class _Detached:
    """A tensor without its history, and whether it wants a gradient."""

    def __init__(self, t: torch.Tensor) -> None:
        self.tensor, self.wants = t.detach(), t.requires_grad

    def leaf(self) -> torch.Tensor:
        return self.tensor.detach().requires_grad_(self.wants)


def _detached(value: Any) -> Any:
    return _mapped(value, torch.Tensor, _Detached)


def _leaves(value: Any) -> Any:
    return _mapped(value, _Detached, _Detached.leaf)


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(_mapped(v, kind, change) for v in value)
    return {k: _mapped(v, kind, change) for k, v in value.items()} if type(value) is dict else value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _tensors(v)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
