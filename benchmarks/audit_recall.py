"""How many copies the audit finds, by kind of change, among real images: planted copies → a table.

Run: python benchmarks/audit_recall.py SET --work FOLDER [--copies 100]        (the figures are in docs/audit.md)

SET is a packed set. Its images become train, each a group of its own; of every kind of change so many copies of other
images (groups of their own, too) become test. The whole is packed anew and audited: the table says how many copies were
confirmed, and how many at least listed as candidates. Pairs found without a planted copy are the set's own.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
from numpy.random import Generator
from numpy.typing import NDArray

from medtl_dist.data.audit import Audit, audit
from medtl_dist.data.findings import components
from medtl_dist.data.pack import PackOptions, pack
from medtl_dist.data.plan import Piece
from medtl_dist.data.private import LINKAGE_FILE, private_folder
from medtl_dist.data.reader import Reader
from medtl_dist.data.shards import open_dataset
from medtl_dist.data.sources import Columns
from medtl_dist.data.transforms import decode

Image = NDArray[np.uint8]
Change = Callable[[Image, Generator], Image]


def recode(image: Image, rng: Generator) -> Image:
    """JPEG of quality 50 to 90."""
    data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(50, 91))])[1]
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_UNCHANGED), np.uint8)


def resize(image: Image, rng: Generator) -> Image:
    """50 to 80 % of the size."""
    share = rng.uniform(0.5, 0.8)
    return np.asarray(cv2.resize(image, None, fx=share, fy=share, interpolation=cv2.INTER_AREA), np.uint8)


def crop(image: Image, rng: Generator) -> Image:
    """2 to 10 % of the height and of the width lost, anywhere at the two edges."""
    height, width = image.shape[:2]
    lost = np.rint(rng.uniform(0.02, 0.10, 2) * (height, width)).astype(int)
    top, left = (int(rng.integers(0, most + 1)) for most in lost)
    return image[top : height - lost[0] + top, left : width - lost[1] + left]


def window(image: Image, rng: Generator) -> Image:
    """Up to 10 % of the pixels cut off at either end, then a gamma of 0.5 to 2."""
    low, high = np.quantile(image, (rng.uniform(0, 0.1), rng.uniform(0.9, 1)))
    shown = np.clip((image - low) / max(1, high - low), 0, 1) ** rng.uniform(0.5, 2)
    return np.rint(255 * shown).astype(np.uint8)


def everything(image: Image, rng: Generator) -> Image:
    """Resized, cropped, windowed, negative or not, recoded."""
    changed = window(crop(resize(image, rng), rng), rng)
    return recode(255 - changed if rng.integers(2) else changed, rng)


KINDS: dict[str, Change] = {
    "JPEG of quality 50 to 90": recode,
    "resized to 50 to 80 %": resize,
    "cropped by 2 to 10 % a side": crop,
    "windowed, gamma 0.5 to 2": window,
    "negative": lambda image, rng: 255 - image,
    "flipped left-right": lambda image, rng: image[:, ::-1],
    "flipped upside down": lambda image, rng: image[::-1],
    "rotated by 90°": lambda image, rng: np.rot90(image),
    "rotated by 180°": lambda image, rng: np.rot90(image, 2),
    "flipped and cropped": lambda image, rng: crop(image, rng)[:, ::-1],
    "resized, cropped, windowed, maybe negative, recoded": everything,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", type=Path, help="a packed set of real images")
    parser.add_argument("--work", type=Path, required=True, help="an empty folder for the images and the new set")
    parser.add_argument("--copies", type=int, default=100, help="of each kind")
    parser.add_argument("--images", type=int, help="use only so many images of the set")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    table = write_images(options.set, options.work / "images", options.copies, options.images)
    columns = Columns(label="label", group=("patient",), split="split")
    dataset = pack(table, options.work / "set", PackOptions(columns=columns, num_workers=options.workers))
    begin = time.perf_counter()
    found = audit(dataset, num_workers=options.workers)
    print(f"{found.summary['images']:,} images audited in {time.perf_counter() - begin:.0f} s")
    print(f"threshold: {found.threshold}")
    for line in recall(found, options.work / "set"):
        print(line)


def write_images(source: Path, folder: Path, copies: int, most: int | None) -> Path:
    """The set's images and the copies as PNG files, and the table that names them; returns the table's path."""
    dataset = open_dataset(source)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    places = [
        (split, shard, row)
        for split in dataset.splits
        for shard, entry in enumerate(dataset.shards(split))
        for row in range(entry.samples)
    ]
    places = [places[i] for i in np.sort(rng.permutation(len(places))[:most])]
    order = rng.permutation(len(places))
    changes = {int(order[i]): list(KINDS)[i // copies] for i in range(min(copies * len(KINDS), len(places)))}
    readers = {split: Reader(dataset, split) for split in dataset.splits}
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(("file", "label", "patient", "split"))
        for number, (split, shard, row) in enumerate(places):
            [sample] = readers[split].read(Piece(shard, row, row + 1))
            image = decode(sample.data, 1)[..., 0]
            put(folder / f"{number}-original.png", image)
            rows.writerow((f"{number}-original.png", sample.label, f"o{number}", "val" if number % 5 == 0 else "train"))
            if number in changes:
                kind = list(KINDS).index(changes[number])
                put(folder / f"{number}-{kind}.png", KINDS[changes[number]](image, rng))
                rows.writerow((f"{number}-{kind}.png", sample.label, f"c{number}", "test"))
    return folder / "labels.csv"


def put(path: Path, image: Image) -> None:
    path.write_bytes(cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes())


def recall(found: Audit, folder: Path) -> list[str]:
    """The table's lines."""
    linkage = pq.read_table(private_folder(folder) / LINKAGE_FILE, columns=["key", "file"]).to_pylist()
    file_of = {row["key"]: Path(row["file"]).stem for row in linkage}
    names = [file_of[found.seen.key(image)] for image in range(len(found.seen))]
    place = {name: image for image, name in enumerate(names)}
    sure = components((m.first, m.second) for m in found.matches if m.level == "confirmed")
    listed = components((m.first, m.second) for m in found.matches)
    planted, confirmed, seen = Counter[str](), Counter[str](), Counter[str]()
    for name in names:
        number, kind = name.split("-")
        if kind == "original":
            continue
        text = list(KINDS)[int(kind)]
        copy, original = place[name], place[f"{number}-original"]
        planted[text] += 1
        confirmed[text] += sure.get(copy, -1) == sure.get(original, -2)
        seen[text] += listed.get(copy, -1) == listed.get(original, -2)
    lines = [f"{'change':<54}{'copies':>8}{'confirmed':>11}{'listed':>8}"]
    lines += [f"{kind:<54}{planted[kind]:>8}{confirmed[kind]:>11}{seen[kind]:>8}" for kind in KINDS if planted[kind]]
    near = [m for m in found.matches if m.level == "confirmed" and m.how != "identical pixels"]
    strangers = [m for m in near if names[m.first].split("-")[0] != names[m.second].split("-")[0]]
    lines.append(f"confirmed near-identical pairs of other originals: {len(strangers)}")
    for match in strangers:
        pair = sorted((found.seen.key(match.first), found.seen.key(match.second)))
        lines.append(f"  {pair[0]} {pair[1]} {match.score} {match.how}")
        lines.append(f"    files {names[match.first]} {names[match.second]}")
    return lines


if __name__ == "__main__":
    main()
