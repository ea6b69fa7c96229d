"""Fuzzing: bytes of a set are changed at random. Whatever comes of it is the very same samples, or a ``MedtlError``.

The run is the same every time; ``MEDTL_FUZZ_EXAMPLES=20000`` makes a longer one, of other examples.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_folders import write_folder
from shard_sets import image_of
from tar_files import END, members_of, pax, png, sample

from medtl_dist.data import index
from medtl_dist.data.adopt import AdoptOptions, adopt
from medtl_dist.data.pack import PackOptions, pack
from medtl_dist.data.reader import EvalPass, Sample, TrainPass, fill
from medtl_dist.data.shards import Dataset, open_dataset
from medtl_dist.data.stream import eval_batches
from medtl_dist.data.tars import Member, Refused, read_members
from medtl_dist.data.transforms import EvalTransform, TrainTransform
from medtl_dist.data.verify import verify
from medtl_dist.errors import MedtlError

LONG = int(os.environ.get("MEDTL_FUZZ_EXAMPLES", "0"))
fuzz = settings(
    max_examples=LONG or 40,
    derandomize=not LONG,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SHOW = EvalTransform(16)
TRAIN = TrainTransform(16)

Change = tuple[str, float, float, bytes]
changes = st.lists(
    st.tuples(
        st.sampled_from(("flip", "set", "cut", "copy", "insert", "end", "zero")),
        st.floats(0, 1),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=3,
)


def changed(data: bytes, todo: list[Change]) -> bytes:
    """The data after the changes, whose places are shares of its length."""
    for kind, first, second, new in todo:
        if not data:
            break
        at, other = int(first * (len(data) - 1)), int(second * (len(data) - 1))
        low, high = min(at, other), max(at, other)
        if kind == "flip":
            data = data[:at] + bytes([data[at] ^ (1 << new[0] % 8)]) + data[at + 1 :]
        elif kind == "set":
            data = data[:at] + new + data[at + len(new) :]
        elif kind == "cut":
            data = data[:low] + data[low + new[0] :]
        elif kind == "copy":
            data = data[:at] + data[low : min(high, low + 4096)] + data[at:]
        elif kind == "insert":
            data = data[:at] + new + data[at:]
        elif kind == "end":
            data = data[:at]
        else:
            data = data[:low] + bytes(min(high - low, 600)) + data[low + min(high - low, 600) :]
    return data


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    pack(write_folder(folder / "in", 16), folder / "set", PackOptions(image_size_px=12, num_workers=1))
    return folder / "set"


@contextmanager
def copy_of(packed: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copytree(packed, Path(folder) / "set"))


def everything(dataset: Dataset) -> dict[tuple[str, bytes], Any]:
    """Every sample by split and key: its label and pixels; by evaluation, and by an epoch of training. Without the
    loader's threads, which would take most of the time."""
    found: dict[tuple[str, bytes], Any] = {}
    for split in dataset.splits:
        evaluation = EvalPass(dataset, split, SHOW, batch_size=5, rank=0, world_size=1, verify=True)
        for part in _parts(evaluation):
            for read, pixels in part:
                assert (split, read.key) not in found
                found[split, read.key] = (read.label, pixels)
        training = TrainPass(dataset, split, TRAIN, 1, 0, 0, 0, 1, 0, 64, 4, verify=True)
        trained = {read.key: read.label for part in _parts(training) for read, _ in part}
        assert trained == {key: label for (place, key), (label, _) in found.items() if place == split}
    return found


def _parts(work: EvalPass | TrainPass) -> Iterator[list[tuple[Sample, bytes]]]:
    size = work.transform.image_size_px
    for part in work.parts(0, 1):
        rows = np.empty((len(part), work.dataset.channels, size, size), np.uint8)
        fill(rows, part, work)
        yield list(zip(part, map(np.ndarray.tobytes, rows), strict=True))


def outcome(folder: Path) -> dict[tuple[str, bytes], Any] | None:
    """Every sample, or None where an error of ours refused; any other exception is a failure."""
    try:
        return everything(open_dataset(folder))
    except MedtlError:
        return None


def agree(folder: Path, file: str) -> None:
    """Lets dataset.json tell the length and the checksum that ``file`` now has: a forger's set, not a damaged one."""
    info = json.loads((folder / "dataset.json").read_text())
    data = (folder / file).read_bytes()
    entries = [shard for split in info["splits"].values() for shard in split["shards"]] + [info["index"]]
    for entry in entries:
        if entry["name"] == file:
            entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (folder / "dataset.json").write_text(json.dumps(info))


@pytest.mark.parametrize("file", ["train-000000.tar", "val-000000.tar", "index.parquet", "dataset.json"])
def test_a_damaged_set_gives_the_same_samples_or_an_error(packed: Path, file: str) -> None:
    original = everything(open_dataset(packed))
    whole = (packed / file).read_bytes()
    seen = {"same": 0, "refused": 0}

    @fuzz
    @given(changes)
    def run(todo: list[Change]) -> None:
        data = changed(whole, todo)
        with copy_of(packed) as folder:
            (folder / file).write_bytes(data)
            found = outcome(folder)
            assert found is None or found == original
            seen["refused" if found is None else "same"] += 1
            try:
                faults = verify(folder, 1).faults
            except MedtlError:
                return
            # dataset.json has nobody to vouch for it: a change in a note is a change of the note.
            assert faults or data == whole or file == "dataset.json"

    run()
    assert seen["refused"] > 3


