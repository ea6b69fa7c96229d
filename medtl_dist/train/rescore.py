"""run folder → predictions and results of one more split: the best checkpoint, scored again in this process."""

from __future__ import annotations

from typing import Any

from medtl_dist import collectives
from medtl_dist.collectives import agreed
from medtl_dist.config import Config
from medtl_dist.data.shards import Dataset
from medtl_dist.errors import DataError, MedtlError, UserError
from medtl_dist.run import LocalRun
from medtl_dist.train import checkpoint, results
from medtl_dist.train.evaluate import Predictions, score_split
from medtl_dist.train.run_store import read_config_in
from medtl_dist.train.setup import create_network, open_shards, scorer_of, set_threads
from medtl_dist.train.state import disk_error


def evaluate_run(run: LocalRun, split: str) -> dict[str, Any]:
    """Score ``split`` with a finished run's best checkpoint, update its predictions and results, and return its entry.

    The threshold stays the one fixed on val when the run ended. Scoring test counts in the ledger. Collective where
    there are several ranks; the entry is returned on rank 0, ``{}`` elsewhere.

    Raises:
        UserError: not a finished run, a split that the set lacks, or another data set than the run's.
        DataError: the checkpoint or a shard is damaged.
    """
    folder = run.folder
    config = read_config_in(folder)
    if not folder.exists("results.json"):
        raise UserError(f"{folder.path}: the run has not finished; `medtl train --resume` goes on with it.")
    known = results.read_results(folder)
    set_threads(config, run.world_size)
    dataset = open_shards(config)
    if dataset.sha256 != known["provenance"]["dataset_sha256"]:
        raise UserError(
            f"{dataset.folder}: not the data set that this run was trained on; its dataset.json has changed."
        )
    if not dataset.shards(split):
        raise UserError(f"{dataset.folder} has no {split} images; its splits: {', '.join(dataset.splits)}.")
    network = create_network(config, dataset, device=run.device, rank=run.rank, load_weights=False)
    weights, _, meta = agreed(lambda: checkpoint.load(folder, known["best_checkpoint"]))
    if meta["classes"] != list(dataset.classes):
        raise DataError(f"{folder.path}: its checkpoint was trained for other classes.")
    network.model.load_state_dict(weights)
    predictions = score_split(scorer_of(config, network), dataset, split, rank=run.rank, world_size=run.world_size)
    entry: dict[str, Any] = {}
    failure: MedtlError | None = None
    if predictions is not None:
        try:
            entry = _record(config, run, dataset, split, predictions, known)
        except MedtlError as error:
            failure = error
        except OSError as error:
            failure = disk_error(run, error)
    collectives.raise_together(failure)
    return entry


def _record(
    config: Config, run: LocalRun, dataset: Dataset, split: str, predictions: Predictions, known: dict[str, Any]
) -> dict[str, Any]:
    """Write the split's predictions and its entry of the results, and return the entry."""
    if split == "test":
        known["test_openings"] = results.note_opening(config, dataset, run.folder)
    results.write_predictions(run.folder, dataset, split, predictions)
    entry = results.summarise_split(config, dataset, split, predictions, known)
    known["splits"][split] = entry
    known["headline"] = results.headline(known["splits"])
    known["cautions"] = results.cautions(config, dataset, known["model"]["weights"], known["splits"])
    results.write_results(run.folder, known)
    return entry
