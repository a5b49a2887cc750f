"""Deeds that are done to a job from outside: signals, damaged memory, a full file system, an impostor.

Which process is whose is read from what the job itself leaves: its control pages, and the addresses of its keepers.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from holdfast.elastic.faults.schedule import Fault
from holdfast.environment import home
from holdfast.errors import ClusterError, HoldfastError
from holdfast.snapshot.birth import SOCKET, is_alive
from holdfast.snapshot.client import Endpoint
from holdfast.snapshot.control import ControlPage
from holdfast.snapshot.slots import HEADER_NBYTES, Slot, SlotState, aligned

BALLAST = "holdfast-ballast"


class Scene:
    """A running job as seen from outside, by its memory folder."""

    def __init__(self, memory: Path, runtime: Path) -> None:
        self.memory, self.runtime = memory, runtime
        self._impostors: list[subprocess.Popen[bytes]] = []
        self._ballast: list[Path] = []

    # -- who is there --

    def places(self) -> dict[int, Path]:
        """The memory of every node."""
        found = home(self.memory).glob("*/node-*")
        return {int(place.name.removeprefix("node-")): place for place in found}

    def trainers(self) -> dict[int, int]:
        """The process of every rank that is alive."""
        pids = {rank: page["pid"] for rank, page in self._pages()}
        return {rank: pid for rank, pid in pids.items() if pid and is_alive(pid)}

    def committed(self) -> int:
        """The newest step that every rank knows to be committed."""
        return min((page["committed"] for _, page in self._pages()), default=0)

    def keeper(self, node: int) -> int | None:
        with suppress(HoldfastError, KeyError):
            pid = Endpoint.read(self.places()[node]).pid
            return pid if is_alive(pid) else None
        return None

    def _pages(self) -> Iterable[tuple[int, ControlPage]]:
        for path in home(self.memory).glob("*/node-*/control-*"):
            with suppress(OSError, ValueError):
                page = ControlPage(path)
                try:
                    yield int(path.name.removeprefix("control-")), page
                finally:
                    page.close()

    # -- deeds --

    def strike(self, fault: Fault, ranks_of: Callable[[int], tuple[int, ...]]) -> None:
        """Do what the fault says, now."""
        signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "cont": signal.SIGCONT}
        if fault.do in signals:
            self._signal(fault, signals[fault.do], ranks_of)
        elif fault.do == "fill":
            self._fill(Path(fault.path) if fault.path else self.memory)
        elif fault.do == "garbage":
            self._replace(fault)
        else:
            self._damage(fault)

    def _signal(self, fault: Fault, number: int, ranks_of: Callable[[int], tuple[int, ...]]) -> None:
        """Keepers first and trainers last, so that nobody is left who could write a lost memory again."""
        trainers, places = self.trainers(), self.places()
        keepers = [*fault.nodes, *([fault.keeper] if fault.keeper is not None else [])]
        ranks = [*([fault.rank] if fault.rank is not None else []), *(rank for node in fault.nodes for rank in ranks_of(node))]
        for node in keepers:
            _send(self.keeper(node), number)
        if number == signal.SIGKILL:
            for node in fault.nodes:
                if node in places:
                    _wait_for_end(self._keeper_of(places[node]))
                    shutil.rmtree(places[node], ignore_errors=True)
        for rank in ranks:
            _send(trainers.get(rank), number)
            if number == signal.SIGKILL:
                _wait_for_end(trainers.get(rank))  # its mappings hold the memory until then
        if fault.ray:
            _send(json.loads((self.runtime / "ray.json").read_text())["pid"], number)

    def _keeper_of(self, place: Path) -> int | None:
        with suppress(HoldfastError):
            return Endpoint.read(place).pid
        return None

    def _damage(self, fault: Fault) -> None:
        """Change bytes of every whole slot of a rank, or of every whole parity slot of a node."""
        where = f"slot-{fault.rank}-?" if fault.rank is not None else None
        nodes = [*fault.nodes, *([fault.keeper] if fault.keeper is not None else [])]
        paths = list(home(self.memory).glob(f"*/node-*/{where}")) if where else []
        paths += [path for node in nodes for path in home(self.memory).glob(f"*/node-{node}/parity-?")]
        for path in paths:
            with suppress(HoldfastError):
                _damage_slot(path, fault)

    def _fill(self, folder: Path) -> None:
        """Take all the room that is left, and keep it."""
        ballast = folder / BALLAST
        self._ballast.append(ballast)
        with ballast.open("ab") as file:
            for step in (1 << 20, 4096):
                with suppress(OSError):
                    while True:
                        os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, step)

    def _replace(self, fault: Fault) -> None:
        for node in [*fault.nodes, *([fault.keeper] if fault.keeper is not None else [])]:
            place = self.places()[node]
            endpoint = Endpoint.read(place)
            _send(endpoint.pid, signal.SIGKILL)
            _wait_for_end(endpoint.pid)
            words = [str(place / SOCKET), endpoint.member.address, str(endpoint.member.port)]
            command = [sys.executable, "-m", "holdfast.elastic.faults.impostor", *words]
            impostor = subprocess.Popen(command, stdout=subprocess.PIPE)
            self._impostors.append(impostor)
            assert impostor.stdout is not None
            if not impostor.stdout.readline():  # the trainers, who would start the keeper again, stand still meanwhile
                raise ClusterError(f"nobody else could be put in the place of node {node}'s keeper")

    # -- standing still --

    def freeze(self) -> list[int]:
        """Stop all trainers, and give the keepers a moment to finish what they have been given."""
        pids = list(self.trainers().values())
        for pid in pids:
            _send(pid, signal.SIGSTOP)
        time.sleep(0.3)
        return pids

    def thaw(self, pids: Iterable[int]) -> None:
        for pid in pids:
            _send(pid, signal.SIGCONT)

    def close(self) -> None:
        """End the impostors and give the room back."""
        for process in self._impostors:
            process.kill()
            process.communicate()
        for ballast in self._ballast:
            ballast.unlink(missing_ok=True)


def _damage_slot(path: Path, fault: Fault) -> None:
    slot = Slot.open(path)
    header, start = slot.header, HEADER_NBYTES
    slot.close()
    if header.state < SlotState.VERIFIED:
        return
    if fault.place == "meta":
        start += aligned(header.payload_nbytes)
    elif fault.place == "header":
        start = (header.sequence % 2) * (HEADER_NBYTES // 2)
    room = {"meta": header.meta_nbytes, "header": HEADER_NBYTES // 2}.get(fault.place, header.payload_nbytes)
    with path.open("r+b") as file:
        if fault.do == "tear":
            file.seek(start + room // 8)  # a header is far shorter than its half page
            file.write(bytes(room - room // 8))
            return
        place = start + fault.bit // 8 % max(1, room)
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << fault.bit % 8]))


def _send(pid: int | None, number: int) -> None:
    if pid:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _wait_for_end(pid: int | None) -> None:
    deadline = time.monotonic() + 10
    while pid and is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
