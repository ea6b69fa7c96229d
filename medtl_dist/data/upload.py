"""a packed set on local disk ─► an object store: the tars, the index, and ``dataset.json`` last, so that a part is no set.

Stores have no lock that Arrow knows of. A packer therefore leaves a mark under a name of its own at the address and then
looks who else is there: of two that begin at once at least one sees the other, and goes.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from medtl_dist.data.shards import DATASET_FILE
from medtl_dist.errors import Interrupted, MedtlError, UserError
from medtl_dist.storage import Folder, Place, StorageOptions, Transient, bounded, classify, parse_place

NUM_UPLOADS = 4
_TRIES = 3
_CHUNK = 8 * 2**20
_SLOWEST = 128 * 2**10  # bytes a second: a server that takes less is given up, since the SDK would wait for ever
_MARK = ".packing-"

Progress = Callable[[int, int], None]


@contextlib.contextmanager
def staged_upload(
    url: str, staging: Path | None, storage: StorageOptions | None = None, progress: Progress | None = None
) -> Iterator[Path]:
    """A local path to pack a set to, whose files are then put at ``url``. ``staging``: where it is made; None: in the
    current folder. ``progress(done, total)``: files put.

    Raises:
        UserError: the address is not empty, can't be written to, or another process is packing to it.
        Interrupted: the upload failed; the packed set stays in ``staging``, named in the message.
    """
    place = parse_place(url)
    storage = storage or StorageOptions()
    folder = Folder.at_url(url, storage)
    patience_s = storage.timeout_s * (storage.retries + 1)
    mark = _MARK + secrets.token_hex(8)
    _claim(folder, place, mark)
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{place.name}.staging-", dir=_made(staging or Path.cwd())))
        packed = work / place.name
        try:
            yield packed
            _upload(packed, folder, place, mark, patience_s, progress or (lambda done, total: None))
        except _UploadFailed as failed:
            kind = UserError if isinstance(failed.cause, UserError) else Interrupted
            raise kind(
                f"{failed}; the packed set is whole in {packed}: copy it to {place.url}, {DATASET_FILE} last, "
                "or remove it and pack again"
            ) from None
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)
    finally:
        with contextlib.suppress(OSError):
            folder.delete(mark)


class _UploadFailed(Exception):
    def __init__(self, cause: MedtlError) -> None:
        super().__init__(cause.message)
        self.cause = cause


def _made(staging: Path) -> Path:
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--staging {staging}: can't be made ({error.strerror}); name a folder on a local disk"
        ) from None
    return staging


def _claim(folder: Folder, place: Place, mark: str) -> None:
    """Leaves our mark where nothing is. Raises: UserError, see ``staged_upload``."""
    try:
        _refuse(folder.names(), place)
        folder.write(mark, b"a set is being packed to this place\n")
        try:
            _refuse([name for name in folder.names() if name != mark], place)
        except UserError:
            folder.delete(mark)
            raise
    except OSError as error:
        raise _explained(error, place) from None


def _refuse(names: list[str], place: Place) -> None:
    if DATASET_FILE in names:
        raise UserError(
            f"{place.url} holds a shard set already: name a new address with --out, or remove that one first"
        )
    marks = [name for name in names if name.startswith(_MARK)]
    if marks:
        raise UserError(
            f"another process is packing to {place.url}: wait for it, or name another --out; if it was killed, remove "
            f"what is there ({marks[0]} is its mark)"
        )
    if names:
        raise UserError(
            f"{place.url} is not empty ({len(names)} entries): name a new address with --out, or remove it first"
        )


def _upload(packed: Path, folder: Folder, place: Place, mark: str, patience_s: float, progress: Progress) -> None:
    names = sorted(path.name for path in packed.iterdir() if path.name != DATASET_FILE)
    try:
        _put_all(packed, names, folder, patience_s, progress)
        if set(folder.names()) != {*names, mark}:
            # Nothing is removed: what has our names may be the other one's by now.
            raise _UploadFailed(
                UserError(f"{place.url} has been written to by somebody else meanwhile: name a new address with --out")
            )
        _put(packed, DATASET_FILE, folder, patience_s)
        progress(len(names) + 1, len(names) + 1)
    except OSError as error:
        _remove(folder, names)
        raise _UploadFailed(_explained(error, place)) from None
    except KeyboardInterrupt:
        _remove(folder, names)
        raise _UploadFailed(Interrupted(f"{place.url}: the upload was stopped")) from None


def _put_all(packed: Path, names: list[str], folder: Folder, patience_s: float, progress: Progress) -> None:
    pool = ThreadPoolExecutor(NUM_UPLOADS, thread_name_prefix="medtl-upload")
    try:
        for done, _ in enumerate(pool.map(lambda name: _put(packed, name, folder, patience_s), names), start=1):
            progress(done, len(names) + 1)
    finally:
        pool.shutdown(cancel_futures=True)  # what has not begun is not begun, Ctrl-C or not


def _remove(folder: Folder, names: list[str]) -> None:
    for name in (DATASET_FILE, *names):
        with contextlib.suppress(OSError):
            folder.delete(name)


def _put(packed: Path, name: str, folder: Folder, patience_s: float) -> None:
    """One file, whole, or OSError after three tries (of each of which the SDK repeats failed requests).

    ``patience_s``: how long a try may take beside the time that its bytes need on the slowest line worth waiting for.
    """
    limit_s = patience_s + (packed / name).stat().st_size / _SLOWEST
    for remaining in reversed(range(_TRIES)):
        try:
            bounded(lambda: _put_once(packed, name, folder), limit_s)
            return
        except Transient as error:
            if not remaining:
                raise OSError(errno.ETIMEDOUT, str(error)) from None
        except OSError as error:
            if not remaining or isinstance(classify(error, name), MedtlError):
                raise
        time.sleep(1.0)


def _put_once(packed: Path, name: str, folder: Folder) -> None:
    with (packed / name).open("rb") as file, folder.fs.open_output_stream(folder.at(name), compression=None) as out:
        while chunk := file.read(_CHUNK):
            out.write(chunk)
    length = folder.fs.get_file_info(folder.at(name)).size
    if length != (packed / name).stat().st_size:
        raise OSError(f"{length} bytes arrived")


def _explained(error: OSError, place: Place) -> MedtlError:
    problem = classify(error, place.url)
    if isinstance(problem, Transient):
        return Interrupted(
            f"{place.url} can't be written to ({problem}): check the network and the server, and try again"
        )
    if isinstance(problem, UserError):
        return problem
    return UserError(f"{place.url}: no such bucket; make it first, or check the address")
