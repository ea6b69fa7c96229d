"""`medtl predict` of a set in a real S3 server: the scores of the same set on disk."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from conftest import put
from predict_runs import pack_table, train, write_images
from s3_server import S3Server
from tiny_backbone import tiny_registered

from medtl_dist.data.shards import open_dataset
from medtl_dist.train.predict import PredictOptions, predict

pytestmark = pytest.mark.store


def test_a_set_in_a_store_scores_as_on_disk(
    tmp_path: Path, address: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    with tiny_registered():
        shards = pack_table(write_images(tmp_path / "images"), tmp_path / "set")
        run = train(shards, tmp_path / "run")
        put(open_dataset(shards), address, s3)
        options = PredictOptions(part_size=16)
        predict(run, str(shards), tmp_path / "disk.parquet", options)
        outcome = predict(run, address, tmp_path / "store.parquet", options)
    assert outcome.scored == 48
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "store.parquet"), pd.read_parquet(tmp_path / "disk.parquet"), check_exact=True
    )
