"""The survival table, against enumeration and against the numbers measured for the design."""

from __future__ import annotations

import re
from itertools import combinations, product
from math import comb, isnan
from pathlib import Path

import pytest

import holdfast
from holdfast.coding import explain, form_groups
from holdfast.coding.survival import NODE_LOSS, _probability_of_loss, _replication, _survived
from holdfast.errors import ConfigError


@pytest.mark.parametrize(
    ("parity", "size", "expected"),
    [  # docs/coding.md; computed independently when the layout was chosen
        (1, 4, ("9.6e-07", "9.6e-05", "9.4e-03")),
        (1, 8, ("2.2e-06", "2.2e-04", "2.1e-02")),
        (2, 8, ("4.5e-10", "4.5e-07", "4.3e-04")),
        (4, 16, ("1.7e-16", "1.7e-11", "1.6e-06")),
        (2, 64, ("4.1e-08", "4.0e-05", "2.6e-02")),
    ],
)
def test_the_probabilities_of_loss_are_those_of_the_design(parity: int, size: int, expected: tuple[str, ...]) -> None:
    found = explain(parity, size, 64).chosen.loss
    assert all(f == pytest.approx(float(e), rel=0.06) for f, e in zip(found, expected, strict=True))


def test_replication_is_as_the_design_says() -> None:
    by_name = {scheme.name: scheme for scheme in explain(2, 4, 64).schemes}
    assert by_name["replication, 1 copy"].loss == pytest.approx((3.2e-7, 3.2e-5, 3.2e-3), rel=0.01)
    assert by_name["replication, 1 copy"].survived == pytest.approx((1.0, 0.9841, 0.9524, 0.9055), abs=1e-4)
    assert by_name["this choice"].survived == pytest.approx((1.0, 1.0, 0.9985, 0.9939), abs=1e-4)
    assert by_name["this choice"].memory == by_name["replication, 1 copy"].memory == 1.0


@pytest.mark.parametrize("groups", [[(4, 1), (4, 1)], [(3, 2), (5, 1), (2, 0)], [(7, 3)], [(1, 0), (2, 1), (3, 1), (1, 0)]])
def test_both_columns_agree_with_counting_every_pattern(groups: list[tuple[int, int]]) -> None:
    owner = [g for g, (n, _) in enumerate(groups) for _ in range(n)]
    nodes = len(owner)

    def survives(lost: tuple[int, ...]) -> bool:
        return all(sum(owner[node] == g for node in lost) <= m for g, (_, m) in enumerate(groups))

    for f, share in zip((1, 2, 3, 4), _survived(groups), strict=True):
        patterns = list(combinations(range(nodes), f))
        assert share == pytest.approx(sum(map(survives, patterns)) / len(patterns))
    for p in (0.001, 0.2, 0.7):
        lost = 0.0
        for dead in product((0, 1), repeat=nodes):
            if not survives(tuple(node for node in range(nodes) if dead[node])):
                lost += p ** sum(dead) * (1 - p) ** (nodes - sum(dead))
        assert _probability_of_loss(groups, p) == pytest.approx(lost)


def test_equal_memory_replication_costs_what_it_claims() -> None:
    for copies, nodes in ((1 / 3, 64), (1 / 7, 64), (1.5, 60), (2.0, 63)):
        scheme = _replication("", copies, nodes)
        assert scheme.memory == scheme.network == copies
        assert all(0 <= a <= b <= 1 for a, b in zip(scheme.loss, scheme.loss[1:], strict=False))
    third = _replication("", 1 / 3, 60)  # 10 pairs and 40 nodes alone: losing one of the 40 loses
    assert third.survived[0] == pytest.approx(20 / 60)
    assert third.loss[1] == pytest.approx(1 - (1 - 1e-6) ** 10 * (1 - 1e-3) ** 40)


