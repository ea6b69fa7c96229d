"""The work folder: empty, one holder at a time, gone afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from medtl_dist.data import staging
from medtl_dist.errors import UserError


def test_leftovers_of_a_killed_pack_are_cleared(tmp_path: Path) -> None:
    work = tmp_path / ".set.packing"
    (work / "arrays").mkdir(parents=True)
    (work / "arrays/train_images.npy").touch()
    (work / "index.parquet").touch()
    (work / "elsewhere").symlink_to(tmp_path)
    with staging.work_folder(tmp_path / "set") as folder:
        assert folder == work
        assert [path.name for path in folder.iterdir()] == ["lock"]
    assert list(tmp_path.iterdir()) == []


def test_one_holder_at_a_time_and_the_loser_takes_nothing_away(tmp_path: Path) -> None:
    with staging.work_folder(tmp_path / "set") as folder:
        (folder / "set").mkdir()
        with (
            pytest.raises(UserError, match=r"another process is packing to .*: wait for it, or name another --out"),
            staging.work_folder(tmp_path / "set"),
        ):
            pass
        assert (folder / "set").exists()
        with staging.work_folder(tmp_path / "other"):
            pass
    with staging.work_folder(tmp_path / "set"):
        pass


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our opening the lock file and locking it, its holder finishes and removes it."""
    real = staging.fcntl.flock
    raced = []

    def flock(descriptor: int, operation: int) -> None:
        if not raced:
            raced.append(True)
            (tmp_path / ".set.packing/lock").unlink()
        real(descriptor, operation)

    monkeypatch.setattr(staging.fcntl, "flock", flock)
    with staging.work_folder(tmp_path / "set") as folder:
        assert raced
        with pytest.raises(UserError, match="another process"), staging.work_folder(tmp_path / "set"):
            pass
        assert (folder / "lock").exists()


def test_parents_are_made_and_an_error_clears_up(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError), staging.work_folder(tmp_path / "a/b/set") as folder:
        folder.mkdir()  # it is there already
    assert list((tmp_path / "a/b").iterdir()) == []
