"""How long a fault holds up a training: from the fault until the run's own log says that it goes on."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from datetime import datetime

from hosts import Host, Hosts
from nodes import Command, wait_for

AT_STEP = 14


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
    since: float = field(default_factory=time.time)

    def start(self) -> None:
        self.since = time.time()

    def stop(self, run: Command, what: str, plain: str = "-") -> None:
        """Waits for the run to say that it goes on. ``plain``: what the same cost plain Ray Train."""
        said = wait_for("resumption", lambda: _resumed(run.log()), 200)
        self.rows.append(Recovery(what, max(0.0, said - self.since), plain))


def _resumed(log: bytes) -> float | None:
    """When a training that went on said so: a log in a store comes there seconds later."""
    rows = [json.loads(line) for line in log.splitlines()]
    times = [row["time"] for row in rows if row.get("kind") == "note" and "resumed" in row["text"]]
    return datetime.fromisoformat(times[-1]).timestamp() if times else None


def host_of_rank_1(network: Hosts, run: Command) -> Host:
    """A host with a worker, once the run is well under way; without the driver's controller: any of the two workers' will do."""
    run.wait_for_step(AT_STEP)
    return max((host for host in network.hosts[1:] if network.workers_on(host)), key=lambda host: host.name)
