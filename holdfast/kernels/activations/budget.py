"""A policy that fits a byte budget: measured on the model, then solved.

Every operation of the model is one group with three or more ways to be stored. What each way saves and what it does to the
gradient is measured by one step with only this group stored so. Squared errors of independent groups add up; the solver takes
the least sum whose bytes fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from holdfast.errors import ConfigError
from holdfast.kernels.activations.compressor import Compressor, compress_activations
from holdfast.kernels.activations.gradients import gradient_error
from holdfast.kernels.activations.policy import KEEP, Action, ActPolicy, Rule, parse_bytes
from holdfast.kernels.plan import Group, Option, Plan, solve_budget
from holdfast.kernels.quant import INT4, INT8

LossOf = Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class FittedPolicy:
    """`nbytes` on the device and the gradient `error` of one step under `policy`, measured; the solver's `plan`, whose costs are
    squared errors."""

    policy: ActPolicy
    nbytes: int
    error: float
    plan: Plan

    def __str__(self) -> str:
        lines = [f"{choice.group:<48} {choice.option}" for choice in self.plan.choices]
        return "\n".join([*lines, f"{self.nbytes:,} bytes on the device, gradient error {self.error:.1e}"])


def fit_policy(
    model: torch.nn.Module,
    loss_of: LossOf,
    budget: int | str,
    *,
    candidates: Sequence[Action] = (INT8, INT4),
    modules: Sequence[str] = ("*",),
    base: ActPolicy | None = None,
) -> FittedPolicy:
    """The policy of least gradient error under which what autograd keeps of `loss_of()` fits `budget` ("24GiB").

    Groups are the operations that save something, within each of the `modules` patterns (a module belongs to the first that
    matches). Beside staying exact, a group may take any of the `candidates`: quantizers or OFFLOAD. `base` gives the floor
    (`min_bytes`, heads, losses). Costs two steps per group and candidate, plus four; `loss_of` runs forward on a batch like those
    to come. Raises ConfigError if nothing that was tried fits.
    """
    limit = parse_bytes(budget)
    base = replace(base or ActPolicy(), rules=(), default=KEEP)
    exact, _ = _measured(model, loss_of, base)
    guards, named = base.guards(), _named(candidates)
    places = sorted({(_pattern(row.module, modules), row.op) for row in exact.report().rows if row.op})
    fixed = _on_device(exact)
    groups, rules = [], {}
    for pattern, op in places:
        options = [Option(name="exact", nbytes=float(fixed), cost=0.0)]
        for name, action in named.items():
            rule = Rule(module=pattern, op=_rule_op(op), action=action)
            compressor, error = _measured(model, loss_of, replace(base, rules=(*guards, rule)))
            rules[f"{pattern} {op}", name] = rule
            options.append(Option(name=name, nbytes=float(_on_device(compressor)), cost=error**2))
        smallest = min(option.nbytes for option in options)
        options = [replace(option, nbytes=option.nbytes - smallest) for option in options]
        if options[0].nbytes:
            groups.append(Group(name=f"{pattern} {op}", tokens=1, options=tuple(options)))
    floor = fixed - sum(group.options[0].nbytes for group in groups)
    if floor > limit:
        raise ConfigError(f"at best {floor:.0f} bytes are kept with {len(candidates)} candidates; the budget is {limit}")
    plan = solve_budget(groups, limit - floor)
    chosen = tuple(rules[c.group, c.option] for c in plan.choices if c.option != "exact" and c.tokens)
    policy = replace(base, rules=(*guards, *chosen))
    compressor, error = _measured(model, loss_of, policy)
    return FittedPolicy(policy, _on_device(compressor), error, plan)


def _measured(model: torch.nn.Module, loss_of: LossOf, policy: ActPolicy) -> tuple[Compressor, float]:
    compressor = compress_activations(model, policy)
    return compressor, gradient_error(model, loss_of, compressor).total


def _on_device(compressor: Compressor) -> int:
    report = compressor.report()
    return report.bytes_after - report.on_host


def _pattern(module: str, patterns: Sequence[str]) -> str:
    """The first pattern that speaks of `module`."""
    return next((p for p in patterns if Rule(module=p, action=KEEP).matches(module, "")), "*")


def _named(candidates: Sequence[Action]) -> dict[str, Action]:
    """Candidates by what a reader of the plan would call them."""
    kinds = [getattr(action, "kind", action if isinstance(action, str) else "running") for action in candidates]
    names = [kind if kinds.count(kind) == 1 else f"{kind} ({number})" for number, kind in enumerate(kinds)]
    return dict(zip(names, candidates, strict=True))


def _rule_op(op: str) -> str:
    return "scaled_dot_product_attention" if op == "compressed_sdpa" else op
