"""A small cluster of real keepers in threads, whose ranks' bytes a test changes as it likes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.arrays import Fragment, FragmentTable
from holdfast.coding import ErasureCode, crc32c
from holdfast.snapshot.client import Link, connect
from holdfast.snapshot.exchange import parity_name, slot_name
from holdfast.snapshot.keeper import Keeper
from holdfast.snapshot.slots import Slot
from holdfast.snapshot.store import group_of
from holdfast.snapshot.view import GroupRecord, View, stride

NBYTES = 50_000


class Nodes:
    """Keepers in threads of this process, one rank each, whose bytes a test changes as it likes from step to step."""

    def __init__(self, shm: Path, count: int, m: int, *, mapped: bool) -> None:
        self.shm, self.m, self.mapped, self.epoch, self.step = shm, m, mapped, 0, 0
        self.keepers = {node: Keeper("job", node, self.place(node), mapped=mapped) for node in range(count)}
        chance = np.random.default_rng(count)
        self.data = {node: chance.integers(0, 256, NBYTES - 777 * node, np.uint8) for node in range(count)}
        self.links: dict[int, Link] = {}

    def place(self, node: int) -> Path:
        return self.shm / "job" / f"node-{node}"

    def enter(self, **fields: Any) -> None:
        for link in self.links.values():
            link.close()
        self.links = {node: Link(self.place(node), node, "l", NBYTES) for node in self.keepers}
        self.epoch = max(keeper.members.epoch for keeper in self.keepers.values()) + 1
        members = tuple(replace(keeper.member, ranks=(node,)) for node, keeper in self.keepers.items())
        known = {"committed": self.step, "index": 1, "protected": True, "in_memory": True, "group_size": 8, "every": 1}
        known |= {"checkpoint_every": 0, "checkpoints": None, **fields}
        view = View(job="job", epoch=self.epoch, world=len(members), members=members, parity=self.m, **known)
        for node in self.keepers:
            self.ask(node, "join", view=view.to_json())
        self.ask(0, "begin")

    def ask(self, node: int, verb: str, **fields: Any) -> Any:
        connection = connect(self.place(node))
        try:
            return connection.ask(verb, **fields)
        finally:
            connection.close()

    def change(self, node: int, start: int, nbytes: int) -> None:
        self.data[node][start : start + nbytes] ^= 0x5A

    def commit(self, wait_until: Callable[..., None], text: str = "") -> None:
        """One more step, captured on all nodes and committed; then its parity is compared with one made anew."""

        def asked() -> bool:
            return all(link.page.target[0] > self.step for link in self.links.values())

        wait_until(asked, "the next step is asked for")
        step, index, _ = self.links[0].page.target
        for node, link in self.links.items():
            data = self.data[node]
            link.page["completed"] = step
            link.body(index, len(data))[: len(data)] = data.tobytes()
            row = Fragment(f"model/{node}", "uint8", (len(data),), (0,), (len(data),), node, 0, len(data))
            assert link.filled(
                step, index, len(data), f"layout-{len(data)}", FragmentTable.from_rows([row]), {"text": f"{step}{text}"}
            )
        wait_until(lambda: all(link.page["committed"] == step for link in self.links.values()), f"a commit of {step}")
        self.step, self.index = step, index
        self.assert_parity(index)

    def assert_parity(self, index: int) -> None:
        parities = {node: Slot.open(self.place(node) / parity_name(index)) for node in self.keepers}
        slots = {node: Slot.open(self.place(node) / slot_name(node, index)) for node in self.keepers}
        group = group_of(parities[0])
        assert group is not None
        assert group.step == self.step
        for row_of_nodes, expected in self.expected(group, slots):
            for row, (node, data) in enumerate(zip(row_of_nodes, expected, strict=True)):
                size = group.block_nbytes
                assert bytes(parities[node].body[row * size : (row + 1) * size]) == data, f"row {row} on node {node}"
                assert int(parities[node].meta().objects[f"row-{row}"], 16) == crc32c(data)
        for slot in (*parities.values(), *slots.values()):
            slot.close()

    def expected(self, group: GroupRecord, slots: dict[int, Slot]) -> Iterator[tuple[list[int], list[bytes]]]:
        layout, size = group.layout, group.block_nbytes
        whole = {}
        for record in group.records:
            body = bytes(slots[record.node].body[: record.ranks[0].body_nbytes])
            whole[record.node] = body.ljust(stride(record.ranks[0]), b"\0").ljust(layout.k * size, b"\0")
        for stripe in range(layout.stripes):
            blocks = []
            for place in layout.data_nodes(stripe):
                block = layout.block(place, stripe)
                assert block is not None
                blocks.append(whole[group.records[place].node][block * size : (block + 1) * size])
            rows = [bytearray(size) for _ in range(group.parity)]
            ErasureCode(layout.k, group.parity).encode(blocks, rows)
            yield [group.records[place].node for place in layout.parity_owners(stripe)], [bytes(row) for row in rows]

    def close(self) -> None:
        for link in self.links.values():
            link.close()
        for keeper in self.keepers.values():
            keeper.close()
