"""A keeper stands back for the trainers beside it, unless somebody waits for it or it would never get done."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from holdfast.snapshot.priority import hurry_other

SESSION = Path("/proc/self/autogroup")


PREAMBLE = """
import os, threading, time
from pathlib import Path
from holdfast.snapshot import priority as module
from holdfast.snapshot.priority import Priority

def session():
    return Path("/proc/self/autogroup").read_text().split()[-1]
"""


def run(body: str) -> str:
    """In a process of its own: niceness cannot be taken back."""
    command = [sys.executable, "-c", PREAMBLE + textwrap.dedent(body)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_threads_started_later_are_nice_too():
    found = run("""
        Priority().lower()
        nice = []
        thread = threading.Thread(target=lambda: nice.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
        thread.start(); thread.join()
        print(os.getpriority(os.PRIO_PROCESS, 0), *nice)
    """)
    assert found.split() == ["19", "19"]


@pytest.mark.skipif(not SESSION.exists(), reason="this kernel does not share the cores out by session")
def test_a_session_is_nice_hurries_when_asked_and_calms_down_again():
    found = run("""
        module.HURRY_S = 0.5
        priority = Priority()
        priority.lower()
        print(os.getsid(0) == os.getpid(), session())
        while session() == "19":
            priority.hurry()
            time.sleep(0.05)
        print(session())
        while session() != "19":
            time.sleep(0.05)
        print(session())
    """)
    assert found.split() == ["True", "19", "0", "19"]


@pytest.mark.skipif(not SESSION.exists(), reason="this kernel does not share the cores out by session")
def test_work_that_takes_too_long_is_hurried_until_it_is_done():
    found = run("""
        priority = Priority()
        priority.lower()
        priority.busy(since=time.monotonic() - 3)
        while session() == "19":
            time.sleep(0.05)
        priority.busy(since=None)
        while session() != "19":
            time.sleep(0.05)
        print(session())
    """)
    assert found.split() == ["19"]


@pytest.mark.skipif(not SESSION.exists(), reason="this kernel does not share the cores out by session")
def test_another_process_can_have_it_hurry_before_it_is_asked_and_it_calms_down_by_itself():
    body = """
        Priority().lower()
        print(session(), flush=True)
        while session() == "19":
            time.sleep(0.05)
        print(session(), flush=True)
        while session() != "19":
            time.sleep(0.05)
        print(session(), flush=True)
    """
    command = [sys.executable, "-c", PREAMBLE + textwrap.dedent(body)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as nice:
        assert nice.stdout is not None
        assert nice.stdout.readline() == "19\n"
        hurry_other(nice.pid)
        assert nice.stdout.read() == "0\n19\n"
    hurry_other(nice.pid)  # nobody is there any more, and nothing is said


def test_a_keeper_inside_another_process_leaves_its_priority_alone():
    found = run("""
        before = os.getpriority(os.PRIO_PROCESS, 0), os.getsid(0)
        priority = Priority()
        priority.hurry()
        priority.busy(since=0.0)
        print(before == (os.getpriority(os.PRIO_PROCESS, 0), os.getsid(0)), threading.active_count())
    """)
    assert found.split() == ["True", "1"]
