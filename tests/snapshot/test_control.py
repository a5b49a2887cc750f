"""The page that a trainer and its keeper share: what one writes, the other reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.snapshot.control import NBYTES, ControlPage

WORDS = ("pid", "completed", "finishing", "epoch", "committed", "checkpoint", "stopped", "unsaved")


def test_a_fresh_page_is_all_zero(tmp_path: Path) -> None:
    page = ControlPage(tmp_path / "page", create=True)
    assert [page[word] for word in WORDS] == [0] * len(WORDS)
    assert page.target == (0, 0, 0)
    assert (tmp_path / "page").stat().st_size == NBYTES
    assert (tmp_path / "page").stat().st_mode & 0o077 == 0
    page.close()


def test_every_word_has_a_place_of_its_own_and_is_seen_by_the_other_side(tmp_path: Path) -> None:
    keeper, trainer = ControlPage(tmp_path / "page", create=True), ControlPage(tmp_path / "page")
    for value, word in enumerate(WORDS, 2**40):
        keeper[word] = value
    keeper.set_target(123, 1)
    assert [trainer[word] for word in WORDS] == list(range(2**40, 2**40 + len(WORDS)))
    assert trainer.target[:2] == (123, 1)
    keeper.close()
    trainer.close()


def test_creating_a_page_again_keeps_what_it_says(tmp_path: Path) -> None:
    page = ControlPage(tmp_path / "page", create=True)
    page["completed"] = 17
    page.close()
    again = ControlPage(tmp_path / "page", create=True)
    assert again["completed"] == 17
    again.close()


@given(step=st.integers(0, 2**40), index=st.integers(0, 1))
def test_a_target_is_one_word(tmp_path_factory: pytest.TempPathFactory, step: int, index: int) -> None:
    page = ControlPage(tmp_path_factory.getbasetemp() / "page", create=True)
    page.set_target(step, index)
    assert page.target[:2] == (step, index)
    page.close()


def test_a_target_announced_again_is_a_new_order(tmp_path: Path) -> None:
    page = ControlPage(tmp_path / "page", create=True)
    page.set_target(8, 1)
    first = page["target"]
    page.set_target(8, 1)
    assert page["target"] != first
    assert page.target[:2] == (8, 1)
    page.close()


def test_an_unknown_word_and_a_missing_page_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ControlPage(tmp_path / "page")
    page = ControlPage(tmp_path / "page", create=True)
    with pytest.raises(KeyError):
        page["surprise"]
    page.close()
