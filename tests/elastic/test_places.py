"""Who sits where is the same for everybody who asks, and a host keeps the numbers under which it holds snapshots."""

from __future__ import annotations

from holdfast.elastic.places import Place, Seat, places_of


def seats(*hosts: tuple[int, tuple[int, ...]], ranks: int = 4) -> list[Seat]:
    """Hosts in the order of their agents: how many nodes each plays, and which it knows."""
    return [
        Seat(agent, local, ranks, nodes, known if local == 0 else ())
        for agent, (nodes, known) in enumerate(hosts)
        for local in range(ranks)
    ]


def test_ranks_are_dealt_to_the_nodes_of_their_host_and_the_first_of_each_speaks_for_it():
    found = places_of(seats((2, ()), (2, ())))
    assert [place.node for place in found] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [place.leads_node for place in found] == [True, False] * 4
    assert [rank for rank, place in enumerate(found) if place.leads_host] == [0, 4]
    assert found[5] == Place(2, (2, 3), leads_node=False, leads_host=False)


def test_a_host_keeps_its_numbers_wherever_torchrun_has_put_its_ranks():
    found = places_of(seats((1, (1,)), (1, (0,)), (1, ())))
    assert [place.node for place in found[::4]] == [1, 0, 2]
    assert not any(place.guests for place in found)


def test_nodes_that_are_too_many_now_are_guests_of_their_host_and_of_nobody_else():
    found = places_of(seats((1, (0, 2)), (1, (1, 3))))
    assert [place.nodes_here for place in found[::4]] == [(0,), (1,)]
    assert [place.guests for place in found] == [(2,), (), (), (), (3,), (), (), ()]


def test_a_node_whose_memory_is_gone_comes_back_under_its_number():
    assert [place.nodes_here for place in places_of(seats((4, (0, 2, 3))))] == [(0, 1, 2, 3)] * 4
