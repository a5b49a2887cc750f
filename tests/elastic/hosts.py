"""Hosts of their own on one machine: each has a network stack, a process tree, a hostname and memory that nobody else sees.

They are Linux namespaces with a router between them. A host can lose its power (everything in it is gone at once, and no packet
says so) and its cable can be pulled. Needs root, iproute2 and util-linux.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

INIT = """
import os, time
while True:
    try: os.wait()
    except ChildProcessError: time.sleep(0.02)
"""
"""The first process of a host: it takes in orphans, and when it ends everything does."""


def why_not() -> str:
    """Why no hosts can be made here, or nothing."""
    lacking = [name for name in ("ip", "unshare", "nsenter", "pgrep") if shutil.which(name) is None]
    if lacking or os.geteuid() != 0:
        return f"hosts need root and {', '.join(lacking) or 'nothing else'}"
    made = subprocess.run(["unshare", "--net", "ip", "link", "add", "type", "veth"], capture_output=True, text=True)
    return f"no virtual network here: {made.stderr.strip()}" if made.returncode else ""


class Network:
    """A router, and the hosts that are connected to it. `place` is seen by all of them, as shared storage is."""

    def __init__(self, place: Path, hosts: int) -> None:
        self.place = place
        self.router = f"hf{os.getpid()}"
        _do("ip", "netns", "add", self.router)
        _do("ip", "netns", "exec", self.router, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        numbers = range(hosts)
        lines = [f"10.77.{number + 1}.2 host{number}\n10.77.{number + 1}.1 router{number}\n" for number in numbers]
        (place / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        (place / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        self.hosts = [Host(self, number) for number in numbers]

    def close(self) -> None:
        for host in self.hosts:
            host.lose_power()
            _do("ip", "netns", "del", host.space)
        _do("ip", "netns", "del", self.router)


class Host:
    """One host, switched on."""

    def __init__(self, network: Network, number: int) -> None:
        self.number, self.name, self.address = number, f"host{number}", f"10.77.{number + 1}.2"
        self._place, self._router, self._port = network.place, network.router, f"port{number}"
        self.space = f"{network.router}-{number}"
        gateway = f"10.77.{number + 1}.1"
        _do("ip", "netns", "add", self.space)
        _do("ip", "-n", self.space, "link", "add", "eth0", "type", "veth", "peer", "name", self._port, "netns", self._router)
        _do("ip", "-n", self._router, "addr", "add", f"{gateway}/24", "dev", self._port)
        _do("ip", "-n", self.space, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _do("ip", "-n", self.space, "link", "set", device, "up")
        self.plug()
        _do("ip", "-n", self.space, "route", "add", "default", "via", gateway)
        self._outer: subprocess.Popen[bytes] | None = None
        self.switch_on()

    def switch_on(self) -> None:
        """With empty memory; everything that ran here before is gone."""
        mounts = [f"mount --bind {self._place}/{name} /etc/{name}" for name in ("hosts", "resolv.conf")]
        mounts.append("mount -t tmpfs -o size=1g tmpfs /dev/shm")
        boot = " && ".join([*mounts, f"hostname {self.name}", f"exec {sys.executable} -c '{INIT}'"])
        spaces = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = ["ip", "netns", "exec", self.space, *spaces, "sh", "-c", boot]
        self._outer = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not self._is_up():
            assert time.monotonic() < deadline, f"{self.name} does not boot"
            time.sleep(0.02)
        self.plug()

    def lose_power(self) -> None:
        """The cable first: a kernel that ends processes would still tell their peers."""
        if self._outer is not None:
            self.pull()
            os.kill(self._init(), signal.SIGKILL)
            self._outer.wait()
            self._outer = None

    def pull(self) -> None:
        """Pull the cable, at the other end: the host sees no difference."""
        _do("ip", "-n", self._router, "link", "set", self._port, "down")

    def plug(self) -> None:
        _do("ip", "-n", self._router, "link", "set", self._port, "up")

    def start(self, command: list[str], env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("ab") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            return subprocess.Popen([*self._enter(), *command], env=env, start_new_session=True, cwd="/", **streams)

    def read(self, path: str) -> str:
        """A file that only this host sees."""
        return subprocess.run([*self._enter(), "cat", path], capture_output=True, text=True, check=True).stdout

    def kill(self, pid: int) -> None:
        """A process of this host, by the number that it knows itself by."""
        _do(*self._enter(), "kill", "-9", str(pid))

    def _enter(self) -> list[str]:
        return ["nsenter", f"--target={self._init()}", "--mount", "--uts", "--ipc", "--net", "--pid", "--"]

    def _init(self) -> int:
        assert self._outer is not None, f"{self.name} is switched off"
        return int(subprocess.run(["pgrep", "-P", str(self._outer.pid)], capture_output=True, text=True).stdout.split()[0])

    def _is_up(self) -> bool:
        try:
            command = [*self._enter(), "hostname"]
        except IndexError:
            return False
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() == self.name


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
