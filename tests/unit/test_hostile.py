"""Hostile shards: whatever lies in a tar, ``verify`` and ``index`` name it, the training reader refuses it or reads
exactly the samples that the index promises; nothing in it is run, and no claim of a size becomes an allocation."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from shard_sets import image_of, key_of
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
from medtl_dist.data.transforms import EvalTransform, TrainTransform
from medtl_dist.data.verify import verify
from medtl_dist.errors import DataError, UserError

SHOW = EvalTransform(24, mode="squash")
KEYS = [key_of("val", number) for number in range(4)]


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def ours(number: int, image: bytes | None = None) -> bytes:
    """The members of a sample of our making, numbered so that label = number % 2."""
    text = json.dumps({"class": str(number % 2), "label": number % 2}).encode()
    return member(f"{KEYS[number]}.png", image or png(number)) + member(f"{KEYS[number]}.json", text)


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


def nothing_ran(tmp_path: Path) -> bool:
    return not list(tmp_path.rglob("canary*")) and not Path("/tmp/canary.png").exists()


def assert_exactly(dataset: Dataset, numbers: list[int]) -> None:
    """Evaluation and training either give every promised sample with its pixels and label, or refuse."""
    batches = list(eval_batches(dataset, "val", transform=SHOW, batch_size=3))
    assert [key for batch in batches for key in batch.keys] == [KEYS[number] for number in numbers]
    assert [label for batch in batches for label in batch.labels.tolist()] == [number % 2 for number in numbers]
    pixels = np.concatenate([batch.images[: batch.num_real].numpy() for batch in batches])
    assert all(np.array_equal(image, SHOW(image_of(number))) for image, number in zip(pixels, numbers, strict=True))
    trained = train_batches(dataset, "val", transform=TrainTransform(24), global_batch_size=1, seed=0, epoch=0)
    assert sorted(key for batch in trained for key in batch.keys) == sorted(KEYS[number] for number in numbers)


def refusal_by_reader(dataset: Dataset) -> str:
    """Both readers refuse the set, with one message."""
    said = set()
    for batches in (
        lambda: eval_batches(dataset, "val", transform=SHOW, batch_size=3),
        lambda: train_batches(dataset, "val", transform=TrainTransform(24), global_batch_size=1, seed=0, epoch=0),
    ):
        with pytest.raises(DataError) as caught:
            list(batches())
        said.add(caught.value.message.partition("image")[0])
    return caught.value.message


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


# --- hostile lists of shards ---


@pytest.mark.parametrize(
    "name",
    [
        "pipe:touch canary",
        "pipe:touch canary;.tar",
        "|touch canary .tar",
        "$(touch canary).tar",
        "../val-000000.tar",
        "/etc/passwd",
        "http://127.0.0.1/val-000000.tar",
        "file:val-000000.tar",
        "val-000000.tar\n",
        ".tar",
        "-rf.tar",
        "val-{000000..000009}.tar",
        "val-000000.tar::val-000001.tar",
        "",
        7,
        None,
    ],
)
def test_a_shard_list_holds_plain_names_only(tmp_path: Path, name: object, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "set"
    write_around(folder, ours(0) + END, [(KEYS[0], 512, png(0), 0)])
    info = json.loads((folder / "dataset.json").read_text())
    info["splits"]["val"]["shards"][0]["name"] = name
    (folder / "dataset.json").write_text(json.dumps(info))
    monkeypatch.chdir(tmp_path)
    for opening in (open_dataset, verify):
        with pytest.raises(DataError, match=r"dataset\.json is damaged"):
            opening(folder)
    assert nothing_ran(tmp_path)


def test_a_shard_cannot_be_in_two_splits(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_around(folder, ours(0) + END, [(KEYS[0], 512, png(0), 0)])
    info = json.loads((folder / "dataset.json").read_text())
    info["splits"]["train"] = info["splits"]["val"]
    (folder / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=r"val-000000\.tar is listed twice"):
        open_dataset(folder)


@pytest.mark.parametrize(
    ("offset", "size"), [(2**62, 2**62), (-(2**62), 10), (512, 2**62), (2**62, 10), (512, -1), (2**63 - 1, 1)]
)
def test_offsets_that_overflow_are_refused(tmp_path: Path, offset: int, size: int) -> None:
    folder = tmp_path / "set"
    write_around(folder, ours(0) + END, [(KEYS[0], 512, png(0), 0)])
    rows = pq.read_table(folder / "index.parquet")
    for column, value in (("offset", offset), ("size", size)):
        place = rows.column_names.index(column)
        rows = rows.set_column(place, rows.schema.field(place), [[value]])
    pq.write_table(rows, folder / "index.parquet", store_schema=False)
    raw = (folder / "index.parquet").read_bytes()
    info = json.loads((folder / "dataset.json").read_text())
    info["index"].update(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())
    (folder / "dataset.json").write_text(json.dumps(info))
    assert "index" in refusal_by_reader(open_dataset(folder))
    assert any("points outside" in fault.what for fault in verify(folder, 1).faults)


@pytest.mark.parametrize("label", [2, -1])
def test_a_label_of_no_class_is_refused(tmp_path: Path, label: int) -> None:
    """Training would fail on it in the loss, on one rank only, or count from the end."""
    dataset = write_around(tmp_path / "set", ours(0) + END, [(KEYS[0], 512, png(0), label)])
    assert "labels of no class" in refusal_by_reader(dataset)
    assert any(f"has label {label}, of 2 classes" in fault.what for fault in verify(tmp_path / "set", 1).faults)


def test_a_flipped_byte_in_the_footer_of_the_index_is_seen(tmp_path: Path) -> None:
    """In a text there, which no checksum of Parquet's covers and no parser minds."""
    dataset = write_around(tmp_path / "set", ours(0) + END, [(KEYS[0], 512, png(0), 0)])
    path = tmp_path / "set" / "index.parquet"
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"parquet-cpp-arrow", b"parquet-cpp-Arrow"))
    assert path.read_bytes() != raw
    pq.read_table(path)
    assert "its sha256 differs" in refusal_by_reader(dataset)


