"""Small DICOM files for the tests, written by pydicom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

CR = "1.2.840.10008.5.1.4.1.1.1"


def dataset(pixels: NDArray[Any] | None, *, bits: int | None = None, **tags: Any) -> Dataset:
    """A CR image of ``pixels``: [h, w], [frames, h, w] with ``NumberOfFrames`` given, or [h, w, 3]; further ``tags``."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = CR
    ds.SOPInstanceUID = generate_uid()
    ds.SeriesInstanceUID = generate_uid()
    ds.StudyInstanceUID = generate_uid()
    ds.Modality = "CR"
    ds.PatientID = "P1"
    if pixels is not None:
        colour = pixels.shape[-1] == 3
        ds.Rows, ds.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
        ds.SamplesPerPixel = 3 if colour else 1
        if colour:
            ds.PlanarConfiguration = 0
        ds.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
        ds.BitsAllocated = pixels.dtype.itemsize * 8
        ds.BitsStored = bits or ds.BitsAllocated
        ds.HighBit = ds.BitsStored - 1
        ds.PixelRepresentation = int(pixels.dtype.kind == "i")
        data = pixels.tobytes()
        ds.PixelData = data + b"\0" * (len(data) % 2)
        ds["PixelData"].VR = "OW"
    for keyword, value in tags.items():
        if value is None:
            del ds[keyword]
        else:
            setattr(ds, keyword, value)
    return ds


def write(path: Path, pixels: NDArray[Any] | None, *, bits: int | None = None, **tags: Any) -> Path:
    """Write ``dataset(pixels, …)`` as a DICOM file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save(dataset(pixels, bits=bits, **tags), path)
    return path


def save(ds: Dataset, path: Path) -> None:
    ds.save_as(path, enforce_file_format=True)


def sequence_item(**tags: Any) -> Dataset:
    item = Dataset()
    for keyword, value in tags.items():
        setattr(item, keyword, value)
    return item


def ramp(number: int, shape: tuple[int, int] = (24, 32), top: int = 1000) -> NDArray[np.uint16]:
    """A smooth picture in 0 … ``top``, another for each number."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    return (top * (0.5 + 0.5 * np.sin(x / 7 + number) * np.cos(y / 5 + number))).astype(np.uint16)


def write_tree(root: Path, num_images: int = 24, **tags: Any) -> Path:
    """Images of ``num_images // 2`` patients in alternating body parts, without extension, two folders deep."""
    for number in range(num_images):
        write(
            root / f"study{number // 4}" / "series" / f"IM{number:04d}",
            ramp(number),
            bits=12,
            **({"PatientID": f"P{number // 2}", "BodyPartExamined": ("CHEST", "HIP")[number // 2 % 2]} | tags),
        )
    return root
