"""Where a sweep's workers keep frozen layers' outputs on their node: private, found again, gone with the sweep. No Ray."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from cluster.node_cache import NodeFolder, cache_place, on_this_node
from cluster.trial_ddp import work
from cluster.trial_run import Exchange
from cluster.trial_workers import TrialWorker
from cluster.tune import warm_options
from medtl_dist.cli.train import with_absolute_paths
from medtl_dist.config import load_config
from medtl_dist.errors import UserError


def test_on_this_machine_s_own_cluster_it_lies_in_the_sweep_s_folder_else_on_each_node(tmp_path: Path) -> None:
    assert cache_place(tmp_path, None, own_cluster=True) == tmp_path / "cache"
    far = cache_place(tmp_path, None, own_cluster=False)
    assert isinstance(far, NodeFolder)
    assert far.base is None
    assert far == cache_place(tmp_path, None, own_cluster=False)  # found again by --resume
    assert far != cache_place(tmp_path / "other", None, own_cluster=False)
    for own_cluster in (True, False):
        named = cache_place(tmp_path, "/scratch", own_cluster=own_cluster)
        assert isinstance(named, NodeFolder)
        assert named.path == Path("/scratch") / f"medtl-{os.geteuid()}" / far.name


def test_it_follows_the_node_s_own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver makes it, a node asks it."""
    place = NodeFolder("one")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    made = place.made()
    assert made == tmp_path / "scratch" / f"medtl-{os.geteuid()}" / "one"
    assert [place.stat().st_mode & 0o777 for place in (made, made.parent)] == [0o700, 0o700]
    assert place.made() == made


def test_it_is_removed_and_another_sweep_s_stays(tmp_path: Path) -> None:
    one, other = NodeFolder("one", str(tmp_path)), NodeFolder("other", str(tmp_path))
    for place in (one, other):
        (place.made() / "data.bin").write_bytes(b"1")
    one.remove()
    one.remove()
    assert not one.path.exists()
    assert (other.path / "data.bin").exists()
    other.remove()
    assert list(tmp_path.iterdir()) == []


def _link(place: Path) -> None:
    (place.parent.parent / "elsewhere").mkdir(mode=0o700)
    place.symlink_to(place.parent.parent / "elsewhere")


@pytest.mark.parametrize("level", ["user", "sweep"])
@pytest.mark.parametrize("made_by", [lambda place: place.mkdir(mode=0o755), _link, lambda place: place.write_text("")])
def test_a_place_that_others_may_write_to_is_refused(level: str, made_by: Any, tmp_path: Path) -> None:
    """A temporary folder is everybody's: who got there first could have put numbers into it."""
    place = NodeFolder("one", str(tmp_path))
    target = place.path.parent if level == "user" else place.path
    target.parent.mkdir(mode=0o700, exist_ok=True)
    made_by(target)
    with pytest.raises(UserError, match=r"tune\.prefix_cache_dir"):
        place.made()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_another_user_s_folder_is_refused(tmp_path: Path) -> None:
    place = NodeFolder("one", str(tmp_path))
    os.chown(place.made(), 65534, 65534)
    with pytest.raises(UserError, match="not a folder of this user alone"):
        place.made()


def test_workers_are_given_a_folder_of_their_node_or_none_where_it_is_off(tmp_path: Path) -> None:
    place = NodeFolder("one", str(tmp_path))
    config = load_config(preset="smoke")
    assert on_this_node(warm_options(config, place))["cache_dir"] == place.path
    assert place.path.is_dir()
    place.remove()
    off = load_config(preset="smoke", overrides=["tune.prefix_cache=off"])
    assert on_this_node(warm_options(off, place))["cache_dir"] is None
    assert not place.path.exists()
    assert on_this_node({"cache_dir": tmp_path / "cache"}) == {"cache_dir": tmp_path / "cache"}
    assert on_this_node({}) == {}


def test_a_trial_on_a_node_without_such_a_place_fails_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / f"medtl-{os.geteuid()}").write_text("")
    options = {"cache_dir": NodeFolder("one", str(tmp_path))}
    end = TrialWorker(options)._train({"num_sharing": 1}, Exchange())
    assert end["state"] == "failed"
    assert "tune.prefix_cache_dir" in end["message"]
    payload = {"warm_options": options, "folder": str(tmp_path), "attempt": "a", "trial": None, "num_sharing": 1}
    status = work(payload)
    assert (status["error"], status["message"]) == ("UserError", end["message"])


@pytest.mark.parametrize("word", ["auto", "on", "off"])
def test_the_cache_is_switched_by_words_that_yaml_has_a_meaning_for(word: str) -> None:
    config = load_config(preset="smoke", overrides=[f"tune.prefix_cache={word}"])
    assert config.tune.prefix_cache == word
    assert f"prefix_cache: {word}" in config.to_yaml().replace("'", "")


def test_the_place_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = with_absolute_paths(load_config(preset="smoke", overrides=["tune.prefix_cache_dir=scratch"]))
    assert config.tune.prefix_cache_dir == str(tmp_path / "scratch")
