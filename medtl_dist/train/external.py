"""finished run + another shard set → external validation: the frozen model and threshold on images from elsewhere.

Written to ``RUN/external/NAME/``: ``external.json``, ``predictions/{split}.parquet`` and a page; nothing else of the run
changes, but the ledger where that set's test split is opened.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from medtl_dist.config import Config
from medtl_dist.data.encoding import Failure, open_workers
from medtl_dist.data.label_sets import TASK
from medtl_dist.data.seeing import eye_of, seen_split
from medtl_dist.data.shards import INDEX_FIELDS, Dataset, open_dataset, read_split
from medtl_dist.errors import DataError, LeakageError, MedtlError, UserError
from medtl_dist.metrics.summary import summarise
from medtl_dist.run import Folder
from medtl_dist.train import results
from medtl_dist.train.class_map import ClassMap, map_classes
from medtl_dist.train.predict_output import score_columns
from medtl_dist.train.predictor import Predictor, load_predictor, predict_logits
from medtl_dist.train.run_copy import scorable
from medtl_dist.train.run_store import read_config_in
from medtl_dist.train.setup import open_shards, storage_of

SCHEMA_VERSION = 1
EXTERNAL_FILE = "external.json"
_OWN = {item.name for item in INDEX_FIELDS} - {"group", "domain"}
_COMPARED = (
    "auc",
    "auc_ci",
    "ci_method",
    "prevalence",
    "n",
    "n_groups",
    "sensitivity",
    "specificity",
    "ppv",
    "npv",
    "ece",
)

Progress = Callable[[int, int], None]


def evaluate_external(
    folder: Folder,
    data: str,
    *,
    split: str = "all",
    class_map: Mapping[str, str] | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score ``split`` (``all``: every one) of the set at ``data`` with a run's best checkpoint; returns ``external.json`` and
    the ``folder`` that it was written to.

    ``folder``: the run's, as ``opened_finished`` gives it; ``class_map``: their classes to ours, where the names differ;
    ``name``: of the folder of what is written, None: the set's.

    Raises:
        UserError: no such set or split, classes without a counterpart, the run's own set.
        LeakageError: images or patients that the run knows.
        DataError: a damaged checkpoint or shard.
        Interrupted: a store can't be reached.
    """
    config = read_config_in(folder)
    known = results.read_results(folder)
    dataset = open_dataset(data, storage_of(config))
    splits = _chosen(dataset, split)
    if dataset.sha256 == known["provenance"]["dataset_sha256"]:
        raise UserError(f"{dataset.folder} is the set of this run: without --data, --split val or test scores it")
    mapped = map_classes(dataset, known["classes"], known["task"], class_map or {})
    place = f"external/{_folder_name(name or dataset.name)}"
    _check_place(folder, place, dataset)
    overlap = _check_overlap(folder, config, known, dataset)
    with scorable(folder) as here:
        predictor = load_predictor(here, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    # Counted before the first image is seen.
    openings = results.note_opening(config, dataset, folder) if "test" in splits else None
    scored = _score(predictor, dataset, splits, progress)
    tables = [_predictions(predictor, dataset, one, mapped, logits) for one, logits in scored.items()]
    for one, table in zip(scored, tables, strict=True):
        sink = io.BytesIO()
        pq.write_table(table, sink)
        folder.write(f"{place}/predictions/{one}.parquet", sink.getvalue())
    content = {
        "schema_version": SCHEMA_VERSION,
        "run": folder.path.rpartition("/")[2],
        "name": dataset.name,
        "task": known["task"],
        "classes": known["classes"],
        "positive_class": known["positive_class"],
        "class_map": mapped.told,
        "splits": splits,
        "entry": _entry(config, known, dataset, mapped, scored),
        "own": {one: _brief(known["splits"][one]) for one in known["splits"]},
        "threshold": known.get("threshold"),
        "thresholds": known.get("thresholds"),
        "test_openings": openings,
        "overlap": overlap,
        "data": results.describe_data(dataset),
        "provenance": results.provenance(config, dataset)
        | {
            "checkpoint": predictor.checkpoints[0],
            "finished": _now(),
            "trained_on": known["provenance"]["dataset_sha256"],
        },
    }
    content["cautions"] = _cautions(content, predictor, dataset, mapped)
    folder.write(f"{place}/{EXTERNAL_FILE}", json.dumps(content, indent=1, allow_nan=False).encode())
    return content | {"folder": f"{folder.url}/{place}"}


def _chosen(dataset: Dataset, split: str) -> list[str]:
    splits = list(dataset.splits) if split == "all" else [split]
    if split not in (*dataset.splits, "all"):
        raise UserError(f"--split {split}: {dataset.folder} has {', '.join(dataset.splits)}; all of them: --split all")
    return [one for one in splits if sum(shard.samples for shard in dataset.shards(one))]


def _folder_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:100] or "set"


