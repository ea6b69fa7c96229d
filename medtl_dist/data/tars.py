"""shards/*.tar ─► members ─► samples: a tar read strictly; nothing in it is extracted, unpickled or run.

A header walk of our own, because ``tarfile`` stops without a word at a damaged header, reads extended headers of any
size into memory, and lets PAX records move the data. Accepted: regular files of a few extensions in USTAR, GNU (long
names) and PAX archives. Everything else comes out as ``Refused``, told by its position: a member's name may hold a
patient's, so it is only for the private folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")
TEXT_EXTENSIONS = ("json", "cls", "txt")

MAX_IMAGE_BYTES = 256 * 2**20
MAX_TEXT_BYTES = 2**20
MAX_EXTENDED_BYTES = 2**16

_BLOCK = 512
_CHUNK = 2**20
_NO_BLOCK = bytes(_BLOCK)
# mode, uid, gid, mtime, devmajor, devminor: not used here, but the standard library ends a tar, without a word, at a
# header where one is no number.
_NUMBERS = tuple(slice(*ends) for ends in ((100, 108), (108, 116), (116, 124), (136, 148), (329, 337), (337, 345)))

# Extensions that may be told in a message; any other could be a part of a name.
_TOLD = frozenset((
    "pkl", "pickle", "pyd", "pth", "pt", "npy", "npz", "ten", "tb", "mp", "msg", "msgpack", "cbor", "bin", "safetensors",
    "h5", "py", "sh", "so", "exe", "dll", "bat", "tif", "tiff", "bmp", "gif", "webp", "jp2", "dcm", "nii", "gz", "zip",
    "tar", "mp4", "avi", "csv", "tsv", "xml", "html", "yaml", "yml", "pdf", "md", "index", "id",
))  # fmt: skip
_OTHER_TYPES = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a character device", b"4": "a block device",
    b"6": "a FIFO", b"7": "a contiguous file", b"K": "a GNU long link", b"S": "a GNU sparse file",
}  # fmt: skip
_NOT_TARS = (
    (b"\x1f\x8b", "a gzip file: unpack it first (gunzip)"),
    (b"BZh", "a bzip2 file: unpack it first (bunzip2)"),
    (b"\xfd7zXZ\x00", "an xz file: unpack it first (unxz)"),
    (b"\x28\xb5\x2f\xfd", "a zstd file: unpack it first (unzstd)"),
    (b"\x04\x22\x4d\x18", "an lz4 file: unpack it first (unlz4)"),
    (b"PK\x03\x04", "a zip archive: make a tar of it"),
    (b"version https://git-lfs", "a Git LFS pointer: fetch the file itself (git lfs pull)"),
)
_PAGE = re.compile(rb"\s*(\xef\xbb\xbf)?\s*<(!doctype|html|\?xml|head|!--|error)", re.IGNORECASE)
# As webdataset has it: a key ends at the first dot of the base name.
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")

_META = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True, slots=True)
class Member:
    """A file of a tar. ``number``: its position among the members, from 1; ``key, suffix``: its name as webdataset
    parts it; ``extension``: what follows the last dot, lower case, "" for a folder; ``offset``: of its data."""

    number: int
    name: str
    key: str
    suffix: str
    extension: str
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Refused:
    """What is wrong with a member (``number`` 0: with the tar), in words free of names. ``name``: printable, but for
    the private folder only. ``ends``: nothing beyond it can be read."""

    number: int
    what: str
    name: str = ""
    ends: bool = False

    def __str__(self) -> str:
        return f"member {self.number}: {self.what}" if self.number else self.what


@dataclass(frozen=True, slots=True)
class TarSample:
    """The members of one key: an image, and texts by extension."""

    number: int
    key: str
    image: Member
    texts: dict[str, Member]


class Readable(Protocol):
    """What a walk needs of a file."""

    def seek(self, offset: int, /) -> int: ...

    def read(self, count: int, /) -> bytes: ...


class _Broken(Exception):
    """Nothing beyond this point of the tar can be trusted."""


class _Header(NamedTuple):
    name: bytes
    size: int
    kind: bytes


@dataclass
class _Extended:
    """What extended headers have said about the member that follows them."""

    name: bytes | None = None
    objection: str = ""
    kinds: set[bytes] = field(default_factory=set)


def read_members(file: Readable, length: int) -> Iterator[Member | Refused]:
    """The members of a tar of ``length`` bytes in order; its last item is a ``Refused`` if the tar is damaged there.

    One member is in memory at a time. Raises: OSError, the file cannot be read.
    """
    number, name = 0, b""
    try:
        _check_kind(_read(file, 0, min(_BLOCK, length)), length)
        at, extended = 0, _Extended()
        while (header := _header(file, at, length)) is not None:
            name = header.name
            body, at = at + _BLOCK, at + _BLOCK + -(-header.size // _BLOCK) * _BLOCK
            if body + header.size > length:
                raise _Broken(f"its header claims {header.size} bytes, {length - body} are left: the tar is cut short")
            if header.kind in (b"x", b"g", b"L"):
                _extend(extended, header, _read_extended(file, body, header.size))
                continue
            number += 1
            name = header.name if extended.name is None else extended.name
            yield _member(file, number, name, header, body, extended.objection)
            extended = _Extended()
        if extended.kinds:
            raise _Broken("an extended header that no member follows")
        name = b""
    except _Broken as broken:
        # A header is that of the member after the last whole one; what is wrong with the tar as such has none.
        yield Refused(number + 1 if name else 0, str(broken), _printable(name), ends=True)


def read_samples(members: Iterable[Member | Refused]) -> Iterator[TarSample | Refused]:
    """Groups members as webdataset does, by consecutive equal keys, but where it would lose or mix something there is
    a ``Refused``. Folders are skipped; the keys of a tar are kept in memory, of the members one sample's."""
    seen: set[str] = set()
    group: list[Member] = []
    for member in members:
        if isinstance(member, Refused):
            yield member
        elif member.extension:
            if group and member.key != group[0].key:
                yield from _sample(group, seen)
                group = []
            group.append(member)
    if group:
        yield from _sample(group, seen)


