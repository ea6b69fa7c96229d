"""A local path that not every node of a cluster sees is refused before training starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.shared_folder import _probes, digests, refuse_unshared
from medtl_dist.config import load_config
from medtl_dist.errors import UserError
from medtl_dist.storage import Folder


def test_a_node_that_sees_no_folder_or_another_one_is_named(tmp_path: Path) -> None:
    shards, run = tmp_path / "set", tmp_path / "run"
    for folder in (shards, run):
        folder.mkdir()
    (shards / "dataset.json").write_text("{}")
    config = load_config(overrides=[f"data.shards={shards}"])
    with _probes(config, Folder.local(run)) as paths:
        here = digests(list(paths))
        assert set(paths.values()) == {f"data.shards = {shards}", f"the run folder {run}"}
        assert all(here.values())
        refuse_unshared(paths, here, {"head": here, "gpu-1": dict(here)})
        (probe,) = [path for path in paths if "shared-" in path]
        without = {**here, probe: None}
        with pytest.raises(UserError, match=rf"the run folder {run} is not the same .* \(not on gpu-1, gpu-2\): name"):
            refuse_unshared(paths, here, {"head": here, "gpu-2": without, "gpu-1": without})
        other = {**here, f"{shards}/dataset.json": "0" * 64}
        many = {f"gpu-{number}": other for number in range(7)}
        with pytest.raises(UserError, match=rf"data.shards = {shards} is not .* gpu-4 and 2 more\)"):
            refuse_unshared(paths, here, {"head": here} | many)
        here_absent = dict.fromkeys(paths)
        refuse_unshared(paths, here_absent, {"head": here_absent})  # the driver's own mistake is told elsewhere
    assert list(run.iterdir()) == []


def test_what_lies_in_a_store_needs_no_probe() -> None:
    config = load_config(overrides=["data.shards=s3://bucket/set"])

    class Far:
        remote = True

    with _probes(config, Far()) as paths:  # type: ignore[arg-type]
        assert paths == {}
