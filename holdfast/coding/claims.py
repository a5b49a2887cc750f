"""Two threads that change the same parity take turns, and those that change different bytes do not wait for each other.

Adding a fragment to a parity reads, changes and writes it with the GIL released. Two of these at once on the same bytes would
lose one of them and leave a parity that looks healthy and rebuilds garbage.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from holdfast.coding.buffers import Region


class Claims:
    """Memory that is being changed at this moment, within this process."""

    def __init__(self) -> None:
        self._held: list[tuple[int, int]] = []
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, regions: Sequence[Region]) -> Iterator[None]:
        """Waits until nobody else holds any of these bytes, then holds all of them; taking all at once cannot deadlock."""
        wanted = [(each.address, each.address + each.size) for each in regions]
        with self._changed:
            self._changed.wait_for(lambda: not any(_meet(a, b) for a in wanted for b in self._held))
            self._held += wanted
        try:
            yield
        finally:
            with self._changed:
                for each in wanted:
                    self._held.remove(each)
                self._changed.notify_all()


def _meet(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1]
