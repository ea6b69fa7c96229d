"""shard set → folds → trainings: each fold held out once per repeat, scored by a model that saw neither it nor test.

A fold is an ordinary training of a fold's own shard set (``data/subset.py``) in ``folds/RR-F``. With epochs ``fixed`` the last
epoch's model counts; with ``inner`` the best epoch on an inner val of other patients. Either way the held-out fold is scored
once, after training, and chooses nothing. Who trains is asked for (in this process, on a cluster). The folder may lie in a
store: the folds' sets then lie there too, for as long as they are needed, where every node can read them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from medtl_dist.config import Config
from medtl_dist.data.folds import Settings, check_folds, check_settings, class_columns, deal_folds, inner_val
from medtl_dist.data.shards import Dataset, open_dataset
from medtl_dist.data.split import shuffled
from medtl_dist.data.subset import NUM_WATCHED, Members, read_members, write_fold_set_in
from medtl_dist.errors import DataError, TrainingError, UserError
from medtl_dist.run import Folder, LocalRun
from medtl_dist.store_folder import StoreFolder
from medtl_dist.train import checkpoint, results
from medtl_dist.train.chain import read_json, write_json
from medtl_dist.train.evaluate import predictions_table, score_split
from medtl_dist.train.fold_results import HELD_OUT_FILE, write_results
from medtl_dist.train.setup import create_network, open_shards, scorer_of, set_threads, storage_of
from medtl_dist.train.start import check_inputs

PLAN_FILE = "folds.json"
SETS = "sets"  # the folds' sets, below the folder


@dataclass(frozen=True)
class FoldTrial:
    """One training to run: its number from 0, what differs from the base config, the whole config, and its run folder, ``name``
    below the whole's."""

    number: int
    overrides: dict[str, Any]
    config: Config
    name: str
    place: Folder


# Trains each fold's config as an ordinary training in its place, or finds it finished there.
TrainFolds = Callable[[Sequence[FoldTrial]], None]


def one_after_another(train_one: Callable[[Config, Folder], object]) -> TrainFolds:
    """The folds in turn, each by ``train_one``."""

    def train_folds(trials: Sequence[FoldTrial]) -> None:
        for trial in trials:
            train_one(trial.config, trial.place)

    return train_folds


def cross_validate(
    config: Config,
    folder: Folder,
    train_folds: TrainFolds,
    settings: Settings,
    *,
    say: Callable[[str], None],
    at_once: int = 1,
    keep_sets: bool = False,
) -> dict[str, Any]:
    """Train and score every fold that has not been, then write and return ``crossval.json``. The caller holds the folder's lock,
    in a store its lease.

    Args:
        at_once: how many folds are given to ``train_folds`` together: so many sets lie in ``sets/`` at a time.
        keep_sets: leave the folds' sets in ``sets/``; else each is deleted once its fold is scored.

    Raises:
        UserError: a config or a set that can't be cross-validated so, or a folder of another cross-validation.
        MedtlError: as the training itself.
    """
    dataset = check_crossval(config, settings)
    members = read_members(dataset)
    _same_plan(folder, {**asdict(settings), "dataset_sha256": dataset.sha256})
    if not folder.remote:
        (folder.local_path / SETS).mkdir(mode=0o700, exist_ok=True)
    folds = list(plan_folds(members, settings, config.train.seed))
    places = [(fold.repeat, fold.number, f"folds/{fold.name}") for fold in folds]
    left = [
        (number, fold) for number, fold in enumerate(folds) if not folder.exists(f"{places[number][2]}/{HELD_OUT_FILE}")
    ]
    if len(left) < len(folds):
        say(f"{len(folds) - len(left)} of {len(folds)} folds had already finished")
    if left and settings.epochs_from == "fixed":
        say(
            "epochs are fixed: val below is of training images, to watch by; a held-out fold is scored after its training"
        )
    for start in range(0, len(left), at_once):
        some = left[start : start + at_once]
        trials = [_prepared(config, folder, members, settings, number, fold) for number, fold in some]
        for number, fold in some:
            say(
                f"fold {number + 1} of {len(folds)}: repeat {fold.repeat + 1}, fold {fold.number + 1} of {settings.folds}"
            )
        train_folds(trials)
        for trial in trials:
            if not trial.place.exists("results.json"):
                raise TrainingError(
                    f"{trial.place.url}: this fold's training has not finished; --resume goes on with it."
                )
            score_held_out(trial.place, trial.config)
            if not keep_sets:
                _forget(folder, f"{SETS}/{folds[trial.number].name}")
    if not keep_sets:
        _forget(folder, SETS)
    return write_results(config, folder, dataset, asdict(settings), places)


@dataclass(frozen=True)
class Fold:
    """One fold of one repeat, both from 0: ``rows_of`` members by split of its set; ``seed`` of dealing and training."""

    repeat: int
    number: int
    seed: int
    rows_of: dict[str, list[int]]

    @property
    def name(self) -> str:
        return f"{self.repeat + 1:02d}-{self.number + 1}"


