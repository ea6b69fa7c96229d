"""Hosts on one machine: network namespaces on a bridge, each with its own processes, Ray folder and shared memory.

A host can lose power (every process of its pid namespace at once) and its network cable. Needs root and iproute2; no packet
leaves the bridge, which has no way out. Beside it lie a host with an S3 server, and an outside from which nothing of the
cluster is reached but that server and, by a relay on its host, the head's job server.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nodes import Command, Machine, tree, wait_for
from probe import OF_ITS_OWN
from relay import End, relayed
from s3_server import ACCESS_KEY, SECRET_KEY, S3Server, running_s3

# Where each host's Ray keeps its sockets and logs: one path, a memory disk of its own on every host. Short, for the sockets.
_RAY_FOLDER = Path("/tmp/medtl-hosts-ray")
_STORE_IP, _S3_PORT, _API_PORT = "10.98.0.9", 8333, 8265  # the last is Ray's own
S3_URL = f"http://{_STORE_IP}:{_S3_PORT}"
API_URL = f"http://{_STORE_IP}:{_API_PORT}"


def _run(*command: str) -> None:
    """A command in pieces, of which each may hold several words."""
    words = [word for piece in command for word in shlex.split(piece)]
    subprocess.run(words, check=True, capture_output=True, text=True)


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

    @property
    def _store(self) -> str:
        return f"medtl{self.mark[:4]}s3"

    @property
    def _outside(self) -> str:
        return f"medtl{self.mark[:4]}out"

    def environment(self) -> dict[str, str]:
        found = super().environment()
        found = {name: value for name, value in found.items() if not name.startswith("AWS_")}
        path = os.pathsep.join((str(Path(sys.executable).parent), found.get("PATH", os.defpath)))  # jobs call `python`
        return found | {
            "PATH": path, "GLOO_SOCKET_IFNAME": "eth0", "AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip

    def build(self, count: int) -> None:
        _run("ip netns add", self._switch)
        _run("ip -n", self._switch, "link add br0 type bridge")
        _run("ip -n", self._switch, "link set br0 up")
        _RAY_FOLDER.mkdir(mode=0o700, exist_ok=True)
        for number in range(count):
            host = Host(f"medtl{self.mark[:4]}h{number}", f"10.98.0.{10 + number}", f"port{number}")
            self.hosts.append(host)
            self._connect(host.name, host.ip, host.port)
            _run("ip -n", host.name, "route add default dev eth0")  # how Ray finds its own address
        self._connect(self._store, _STORE_IP, "ports3")
        _run("ip netns add", self._outside)
        _run("ip -n", self._outside, "link add eth0 type veth peer name eth1 netns", self._store)
        for name, device, ip in ((self._outside, "eth0", "10.97.0.2/24"), (self._store, "eth1", "10.97.0.1/24")):
            _run("ip -n", name, f"addr add {ip} dev {device}")
            _run("ip -n", name, f"link set {device} up")
        _run("ip -n", self._outside, f"route add {_STORE_IP} dev eth0")
        _run("ip netns exec", self._store, "sh -c 'echo 0 > /proc/sys/net/ipv4/ip_forward'")

    def _connect(self, name: str, ip: str, port: str) -> None:
        """A namespace with a cable to the switch."""
        _run("ip netns add", name)
        _run("ip -n", name, "link set lo up")
        _run("ip -n", self._switch, f"link add {port} type veth peer name eth0 netns", name)
        _run("ip -n", name, f"addr add {ip}/24 dev eth0")
        _run("ip -n", name, "link set eth0 up")
        _run("ip -n", self._switch, f"link set {port} master br0 up")

    @contextlib.contextmanager
    def store(self) -> Iterator[S3Server]:
        """The S3 server on its host, as it is reached from here, and the way from outside to the head's job server."""
        on_host = ("ip", "netns", "exec", self._store)
        with (
            relayed(End("127.0.0.1", 0), End(_STORE_IP, _S3_PORT, self._store)) as port,
            relayed(End(_STORE_IP, _API_PORT, self._store), End(self.hosts[0].ip, _API_PORT, self._store)),
            running_s3(self.folder / "s3", inside=on_host, listen=(_STORE_IP, _S3_PORT), seen_at=port) as server,
        ):
            yield server

    def outside(self, *command: str) -> list[str]:
        """The command as it is run outside of the cluster, in :meth:`environment_outside`."""
        return ["ip", "netns", "exec", self._outside, *command]

    def environment_outside(self) -> dict[str, str]:
        """Nothing there knows of Ray: the token's file is named on the command line."""
        here = {name: value for name, value in self.environment().items() if not name.startswith("RAY_")}
        return here | {"HOME": str(self.folder)}

    @property
    def token_file(self) -> Path:
        return self.folder / "token"

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
        command = ["ip", "netns", "exec", host.name, *OF_ITS_OWN]
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
        _run("ip -n", self._switch, "link set", host.port, "up" if plugged else "down")

    def _python(self, code: str) -> list[str]:
        return self.hosts[0].inside(sys.executable, "-c", code)

    def train_on(self, host: Host, run_dir: Path, *options: str, resume: bool = False) -> Command:
        """A driver on the host; its process is nsenter, the command itself a child of it."""
        return self.medtl_on(host, run_dir, *self._arguments(run_dir, *options, resume=resume))

    def medtl_on(self, host: Host, run_dir: Path, *arguments: str) -> Command:
        """A command on the host, and the run folder in which to look how it does."""
        command = host.inside(sys.executable, "-m", "medtl_dist.cli.main", *arguments)
        return Command(command, self.environment(), run_dir)

    def workers_on(self, host: Host) -> list[int]:
        ours = set(tree(host.node.pid)) if host.node is not None else set()
        return [pid for pid in self.workers() if pid in ours]

    def driver(self) -> int:
        """The one process on the head that a submitted job is: its entrypoint, whose shell and supervisor live on."""
        assert self.hosts[0].node is not None
        found = [pid for pid in tree(self.hosts[0].node.pid) if _is_entrypoint(pid)]
        assert len(found) == 1, found
        return found[0]

    def close(self) -> None:
        for host in self.hosts:
            self.power_off(host)
        super().close()
        for name in (*(host.name for host in self.hosts), self._outside, self._store, self._switch):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        with contextlib.suppress(OSError):
            _RAY_FOLDER.rmdir()


def _is_entrypoint(pid: int) -> bool:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return words[1:3] == [b"-m", b"medtl_dist.cli.job_entry"]
    return False


@contextlib.contextmanager
def hosts(folder: Path, count: int) -> Iterator[Hosts]:
    some = Hosts(folder)
    try:
        some.build(count)
        yield some
    finally:
        some.close()
