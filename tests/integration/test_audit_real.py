"""The audit on real chest X-rays: the duplicates that are there are found, strangers are not."""

from __future__ import annotations

import csv
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from dicom_files import write

from medtl_dist.data.audit import Audit, audit
from medtl_dist.data.audit_fix import fix
from medtl_dist.data.dicom_source import DicomOptions
from medtl_dist.data.findings import Finding
from medtl_dist.data.pack import PackOptions, pack
from medtl_dist.data.shards import Dataset
from medtl_dist.data.sources import Columns

DATA = Path(os.environ.get("MEDTL_DATA_DIR", Path(__file__).parents[2] / "../shared/data")).resolve()
KERMANY = DATA / "kermany_cxr_224/labels.csv"
NIH = DATA / "nih_cxr14_native/labels.csv"
CR = DATA / "dicom_cr/PROVENANCE.md"


def needs(path: Path) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not path.exists(), reason=f"no {path.relative_to(DATA)} in MEDTL_DATA_DIR")


def files_of(dataset: Dataset) -> dict[str, str]:
    table = pq.read_table(Path(f"{dataset.folder}.private") / "linkage.parquet", columns=["key", "file"])
    return dict(zip(table.column("key").to_pylist(), table.column("file").to_pylist(), strict=True))


def finding(found: Audit, kind: str) -> Finding | None:
    return next((entry for entry in found.findings if entry.kind == kind), None)


def identical_files(table: Path) -> set[frozenset[str]]:
    """Files of equal bytes. Of all of Kermany's no others have equal pixels."""
    by_hash: defaultdict[str, set[str]] = defaultdict(set)
    with table.open() as stream:
        for row in csv.DictReader(stream):
            by_hash[hashlib.sha256((table.parent / row["file"]).read_bytes()).hexdigest()].add(row["file"])
    return {frozenset(files) for files in by_hash.values() if len(files) > 1}


