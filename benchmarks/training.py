"""Training speed: our whole loop, from shards to optimiser steps, beside the bare PyTorch step, a plain script and Lightning.

    pip install --no-deps --target .venv/peers -r benchmarks/peers.txt        (make bench-training does it)
    python benchmarks/training.py --peers .venv/peers

Images per second of the clock, ResNet101 at 224 px, batch 16, every row in a process of its own with all cores. ``bare`` is the
PyTorch step on one batch that lies in memory, with our flags (precision, memory layout, frozen stages): the limit. It is timed in
the row's own process before and after each round, since machines drift: ``share`` is the median of a round's speed over that of
the bare steps around it. ``ours`` is ``fit``: reading and decoding shards, checksums, augmentation, loss reductions, progress; an
epoch's steps, without its evaluation, which has a row of its own. ``plain`` is a DataLoader with PIL over the same images as
files, SGD, PyTorch's defaults; Lightning the same with its Trainer. ``--ray`` adds the start-up of a run on Ray Train: of workers
that only report, of workers that take one step, and ours.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
Row = dict[str, Any]


def config_of(args: argparse.Namespace, depth: int, workers: int = 0) -> Config:
    settings = {
        "data.shards": str(args.work / "set"), "data.image_size_px": args.px, "data.global_batch_size": BATCH,
        "data.eval_batch_size": BATCH, "data.normalisation": "half", "model.backbone": args.backbone,
        "model.weights": "random", "model.frozen_depth": depth, "optim.name": "sgd", "optim.lr": 0.001,
        "train.epochs": args.rounds + 1, "train.precision": args.precision, "cluster.num_workers": workers,
    }  # fmt: skip
    return load_config(overrides=[f"{key}={value}" for key, value in settings.items()])


def prepare(work: Path, px: int, batches: int) -> None:
    """Packed made-up radiographs: an epoch's worth of train, as many again in val, and the same images as files."""
    table = write_demo_images(work / "images", num_patients=max(8, 2 * batches * BATCH // 2), seed=0, image_size_px=px)
    pack(
        table,
        work / "set",
        PackOptions(columns=Columns(group=("patient_id",)), image_size_px=px, fractions=(0.5, 0.5, 0)),
    )


def bare(args: argparse.Namespace, depth: int = 0, *, learns: bool = True, plain: bool = False) -> Callable[[], float]:
    """The step with nothing around it, on one batch that lies in memory: images a second, now."""
    model = torchvision.models.get_model(args.backbone, weights=None, num_classes=2)
    freeze(model, spec(args.backbone), depth)
    precision = resolve("fp32" if plain else args.precision, torch.device("cpu"))
    images = torch.randn(BATCH, 3, args.px, args.px)
    if not plain:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(BATCH) % 2
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.001, momentum=0.9)
    model.train(learns)

    def step() -> None:
        with torch.set_grad_enabled(learns), precision.autocast():
            logits = model(images)
            loss = nn.functional.cross_entropy(logits, labels)
        if learns:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def rate() -> float:
        began = time.perf_counter()
        for _ in range(args.batches):
            step()
        return args.batches * BATCH / (time.perf_counter() - began)

    step()
    return rate


class Pairs:
    """Rounds of something, with the bare step timed before and after each: a machine's speed drifts from minute to minute."""

    def __init__(self, reference: Callable[[], float]) -> None:
        self._reference = reference
        self.own: list[float] = []
        self.references: list[float] = []

    def warm(self) -> None:
        """After the first round, which is no measurement."""
        self.references.append(self._reference())

    def add(self, images_per_s: float) -> None:
        self.own.append(images_per_s)
        self.warm()

    def found(self) -> Row:
        beside = [(one + other) / 2 for one, other in itertools.pairwise(self.references)]
        shares = [own / reference for own, reference in zip(self.own, beside, strict=True)]
        return {"rate": statistics.median(self.own), "bare": statistics.median(self.references), "shares": shares}


@dataclass
class Paired(LocalRun):
    """A run that lets the bare step have its turn after each epoch."""

    pairs: Pairs | None = None

    def report(self, metrics: Mapping[str, float | int | None]) -> None:
        super().report(metrics)
        if self.pairs is not None and len(self.reports) == 1:
            self.pairs.warm()
        elif self.pairs is not None:
            self.pairs.add(metrics["images_per_s"] or 0.0)


def ours(args: argparse.Namespace, depth: int) -> Row:
    pairs = Pairs(bare(args, depth))
    with tempfile.TemporaryDirectory() as folder:
        train(args, depth, Paired(Folder.local(folder), torch.device("cpu"), 0, 1, 0, pairs=pairs))
    return pairs.found()


def train(args: argparse.Namespace, depth: int, run: LocalRun) -> None:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        fit(config_of(args, depth), run)


def our_evaluation(args: argparse.Namespace) -> Row:
    config = config_of(args, 0)
    dataset = open_shards(config)
    network = create_network(config, dataset, device=torch.device("cpu"), rank=0)
    scorer = scorer_of(config, network)
    pairs = Pairs(bare(args, learns=False))
    score_split(scorer, dataset, "val", rank=0, world_size=1)
    pairs.warm()
    for _ in range(args.rounds):
        began = time.perf_counter()
        found = score_split(scorer, dataset, "val", rank=0, world_size=1)
        assert found is not None
        pairs.add(len(found.keys) / (time.perf_counter() - began))
    return pairs.found()


def plain_step(args: argparse.Namespace) -> Row:
    pairs, own = Pairs(bare(args)), bare(args, plain=True)
    pairs.warm()
    for _ in range(args.rounds):
        pairs.add(own())
    return pairs.found()


def two_ranks(args: argparse.Namespace) -> Row:
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank, args=(rank, args, folder, results)) for rank in range(2)]
        for process in ranks:
            process.start()
        found = results.get(timeout=3600)
        for process in ranks:
            process.join()
    return found


