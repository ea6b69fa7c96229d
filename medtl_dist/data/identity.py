"""file names and patient ids ─► keyed hashes: the only names that leave the private folder.

``key = HMAC-SHA256(secret, path and row)``, ``group = HMAC-SHA256(secret, patient)``, both cut to 128 bits. Without the
secret neither can be reversed with a dictionary of names; with the same secret they are the same in every set.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from medtl_dist.errors import UserError

SECRET_BYTES = 32
DIGEST_BYTES = 16


def new_secret() -> bytes:
    """32 random bytes."""
    return secrets.token_bytes(SECRET_BYTES)


def read_secret(path: Path) -> bytes:
    """The secret of a key file: 64 hexadecimal digits. Raises: UserError, no such file or other content."""
    try:
        text = path.read_text(encoding="ascii").strip()
        secret = bytes.fromhex(text)
    except OSError as error:
        raise UserError(
            f"key file {path} cannot be read ({error.strerror}); leave --key-file out to have one made, or write "
            f"{2 * SECRET_BYTES} hexadecimal digits into it: openssl rand -hex {SECRET_BYTES}"
        ) from None
    except ValueError:  # not ASCII, or not hexadecimal
        secret = b""
    if len(secret) != SECRET_BYTES:
        raise UserError(f"key file {path} is not a key: {2 * SECRET_BYTES} hexadecimal digits expected")
    return secret


def write_secret(path: Path, secret: bytes) -> None:
    """Write a new key file that only its owner can read (mode 0600). Raises: FileExistsError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secret.hex() + "\n")
        file.flush()
        os.fsync(file.fileno())


def image_key(secret: bytes, path: str, row: str = "") -> bytes:
    """The 16-byte key of the image at the relative ``path`` (posix, normalised); ``row``: where a file holds many."""
    return _digest(secret, "image", path, row)


def group_key(secret: bytes, *values: str) -> str:
    """The 32-digit hexadecimal name of the group that has these values."""
    return _digest(secret, "group", *values).hex()


def _digest(secret: bytes, kind: str, *values: str) -> bytes:
    # Joined by NUL, which no path holds: "a", "bc" and "ab", "c" stay apart. surrogateescape: names that aren't UTF-8.
    message = "\0".join((kind, *values)).encode("utf-8", "surrogateescape")
    return hmac.digest(secret, message, hashlib.sha256)[:DIGEST_BYTES]


def joined_groups(units: Sequence[Sequence[str]]) -> list[str]:
    """Join rows that share a unit, directly or through others (connected components, by union-find).

    ``units[i]``: the names of the units row ``i`` belongs to, at least one. Returns per row the smallest unit name of
    its component, which does not depend on the order of the rows.
    """
    parent: dict[str, str] = {}

    def root(unit: str) -> str:
        parent.setdefault(unit, unit)
        while parent[unit] != unit:
            parent[unit] = parent[parent[unit]]  # halve the path on the way up
            unit = parent[unit]
        return unit

    for row in units:
        first = root(row[0])
        for unit in row[1:]:
            other = root(unit)
            # The smaller name becomes the root, so that the root is the component's name.
            parent[max(first, other)] = first = min(first, other)
    return [root(row[0]) for row in units]
