"""A Ray cluster of several nodes on this machine, and training commands against it, every process of which can be found.

Every process started here, and all that they start, carries a mark in its environment: what is left over is counted by it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_MARK = "MEDTL_TEST_MARK"


def wait_for(what: str, look: Callable[[], T | None], timeout_s: float = 90.0, every_s: float = 0.02) -> T:
    """What ``look`` returns once it is not None or False. Looks all the time: a fault belongs at a certain step."""
    give_up_at = time.monotonic() + timeout_s
    pause = iter(lambda: every_s, None)
    while time.monotonic() < give_up_at:
        found = look()
        if found is not None and found is not False:
            return found
        time.sleep(next(pause))
    raise AssertionError(f"{what}: not seen within {timeout_s:.0f} s")


@dataclass
class Machine:
    """What one test module starts: one cluster, nodes that come and go, and commands."""

    folder: Path
    mark: str = field(default_factory=lambda: secrets.token_hex(8))
    port: int = 6399
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        token = self.folder / "token"
        if not token.exists():
            token.touch(mode=0o600)
            token.write_text(secrets.token_hex(32))
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MEDTL_TEST"))}
        return kept | {
            _MARK: self.mark, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0",  # else any other load on the machine starves the workers
        }  # fmt: skip

    def start_head(self, cpus: int) -> subprocess.Popen[bytes]:
        return self._start("--head", f"--port={self.port}", "--node-ip-address=127.0.0.1", f"--num-cpus={cpus}")

    def start_node(self, cpus: int, name: str, **environment: str) -> subprocess.Popen[bytes]:
        """A node with a resource of its name, by which it is known to ``node_id``, and with an environment of its own."""
        options = (f"--address={self.address}", f"--num-cpus={cpus}", f'--resources={{"{name}": 1}}')
        node = self._start(*options, **environment)
        wait_for(f"node {name}", lambda: self.node_id(name))
        return node

    def _start(self, *options: str, **environment: str) -> subprocess.Popen[bytes]:
        ray = Path(sys.executable).parent / "ray"
        temp = [f"--temp-dir={self.folder}/ray"] if "--head" in options else []
        command = [
            str(ray),
            "start",
            *options,
            *temp,
            "--block",
            "--disable-usage-stats",
            "--object-store-memory=100000000",
        ]
        with (self.folder / f"node{len(self.nodes)}.log").open("wb") as log:
            node = subprocess.Popen(
                command, env=self.environment() | environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        self.nodes.append(node)
        return node

    def ray(self, code: str) -> str:
        """The last line that ``code`` prints, in a process that is connected to the cluster's control service as ``gcs``."""
        program = f"from ray._raylet import GcsClient\ngcs = GcsClient(address={self.address!r})\n{code}"
        try:
            done = subprocess.run(
                self._python(program), env=self.environment(), capture_output=True, text=True, check=False, timeout=60
            )
        except subprocess.TimeoutExpired:  # not up yet
            return ""
        return done.stdout.strip().splitlines()[-1] if done.returncode == 0 and done.stdout.strip() else ""

    def _python(self, code: str) -> list[str]:
        return [sys.executable, "-c", code]

    def node_id(self, name: str) -> str | None:
        code = (
            "for n in gcs.get_all_node_info().values():\n"
            f"    if n.state == 0 and {name!r} in n.resources_total: print(n.node_id.hex())"
        )
        return self.ray(code) or None

    def drain(self, name: str, deadline_s: int) -> None:
        """Announce that a node will be taken away."""
        deadline_ms = int((time.time() + deadline_s) * 1000)
        done = self.ray(f"print(gcs.drain_node({self.node_id(name)!r}, 2, 'spot', {deadline_ms})[0])")
        assert done == "True", f"drain refused: {done}"

    def kill_node(self, node: subprocess.Popen[bytes]) -> None:
        """Power loss: every process of the node at once. Raylets start workers, so the tree below it is the node."""
        for pid in [node.pid, *tree(node.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        node.wait()

    def train(self, run_dir: Path, *options: str, resume: bool = False) -> Command:
        arguments = self._arguments(run_dir, *options, resume=resume)
        return Command([sys.executable, "-m", "medtl_dist.cli.main", *arguments], self.environment(), run_dir)

    def _arguments(self, run_dir: Path, *options: str, resume: bool) -> list[str]:
        arguments = ["train", "--preset", "smoke", "--run-dir", str(run_dir), *(["--resume"] if resume else [])]
        return arguments + [part for o in (f"cluster.address={self.address}", *options) for part in ("--set", o)]

    def living(self) -> list[int]:
        """Processes that carry the mark, zombies aside."""
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._marked(pid)]

    def _marked(self, pid: int) -> bool:
        with contextlib.suppress(OSError):
            return f"{_MARK}={self.mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return False

    def workers(self) -> list[int]:
        """Processes of Ray Train workers, by the title that Ray gives them."""
        return [pid for pid in self.living() if b"RayTrainWorker" in _title(pid)]

    def close(self) -> None:
        """End all that was started here, by pid."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            give_up_at = time.monotonic() + 5
            for pid in self.living():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            while self.living() and time.monotonic() < give_up_at:
                for node in self.nodes:
                    node.poll()
                time.sleep(0.05)
        for node in self.nodes:
            node.wait(10)
        left = self.living()
        assert not left, f"left over: {[_title(pid) for pid in left]}"


class Command:
    """A training command in a process of its own."""

    look_every_s = 0.02

    def __init__(self, command: list[str], environment: dict[str, str], run_dir: Path) -> None:
        self.run_dir = run_dir
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            stdin=subprocess.DEVNULL,
        )

    def reached(self, step: int) -> bool:
        """Whether a checkpoint of that step or a later one is whole."""
        return any(
            int(place.name) >= step and (place / "manifest.json").exists()
            for place in self.run_dir.glob("checkpoints/*")
            if place.name.isdigit()
        )

    def wait_for_step(self, step: int, timeout_s: float = 90.0) -> None:
        def look() -> bool:
            if self.process.poll() is not None and not self.reached(step):
                raise AssertionError(f"ended early with {self.process.returncode}")
            return self.reached(step)

        try:
            wait_for(f"step {step} of {self.run_dir.name}", look, timeout_s, self.look_every_s)
        except AssertionError as error:
            if self.process.poll() is None:
                self.process.kill()
            raise AssertionError(f"{error}; {self.process.communicate()[1][-2000:]}") from None

    def finish(self, timeout_s: float = 150.0) -> tuple[int, str]:
        """Exit code and standard error."""
        try:
            _, errors = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"hangs; so far: {self.process.communicate()[1][-2000:]}") from None
        return self.process.returncode, errors

    def log(self) -> bytes:
        """The run's own log so far."""
        place = self.run_dir / "log.jsonl"
        return place.read_bytes() if place.exists() else b""

    def notes(self) -> list[str]:
        lines = [json.loads(line) for line in self.log().splitlines()]
        return [line["text"] for line in lines if line.get("kind") == "note"]


def tree(pid: int) -> list[int]:
    """All descendants of a process."""
    children: dict[int, list[int]] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, IndexError):
            parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry))
    found, queue = [], [pid]
    while queue:
        for child in children.get(queue.pop(), []):
            found.append(child)
            queue.append(child)
    return found


def _title(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").strip()
    return b""


@contextlib.contextmanager
def machine(folder: Path) -> Iterator[Machine]:
    one = Machine(folder)
    try:
        yield one
    finally:
        one.close()