def _check_place(folder: Folder, place: str, dataset: Dataset) -> None:
    """Raises UserError where the folder is another set's."""
    if not folder.exists(f"{place}/{EXTERNAL_FILE}"):
        return
    with contextlib.suppress(ValueError, KeyError, TypeError):
        if json.loads(folder.read(f"{place}/{EXTERNAL_FILE}"))["provenance"]["dataset_sha256"] == dataset.sha256:
            return
    raise UserError(f"{folder.url}/{place} holds the scores of another set: give this one a name with --name")


def _score(
    predictor: Predictor, dataset: Dataset, splits: Sequence[str], progress: Progress | None
) -> dict[str, NDArray[np.float64]]:
    """Per split float64 [n, classes], log-odds in index order. Raises DataError: a damaged image."""
    eye = eye_of(predictor.preprocessing, None)
    totals = {split: sum(shard.samples for shard in dataset.shards(split)) for split in splits}
    scored: dict[str, NDArray[np.float64]] = {}
    done = 0
    with open_workers(1, 0) as workers:
        for split in splits:
            batches: list[NDArray[np.float64]] = []
            waiting: list[Any] = []
            for place, one in enumerate(seen_split(dataset, split, eye, workers), 1):
                if isinstance(one.image, Failure):
                    raise DataError(
                        f"{dataset.folder}: image {one.identity['key']} can't be scored: {one.image.reason}; copy the "
                        "set again or pack it again"
                    )
                waiting.append(one.image)
                if len(waiting) == predictor.batch_size or place == totals[split]:
                    batches.append(predict_logits(predictor, waiting))
                    done += len(waiting)
                    waiting = []
                    if progress is not None:
                        progress(done, sum(totals.values()))
            scored[split] = np.concatenate(batches)
    return scored


def _labels(dataset: Dataset, split: str, mapped: ClassMap) -> NDArray[np.int64]:
    return mapped.labels(read_split(dataset, split, columns=["label"]).column("label").to_pylist())


def _predictions(
    predictor: Predictor, dataset: Dataset, split: str, mapped: ClassMap, logits: NDArray[np.float64]
) -> pa.Table:
    """As ``predictions/{split}.parquet`` of the run, the labels in the run's classes."""
    index = read_split(dataset, split)
    columns: dict[str, Any] = {"key": [key.hex() for key in index.column("key").to_pylist()]}
    columns |= {name: index.column(name) for name in index.column_names if name not in _OWN}
    labels = _labels(dataset, split, mapped)
    if labels.ndim == 2:
        for k, name in enumerate(predictor.classes):
            columns[f"label_{name}"] = pa.array(labels[:, k].astype(np.int8), mask=labels[:, k] < 0)
    else:
        columns["label"] = labels
    return pa.table(columns | score_columns(predictor, logits, np.ones(len(logits), bool)))


def _entry(
    config: Config,
    known: Mapping[str, Any],
    dataset: Dataset,
    mapped: ClassMap,
    scored: Mapping[str, NDArray[np.float64]],
) -> dict[str, Any]:
    """One entry of all the splits together, as those of ``results.json``; the threshold is the run's."""
    logits = np.concatenate(list(scored.values()))
    labels = np.concatenate([_labels(dataset, split, mapped) for split in scored])
    groups = None
    if dataset.group_source != "none":
        groups = np.concatenate([results.groups_of(dataset, split) for split in scored])  # type: ignore[arg-type]
    common: dict[str, Any] = {
        "classes": known["classes"],
        "logits": logits,
        "groups": groups,
        "unit": config.evaluate.unit,
        "aggregate": config.evaluate.aggregate,
        "num_bootstrap": config.evaluate.bootstrap_samples,
        "seed": config.train.seed,
    }
    if known["task"] == TASK:
        from medtl_dist.metrics.multilabel import summarise_label_sets

        return summarise_label_sets(sets=labels, loss=None, thresholds=known["thresholds"], **common)
    # The log-odds of a class are those of its probability, so the loss needs no more than them.
    loss = float(np.logaddexp(0.0, -logits[np.arange(len(labels)), labels]).mean())
    return summarise(task=known["task"], labels=labels, loss=loss, threshold=known["threshold"], **common)


