"""A trial on several Ray Train workers, as the process that starts them sets it up; Ray itself is not started."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medtl_dist.config import load_config


def test_a_trials_own_process_gives_ray_train_the_clocks_that_a_driver_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster import trial_ddp

    seen: dict[str, str] = {}

    class Trainer:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def fit(self) -> SimpleNamespace:
            seen.update({name: value for name, value in os.environ.items() if name.startswith("RAY_TRAIN_")})
            return SimpleNamespace(return_value={"error": "", "message": ""})

    monkeypatch.setattr(trial_ddp, "TorchTrainer", Trainer)
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # what is set in it here goes with the test
    monkeypatch.setitem(os.environ, "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "7")  # the user's own stays
    config = load_config(preset="smoke", overrides=["train.collective_timeout_s=45", "cluster.num_workers=2"])
    payload = {"config": config.model_dump(mode="json"), "folder": str(tmp_path / "trial"), "gpus_per_worker": 0.0}
    payload |= {"warm_options": {}, "num_sharing": 1, "fence": None}
    assert trial_ddp.train_ddp_trial(payload, trial=None) == {"state": "finished"}
    assert seen["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "1"
    assert seen["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] == "45"
    assert seen["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] == "7"