def test_a_fifo_among_foreign_tars_does_not_hang(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    os.mkfifo(tmp_path / "tars" / "val-0.tar")
    with pytest.raises(DataError, match=r"val-0.tar: not a regular file"):
        adopt(tmp_path / "tars", AdoptOptions(num_workers=1))


@pytest.mark.parametrize("text", ["[" * 10**6, '{"format_version": ' + "9" * 5000 + "}", "\x00", '{"a": "\\ud800"}'])
def test_a_hostile_dataset_file(tmp_path: Path, text: str) -> None:
    write_around(tmp_path / "set", ours(0) + END, [(KEYS[0], 512, png(0), 0)])
    (tmp_path / "set" / "dataset.json").write_text(text)
    with pytest.raises((DataError, UserError)):
        open_dataset(tmp_path / "set")


# --- memory ---

_BOMBS = """
import resource, sys
from pathlib import Path
from medtl_dist.data.adopt import AdoptOptions, adopt
from medtl_dist.data.loader import Loader
from medtl_dist.data.reader import EvalPass
from medtl_dist.data.shards import open_dataset
from medtl_dist.data.transforms import EvalTransform
from medtl_dist.data.verify import verify
from medtl_dist.errors import MedtlError

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

good, tars, *sets = map(Path, sys.argv[1:])
verify(good, 1)
list(Loader().run(EvalPass(open_dataset(good), "val", EvalTransform(24), 4, 0, 1, True)))
before = peak()
for folder in sets:
    verify(folder, 1)
    try:
        list(Loader().run(EvalPass(open_dataset(folder), "val", EvalTransform(24), 4, 0, 1, True)))
    except MedtlError:
        pass
try:
    adopt(tars, AdoptOptions(num_workers=1))
except MedtlError as error:
    print(error, file=sys.stderr)
print(peak() - before)
"""


def test_bombs_cost_no_memory(tmp_path: Path) -> None:
    """In a process of its own, whose peak they would raise: by 256 MiB for a text, 169 MB and 900 MB for pixels."""
    ztxt = chunk(b"zTXt", b"Comment\0\0" + squeezed_zeros(2**28))
    iccp = chunk(b"iCCP", b"icc\0\0" + squeezed_zeros(2**28))
    bombs = [
        png_of(30_000, 30_000, bits=1),
        png_of(13_000, 13_000),
        png_of(24, 20, extra=ztxt),
        png_of(24, 20, extra=iccp),
    ]
    write_around(tmp_path / "good", ours(0) + END, [(KEYS[0], 512, png(0), 0)])
    (tmp_path / "tars").mkdir()
    sets = []
    for number, bomb in enumerate(bombs):
        folder = tmp_path / f"set{number}"
        write_around(folder, ours(1, bomb) + END, [(KEYS[1], 512, bomb, 1)])
        sets.append(folder)
        (tmp_path / "tars" / f"val-{number}.tar").write_bytes(sample("a", 0, bomb) + END)
    (tmp_path / "tars" / "train-0.tar").write_bytes(FILES["PAX bomb, whole"][0])
    (tmp_path / "tars" / "train-1.tar").write_bytes(FILES["claimed petabyte"][0])
    done = subprocess.run(
        [sys.executable, "-c", _BOMBS, str(tmp_path / "good"), str(tmp_path / "tars"), *map(str, sets)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert int(done.stdout) < 48, done.stdout
    assert "members of the tars" in done.stderr