def _sample(group: list[Member], seen: set[str]) -> Iterator[TarSample | Refused]:
    first = group[0]
    if first.key in seen:
        yield Refused(first.number, "its key occurred before, with other members between (interleaved)", first.name)
        return
    seen.add(first.key)
    images = [member for member in group if member.extension in IMAGE_EXTENSIONS]
    texts: dict[str, Member] = {}
    twice = images[1:]
    for member in group:
        if member.extension in TEXT_EXTENSIONS and texts.setdefault(member.extension, member) is not member:
            twice.append(member)
    for member in twice:
        what = "image" if member.extension in IMAGE_EXTENSIONS else f".{member.extension} member"
        hint = " (a key ends at the first dot of the file's name: rename members such as 1.2.3.png)"
        yield Refused(
            member.number, f"a second {what} under one key{hint if '.' in member.suffix else ''}", member.name
        )
    if not images:
        yield Refused(first.number, "a key without an image (.jpg, .jpeg or .png)", first.name)
    elif not twice:
        yield TarSample(first.number, first.key, images[0], texts)


def _member(file: Readable, number: int, raw: bytes, header: _Header, offset: int, objection: str) -> Member | Refused:
    """One member with its data, or why not. Nothing of a refused one is read."""
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        return Refused(number, "its name is not UTF-8", _printable(raw))
    what = objection or _name_objection(name)
    if header.kind == b"5" or (header.kind in (b"0", b"\0") and name.endswith("/")):
        what = what or ("a folder with content" if header.size else "")
        return Refused(number, what, _printable(raw)) if what else Member(number, name, name, "", "", offset, b"")
    if header.kind not in (b"0", b"\0"):
        what = what or f"{_OTHER_TYPES.get(header.kind, 'a member of unknown type')}: only regular files are read"
    found = _KEY.fullmatch(name)
    key, suffix = found.groups() if found else ("", "")
    extension = suffix.rpartition(".")[2].lower()
    limit = MAX_IMAGE_BYTES if extension in IMAGE_EXTENSIONS else MAX_TEXT_BYTES
    if not what and extension not in IMAGE_EXTENSIONS + TEXT_EXTENSIONS:
        told = f"a .{extension} member" if extension in _TOLD else "a member of another extension"
        what = f"{told}: only {', '.join(IMAGE_EXTENSIONS + TEXT_EXTENSIONS)} are read"
    elif not what and header.size > limit:
        what = f"{header.size} bytes are more than the limit of {limit}"
    if what:
        return Refused(number, what, _printable(raw))
    return Member(number, name, key, suffix, extension, offset, _read(file, offset, header.size))


def _name_objection(name: str) -> str:
    if name.startswith("/"):
        return "an absolute path"
    if ".." in name.split("/"):
        return "a path that leaves its folder (..)"
    if _META.match(name):
        return "a meta member of webdataset, which its readers skip"
    if not name or not name.isprintable() or "\\" in name:
        return "a name with control characters or backslashes, or none"
    return ""


