"""What a sweep costs, one table from one run: ours with and without prefix cache and warm processes, beside Ray Tune with
TorchTrainer as its documentation wires them. Same trials, epochs, images and image size; every side in a process and on a
cluster of its own, one after another.

    python benchmarks/sweep.py --data SET --backbone resnet101 --image-size 224 --depths 4,5 --trials 12 --epochs 5
    python benchmarks/sweep.py --smoke        (made-up images, a small network: under three minutes)

Fixed views: one per image unless the side says otherwise; fresh views in every epoch leave nothing but val to be kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

SIDES = {
    "cached": "ours: prefix cache, warm processes",
    "views5": "ours: the same, 5 fixed views an image",
    "fresh": "ours: the same, fresh views each epoch",
    "uncached": "ours: warm processes, no cache",
    "cold": "ours: prefix cache, a process per trial",
    "plain-bf16": "Ray Tune + TorchTrainer, bf16",
    "plain-fp32": "Ray Tune + TorchTrainer, fp32 (default)",
}


def main() -> None:
    """Prepare the images once, run the sides, print the table."""
    options = arguments()
    if options.side:
        print(json.dumps(one_side(options)))
        return
    with tempfile.TemporaryDirectory(prefix="medtl-sweep-") as scratch:
        work = Path(scratch)
        if options.data is None:
            options.data = made_up_set(work)
        export(Path(options.data), work / "folders")
        rows = []
        for side in options.sides.split(","):
            rows.append(measured(side, options, work))
            print(f"{side}: {rows[-1]['whole_s']:.1f} s", file=sys.stderr, flush=True)
    report(rows, options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="packed shard set; default: made-up images")
    parser.add_argument("--backbone", default="resnet101", help="a torchvision ResNet")
    parser.add_argument("--weights", default="random", help="file of torchvision weights for both, or random")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--depths", default="4,5", help="frozen stages (0 to 5), dealt to the trials in turn")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--cpus", type=int, default=1, help="CPUs of a trial")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke:
        options.backbone, options.image_size, options.batch, options.trials, options.epochs = "resnet18", 32, 8, 2, 1
    return options


def trials_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Frozen depth, learning rate and schedule of each trial: the same for all sides."""
    depths = [int(depth) for depth in options.depths.split(",")]
    points = itertools.cycle(itertools.product(("constant", "cosine"), (0.03, 0.01, 0.003), depths))
    return [
        {"depth": depth, "lr": lr, "schedule": schedule}
        for schedule, lr, depth in itertools.islice(points, options.trials)
    ]


def made_up_set(work: Path) -> str:
    from medtl_dist.data.pack import PackOptions, pack
    from medtl_dist.data.sources import Columns
    from medtl_dist.demo_data import write_demo_images

    (work / "images").mkdir()
    source = write_demo_images(work / "images", num_patients=60, seed=0, image_size_px=64)
    pack(source, work / "set", PackOptions(columns=Columns(group=("patient_id",)), image_size_px=64))
    return str(work / "set")


def export(shards: Path, folders: Path) -> None:
    """The set's train and val images as torchvision's ImageFolder reads them."""
    import pyarrow.parquet as pq

    index = pq.read_table(shards / "index.parquet", columns=["key", "split", "label"]).to_pylist()
    label_of = {row["key"].hex(): row["label"] for row in index}
    for split in ("train", "val"):
        for label in set(label_of.values()):
            (folders / split / str(label)).mkdir(parents=True, exist_ok=True)
        for shard in sorted(shards.glob(f"{split}-*.tar")):
            with tarfile.open(shard) as tar:
                for member in tar:
                    if not member.name.endswith(".json"):
                        data = tar.extractfile(member)
                        assert data is not None
                        place = folders / split / str(label_of[member.name.split(".")[0]]) / member.name
                        place.write_bytes(data.read())


def measured(side: str, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """One side in a process of its own. Its whole time is told with it, start-up and all."""
    given = {name: value for name, value in vars(options).items() if name not in ("side", "work", "sides", "smoke")}
    command = [sys.executable, __file__, "--side", side, "--work", str(work)]
    command += [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    began = time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"BEGAN": str(began)})
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"side": side, "whole_s": time.time() - began}


