"""Every second of every rank has one class; incidents say what happened; the page shows both and loads nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from holdfast.elastic.accounting import Kind, account
from holdfast.elastic.drawing import seconds, to_html
from holdfast.elastic.incidents import describe, is_incident, read_incidents, write_incident
from holdfast.elastic.journal import Begin, End, Journal, LastWords, Recorder, Step
from holdfast.elastic.report import make_report
from holdfast.errors import CorruptData


def journal(
    attempt: int, rank: int, *, born: float, first: int, times: list[float], end: End | None, world: int = 2
) -> Journal:
    """Protect entered 5 s after birth, training 2 s later; snapshots hold every step for 0.1 s."""
    begin = Begin(attempt, rank, world, first, born + 7, born, born + 5, rung="own keeper" if attempt > 1 else "")
    return Journal(begin, tuple(Step(first + place, at, 0.1, {}) for place, at in enumerate(times, start=1)), end)


def told() -> list[Journal]:
    """Rank 1 is killed in step 5; rank 0 notices; both restart and go on from step 3."""
    return [
        journal(1, 0, born=0, first=0, times=[8, 9, 10, 11], end=End(12.5, 4, "RuntimeError: peer closed")),
        journal(1, 1, born=0, first=0, times=[8, 9, 10, 11], end=None),
        journal(2, 0, born=15, first=3, times=[23, 24, 25], end=End(25.5, 6, "done")),
        journal(2, 1, born=16, first=3, times=[24, 25, 26], end=End(26.5, 6, "done")),
    ]


def test_every_second_has_one_class():
    found = account(told())
    assert found.rank_seconds == pytest.approx(25.5 + 26.5)
    assert found.seconds == pytest.approx(
        {
            "productive": 2 * (3 + 3) - 12 * 0.1,
            "stall": 12 * 0.1,
            "lost work": 2 * 1,
            "detection": 2 * 1.5,
            "restart": 2.5 + 3.5,
            "startup": 2 * 7 + 2 * 5,
            "restore": 2 * 2,
            "ending": 2 * 0.5,
        }
    )
    assert found.ettr == pytest.approx(10.8 / 52)
    for rank in (0, 1):
        spans = sorted((span for span in found.spans if span.rank == rank), key=lambda span: span.start_s)
        assert all(one.end_s == two.start_s for one, two in pairwise(spans))


def test_a_process_that_lived_on_is_not_counted_twice():
    """In-process recovery: the second attempt has the process of the first."""
    first = journal(1, 0, born=0, first=0, times=[8, 9], end=End(9.2, 2, "RuntimeError: peer closed"), world=1)
    begin = Begin(2, 0, 1, 2, 9.5, 0, 9.3, rung="own keeper")
    second = Journal(begin, (Step(3, 10.5, 0.0, {}),), None)
    found = account([first, second])
    assert found.rank_seconds == pytest.approx(10.5)
    assert found.seconds["detection"] == pytest.approx(0.2)
    assert found.seconds["restore"] == pytest.approx(0.2)


def test_a_rank_that_a_smaller_world_no_longer_has_costs_nothing_more():
    again = journal(2, 0, born=15, first=3, times=[23], end=End(23.5, 4, "done"), world=1)
    found = account([*told()[:2], again])
    assert sum(span.seconds for span in found.spans if span.rank == 1) == pytest.approx(11)


WORDS = [
    LastWords(0, 4, 11.0, 12.5, "RuntimeError: peer closed"),
    LastWords(1, 4, 11.0),
    LastWords(2, 3, 10.0, 12.7, "KeyError: 3"),
]


def incident(**changes):
    given = {"job": "t", "attempt": 2, "world": 2, "born_s": 16.0, "entered_s": 21.0, "restored_step": 3}
    given |= {"kind": "node", "rung": "parity", "restoring": {"survey": 0.5, "load": 1.0}}
    return describe(WORDS, **given | changes)


def test_an_incident_says_who_fell_silent_and_where_the_seconds_went():
    found = incident()
    assert found.silent == (1,)
    assert found.said == {"0": "RuntimeError: peer closed", "2": "KeyError: 3"}
    assert (found.reached_step, found.restored_step, found.steps_lost) == (4, 3, 1)
    assert (found.world_before, found.world_after) == (3, 2)
    assert dict(found.phases) == {"detected": 1.5, "restarted": 3.5, "started": 5.0, "survey": 0.5, "load": 1.0}
    assert found.with_first_step(0.25).seconds == pytest.approx(11.75)


def test_clocks_that_disagree_make_no_negative_phase():
    assert incident(born_s=11.5).phases["restarted"] == 0.0


def test_ranks_that_were_all_done_make_no_incident():
    assert not is_incident([LastWords(0, 9, 1.0, 2.0, "done"), LastWords(1, 9, 1.0, 2.0, "done")])
    assert is_incident([LastWords(0, 9, 1.0, 2.0, "done"), LastWords(1, 9, 1.0)])
    assert not is_incident([])


def test_an_incident_reads_back_as_it_was_written(tmp_path):
    write_incident(tmp_path, incident())
    path = write_incident(tmp_path, incident().with_first_step(0.5))
    (found,) = read_incidents(tmp_path)
    assert found.phases["first_step"] == 0.5
    assert asdict(found) == asdict(incident().with_first_step(0.5))
    path.write_text(path.read_text()[:-5])
    with pytest.raises(CorruptData, match="not an incident record"):
        read_incidents(tmp_path)


@pytest.fixture
def run(tmp_path):
    records = tmp_path / "runs" / "<exp> & co" / "records"
    for item in told():
        recorder = Recorder(records, item.begin)
        lines = [[step.step, step.time_s, step.stall_s, {}] for step in item.steps]
        for line in lines:
            recorder._write(line)
        if item.end is not None:
            recorder._write({"end": item.end.time_s, "step": item.end.step, "why": item.end.why})
    write_incident(records, incident(notes=("rank 1 said <nothing>",)))
    return records.parent


class Checked(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.bars: dict[str, int] = {}
        self.addresses: list[str] = []
        self.words = ""

    def handle_starttag(self, tag, attrs):
        self.bars[tag] = self.bars.get(tag, 0) + 1
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.words += data


def test_the_page_shows_every_rank_and_incident_and_loads_nothing(run):
    page = Checked()
    text = to_html(make_report(str(run), [run / "records"]))
    page.feed(text)
    assert page.addresses == []
    assert "script" not in page.bars
    assert page.bars["rect"] >= 2 * 8
    assert all(
        words in page.words for words in ("rank 0", "rank 1", "node lost, back from parity", "rank 1 said <nothing>", "20.77%")
    )
    assert "<nothing>" not in text
    assert set(re.findall(r"(productive|lost work|detection|restart|startup|restore|ending)<td", text)) >= {
        "productive",
        "lost work",
    }


def test_the_command_prints_and_draws_the_same_numbers(run, tmp_path):
    command = [sys.executable, "-m", "holdfast.cli", "report", str(run), "--json", "--out", str(tmp_path / "report.html")]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["ettr"] == pytest.approx(10.8 / 52)
    assert found["incidents"][0]["rung"] == "parity"
    assert found["account"]["seconds"][Kind.LOST] == pytest.approx(2.0)
    assert "20.77%" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.254, "0.25 s"), (12.34, "12.3 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (273_600, "3 d 4 h")],
)
def test_durations_are_written_as_people_say_them(value, text):
    assert seconds(value) == text
