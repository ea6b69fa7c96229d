"""run folder → one file for elsewhere: the weights with all that surrounds them, or a whole graph from pixels to scores.

``safetensors``: the best checkpoint's tensors, unchanged, with classes, preprocessing, threshold and the network's config as
metadata. ``onnx``: a graph from uint8 images [batch, channels, S, S], framed as evaluation does but not normalised, to
``logits`` (log-odds of each class, the columns logit_ of predictions, what the threshold is of) and ``scores``, in float32:
normalisation and views are inside, so that whoever serves it can get them wrong no more.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medtl_dist import __version__
from medtl_dist.data.label_sets import TASK
from medtl_dist.errors import DataError, UserError
from medtl_dist.models.normalise import Normalisation
from medtl_dist.run import Folder
from medtl_dist.store_folder import folder_at
from medtl_dist.train import checkpoint, results
from medtl_dist.train.evaluate import views_of
from medtl_dist.train.predictor import Predictor, load_predictor, predict_logits
from medtl_dist.train.run_copy import scorable
from medtl_dist.train.run_folder import ENSEMBLE_FILE, read_config

FORMATS = ("safetensors", "onnx")
METADATA = "medtl"  # the key of the metadata, of both formats: JSON
_OPSET = 20
_TOLERANCE = 1e-3  # of log-odds, float32 against float32 by other kernels
_MAX_BYTES = 2**31 - 1  # of a protobuf


class Whole(nn.Module):
    """uint8 images [batch, channels, S, S] → (logits, scores) float32 [batch, classes]; of several models the mean logits."""

    scale: Tensor
    shift: Tensor

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.models = nn.ModuleList([scorer.model for scorer in predictor.scorers])
        self.views = predictor.scorers[0].views
        self.several = predictor.task == TASK
        scale, shift = _scale_and_shift(predictor.scorers[0].normalisation)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = [view.float() * self.scale + self.shift for view in views_of(images, self.views)]
        logits = []
        for model in self.models:
            outputs = torch.stack([model(one) for one in pixels]).mean(dim=0)
            logits.append(outputs if self.several else _log_odds(outputs))
        together = torch.stack(logits).mean(dim=0)
        return together, torch.sigmoid(together)


def export_run(run_folder: Path | str, fmt: str, out: Path) -> dict[str, Any]:
    """Write ``out`` and return what was written and how it was checked, as plain JSON values.

    ``run_folder``: a path, or the address of a run in a store.

    Raises:
        UserError: no finished run, another format, ``out`` exists, the extra ``export`` is not installed.
        DataError: a damaged checkpoint, or a graph that computes something else than the network.
        Interrupted: a store can't be reached.
    """
    if fmt not in FORMATS:
        raise UserError(f"--format {fmt}: one of {', '.join(FORMATS)} expected")
    if out.exists():
        raise UserError(f"--out {out} exists; name another file")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: no such folder as {out.absolute().parent}; make it first")
    with scorable(folder_at(run_folder)) as here:
        data, checked = _safetensors(here) if fmt == "safetensors" else _onnx(here)
    try:
        Folder.local(out.absolute().parent).write(out.name, data)
    except OSError as error:
        raise UserError(f"--out {out} can't be written ({error.strerror or error})") from None
    return {"out": str(out), "format": fmt, "bytes": len(data), **checked}


def describe_model(predictor: Predictor) -> dict[str, Any]:
    """What whoever uses the file must know, as plain JSON values."""
    return {
        "tool_version": __version__,
        "task": predictor.task,
        "classes": list(predictor.classes),
        "preprocessing": predictor.preprocessing,
        "threshold": predictor.threshold,
        "thresholds": predictor.thresholds,
        "unit": predictor.unit,
        "aggregate": predictor.aggregate,
        "model": predictor.config.model.model_dump(mode="json", exclude={"weights", "second_weights"}),
        "checkpoints": list(predictor.checkpoints),
        "notes": list(predictor.notes),
    }


def _safetensors(run_folder: Path) -> tuple[bytes, dict[str, Any]]:
    if (run_folder / ENSEMBLE_FILE).is_file():
        raise UserError(f"{run_folder} holds several runs: name one of them, or export their mean with --format onnx")
    read_config(run_folder)
    predictor = load_predictor(run_folder, torch.device("cpu"))
    folder = Folder.local(run_folder)
    weights, _, _ = checkpoint.load(folder, results.read_results(folder)["best_checkpoint"])
    metadata = {METADATA: json.dumps(describe_model(predictor))}  # one key: safetensors writes several in any order
    data = safetensors.torch.save(weights, metadata)
    again = safetensors.torch.load(data)
    if set(again) != set(weights) or not all(torch.equal(again[name], weights[name]) for name in weights):
        raise DataError(f"{run_folder}: the tensors read back are not those written")
    return data, {"checked": f"{len(weights)} tensors read back, bit for bit the best checkpoint's"}


def _onnx(run_folder: Path) -> tuple[bytes, dict[str, Any]]:
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript")):
        raise UserError("--format onnx needs the extra `export`: pip install 'medtl_dist[export]'")
    predictor = load_predictor(run_folder, torch.device("cpu"))
    channels, size = predictor.preprocessing["channels"], predictor.preprocessing["image_size_px"]
    whole = Whole(predictor).eval().to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    data = _graph(whole, torch.zeros(2, channels, size, size, dtype=torch.uint8), describe_model(predictor))
    images = np.random.default_rng(0).integers(0, 256, (3, channels, size, size), dtype=np.uint8)
    with torch.no_grad():
        expected = whole(torch.from_numpy(images))[0].numpy()
    found, engine = _run(data, images)
    apart = float(np.abs(found - expected[: len(found)]).max())
    if not apart <= _TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise DataError(f"{run_folder}: the graph's logits are {apart:.2g} from the network's, so nothing was written")
    own = predict_logits(predictor, list(images))
    return data, {
        "checked": f"onnx.checker; logits of {len(found)} random images by {engine} and by torch differ by at most {apart:.1e}",
        "apart_from_torch": apart,
        "apart_from_the_runs_precision": float(np.abs(found - own[: len(found)]).max()),
        "runs_precision": predictor.scorers[0].precision.name,
    }


def _graph(whole: nn.Module, example: Tensor, told: dict[str, Any]) -> bytes:
    import onnx

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program = torch.onnx.export(
            whole,
            (example,),
            input_names=["images"],
            output_names=["logits", "scores"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = cast(Any, program).model_proto
    _forget_origins(model)
    del model.metadata_props[:]
    for key, value in ((METADATA, json.dumps(told)), ("classes", json.dumps(told["classes"]))):
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    if model.ByteSize() > _MAX_BYTES:
        raise UserError("the graph is larger than the 2 GiB of an ONNX file; --format safetensors has no such limit")
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def _forget_origins(model: Any) -> None:
    """Where each node comes from in the source: paths of the machine that exports."""
    for graph in (model.graph, *model.functions):
        del graph.metadata_props[:]
        for part in (*graph.node, *graph.value_info):
            del part.metadata_props[:]
            part.doc_string = ""
    for part in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""


def _run(data: bytes, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], str]:
    """The graph's logits, by onnxruntime where it is installed, else one image by onnx's own, slow, reference."""
    if importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime  # pyright: ignore[reportMissingImports]

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        return session.run(["logits"], {"images": images})[0], f"onnxruntime {onnxruntime.__version__}"
    import onnx
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(onnx.load_model_from_string(data))
    return cast(Any, evaluator.run(["logits"], {"images": images[:1]}))[0], "onnx's reference evaluator"


def _log_odds(outputs: Tensor) -> Tensor:
    """As ``metrics.scores.log_odds``, for a graph: leaving a class out before the sum keeps the digits."""
    num_classes = outputs.shape[1]
    columns = []
    for k in range(num_classes):
        others = [j for j in range(num_classes) if j != k]
        columns.append(outputs[:, k] - torch.logsumexp(outputs[:, others], dim=1))
    return torch.stack(columns, dim=1)


def _scale_and_shift(normalisation: Normalisation) -> tuple[Tensor, Tensor]:
    """float32 [1, channels, 1, 1] each, as ``models.normalise`` has them."""
    scale = [1 / (255 * std) for std in normalisation.std]
    shift = [-mean / std for mean, std in zip(normalisation.mean, normalisation.std, strict=True)]
    return torch.tensor(scale).view(1, -1, 1, 1), torch.tensor(shift).view(1, -1, 1, 1)