def _check_kind(head: bytes, length: int) -> None:
    """Says what the file is where it is plainly something else. Raises: _Broken."""
    if length == 0:
        raise _Broken("an empty file, not a tar")
    for magic, what in _NOT_TARS:
        if head.startswith(magic):
            raise _Broken(f"not a tar but {what}")
    if _PAGE.match(head):
        raise _Broken("not a tar but a web page (HTML or XML): was it fetched without access? Fetch it again")


def _header(file: Readable, at: int, length: int) -> _Header | None:
    """The header at ``at``; None at a whole end of the archive. Raises: _Broken."""
    if at + _BLOCK > length:
        raise _Broken("the tar ends without its end-of-archive blocks: it is cut short")
    block = _read(file, at, _BLOCK)
    if block == _NO_BLOCK:
        _check_end(file, at + _BLOCK, length)
        return None
    magic = block[257:265]
    if magic not in (b"ustar\x0000", b"ustar  \0"):
        raise _Broken("no tar header where one is expected: the tar is damaged, or no tar")
    if sum(block[:148]) + sum(block[156:]) + 8 * 32 != _octal(block[148:156], "checksum"):
        raise _Broken("its header differs from the header's checksum: the tar is damaged")
    for place in _NUMBERS:
        text = block[place].strip(b" \0")
        if text and block[place.start] not in (0x80, 0xFF) and not _is_octal(text):
            raise _Broken("a number in its header is damaged: other readers would silently stop here")
    name, prefix = block[:100].split(b"\0", 1)[0], block[345:500].split(b"\0", 1)[0]
    if prefix:
        if magic != b"ustar\x0000":  # readers disagree whether GNU's fields there are a part of the name
            raise _Broken("a GNU header with a prefix: readers disagree about its name")
        name = prefix + b"/" + name
    return _Header(name, _octal(block[124:136], "size"), block[156:157])


def _octal(text: bytes, what: str) -> int:
    digits = text.strip(b" \0")
    # No sign, no underscore, no base-256: what int() or GNU tar would take beyond these is no size of ours.
    if not _is_octal(digits):
        raise _Broken(f"the {what} in its header is no octal number, or 8 GiB and more")
    return int(digits, 8)


def _is_octal(text: bytes) -> bool:
    return bool(text) and all(48 <= digit <= 55 for digit in text)


def _check_end(file: Readable, at: int, length: int) -> None:
    if length - at < _BLOCK:
        raise _Broken("the tar ends without its second end-of-archive block: it is cut short")
    while at < length:
        data = _read(file, at, min(_CHUNK, length - at))
        if data.strip(b"\0"):
            raise _Broken("there is data after the end of the archive (tars joined by cat?)")
        at += len(data)


def _read_extended(file: Readable, at: int, size: int) -> bytes:
    if size > MAX_EXTENDED_BYTES:
        raise _Broken(f"an extended header of {size} bytes, more than the limit of {MAX_EXTENDED_BYTES}")
    return _read(file, at, size)


def _extend(extended: _Extended, header: _Header, data: bytes) -> None:
    """Takes in an extended header. Raises: _Broken, one that is damaged, repeated, or that readers could read apart."""
    if header.kind in extended.kinds:
        raise _Broken("two extended headers of one kind before a member")
    extended.kinds.add(header.kind)
    if header.kind == b"L":
        name: bytes | None = data.split(b"\0", 1)[0]
    else:
        records = _pax_records(data)
        for forbidden in (b"size", b"linkpath", b"hdrcharset"):
            if forbidden in records:
                raise _Broken(f"a PAX header with {forbidden.decode()}: readers could disagree about the member")
        if any(key.startswith(b"GNU.sparse") for key in records):
            extended.objection = "a sparse file"
        name = records.get(b"path")
        if header.kind == b"g" and (name is not None or extended.objection):
            raise _Broken("a global PAX header that names or changes members")
    if name is not None:
        if extended.name is not None:
            raise _Broken("two extended headers that name one member")
        extended.name = name


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """``"%d %s=%s\\n"`` records, the length being that of the whole record (POSIX.1-2001, pax)."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        digits, space, _ = data[at : at + 8].partition(b" ")
        if not space or not digits.isdigit() or not 5 <= int(digits) <= len(data) - at:
            raise _Broken("a damaged PAX header")
        record = data[at + len(digits) + 1 : at + int(digits)]
        key, equals, value = record[:-1].partition(b"=")
        if not equals or not key or not record.endswith(b"\n") or key in records:
            raise _Broken("a damaged PAX header")
        records[key] = value
        at += int(digits)
    return records


def _read(file: Readable, at: int, count: int) -> bytes:
    file.seek(at)
    data = file.read(count)
    if len(data) != count:
        raise _Broken("the file became shorter while it was read")
    return data


def _printable(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace").encode("unicode_escape").decode("ascii")
