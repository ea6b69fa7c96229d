"""a run's files ─► a folder in a store: every call ends in bounded time, is tried again, and fails with the address named.

``Folder`` itself makes bare calls, which is right for a local disk. A training can't hang because a store does.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import TypeVar

from pyarrow import fs as pafs

from medtl_dist.errors import DataError, Interrupted, MedtlError, UserError
from medtl_dist.storage import (
    Folder,
    Place,
    StorageOptions,
    Transient,
    bounded,
    classify,
    filesystem,
    missing,
    parse_place,
)

_SLOWEST = 128 * 2**10  # bytes a second: a store that is slower is given up
_LONGEST_PAUSE_S = 20.0
_GUARD_EVERY_S = 2.0

T = TypeVar("T")


@dataclass
class Guard:
    """Asks ``check`` before a write, at most every two seconds. ``check`` raises where this writer has been replaced."""

    check: Callable[[], None]
    asked: float = field(default=-1e9, compare=False)

    def __call__(self, *, now: bool = False) -> None:
        if now or time.monotonic() - self.asked >= _GUARD_EVERY_S:
            self.check()
            self.asked = time.monotonic()


@dataclass(frozen=True)
class StoreFolder(Folder):
    """A run folder on ``s3://`` or ``gs://``.

    Every method raises UserError (refused, no such bucket) or Interrupted (the store can't be reached; the same command goes
    on later) and never OSError. ``fence``: the number of the lease under which is written; ``leased_at``: the address of the
    folder whose lease that is, this one or one above it; ``guard``: asked before writing.
    """

    place: Place
    options: StorageOptions
    fence: int | None = None
    leased_at: str | None = None
    guard: Guard | None = field(default=None, compare=False)
    remote = True

    @property
    def url(self) -> str:
        return self.place.url

    def at(self, name: str) -> str:
        return f"{self.place.path}/{name}"

    def shown(self, name: str = "") -> str:
        return f"{self.place.url}/{name}" if name else self.place.url

    def sibling(self, name: str) -> StoreFolder:
        """The folder ``name`` beside this one, written without a lease."""
        return store_folder(self.place.url.rpartition("/")[0] + f"/{name}", self.options)

    def below(self, name: str) -> StoreFolder:
        """The folder ``name`` in this one, written without a lease."""
        return store_folder(f"{self.place.url}/{name}", self.options)

    def part(self, name: str) -> StoreFolder:
        """The folder ``name`` in this one, written under the same lease."""
        place = parse_place(f"{self.place.url}/{name}")
        return replace(self, path=place.path, place=place)

    def once(self) -> StoreFolder:
        """The folder with one try a call, for what is done again anyway or can do without."""
        return replace(self, options=replace(self.options, retries=0))

    def expect_run(self) -> None:
        """Raises UserError where no run has begun here."""
        if not self.exists("config.yaml"):
            raise UserError(f"{self.url} is not a run folder: it has no config.yaml.")

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises DataError where it is missing."""
        info = self.info(name)
        if info.type != pafs.FileType.File:
            raise missing(self.shown(name))

        def act() -> bytes:
            with self.fs.open_input_stream(self.at(name), compression=None) as stream:
                return stream.read()

        return self._tried(act, name, "read", info.size)

    def write(self, name: str, data: bytes) -> None:
        """Put a whole file: a reader sees the old one or the new one. Raises Interrupted where the guard says so, too."""
        if self.guard is not None:
            self.guard()
        self.put(name, data)

    def put(self, name: str, data: bytes) -> None:
        """As ``write``, without asking the guard."""

        def act() -> None:
            with self.fs.open_output_stream(self.at(name), compression=None) as stream:
                stream.write(data)

        self._tried(act, name, "written to", len(data))

    def link(self, name: str, other: str) -> None:
        """Have the store copy a file. Raises DataError where it is missing, and as ``write``."""
        if self.guard is not None:
            self.guard()
        info = self.info(name)
        if info.type != pafs.FileType.File:
            raise missing(self.shown(name))
        self._tried(lambda: self.fs.copy_file(self.at(name), self.at(other)), other, "written to", info.size)

    def exists(self, name: str) -> bool:
        return self.info(name).type != pafs.FileType.NotFound

    def info(self, name: str) -> pafs.FileInfo:
        return self._tried(lambda: self.fs.get_file_info(self.at(name)), name, "read")

    def names(self, name: str = "") -> list[str]:
        if self.place.scheme != "gs":
            return self._tried(lambda: Folder.names(self, name), name, "listed")
        # Arrow lists folders of Google's storage only where an object of a folder's name was made for them; files it lists.
        above = f"{self.at(name) if name else self.path}/"
        return sorted({info.path.removeprefix(above).partition("/")[0] for info in self.files(name)})

    def files(self, name: str = "") -> list[pafs.FileInfo]:
        """All files below ``name``, however deep."""
        selector = pafs.FileSelector(self.at(name) if name else self.path, recursive=True, allow_not_found=True)
        found = self._tried(lambda: self.fs.get_file_info(selector), name, "listed")
        return [info for info in found if info.type == pafs.FileType.File]

    def delete(self, name: str) -> None:
        self._tried(lambda: Folder.delete(self, name), name, "deleted from")

    def delete_tree(self, name: str) -> None:
        """Delete all files below ``name``; one that is gone meanwhile is no error."""
        for info in self.files(name):
            self.delete(info.path.removeprefix(f"{self.path}/"))

        def act() -> None:  # the empty objects that some clients leave as folders
            if self.fs.get_file_info(self.at(name)).type == pafs.FileType.Directory:
                self.fs.delete_dir(self.at(name))

        self._tried(act, name, "deleted from")

    def _tried(self, act: Callable[[], T], name: str, verb: str, num_bytes: int = 0) -> T:
        """``act()``, again and again while it may pass: at most ``retries`` more times, with growing pauses."""
        last = Transient("")
        began = time.monotonic()
        for number in range(self.options.retries + 1):
            if number:
                time.sleep(min(_LONGEST_PAUSE_S, 2.0 ** (number - 1)) * random.uniform(0.75, 1.0))
            try:
                return bounded(act, 2 * self.options.timeout_s + num_bytes / _SLOWEST)
            except OSError as error:
                problem = classify(error, self.shown(name))
                if isinstance(problem, DataError) and verb != "read":
                    problem = UserError(f"{self.url}: no such bucket; make it first, or check the address")
                if isinstance(problem, MedtlError):
                    raise problem from None
                last = problem
            except Transient as problem:
                last = problem
        raise Interrupted(
            f"{self.shown(name)} can't be {verb} ({last}; {self.options.retries + 1} tries in "
            f"{time.monotonic() - began:.0f} s). What was committed before is whole: when the store can be reached again, give "
            "the same command; a training with --resume goes on."
        )


