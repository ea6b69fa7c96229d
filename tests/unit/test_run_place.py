"""Where a run is to be written is asked of the store that its config names, and of no other."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyarrow import fs
from shard_sets import write_set

from medtl_dist.cli.main import run


def test_amazon_is_not_asked_about_a_bucket_of_the_configs_own_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(fs, "resolve_s3_region", asked.append)
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "made-up-here")
    shards = write_set(tmp_path / "set", {"train": [11], "val": [5]}).folder
    nobody = "data.endpoint_url=http://127.0.0.1:9"
    options = (f"data.shards={shards}", nobody, "data.storage_timeout_s=1", "data.storage_retries=0")
    settings = [part for option in options for part in ("--set", option)]
    assert run(["train", "--preset", "smoke", *settings, "--run-dir", "s3://bucket/runs/a"]) == 75
    assert "s3://bucket/runs/a" in capsys.readouterr().err
    assert asked == []
