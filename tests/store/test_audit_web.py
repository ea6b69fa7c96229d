"""The audit of a set on a web server: the same result as on disk, nothing written, acceptance refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from audit_sets import Entry, base, pack_entries, texture
from typer.testing import CliRunner
from web_server import running_web

from medtl_dist.cli import main as cli
from medtl_dist.data.audit import audit
from medtl_dist.data.audit_fix import fix
from medtl_dist.data.shards import open_dataset
from medtl_dist.errors import LeakageError, UserError


def test_a_set_on_a_server_is_audited_and_mended_as_on_disk(tmp_path: Path) -> None:
    entries = [*base(40), Entry(texture(0), "Doe-same", "test"), Entry(np.asarray(255 - texture(8)), "Doe-n", "val")]
    local = pack_entries(tmp_path, entries)
    before = {path.name: path.read_bytes() for path in Path(local.folder).iterdir()}
    with running_web(tmp_path) as site:
        remote = open_dataset(f"{site.url}/set")
        found = audit(remote, num_workers=1)
        assert found.summary == local.info["audit"]
        assert found.leaks >= 1
        result = CliRunner().invoke(cli.app, ["data", "audit", f"{site.url}/set", "--workers", "1"])
        assert isinstance(result.exception, LeakageError)
        assert f"{site.url}/set: 42 images" in result.output
        accept = tmp_path / "accept.csv"
        accept.write_text("key_a,key_b,reason\n")
        result = CliRunner().invoke(cli.app, ["data", "audit", f"{site.url}/set", "--accept", str(accept)])
        assert isinstance(result.exception, UserError)
        assert "is in a store: download the set" in result.exception.message
        result = CliRunner().invoke(cli.app, ["data", "audit", f"{site.url}/set", "--fix", "s3://bucket/new"])
        assert isinstance(result.exception, UserError)
        assert "a folder expected" in result.exception.message
        mended, again = fix(found, tmp_path / "new", num_workers=1)
    assert again.leaks == 0
    assert mended.info["fix"]["joined_groups"] == 2 * mended.info["fix"]["into_groups"]
    assert {path.name: path.read_bytes() for path in Path(local.folder).iterdir()} == before


def test_a_server_without_the_set_is_an_error(tmp_path: Path) -> None:
    with running_web(tmp_path) as site, pytest.raises(UserError, match="none"):
        open_dataset(f"{site.url}/none")
