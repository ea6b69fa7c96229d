"""Hostile shards: whatever lies in a tar, ``verify`` and ``index`` name it, the training reader refuses it or reads
exactly the samples that the index promises; nothing in it is run, and no claim of a size becomes an allocation."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hostile_sets import KEYS, SHOW, nothing_ran, ours, refusal_by_reader
from shard_sets import image_of
from tar_files import (
    END,
    chunk,
    member,
    pax,
    pax_record,
    png,
    png_of,
    sample,
    squeezed_zeros,
    write_around,
)

from medtl_dist.data.adopt import AdoptOptions, adopt
from medtl_dist.data.shards import Dataset, open_dataset
from medtl_dist.data.stream import eval_batches, train_batches
from medtl_dist.data.transforms import TrainTransform
from medtl_dist.data.verify import verify
from medtl_dist.errors import DataError


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.canary}",)


GZIPPED = gzip.compress(sample("a", 0) + sample("b", 1) + END)
PAGE = b"<!DOCTYPE html>\n<html><head><title>403 Forbidden</title></head></html>"


# What is put between two good samples of a tar, and the words that name it.
MEMBERS: dict[str, tuple[bytes, str]] = {
    "pickle": (b"", "a .pkl member"),  # filled in with a payload
    "torch": (member("x.pth", b"x"), "a .pth member"),
    "extension module": (member("x.pyd", b"x"), "a .pyd member"),
    "symbolic link": (member("x.png", kind=b"2", link=b"/etc/passwd"), "a symbolic link"),
    "hard link": (member("x.png", kind=b"1", link=b"/etc/passwd"), "a hard link"),
    "device": (member("x.png", kind=b"3"), "a character device"),
    "FIFO": (member("x.png", kind=b"6"), "a FIFO"),
    "traversal": (member("../../canary.png", png(3)), "a path that leaves its folder"),
    "absolute path": (member("/tmp/canary.png", png(3)), "an absolute path"),
    "folder with content": (member("x/", b"x", kind=b"5"), "a folder with content"),
    "not UTF-8": (member(b"\xff\xfe.png", png(3)), "its name is not UTF-8"),
    "sparse": (member("x.png", kind=b"S", size=0), "a GNU sparse file"),
    "PAX sparse": (pax(**{"GNU.sparse.realsize": "1099511627776"}) + member("x.png", png(3)), "a sparse file"),
    "interleaved": (member("first.json", b"{}") + sample("z", 0) + member("first.txt", b""), "its key occurred before"),
    "duplicate": (member("z.png", png(0)) + member("z.png", png(1)), "a second image under one key"),
    "no image": (member("z.json", b"{}"), "a key without an image"),
    "30,000 x 30,000": (member("z.cls", b"0") + member("z.png", png_of(30_000, 30_000, bits=1)), "30000 x 30000 pixels"),
    "13,000 x 13,000": (member("z.cls", b"0") + member("z.png", png_of(13_000, 13_000)), "13000 x 13000 pixels"),
    "zTXt": (
        member("z.cls", b"0")
        + member("z.png", png_of(24, 20, extra=chunk(b"zTXt", b"Comment\0\0" + squeezed_zeros(2**28)))),
        "the image can't be decoded",
    ),
}  # fmt: skip

# Whole files instead of a tar, or what follows its first sample instead of the rest.
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "an empty file, not a tar"),
    "nothing but an end": (END, "a tar without samples"),
    "web page": (PAGE, "not a tar but a web page"),
    "gzip": (GZIPPED, "not a tar but a gzip file: unpack it first"),
    "cut within a member": ((sample("a", 0) + sample("b", 1))[:-300], "the tar is cut short"),
    "cut between members": (sample("a", 0) + sample("b", 1), "without its end-of-archive blocks"),
    "two tars": (sample("a", 0) + END + sample("b", 1) + END, "there is data after the end"),
    "claimed petabyte": (sample("a", 0) + member("b.png", size=8**11 - 1), "its header claims 8589934591 bytes"),
    "PAX bomb": (sample("a", 0) + member("x", kind=b"x", size=2**33 - 1), "its header claims"),
    "PAX bomb, whole": (
        sample("a", 0) + member("x", pax_record("comment", bytes(2**20)), kind=b"x") + sample("b", 1) + END,
        "an extended header of 1048593 bytes",
    ),
    "PAX that moves data": (sample("a", 0) + pax(size="512") + sample("b", 1) + END, "a PAX header with size"),
}


def with_payload(tmp_path: Path, name: str) -> tuple[bytes, str]:
    bad, says = MEMBERS[name]
    if name == "pickle":
        bad = member("x.pkl", pickle.dumps(Payload(tmp_path / "canary")))
    return bad, says


def assert_exactly(dataset: Dataset, numbers: list[int]) -> None:
    """Evaluation and training either give every promised sample with its pixels and label, or refuse."""
    batches = list(eval_batches(dataset, "val", transform=SHOW, batch_size=3))
    assert [key for batch in batches for key in batch.keys] == [KEYS[number] for number in numbers]
    assert [label for batch in batches for label in batch.labels.tolist()] == [number % 2 for number in numbers]
    pixels = np.concatenate([batch.images[: batch.num_real].numpy() for batch in batches])
    assert all(np.array_equal(image, SHOW(image_of(number))) for image, number in zip(pixels, numbers, strict=True))
    trained = train_batches(dataset, "val", transform=TrainTransform(24), global_batch_size=1, seed=0, epoch=0)
    assert sorted(key for batch in trained for key in batch.keys) == sorted(KEYS[number] for number in numbers)


# --- a hostile member among good ones ---


@pytest.mark.parametrize("name", MEMBERS)
def test_index_names_the_member_and_makes_no_set(tmp_path: Path, name: str) -> None:
    bad, says = with_payload(tmp_path, name)
    folder = tmp_path / "tars"
    folder.mkdir()
    first = member("first.cls", b"0") + member("first.png", png(0))
    (folder / "val-0.tar").write_bytes(first + bad + sample("second", 1) + END)
    with pytest.raises(DataError, match=r"val-0\.tar: member \d+: ") as caught:
        adopt(folder, AdoptOptions(num_workers=1))
    assert says in caught.value.message
    assert sorted(path.name for path in folder.iterdir()) == ["val-0.tar"]
    assert nothing_ran(tmp_path)


@pytest.mark.parametrize("name", MEMBERS)
def test_verify_names_the_member_and_readers_keep_to_the_index(tmp_path: Path, name: str) -> None:
    """dataset.json, index and checksums all agree with the tar: only its inside is bad."""
    bad, says = with_payload(tmp_path, name)
    good = [ours(0), ours(1), ours(2)]
    tar = good[0] + good[1] + bad + good[2] + END
    starts = [0, len(good[0]), len(good[0] + good[1] + bad)]
    images = [(KEYS[i], starts[i] + 512, png(i), i % 2) for i in range(3)]
    dataset = write_around(tmp_path / "set", tar, images)
    found = [fault.what for fault in verify(tmp_path / "set", 1).faults]
    if "pixels" not in says and "decoded" not in says:  # these are not reached: the index does not have them
        assert any(says in what for what in found), found
    assert found
    assert_exactly(dataset, [0, 1, 2])
    assert nothing_ran(tmp_path)


# --- a hostile file instead of a tar ---


@pytest.mark.parametrize("name", FILES)
def test_index_names_the_tar(tmp_path: Path, name: str) -> None:
    data, says = FILES[name]
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "train-0.tar").write_bytes(sample("c", 0) + sample("d", 1) + END)
    (tmp_path / "tars" / "val-0.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"cannot be used: val-0\.tar: ") as caught:
        adopt(tmp_path / "tars", AdoptOptions(num_workers=1))
    assert says in caught.value.message


@pytest.mark.parametrize("name", FILES)
def test_verify_names_the_tar_and_readers_read_all_or_refuse(tmp_path: Path, name: str) -> None:
    data, says = FILES[name]
    folder = tmp_path / "set"
    good = ours(0) + ours(1) + ours(2) + END
    starts = [0, len(ours(0)), len(ours(0) + ours(1))]
    images = [(KEYS[i], starts[i] + 512, png(i), i % 2) for i in range(3)]
    write_around(folder, good, images)
    # The file takes the tar's place, and dataset.json is made to agree.
    (folder / "val-000000.tar").write_bytes(data)
    info = json.loads((folder / "dataset.json").read_text())
    info["splits"]["val"]["shards"][0].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (folder / "dataset.json").write_text(json.dumps(info))
    whats = [fault.what for fault in verify(folder, 1).faults]
    expected = "no such member at its offset" if says == "a tar without samples" else says
    assert any(expected in what for what in whats), whats
    assert "damaged" in (said := refusal_by_reader(open_dataset(folder))) or "beyond its end" in said


@pytest.mark.parametrize("where", ["header", "body", "json", "length of an image", "end"])
def test_a_flipped_byte_is_named_and_no_pixel_changes(tmp_path: Path, where: str) -> None:
    folder = tmp_path / "set"
    parts = [ours(0), ours(1), ours(2)]
    starts = [0, len(parts[0]), len(parts[0] + parts[1])]
    images = [(KEYS[i], starts[i] + 512, png(i), i % 2) for i in range(3)]
    dataset = write_around(folder, b"".join(parts) + END, images)
    tar = bytearray((folder / "val-000000.tar").read_bytes())
    at = {
        "header": starts[1] + 3,
        "body": starts[1] + 512 + 60,
        "json": starts[2] - 512 + 3,
        "length of an image": starts[1] + 130,
        "end": len(tar) - 1,
    }[where]
    tar[at] ^= 1
    (folder / "val-000000.tar").write_bytes(tar)
    report = verify(folder, 1)
    assert "its sha256 differs from dataset.json's" in [fault.what for fault in report.faults]
    named = {
        "header": "member 3: its header differs",
        "body": "its bytes differ from the checksum",
        "json": ".json",
        "length of an image": "member 3: its header differs",
        "end": "there is data after the end",
    }[where]
    assert any(named in fault.what for fault in report.faults), report.faults
    if where == "body":
        assert KEYS[1] in refusal_by_reader(dataset)
        assert KEYS[1] in {fault.key for fault in report.faults}
    else:
        assert_exactly(dataset, [0, 1, 2])


# --- hostile images that the index promises ---

IMAGES: dict[str, tuple[bytes, str]] = {
    "a pickle": (b"", "neither JPEG nor PNG"),
    "30,000 x 30,000": (png_of(30_000, 30_000, bits=1), "30000 x 30000 pixels are more than the limit"),
    "13,000 x 13,000": (png_of(13_000, 13_000), "13000 x 13000 pixels are more than the limit"),
    "no pixels": (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(13)) + chunk(b"IEND", b""), "an image of 0 x 0 pixels"),
    "no data": (png_of(24, 20)[:33] + chunk(b"IEND", b""), "decoded"),
    "a JPEG that never begins": (b"\xff\xd8\xff\xe0" + b"\xff" * 2000, "damaged JPEG header"),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
def test_a_hostile_image_is_refused_with_its_key(tmp_path: Path, name: str) -> None:
    data, says = IMAGES[name]
    data = data or pickle.dumps(Payload(tmp_path / "canary"))
    tar = ours(0) + ours(1, data) + END
    images = [(KEYS[0], 512, png(0), 0), (KEYS[1], len(ours(0)) + 512, data, 1)]
    dataset = write_around(tmp_path / "set", tar, images)
    said = refusal_by_reader(dataset)
    assert f"image {KEYS[1]} is damaged: " in said
    assert says in said
    faults = verify(tmp_path / "set", 1).faults
    assert [(fault.kind, fault.key) for fault in faults] == [("image", KEYS[1])]
    assert says in faults[0].what
    assert nothing_ran(tmp_path)
