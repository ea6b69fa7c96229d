"""A Ray cluster of several nodes on this machine: its processes started, watched, and ended by their ids.

Loopback only, and with a token of its own in a file that only this user can read: a job server runs code for whoever reaches
it. Nodes are real raylets with object stores of their own; what they share is the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cluster.job_api import JobServer, Server
from medtl_dist.errors import Interrupted, UserError

MAX_NODES = 64
_HOST = "127.0.0.1"
_START_S = 90.0
_END_S = 15.0
_OBJECT_STORE_BYTES = 100_000_000  # metrics only go through it


@dataclass(frozen=True)
class LocalCluster:
    """``address`` of the job server, ``gcs_address`` for ``ray.init``, ``token_file``, and the process ids of the nodes."""

    address: str
    gcs_address: str
    token_file: Path
    pids: tuple[int, ...]

    def alive(self) -> bool:
        """Whether every node's process still runs."""
        return all((fields := _fields(pid)) is not None and fields[0] != "Z" for pid in self.pids)


@contextlib.contextmanager
def local_cluster(nodes: int, *, cpus_per_node: int = 1, gpus_per_node: int = 0) -> Iterator[LocalCluster]:
    """A cluster that ends, with every process of it, when the block does.

    Raises:
        UserError: numbers that make no cluster.
        Interrupted: a node did not come up; the end of Ray's own message is in the error.
    """
    if not 1 <= nodes <= MAX_NODES or cpus_per_node < 1 or gpus_per_node < 0:
        raise UserError(
            f"--nodes {nodes} --cpus-per-node {cpus_per_node} --gpus-per-node {gpus_per_node}: expected 1 to {MAX_NODES} nodes, "
            "1 or more CPUs, 0 or more GPUs."
        )
    folder = Path(tempfile.mkdtemp(prefix="medtl-"))  # mode 0700; short, since Ray puts sockets into it
    started: list[subprocess.Popen[bytes]] = []
    try:
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32), encoding="ascii")
        gcs, dashboard, *ports = _free_ports(2 + 3 * nodes)
        with (folder / "nodes.log").open("wb") as log:
            size = ["--num-cpus", str(cpus_per_node), "--num-gpus", str(gpus_per_node)]
            for number in range(nodes):
                head = ["--head", "--port", str(gcs), "--dashboard-host", _HOST, "--dashboard-port", str(dashboard)]
                head += ["--include-dashboard", "true", "--temp-dir", str(folder / "ray")]
                place = ["--address", f"{_HOST}:{gcs}"] if number else head
                agent = [
                    part
                    for option, port in zip(_AGENT_PORTS, ports[3 * number : 3 * number + 3], strict=True)
                    for part in (option, str(port))
                ]
                started.append(_start([*place, *size, *agent], token, log))
                if number == 0:
                    _await(JobServer(Server(f"http://{_HOST}:{dashboard}", token.read_text())), 1, started, log.name)
            server = JobServer(Server(f"http://{_HOST}:{dashboard}", token.read_text()))
            _await(server, nodes, started, log.name)
            yield LocalCluster(
                f"http://{_HOST}:{dashboard}", f"{_HOST}:{gcs}", token, tuple(process.pid for process in started)
            )
    finally:
        _end(started)
        shutil.rmtree(folder, ignore_errors=True)


# Ray turns 127.0.0.1 into the machine's outer address, and its agents then listen there, the metrics server without a token.
# This variable, meant for other systems, keeps every process on the loopback, but makes `ray start` refuse a second node: so
# the one process that starts a node is told otherwise.
_OWN_MACHINE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_ON_LOOPBACK = f"""
from ray._private import ray_constants, services
ray_constants.ENABLE_RAY_CLUSTER = True
services.get_node_ip_address = lambda address=None: {_HOST!r}
from ray.scripts.scripts import main
main()
"""
_AGENT_PORTS = ("--dashboard-agent-listen-port", "--dashboard-agent-grpc-port", "--runtime-env-agent-port")


def _start(options: list[str], token: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        _OWN_MACHINE: "0",
        "PATH": os.pathsep.join(
            (str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))
        ),  # jobs call `python`
    }
    command = [sys.executable, "-c", _ON_LOOPBACK, "start", "--block", "--node-ip-address", _HOST]
    command += [
        "--object-store-memory",
        str(_OBJECT_STORE_BYTES),
        "--disable-usage-stats",
        "--log-color",
        "false",
        *options,
    ]
    # A session of its own: Ctrl-C at the terminal reaches this process, which ends the nodes in order.
    return subprocess.Popen(
        command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
    )


def _await(server: JobServer, nodes: int, started: list[subprocess.Popen[bytes]], log: str) -> None:
    """Until the dashboard knows ``nodes`` living nodes. Raises Interrupted where a node has ended or time is up."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if any(process.poll() is not None for process in started):
            break
        with contextlib.suppress(Interrupted, UserError):
            if len(living_nodes(server)) >= nodes:
                return
        time.sleep(0.3)
    lines = [line for line in Path(log).read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    raise Interrupted(
        f"the local cluster's {nodes} nodes did not come up within {_START_S:.0f} s: " + " ".join(lines[-3:])[:400]
    )


def living_nodes(server: JobServer) -> list[str]:
    """The ids of the cluster's living nodes, as its dashboard knows them."""
    tree = json.loads(server.request("GET", "/nodes?view=summary")[1])
    return [
        str(node["raylet"]["nodeId"])
        for node in tree["data"]["summary"]
        if (node.get("raylet") or {}).get("state") == "ALIVE" and node["raylet"].get("nodeId")
    ]


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now; held together while they are chosen, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((_HOST, 0))
        return [each.getsockname()[1] for each in sockets]


def _end(started: list[subprocess.Popen[bytes]]) -> None:
    """End the nodes and everything they started: asked first, killed after a while; the head last."""
    for process in reversed(started):
        family = _family(process.pid)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _END_S
        while (process.poll() is None or any(map(_lives, family))) and time.monotonic() < deadline:
            time.sleep(0.1)
        for member in filter(_lives, family):
            with contextlib.suppress(ProcessLookupError):
                os.kill(member[0], signal.SIGKILL)
        process.wait()


def _family(pid: int) -> list[tuple[int, str]]:
    """The process and all below it, each with the time of its start: an id used again by a stranger is not one of them."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        fields = _fields(int(entry.name)) if entry.name.isdecimal() else None
        if fields is not None:
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, wave = [], [pid]
    while wave:
        found += [(member, fields[19]) for member in wave if (fields := _fields(member)) is not None]
        wave = [child for member in wave for child in parents.get(member, [])]
    return found


def _lives(member: tuple[int, str]) -> bool:
    fields = _fields(member[0])
    return fields is not None and fields[0] != "Z" and fields[19] == member[1]


def _fields(pid: int) -> list[str] | None:
    """What follows the command's name in /proc/PID/stat: state, parent, …, at 19 the time of its start; None: it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
