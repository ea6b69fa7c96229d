"""Hosts on one machine: network namespaces on a bridge, each with its own processes, Ray folder and shared memory.

A host can lose power (every process of its pid namespace at once) and its network cable. Needs root and iproute2; no packet
leaves the bridge, which has no way out.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nodes import Command, Machine, tree, wait_for

# Where each host's Ray keeps its sockets and logs: one path, a memory disk of its own on every host. Short, for the sockets.
_RAY_FOLDER = Path("/tmp/medtl-hosts-ray")


def missing() -> str | None:
    """What this machine lacks for hosts, if anything."""
    if os.geteuid() != 0:
        return "namespaces need root"
    for program in ("ip", "unshare", "nsenter", "mount"):
        if shutil.which(program) is None:
            return f"there is no program {program} (Debian: iproute2, util-linux, mount)"
    return None


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@dataclass
class Host:
    """A network namespace with an address; ``node`` while a Ray node runs on it."""

    name: str
    ip: str
    port: str  # its end of the cable in the switch
    node: subprocess.Popen[bytes] | None = None

    @property
    def first_pid(self) -> int:
        """Its process 1, seen from outside."""
        assert self.node is not None
        return wait_for(f"{self.name} to start", lambda: next(iter(tree(self.node.pid)), None) if self.node else None)

    def inside(self, *command: str) -> list[str]:
        """The command as it is run on the host: it sees the host's network, processes and Ray, and dies with its power."""
        return ["nsenter", "-t", str(self.first_pid), "--net", "--mount", "--pid", "--", *command]


@dataclass
class Hosts(Machine):
    """Hosts on a switch, host 0 with the head."""

    hosts: list[Host] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{self.hosts[0].ip}:6379"

    @property
    def _switch(self) -> str:
        return f"medtl{self.mark[:4]}sw"

    def environment(self) -> dict[str, str]:
        return super().environment() | {"GLOO_SOCKET_IFNAME": "eth0"}

    def build(self, count: int) -> None:
        _run("ip", "netns", "add", self._switch)
        _run("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", self._switch, "link", "set", "br0", "up")
        _RAY_FOLDER.mkdir(mode=0o700, exist_ok=True)
        for number in range(count):
            host = Host(f"medtl{self.mark[:4]}h{number}", f"10.98.0.{10 + number}", f"port{number}")
            self.hosts.append(host)
            _run("ip", "netns", "add", host.name)
            _run("ip", "-n", host.name, "link", "set", "lo", "up")
            _run(
                "ip",
                "-n",
                self._switch,
                "link",
                "add",
                host.port,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                host.name,
            )
            _run("ip", "-n", host.name, "addr", "add", f"{host.ip}/24", "dev", "eth0")
            _run("ip", "-n", host.name, "link", "set", "eth0", "up")
            _run("ip", "-n", host.name, "route", "add", "default", "dev", "eth0")  # how Ray finds its own address
            _run("ip", "-n", self._switch, "link", "set", host.port, "master", "br0", "up")

    def power_on(self, host: Host, cpus: int) -> None:
        """Start the host's Ray node: the head on host 0, else a worker node known by the host's name."""
        head = host is self.hosts[0]
        where = ["--head", "--port=6379", f"--dashboard-host={host.ip}"] if head else [f"--address={self.address}"]
        ray = [
            str(Path(sys.executable).parent / "ray"), "start", *where, f"--node-ip-address={host.ip}", f"--num-cpus={cpus}",
            f'--resources={{"{host.name}": 1}}', f"--temp-dir={_RAY_FOLDER}", "--object-store-memory=80000000",
            "--disable-usage-stats", "--block",
        ]  # fmt: skip
        own_places = f"mount -t tmpfs tmpfs {_RAY_FOLDER} && mount -t tmpfs tmpfs /dev/shm"
        command = [
            "ip",
            "netns",
            "exec",
            host.name,
            "unshare",
            "--pid",
            "--mount",
            "--fork",
            "--kill-child=KILL",
            "--mount-proc",
        ]
        with (self.folder / f"{host.name}.log").open("ab") as log:
            host.node = subprocess.Popen(
                [*command, "sh", "-c", f'{own_places} && exec "$@"', "ray", *ray],
                env=self.environment(), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        self.nodes.append(host.node)
        wait_for(f"the node on {host.name}", lambda: self.node_id(host.name))

    def power_off(self, host: Host) -> None:
        """Every process of the host at once: its process 1 is gone, and with it the whole namespace."""
        if host.node is not None and host.node.poll() is None:  # a node that was drained may have ended by itself
            os.kill(host.first_pid, signal.SIGKILL)
            host.node.wait()
        host.node = None

    def plug(self, host: Host, *, plugged: bool) -> None:
        """The network cable."""
        _run("ip", "-n", self._switch, "link", "set", host.port, "up" if plugged else "down")

    def _python(self, code: str) -> list[str]:
        return self.hosts[0].inside(sys.executable, "-c", code)

    def train_on(self, host: Host, run_dir: Path, *options: str, resume: bool = False) -> Command:
        """A driver on the host; its process is nsenter, the command itself a child of it."""
        arguments = self._arguments(run_dir, *options, resume=resume)
        return Command(
            host.inside(sys.executable, "-m", "medtl_dist.cli.main", *arguments), self.environment(), run_dir
        )

    def workers_on(self, host: Host) -> list[int]:
        ours = set(tree(host.node.pid)) if host.node is not None else set()
        return [pid for pid in self.workers() if pid in ours]

    def close(self) -> None:
        for host in self.hosts:
            self.power_off(host)
        super().close()
        for name in (*(host.name for host in self.hosts), self._switch):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        with contextlib.suppress(OSError):
            _RAY_FOLDER.rmdir()


@contextlib.contextmanager
def hosts(folder: Path, count: int) -> Iterator[Hosts]:
    some = Hosts(folder)
    try:
        some.build(count)
        yield some
    finally:
        some.close()
