"""What a killed writer leaves is found and removed; what a run needs is never touched."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest
import torch

from medtl_dist.cli.main import run
from medtl_dist.errors import UserError
from medtl_dist.storage import Folder
from medtl_dist.train import checkpoint
from medtl_dist.train.orphans import Entry, Orphan, found_orphans, orphans_among


def whole_run(folder: Path) -> list[str]:
    """Files that a run leaves on purpose; returns their names."""
    place = Folder.local(folder)
    place.write("config.yaml", b"data: {}\n")
    for name in ("log.jsonl", "results.json", "predictions/val.parquet", "events/events.out.tfevents.1"):
        place.write(name, b"x")
    for step in (3, 7):
        checkpoint.save(place, step, weights={"w": torch.ones(1)}, state={}, meta={})
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def leave_orphans(folder: Path) -> None:
    place = Folder.local(folder)
    place.write("checkpoints/00000009/model.safetensors", b"12345")
    place.write("checkpoints/00000009/state.pt.4711.tmp", b"12345")
    (folder / "checkpoints" / "00000011").mkdir()
    place.write("checkpoints/00000007/model.safetensors.4711.tmp", b"123")
    place.write(".report.html.4711", b"12")
    place.write(".ray/attempt-1/driver/state.json", b"1234")
    place.write(".lease/now-00ff", b"")


def test_orphans_are_listed_and_removed_and_the_run_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = whole_run(tmp_path)
    leave_orphans(tmp_path)
    assert run(["runs", "clean", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert "checkpoints/00000009/  checkpoint never completed, 0.0 MiB" in listed
    assert listed.endswith("6 orphans, 0.0 MiB, found; --yes removes them\n")
    assert (tmp_path / "checkpoints" / "00000009").is_dir()
    assert run(["runs", "clean", str(tmp_path), "--yes", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["orphans"]
    assert [(row["name"], row["num_bytes"]) for row in rows] == [
        (".lease/now-00ff", 0),
        (".ray/", 4),
        (".report.html.4711", 2),
        ("checkpoints/00000007/model.safetensors.4711.tmp", 3),
        ("checkpoints/00000009/", 10),
        ("checkpoints/00000011/", 0),
    ]
    after = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert after == sorted([*kept, ".lock"])
    assert not (tmp_path / "checkpoints" / "00000011").exists()


def test_names_decide_also_in_the_parts_of_a_chain() -> None:
    names = {
        "stages/1-a/checkpoints/00000004/model.safetensors": 7,
        "stages/1-a/checkpoints/00000004/meta.json": 1,
        "stages/2-b/checkpoints/00000004-000002/manifest.json": 5,
        "stages/2-b/checkpoints/00000004-000002/model.safetensors": 5,
        "stages/2-b/checkpoints/00000004-000001/model.safetensors": 3,
        "stages/2-b/progress.json.12.tmp": 2,
        "checkpoints/mine/model.safetensors": 9,
        "checkpoints/00000004": 9,
        "notes.tmp": 9,
        "results.json.tmp": 9,
        ".lease/00000003": 9,
        "now-00ff": 9,
    }
    assert sorted(orphans_among(Entry(name, size) for name, size in names.items())) == [
        Orphan("stages/1-a/checkpoints/00000004/", "checkpoint never completed", 8),
        Orphan("stages/2-b/checkpoints/00000004-000001/", "checkpoint never completed", 3),
        Orphan("stages/2-b/progress.json.12.tmp", "temporary file", 2),
    ]


def test_a_folder_in_which_a_process_trains_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"), found_orphans(Folder.local(tmp_path), "me"):
        raise AssertionError
    whole_run(tmp_path)
    leave_orphans(tmp_path)
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is training"), found_orphans(Folder.local(tmp_path), "me"):
            raise AssertionError
    assert (tmp_path / "checkpoints" / "00000009").is_dir()
