"""The loop of a sweep's driver with one worker, here and without Ray; it dies where a test says."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from cluster.sweep_mirror import next_lease
from cluster.trial_desk import Desk
from cluster.trial_run import Exchange, train_trial
from cluster.trial_state import Reserved, TrialSpec, place_of
from medtl_dist.storage import Folder
from medtl_dist.sweep.outcome import Outcome
from medtl_dist.train.warm import Warm


class Second:
    """Stops trial 1 after its second epoch."""

    def recall(self, number: int, epochs: int, val_auc: float | None) -> None: ...

    def hear(self, number: int, epochs: int, val_auc: float | None) -> str | None:
        return "enough" if (number, epochs) == (1, 2) else None


def drive_here(
    folder: Path | Folder, specs: list[TrialSpec], *, die_at: int | None = None, heard: bool = True
) -> list[Outcome]:
    """As ``trial_workers.drive``. ``die_at``: the epoch told, of all, at which the process is gone, as by SIGKILL: after the
    driver has written it down (``heard``), or before."""
    told = 0
    desk = Desk(folder, specs, reserved=Reserved(1.0), stages=lambda _: (0, 5), max_failures=1, rule=Second())
    while (trial := desk.next_for(None)) is not None:
        exchange = Exchange()
        desk.begun(trial.number)
        payload = {
            "config": trial.spec.config.model_dump(mode="json"),
            "folder": f"{place_of(folder).url}/{trial.spec.name}",
            "fence": next_lease(folder, trial.spec.name),
        }
        thread = threading.Thread(
            target=lambda e=exchange, p=payload: e.finish(train_trial(p, e, Warm(keep_epoch_scores=True))), daemon=True
        )
        thread.start()
        while (news := exchange.next())["kind"] == "epoch":
            told += 1
            if told == die_at and not heard:
                os._exit(9)
            stop = desk.heard(trial.number, news["row"])
            if told == die_at:
                os._exit(9)
            exchange.decide(stop)
        thread.join()
        desk.ended(trial.number, news)
    return desk.outcomes()