def plan_folds(members: Members, settings: Settings, seed: int) -> Iterator[Fold]:
    """All folds of all repeats. Raises: UserError, an inner val can't be had."""
    groups, labels, keys = members.groups, members.labels, members.keys
    has, _ = class_columns(labels, members.dataset.classes)
    for repeat in range(settings.repeats):
        own_seed = (seed + repeat) % 2**32
        fold_of = deal_folds(groups, has, settings.folds, own_seed)
        for number in range(settings.folds):
            held_out, rest = np.flatnonzero(fold_of == number), np.flatnonzero(fold_of != number)
            if settings.epochs_from == "inner":
                inner = inner_val([groups[row] for row in rest], has[rest], own_seed)
                train, val = rest[~inner], rest[inner]
            else:  # to watch the training by, and to choose nothing
                watched = shuffled([keys[row] for row in rest], own_seed)[:NUM_WATCHED]
                train, val = rest, rest[sorted(watched)]
            rows = {"train": train.tolist(), "val": val.tolist(), "test": held_out.tolist()}
            yield Fold(repeat, number, own_seed, rows)


def check_crossval(config: Config, settings: Settings) -> Dataset:
    """The config's set, if it can be cross-validated so, told before anything is written or trained. Raises: UserError."""
    if config.transfer.stages:
        raise UserError("transfer.stages: a chain can't be cross-validated yet; give the config of one training.")
    check_settings(settings, config.train.early_stop_epochs)
    if config.data.shards is None:
        open_shards(config)  # says so
    dataset = open_dataset(str(config.data.shards), storage_of(config))
    if dataset.info.get("fold"):
        raise UserError(
            f"{dataset.folder} is the set of one fold of a cross-validation: give the set it was made from."
        )
    members = read_members(dataset)
    has, names = class_columns(members.labels, dataset.classes)
    check_folds(members.groups, has, names, settings.folds)
    least = min(len(fold.rows_of["train"]) for fold in plan_folds(members, settings, config.train.seed))
    if least < config.data.global_batch_size:
        raise UserError(
            f"data.global_batch_size = {config.data.global_batch_size}: the smallest fold trains on {least} images; set it to "
            f"{least} or less"
        )
    return dataset


def _prepared(
    config: Config, folder: Folder, members: Members, settings: Settings, number: int, fold: Fold
) -> FoldTrial:
    """The fold's set written, and its training."""
    said = {
        "repeat": fold.repeat, "fold": fold.number, "num_folds": settings.folds, "epochs": settings.epochs_from,
        "val": "samples of train, to watch it by" if settings.epochs_from == "fixed" else "held back to choose the epoch on",
    }  # fmt: skip
    place = folder.part(f"{SETS}/{fold.name}")
    overrides = {"data.shards": place.url, "train.seed": fold.seed}
    # Whoever may read a public source has no such right where its folds lie.
    data = {"shards": place.url} | ({"anonymous": False} if place.remote else {})
    own = config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "train": config.train.model_copy(update={"seed": fold.seed}),
        }
    )
    write_fold_set_in(members, fold.rows_of, place, said, seed=fold.seed, storage=storage_of(own))
    check_inputs(own)
    name = f"folds/{fold.name}"
    return FoldTrial(number, overrides, own, name, folder.part(name))


def _forget(folder: Folder, name: str) -> None:
    """Delete a fold's set, or all of them; in a store only where no other driver may be at work on it by now."""
    if isinstance(folder, StoreFolder) and folder.guard is not None:
        folder.guard(now=True)
    folder.delete_tree(name)


def score_held_out(folder: Folder, config: Config) -> None:
    """Score the held-out fold once with a finished fold's model and write ``predictions/held_out.parquet``.

    Raises: DataError, the run's results, checkpoint or set is damaged or of another set.
    """
    found, dataset = results.read_results(folder), open_shards(config)
    if dataset.sha256 != found["provenance"]["dataset_sha256"]:
        raise DataError(
            f"{folder.url}: its results are of another set than the fold's; remove the folder and run again."
        )
    run = LocalRun(folder)
    set_threads(config, 1)
    network = create_network(config, dataset, device=run.device, rank=0, load_weights=False)
    network.model.load_state_dict(checkpoint.load(folder, found["best_checkpoint"])[0])
    predictions = score_split(scorer_of(config, network), dataset, "test", rank=0, world_size=1)
    assert predictions is not None
    sink = io.BytesIO()
    pq.write_table(predictions_table(dataset, "test", predictions), sink)
    folder.write(HELD_OUT_FILE, sink.getvalue())


def _same_plan(folder: Folder, plan: Mapping[str, Any]) -> None:
    """Note what is being cross-validated how, or compare. Raises: UserError, the folder holds another."""
    if not folder.exists(PLAN_FILE):
        if folder.exists("results.json"):
            raise UserError(
                f"{folder.url} holds a single training, no cross-validation; name another folder with --run-dir."
            )
        write_json(folder, PLAN_FILE, plan)
        return
    before = read_json(folder, PLAN_FILE)
    changes = [f"{name}: {before.get(name)} -> {value}" for name, value in plan.items() if before.get(name) != value]
    if changes:
        raise UserError(
            f"{folder.url} holds another cross-validation ({'; '.join(changes)}); --resume needs the same one. More repeats "
            "can't be added to it: name another folder with --run-dir."
        )
