"""Packing of real CR files: every compression, both polarities, one wrong tag, one that no free decoder reads."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest

from medtl_dist.data.dicom import read_dicom
from medtl_dist.data.dicom_source import DicomOptions
from medtl_dist.data.dicom_window import Rendering, parse_window, rendering_from
from medtl_dist.data.images import UnreadableImage, shrink
from medtl_dist.data.pack import PackOptions, pack
from medtl_dist.data.shards import Dataset, read_split
from medtl_dist.errors import DataError

DATA = Path(os.environ.get("MEDTL_DATA_DIR", Path(__file__).parents[2] / "../shared/data")).resolve()
FILES = DATA / "dicom_cr"
LOSSLESS = ("RG2_UNC", "RG2_RLE", "RG2_JPLL", "RG2_JLSL", "RG2_J2KR")
WINDOWS = ("percentile", "tags", "0,1023")
OPTIONS = DicomOptions(
    label_tag="BodyPartExamined",
    group_tags=("PatientID", "SOPInstanceUID"),
    keep_tags=("PhotometricInterpretation",),
    allow=("secondary-capture",),
)

pytestmark = pytest.mark.skipif(not FILES.exists(), reason="no dicom_cr in MEDTL_DATA_DIR")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files without their extension, two folders deep."""
    root = tmp_path_factory.mktemp("tree")
    (root / "a/b").mkdir(parents=True)
    for path in FILES.glob("*.dcm"):
        shutil.copyfile(path, root / "a/b" / path.stem)
    return root


@pytest.fixture(scope="module")
def packed(tree: Path) -> Dataset:
    options = PackOptions(dicom=OPTIONS, skip_bad=True, num_workers=1, image_size_px=256)
    return pack(tree, tree.parent / "sets/native", options)


def by_name(packed: Dataset) -> dict[str, dict]:
    """File name to its row of the index, with the image as ``pixels``."""
    private = Path(f"{packed.folder}.private")
    names = {row["key"]: Path(row["file"]).name for row in pq.read_table(private / "linkage.parquet").to_pylist()}
    found = {}
    for split in packed.splits:
        for row in read_split(packed, split).to_pylist():
            with (Path(packed.folder) / row["shard"]).open("rb") as file:
                file.seek(row["offset"])
                data = file.read(row["size"])
            assert hashlib.sha256(data).digest() == row["sha256"]
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
            found[names[row["key"].hex()]] = row | {"pixels": np.asarray(pixels)}
    return found


def test_lossless_compressions_are_one_image(packed: Dataset) -> None:
    rows = by_name(packed)
    assert len({rows[name]["sha256"] for name in LOSSLESS}) == 1
    assert rows["RG2_J2KI"]["sha256"] != rows["RG2_UNC"]["sha256"]
    assert np.abs(rows["RG2_J2KI"]["pixels"].astype(int) - rows["RG2_UNC"]["pixels"]).mean() < 1


@pytest.mark.parametrize("window", WINDOWS)
def test_lossless_compressions_have_the_same_pixels_at_full_size(window: str) -> None:
    first, *others = (read_dicom(FILES / f"{name}.dcm", -1, parse_window(window)) for name in LOSSLESS)
    assert first.shape == (2140, 1760)
    assert all(np.array_equal(first, other) for other in others)


def test_all_but_one_are_packed_and_that_one_is_named(tree: Path, packed: Dataset, tmp_path: Path) -> None:
    assert packed.info["found"] == 12
    [left_out] = packed.info["excluded"]
    reason = "pixels that cannot be decoded (JPEG Extended (Process 2 and 4))"
    assert (left_out["reason"], left_out["samples"]) == (reason, 1)
    with pytest.raises(DataError) as caught:
        pack(tree, tmp_path / "set", PackOptions(dicom=OPTIONS, num_workers=1, image_size_px=256))
    linkage = pq.read_table(tmp_path / "set.private/linkage.parquet").to_pylist()
    [key] = [row["key"] for row in linkage if row["file"].endswith("RG2_JPLY")]
    assert f"image {key} cannot be packed: {reason}" in caught.value.message
    assert "RG2" not in caught.value.message
    assert "RG2_JPLY" in (tmp_path / "set.private/problems.csv").read_text(encoding="utf-8")


def test_what_the_set_says_of_them(packed: Dataset) -> None:
    assert packed.classes == ("CHEST", "HIP")
    assert packed.info["counted"]["photometric"] == {"MONOCHROME1": {"CHEST": 4}, "MONOCHROME2": {"CHEST": 1, "HIP": 6}}
    assert {row["group"] for name, row in by_name(packed).items() if name.startswith("RG2")} == {
        by_name(packed)["RG2_UNC"]["group"]
    }


