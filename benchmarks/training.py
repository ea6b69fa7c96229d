"""Training speed: our whole loop, from shards to optimiser steps, beside the bare PyTorch step, a plain script and Lightning.

    pip install --no-deps --target .venv/peers -r benchmarks/peers.txt        (make bench-training does it)
    python benchmarks/training.py --peers .venv/peers

Images per second of the clock, ResNet101 at 224 px, batch 16, every row in a process of its own with all cores, after a warm-up
epoch. ``bare`` repeats one batch that lies in memory: the limit of its flags (precision, memory layout, frozen stages). ``ours``
is ``fit``: reading and decoding shards, checksums, augmentation, loss reductions, progress; an epoch's steps, without its
evaluation, which has rows of its own. ``plain`` is a DataLoader with PIL over the same images as files, SGD, PyTorch's defaults;
Lightning the same with its Trainer. ``--ray`` adds the start-up of a run on Ray Train, trivial and ours.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from medtl_dist.config import Config, load_config
from medtl_dist.data.pack import PackOptions, pack
from medtl_dist.data.shards import open_dataset, read_split
from medtl_dist.data.sources import Columns
from medtl_dist.demo_data import write_demo_images
from medtl_dist.models.freezing import freeze
from medtl_dist.models.registry import spec
from medtl_dist.run import Folder, LocalRun
from medtl_dist.train.evaluate import score_split
from medtl_dist.train.loop import fit
from medtl_dist.train.precision import resolve
from medtl_dist.train.setup import available_cpus, create_network, open_shards, scorer_of

BATCH = 16


def config_of(args: argparse.Namespace, depth: int, workers: int = 0) -> Config:
    settings = {
        "data.shards": str(args.work / "set"), "data.image_size_px": args.px, "data.global_batch_size": BATCH,
        "data.eval_batch_size": BATCH, "data.normalisation": "half", "model.backbone": args.backbone,
        "model.weights": "random", "model.frozen_depth": depth, "optim.name": "sgd", "optim.lr": 0.001,
        "train.epochs": 2, "train.precision": args.precision, "cluster.num_workers": workers,
    }  # fmt: skip
    return load_config(overrides=[f"{key}={value}" for key, value in settings.items()])


def prepare(work: Path, px: int, batches: int) -> None:
    """Packed made-up radiographs: two epochs' worth of train, as many again in val, and the same images as files."""
    table = write_demo_images(work / "images", num_patients=max(8, 2 * batches * BATCH // 2), seed=0, image_size_px=px)
    pack(
        table,
        work / "set",
        PackOptions(columns=Columns(group=("patient_id",)), image_size_px=px, fractions=(0.5, 0.5, 0)),
    )


def bare(args: argparse.Namespace, depth: int, *, plain: bool = False) -> float:
    model = torchvision.models.get_model(args.backbone, weights=None, num_classes=2)
    freeze(model, spec(args.backbone), depth)
    precision = resolve("fp32" if plain else args.precision, torch.device("cpu"))
    images = torch.randn(BATCH, 3, args.px, args.px)
    if not plain:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(BATCH) % 2
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.001, momentum=0.9)
    model.train()

    def step() -> None:
        with precision.autocast():
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return rate(step, args.batches)


def bare_inference(args: argparse.Namespace) -> float:
    model = torchvision.models.get_model(args.backbone, weights=None, num_classes=2)
    model.eval().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    precision = resolve(args.precision, torch.device("cpu"))
    images = torch.randn(BATCH, 3, args.px, args.px).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with torch.no_grad(), precision.autocast():
            model(images)

    return rate(step, args.batches)


def rate(step: Callable[[], None], batches: int) -> float:
    step()
    began = time.perf_counter()
    for _ in range(batches):
        step()
    return batches * BATCH / (time.perf_counter() - began)


def ours(args: argparse.Namespace, depth: int, *, rank: int = 0, world_size: int = 1) -> float:
    with tempfile.TemporaryDirectory() as folder:
        place = Folder.local(args.shared if world_size > 1 else folder)
        run = LocalRun(place, torch.device("cpu"), rank, world_size, rank)
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            fit(config_of(args, depth), run)
        return run.reports[-1]["images_per_s"] or 0.0  # of the second epoch


def our_evaluation(args: argparse.Namespace) -> float:
    config = config_of(args, 0)
    dataset = open_shards(config)
    network = create_network(config, dataset, device=torch.device("cpu"), rank=0)
    scorer = scorer_of(config, network)
    score_split(scorer, dataset, "val", rank=0, world_size=1)
    began = time.perf_counter()
    found = score_split(scorer, dataset, "val", rank=0, world_size=1)
    assert found is not None
    return len(found.keys) / (time.perf_counter() - began)


def two_ranks(args: argparse.Namespace) -> float:
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        args.shared = folder
        ranks = [context.Process(target=_rank, args=(rank, args, folder, results)) for rank in range(2)]
        for process in ranks:
            process.start()
        found = [results.get(timeout=1800) for _ in ranks]
        for process in ranks:
            process.join()
    return min(found)


def _rank(rank: int, args: argparse.Namespace, folder: str, results: Any) -> None:
    import torch.distributed as dist

    os.environ["LOCAL_WORLD_SIZE"] = "2"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    value = ours(args, 0, rank=rank, world_size=2)
    dist.destroy_process_group()
    results.put(value)


def file_loader(args: argparse.Namespace) -> Any:
    from PIL import Image
    from torch.utils.data import DataLoader
    from torchvision.transforms import v2

    view = v2.Compose(
        [
            v2.RandomResizedCrop(args.px, scale=(0.8, 1.0)),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    wanted = read_split(open_dataset(args.work / "set"), "train").num_rows // BATCH * BATCH
    files = sorted((args.work / "images").rglob("*.png"))[:wanted]

    class Files(torch.utils.data.Dataset[tuple[Tensor, int]]):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, place: int) -> tuple[Tensor, int]:
            return view(Image.open(files[place]).convert("RGB")), place % 2

    return DataLoader(Files(), BATCH, shuffle=True)


def plain_script(args: argparse.Namespace) -> float:
    loader = file_loader(args)
    model = torchvision.models.get_model(args.backbone, weights=None, num_classes=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    began = 0.0
    for _ in range(2):
        began = time.perf_counter()
        for images, labels in loader:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return len(loader) * BATCH / (time.perf_counter() - began)


def lightning(args: argparse.Namespace, precision: str) -> float:
    import pytorch_lightning as pl  # pyright: ignore[reportMissingImports]

    epochs: list[float] = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = torchvision.models.get_model(args.backbone, weights=None, num_classes=2)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            del batch_idx
            loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def on_train_epoch_start(self) -> None:
            epochs.append(time.perf_counter())

        def on_train_epoch_end(self) -> None:
            epochs.append(time.perf_counter())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.001, momentum=0.9)

    loader = file_loader(args)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=2, precision=precision, accelerator="cpu", default_root_dir=folder,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Module(), loader)
    return len(loader) * BATCH / (epochs[3] - epochs[2])


ROWS: dict[str, Callable[[argparse.Namespace], float]] = {
    "bare step": lambda args: bare(args, 0),
    "ours, whole loop": lambda args: ours(args, 0),
    "ours, 2 ranks of one thread each": two_ranks,
    "bare step, frozen to 4": lambda args: bare(args, 4),
    "ours, whole loop, frozen to 4": lambda args: ours(args, 4),
    "bare inference": bare_inference,
    "ours, evaluation": our_evaluation,
    "bare step, fp32, PyTorch's layout": lambda args: bare(args, 0, plain=True),
    "plain script, fp32": plain_script,
    "Lightning, defaults": lambda args: lightning(args, "32-true"),
    "Lightning, bf16": lambda args: lightning(args, "bf16-mixed"),
}
BESIDE = {
    "ours, whole loop": "bare step",
    "ours, 2 ranks of one thread each": "ours, whole loop",
    "ours, whole loop, frozen to 4": "bare step, frozen to 4",
    "ours, evaluation": "bare inference",
    "plain script, fp32": "bare step",
    "Lightning, defaults": "bare step",
    "Lightning, bf16": "bare step",
}


def ray_start_up(args: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """Seconds of a run whose training is next to nothing, Ray's own start included."""
    trivial = (
        "import os; os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0'); import ray;"
        "from ray.train import ScalingConfig; from ray.train.torch import TorchTrainer;"
        "TorchTrainer(lambda: ray.train.report({'loss': 0.0}), scaling_config=ScalingConfig(num_workers=2)).fit()"
    )
    yield "Ray Train, 2 workers that report once", seconds([sys.executable, "-c", trivial])
    command = [sys.executable, "-c", "from medtl_dist.cli.main import main; main()", "train", "--run-dir"]
    settings = ["model.backbone=resnet18", "model.weights=random", "data.image_size_px=32", "data.global_batch_size=8"]
    settings += ["data.normalisation=half", "train.epochs=1", f"data.shards={args.work / 'tiny'}"]
    tiny = write_demo_images(args.work / "tiny-images", num_patients=16, seed=0, image_size_px=32)
    pack(tiny, args.work / "tiny", PackOptions(columns=Columns(group=("patient_id",)), fractions=(0.5, 0.5, 0)))
    for workers in (0, 2):
        overrides = [part for text in [*settings, f"cluster.num_workers={workers}"] for part in ("--set", text)]
        name = "ours, 2 workers, 16 small images" if workers else "ours in one process, 16 small images"
        yield name, seconds([*command, str(args.work / f"run-{workers}"), *overrides])


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peers", type=Path, help="folder where benchmarks/peers.txt is installed; without it no Lightning"
    )
    parser.add_argument("--backbone", default="resnet101")
    parser.add_argument("--px", type=int, default=224)
    parser.add_argument("--batches", type=int, default=6, help="batches per epoch, about")
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"])
    parser.add_argument("--ray", action="store_true", help="start-up on Ray Train too")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peers:
        sys.path.append(str(args.peers))
    warnings.simplefilter("ignore")
    if args.row:
        torch.set_num_threads(1 if "2 ranks" in args.row else available_cpus())
        print(json.dumps(ROWS[args.row](args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.work = Path(folder)
        prepare(args.work, args.px, args.batches)
        precision = resolve(args.precision, torch.device("cpu"))
        print(
            f"{args.backbone}, {args.px} px, batch {BATCH}, {available_cpus()} cores, {precision.name} {precision.note or ''}"
        )
        print(f"{'':38}{'images/s':>9}   share of")
        rates: dict[str, float] = {}
        for row in ROWS:
            if row.startswith("Lightning") and not args.peers:
                continue
            command = [sys.executable, __file__, "--row", row, "--work", folder, "--backbone", args.backbone]
            command += ["--px", str(args.px), "--batches", str(args.batches), "--precision", args.precision]
            command += ["--peers", str(args.peers)] if args.peers else []
            found = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            ).stdout
            rates[row] = json.loads(found.splitlines()[-1])
            beside = BESIDE.get(row)
            share = f"{rates[row] / rates[beside]:10.2f} of {beside}" if beside else ""
            print(f"{row:38}{rates[row]:9.1f}{share}", flush=True)
        for name, took in ray_start_up(args) if args.ray else ():
            print(f"{name:38}{took:9.1f} s", flush=True)


if __name__ == "__main__":
    main()
