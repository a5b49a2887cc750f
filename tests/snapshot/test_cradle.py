"""Keepers that are born of a waiting process: at once, as any other keeper, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from holdfast.errors import ConfigError
from holdfast.snapshot import birth
from holdfast.snapshot.birth import is_alive
from holdfast.snapshot.client import Endpoint, connect
from holdfast.snapshot.cluster import ensure_keepers, node_memory

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-m", "holdfast.snapshot.cradle", sys.argv[1], str(os.getpid())])
time.sleep(3600)
"""


def until(what: Callable[[], bool], wanted: str) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline, f"no {wanted} within a minute"
        time.sleep(0.02)


def is_there(address: str) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(f"\0{address}") == 0


@pytest.fixture
def address() -> str:
    return f"holdfast-test-{os.getpid()}-{time.monotonic_ns()}"


@pytest.fixture
def launcher(address: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds a cradle, as a host's launcher does."""
    environ = {name: value for name, value in os.environ.items() if name != "HOLDFAST_DOMAIN"}
    process = subprocess.Popen([sys.executable, "-c", HOLDER, address], env={**environ, "PYTHONPATH": str(ROOT)})
    try:
        until(lambda: is_there(address), "cradle")
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HOLDFAST_RUNTIME", str(tmp_path / "runtime"))
    monkeypatch.setenv("HOLDFAST_DOMAIN", "rack-7")
    yield tmp_path
    for path in tmp_path.rglob("keeper.json"):
        os.kill(Endpoint.read(path.parent).pid, signal.SIGKILL)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def test_a_keeper_that_is_born_serves_outlives_its_cradle_and_can_be_followed_by_another(
    launcher: subprocess.Popen[bytes], address: str, memory: Path
) -> None:
    starting = {"kind": "process", "ray_address": None, "bind": "127.0.0.1", "cradle": address}
    ensure_keepers("job", [0, 1], memory, **starting)
    places = [node_memory(memory, "job", node) for node in (0, 1)]
    first, second = (Endpoint.read(place).pid for place in places)
    assert os.getsid(first) == first != second == os.getsid(second), "each has a session of its own"
    assert Path(f"/proc/{first}/comm").read_text() == "hf-keeper-0\n"
    assert Endpoint.read(places[0]).member.domain == "rack-7", "the environment is that of the one who asks"
    assert "cradle" in Path(f"/proc/{first}/cmdline").read_text(), "it was forked, not started"

    os.kill(first, signal.SIGKILL)
    until(lambda: not is_alive(first), "end of the killed keeper")
    ensure_keepers("job", [0, 1], memory, **starting)
    assert Endpoint.read(places[0]).pid not in (first, second)
    assert Endpoint.read(places[1]).pid == second, "who answers is left alone"

    launcher.kill()
    launcher.wait()
    until(lambda: not is_there(address), "end of the cradle, which goes with its launcher")
    for place in places:
        connection = connect(place)
        connection.ask("ping")
        connection.close()
        assert parent_of(Endpoint.read(place).pid) != launcher.pid


def test_where_no_cradle_answers_a_keeper_is_started_as_it_always_was(address: str, memory: Path) -> None:
    ensure_keepers("job", [0], memory, kind="process", ray_address=None, bind="127.0.0.1", cradle=address)
    command = Path(f"/proc/{Endpoint.read(node_memory(memory, 'job', 0)).pid}/cmdline").read_text()
    assert "holdfast.snapshot.host" in command


def test_a_born_keeper_that_refuses_to_start_says_why(launcher: subprocess.Popen[bytes], address: str, memory: Path) -> None:
    with pytest.raises(ConfigError, match=r"the keeper of node 0 could not start: .*choose a shorter one"):
        ensure_keepers("j" * 32, [0], _deep(memory), kind="process", ray_address=None, bind="127.0.0.1", cradle=address)
    assert is_there(address), "the cradle stays for the next"


def _deep(memory: Path) -> Path:
    """Where a socket's path would be too long."""
    place = memory / ("d" * 60) / ("e" * 60)
    place.mkdir(parents=True)
    return place


def test_a_request_that_is_no_request_ends_nothing(launcher: subprocess.Popen[bytes], address: str, tmp_path: Path) -> None:
    for data in (b"", b"\n", b"{}\n", b"[1]\n", b"\xff\n"):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(f"\0{address}")
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(16) == b"", "nobody was born of it"
    assert is_there(address)


def test_a_stranger_with_our_name_is_told_nothing(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{address}")
        listener.listen(1)
        monkeypatch.setattr(birth, "user_of", lambda sock: os.getuid() + 1)
        assert birth.ask_cradle(address, ["job", "0"], tmp_path / "log", {"SECRET": "1"}) is None
        heard, _ = listener.accept()
        assert heard.recv(64) == b""
        heard.close()