def test_secondary_captures_are_left_out_unless_allowed(tmp_path: Path) -> None:
    names = ("RG2_UNC", "CR-MONO1-10-chest", "siim_nih_mono2_jpeg8", "siim_nih_fake_mono1_jpeg8")
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / "in" / name).symlink_to(FILES / f"{name}.dcm")
    strict = DicomOptions(label_tag="BodyPartExamined", group_tags=OPTIONS.group_tags)
    packed = pack(tmp_path / "in", tmp_path / "set", PackOptions(dicom=strict, num_workers=1, image_size_px=64))
    reasons = {entry["reason"]: entry["samples"] for entry in packed.info["excluded"]}
    assert reasons == {"secondary capture (--allow secondary-capture)": 2}


# Boxes of lung, mediastinum and abdomen as (top, bottom, left, right) in thousandths, marked on the picture by eye.
BOXES = {
    "CR-MONO1-10-chest": ((300, 500, 180, 300), (550, 800, 420, 540), (870, 950, 150, 300)),
    "RG1_J2KI": ((200, 260, 300, 380), (400, 600, 490, 540), (820, 920, 150, 300)),
    "RG1_JLSN": ((200, 260, 300, 380), (400, 600, 490, 540), (820, 920, 150, 300)),
}


@pytest.mark.parametrize("window", WINDOWS[:2])
@pytest.mark.parametrize("name", BOXES)
def test_monochrome1_chests_have_dark_lungs_and_bright_bone(name: str, window: str) -> None:
    header = pydicom.dcmread(FILES / f"{name}.dcm", force=True, stop_before_pixels=True)
    assert header.PhotometricInterpretation == "MONOCHROME1"
    image = read_dicom(FILES / f"{name}.dcm", -1, parse_window(window)).astype(float)
    height, width = image.shape
    lung, mediastinum, abdomen = (
        image[t * height // 1000 : b * height // 1000, left * width // 1000 : right * width // 1000].mean()
        for t, b, left, right in BOXES[name]
    )
    assert lung + 40 < min(mediastinum, abdomen)
    air = (
        image[height // 50 : height // 20, -width // 100 :].mean()
        if name == "CR-MONO1-10-chest"
        else image[20:60, 20:60].mean()
    )
    assert air < lung + 40


def test_the_wrong_tag_is_followed_and_its_image_is_the_others_negative(packed: Dataset) -> None:
    """As tagged: an inverted copy, which the audit can find; the set says what the tag was."""
    rows = by_name(packed)
    wrong, right = rows["siim_nih_fake_mono1_jpeg8"], rows["siim_nih_mono2_jpeg8"]
    assert (wrong["PhotometricInterpretation"], right["PhotometricInterpretation"]) == ("MONOCHROME1", "MONOCHROME2")
    assert np.abs(wrong["pixels"].astype(int) + right["pixels"] - 255).mean() < 1
    assert wrong["pixels"][:12, :100].mean() > 150  # the air beside the neck
    assert right["pixels"][:12, :100].mean() < 60


def test_a_file_can_be_redone_from_what_the_set_says(packed: Dataset) -> None:
    stored = packed.info["preprocessing"]
    rendering = rendering_from(stored["window"])
    rows = by_name(packed)
    for name in ("RG2_RLE", "CR-MONO1-10-chest", "siim_nih_fake_mono1_jpeg8"):
        row = rows[name]
        again = shrink(read_dicom(FILES / f"{name}.dcm", -1, rendering), stored["image_size_px"])
        assert np.abs(again.astype(int) - row["pixels"]).mean() < 1.5  # JPEG of quality 95


def test_a_file_without_meta_header_is_read() -> None:
    path = FILES / "CR-MONO1-10-chest.dcm"
    assert path.read_bytes()[128:132] != b"DICM"
    ds = pydicom.dcmread(path, force=True)
    stored = np.frombuffer(ds.PixelData, "<u2").reshape(440, 440)
    exact = np.clip((stored.astype(float) - 549.5) / 1023 + 0.5, 0, 1)  # centre 550, width 1024, LINEAR
    assert np.abs(read_dicom(path, -1, Rendering("tags")) - 255 * (1 - exact)).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.95])
def test_truncated_files_are_named_not_shown_in_part(tmp_path: Path, keep: float) -> None:
    """Some decoders return the part they have read, the rest grey."""
    for path in sorted(FILES.glob("*.dcm")):
        data = path.read_bytes()
        (tmp_path / "part").write_bytes(data[: int(len(data) * keep)])
        try:
            read_dicom(tmp_path / "part", -1, Rendering())
        except UnreadableImage:
            continue
        pytest.fail(f"{path.name} was read from {keep:.0%} of its bytes")