def one_side(options: argparse.Namespace) -> dict[str, Any]:
    from cluster.launch import set_environment

    set_environment(own_cluster=True)
    if options.side.startswith("plain"):
        return plain(options)
    return ours(options)


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """Our trials, without a rule that stops any."""
    import pytest

    import cluster.trial_desk as desks
    from cluster.trial_state import TrialSpec
    from cluster.trials import run_trials
    from medtl_dist.config import Config, load_config

    first: list[float] = []
    up, ended, change = desks.Desk.up, desks.Desk.ended, pytest.MonkeyPatch()

    def noted(desk: desks.Desk, number: int) -> None:
        first.append(time.time())
        up(desk, number)

    def as_after_a_crash(desk: desks.Desk, number: int, end: Any) -> bool:
        ended(desk, number, end)
        return False  # so that the next trial gets a new process

    change.setattr(desks.Desk, "up", noted)
    if options.side == "cold":
        change.setattr(desks.Desk, "ended", as_after_a_crash)

    def config(trial: dict[str, Any]) -> Config:
        given = {
            "data.shards": Path(options.data).absolute(), "data.image_size_px": options.image_size,
            "data.global_batch_size": options.batch, "model.backbone": options.backbone, "model.weights": options.weights,
            "model.frozen_depth": trial["depth"], "optim.name": "sgd", "optim.lr": trial["lr"],
            "schedule.name": trial["schedule"], "train.epochs": options.epochs, "train.precision": "bf16",
            "train.threads": options.cpus, "cluster.cpus_per_worker": options.cpus,
            "augment.views": {"views5": 5, "fresh": "null"}.get(options.side, 1), "evaluate.bootstrap_samples": 200,
        }  # fmt: skip
        return load_config(overrides=[f"{key}={value}" for key, value in given.items()])

    specs = [TrialSpec(number, trial, config(trial)) for number, trial in enumerate(trials_of(options))]
    folder = Path(options.work) / options.side
    warm = {"cache_dir": folder / "cache", "cache_mode": "off" if options.side == "uncached" else "auto"}
    outcomes = run_trials(folder, specs, specs[0].config, warm_options=warm)
    assert all(outcome.state == "finished" for outcome in outcomes), [outcome.reason for outcome in outcomes]
    return {
        "startup_s": first[0] - float(os.environ["BEGAN"]),
        "best_auc": max((o.best.val_auc or 0.0 for o in outcomes if o.best is not None), default=None),
        "overhead_s": statistics.median(beside_epochs(folder, o) for o in outcomes),
    }


def beside_epochs(folder: Path, outcome: Any) -> float:
    """Seconds of a trial, once a process has it, that are none of its epochs and their checkpoints."""
    from cluster.trial_state import epochs_logged

    rows = epochs_logged(folder / outcome.folder)
    return outcome.seconds - sum(row["epoch_s"] + (row.get("checkpoint_s") or 0.0) for row in rows)


