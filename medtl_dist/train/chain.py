"""fit → fit: a chain of trainings in one run folder, each an ordinary run that starts from an earlier one's best checkpoint.

Who trains is asked for (in this process, on a cluster): here is only what comes after what, and from which weights. The run
folder may lie in a store: a later stage then names its weights by their address, and whichever node needs them reads them.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from medtl_dist.config import FROM_STAGE, Config, Stage, check_reached_alike, stages_of
from medtl_dist.run import Folder
from medtl_dist.train import checkpoint, results
from medtl_dist.train.setup import open_shards
from medtl_dist.train.start import check_inputs

SCHEMA_VERSION = 1
CHAIN_FILE = "chain.json"

# Trains a config in a folder, or goes on there, or finds it finished; opens its test split where told to.
TrainOne = Callable[[Config, Folder, bool], Mapping[str, Any]]


def check_chain(config: Config, *, in_store: bool = False, open_test: bool = False) -> None:
    """Whether every stage's data set fits its config, before the first is trained.

    ``in_store``: the run folder lies in one. Raises UserError or DataError.
    """
    stages = stages_of(config)
    if in_store:
        check_reached_alike(config)
    for stage in stages:
        check_inputs(stage.config, open_test=open_test and stage is stages[-1])


def train_chain(
    config: Config, folder: Folder, train_one: TrainOne, *, say: Callable[[str], None], open_test: bool = False
) -> dict[str, Any]:
    """Train the stages in order, each in ``folder/stages/N-NAME``, and write and return ``chain.json``, the index of them.

    A finished stage is not trained again: its ``results.json`` decides. ``open_test`` opens the last stage's test split.

    Raises:
        MedtlError: as the training itself; the stage it came from has been told to ``say``.
    """
    stages = stages_of(config)
    entries: list[dict[str, Any]] = []
    places: dict[str, Folder] = {}
    for number, stage in enumerate(stages, start=1):
        last = number == len(stages)
        name = f"stages/{number}-{stage.name}"
        place = folder.part(name)
        resolved, origin = started_from(stage, places)
        say(f"stage {number} of {len(stages)}, {stage.name}: {origin}")
        found = train_one(resolved, place, open_test and last)
        places[stage.name] = place
        entries.append(_entry(stage.name, name, place, origin, found))
        write_json(folder, CHAIN_FILE, {"schema_version": SCHEMA_VERSION, "finished": last, "stages": entries})
    return read_json(folder, CHAIN_FILE)


def started_from(stage: Stage, places: Mapping[str, Folder]) -> tuple[Config, str]:
    """The stage's config with the weights file of the stage that it names, and a sentence about it.

    The head goes with the backbone where both stages have the same classes and ``model.keep_head`` is true.

    Raises:
        DataError: that stage's best checkpoint is missing or damaged.
    """
    config = stage.config
    weights, second = config.model.weights, config.model.second_weights
    if second.startswith(FROM_STAGE) and config.model.join is not None:
        file = best_weights(places[second.removeprefix(FROM_STAGE)])
        config = config.model_copy(update={"model": config.model.model_copy(update={"second_weights": file})})
    if not weights.startswith(FROM_STAGE):
        return config, f"starts from {weights if weights in ('imagenet', 'random') else Path(weights).name} weights"
    name = weights.removeprefix(FROM_STAGE)
    found = results.read_results(places[name])
    same = found["classes"] == list(open_shards(config).classes)
    model = config.model.model_copy(
        update={"weights": best_weights(places[name]), "keep_head": config.model.keep_head and same}
    )
    head = "its head too" if model.keep_head else "a new head" if same else "a new head for other classes"
    sentence = f"starts from the best checkpoint of {name} (epoch {found['best_epoch'] + 1}), {head}"
    return config.model_copy(update={"model": model}), sentence


def best_weights(run: Folder) -> str:
    """The path or address of the weights file of a finished run's best checkpoint, verified. Raises DataError."""
    step = results.read_results(run)["best_checkpoint"]
    return f"{run.url}/{checkpoint.weights_name(run, step)}"


def history_of(run: Folder, columns: list[str]) -> list[dict[str, Any]]:
    """These columns of a finished run's history, a row per epoch."""
    table = pq.read_table(io.BytesIO(run.read("history.parquet")), columns=columns)
    return table.to_pylist()


def seconds_of(run: Folder) -> float:
    """Seconds that the epochs of a finished run took, evaluation included."""
    return math.fsum(row["epoch_s"] for row in history_of(run, ["epoch_s"]))


def _entry(name: str, where: str, place: Folder, origin: str, found: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("classes", "model", "best_epoch", "epochs_run", "headline", "test_openings")
    own = {"name": name, "folder": where, "origin": origin, "seconds": seconds_of(place)}
    return own | {key: found[key] for key in kept}


def write_json(folder: Folder, name: str, content: Mapping[str, Any]) -> None:
    folder.write(name, json.dumps(content, indent=1, allow_nan=False).encode())


def read_json(folder: Folder, name: str) -> dict[str, Any]:
    return json.loads(folder.read(name))
