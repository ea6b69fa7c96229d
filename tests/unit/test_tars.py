"""data/tars.py: the members that the standard library reads, and a refusal of everything else."""

from __future__ import annotations

import io
import re
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tar_files import END, member, members_of, pax, pax_record, png, sample
from webdataset.tariterators import base_plus_ext

from medtl_dist.data.tars import MAX_EXTENDED_BYTES, Member, Refused, TarSample, read_members, read_samples


def read(tar: bytes) -> list[Member | Refused]:
    return list(read_members(io.BytesIO(tar), len(tar)))


def refusals(tar: bytes) -> list[str]:
    return [str(found) for found in read_samples(read_members(io.BytesIO(tar), len(tar))) if isinstance(found, Refused)]


names = st.from_regex(r"([a-zé]{1,30}/){0,8}[a-z0-9é]{1,80}\.(png|PNG|x\.json|cls)", fullmatch=True)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(names, st.binary(max_size=1500)), max_size=8),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_reads_what_the_standard_library_writes(files: list[tuple[str, bytes]], tar_format: int) -> None:
    """All three formats, long and non-ASCII names, times as fractions (which makes PAX headers)."""
    file = io.BytesIO()
    written = []
    with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5 if tar_format == tarfile.PAX_FORMAT else 1
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:  # USTAR has no room for every name
                continue
            written.append((name, data))
    found = [item for item in read(file.getvalue()) if isinstance(item, Member)]
    assert [(item.name, item.data) for item in found] == written
    file.seek(0)
    with tarfile.open(fileobj=file) as tar:
        assert [item.offset for item in found] == [info.offset_data for info in tar]
    for item in found:
        key, suffix = base_plus_ext(item.name)
        assert (item.key, item.suffix) == (key, suffix)
        assert item.extension == str(suffix).rpartition(".")[2].lower()


def test_reading_goes_by_offsets_of_the_data() -> None:
    tar = sample("a", 0) + sample("b", 1) + END
    for item in read(tar):
        assert isinstance(item, Member)
        assert tar[item.offset : item.offset + len(item.data)] == item.data


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (member("a.pkl", b"x"), "a .pkl member: only jpg, jpeg, png, json, cls, txt are read"),
        (member("a.JaneDoe", b"x"), "a member of another extension"),
        (member("JaneDoe", b"x"), "a member of another extension"),
        (member("a.png", kind=b"1", link=b"/etc/passwd"), "a hard link: only regular files"),
        (member("a.png", kind=b"2", link=b"/etc/passwd"), "a symbolic link"),
        (member("a.png", kind=b"3"), "a character device"),
        (member("a.png", kind=b"4"), "a block device"),
        (member("a.png", kind=b"6"), "a FIFO"),
        (member("a.png", b"x", kind=b"7"), "a contiguous file"),
        (member("a.png", b"x", kind=b"S"), "a GNU sparse file"),
        (member("a.png", b"x", kind=b"Z"), "a member of unknown type"),
        (member("a", b"x", kind=b"5"), "a folder with content"),
        (member("../a.png", b"x"), "a path that leaves its folder"),
        (member("b/../../a.png", b"x"), "a path that leaves its folder"),
        (member("/a.png", b"x"), "an absolute path"),
        (member("b\\a.png", b"x"), "a name with control characters or backslashes"),
        (member("b\na.png", b"x"), "a name with control characters"),
        (member(b"\xff\xfe.png", b"x"), "its name is not UTF-8"),
        (member("__meta__/a.png", b"x"), "a meta member of webdataset"),
        (member("a.json", bytes(2**20 + 1)), "1048577 bytes are more than the limit of 1048576"),
        (pax(**{"GNU.sparse.major": "1"}) + member("a.png", b"x"), "a sparse file"),
    ],
)
def test_a_bad_member_is_refused_by_its_position_and_the_rest_is_read(bad: bytes, says: str) -> None:
    before, after = sample("1", 1), sample("2", 2)
    found = read(before + bad + after + END)
    assert isinstance(found[2], Refused)
    assert str(found[2]).startswith(f"member 3: {says}")
    assert not re.search(r"JaneDoe|etc", str(found[2]))
    assert [item.name for item in found] == ["1.cls", "1.png", found[2].name, "2.cls", "2.png"]
    assert found[2].name.isascii()
    assert found[2].name.isprintable()