def some_rows(folder: Path, chosen: Callable[[int, dict[str, str]], bool]) -> Path:
    """A table of the chosen rows of Kermany's, by number and values."""
    with KERMANY.open() as stream:
        rows = list(csv.DictReader(stream))
    with (folder / "labels.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(row for number, row in enumerate(rows) if chosen(number, row))
    return folder / "labels.csv"


@needs(KERMANY)
def test_kermany_split_by_image_leaks_its_duplicates(tmp_path: Path) -> None:
    """Packed without patients, among every tenth other image; every one of the 30 sets of identical files is found, and
    hardly anything else is confirmed: nearly identical exposures of one patient."""
    expected = identical_files(KERMANY)
    copies = {file for group in expected for file in group}
    table = some_rows(tmp_path, lambda number, row: row["file"] in copies or number % 10 == 0)
    options = PackOptions(columns=Columns(label="class"), image_root=KERMANY.parent, num_workers=1)
    dataset = pack(table, tmp_path / "set", options)
    recorded = dataset.info["audit"]
    assert (recorded["identical_sets"], recorded["identical_images"]) == (30, sum(map(len, expected)))
    assert len(expected) == 30
    assert recorded["leaks"] > 0
    assert recorded["near_pairs"] <= 3  # exposures of one patient, a moment apart
    files = files_of(dataset)
    sets = {file: group for group in expected for file in group}
    for entry in recorded["findings"]:
        for item in entry.get("items", ()):
            if item.get("how") == "identical pixels":
                first, second = (files[key] for key in item["keys"])
                assert second in sets[first]


@needs(KERMANY)
def test_the_pair_under_two_ids_is_found_and_joined(tmp_path: Path) -> None:
    """NORMAL2-IM-0095 and 0096 of the given test split are one image; a quarter of that split comes along."""
    table = some_rows(
        tmp_path, lambda number, row: row["split"] == "test" and (number % 4 == 0 or "NORMAL2-IM-009" in row["file"])
    )
    columns = Columns(label="class", group=("split+patient_id",))
    dataset = pack(table, tmp_path / "set", PackOptions(columns=columns, image_root=KERMANY.parent, num_workers=1))
    found = audit(dataset, num_workers=1)
    files = files_of(dataset)
    kinds = ("duplicates_of_other_groups", "duplicates_across_splits")
    told = [entry for entry in found.findings if entry.kind in kinds]
    crossing = [item for entry in told for item in entry.items if not item["same_group"]]
    [item] = crossing
    assert sorted(Path(files[key]).name[:15] for key in item["keys"]) == ["NORMAL2-IM-0095", "NORMAL2-IM-0096"]
    mended, again = fix(found, tmp_path / "new", num_workers=1)
    groups = {row["key"]: row["group"] for row in pq.read_table(tmp_path / "new.private/linkage.parquet").to_pylist()}
    assert groups[item["keys"][0]] == groups[item["keys"][1]]
    assert again.leaks == 0
    assert finding(again, "duplicates_of_other_groups") is None
    assert mended.info["fix"]["joined_groups"] == 2


@needs(NIH)
def test_nih_changed_copies_are_found_and_a_wrong_polarity_is_pointed_at(tmp_path: Path) -> None:
    """153 native images: a recoded, resized and darkened copy, a cropped one, a negative and a mirrored one are told;
    one negative without its original is told by its polarity; no two of the set's own images are."""
    with NIH.open() as stream:
        rows = list(csv.DictReader(stream))
    images = [
        cv2.resize(
            np.asarray(cv2.imread(str(NIH.parent / row["file"]), cv2.IMREAD_GRAYSCALE), np.uint8),
            (256, 256),
            interpolation=cv2.INTER_AREA,
        )
        for row in rows
    ]
    small = cv2.resize(images[0], (150, 150), interpolation=cv2.INTER_AREA)
    darker = np.rint(255 * (small / 255.0) ** 1.8).astype(np.uint8)
    recoded = cv2.imdecode(cv2.imencode(".jpg", darker, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_GRAYSCALE)
    changed = {0: recoded, 1: images[1][8:246, 4:250], 2: 255 - images[2], 3: images[3][:, ::-1]}
    lonely = 4
    with (tmp_path / "labels.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("file", "class", "patient", "split"))
        for number, (row, image) in enumerate(zip(rows, images, strict=True)):
            cv2.imwrite(str(tmp_path / f"{number}.png"), 255 - image if number == lonely else image)
            writer.writerow(
                (f"{number}.png", row["label"], row["patient_id"], "val" if row["split"] == "val" else "train")
            )
        for number, image in changed.items():
            cv2.imwrite(str(tmp_path / f"{number}-copy.png"), image)
            writer.writerow((f"{number}-copy.png", rows[number]["label"], f"copy {number}", "test"))
    columns = Columns(label="class", group=("patient",), split="split")
    dataset = pack(tmp_path / "labels.csv", tmp_path / "set", PackOptions(columns=columns, num_workers=1))
    found = audit(dataset, num_workers=1)
    files = files_of(dataset)
    pairs = {
        frozenset(files[found.seen.key(image)] for image in (match.first, match.second)): match.how
        for match in found.matches
        if match.level == "confirmed"
    }
    assert pairs == {
        frozenset(("0.png", "0-copy.png")): "as it is",
        frozenset(("1.png", "1-copy.png")): "as it is",
        frozenset(("2.png", "2-copy.png")): "negative",
        frozenset(("3.png", "3-copy.png")): "flipped left-right",
    }
    assert found.leaks == 4
    polarity = finding(found, "opposite_polarity")
    assert polarity is not None
    assert {files[item["key"]] for item in polarity.items} == {"4.png", "2-copy.png"}


@needs(CR)
@pytest.mark.parametrize("mislabelled", [True, False])
def test_a_chest_x_ray_with_a_wrong_photometric_tag_is_pointed_at(tmp_path: Path, mislabelled: bool) -> None:
    """``siim_nih_fake_mono1`` says MONOCHROME1 of a MONOCHROME2 image: packed as tagged, it is a negative. Its true twin
    among the others makes it a near-identical negative; its polarity alone tells it from the others."""
    tree = tmp_path / "tree"
    tree.mkdir()
    chests = ["CR-MONO1-10-chest", "RG1_J2KI", "RG1_JLSN", "siim_nih_mono2_jpeg8"]
    if mislabelled:
        chests.append("siim_nih_fake_mono1_jpeg8")
    rows = ["file,finding,patient"]
    for number, name in enumerate(chests):
        (tree / f"{name}.dcm").write_bytes((CR.parent / f"{name}.dcm").read_bytes())
        rows.append(f"{name}.dcm,{('normal', 'sick')[number % 2]},p{name}")
    with NIH.open() as stream:
        others = list(csv.DictReader(stream))[:40]
    for number, row in enumerate(others):
        image = cv2.imread(str(NIH.parent / row["file"]), cv2.IMREAD_GRAYSCALE)
        small = cv2.resize(np.asarray(image, np.uint8), (256, 256), interpolation=cv2.INTER_AREA)
        write(tree / f"nih{number}.dcm", np.asarray(small, np.uint8))
        rows.append(f"nih{number}.dcm,{('normal', 'sick')[number % 2]},n{row['patient_id']}")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    options = PackOptions(
        columns=Columns(label="finding", group=("patient",)),
        dicom=DicomOptions(table=tmp_path / "labels.csv", join_on="file", allow=("secondary-capture",)),
        image_size_px=256,
        num_workers=1,
    )
    dataset = pack(tree, tmp_path / "set", options)
    files = files_of(dataset)
    recorded = {entry["kind"]: entry for entry in dataset.info["audit"]["findings"]}
    pointed = {Path(files[item["key"]]).stem for item in recorded.get("opposite_polarity", {}).get("items", ())}
    assert pointed == ({"siim_nih_fake_mono1_jpeg8"} if mislabelled else set())
    pairs = [entry["items"] for kind, entry in recorded.items() if "duplicates" in kind]
    twins = {frozenset(Path(files[key]).stem[:9] for key in item["keys"]): item for items in pairs for item in items}
    twin = twins.get(frozenset(("siim_nih_",)))
    assert (twin and twin["how"]) == ("negative" if mislabelled else None)