def _rank(rank: int, args: argparse.Namespace, folder: str, results: Any) -> None:
    import torch.distributed as dist

    os.environ["LOCAL_WORLD_SIZE"] = "2"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    pairs = None
    if rank == 0:
        torch.set_num_threads(available_cpus())
        step = bare(args)

        def with_all_cores() -> float:  # while the other rank waits for this one
            torch.set_num_threads(available_cpus())
            value = step()
            torch.set_num_threads(1)
            return value

        pairs = Pairs(with_all_cores)
    torch.set_num_threads(1)
    train(args, 0, Paired(Folder.local(f"{folder}/run"), torch.device("cpu"), rank, 2, rank, pairs=pairs))
    dist.destroy_process_group()
    if pairs is not None:
        results.put(pairs.found())


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


def plain_script(args: argparse.Namespace) -> Row:
    loader, pairs = file_loader(args), Pairs(bare(args))
    model = torchvision.models.get_model(args.backbone, weights=None, num_classes=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    for epoch in range(args.rounds + 1):
        began = time.perf_counter()
        for images, labels in loader:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rate = len(loader) * BATCH / (time.perf_counter() - began)
        pairs.add(rate) if epoch else pairs.warm()
    return pairs.found()


def lightning(args: argparse.Namespace, precision: str) -> Row:
    import pytorch_lightning as pl  # pyright: ignore[reportMissingImports]

    loader, pairs = file_loader(args), Pairs(bare(args))

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = torchvision.models.get_model(args.backbone, weights=None, num_classes=2)
            self.began = 0.0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            del batch_idx
            loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def on_train_epoch_start(self) -> None:
            self.began = time.perf_counter()

        def on_train_epoch_end(self) -> None:
            rate = len(loader) * BATCH / (time.perf_counter() - self.began)
            pairs.add(rate) if self.current_epoch else pairs.warm()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.001, momentum=0.9)

    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=args.rounds + 1, precision=precision, accelerator="cpu", default_root_dir=folder,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Module(), loader)
    return pairs.found()


