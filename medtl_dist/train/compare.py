"""chains → compare.json: did transfer help, and what did it cost? The chain against its last stage trained alone."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medtl_dist.config import FROM_STAGE, Config, stages_of, validate
from medtl_dist.data.shards import Dataset
from medtl_dist.errors import DataError, UserError
from medtl_dist.metrics.paired import compare_over_seeds
from medtl_dist.metrics.scores import by_patient
from medtl_dist.run import Folder, LocalRun
from medtl_dist.train import checkpoint, results
from medtl_dist.train.chain import TrainOne, history_of, read_json, seconds_of, train_chain, write_json
from medtl_dist.train.evaluate import Predictions, score_split
from medtl_dist.train.run_store import read_config_in
from medtl_dist.train.setup import create_network, open_shards, scorer_of, set_threads

SCHEMA_VERSION = 1
COMPARE_FILE = "compare.json"


@dataclasses.dataclass(frozen=True)
class Scored:
    """A split's predictions as compared: ``keys`` [n], ``labels`` int [n], ``logits`` float [n, classes], ``groups`` [n]
    or None, ``unit`` what a row is."""

    keys: NDArray[Any]
    labels: NDArray[np.int64]
    logits: NDArray[np.float64]
    groups: NDArray[Any] | None
    unit: str = "image"


def compare_transfer(
    config: Config, folder: Folder, train_one: TrainOne, *, say: Callable[[str], None], open_test: bool = False
) -> dict[str, Any]:
    """Train the chain and its last stage alone with each seed, in ``folder/seeds/SEED``, and write ``compare.json``.

    What has finished is not trained again. Compared is val, or test where it is opened.
    Raises MedtlError as the training itself; UserError for a task of another kind than binary and multiclass.
    """
    task = open_shards(stages_of(config)[-1].config).task
    if task not in ("binary", "multiclass"):
        raise UserError(f"transfer.compare = true: task {task} can't be compared yet; binary and multiclass can.")
    split = "test" if open_test else "val"
    rows: list[dict[str, Any]] = []
    scored: list[tuple[Scored, Scored]] = []
    for seed in config.transfer.seeds or [config.train.seed]:
        within = f"seeds/{seed}"
        seeded = with_seed(config, seed)
        say(f"seed {seed}: the chain")
        entries = train_chain(seeded, folder.part(within), train_one, say=say, open_test=open_test)["stages"]
        say(f"seed {seed}: {entries[-1]['name']} alone")
        names = f"{within}/alone", f"{within}/{entries[-1]['folder']}"
        alone, last = (folder.part(name) for name in names)
        train_one(alone_of(seeded), alone, open_test)
        pair = (read_scored(alone, split), read_scored(last, split))
        scored.append(pair)
        rows.append(
            {
                "seed": seed,
                "alone": {"folder": names[0], "seconds": seconds_of(alone)},
                "chain": {
                    "folder": names[1],
                    "seconds": sum(entry["seconds"] for entry in entries),
                },
                "comparison": compared(alone, [pair]),
                "source": forgetting(folder.part(f"{within}/{entries[0]['folder']}"), last),
                "time": time_to_reach(alone, last, before_s=sum(entry["seconds"] for entry in entries[:-1])),
            }
        )
    content = {
        "schema_version": SCHEMA_VERSION,
        "split": split,
        "difference": "chain minus target alone",
        "seeds": rows,
        "pooled": compared(folder.part(rows[0]["alone"]["folder"]), scored),
        "cautions": _cautions(rows, split),
    }
    write_json(folder, COMPARE_FILE, content)
    return read_json(folder, COMPARE_FILE)


def with_seed(config: Config, seed: int) -> Config:
    """The config with this ``train.seed`` in every stage."""
    tree = config.model_dump(mode="json")
    for part in (tree, *tree["transfer"]["stages"]):
        part["train"] = part.get("train", {}) | {"seed": seed}
    return validate(tree)


def alone_of(config: Config) -> Config:
    """The last stage as if there were no others: the same in all but its weights, which are the whole config's."""
    last = stages_of(config)[-1].config
    if not last.model.weights.startswith(FROM_STAGE):
        return last
    update = {key: getattr(config.model, key) for key in ("weights", "keep_head", "zero_init_residual")}
    return last.model_copy(update={"model": last.model.model_copy(update=update)})


def compared(run: Folder, pairs: Sequence[tuple[Scored, Scored]]) -> dict[str, Any]:
    """The comparison of the pairs (a, b), one per seed, all of the same images, as plain values."""
    first = pairs[0][0]
    if any(list(one.keys) != list(first.keys) for pair in pairs for one in pair):
        raise DataError(f"{run.url}: the runs to compare scored different images; train again in a new run folder.")
    binary = results.read_results(run)["task"] == "binary"
    a, b = ([pair[i].logits for pair in pairs] for i in (0, 1))
    found = compare_over_seeds(first.labels, a, b, first.groups, binary=binary, unit=first.unit)
    return dataclasses.asdict(found)


def read_scored(run: Folder, split: str) -> Scored:
    """A finished run's predictions of a split, by key, at the unit of its config."""
    found = results.read_results(run)
    table = pq.read_table(io.BytesIO(run.read(f"predictions/{split}.parquet"))).sort_by("key")
    logits = np.stack([table.column(f"logit_{name}").to_numpy() for name in found["classes"]], axis=1)
    known = found["data"]["group_source"] != "none"
    groups = np.asarray(table.column("group").to_pylist()) if known else None
    keys = np.asarray(table.column("key").to_pylist())
    return at_unit(read_config_in(run), Scored(keys, table.column("label").to_numpy(), logits, groups))


