"""folds' predictions → predictions/oof.parquet, crossval.json, ensemble.json: what a cross-validation leaves."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medtl_dist.config import Config
from medtl_dist.data.label_sets import TASK, UNKNOWN
from medtl_dist.data.shards import Dataset
from medtl_dist.metrics.crossval import summarise_folds
from medtl_dist.run import Folder
from medtl_dist.train import results
from medtl_dist.train.chain import seconds_of, write_json
from medtl_dist.train.run_folder import ENSEMBLE_FILE

SCHEMA_VERSION = 1
CROSSVAL_FILE = "crossval.json"
OOF_FILE = "predictions/oof.parquet"
HELD_OUT_FILE = "predictions/held_out.parquet"  # in a fold's run folder

_TRAINING_VARIANCE = (
    "Training variance: other training images, or other seeds, would have given other models. The interval takes the trained "
    "models as given and counts which patients were scored."
)
_DEPENDENCE = (
    "Dependence between folds and between repeats: their models share most of their training images. No unbiased estimate of "
    "the variance of a cross-validation is known (Bengio and Grandvalet, JMLR 5, 2004)."
)
_FINAL_MODEL = (
    "The final model: the number is of models that saw the other folds only; a model of all images, or the folds' ensemble, has "
    "not been measured by it."
)
LEAVES_OUT = (_TRAINING_VARIANCE, _DEPENDENCE, _FINAL_MODEL)


def pooled(folder: Folder, places: Sequence[tuple[int, int, str]], dataset: Dataset) -> pa.Table:
    """The held-out predictions of all folds (repeat, fold, run folder below), sorted by repeat, fold and key, and written."""
    parts = []
    names = ["key", "group"]
    names += [f"label_{name}" for name in dataset.classes] if dataset.task == TASK else ["label"]
    names += [f"{what}_{name}" for what in ("logit", "score") for name in dataset.classes]
    for repeat, fold, place in places:
        table = pq.read_table(io.BytesIO(folder.read(f"{place}/{HELD_OUT_FILE}"))).select(names).sort_by("key")
        for position, (name, value) in enumerate((("fold", fold), ("repeat", repeat)), start=2):
            table = table.add_column(position, name, pa.array([value] * table.num_rows, pa.int64()))
        parts.append(table)
    whole = pa.concat_tables(parts)
    sink = io.BytesIO()
    pq.write_table(whole, sink)
    folder.write(OOF_FILE, sink.getvalue())
    return whole


def write_results(
    config: Config, folder: Folder, dataset: Dataset, settings: dict[str, Any], places: Sequence[tuple[int, int, str]]
) -> dict[str, Any]:
    """Pool the folds and write ``predictions/oof.parquet``, ``ensemble.json`` and, last, ``crossval.json``; returns the last."""
    table = pooled(folder, places, dataset)
    known = dataset.group_source != "none"
    unit = config.evaluate.unit if known else "image"
    numbers = summarise_folds(
        classes=dataset.classes,
        task=dataset.task,
        labels=_labels(table, dataset),
        logits=np.stack([table.column(f"logit_{name}").to_numpy() for name in dataset.classes], axis=1),
        groups=np.asarray(table.column("group" if known else "key").to_pylist()),
        groups_known=known,
        folds=table.column("fold").to_numpy(),
        repeats=table.column("repeat").to_numpy(),
        unit=unit,
        aggregate=config.evaluate.aggregate,
    )
    numbers["per_fold"] = [
        entry | _of_run(folder, place) for entry, (_, _, place) in zip(numbers["per_fold"], places, strict=True)
    ]
    first, last = (results.read_results(folder.part(places[i][2])) for i in (0, -1))
    members = [place for _, _, place in places]
    write_json(folder, ENSEMBLE_FILE, {"schema_version": SCHEMA_VERSION, "members": members})
    content = {
        "schema_version": SCHEMA_VERSION,
        "run": PurePosixPath(folder.url).name,
        "task": dataset.task,
        "classes": list(dataset.classes),
        "positive_class": dataset.positive_class,
        **settings,
        **numbers,
        "leaves_out": list(LEAVES_OUT),
        "cautions": cautions(config, dataset, settings, numbers),
        "model": first["model"],
        "data": {
            "name": dataset.name,
            "sha256": dataset.sha256,
            "group_source": dataset.group_source,
            "samples": {split: dataset.info["splits"][split]["samples"] for split in dataset.splits},
        },
        "provenance": results.provenance(config, dataset)
        | {"started": first["provenance"]["started"], "finished": last["provenance"]["finished"]},
    }
    write_json(folder, CROSSVAL_FILE, content)
    return content


def _labels(table: pa.Table, dataset: Dataset) -> np.ndarray:
    if dataset.task != TASK:
        return table.column("label").to_numpy()
    columns = [table.column(f"label_{name}").fill_null(UNKNOWN).to_numpy() for name in dataset.classes]
    return np.stack(columns, axis=1)


def _of_run(folder: Folder, place: str) -> dict[str, Any]:
    """What a fold's training adds to its entry."""
    run = folder.part(place)
    found = results.read_results(run)
    counts = found["data"]["splits"]["train"]
    return {
        "folder": place,
        "train": {"samples": counts["samples"], "groups": counts["groups"]},
        "epoch": found["best_epoch"],
        "epochs_run": found["epochs_run"],
        "seconds": seconds_of(run),
    }


def cautions(config: Config, dataset: Dataset, settings: dict[str, Any], numbers: dict[str, Any]) -> list[str]:
    """Sentences that belong beside the numbers."""
    found: list[str] = []
    if numbers["folds_without_auc"]:
        found.append(
            f"{numbers['folds_without_auc']} of {len(numbers['per_fold'])} held-out folds have one class only: they hold no "
            "pair and count in no AUC."
        )
    few = [name for name, entry in numbers["per_class"].items() if entry["folds_without_auc"]]
    if few and len(numbers["per_class"]) > 1:
        found.append(f"Some folds lack images with or without {', '.join(few)}: they hold no pair of such a class.")
    if dataset.group_source == "none":
        found.append("The data set names no patients: images of one patient may be in the training of their own fold.")
    if config.model.weights not in ("imagenet", "random"):
        found.append(
            "The initial weights are from a file: where they were trained on images of this data set, the held-out folds are "
            "not unseen."
        )
    if settings["repeats"] == 1:
        found.append(
            "One repeat: another way of dealing the folds would give another number; --repeats averages over several."
        )
    if dataset.info.get("audit") is None:
        found.append("The data set was not searched for duplicates across patients: `medtl data audit` does.")
    return found