def _check_overlap(folder: Folder, config: Config, known: Mapping[str, Any], dataset: Dataset) -> dict[str, Any]:
    """What was compared with what the run knows. Raises LeakageError: the two share an image or a patient."""
    own = _own_set(config, known)
    grouped = dataset.group_source != "none" and known["data"]["group_source"] != "none"
    columns = ["key", "sha256", "group"] if own is not None else ["key", "group"]
    theirs = {
        name: _values([read_split(dataset, one, columns=columns) for one in dataset.splits], name) for name in columns
    }
    if own is not None:
        tables = [read_split(own, split, columns=columns) for split in own.splits]
    else:
        files = [name for name in folder.names("predictions") if name.endswith(".parquet")]
        tables = [pq.read_table(io.BytesIO(folder.read(f"predictions/{name}")), columns=columns) for name in files]
    shared = {name: len(theirs[name] & _values(tables, name)) for name in columns if name != "group" or grouped}
    words = {"sha256": "images with the same bytes", "key": "keys", "group": "patients"}
    if any(shared.values()):
        told = ", ".join(f"{count} {words[name]}" for name, count in shared.items() if count)
        raise LeakageError(
            f"{dataset.folder} shares {told} with the set of this run, so it is no external validation: leave those out, or, "
            "where only names are alike, pack it with a key file of its own"
        )
    return {"compared_with": "the run's whole set" if own is not None else "the images that the run has scored",
            "compared": list(shared)}  # fmt: skip


def _own_set(config: Config, known: Mapping[str, Any]) -> Dataset | None:
    """The run's set, where it can still be read and is still the same."""
    try:
        found = open_shards(config)
    except MedtlError:
        return None
    return found if found.sha256 == known["provenance"]["dataset_sha256"] else None


def _values(tables: Iterable[pa.Table], name: str) -> set[str]:
    """A column's values as text; keys and digests in hexadecimal."""
    found = {value for table in tables for value in table.column(name).to_pylist() if value is not None}
    return {value.hex() if isinstance(value, bytes) else str(value) for value in found}


def _brief(entry: Mapping[str, Any]) -> dict[str, Any]:
    told = {name: entry.get(name) for name in _COMPARED}
    return told | {"per_class_prevalence": {k: v.get("prevalence") for k, v in (entry.get("per_class") or {}).items()}}


def _cautions(content: Mapping[str, Any], predictor: Predictor, dataset: Dataset, mapped: ClassMap) -> list[str]:
    found: list[str] = []
    found.append(
        "Keys and patients are hashed with a secret of each set: patients in both sets show only where both were packed with one "
        f"key file. Compared were {' and '.join(content['overlap']['compared'])} with {content['overlap']['compared_with']}."
    )
    if dataset.group_source == "none":
        found.append("The set names no patients: the interval assumes independent images.")
    if mapped.without_images:
        found.append(f"No image here is of {', '.join(mapped.without_images)}: those classes are not judged.")
    if "train" in content["splits"] and len(content["splits"]) > 1:
        found.append("All splits of the set are scored together; none of them was trained on.")
    own = content["own"].get("val", {}).get("prevalence")
    here = content["entry"].get("prevalence")
    if own is not None and here is not None and abs(own - here) > 0.05:
        found.append(
            f"Prevalence is {here:.3f} here and {own:.3f} in the run's val: predictive values and calibration move with it; "
            "sensitivity, specificity and AUC need not."
        )
    pack, theirs = predictor.preprocessing["pack"], dataset.info["preprocessing"]
    differing = [key for key in ("image_size_px", "color", "window") if pack.get(key) != theirs.get(key)]
    if differing:
        found.append(
            f"The set was packed with another {', '.join(differing)} than the run's: part of a difference may be that."
        )
    return [*found, *(text for text in predictor.notes if "not calibrated" in text)]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
