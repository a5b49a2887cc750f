"""Which saved tensor is stored how: rules by module name and operation, with safe answers where no rule speaks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from holdfast.errors import ConfigError
from holdfast.kernels.quant import INT4, INT8, QuantSpec, RunningSpec

Action = QuantSpec | RunningSpec | Literal["keep", "offload"]

KEEP: Literal["keep"] = "keep"
OFFLOAD: Literal["offload"] = "offload"  # exact, in host memory
HEADS = "*lm_head|lm_head|*.head|head|*unembed*|*output_projection|classifier"
LOSSES = "*_loss|*cross_entropy*|log_softmax|logsumexp|kl_div"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """`action` for tensors saved inside modules matching `module` by operations matching `op`; shell patterns, `|` for or."""

    module: str = "*"
    op: str = "*"
    action: Action

    def matches(self, module: str, op: str) -> bool:
        return _matches(self.module, module) and _matches(self.op, op)


@dataclass(frozen=True, kw_only=True, slots=True)
class ActPolicy:
    """The first rule that matches decides; then the built-in rules; then `default`.

    Built in: what a loss saves and what enters the output head stay exact (at int8 they alone caused four fifths of the
    gradient error of a small GPT). `scaled_dot_product_attention` is replaced by `compressed_sdpa`, which stores q, k, v by
    `attention` and rebuilds logsumexp and out from what it stored: backward then runs one more attention forward, and the
    gradient error of a small trained GPT falls by a third (benchmarks/results/kernels.json), more where logits are larger. A
    rule that matches attention decides its bits, or keeps it exact. With `attention=None` the rules and `default` decide about
    q, k, v and out too, never below 8 bits: beside an exact logsumexp, backward's row sums grow exponentially with the error of
    the logits.

    Tensors below `min_bytes` stay exact.
    """

    rules: tuple[Rule, ...] = ()
    default: Action = INT8
    attention: QuantSpec | None = INT8
    min_bytes: int | str = "16KiB"
    keep_heads: bool = True
    keep_losses: bool = True

    def __post_init__(self) -> None:
        parse_bytes(self.min_bytes)

    def action(self, module: str, op: str) -> Action:
        """What to do with a tensor that `op` saves inside the module of that dotted name (empty: outside of all)."""
        for rule in self.rules:
            if rule.matches(module, op):
                return _safe_for_attention(rule.action, op)
        is_head = op == "output_head" or _matches(HEADS, module)
        if (self.keep_losses and is_loss(op)) or (self.keep_heads and is_head):
            return KEEP
        return _safe_for_attention(self.default, op)

    def guards(self) -> tuple[Rule, ...]:
        """The built-in rules as rules, to stand before others that would match losses and heads too."""
        heads = (Rule(module=HEADS, action=KEEP), Rule(op="output_head", action=KEEP)) if self.keep_heads else ()
        return (Rule(op=LOSSES, action=KEEP), *heads) if self.keep_losses else heads

    def rebuilt_attention(self, module: str) -> QuantSpec | None:
        """How `compressed_sdpa` stores q, k and v in that module; None where attention stays torch's own."""
        if self.attention is None:
            return None
        for rule in self.rules:
            if rule.matches(module, "scaled_dot_product_attention"):
                return rule.action if isinstance(rule.action, QuantSpec) else None
        return self.attention if isinstance(self.default, QuantSpec) else None


def mixed_policy(*, attention: QuantSpec = INT8, rest: QuantSpec = INT4) -> ActPolicy:
    """int4 for norms, linear layers and activations, int8 for attention, whether by SDPA or by an explicit softmax."""
    return ActPolicy(rules=(Rule(op="*attention*|*attn*|softmax", action=attention),), default=rest, attention=attention)


def is_attention(op: str) -> bool:
    return "scaled_dot_product" in op or "attention" in op or "flash_attn" in op


def is_loss(op: str) -> bool:
    return _matches(LOSSES, op)


def parse_bytes(size: int | str) -> int:
    """Bytes from a number or from text like "256KiB". Raises ConfigError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f'a size is a number of bytes or text like "256KiB" or "24GiB"; got {size!r}')
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _safe_for_attention(action: Action, op: str) -> Action:
    if isinstance(action, QuantSpec) and action.bits < 8 and is_attention(op):
        return INT8
    return action


def _matches(patterns: str, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns.split("|"))
