"""Hostile sets: a shard list, offsets, labels and files that lie are refused, and bombs cost no memory."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hostile_sets import KEYS, nothing_ran, ours, refusal_by_reader
from tar_files import (
    END,
    chunk,
    member,
    pax_record,
    png,
    png_of,
    sample,
    squeezed_zeros,
    write_around,
)
from time_limit import within

from medtl_dist.data.adopt import AdoptOptions, adopt
from medtl_dist.data.shards import open_dataset
from medtl_dist.data.verify import verify
from medtl_dist.errors import DataError, UserError

BOMB = sample("a", 0) + member("x", pax_record("comment", bytes(2**20)), kind=b"x") + sample("b", 1)
PETABYTE = sample("a", 0) + member("b.png", size=8**11 - 1)

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
    with within(5), pytest.raises(DataError, match=r"val-0.tar: not a regular file"):
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
    (tmp_path / "tars" / "train-0.tar").write_bytes(BOMB + END)
    (tmp_path / "tars" / "train-1.tar").write_bytes(PETABYTE)
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
