from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from medtl_dist.errors import DataError
from medtl_dist.run import Folder
from medtl_dist.train import checkpoint


def _save(folder: Folder, step: int, value: float = 0.0) -> None:
    checkpoint.save(
        folder,
        step,
        weights={"w": torch.full((3,), value), "still": torch.ones(1)},
        state={"lr": 0.5, "t": torch.arange(2)},
        meta={"epoch": step},
        frozen=["still"],
    )


def test_what_was_saved_is_loaded(tmp_path) -> None:
    folder = Folder.local(tmp_path)
    _save(folder, 7, value=2.5)
    weights, state, meta = checkpoint.load(folder, 7)
    assert weights["w"].tolist() == [2.5] * 3
    assert state["t"].tolist() == [0, 1]
    assert meta == {"epoch": 7}


def _save_partly_frozen(
    folder: Folder, step: int, weights: dict[str, torch.Tensor], before: checkpoint.Frozen | None
) -> checkpoint.Frozen | None:
    return checkpoint.save(
        folder, step, weights=weights, state={}, meta={"epoch": step}, frozen=["body.w", "body.n"], before=before
    )


@pytest.mark.parametrize("links", [True, False])
def test_what_is_frozen_is_written_once_and_is_in_every_checkpoint(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder.local(tmp_path)
    weights = {"body.w": torch.arange(4.0), "body.n": torch.tensor(3), "head": torch.zeros(2)}
    if not links:
        monkeypatch.setattr(os, "link", Mock(side_effect=OSError(errno.EPERM, "no links here")))
    before = _save_partly_frozen(folder, 1, weights, None)
    for step in (2, 3):
        weights["head"] += 1
        before = _save_partly_frozen(folder, step, weights, before)
    places = [tmp_path / "checkpoints" / f"{step:08d}" for step in (1, 2, 3)]
    assert len({(place / "frozen.safetensors").stat().st_ino for place in places}) == (1 if links else 3)
    for step in (1, 2, 3):
        found, _, _ = checkpoint.load(folder, step)
        assert {name: tensor.tolist() for name, tensor in found.items()} == {
            "body.w": [0.0, 1.0, 2.0, 3.0], "body.n": 3, "head": [step - 1.0] * 2
        }  # fmt: skip
    checkpoint.retain(folder, best=None, newest=3)
    assert checkpoint.latest(folder, pytest.fail) == 3
    assert checkpoint.steps(folder) == [2, 3]


def test_frozen_weights_that_have_changed_after_all_are_written_anew(tmp_path: Path) -> None:
    folder = Folder.local(tmp_path)

    def body(step: int) -> list[float]:
        return checkpoint.load(folder, step)[0]["body.w"].tolist()

    weights = {"body.w": torch.zeros(3), "body.n": torch.tensor(3), "head": torch.zeros(2)}
    before = _save_partly_frozen(folder, 1, weights, None)
    weights["body.w"].view(-1)[0] = 5  # through another tensor of the same memory
    before = _save_partly_frozen(folder, 2, weights, before)
    assert (body(1), body(2)) == ([0.0, 0.0, 0.0], [5.0, 0.0, 0.0])
    weights["body.w"] = torch.full((3,), 7.0)
    before = _save_partly_frozen(folder, 3, weights, before)
    assert body(3) == [7.0, 7.0, 7.0]
    (tmp_path / "checkpoints" / "00000003" / "frozen.safetensors").unlink()
    before = _save_partly_frozen(folder, 4, weights, before)
    assert body(4) == [7.0, 7.0, 7.0]
    before = _save_partly_frozen(folder, 4, weights, before)  # the same step again: its own folder goes first
    assert body(4) == [7.0, 7.0, 7.0]
    learned = checkpoint.save(folder, 5, weights=weights, state={}, meta={}, before=before)
    assert learned is None
    assert not (tmp_path / "checkpoints" / "00000005" / "frozen.safetensors").exists()
    assert body(5) == [7.0, 7.0, 7.0]


def test_a_checkpoint_of_before_is_still_read(tmp_path: Path) -> None:
    folder = Folder.local(tmp_path)
    _save(folder, 1, value=2.0)
    manifest = tmp_path / "checkpoints" / "00000001" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 2', '"format_version": 1'))
    assert checkpoint.load(folder, 1)[0]["w"].tolist() == [2.0] * 3


@pytest.mark.parametrize("name", ["model.safetensors", "frozen.safetensors", "state.pt", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_checkpoint_is_passed_over_loudly_for_the_next_older(tmp_path, name: str, damage: str) -> None:
    folder = Folder.local(tmp_path)
    _save(folder, 1)
    _save(folder, 2)
    victim = tmp_path / "checkpoints" / "00000002" / name
    data = bytearray(victim.read_bytes())
    if damage == "delete":
        victim.unlink()
    else:
        data[len(data) // 2] ^= 1
        victim.write_bytes(bytes(data[: len(data) // 2]) if damage == "cut" else bytes(data))
    warnings: list[str] = []
    assert checkpoint.latest(folder, warnings.append) == 1
    assert len(warnings) == 1
    assert name in warnings[0]


def test_without_its_manifest_it_is_not_a_checkpoint(tmp_path) -> None:
    folder = Folder.local(tmp_path)
    _save(folder, 1)
    (tmp_path / "checkpoints" / "00000001" / "manifest.json").unlink()
    warnings: list[str] = []
    assert checkpoint.latest(folder, warnings.append) is None
    assert "never completed" in warnings[0]
    _save(folder, 1, value=1.0)  # a remnant does not stand in the way
    assert checkpoint.latest(folder, warnings.append) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": 1}', '{"format_version": 99, "files": {}}'])
def test_a_bad_manifest_is_an_error_that_names_it(tmp_path, text: str) -> None:
    folder = Folder.local(tmp_path)
    _save(folder, 3)
    (tmp_path / "checkpoints" / "00000003" / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="00000003"):
        checkpoint.verify(folder, 3)


class _Canary:
    def __reduce__(self):
        return (print, ("code ran",))


def test_nothing_in_a_checkpoint_runs_code(tmp_path, monkeypatch, capsys) -> None:
    folder = Folder.local(tmp_path)
    monkeypatch.setattr(
        checkpoint.torch, "save", lambda state, buffer: buffer.write(pickle.dumps(_Canary(), protocol=2))
    )
    _save(folder, 1)
    with pytest.raises(DataError, match="can't be loaded"):
        checkpoint.load(folder, 1)
    assert "code ran" not in capsys.readouterr().out


def test_best_and_the_last_two_are_kept(tmp_path) -> None:
    folder = Folder.local(tmp_path)
    for step in (1, 2, 3, 4, 5):
        _save(folder, step)
        checkpoint.retain(folder, best=2 if step >= 2 else None, newest=step)
    assert checkpoint.steps(folder) == [2, 4, 5]


def test_damaged_newer_folders_are_not_among_the_last_two(tmp_path) -> None:
    folder = Folder.local(tmp_path)
    for step in (2, 4, 8, 9):
        _save(folder, step)
    for step in (8, 9):
        (tmp_path / "checkpoints" / f"{step:08d}" / "state.pt").unlink()
    assert checkpoint.latest(folder, lambda _: None) == 4
    _save(folder, 5)  # the run went on from 4
    checkpoint.retain(folder, best=2, newest=5)
    assert checkpoint.steps(folder) == [2, 4, 5]


def test_a_failed_write_leaves_the_earlier_checkpoint_and_no_part(tmp_path, monkeypatch) -> None:
    folder = Folder.local(tmp_path)
    _save(folder, 1)

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medtl_dist.storage.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        _save(folder, 2)
    monkeypatch.undo()
    assert checkpoint.latest(folder, lambda _: None) == 1
    assert not list(tmp_path.rglob("*.tmp"))
