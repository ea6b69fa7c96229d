"""How long a fault holds up a training: from the fault until the run's own log says that it goes on."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import datetime

from hosts import Host, Hosts
from nodes import Command, wait_for

AT_STEP = 14  # well under way


@dataclass(frozen=True)
class Recovery:
    """``plain``: seconds that the same fault cost plain Ray Train, on other hosts of this kind."""

    fault: str
    seconds: float
    plain: str


@dataclass
class Clock:
    """From a fault until the run was training again."""

    rows: list[Recovery]
    since: float = 0.0
    before: int = 0

    def start(self, run: Command) -> None:
        """Just before the fault."""
        self.since, self.before = time.time(), len(_resumed(run.log()))

    def lose_a_node(self, network: Hosts, run: Command, fault: str, plain: str = "-") -> None:
        """A host with a worker loses power, host 3 is switched on, and the run goes on."""
        self.start(run)
        network.power_off(host_with_a_worker(network))
        network.power_on(network.hosts[3], cpus=1)
        self.stop(run, fault, plain)

    def stop(self, run: Command, fault: str, plain: str = "-") -> None:
        """Waits for the run to say that it goes on. ``plain``: what the same cost plain Ray Train."""
        said = wait_for("resumption", lambda: _resumed(run.log())[self.before :] or None, 200, run.look_every_s)[0]
        self.rows.append(Recovery(fault, max(0.0, said - self.since), plain))


def _resumed(log: bytes) -> list[float]:
    """When trainings that went on said so, which is earlier than a log in a store shows it."""
    rows = [json.loads(line) for line in log[: log.rfind(b"\n") + 1].splitlines()]  # the last line may still be written
    notes = [row for row in rows if row.get("kind") == "note" and "resumed" in row["text"]]
    return [datetime.fromisoformat(row["time"]).timestamp() for row in notes]


def host_with_a_worker(network: Hosts) -> Host:
    """One of the two: any will do."""
    return max((host for host in network.hosts[1:] if network.workers_on(host)), key=lambda host: host.name)
