"""manifest ─► DEST.private/: the secret, the linkage from keys to files, and the list of bad images.

The folder lies beside the set and never inside it, is open to its owner alone (0700, files 0600), and is the only place
where the name of a file or a patient is written.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from medtl_dist.data import identity
from medtl_dist.data.manifest import Identities
from medtl_dist.data.sources import Listing

KEY_FILE = "key"
LINKAGE_FILE = "linkage.parquet"
PROBLEMS_FILE = "problems.csv"
REFUSED_FILE = "refused.csv"


def private_folder(dest: Path) -> Path:
    """``DEST.private``, beside the set."""
    return dest.with_name(f"{dest.name}.private")


def open_private(folder: Path, key_file: Path | None) -> tuple[Path, bytes]:
    """Make the private folder; returns it and the secret: ``key_file``'s, else the one an earlier pack left, else new.

    Raises: UserError, a key file that is none.
    """
    given = None if key_file is None else identity.read_secret(key_file)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)  # mkdir's mode is subject to the umask, and an older folder may be open
    if given is not None:
        return folder, given
    path = folder / KEY_FILE
    if not path.exists():
        identity.write_secret(path, identity.new_secret())
    return folder, identity.read_secret(path)


def write_linkage(
    folder: Path, listing: Listing, identities: Identities, status: list[str], splits: list[str | None]
) -> None:
    """Write ``linkage.parquet``, a row per entry found: ``key, split, status`` (packed, or why not), ``file``
    (relative), ``row`` (within an array; null for a file), ``group`` and the raw ``group_name``."""
    unknown = identities.source == "none"
    table = pa.table(
        {
            "key": [key.hex() for key in identities.keys],
            "split": pa.array(splits, pa.string()),
            "status": status,
            "file": [_printable(name) for name in listing.names],
            "row": pa.array([None if row < 0 else row for row in listing.rows], pa.int64()),
            "group": identities.groups,
            "group_name": pa.array(
                [None if unknown else _printable(name.replace("\0", " | ")) for name in identities.group_names],
                pa.string(),
            ),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_private(folder / LINKAGE_FILE, buffer.getbuffer())


def write_problems(folder: Path, listing: Listing, identities: Identities, problems: Mapping[int, str]) -> None:
    """Write ``problems.csv`` (``key, reason, file, row``), for people; none without problems."""
    path = folder / PROBLEMS_FILE
    if not problems:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("key", "reason", "file", "row"))
    for row in sorted(problems, key=lambda row: identities.keys[row]):
        where = "" if listing.rows[row] < 0 else listing.rows[row]
        writer.writerow((identities.keys[row].hex(), problems[row], _printable(listing.names[row]), where))
    write_private(path, text.getvalue().encode("utf-8"))


def write_refused(folder: Path, refused: Sequence[tuple[str, int, str, str]]) -> None:
    """Write ``refused.csv`` (``tar, member, reason, name``): members of foreign tars; none without any."""
    path = folder / REFUSED_FILE
    if not refused:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("tar", "member", "reason", "name"), *refused])
    write_private(path, text.getvalue().encode("utf-8"))


def write_private(path: Path, data: bytes | memoryview) -> None:
    """A file for its owner alone, whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _printable(name: str) -> str:
    # A file name that is not UTF-8 has surrogates, which neither Parquet nor CSV can hold.
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