def at_unit(config: Config, images: Scored) -> Scored:
    """The predictions as they are, or one row per patient where the config counts patients."""
    if config.evaluate.unit != "patient" or images.groups is None:
        return images
    found = by_patient(images.labels, images.logits, images.groups, aggregate=config.evaluate.aggregate)
    return Scored(np.asarray(found.groups), found.labels, found.logits, None, "patient")


def forgetting(source: Folder, last: Folder) -> dict[str, Any]:
    """The first stage's val AUC by its own model (a) and by the chain's last one (b), scored here and now.

    ``reason`` says why there is no second number: another head can't be asked about the source's classes.
    """
    dataset, target = open_shards(read_config_in(source)), open_shards(read_config_in(last))
    if dataset.classes != target.classes:
        return {"reason": "the source has other classes than the target: the last model has no outputs for them"}
    if dataset.channels != target.channels:
        return {"reason": "one set is grey and the other is not: the last model does not take the source's images"}
    after = _score(last, dataset)
    groups, order = results.groups_of(dataset, "val"), np.argsort(after.keys)
    images = Scored(
        np.asarray(after.keys)[order],
        after.labels[order],
        after.logits[order],
        groups if groups is None else groups[order],
    )
    return compared(source, [(read_scored(source, "val"), at_unit(read_config_in(source), images))])


def _score(folder: Folder, dataset: Dataset) -> Predictions:
    """Another data set's val by a run's best checkpoint, in this process."""
    config, run = read_config_in(folder), LocalRun(folder)
    set_threads(config, run.world_size)
    network = create_network(config, dataset, device=run.device, rank=0, load_weights=False)
    step = results.read_results(run.folder)["best_checkpoint"]
    network.model.load_state_dict(checkpoint.load(run.folder, step)[0])
    found = score_split(scorer_of(config, network), dataset, "val", rank=0, world_size=1)
    assert found is not None
    return found


def time_to_reach(alone: Folder, last: Folder, *, before_s: float) -> dict[str, Any]:
    """When the chain's last stage first reached the best val AUC of the target alone, beside when that did itself.

    ``epochs`` count the last stage's alone; ``seconds`` too, ``seconds_in_all`` the earlier stages' as well. None: never.
    """
    own, chained = _history(alone), _history(last)
    goal = max((row["val_auc"] for row in own if row["val_auc"] is not None), default=None)
    if goal is None:
        return {"val_auc": None, "alone": None, "chain": None}
    by_alone, by_chain = _first_at(own, goal), _first_at(chained, goal)
    if by_chain is not None:
        by_chain["seconds_in_all"] = by_chain["seconds"] + before_s
    return {"val_auc": goal, "alone": by_alone, "chain": by_chain}


def _history(run: Folder) -> list[dict[str, Any]]:
    return sorted(history_of(run, ["epoch", "val_auc", "epoch_s"]), key=lambda row: row["epoch"])


def _first_at(history: Sequence[Mapping[str, Any]], goal: float) -> dict[str, Any] | None:
    seconds = 0.0
    for epochs, row in enumerate(history, start=1):
        seconds += row["epoch_s"]
        if row["val_auc"] is not None and row["val_auc"] >= goal:
            return {"epochs": epochs, "seconds": seconds}
    return None


def _cautions(rows: Sequence[Mapping[str, Any]], split: str) -> list[str]:
    found: list[str] = []
    if split == "val":
        found.append(
            "Compared on val, where each model's epoch was chosen: both numbers are optimistic; compare with --test."
        )
    if len(rows) == 1:
        found.append("One seed: another one may turn the difference round; give transfer.seeds three or more.")
    return found


def describe(content: Mapping[str, Any]) -> list[str]:
    """The comparison in a few lines for a person."""
    lines = []
    for row in content["seeds"]:
        lines.append(f"seed {row['seed']}: {_sentence(row['comparison'])}")
        lines.append(f"  {_of_source(row['source'])}; {_of_time(row)}")
    lines.append(f"{content['split']} over {len(content['seeds'])} seed(s): {_sentence(content['pooled'])}")
    return lines + [f"note  {text}" for text in content["cautions"]]


def _sentence(found: Mapping[str, Any]) -> str:
    if found["difference"] is None:
        return str(found["reason"])
    text = f"AUC {found['auc_a']:.3f} alone, {found['auc_b']:.3f} with transfer, difference {found['difference']:+.3f}"
    if found["interval"] is not None:
        text += (
            f" [{found['interval'][0]:+.3f}, {found['interval'][1]:+.3f}], p {found['p_value']:.2g} ({found['method']})"
        )
    return text + (f"; {found['warning']}" if found["warning"] else "")


def _of_source(found: Mapping[str, Any]) -> str:
    if found.get("difference") is None:
        return f"source AUC afterwards unknown: {found['reason']}"
    return f"source val AUC {found['auc_a']:.3f} before, {found['auc_b']:.3f} after"


def _of_time(row: Mapping[str, Any]) -> str:
    time, cost = row["time"], f"{row['chain']['seconds']:.0f} s in all against {row['alone']['seconds']:.0f} s alone"
    if time["val_auc"] is None:
        return cost
    goal = f"val AUC {time['val_auc']:.3f} of the target alone"
    if time["chain"] is None:
        return f"{goal} never reached; {cost}"
    return (
        f"{goal} reached after {time['chain']['epochs']} epochs ({time['chain']['seconds_in_all']:.0f} s with the stages "
        f"before) against {time['alone']['epochs']} ({time['alone']['seconds']:.0f} s); {cost}"
    )
