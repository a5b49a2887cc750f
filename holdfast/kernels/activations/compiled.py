"""The same under torch.compile: hooks that AOTAutograd inlines into the compiled forward and backward.

Plain Python hooks around a compiled model unpack everything at the start of backward, which saves nothing. A pair of FX
GraphModules is traced into the graphs instead, so packing fuses with what produced the tensor.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch

from holdfast.errors import ConfigError
from holdfast.kernels._torch_private import compiled_saved_node
from holdfast.kernels.activations.images import region_of
from holdfast.kernels.activations.policy import ActPolicy, is_attention, parse_bytes
from holdfast.kernels.quant import INT8, Packed, QuantSpec
from holdfast.kernels.quant.reference import dequantize, quantize

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def compile_hooks(policy: ActPolicy | None = None) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    """Pack and unpack hooks for compiled code:

        with torch.autograd.graph.saved_tensors_hooks(*compile_hooks()):
            loss = compiled_model(x)

    The context must surround the first call, when the graph is made. Only intermediates of the graph are packed (torch's
    filter mode "donated"), so weights and inputs stay out. A compiled graph has no module names: of the policy, `default` and
    `min_bytes` are used, rules are not (ConfigError), and attention is not rebuilt. Attention statistics, reductions and small
    tensors stay exact, attention's tensors take 8 bits at least, and the head's input cannot be told from any other.
    """
    policy = policy or ActPolicy()
    if policy.rules:
        raise ConfigError("compiled graphs have no module names: give compile_hooks a policy without rules")
    if not isinstance(policy.default, QuantSpec) or policy.default.axis is not None:
        raise ConfigError(f"compile_hooks needs a QuantSpec without axis as default; got {policy.default}")
    if policy.default.rounding != "nearest":
        raise ConfigError("compiled hooks cannot carry a step counter: use rounding='nearest'")
    hooks = _CompiledHooks(policy.default, parse_bytes(policy.min_bytes))
    return _as_graph(hooks.pack), _as_graph(hooks.unpack)


class _CompiledHooks:
    """Pack returns the tensor as it is, or (dtype, shape, memory order, codes, scales[, minima]); unpack gets just that."""

    def __init__(self, spec: QuantSpec, min_bytes: int) -> None:
        self._spec, self._min_bytes = spec, min_bytes

    def pack(self, x: torch.Tensor) -> Any:
        spec = self._spec_for(x)
        if spec is None:
            return x
        order = _memory_order(x)
        packed = quantize(x.permute(order).reshape(-1), spec)
        return (x.dtype, tuple(x.shape), tuple(order), *packed.parts)

    def unpack(self, saved: Any) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        dtype, shape, order, codes, scales, *minima = saved
        n_codes = -(-math.prod(shape) // 64) * 64 if self._spec.bits < 8 else 0
        spec = INT8 if codes.numel() == n_codes else self._spec  # INT8: attention's own
        flat = dequantize(Packed(spec, (math.prod(shape),), dtype, codes, scales, *minima))
        back = sorted(range(len(order)), key=lambda d: order[d])
        return flat.view([shape[d] for d in order]).permute(back)

    def _spec_for(self, x: torch.Tensor) -> QuantSpec | None:
        node = compiled_saved_node()
        op = "" if node is None else _origin(node)
        region = region_of(x)
        if region is None or len(region) != 1 or region[0][1] != 1 or x.dtype not in _FLOATS:
            return None
        if x.nbytes < self._min_bytes or x.shape[-1] == 1 or _is_statistic(node, op) or "log_softmax" in op:
            return None
        return INT8 if self._spec.bits < 8 and is_attention(op) else self._spec


def _origin(node: torch.fx.Node) -> str:
    """The operation that made a value, through the getitem that picks one of several outputs."""
    if node.op == "call_function" and node.target is operator.getitem:
        return str(node.args[0].target)  # type: ignore[union-attr]  # getitem of a node
    return str(node.target)


def _is_statistic(node: torch.fx.Node | None, op: str) -> bool:
    """Attention's logsumexp and random state, a norm's mean and rstd: every output but the first."""
    if node is None or node.target is not operator.getitem:
        return False
    return bool(node.args[1] != 0) and (is_attention(op) or "norm" in op)


def _memory_order(x: torch.Tensor) -> list[int]:
    strides = x.stride()
    return sorted(range(x.ndim), key=lambda d: -strides[d])


def _as_graph(function: Any) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    graph.output(graph.call_function(function, (graph.placeholder("x"),)))
    return torch.fx.GraphModule(torch.nn.Module(), graph)
