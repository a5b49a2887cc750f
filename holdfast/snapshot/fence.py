"""The fence before an optimizer's step: it may change only what has been copied, and waits for nothing else.

What an optimizer does not touch (frozen weights, other optimizers' parameters) it does not wait for. One with several parameter
groups begins with the first as soon as that is copied, while the others still are. Within a group torch gathers all parameters
before it changes any, so there the fence is one for the whole group. A step under `torch.compile` is cut at the fence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.optim import Optimizer

Wait = Callable[[Optimizer, int | None], None]
"""Return once a group of the optimizer may be changed; None: all of them."""


class Fence:
    """Hangs on one optimizer's hooks until `remove`."""

    def __init__(self, optimizer: Optimizer, wait: Wait, is_needed: Callable[[], bool]) -> None:
        self._optimizer, self._wait, self._is_needed = optimizer, wait, is_needed
        self._whole: list[dict[str, Any]] | None = None
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._put_back()
        if not self._is_needed():
            return
        groups = optimizer.param_groups
        # A closure may do anything, and is called before the groups are looked at. The optimizer itself is the first argument.
        if len(groups) == 1 or len(args) > 1 or kwargs:
            self._wait(optimizer, None)
            return
        self._whole = groups
        optimizer.param_groups = _Groups(groups, lambda place: self._wait(optimizer, place))

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._put_back()

    def _put_back(self) -> None:
        """The groups are the optimizer's own list again, also after a step that failed half-way."""
        if self._whole is not None:
            self._optimizer.param_groups, self._whole = self._whole, None

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._put_back()


class _Groups(list[dict[str, Any]]):
    """An optimizer's groups for the time of one step; each is waited for as it is come to."""

    def __init__(self, groups: list[dict[str, Any]], wait: Callable[[int], None]) -> None:
        super().__init__(groups)
        self._wait = wait

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for place, group in enumerate(super().__iter__()):
            self._wait(place)
            yield group

    def __getitem__(self, place: Any) -> Any:
        for number in range(len(self))[place] if isinstance(place, slice) else (range(len(self))[place],):
            self._wait(number)
        return super().__getitem__(place)

    def __reduce__(self) -> Any:
        return list, (list(self),)