@pytest.mark.parametrize(
    ("tar", "says"),
    [
        (b"", "an empty file, not a tar"),
        (b"x" * 300, "the tar ends without its end-of-archive blocks"),
        (b"x" * 2048, "no tar header where one is expected"),
        (b"\n<!DOCTYPE html><html><body>403</body></html>".ljust(2048), "not a tar but a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "not a tar but a web page"),
        (b"\x1f\x8b\x08" + bytes(600), "not a tar but a gzip file: unpack it first"),
        (b"BZh9" + bytes(600), "not a tar but a bzip2 file"),
        (b"\xfd7zXZ\x00" + bytes(600), "not a tar but an xz file"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "not a tar but a zstd file"),
        (b"PK\x03\x04" + bytes(600), "not a tar but a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a tar but a Git LFS pointer"),
    ],
)
def test_what_is_no_tar_says_so(tar: bytes, says: str) -> None:
    assert [str(item)[: len(says)] for item in read(tar)] == [says]


@pytest.mark.parametrize(
    ("rest", "says"),
    [
        (b"", "the tar ends without its end-of-archive blocks"),
        (END[:512], "the tar ends without its second end-of-archive block"),
        (END[:512] + member("b.png", b"x") + END, "there is data after the end of the archive"),
        (END + member("b.png", b"x") + END, "there is data after the end of the archive"),
        (END + bytes(10**7) + b"x", "there is data after the end of the archive"),
        (member("b.png", b"x")[:512], "member 2: its header claims 1 bytes, 0 are left"),
        (member("b.png", b"xy", size=2000), "member 2: its header claims 2000 bytes, 512 are left"),
        (member("b.png", size=8**11 - 1), "member 2: its header claims 8589934591 bytes, 0 are left"),
        (member("b.png", b"x", checksum=1) + END, "its header differs from the header's checksum"),
        (member("b.png", b"x", magic=b"V7 tar??") + END, "no tar header where one is expected"),
        (pax() + END, "member 2: an extended header that no member follows"),
        (pax(comment="a") + pax(comment="b") + member("b.png", b"x") + END, "two extended headers of one kind"),
        (pax(size="1") + member("b.png", b"x") + END, "a PAX header with size: readers could disagree"),
        (pax(linkpath="/etc/passwd") + member("b.png", b"x") + END, "a PAX header with linkpath"),
        (pax(hdrcharset="BINARY") + member("b.png", b"x") + END, "a PAX header with hdrcharset"),
        (
            member("g", pax_record("path", b"c.png"), kind=b"g") + member("b.png", b"x") + END,
            "a global PAX header that",
        ),
        (member("x", b"1 a=b\n", kind=b"x") + END, "a damaged PAX header"),
        (member("x", b"-7 a=b\n", kind=b"x") + END, "a damaged PAX header"),
        (member("x", b"9999 a=b\n", kind=b"x") + END, "a damaged PAX header"),
        (member("x", b"6 a=bc\n", kind=b"x") + END, "a damaged PAX header"),
        (member("x", pax_record("a", b"b") * 2, kind=b"x") + END, "a damaged PAX header"),
        (member("L", b"c.png\0", kind=b"L") + pax(path="d.png") + member("b.png", b"x") + END, "two extended headers"),
        (member("x", bytes(MAX_EXTENDED_BYTES + 1), kind=b"x") + END, "an extended header of 65537 bytes, more than"),
        (member("L", bytes(MAX_EXTENDED_BYTES + 1), kind=b"L") + END, "an extended header of 65537 bytes, more than"),
    ],
)
def test_a_damaged_tar_ends_with_what_is_wrong(rest: bytes, says: str) -> None:
    found = read(member("a.png", b"x") + rest)
    assert [type(item) for item in found] == [Member, Refused]
    assert str(found[1]).removeprefix("member 2: ").startswith(says.removeprefix("member 2: "))
    assert says.startswith("member 2") <= str(found[1]).startswith("member 2")


@pytest.mark.parametrize("size", [b"-0000000001\0", b"0_000000001\0", b"+0000000001\0", b"\x80" + bytes(10) + b"\x01"])
def test_a_size_is_an_octal_number_and_nothing_else(size: bytes) -> None:
    """int() takes signs and underscores, GNU tar base 256; readers that differ see other members."""
    block = bytearray(member("a.png", b"x"))
    block[124:136], block[148:156] = size, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    assert "no octal number" in str(read(bytes(block) + END)[0])


@pytest.mark.parametrize("at", [100, 108, 116, 136, 329, 337])
def test_a_number_that_stops_other_readers_is_told(at: int) -> None:
    """tarfile, and so webdataset, end at such a header as if the tar did: the rest is silently lost."""
    block = bytearray(member("b.png", b"x"))
    block[at : at + 3], block[148:156] = b"x01", b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    tar = member("a.png", b"x") + bytes(block) + END
    assert [name for name, _, _ in members_of(tar)] == ["a.png"]
    assert str(read(tar)[1]) == "member 2: a number in its header is damaged: other readers would silently stop here"


def test_a_gnu_header_with_a_prefix_is_refused() -> None:
    block = bytearray(member("a.png", b"x", magic=b"ustar  \0"))
    block[345:348], block[148:156] = b"dir", b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    assert "readers disagree about its name" in str(read(bytes(block) + END)[0])


def test_extended_names_are_used() -> None:
    for extended in (member("L", b"long.png\0", kind=b"L"), pax(path="long.png", mtime="1.5")):
        (found,) = read(extended + member("short.png", b"x") + END)
        assert isinstance(found, Member)
        assert found.name == "long.png"


def test_no_more_than_a_member_and_a_bounded_header_is_read_at_once() -> None:
    """A claim of gigabytes in an extended header or text must not become an allocation."""

    class Counting(io.BytesIO):
        most = 0

        def read(self, size: int | None = -1) -> bytes:
            Counting.most = max(Counting.most, size or 0)
            return super().read(size)

    for kind in (b"x", b"g", b"L", b"0"):
        file = Counting(member("a.json", kind=kind, size=2**32))
        list(read_members(file, 2**40))
    assert 0 < Counting.most <= MAX_EXTENDED_BYTES


# --- samples ---


def test_samples_are_grouped_as_webdataset_does() -> None:
    tar = member("folder/", kind=b"5") + sample("folder/a", 0) + member("folder/a.JSON", b"{}") + sample("b", 1) + END
    found = list(read_samples(read_members(io.BytesIO(tar), len(tar))))
    assert all(isinstance(item, TarSample) for item in found)
    assert [(item.key, item.image.data, sorted(item.texts)) for item in found if isinstance(item, TarSample)] == [
        ("folder/a", png(0), ["cls", "json"]),
        ("b", png(1), ["cls"]),
    ]


@pytest.mark.parametrize(
    ("tar", "says"),
    [
        (sample("a", 0) + member("a.png", b"x"), "member 3: a second image under one key"),
        (sample("a", 0) + member("a.jpg", b"x"), "member 3: a second image under one key"),
        (sample("a", 0) + member("a.cls", b"x"), "member 3: a second .cls member under one key"),
        (sample("a", 0) + sample("b", 1) + member("a.json", b"x"), "member 5: its key occurred before"),
        (member("a.png", b"x") + member("b.png", b"x") + member("a.cls", b"0"), "member 3: its key occurred before"),
        (member("a.cls", b"0") + sample("b", 1), "member 1: a key without an image"),
        (sample("1.2.840.1", 0) + sample("1.2.840.2", 0), "member 3: a second .cls member under one key (a key ends"),
    ],
)
def test_what_webdataset_would_lose_or_mix_is_told(tar: bytes, says: str) -> None:
    assert any(text.startswith(says) for text in refusals(tar + END)), refusals(tar + END)