def plain(options: argparse.Namespace) -> dict[str, Any]:
    """Tune's trials, each of which builds a TorchTrainer of one worker, as the user guide shows it."""
    import ray
    from ray import tune
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    work, cpus = Path(options.work), options.cpus
    place = work / options.side
    fixed = {
        "folders": str(work / "folders"), "marks": str(place), "backbone": options.backbone, "size": options.image_size,
        "batch": options.batch, "epochs": options.epochs, "bf16": options.side == "plain-bf16", "weights": options.weights,
    }  # fmt: skip

    def driver(config: dict[str, Any]) -> None:
        TorchTrainer(
            plain_training,
            train_loop_config=config["train_loop_config"] | fixed,
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": cpus}),
            run_config=RunConfig(
                name=tune.get_context().get_trial_id(),
                storage_path=str(place / "train"),
                callbacks=[TuneReportCallback()],
            ),
        ).fit()

    place.mkdir()
    threads = len(os.sched_getaffinity(0))
    # One more than there are: with as many, the drivers' hundredths of a CPU would leave one trial fewer at work than ours has.
    ray.init(address="local", num_cpus=threads + 1, log_to_driver=False)
    tuner = tune.Tuner(
        tune.with_resources(driver, {"CPU": 0.01}),
        param_space={"train_loop_config": tune.grid_search(trials_of(options))},
        tune_config=tune.TuneConfig(metric="auc", mode="max", max_concurrent_trials=max(1, threads // cpus)),
        run_config=tune.RunConfig(storage_path=str(place / "tune"), verbose=0),
    )
    results = tuner.fit()
    assert not results.errors, results.errors
    best = results.get_best_result(scope="all").metrics
    ray.shutdown()
    starts = [float(mark.read_text()) for mark in place.glob("*.start")]
    return {"startup_s": min(starts) - float(os.environ["BEGAN"]), "best_auc": best["auc"] if best else None}


def plain_training(config: dict[str, Any]) -> None:
    """A worker's loop as a tutorial has it: ImageFolder, DataLoader, the frozen stages without gradients."""
    import ray.train
    import torch
    import torchvision
    from ray.train.torch import prepare_data_loader, prepare_model
    from sklearn.metrics import roc_auc_score
    from torch.utils.data import DataLoader
    from torchvision import transforms as tf

    name = ray.train.get_context().get_experiment_name()
    (Path(config["marks"]) / f"{name}.start").write_text(str(time.time()))
    grey = [tf.Grayscale(3), tf.ToTensor(), tf.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    crop = tf.RandomResizedCrop(config["size"], scale=(0.8, 1.0))
    train = torchvision.datasets.ImageFolder(f"{config['folders']}/train", tf.Compose([crop, *grey]))
    val = torchvision.datasets.ImageFolder(
        f"{config['folders']}/val", tf.Compose([tf.Resize((config["size"], config["size"])), *grey])
    )
    loader = prepare_data_loader(DataLoader(train, batch_size=config["batch"], shuffle=True, drop_last=True))
    val_loader = prepare_data_loader(DataLoader(val, batch_size=config["batch"]))
    model = getattr(torchvision.models, config["backbone"])()
    if config["weights"] != "random":
        model.load_state_dict(torch.load(config["weights"], weights_only=True))
    model.fc = torch.nn.Linear(model.fc.in_features, len(train.classes))
    stages = [[model.conv1, model.bn1], [model.layer1], [model.layer2], [model.layer3], [model.layer4]]
    for stage in stages[: config["depth"]]:
        for module in stage:
            module.requires_grad_(False)
    model = prepare_model(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=config["lr"], momentum=0.9)
    cosine = config["schedule"] == "cosine"
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config["epochs"]) if cosine else None
    autocast = torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=config["bf16"])
    for _ in range(config["epochs"]):
        model.train()
        for images, labels in loader:
            with autocast:
                loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if schedule is not None:
            schedule.step()
        model.eval()
        scores: list[float] = []
        truth: list[int] = []
        with torch.no_grad(), autocast:
            for images, labels in val_loader:
                scores += model(images).float()[:, 1].tolist()
                truth += labels.tolist()
        ray.train.report({"auc": float(roc_auc_score(truth, scores))})


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """The table: whole time, its start-up, how many times faster than the bf16 script, with and without start-up; and, where
    processes stay warm or not, the median seconds of a trial that are none of its epochs."""
    peer = next((row for row in rows if row["side"] == "plain-bf16"), None)
    print(
        f"{options.trials} trials of {options.backbone} at {options.image_size} px, frozen depths {options.depths}, "
        f"{options.epochs} epochs, batch {options.batch}, {options.cpus} CPU a trial, "
        f"{len(os.sched_getaffinity(0))} CPUs"
    )
    print(f"{'':42}{'whole':>9}{'start-up':>10}{'rest':>9}{'faster':>8}{'rest':>7}{'best AUC':>10}{'a trial':>9}")
    for row in rows:
        rest = row["whole_s"] - row["startup_s"]
        faster = ["", ""]
        if peer is not None:
            faster = [
                f"{peer['whole_s'] / row['whole_s']:.2f}",
                f"{(peer['whole_s'] - peer['startup_s']) / rest:.2f}",
            ]
        auc = "undefined" if row["best_auc"] is None else f"{row['best_auc']:.3f}"
        beside = f"{row['overhead_s']:8.1f}s" if "overhead_s" in row else ""
        print(
            f"{SIDES[row['side']]:42}{row['whole_s']:8.1f}s{row['startup_s']:9.1f}s{rest:8.1f}s{faster[0]:>8}{faster[1]:>7}{auc:>10}"
            f"{beside}"
        )


if __name__ == "__main__":
    main()
