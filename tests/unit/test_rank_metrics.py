"""A rank's numbers of an epoch, and what of them goes to Ray's metrics."""

from __future__ import annotations

import pytest

from cluster import metrics
from medtl_dist.train.clock import Clock


def test_a_ranks_shares_are_of_its_training_time() -> None:
    clock = Clock(num_steps=10, train_s=4.0)
    clock.seconds |= {"data_wait": 1.0, "communication": 0.5, "evaluation": 100.0}
    assert clock.of_rank(8.0) == {
        "rank_images_per_s": 20.0,
        "rank_data_wait_fraction": 0.25,
        "rank_communication_fraction": 0.125,
    }
    assert set(Clock().of_rank(8.0).values()) == {0.0}


def test_only_named_numbers_are_exported_each_with_rank_and_run(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, float, dict[str, str]]] = []

    class Gauge:
        def __init__(self, name: str) -> None:
            self.name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            sent.append((self.name, value, tags))

    monkeypatch.setattr(metrics, "_gauge", Gauge)
    row = Clock(num_steps=1, train_s=1.0).of_rank(8.0) | {"rank_slowness": 1.0, "rank_straggler": 0.0}
    metrics.export({"val_auc": 0.9, "lr": None} | row, rank=3, run="xrays-1")
    assert {name for name, _, _ in sent} == set(metrics.EXPORTED) == set(row)
    assert all(tags == {"rank": "3", "run": "xrays-1"} for _, _, tags in sent)
