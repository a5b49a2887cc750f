"""Recovery in place: the process, its model, its optimizer and its meshes stay; only what a fault has spoilt is put right.

`with step:` around a step's body swallows the fault, and `run.steps()` yields the step that training goes on from.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from holdfast.elastic import post
from holdfast.elastic._torch_private import begin_pipelines_anew
from holdfast.errors import HoldfastError
from holdfast.events import crash_point

if TYPE_CHECKING:
    from holdfast.elastic.communicator import Communicator
    from holdfast.elastic.session import Run

logger = logging.getLogger(__name__)

GRACE_S = 10.0
"""How long a failed step waits to hear that another rank has died. After that the failure is taken for the script's own."""


class Step(int):
    """The number of a step that is to be done, and a context manager around its body.

    Inside `with step:`, the death of another rank ends the body early; state is put back to the newest recoverable step and the
    loop goes on from there, in this process. An error that no death explains passes through.
    """

    _run: Run
    is_undone: bool

    def __new__(cls, number: int, run: Run) -> Self:
        step = super().__new__(cls, number)
        step._run, step.is_undone = run, False
        return step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> bool:
        self.is_undone = self._run.recover_in_place(error)
        return self.is_undone


class InPlace:
    """What recovery in place needs: the line to the launcher, and the communicator that can be replaced."""

    def __init__(self, line: post.Post, communicator: Communicator) -> None:
        self.line, self._communicator = line, communicator

    def enter(self, attempt: Callable[[], None], rehearse: Callable[[], None]) -> None:
        """Enter the run for the first time; a spare waits here until it is called, after a rehearsal."""
        heard = self._communicator.end_prologue()
        if heard is not None:
            self.line.keep(heard)
        if self.line.role == "ready":
            rehearse()
        self._communicator.await_epoch(self.line.await_call())
        self._carry_through(attempt, connected=not self._communicator.alone)

    def is_due(self, error: BaseException | None) -> bool:
        """Whether a step that ended like this has to be done again because somebody has died."""
        if error is None or not isinstance(error, (RuntimeError, HoldfastError)):
            return self._communicator.is_stale and (error is None or isinstance(error, Exception))
        return self._communicator.wait_stale(GRACE_S)

    def recover(self, error: BaseException | None, attempt: Callable[[], None]) -> None:
        """Connect again and put everything right with `attempt`, however often somebody dies meanwhile."""
        if error is not None:
            traceback.clear_frames(error.__traceback__)  # lets go of the interrupted step's graph and pending work
        self._carry_through(attempt, connected=False)

    def check_alive(self) -> None:
        """Raise RestartNeeded when somebody has died where a step cannot be done again."""
        if self._communicator.wait_stale(0):
            raise post.RestartNeeded(f"{self._communicator.reason} while the run was being completed")

    def leave(self) -> None:
        self._communicator.leave()

    def _carry_through(self, attempt: Callable[[], None], *, connected: bool) -> None:
        while True:
            try:
                if not connected or self._communicator.is_stale:
                    epoch = self._communicator.connect()
                    logger.info("connected under epoch %d: %s", epoch, self._communicator.reason)
                attempt()
            except (RuntimeError, HoldfastError, OSError) as error:
                if not self._communicator.wait_stale(GRACE_S):
                    raise
                logger.warning("recovery begins again, %s (%s)", self._communicator.reason, error)
                connected = False
            else:
                crash_point("trainer.entered")
                self.line.entered()
                return


def in_place() -> InPlace | None:
    """How this process recovers in place; None where it was not started by `holdfast.elastic.run`, or has no group of ours."""
    if post.active is None:
        return None
    from holdfast.elastic import communicator

    if communicator.active is None or not communicator.active.is_used:
        return None
    return InPlace(post.active, communicator.active)


def reset(modules: Iterable[nn.Module], optimizers: Iterable[Optimizer]) -> None:
    """Take back what an interrupted step has left in the machinery around parameters. Their values are not touched.

    DDP's reducers are made anew when state is loaded (`snapshot.buckets`).
    """
    parts = [part for module in modules for part in module.modules()]
    # First, while FSDP2 still shows the gathered parameters: a gradient left on one would be added to the next backward's.
    _drop_gradients(parts)
    for part in parts:
        if isinstance(part, FSDPModule) and _is_root(part):
            if not hasattr(part, "reset_iter_state"):
                raise post.RestartNeeded(f"torch {torch.__version__} cannot take an interrupted FSDP2 step back; 2.13 can")
            part.reset_iter_state()
    _drop_gradients(parts)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    begin_pipelines_anew()


def _drop_gradients(parts: list[nn.Module]) -> None:
    for part in parts:
        for param in part.parameters(recurse=False):
            param.grad = None


def _is_root(part: Any) -> bool:
    """A fresh spare's modules have no root yet: FSDP2 finds it in the first forward."""
    return bool(part._get_fsdp_state()._is_root)
