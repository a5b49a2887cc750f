"""Saved activations in few bits: forward stays exact, backward reads packed copies.

A saved-tensor hook sees a tensor and nothing else. Two companions tell it the rest: module hooks say where the model is, a
TorchFunctionMode says which operation is saving. From there one chain of questions decides, and every question that ends in
"keep" is a way in which the naive hook goes wrong without an error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, cast
from weakref import WeakValueDictionary, finalize, ref

import torch

from holdfast.errors import ConfigError
from holdfast.kernels._torch_private import checkpoint_is_saving, storage_key, without_torch_function
from holdfast.kernels.activations.host import HostPacked, HostTier, Raw
from holdfast.kernels.activations.images import Dims, Images, Part, region_of
from holdfast.kernels.activations.policy import KEEP, OFFLOAD, Action, ActPolicy, parse_bytes
from holdfast.kernels.activations.provenance import model_storages
from holdfast.kernels.activations.stats import Report, Stats
from holdfast.kernels.activations.where import Saved, Where, WhereMode
from holdfast.kernels.quant import (
    INT8,
    MASK1,
    Backend,
    Packed,
    QuantSpec,
    RunningRange,
    RunningSpec,
    dequantize,
    dequantize_running,
    quantize,
)

_BY_HEAD = ("matmul", "bmm", "softmax", "scaled_dot_product_attention")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def compress_activations(
    model: torch.nn.Module,
    policy: ActPolicy | None = None,
    *,
    offload: Literal["cpu"] | None = None,
    sample: float = 0.0,
    max_error: float | None = None,
    seed: int = 0,
    backend: Backend = "auto",
    check_inplace: bool = True,
) -> Compressor:
    """A reusable context manager: what autograd saves inside it is stored by `policy` until backward asks for it.

        compressor = compress_activations(model)
        for batch in data:
            with compressor:
                loss = model(batch)
            loss.backward()
        print(compressor.report())

    Outputs and losses are bit-identical to those without it; gradients differ by the quantization of what they read. Only
    tensors that require a gradient are packed: what does not is a statistic (logsumexp, mean, rstd), a constant, a frozen
    weight or the input. Weights, losses, output heads, tensors of other types than torch.Tensor and those with overlapping
    elements stay exact; bool masks take one bit and stay exact too.

    `offload="cpu"` keeps the packed bytes in pinned host memory. `sample` is the fraction of tensors whose stored error is
    measured, and of operations whose gradient error is: those run twice more in backward, so 0.01 costs a few percent. With
    `max_error`, a module whose stored tensors brought about a larger mean gradient error moves from int4 to int8 and from int8
    to exact in the next forward. `check_inplace` raises where autograd would have: a tensor changed in place after it was saved.

    Inside torch.utils.checkpoint the context stands aside (its hooks would disarm the checkpoint); around a checkpoint it packs
    the boundary. Under torch.compile use `compile_hooks`. After Mesa (arXiv:2111.11124), ActNN (2104.14129), GACT (2206.11357).
    """
    return Compressor(
        model,
        policy or ActPolicy(),
        offload=offload,
        sample=sample,
        max_error=max_error,
        seed=seed,
        backend=backend,
        check_inplace=check_inplace,
    )


def wrap_activations(model: torch.nn.Module, policy: ActPolicy | None = None, **settings: Any) -> Compressor:
    """Every later call of `model` saves by `policy`, without a `with`; returns the compressor, whose `unwrap()` undoes it."""
    compressor = compress_activations(model, policy, **settings)
    compressor.wrap()
    return compressor


class Compressor:
    """See `compress_activations`. Not for two threads at once; backward may run in any thread."""

    def __init__(
        self,
        model: torch.nn.Module,
        policy: ActPolicy,
        *,
        offload: Literal["cpu"] | None,
        sample: float,
        max_error: float | None,
        seed: int,
        backend: Backend,
        check_inplace: bool,
    ) -> None:
        if offload not in (None, "cpu"):
            raise ConfigError(f'offload must be "cpu" or None; got {offload!r}')
        if not 0.0 <= sample <= 1.0:
            raise ConfigError(f"sample is a fraction between 0 and 1; got {sample}")
        if max_error is not None and not sample:
            raise ConfigError("max_error needs sample > 0: without samples there is no error to compare with")
        self.model, self.policy, self.seed, self.backend = model, policy, seed, backend
        self.stats = Stats()
        self.backed_off: dict[str, int] = {}
        self.skipped_in_checkpoint = 0
        self._check_inplace, self._sample, self._max_error = check_inplace, sample, max_error
        self._min_bytes = parse_bytes(policy.min_bytes)
        self._offloads, self._host = offload == "cpu", HostTier()
        self._names = {id(module): name for name, module in model.named_modules()}
        self._actions: dict[tuple[str, str], Action] = {}
        self._blamed: dict[str, list[torch.Tensor]] = {}
        self._running: dict[tuple[str, str, int], RunningRange] = {}
        self._stream = 0
        self._lock = threading.RLock()
        self._images, self._kept = Images(), WeakValueDictionary[Any, _Kept]()
        self._where = Where(self)
        self._entered: list[_Scope | None] = []
        self._wrapping: list[Any] = []

    # -- the context ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if checkpoint_is_saving():
            self.skipped_in_checkpoint += 1
            self._entered.append(None)
            return self
        if not any(self._entered):
            self._begin_forward()
        scope = _Scope(self)
        scope.enter()
        self._entered.append(scope)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        scope = self._entered.pop()
        if scope is not None:
            scope.exit()

    def wrap(self) -> None:
        """Enters this context around every call of the model."""
        self._where.watch(self.model)  # once, for good: hooks cannot be removed while a failing forward runs through them
        before = self.model.register_forward_pre_hook(lambda *_: self.__enter__() and None, prepend=True)
        after = self.model.register_forward_hook(lambda *_: self.__exit__(None, None, None), always_call=True)
        self._wrapping += [before, after]

    def unwrap(self) -> None:
        """Undoes `wrap`."""
        while self._wrapping:
            self._wrapping.pop().remove()
        self._where.unwatch()

    def report(self) -> Report:
        """Bytes before and after since the last `stats.reset()`, by module and operation."""
        return self.stats.report()

    def _begin_forward(self) -> None:
        self._where.weights = model_storages([*self.model.parameters(), *self.model.buffers()])
        embeddings = [m.weight for m in self.model.modules() if isinstance(m, torch.nn.Embedding)]
        self._where.embeddings = model_storages(embeddings)
        if self._max_error is not None:
            self._back_off(self._max_error)

    def _back_off(self, limit: float) -> None:
        for module, errors in self._blamed.items():
            if float(torch.stack(errors).mean()) > limit:
                self.backed_off[module] = self.backed_off.get(module, 0) + 1
                self._actions = {key: action for key, action in self._actions.items() if key[0] != module}
        self._blamed.clear()

    def is_sampled(self, number: int) -> bool:
        return bool(self._sample) and (number * 0x9E3779B1 & 0xFFFFFFFF) < self._sample * 2**32

    def sampled_gradient(self, module: str, op: str, blamed: set[str], error: torch.Tensor) -> None:
        """Takes one measurement of an operation, to be shown with it, and held against the modules that stored what it read."""
        with self._lock:
            self.stats.tally(module, op).gradient_errors.append(error)
            for storer in blamed:
                self._blamed.setdefault(storer, []).append(error)

    # -- forward: one saved tensor ---------------------------------------------------------------------------------------

    def pack(self, t: torch.Tensor) -> Saved:
        """What autograd holds instead of `t`. Never holds `t` itself unless it is a leaf: that would be a cycle."""
        with without_torch_function(), torch.no_grad(), self._lock:
            saved = self._pack(t)
            if self._where.saved is not None:
                self._where.saved.append(saved)
            return saved

    def _pack(self, t: torch.Tensor) -> Saved:
        module, op = self._where.module, self._where.op
        if type(t) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) or t.layout != torch.strided:
            return _Kept(self, t, None)
        if self._where.is_weight(t):
            self.stats.weights += 1
            return _Kept(self, t, None)
        region = region_of(t)
        key = (storage_key(t.untyped_storage()), t._version, t.storage_offset(), region, t.dtype)
        kept = self._kept.get(key)
        if kept is not None:
            self.stats.aliases += 1
            return _Kept(self, t, kept)
        action = self._decide(t, region, module, op)
        if action == KEEP or region is None:
            kept = _Kept(self, t, None)
            if t.numel():
                self._count(kept, module, op, 0 if op == "compressed_sdpa" else t.nbytes, t.nbytes)
                self._kept[key] = kept
            return kept
        return self._store(t, region, action, module, op)

    def _decide(self, t: torch.Tensor, region: Dims | None, module: str, op: str) -> Action:
        if region is None or t.numel() == 0 or t.nbytes < self._min_bytes:
            return KEEP
        if t.dtype == torch.bool:
            return MASK1
        if t.dtype not in _FLOATS:
            return KEEP  # indices, random states
        if not t.requires_grad:
            return MASK1 if op == "dropout" and not self._where.is_argument(t) else KEEP
        if t.shape[-1:] == (1,):
            return KEEP  # a reduction: small, and everything depends on it
        action = self._actions.get((module, op))
        if action is None:
            action = _relaxed(self.policy.action(module, op), self.backed_off.get(module, 0))
            self._actions[module, op] = action
        return action

    def _store(self, t: torch.Tensor, region: Dims, action: Action, module: str, op: str) -> _Packed:
        image = self._images.of(t)
        part = image.find(int(t.storage_offset()), region)
        if part is not None:
            self.stats.aliases += 1
            return _Packed(self, part, t)
        sizes, strides = zip(*region, strict=True)
        dense = t.detach().as_strided(sizes, strides, t.storage_offset()).contiguous()
        payload, restore = self._pack_dense(t, dense, action, module, op)
        part = image.add(int(t.storage_offset()), region, restore, module)
        tally = self._count(part, module, op, dense.nbytes, payload)
        self._stream += 1
        if dense.is_floating_point() and self.is_sampled(self._stream):
            exact = dense.float()
            tally.errors.append((restore().view(sizes).float() - exact).norm() / exact.norm().clamp(min=1e-30))
        return _Packed(self, part, t)

    def _pack_dense(
        self, t: torch.Tensor, dense: torch.Tensor, action: Action, module: str, op: str
    ) -> tuple[int, Callable[[], torch.Tensor]]:
        """Bytes stored, and a function that returns the elements of `dense` as a new 1-D tensor."""
        stream = self._stream & 0xFFFFFFFF
        if isinstance(action, RunningSpec):
            kind = (module, op, self._where.next_slot())
            width = _head_width(t, dense, action.heads, op)
            running = self._running.setdefault(kind, RunningRange(_fitting(action, width)))
            if dense.numel() % width == 0:
                running_packed = running.quantize(dense.view(-1, width), seed=self.seed, stream=stream)
                return running_packed.nbytes, lambda: dequantize_running(running_packed).view(-1)
            action = INT8  # heads lie elsewhere in memory
        if action == OFFLOAD:
            raw = self._put(Raw(dense.view(-1)))
            return raw.nbytes, partial(self._from_host, raw, dense._version)
        assert isinstance(action, QuantSpec)
        if action.axis is not None:
            raise ConfigError(f"activations are packed in memory order: use a spec without axis; got {action}")
        packed = quantize(dense.view(-1), action, seed=self.seed, stream=stream, backend=self.backend)
        if not self._offloads:
            return packed.nbytes, lambda: dequantize(packed, backend=self.backend)
        item = self._put(packed)
        return item.nbytes, lambda: dequantize(cast("Packed", self._host.fetch(item)), backend=self.backend)

    def _from_host(self, item: HostPacked, version: int) -> torch.Tensor:
        values = cast("Raw", self._host.fetch(item)).values
        is_original = item.home.type != "cuda"  # it lay in host memory already
        if self._check_inplace and is_original and values._version != version:
            raise _changed_in_place(values, version)
        return values.clone()

    def _put(self, value: Packed | Raw) -> HostPacked:
        self.stats.on_host += value.nbytes
        return self._host.put(value)

    def _count(self, holder: Any, module: str, op: str, before: int, after: int) -> Any:
        finalize(holder, self.stats.released, after)
        return self.stats.stored(module, op, before, after)

    # -- backward: one saved tensor ----------------------------------------------------------------------------------------

    def unpack(self, saved: Saved) -> torch.Tensor:
        with without_torch_function(), torch.no_grad():
            return saved.tensor()


class _Kept(Saved):
    """The tensor itself, detached so that the graph does not hold itself alive; with autograd's own check of versions."""

    __slots__ = ("__weakref__", "_owner", "_same_as", "_tensor", "_version", "stored_by")

    def __init__(self, owner: Compressor, t: torch.Tensor, same_as: _Kept | None) -> None:
        self._tensor, self.stored_by = t if t.is_leaf else t.detach(), None
        self._same_as = same_as  # holds the first keeper of this memory alive, so that it is counted once
        self._owner, self._version = owner, t._version

    def tensor(self) -> torch.Tensor:
        if self._owner._check_inplace and self._tensor._version != self._version:
            raise _changed_in_place(self._tensor, self._version)
        return self._tensor