def store_folder(url: str, options: StorageOptions) -> StoreFolder:
    """The folder at an ``s3://`` or ``gs://`` address. Raises: UserError, another kind of place."""
    place = parse_place(url)
    options = replace(options, anonymous=False)  # a public data set's credentials can't write a run
    return StoreFolder(filesystem(place, options, attempts=1), place.path, place, options)


def folder_at(place: str | Path, options: StorageOptions | None = None) -> Folder:
    """The run folder at a local path or an address. Raises: UserError, a place that can't be one."""
    found = parse_place(place)
    if not found.remote:
        return Folder.local(found.url)
    if found.scheme in ("http", "https"):
        raise UserError(
            f"{found.url}: a web server can only be read from; name a folder, s3:// or gs:// with --run-dir."
        )
    if "/" not in found.path:
        raise UserError(
            f"{found.url} is a whole bucket; name a folder in it with --run-dir, like {found.url}/runs/first."
        )
    return store_folder(found.url, options or StorageOptions())


@contextmanager
def fetched(folder: StoreFolder, names: tuple[str, ...]) -> Iterator[Path]:
    """A local folder of the run's name with those of the files that exist, for what reads local files; gone afterwards.

    An error raised in the block names the address instead.
    """
    with TemporaryDirectory(prefix="medtl-run-") as scratch:
        here = Path(scratch) / folder.place.name
        here.mkdir()
        for name in names:
            if folder.exists(name):
                put_here(here / name, folder.read(name))
        try:
            yield here
        except MedtlError as error:
            raise type(error)(error.message.replace(str(here), folder.url)) from None


def put_here(path: Path, data: bytes) -> None:
    """Write a temporary file, with the folders above it. Raises Interrupted where there is no room."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise Interrupted(
            f"{gettempdir()}: a temporary copy can't be written ({error.strerror}): free space there, or name another folder "
            "with TMPDIR; then give the same command"
        ) from None
