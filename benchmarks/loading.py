"""Images per second and core from disk to a training batch of 224 px: ours beside what people use.

    pip install --no-deps --target .venv/peers -r benchmarks/peers.txt        (make bench-loading does it)
    python benchmarks/loading.py --peers .venv/peers kermany_cxr_224/labels.csv nih_cxr14_native/labels.csv

Every row runs in a process of its own and is timed over whole passes, after one that warms the page cache. ``per core`` is
images per second of processor time, that of all its processes added up: what a core yields, whoever else is on the machine.
``wall`` is images per second of the clock with ``--workers`` loader processes. All crop at random (area 0.8 to 1) to 224 px.
The peers hand over normalised float32 RGB, as their documentation shows; ours hands over uint8 and the device normalises,
so one row does that on the CPU besides.

native: the images as they came; packed: the same bytes that ``medtl data pack --image-size 256 --color grey`` stored.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

SIZE_PX = 224
BATCH = 64
Factory = Callable[[Path, int], Iterator[int]]  # folder of prepared sets, workers ─► sizes of the batches of one pass


def prepare(table: Path, work: Path, limit: int) -> int:
    """Packs the table's images, and lays the same images out as each peer wants them; returns how many."""
    from medtl_dist.data.pack import PackOptions, pack
    from medtl_dist.data.plan import Piece
    from medtl_dist.data.reader import Reader
    from medtl_dist.data.sources import Columns

    rows = pyarrow.csv.read_csv(table).select(["file", "label", "patient_id"])
    some = np.sort(np.random.default_rng(0).permutation(len(rows))[:limit])
    pyarrow.csv.write_csv(rows.take(pa.array(some)), work / "some.csv")
    options = PackOptions(
        columns=Columns(), image_root=table.parent, image_size_px=256, color="grey", fractions=(1, 0, 0)
    )
    dataset = pack(work / "some.csv", work / "set", options)
    reader, labels = Reader(dataset, "train"), []
    (work / "packed_files").mkdir()
    for number, shard in enumerate(dataset.shards("train")):
        for sample in reader.read(Piece(number, 0, shard.samples)):
            labels.append((f"packed_files/{sample.key.hex()}.jpg", sample.label))
            (work / labels[-1][0]).write_bytes(sample.data)
    native = [(str(table.parent / row["file"]), 0) for row in rows.take(pa.array(some)).to_pylist()]
    (work / "packed_files.json").write_text(json.dumps([(str(work / name), label) for name, label in labels]))
    (work / "native_files.json").write_text(json.dumps(native))
    for kind in ("packed", "native"):
        write_tars(json.loads((work / f"{kind}_files.json").read_text()), work / f"{kind}_tars")
        write_mds(json.loads((work / f"{kind}_files.json").read_text()), work / f"{kind}_mds")
    return len(native)


def write_tars(files: list[tuple[str, int]], folder: Path) -> None:
    from webdataset.writer import ShardWriter

    folder.mkdir()
    with ShardWriter(f"{folder}/%06d.tar", maxcount=1000, verbose=0) as writer:
        for number, (file, label) in enumerate(files):
            extension = "png" if file.endswith("png") else "jpg"
            writer.write({"__key__": f"{number:08d}", extension: Path(file).read_bytes(), "cls": label})


def streaming() -> Any:
    # It imports transformers for two isinstance checks of its text loaders; none of it is used here.
    for name in (
        "",
        ".feature_extraction_utils",
        ".tokenization_utils_base",
        ".models",
        ".models.auto",
        ".models.auto.tokenization_auto",
    ):
        module: Any = types.ModuleType(f"transformers{name}")
        module.__path__ = []
        module.BatchFeature = module.BatchEncoding = module.AutoTokenizer = type("Unused", (dict,), {})
        sys.modules.setdefault(module.__name__, module)
    import streaming as package  # pyright: ignore[reportMissingImports]

    return package


def write_mds(files: list[tuple[str, int]], folder: Path) -> None:
    with streaming().MDSWriter(out=str(folder), columns={"image": "bytes", "label": "int"}, compression=None) as writer:
        for file, label in files:
            writer.write({"image": Path(file).read_bytes(), "label": label})


def to_tensor() -> Callable[[bytes], Any]:
    import io

    import torch
    from PIL import Image
    from torchvision.transforms import v2

    chain = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE_PX, scale=(0.8, 1.0)),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    return lambda data: chain(Image.open(io.BytesIO(data)).convert("RGB"))


class Files:
    """A map-style data set of image files, as ``ImageFolder`` reads them."""

    def __init__(self, listing: Path) -> None:
        self.files = json.loads(listing.read_text())
        self.transform: Callable[[bytes], Any] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> tuple[Any, int]:
        self.transform = self.transform or to_tensor()
        file, label = self.files[place]
        return self.transform(Path(file).read_bytes()), label


def sizes(loader: Any) -> Iterator[int]:
    return (len(batch[1]) for batch in loader)


def image_folder(kind: str) -> Factory:
    def one_pass(work: Path, workers: int) -> Iterator[int]:
        from torch.utils.data import DataLoader

        dataset: Any = Files(work / f"{kind}_files.json")
        return sizes(DataLoader(dataset, BATCH, shuffle=True, num_workers=workers))

    return one_pass


