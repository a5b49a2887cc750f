"""What is summed of replicated state: everything in turn, in the same order everywhere, and never while it changes."""

from __future__ import annotations

from dataclasses import replace

import torch

from holdfast.arrays import Placement, placement_of
from holdfast.coding import crc32c
from holdfast.snapshot.replicas import PIECES, PORTION_NBYTES, portions, sums, versions
from holdfast.snapshot.state import Held


def held(name: str, tensor: torch.Tensor, *, replica: int = 0, replicas: int = 2, lazy: bool = True) -> Held:
    placement: Placement = placement_of(name, tensor, replica=replica, replicas=replicas)
    return Held(placement, tensor, lazy)


def test_every_byte_that_another_rank_holds_too_is_in_one_portion_and_in_the_same_one_there() -> None:
    large, small = torch.arange(PORTION_NBYTES // 4 * 3 + 5.0), [torch.full((7,), float(n)) for n in range(PIECES + 3)]
    mine = [held("large", large), *(held(f"small-{n:02}", tensor) for n, tensor in enumerate(small))]
    found, other = portions(mine, {}), portions([replace(item) for item in reversed(mine)], {})
    assert [[(p.name, p.start, p.stop) for p in one] for one in found] == [
        [(p.name, p.start, p.stop) for p in one] for one in other
    ]
    covered: dict[str, int] = {}
    for portion in found:
        assert sum(piece.stop - piece.start for piece in portion) <= PORTION_NBYTES
        assert len(portion) <= PIECES
        for piece in portion:
            assert piece.start == covered.get(piece.held.name, 0)
            covered[piece.held.name] = piece.stop
    assert covered == {item.name: item.tensor.numel() * 4 for item in mine}


def test_what_one_rank_alone_holds_or_forward_changes_is_left_out() -> None:
    tensor = torch.ones(5)
    assert (
        portions([held("own", tensor, replicas=1), held("buffer", tensor, lazy=False), held("empty", torch.ones(0))], {}) == []
    )


def test_a_piece_that_is_changed_or_replaced_meanwhile_is_not_summed() -> None:
    home = {"replaced": torch.ones(3)}
    kept, changed = torch.arange(3.0), torch.ones(3)
    items = [held("kept", kept), held("changed", changed), replace(held("replaced", home["replaced"]), home=(home, "replaced"))]
    (portion,) = portions(items, {id(kept): (0, 1)})
    before = versions(portion)
    home["replaced"] = torch.zeros(3)
    changed.add_(1)
    assert sums(portion, before) == {"kept": crc32c(kept.numpy().data)}
    assert [piece.owner for piece in portion if piece.name == "kept"] == [(0, 1)]
