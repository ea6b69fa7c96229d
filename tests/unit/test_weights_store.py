"""Weights at an address: the tensors and the name of the same file on disk, checked like it, and never run."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from store_on_disk import stored_in

from medtl_dist.errors import DataError, MedtlError, UserError
from medtl_dist.models.backbones import create_model, native_normalisation
from medtl_dist.models.freezing import frozen_names
from medtl_dist.models.registry import spec
from medtl_dist.models.weights import find_weights, read_tensors
from medtl_dist.models.weights_store import step_of
from medtl_dist.run import Folder
from medtl_dist.train import checkpoint

_RGB = native_normalisation(spec("resnet18"), 3)
STEP = "runs/chain/stages/1-source/checkpoints"


@pytest.fixture(autouse=True)
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    stored_in(tmp_path, monkeypatch)
    (tmp_path / "bucket" / STEP).mkdir(parents=True)
    return tmp_path / "bucket"


def _checkpoint(bucket: Path, name: str) -> Path:
    place = bucket / STEP / name
    place.mkdir()
    save_file({"w": torch.arange(4.0)}, place / "model.safetensors")
    digest = hashlib.sha256((place / "model.safetensors").read_bytes()).hexdigest()
    (place / "manifest.json").write_text(json.dumps({"files": {"model.safetensors": {"sha256": digest}}}))
    return place


def _refused(weights: str, error: type[MedtlError]) -> str:
    with pytest.raises(error) as caught:
        find_weights(weights, spec("resnet18"))
    return caught.value.message


@pytest.mark.parametrize("name", ["own.pth", "own.safetensors"])
def test_a_file_at_an_address_is_the_file_on_disk(bucket: Path, name: str) -> None:
    tensors = {"w": torch.randn(3, 2), "n": torch.tensor(7)}
    torch.save(tensors, bucket / name) if name.endswith(".pth") else save_file(tensors, bucket / name)
    here, there = (find_weights(place, spec("resnet18")) for place in (str(bucket / name), f"s3://bucket/{name}"))
    assert here is not None
    assert there is not None
    assert (there.sha256, there.label) == (here.sha256, here.label)
    found = read_tensors(there.path, there.data)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


def test_a_chains_checkpoint_is_named_as_on_disk_and_is_what_its_manifest_says(bucket: Path) -> None:
    _checkpoint(bucket, "00000010-000002")
    local = _checkpoint(bucket, "00000010")
    address = f"s3://bucket/{STEP}/00000010-000002/model.safetensors"
    here, there = (
        find_weights(str(local / "model.safetensors"), spec("resnet18")),
        find_weights(address, spec("resnet18")),
    )
    assert here is not None
    assert there is not None
    assert there.label == here.label == "checkpoint 10 of run 1-source"
    file = bucket / STEP / "00000010-000002" / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert _refused(address, DataError) == f"{address}: differs from its checksum"
    file.with_name("manifest.json").write_text("{}")
    assert _refused(address, DataError).endswith("/00000010-000002/manifest.json: damaged")
    file.with_name("manifest.json").unlink()
    assert "manifest.json is missing" in _refused(address, DataError)


def test_places_that_hold_no_weights_are_told(bucket: Path) -> None:
    assert "no file s3://bucket/none.pth; give imagenet, random" in _refused("s3://bucket/none.pth", UserError)
    for address in ("https://example.org/w.pth", "s3://w.pth"):
        assert f"{address}: weights are read from a local file or from" in _refused(address, UserError)
    assert "must hold no user" in _refused("s3://key:secret@bucket/w.pth", UserError)


class _RunsCode:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.proof),)


def test_code_in_a_file_at_an_address_is_not_run(bucket: Path, tmp_path: Path) -> None:
    torch.save({"hook": _RunsCode(tmp_path / "proof")}, bucket / "w.pth")
    file = find_weights("s3://bucket/w.pth", spec("resnet18"))
    assert file is not None
    with pytest.raises(UserError, match=r"s3://bucket/w.pth was refused: it holds Python objects"):
        read_tensors(file.path, file.data)
    assert not (tmp_path / "proof").exists()
    torch.load(bucket / "w.pth", weights_only=False)  # the file does what the test needs it to
    assert (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    ("path", "step"),
    [
        ("/a/run/checkpoints/00000012/model.safetensors", 12),
        ("bucket/run/checkpoints/00000012-000003/model.safetensors", 12),
        ("/a/run/checkpoints/model.safetensors", None),
        ("/a/run/checkpoints/last/model.safetensors", None),
        ("/a/run/checkpoints/1-2-3/model.safetensors", None),
        ("/a/run/other/00000012/model.safetensors", None),
        ("model.safetensors", None),
    ],
)
def test_the_step_is_in_the_path(path: str, step: int | None) -> None:
    assert step_of(path) == step


def test_a_checkpoints_weights_are_all_of_them_here_and_there(bucket: Path) -> None:
    made = create_model(
        "resnet18", num_outputs=2, in_channels=3, weights="random", normalisation=_RGB, image_size_px=32, seed=4
    )
    weights = made.model.state_dict()
    frozen = frozen_names(weights, spec("resnet18"), 3)
    assert 0 < len(frozen) < len(weights)
    run = bucket / STEP.removesuffix("/checkpoints")
    checkpoint.save(Folder.local(run), 10, weights=weights, state={}, meta={}, frozen=frozen)
    files = [str(run / "checkpoints/00000010/model.safetensors"), f"s3://bucket/{STEP}/00000010/model.safetensors"]
    found = [
        create_model(
            "resnet18", num_outputs=2, in_channels=3, weights=file, normalisation=_RGB, image_size_px=32, seed=5
        )
        for file in files
    ]
    for other in found:
        assert (other.weights, other.weights_sha256) == ("checkpoint 10 of run 1-source", found[0].weights_sha256)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in other.model.state_dict().items())

    def digest(name: str) -> str:
        return hashlib.sha256((run / "checkpoints/00000010" / name).read_bytes()).hexdigest()

    both = digest("model.safetensors") + digest("frozen.safetensors")
    assert found[0].weights_sha256 == hashlib.sha256(both.encode()).hexdigest()
    (run / "checkpoints/00000010/frozen.safetensors").write_bytes(b"other")
    assert "00000010/frozen.safetensors: differs from its checksum" in _refused(files[1], DataError)