ROWS: dict[str, Callable[[argparse.Namespace], Row]] = {
    "ours, whole loop": lambda args: ours(args, 0),
    "ours, 2 ranks of one thread each": two_ranks,
    "ours, whole loop, frozen to 4": lambda args: ours(args, 4),
    "ours, evaluation": our_evaluation,
    "the step in fp32, PyTorch's layout": plain_step,
    "plain script, fp32": plain_script,
    "Lightning, defaults": lambda args: lightning(args, "32-true"),
    "Lightning, bf16": lambda args: lightning(args, "bf16-mixed"),
}


_RAY = """
import os
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model
def nothing():
    ray.train.report({"loss": 0.0})
def one_epoch():
    import torch, torchvision
    model = prepare_model(torchvision.models.get_model("resnet18", weights=None, num_classes=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    loss = torch.nn.functional.cross_entropy(model(torch.zeros(4, 3, 32, 32)), torch.arange(4) % 2)
    loss.backward()
    optimizer.step()
    ray.train.report({"loss": loss.item()})
TorchTrainer(FUNCTION, scaling_config=ScalingConfig(num_workers=2)).fit()
"""

# How many workers of ours, or what they do in a plain script.
START_UP: dict[str, int | str] = {
    "Ray Train, 2 workers that report once": "nothing",
    "Ray Train, 2 workers, one step, no data": "one_epoch",
    "ours, 2 workers, 16 small images": 2,
    "ours in one process, 16 small images": 0,
}


def ray_start_up(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of runs whose training is next to nothing, Ray's own start included; by turns, ``args.rounds`` times."""
    tiny = write_demo_images(args.work / "tiny-images", num_patients=16, seed=0, image_size_px=32)
    pack(tiny, args.work / "tiny", PackOptions(columns=Columns(group=("patient_id",)), fractions=(0.5, 0.5, 0)))
    settings = ["model.backbone=resnet18", "model.weights=random", "data.image_size_px=32", "data.global_batch_size=8"]
    settings += ["data.normalisation=half", "train.epochs=1", f"data.shards={args.work / 'tiny'}"]
    medtl = [sys.executable, "-c", "from medtl_dist.cli.main import main; main()", "train"]
    found: dict[str, list[float]] = {}
    for number in range(args.rounds):
        for name, what in START_UP.items():
            if isinstance(what, str):
                command = [sys.executable, "-c", _RAY.replace("FUNCTION", what)]
            else:
                overrides = [word for text in [*settings, f"cluster.num_workers={what}"] for word in ("--set", text)]
                command = [*medtl, "--run-dir", str(args.work / f"run-{number}-{what}"), *overrides]
            found.setdefault(name, []).append(seconds(command))
    return found


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
    parser.add_argument("--batches", type=int, default=4, help="batches per round, about; a round is an epoch")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one to warm up")
    parser.add_argument("--rows", help="only these rows, with ; between them")
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
        print(f"{'':38}{'images/s':>9}{'bare':>7}{'share':>7}   of each round")
        for row in args.rows.split(";") if args.rows is not None else ROWS:
            if not row:  # --rows "" --ray: the start-up alone
                continue
            if row.startswith("Lightning") and not args.peers:
                continue
            command = [sys.executable, __file__, "--row", row, "--work", folder, "--backbone", args.backbone]
            command += ["--px", str(args.px), "--batches", str(args.batches), "--precision", args.precision]
            command += ["--rounds", str(args.rounds), *(["--peers", str(args.peers)] if args.peers else [])]
            found = json.loads(
                subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
            )
            shares = sorted(found["shares"])
            print(
                f"{row:38}{found['rate']:9.1f}{found['bare']:7.1f}{statistics.median(shares):7.2f}   "
                f"{' '.join(f'{share:.2f}' for share in shares)}",
                flush=True,
            )
        for name, took in ray_start_up(args).items() if args.ray else ():
            print(
                f"{name:38}{statistics.median(took):9.1f} s   {' '.join(f'{one:.1f}' for one in sorted(took))}",
                flush=True,
            )


if __name__ == "__main__":
    main()
