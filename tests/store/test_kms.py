"""A bucket that refuses what is written without the header of one KMS key, behind which a real server encrypts."""

from __future__ import annotations

import pickle
from pathlib import Path

import botocore.session
import pytest
from conftest import assert_links
from dying_runs import assert_same_bits
from faulty_proxy import Fault, Proxy, Request
from s3_server import S3Server
from shard_sets import write_set
from stored_runs import copied

from medtl_dist.cli.main import run
from medtl_dist.create_only import create
from medtl_dist.demo_data import write_demo_images
from medtl_dist.errors import Interrupted, UserError
from medtl_dist.storage import Folder, StorageOptions
from medtl_dist.store_folder import StoreFolder, store_folder

KEY = "alias/medtl-tests"

pytestmark = [pytest.mark.store, pytest.mark.usefixtures("tiny_by_proxy")]


def without_the_key(request: Request) -> Fault | None:
    writes = request.method in ("PUT", "POST")
    return Fault("403") if writes and (request.encryption, request.key) != ("aws:kms", KEY) else None


@pytest.fixture
def guarded(proxy: Proxy) -> Proxy:
    proxy.choose = without_the_key
    return proxy


@pytest.fixture
def keyed(place: str, guarded: Proxy) -> StoreFolder:
    return store_folder(place, StorageOptions(endpoint_url=guarded.url, kms_key=KEY, retries=2))


def encryption_of_all(s3: S3Server, folder: StoreFolder) -> dict[str, str | None]:
    """The key of each object below a run folder, as the server names it."""
    client = botocore.session.Session().create_client("s3", region_name="us-east-1", endpoint_url=s3.url)
    bucket, _, prefix = folder.path.partition("/")
    names = [row["Key"] for row in client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")["Contents"]]
    heads = {name.removeprefix(f"{prefix}/"): client.head_object(Bucket=bucket, Key=name) for name in names}
    return {name: head.get("SSEKMSKeyId") for name, head in heads.items()}


def test_a_run_where_nothing_else_may_be_written_is_the_run_on_disk(
    guarded: Proxy, s3: S3Server, place: str, store: StoreFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_set(tmp_path / "set", {"train": [20, 16], "val": [12]}, size=(32, 32)).folder
    fixed = ("model.backbone=tiny", "model.frozen_depth=2", "train.threads=1", "data.global_batch_size=6")
    settings = [part for text in (*fixed, f"data.shards={shards}") for part in ("--set", text)]
    command = ["train", "--preset", "smoke", *settings, "--run-dir"]
    assert run([*command, str(tmp_path / "near")]) == 0
    assert run([*command, place]) == 2
    assert "access refused (" in capsys.readouterr().err
    assert run([*command, place, "--set", f"data.kms_key={KEY}", "--resume"]) == 0
    assert_same_bits(tmp_path / "near", copied(store, tmp_path / "far"))
    found = encryption_of_all(s3, store)
    assert {"results.json", "report.html", ".lease/00000001"} <= set(found)
    assert sum(name.endswith("frozen.safetensors") for name in found) == 2  # the second is a server's copy
    assert set(found.values()) == {KEY}


def test_each_kind_of_write_names_the_key_and_what_is_deleted_leaves_no_mark(
    keyed: StoreFolder, s3: S3Server, proxy: Proxy
) -> None:
    assert_links(keyed)
    assert create(keyed, "once", b"first")
    assert not create(keyed, "once", b"second")
    again = pickle.loads(pickle.dumps(keyed))  # noqa: S301 - as it reaches another process
    again.write("deep/er/file", b"x" * 3_000_000)
    assert again.fs == keyed.fs
    assert keyed.read("deep/er/file") == b"x" * 3_000_000
    assert set(encryption_of_all(s3, keyed).values()) == {KEY}
    keyed.fs.move(keyed.at("deep/er/file"), keyed.at("moved"))
    assert keyed.read("moved") == b"x" * 3_000_000
    keyed.fs.create_dir(keyed.at("empty"), recursive=True)
    keyed.delete_tree("checkpoints")
    keyed.delete("moved")
    assert set(encryption_of_all(s3, keyed)) == {"once"}
    assert not [request for request in proxy.requests if without_the_key(request)]


def test_a_server_that_hiccups_is_asked_again_and_one_that_is_gone_is_told(keyed: StoreFolder, proxy: Proxy) -> None:
    faults = iter([Fault("503"), Fault("reset", 0)])
    proxy.choose = lambda request: next(faults, None) if request.method == "PUT" else None
    keyed.write("file", b"data")
    assert keyed.read("file") == b"data"
    faults = iter([Fault("503"), Fault("reset", 0)])
    Folder.at_url(keyed.url, keyed.options).write("plain", b"data")  # as a set is packed
    assert keyed.read("plain") == b"data"
    proxy.choose = lambda request: Fault("503")
    with pytest.raises(Interrupted, match=r"file can't be written to \(HTTP 503; 3 tries"):
        keyed.write("file", b"other")


def test_a_set_is_packed_with_the_key_of_the_environment(
    guarded: Proxy, s3: S3Server, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table = write_demo_images(tmp_path / "images", num_patients=12, seed=1, image_size_px=32)
    command = ["data", "pack", str(table), "--out", address, "--group-col", "patient_id", "--split", "0.6,0.2,0.2"]
    assert run([*command, "--workers", "1"]) == 2
    monkeypatch.setenv("MEDTL_S3_KMS_KEY", KEY)
    assert run([*command, "--workers", "1"]) == 0
    found = encryption_of_all(s3, store_folder(address, StorageOptions(endpoint_url=s3.url)))
    assert "dataset.json" in found
    assert set(found.values()) == {KEY}


@pytest.mark.parametrize("key", ["two words", "a\nb", "ключ"])
def test_what_no_header_holds_is_no_key(key: str, place: str) -> None:
    with pytest.raises(UserError, match=r"KMS key .* \(data.kms_key or MEDTL_S3_KMS_KEY\)"):
        store_folder(place, StorageOptions(endpoint_url="http://127.0.0.1:9", kms_key=key))
