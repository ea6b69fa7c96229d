"""What is exported computes what the run scored: the graph against predictions, the tensors against the checkpoint."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from kept_weights import weights_in
from predict_runs import pack_table, train, write_images
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_backbone import tiny_registered

from medtl_dist.data.encoding import Workers
from medtl_dist.data.inputs import InputOptions, list_inputs
from medtl_dist.data.seeing import eye_of, seen_part
from medtl_dist.errors import DataError, UserError
from medtl_dist.train import export
from medtl_dist.train.export import Whole, export_run
from medtl_dist.train.predictor import load_predictor, predict_logits

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript")), reason="the extra export is absent"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """run/: two classes, mirrored views; three/: three classes, bf16."""
    place = tmp_path_factory.mktemp("export")
    with tiny_registered():
        shards = pack_table(write_images(place / "images", 32), place / "set")
        train(shards, place / "run", "evaluate.views=mirror")
        table = write_images(place / "more", 36, classes=("a", "b", "c"), colour=True)
        train(
            pack_table(table, place / "three-set"),
            place / "three",
            "train.precision=bf16",
            "evaluate.views=right_angles",
        )
        yield place


def test_safetensors_hold_the_checkpoint_and_all_that_surrounds_it(place: Path, tmp_path: Path) -> None:
    told = export_run(place / "run", "safetensors", tmp_path / "m.safetensors")
    known = json.loads((place / "run" / "results.json").read_text())
    weights = weights_in(place / "run" / "checkpoints" / f"{known['best_checkpoint']:08d}")
    found = load_file(tmp_path / "m.safetensors")
    assert set(found) == set(weights)
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert told["bytes"] == (tmp_path / "m.safetensors").stat().st_size
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert list(file.metadata()) == [
            "medtl"
        ]  # of several the order, and with it the file, would be another each time
        metadata = json.loads(file.metadata()["medtl"])
    assert metadata["classes"] == ["NORMAL", "SICK"]
    assert metadata["threshold"] == known["threshold"]
    assert metadata["preprocessing"]["pack"]["image_size_px"] == 72
    assert metadata["preprocessing"]["normalisation"]["mean"]
    assert metadata["model"]["backbone"] == "tiny"
    assert "weights" not in metadata["model"]  # where they began: a path of the machine that trained


@needs_onnx
@pytest.mark.parametrize(("run", "source"), [("run", "images"), ("three", "more")])
def test_the_graph_gives_the_runs_logits_of_its_images(place: Path, tmp_path: Path, run: str, source: str) -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    told = export_run(place / run, "onnx", tmp_path / "m.onnx")
    assert told["apart_from_torch"] < 1e-4
    model = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(model, full_check=True)
    predictor = load_predictor(place / run, torch.device("cpu"))
    images = _seen(place / source, predictor.preprocessing, tmp_path)
    logits, scores = map(np.asarray, ReferenceEvaluator(model).run(None, {"images": images}))
    expected = predict_logits(predictor, list(images))
    tolerance = 1e-4 if run == "run" else 0.05  # the run scores in bf16, the graph in float32
    np.testing.assert_allclose(logits, expected, atol=tolerance)
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-np.asarray(logits, np.float64))), atol=1e-6)
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(told["medtl"])["classes"] == list(predictor.classes)
    batch = model.graph.input[0].type.tensor_type
    assert (batch.elem_type, batch.shape.dim[0].dim_param) == (onnx.TensorProto.UINT8, "batch")
    raw = (tmp_path / "m.onnx").read_bytes()
    assert not any(
        word in raw for word in (b"site-packages", b".py", str(Path.cwd()).encode())
    )  # nothing of this machine


def _seen(folder: Path, preprocessing: dict[str, Any], tmp_path: Path) -> np.ndarray:
    """uint8 [6, channels, S, S]: the first images as evaluation sees them."""
    inputs = list_inputs(folder, InputOptions(), tmp_path / "work", rendering=None, part_size=6)
    seen = list(seen_part(inputs, 0, eye_of(preprocessing, None), Workers(None, 1)))
    return np.stack([one.image for one in seen])  # type: ignore[misc]


@pytest.mark.parametrize("run", ["run", "three"])
def test_the_exported_module_is_the_predictor_in_float32(place: Path, run: str) -> None:
    predictor = load_predictor(place / run, torch.device("cpu"))
    channels = predictor.preprocessing["channels"]
    images = np.random.default_rng(1).integers(0, 256, (5, channels, 40, 40), dtype=np.uint8)
    with torch.no_grad():
        logits, scores = Whole(predictor).eval()(torch.from_numpy(images))
    expected = predict_logits(predictor, list(images))
    np.testing.assert_allclose(logits.numpy(), expected, atol=1e-4 if run == "run" else 0.05)
    np.testing.assert_allclose(scores.numpy(), 1 / (1 + np.exp(-logits.numpy())), atol=1e-6)


@needs_onnx
def test_a_graph_that_computes_something_else_is_not_written(place: Path, tmp_path: Path) -> None:
    whole = Whole(load_predictor(place / "run", torch.device("cpu"))).eval()

    def wrong(data: bytes, images: np.ndarray) -> tuple[np.ndarray, str]:
        assert data == b"a graph"
        with torch.no_grad():
            return whole(torch.from_numpy(images))[0].numpy() + np.float32(0.01), "the test"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_graph", lambda *_: b"a graph")
        patch.setattr(export, "_run", wrong)
        with pytest.raises(DataError, match=r"logits are 0\.01 from the network's, so nothing was written"):
            export_run(place / "run", "onnx", tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_what_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("kept")
    for fmt, out, words in (
        ("pickle", tmp_path / "m", "--format pickle: one of safetensors, onnx"),
        ("onnx", tmp_path / "there", "exists; name another file"),
        ("onnx", tmp_path / "no" / "m.onnx", "make it first"),
    ):
        with pytest.raises(UserError, match=words):
            export_run(place / "run", fmt, out)
    with pytest.raises(UserError, match="is not a run folder"):
        export_run(place / "set", "safetensors", tmp_path / "m")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"pip install 'medtl_dist\[export\]'"):
            export_run(place / "run", "onnx", tmp_path / "m.onnx")
    assert (tmp_path / "there").read_text() == "kept"


def test_the_run_has_the_views_that_the_tests_think(place: Path) -> None:
    assert len(pd.read_parquet(place / "run" / "predictions" / "val.parquet")) > 3
    assert load_predictor(place / "run", torch.device("cpu")).preprocessing["views"] == "mirror"
