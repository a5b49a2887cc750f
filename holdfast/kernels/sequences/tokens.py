"""A plan by tokens, carried out: some tokens of a layer kept, some packed, some offloaded, the rest recomputed.

Norms, linear layers and activations treat tokens one by one, so a sequence may be cut anywhere and each piece saved in its own
way. MEMO (arXiv:2407.12117) swaps one fraction of the tokens and recomputes the other; here the pieces are those of a `Plan`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch.utils.checkpoint import checkpoint

from holdfast.errors import ConfigError
from holdfast.kernels.activations import KEEP, OFFLOAD, ActPolicy, Compressor, compress_activations
from holdfast.kernels.activations.policy import Action
from holdfast.kernels.plan import Choice, Group, Option
from holdfast.kernels.quant import INT4, INT8

RECOMPUTE = "recompute"
TREATMENTS: Mapping[str, Action] = MappingProxyType({"keep": KEEP, "int8": INT8, "int4": INT4, "offload": OFFLOAD})


class TokenWise:
    """`module` applied to `x` (…, tokens, channels) piece by piece, each piece saved as its choice says.

        group = measure_treatments("mlp", block.mlp, sample)
        plan = solve_budget([group], budget)
        mlp = TokenWise(block.mlp, plan.choices)  # then y = mlp(x) instead of y = block.mlp(x)

    `module` must treat tokens independently: a norm or an MLP, not attention. Forward is that of the whole; gradients of weights
    are sums over the pieces, equal up to rounding, and to the quantization of pieces that are packed. Sequences of another
    length than planned are cut in the same proportions. Option names are "keep", "offload" (exact, to the host), "recompute",
    "int8" and "int4", or those given in `treatments`.
    """

    def __init__(
        self, module: torch.nn.Module, choices: Sequence[Choice], *, treatments: Mapping[str, Action] = TREATMENTS
    ) -> None:
        self.module = module
        self.choices = tuple(choice for choice in choices if choice.tokens)
        if not self.choices:
            raise ConfigError("a plan by tokens needs at least one choice")
        used = {choice.option for choice in self.choices} - {RECOMPUTE}
        if unknown := used - set(treatments):
            raise ConfigError(f"no treatment is called {sorted(unknown)}; there are {sorted([*treatments, RECOMPUTE])}")
        self._savers = {name: _saver(module, treatments[name]) for name in used}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        sizes = _in_proportion([choice.tokens for choice in self.choices], x.shape[-2])
        pieces = torch.split(x, sizes, dim=-2)
        done = [self._piece(c.option, piece) for c, piece in zip(self.choices, pieces, strict=True) if piece.shape[-2]]
        return done[0] if len(done) == 1 else torch.cat(done, dim=-2)

    def _piece(self, option: str, x: torch.Tensor) -> torch.Tensor:
        if option == RECOMPUTE:
            return checkpoint(self.module, x, use_reentrant=False)  # type: ignore[no-any-return]
        with self._savers[option]:
            return self.module(x.contiguous())  # type: ignore[no-any-return]

    @property
    def savers(self) -> Mapping[str, Compressor]:
        """The compressor of each option in use, for its report."""
        return MappingProxyType(self._savers)


def measure_treatments(
    name: str,
    module: torch.nn.Module,
    sample: torch.Tensor,
    *,
    tokens: int | None = None,
    options: Sequence[str] = ("keep", "int8", "offload", RECOMPUTE),
    treatments: Mapping[str, Action] = TREATMENTS,
    rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> Group:
    """What each option costs `module`, measured on `sample` (…, tokens, channels): bytes left on the device per token, and the
    seconds per token that a step takes longer than under the fastest option, medians of `rounds`.

    The group stands for `tokens` tokens, by default those of the sample. Quantization's error is not among the costs: leave out
    the options that you would not accept.
    """
    n = sample.shape[-2]
    bytes_of, seconds_of = {}, {}
    for option in options:
        run = TokenWise(module, [Choice(name, option, n)], treatments=treatments)
        bytes_of[option] = _device_bytes(run, sample)
        seconds_of[option] = sorted(_seconds(run, sample, clock) for _ in range(rounds))[rounds // 2]
    fastest = min(seconds_of.values())
    return Group(
        name=name,
        tokens=tokens or n,
        options=tuple(Option(name=o, nbytes=bytes_of[o] / n, cost=(seconds_of[o] - fastest) / n) for o in options),
    )


def _saver(module: torch.nn.Module, action: Action) -> Compressor:
    return compress_activations(module, ActPolicy(default=action, keep_heads=False))


def _device_bytes(run: TokenWise, x: torch.Tensor) -> int:
    run(x.detach().requires_grad_())
    held = sum(saver.report().bytes_after - saver.report().on_host for saver in run.savers.values())
    return held if run.savers else x.nbytes  # recomputation keeps its input


def _seconds(run: TokenWise, x: torch.Tensor, clock: Callable[[], float]) -> float:
    x = x.detach().requires_grad_()
    _wait(x)
    start = clock()
    y = run(x)
    torch.autograd.grad(y.sum(), [x, *(p for p in run.module.parameters() if p.requires_grad)], allow_unused=True)
    _wait(x)
    return clock() - start


def _wait(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _in_proportion(planned: Sequence[int], total: int) -> list[int]:
    """`planned` scaled to sum to `total`, cut at the nearest whole token."""
    ends, before, whole = [], 0, sum(planned)
    for size in planned:
        before += size
        ends.append(round(total * before / whole))
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