class _Packed(Saved):
    """A view into a packed part."""

    __slots__ = ("_offset", "_original", "_owner", "_part", "_shape", "_strides", "_version", "stored_by")

    def __init__(self, owner: Compressor, part: Part, t: torch.Tensor) -> None:
        self._owner, self._part, self.stored_by = owner, part, part.module
        self._shape, self._strides, self._offset = tuple(t.shape), t.stride(), int(t.storage_offset())
        self._original, self._version = ref(t), t._version

    def tensor(self) -> torch.Tensor:
        original = self._original()
        if self._owner._check_inplace and original is not None and original._version != self._version:
            raise _changed_in_place(original, self._version)
        with self._owner._lock:
            return self._part.image.view(self._part, self._offset, self._shape, self._strides)


def _changed_in_place(t: torch.Tensor, version: int) -> RuntimeError:
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"{t.dtype} {list(t.shape)} is at version {t._version}; expected version {version} instead. "
        "It was saved packed; check_inplace=False would use the value it had when it was saved."
    )


def _relaxed(action: Action, levels: int) -> Action:
    for _ in range(levels):
        action = INT8 if isinstance(action, QuantSpec) and action.bits < 8 else KEEP
    return action


def _head_width(t: torch.Tensor, dense: torch.Tensor, heads: int, op: str) -> int:
    """Elements after which memory starts again with the first head: those of a token, or all heads of a matrix product."""
    if op in _BY_HEAD and t.ndim >= 3 and (t.is_contiguous() or t.transpose(-1, -2).is_contiguous()):
        return heads * t.shape[-2] * t.shape[-1]  # (…, heads, rows, columns), or (batch * heads, rows, columns)
    return t.shape[-1] if t.is_contiguous() else dense.shape[-1]


def _fitting(spec: RunningSpec, width: int) -> RunningSpec:
    return spec if width % spec.heads == 0 else replace(spec, heads=1)


class _Scope:
    """Everything that is installed while the context is open, taken down in reverse."""

    def __init__(self, owner: Compressor) -> None:
        self._owner, self._where = owner, owner._where
        self._hooks = torch.autograd.graph.saved_tensors_hooks(owner.pack, owner.unpack)
        self._mode = WhereMode(owner._where)
        self._watches = False

    def enter(self) -> None:
        if not self._where.is_watching:
            self._where.watch(self._owner.model)
            self._watches = True
        self._mode.__enter__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._hooks.__enter__()

    def exit(self) -> None:
        self._hooks.__exit__()
        self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if self._watches:
            self._where.unwatch()
        self._where.modules.clear()