def test_a_damaged_tar_of_the_same_length_is_read_alike_or_refused(packed: Path) -> None:
    """Past the check of lengths: only checksums and decoders stand between a flipped byte and a wrong pixel."""
    original = everything(open_dataset(packed))
    file = "train-000000.tar"
    whole = (packed / file).read_bytes()

    @fuzz
    @given(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(1, 255)), min_size=1, max_size=4))
    def run(flips: list[tuple[int, int]]) -> None:
        data = bytearray(whole)
        for at, mask in flips:
            data[at] ^= mask
        with copy_of(packed) as folder:
            (folder / file).write_bytes(data)
            found = outcome(folder)
            assert found is None or found == original
            faults = verify(folder, 1).faults
            assert bytes(data) == whole or any(fault.file == file for fault in faults)
            named = {fault.key for fault in faults}
            if found is None:  # what stops a reader has a name in verify
                assert named - {None}

    run()


@pytest.mark.parametrize("file", ["train-000000.tar", "index.parquet"])
def test_a_forged_set_gives_samples_or_an_error_and_never_a_crash(packed: Path, file: str) -> None:
    """Lengths and checksums agree with the damage, as where someone made it on purpose."""
    whole, promised = (packed / file).read_bytes(), len(everything(open_dataset(packed)))

    @fuzz
    @given(changes)
    def run(todo: list[Change]) -> None:
        with copy_of(packed) as folder:
            (folder / file).write_bytes(changed(whole, todo))
            agree(folder, file)
            found = outcome(folder)
            assert found is None or len(found) == promised  # all of them or none, never some
            with contextlib.suppress(MedtlError):  # dataset.json says where the footer lies: another length belies it
                verify(folder, 1)

    run()


def test_a_damaged_index_too_large_to_hash_is_read_alike_or_refused(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages have checksums of their own; the footer and the pages' headers have none."""
    monkeypatch.setattr(index, "_HASHED_BYTES", 0)
    original = everything(open_dataset(packed))
    whole = (packed / "index.parquet").read_bytes()

    @fuzz
    @given(st.integers(0, len(whole) - 1), st.integers(1, 255))
    def run(at: int, mask: int) -> None:
        data = whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :]
        with copy_of(packed) as folder:
            (folder / "index.parquet").write_bytes(data)
            index._local_footer.cache_clear()
            found = outcome(folder)
            index._local_footer.cache_clear()
            assert found is None or found == original

    run()


def with_right_checksums(tar: bytes) -> bytes:
    blocks = [bytearray(tar[at : at + 512]) for at in range(0, len(tar), 512)]
    for block in blocks:
        if block[257:262] == b"ustar" and len(block) == 512:
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(blocks)


TAR = pax(mtime="1.5") + sample("a", 0) + sample("b", 1) + sample("folder/c", 2) + END


@settings(fuzz, max_examples=LONG or 300)
@given(changes, st.booleans())
def test_the_walk_ends_with_members_of_the_tar_or_a_refusal(todo: list[Change], mend: bool) -> None:
    """Data is never read from elsewhere than where the walk says, and the walk never raises. With ``mend`` the headers'
    checksums are made right again, so that the fields behind them are what is tried."""
    data = with_right_checksums(changed(TAR, todo)) if mend else changed(TAR, todo)
    found = list(read_members(io.BytesIO(data), len(data)))
    for item in found:
        if isinstance(item, Member):
            assert item.data == data[item.offset : item.offset + len(item.data)]
        else:
            assert item.what
    if not any(isinstance(item, Refused) for item in found):
        # What we take without a word, the standard library reads alike.
        names = [(item.name, item.offset, item.data) for item in found if isinstance(item, Member) and item.extension]
        assert [entry for entry in members_of(data) if not entry[0].endswith("/")] == names


def test_a_damaged_foreign_tar_is_adopted_with_its_own_pixels_or_refused() -> None:
    pixels = {SHOW(image_of(number)).tobytes() for number in range(3)}

    @fuzz
    @given(changes)
    def run(todo: list[Change]) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "tars"
            folder.mkdir()
            (folder / "train-0.tar").write_bytes(changed(TAR, todo))
            (folder / "val-0.tar").write_bytes(sample("v", 0) + sample("w", 1) + END)
            try:
                dataset = adopt(folder, AdoptOptions(num_workers=1))
            except MedtlError:
                assert not (folder / "dataset.json").exists()
                return
            assert dataset.color == "grey"
            for batch in eval_batches(dataset, "train", transform=SHOW, batch_size=2):
                for image in batch.images[: batch.num_real]:
                    assert np.asarray(image).tobytes() in pixels
            assert verify(folder, 1).faults == []

    run()


def test_the_images_that_are_damaged_here_are_whole_to_begin_with() -> None:
    assert [name for name, _, _ in members_of(TAR)] == [
        "a.cls",
        "a.png",
        "b.cls",
        "b.png",
        "folder/c.cls",
        "folder/c.png",
    ]
    assert {data for name, _, data in members_of(TAR) if name.endswith("png")} == {png(number) for number in range(3)}
