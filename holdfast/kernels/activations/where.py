"""Where a forward pass is: in which module, in which operation, and whose memory the arguments are.

Module hooks say the first, a TorchFunctionMode the rest. What an operation is replaced by, and whether it is measured, is
decided here too, because nobody else sees it whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from holdfast.kernels._torch_private import checkpoint_is_saving, storage_key
from holdfast.kernels.activations.probe import GradientProbe
from holdfast.kernels.activations.provenance import is_weight
from holdfast.kernels.attention import compressed_sdpa

if TYPE_CHECKING:
    from holdfast.kernels.activations.compressor import Compressor

_WEIGHT_OPS = ("linear", "output_head", "conv1d", "conv2d", "conv3d", "embedding", "bilinear", "layer_norm", "rms_norm")


class Saved:
    """What autograd holds in place of a tensor."""

    __slots__ = ()
    stored_by: str | None  # the module whose forward packed it; None where it is exact

    def tensor(self) -> torch.Tensor:
        raise NotImplementedError


class Where:
    """Where the forward pass is: the innermost module, the running operation, and whose memory its arguments are."""

    def __init__(self, owner: Compressor) -> None:
        self._owner = owner
        self.modules: list[str] = []
        self.op = ""
        self.weights: set[int] = set()
        self.embeddings: set[int] = set()
        self._arguments: tuple[Any, ...] = ()
        self._keywords: Mapping[str, Any] = {}
        self.saved: list[Saved] | None = None  # by the running operation, if a probe wants to know
        self._calls = 0
        self._slots: dict[tuple[str, str], int] = {}
        self._hooks: list[Any] = []

    def watch(self, model: torch.nn.Module) -> None:
        for module in model.modules():
            self._hooks.append(module.register_forward_pre_hook(self.enter_module, prepend=True))
            self._hooks.append(module.register_forward_hook(self.leave_module, always_call=True))

    def unwatch(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    @property
    def is_watching(self) -> bool:
        return bool(self._hooks)

    @property
    def module(self) -> str:
        return self.modules[-1] if self.modules else ""

    def next_slot(self) -> int:
        """The how-manyth tensor of this module and operation in this forward."""
        place = (self.module, self.op)
        self._slots[place] = self._slots.get(place, -1) + 1
        return self._slots[place]

    def enter_module(self, module: torch.nn.Module, _: Any) -> None:
        self.modules.append(self._owner._names[id(module)])
        self._slots = {place: n for place, n in self._slots.items() if place[0] != self.modules[-1]}

    def leave_module(self, module: torch.nn.Module, _: Any, __: Any) -> None:
        if self.modules:
            self.modules.pop()

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        outer = self.op, self._arguments, self._keywords, self.saved
        self.op, self.saved = getattr(func, "__name__", ""), None
        self._arguments, self._keywords = args, kwargs
        self._calls += 1
        if self.op == "linear" and _storage_in(self._weight_argument(), self.embeddings):
            self.op = "output_head"  # logits from the embedding's own weight, often without a module of their own
        try:
            return self._run(func, args, kwargs)
        finally:
            self.op, self._arguments, self._keywords, self.saved = outer

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        probe = None
        if self._is_probed(func):
            probe, self.saved = GradientProbe(func, args, kwargs), []
        ran = self._as_it_runs(func)
        out = ran(*args, **kwargs)
        if ran is not func:
            self._count_rebuilt(out, args, kwargs)
        if probe is not None:
            self._attach(probe, self.saved or [], ran, out, {self.module} if ran is not func else set())
        return out

    def _as_it_runs(self, func: Callable[..., Any]) -> Callable[..., Any]:
        # Not in a checkpointed region: its recomputation runs outside of this mode and has to save the same tensors.
        if self.op != "scaled_dot_product_attention" or checkpoint_is_saving() or self.module in self._owner.backed_off:
            return func
        spec = self._owner.policy.rebuilt_attention(self.module)
        if spec is None:
            return func
        self.op = "compressed_sdpa"
        return partial(compressed_sdpa, spec=spec, backend=self._owner.backend)

    def _is_probed(self, func: Callable[..., Any]) -> bool:
        is_torchs_own = (getattr(func, "__module__", None) or "torch").startswith("torch")  # others may have side effects
        return self._owner.is_sampled(self._calls) and is_torchs_own and not checkpoint_is_saving()

    def _attach(self, probe: GradientProbe, saved: list[Saved], ran: Callable[..., Any], out: Any, blamed: set[str]) -> None:
        blamed = blamed | {one.stored_by for one in saved if one.stored_by is not None}
        if blamed:
            tell = partial(self._owner.sampled_gradient, self.module, self.op, blamed)
            probe.attach(out, ran, [partial(self._owner.unpack, one) for one in saved], tell)

    def _count_rebuilt(self, out: torch.Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if out.requires_grad:
            # What SDPA would have saved; its out is counted where the next layer saves it, the codes where they are kept.
            inputs = [args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("query", "key", "value"))]
            logsumexp = 4 * out.numel() // max(out.shape[-1], 1)
            self._owner.stats.replaced(self.module, self.op, logsumexp + sum(t.nbytes for t in inputs))

    def is_weight(self, t: torch.Tensor) -> bool:
        if is_weight(t, self.weights):
            return True
        return self.op in _WEIGHT_OPS and _shares_storage(t, self._weight_argument())

    def _weight_argument(self) -> Any:
        return self._keywords.get("weight", self._arguments[1] if len(self._arguments) > 1 else None)

    def is_argument(self, t: torch.Tensor) -> bool:
        return any(_shares_storage(t, a) for a in (*self._arguments, *self._keywords.values()))


def _shares_storage(t: torch.Tensor, other: Any) -> bool:
    return _storage_in(other, {storage_key(t.untyped_storage())})


def _storage_in(t: Any, storages: set[int]) -> bool:
    return type(t) in (torch.Tensor, torch.nn.Parameter) and storage_key(t.untyped_storage()) in storages


class WhereMode(TorchFunctionMode):
    def __init__(self, where: Where) -> None:
        super().__init__()
        self._where = where

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self._where.run(func, args, kwargs or {})
