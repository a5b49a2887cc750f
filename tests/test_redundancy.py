"""The one setting for safety in memory checks itself and says what it would accept."""

from __future__ import annotations

import dataclasses

import pytest

from holdfast import ConfigError, Redundancy


def test_the_default_survives_the_loss_of_one_node() -> None:
    assert Redundancy() == Redundancy(parity=1, group_size=8, nodes_per_host=1)


@pytest.mark.parametrize(
    "setting", [{"parity": 0}, {"parity": 2, "group_size": 3}, {"parity": 0, "group_size": 1}, {"group_size": 255}]
)
def test_settings_that_make_sense_are_accepted(setting: dict[str, int]) -> None:
    assert dataclasses.asdict(Redundancy(**setting)).items() >= setting.items()


@pytest.mark.parametrize(
    "setting",
    [
        {"parity": -1},
        {"parity": 8},
        {"parity": 3, "group_size": 3},
        {"group_size": 0},
        {"group_size": 256},
        {"nodes_per_host": 0},
    ],
)
def test_settings_that_do_not_are_refused_with_what_would_be_accepted(setting: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="parity < group_size <= 255") as refusal:
        Redundancy(**setting)
    assert all(f"{name}={value}" in str(refusal.value) for name, value in setting.items())


def test_a_setting_cannot_change_after_it_was_checked_nor_be_given_by_position() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Redundancy().parity = 200  # type: ignore[misc]
    with pytest.raises(TypeError):
        Redundancy(2)  # type: ignore[misc]


def test_a_setting_explains_itself_on_the_users_cluster(capsys):
    Redundancy(parity=2, group_size=8).explain(nodes=64)
    chosen = capsys.readouterr().out
    assert "64" in chosen
    assert "replication" in chosen


def test_the_class_explains_what_a_user_gets_without_choosing(capsys):
    Redundancy.explain(nodes=64)
    by_class = capsys.readouterr().out
    Redundancy().explain(nodes=64)
    assert capsys.readouterr().out == by_class != ""


def test_a_cluster_smaller_than_a_group_is_explained_as_it_is(capsys):
    Redundancy(parity=1).explain(nodes=4)
    assert "4" in capsys.readouterr().out