def webdataset_pil(kind: str) -> Factory:
    def one_pass(work: Path, workers: int) -> Iterator[int]:
        from torch.utils.data import DataLoader
        from webdataset.compat import WebDataset

        transform = to_tensor()
        shards = sorted(map(str, (work / f"{kind}_tars").glob("*.tar")))
        dataset: Any = WebDataset(shards, shardshuffle=len(shards), empty_check=False).shuffle(1000)
        dataset = dataset.to_tuple("jpg;png", "cls").map_tuple(transform, int).batched(BATCH)
        return sizes(DataLoader(dataset, batch_size=None, num_workers=workers))

    return one_pass


def mosaic(kind: str) -> Factory:
    def one_pass(work: Path, workers: int) -> Iterator[int]:
        from torch.utils.data import DataLoader

        transform = to_tensor()

        class Images(streaming().StreamingDataset):
            def __getitem__(self, place: int) -> tuple[Any, int]:
                sample = super().__getitem__(place)
                return transform(sample["image"]), sample["label"]

        dataset = Images(local=str(work / f"{kind}_mds"), shuffle=True, batch_size=BATCH)
        return sizes(DataLoader(dataset, batch_size=BATCH, num_workers=workers))

    return one_pass


def ours(*, normalise: bool = False, augment: bool = False) -> Factory:
    passes = iter(range(1000))
    loaders: list[Any] = []

    def one_pass(work: Path, workers: int) -> Iterator[int]:
        import torch

        from medtl_dist.data.loader import Loader
        from medtl_dist.data.shards import open_dataset
        from medtl_dist.data.stream import train_batches
        from medtl_dist.data.transforms import TrainTransform

        torch.set_num_threads(1)
        more: Any = {"rotation_deg": 5.0, "brightness": 0.1, "contrast": 0.1} if augment else {}
        if not loaders:
            loaders.append(Loader(workers))
        batches = train_batches(
            open_dataset(work / "set"),
            transform=TrainTransform(SIZE_PX, mode="squash", crop_area_min=0.8, **more),
            global_batch_size=BATCH,
            seed=0,
            epoch=next(passes),
            loader=loaders[0],
        )
        for batch in batches:
            if normalise:
                batch.images.float().sub_(120.0).div_(58.0).expand(-1, 3, -1, -1)
            yield batch.num_real

    return one_pass


def decode_alone(work: Path, workers: int) -> Iterator[int]:
    del workers
    import cv2

    cv2.setNumThreads(0)
    for file, _ in json.loads((work / "packed_files.json").read_text()):
        cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_GRAYSCALE)
        yield 1


ROWS: dict[str, Factory] = {
    "ours, from shards": ours(),
    "ours, + normalising on the CPU": ours(normalise=True),
    "ours, + rotation, brightness, contrast": ours(augment=True),
    "ImageFolder style, PIL, native": image_folder("native"),
    "ImageFolder style, PIL, packed": image_folder("packed"),
    "webdataset, PIL, native": webdataset_pil("native"),
    "webdataset, PIL, packed": webdataset_pil("packed"),
    "Mosaic streaming, PIL, native": mosaic("native"),
    "Mosaic streaming, PIL, packed": mosaic("packed"),
    "decoding alone (OpenCV), packed": decode_alone,
}


def processor_s() -> float:
    """Processor time of this process, its finished children, and those that still run."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    running = 0.0
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        running += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return sum(u.ru_utime + u.ru_stime for u in used) + running


def measure(row: str, work: Path, workers: int, seconds: float) -> dict[str, float]:
    one_pass = ROWS[row]
    sum(one_pass(work, workers))
    images, processor, wall = 0, processor_s(), time.perf_counter()
    while time.perf_counter() - wall < seconds:
        images += sum(one_pass(work, workers))
    return {"per_core": images / (processor_s() - processor), "wall": images / (time.perf_counter() - wall)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", type=Path, help="labels.csv with columns file, label, patient_id")
    parser.add_argument("--peers", type=Path, help="folder where benchmarks/peers.txt is installed")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--images", type=int, default=2000, help="at most so many of each table")
    parser.add_argument("--seconds", type=float, default=10.0, help="least time per row")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peers:
        sys.path.append(str(args.peers))
    warnings.simplefilter("ignore")
    if args.row:
        print(json.dumps(measure(args.row, args.work, args.workers, args.seconds)))
        return
    for table in args.tables:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            images = prepare(table, work, args.images)
            print(f"{table.parent.name}: {images:,} images; {args.workers} loader processes, batches of {BATCH}")
            print(f"{'':42}{'per core':>10}{'wall':>8}{'ours /':>8}   images per second")
            first = 0.0
            for row in ROWS:
                command = [sys.executable, __file__, "--row", row, "--work", folder]
                command += ["--workers", str(args.workers), "--seconds", str(args.seconds)]
                command += ["--peers", str(args.peers)] if args.peers else []
                found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
                first = first or found["per_core"]
                print(
                    f"{row:42}{found['per_core']:10,.0f}{found['wall']:8,.0f}{first / found['per_core']:8.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
