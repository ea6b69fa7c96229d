"""A run's growing files on their way to a store."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fake_store import Stores, stores_in

from medtl_dist.config import load_config
from medtl_dist.run import LocalRun
from medtl_dist.train import outbox as outbox_module
from medtl_dist.train.journal import Journal
from medtl_dist.train.outbox import Outbox

URL = "s3://bucket/runs/one"
_NEVER_S = 3600.0


@pytest.fixture
def stores(tmp_path: Path):
    with stores_in(tmp_path / "stores") as found:
        yield found


def _say(outbox: Outbox, name: str, text: str, *, urgent: bool = False) -> None:
    with (outbox.here / name).open("a") as file:
        file.write(text)
    outbox.changed(name, urgent=urgent)


def _soon(look: Callable[[], bool]) -> bool:
    give_up_at = time.monotonic() + 30
    while not look() and time.monotonic() < give_up_at:
        time.sleep(0.01)
    return look()


def test_what_is_urgent_takes_with_it_what_can_wait(stores: Stores) -> None:
    there = stores.path(URL)
    outbox = Outbox(stores.folder(URL), every_s=_NEVER_S)
    _say(outbox, "progress.json", "{}")
    assert not there.exists()
    _say(outbox, "log.jsonl", "a note\n", urgent=True)
    assert _soon(lambda: (there / "log.jsonl").exists() and (there / "progress.json").exists())
    _say(outbox, "log.jsonl", "an epoch\n")
    outbox.close()
    assert (there / "log.jsonl").read_text() == "a note\nan epoch\n"
    assert not outbox.here.exists()


def test_many_urgent_words_are_few_requests(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "_APART_S", _NEVER_S)
    outbox = Outbox(stores.folder(URL), every_s=_NEVER_S)
    for number in range(40):
        _say(outbox, "log.jsonl", f"{number}\n", urgent=True)
        time.sleep(0.002)
    outbox.close()
    assert (stores.path(URL) / "log.jsonl").read_text().splitlines() == [str(number) for number in range(40)]
    assert len(stores.puts) <= 2  # the first, and the last round


@pytest.mark.parametrize("one_of_many", [False, True])
def test_a_runs_notes_are_urgent_and_those_of_one_of_many_are_not(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, one_of_many: bool
) -> None:
    urgent: list[tuple[str, bool]] = []
    monkeypatch.setattr(Outbox, "changed", lambda self, name, *, urgent=False, to=urgent: to.append((name, urgent)))
    run = LocalRun(stores.folder(URL), torch.device("cpu"))
    journal = Journal(run, load_config(preset="smoke"), one_of_many=one_of_many)
    journal.note("resumed")
    journal.epoch({"epoch": 1}, step=1)
    journal.close()
    assert [row for row in urgent if row[0] == "log.jsonl"] == [("log.jsonl", not one_of_many), ("log.jsonl", False)]


def test_a_log_that_the_store_holds_grows_and_what_could_not_be_put_comes_later(stores: Stores) -> None:
    folder = stores.folder(URL)
    folder.put("log.jsonl", b"before\n")
    outbox = Outbox(folder, kept=("log.jsonl", "never.jsonl"), every_s=0.01)
    stores.gone = True
    calls = stores.calls
    _say(outbox, "log.jsonl", "after\n", urgent=True)
    assert _soon(lambda: stores.calls > calls)
    stores.gone = False
    assert _soon(lambda: (stores.path(URL) / "log.jsonl").read_text() == "before\nafter\n")
    outbox.close()
