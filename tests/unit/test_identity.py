"""Keyed names: stable, injective, secret; connected components against a brute force."""

from __future__ import annotations

import hashlib
import hmac
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl_dist.data import identity
from medtl_dist.errors import UserError

SECRET = bytes(range(32))


def test_a_key_is_an_hmac_of_path_and_row_cut_to_128_bits() -> None:
    expected = hmac.new(SECRET, b"image\0a/b.png\0" + b"7", hashlib.sha256).digest()[:16]
    assert identity.image_key(SECRET, "a/b.png", "7") == expected
    assert identity.image_key(bytes(32), "a/b.png", "7") != expected


def test_values_do_not_run_into_each_other() -> None:
    assert identity.group_key(SECRET, "ab", "c") != identity.group_key(SECRET, "a", "bc")
    assert identity.group_key(SECRET, "ab") != identity.image_key(SECRET, "ab").hex()


def test_a_name_that_is_not_utf8_has_a_key() -> None:
    assert len(identity.image_key(SECRET, "caf\udce9.png")) == 16


def test_a_key_file_is_for_its_owner_only_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "key"
    identity.write_secret(path, SECRET)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert identity.read_secret(path) == SECRET
    with pytest.raises(FileExistsError):
        identity.write_secret(path, SECRET)


@pytest.mark.parametrize("content", ["", "00", "zz" * 32, "00" * 33, "é" * 64])
def test_another_file_is_no_key(tmp_path: Path, content: str) -> None:
    path = tmp_path / "key"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="64 hexadecimal digits expected"):
        identity.read_secret(path)


def test_a_missing_key_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="openssl rand -hex 32"):
        identity.read_secret(tmp_path / "none")


def components_by_flooding(units: list[list[str]]) -> list[set[int]]:
    """Rows reachable from each row by shared units, found by going round until nothing changes."""
    reach = [{row} for row in range(len(units))]
    changed = True
    while changed:
        changed = False
        for row, found in enumerate(reach):
            shared = set().union(*(units[other] for other in found))
            more = {other for other in range(len(units)) if shared & set(units[other])}
            if not more <= found:
                reach[row], changed = found | more, True
    return reach


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=3), max_size=10), st.randoms())
def test_joined_groups_are_the_connected_components_in_any_order(units: list[list[str]], random) -> None:
    groups = identity.joined_groups(units)
    for row, reached in enumerate(components_by_flooding(units)):
        assert {other for other, group in enumerate(groups) if group == groups[row]} == reached
        assert groups[row] == min(unit for other in reached for unit in units[other])
    order = list(range(len(units)))
    random.shuffle(order)
    assert identity.joined_groups([units[row][::-1] for row in order]) == [groups[row] for row in order]


def test_a_long_chain_is_one_group() -> None:
    chain = [[f"{i:06d}", f"{i + 1:06d}"] for i in range(20_000)]
    assert set(identity.joined_groups(chain[::-1])) == {"000000"}