def test_more_parity_is_safer_and_larger_groups_are_cheaper() -> None:
    losses = [explain(parity, 8, 64).chosen.loss[1] for parity in range(5)]
    assert losses == sorted(losses, reverse=True)
    memory = [explain(2, size, 64).chosen.memory for size in (4, 8, 16, 32, 64)]
    assert memory == sorted(memory, reverse=True)


@pytest.mark.parametrize(
    ("parity", "size", "nodes"), [(1, 8, 64), (2, 8, 67), (2, 8, 5), (1, 8, 1), (1, 8, 2), (0, 8, 16), (3, 4, 3)]
)
def test_costs_are_those_of_the_groups_that_would_be_formed(parity: int, size: int, nodes: int) -> None:
    explanation = explain(parity, size, nodes)
    layouts = [group.layout for group in form_groups(range(nodes), size, parity)]
    assert explanation.group_sizes == tuple(layout.n for layout in layouts)
    blocks = sum(layout.traffic_plan().sent(node) / layout.k for layout in layouts for node in range(layout.n))
    assert explanation.chosen.network == pytest.approx(blocks / nodes)
    assert explanation.chosen.memory == pytest.approx(sum(layout.memory_overhead * layout.n for layout in layouts) / nodes)


def test_only_certainty_reads_one_hundred_percent() -> None:
    text = str(explain(2, 8, 512))
    row = next(line for line in text.splitlines() if line.startswith("this choice"))
    assert row.split("  ")[-1].strip() != "100 %"
    assert explain(2, 8, 512).chosen.survived[2] < 1
    assert comb(512, 3) > 1000  # the share would round to 100 %
    assert "99.9 %" in row


def test_it_prints_itself_as_the_table_of_the_documentation() -> None:
    title, _, head, row, *_ = str(explain(2, 8, 64)).splitlines()
    assert title == "64 nodes in 8 groups of 8: any 2 of a group may be lost, memory and all"
    assert [name.strip() for name in head.split("  ") if name] == [
        "memory",
        "network",
        *(f"lost at p={p:g}" for p in NODE_LOSS),
        *(f"{count} lost" for count in (1, 2, 3, 4)),
    ]
    assert row == (
        "this choice                  +33%     1.17           4.5e-10          4.5e-07         4.3e-04"
        "   100 %   100 %  98.9 %  95.9 %"
    )


def test_the_documentation_shows_what_is_printed() -> None:
    page = (Path(__file__).parents[2] / "docs" / "coding.md").read_text()
    printed = str(explain(2, 8, 64))
    assert printed.partition("\n\nmemory:")[0] in page
    table = re.findall(r"^\| (\d) \| (\d+) \| \+(\d+) % \| ([\d.]+) \| ([\d.]+)·10(\S+) \|", page, re.MULTILINE)
    assert len(table) == 6
    for parity, size, memory, network, loss, power in table:
        chosen = explain(int(parity), int(size), 64).chosen
        assert (f"{chosen.memory:.0%}", f"{chosen.network:.2f}") == (f"{memory}%", network)
        exponent = int(power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")))
        assert chosen.loss[1] == pytest.approx(float(loss) * 10**exponent, rel=0.02)


def test_a_cluster_of_one_is_told_the_truth() -> None:
    alone = explain(2, 8, 1)
    assert str(alone).startswith("1 node without parity: a lost node costs the work since the last checkpoint")
    assert alone.chosen.loss == pytest.approx(NODE_LOSS)
    assert [isnan(share) for share in alone.chosen.survived] == [False, True, True, True]
    assert str(explain(0, 8, 16)).startswith("16 nodes without parity")


def test_redundancy_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    holdfast.Redundancy(parity=2, group_size=8).explain(nodes=64)
    assert capsys.readouterr().out == f"{explain(2, 8, 64)}\n"


@pytest.mark.parametrize(("parity", "size", "nodes"), [(-1, 8, 64), (8, 8, 64), (1, 8, 0), (1, 8, -4), (1, 300, 400)])
def test_questions_without_an_answer(parity: int, size: int, nodes: int) -> None:
    with pytest.raises(ConfigError):
        explain(parity, size, nodes)
