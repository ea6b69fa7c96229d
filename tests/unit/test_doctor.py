"""Findings from facts; the probes of one machine; the command's exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from job_server import TOKEN, fake_job_server
from shard_sets import write_set

from cluster import doctor_checks as checks
from cluster.doctor import here, parsed_findings, probe_node, probe_shards, probe_step, probe_store
from cluster.doctor_checks import FAILED, OK, WARNING, Finding
from medtl_dist.cli.main import run
from medtl_dist.config import load_config
from medtl_dist.errors import DataError, UserError
from medtl_dist.storage import Folder, StorageOptions


def test_versions_that_differ_name_place_and_version() -> None:
    same = checks.versions({"client": {"ray": "2.60.0"}, "node a": {"ray": "2.60.0", "torch": "2.14.1"}})
    assert same.state == OK
    finding = checks.versions({"client": {"ray": "2.60.0"}, "node a": {"ray": "2.9.0", "torch": "2.14.1"}})
    assert (finding.state, finding.exit_code) == (FAILED, 2)
    assert "ray: client 2.60.0, node a 2.9.0" in finding.text
    assert "torch" not in finding.text
    assert "rayVersion" in finding.remedy


def test_a_manifests_version_is_found_in_jobs_and_clusters() -> None:
    job = "kind: RayJob\nspec: {rayClusterSpec: {rayVersion: 2.60.0}}\n---\nkind: ConfigMap\n"
    assert checks.manifest_versions(job) == {"ray": "2.60.0"}
    assert checks.manifest_versions("kind: RayCluster\nspec: {rayVersion: 2.60.0}") == {"ray": "2.60.0"}
    for text in ("kind: ConfigMap", job + "---\nspec: {rayVersion: 2.9.0}", "a: [", "spec: x"):
        with pytest.raises(UserError, match="--manifest"):
            checks.manifest_versions(text)


@pytest.mark.parametrize(
    ("bounds", "state"),
    [((-0.01, 0.02), OK), ((0.2, 0.9), OK), ((0.9, 1.5), OK), ((1.5, 2.0), WARNING), ((-9.0, -5.0), WARNING),
     ((-5.0, 300.0), OK), ((61.0, 90.0), FAILED), ((-90.0, -61.0), FAILED)],
)  # fmt: skip
def test_a_clock_is_wrong_only_by_what_is_certain(bounds: tuple[float, float], state: str) -> None:
    finding = checks.clocks({"node a": (0.0, 0.0), "node b": bounds})
    assert finding.state == state
    if state != OK:
        assert "node b" in finding.text


def test_the_network_between_nodes() -> None:
    assert checks.all_reduce(1, None, "gloo").state == OK
    assert checks.all_reduce(2, 900.0, "nccl").state == OK
    assert checks.all_reduce(2, 50.0, "gloo").state == WARNING
    failed = checks.all_reduce(2, None, "nccl", "timed out")
    assert (failed.state, failed.exit_code) == (FAILED, 5)
    assert "timed out" in failed.text
    assert "GLOO_SOCKET_IFNAME" in failed.remedy


@pytest.mark.parametrize(
    ("facts", "wanted", "state"),
    [
        ({"ray": 0, "seen": 0, "driver": None}, False, OK),
        ({"ray": 2, "seen": 2, "driver": "550.54"}, True, OK),
        ({"ray": 1, "seen": 2, "driver": "550.54"}, True, FAILED),
        ({"ray": 2, "seen": 0, "driver": None}, True, FAILED),
        ({"ray": 2, "seen": 2, "driver": "470.1"}, True, FAILED),
    ],
)
def test_gpus_that_are_promised_must_be_there(facts: dict[str, Any], wanted: bool, state: str) -> None:
    assert checks.gpus({"node a": facts}, wanted=wanted, needed=2).state == state


def test_a_store_that_is_another_folder_on_a_node_is_told() -> None:
    assert checks.stores("/mnt/s", {}, [], ["a", "b"]).state == OK
    unseen = checks.stores("/mnt/s", {}, ["b"], ["a", "b"])
    assert (unseen.state, unseen.exit_code) == (FAILED, 3)
    assert "another folder on b" in unseen.text
    assert checks.stores("/mnt/s", {"a": "read-only"}, [], ["a"]).exit_code == 3


def test_the_exit_code_is_that_of_the_first_failure() -> None:
    warning, data, training = (
        Finding("a", WARNING, ""),
        Finding("b", FAILED, "", "", 3),
        Finding("c", FAILED, "", "", 5),
    )
    assert checks.worst([warning]) == 0
    assert checks.worst([warning, data, training]) == 3


def test_shared_memory_and_timeouts() -> None:
    assert checks.shared_memory("x", 64 * 2**20).state == WARNING
    assert checks.shared_memory("x", None).state == WARNING
    assert checks.shared_memory("x", 2**31).state == OK
    assert checks.timeouts(7200.0).state == WARNING
    assert checks.timeouts(120.0).state == OK


def test_storage_is_tried_and_left_clean(tmp_path: Path) -> None:
    assert probe_store(str(tmp_path)) == ""
    assert list(tmp_path.iterdir()) == []
    assert probe_store(str(tmp_path / "none")) == "no such folder"
    assert not (tmp_path / "none").exists()
    assert "pipe" in probe_store("pipe:rm -rf x")


def test_storage_is_reached_as_the_config_says_on_every_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def at_url(url: str, options: StorageOptions | None = None) -> Folder:
        asked.append(options.endpoint_url if options is not None else None)
        return Folder.local(tmp_path)

    monkeypatch.setattr(Folder, "at_url", at_url)
    config = load_config(preset="smoke", overrides=["data.endpoint_url=http://10.0.0.9:8333"])
    row = probe_node(config.model_dump(mode="json"), "s3://bucket/medtl", "marker")
    assert row["store"] == ""
    assert not row["seen"]  # nobody has left the marker
    assert probe_store("s3://bucket/medtl") == ""
    assert asked == ["http://10.0.0.9:8333"] * 2 + [None]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_can_not_be_written_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert probe_store(str(tmp_path)) == "Permission denied"


def test_shards_and_one_step_of_this_machine(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "set", {"train": [11, 9, 6], "val": [9, 5]})
    config = load_config(preset="smoke", overrides=[f"data.shards={dataset.folder}"])
    assert probe_shards(config)["rows"] == 11
    step = probe_step(config)
    assert step["error"] is None
    assert 0 < step["loss"] < 100
    states = {finding.check: finding.state for finding in here(config, str(tmp_path), step=True)}
    assert states["shards"] == states["storage"] == states["one step"] == OK
    gone = load_config(preset="smoke", overrides=[f"data.shards={tmp_path / 'none'}"])
    assert probe_shards(gone)["error"]
    assert probe_step(gone)["error"]
    assert checks.worst(here(gone, None)) == probe_shards(gone)["exit_code"] != 0


def test_the_command_prints_each_finding_and_its_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--store", str(tmp_path / "none")]) == 3
    printed = capsys.readouterr().out
    assert "failed  storage" in printed
    assert "→ mount the folder there" in printed
    (tmp_path / "run.yaml").write_text("spec: {rayVersion: 1.2.3}")
    assert run(["doctor", "--manifest", str(tmp_path / "run.yaml"), "--json"]) == 2
    rows = json.loads(capsys.readouterr().out)["findings"]
    assert rows[0]["check"] == "versions"
    assert "manifest 1.2.3" in rows[0]["text"]
    assert run(["doctor", "--step"]) == 2


def test_a_cluster_without_authentication_is_a_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where a token of somebody's may lie
    with fake_job_server() as fake:
        fake.token = None
        assert run(["doctor", "--address", fake.address, "--code", "image"]) == 2
        assert "asks for no token" in capsys.readouterr().out
        assert fake.jobs == {}  # nothing is run there


def test_findings_come_back_from_the_clusters_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(TOKEN)
    row = Finding("storage", FAILED, "read-only", "mount it", 3).as_row()
    with fake_job_server() as fake:
        fake.default_log = f"setting up\n{json.dumps({'findings': [row]})}\n"
        fake.endings = [("FAILED", 3)]
        where = ["--address", fake.address, "--token-file", str(token)]
        assert run(["doctor", "--code", "image", "--store", "/mnt/s", "--json", *where]) == 3
    found = json.loads(capsys.readouterr().out)["findings"]
    assert [entry["check"] for entry in found] == ["authentication", "versions", "storage"]
    with pytest.raises(DataError, match="no findings"):
        parsed_findings("something else")


def test_an_images_health_check_imports_neither_ray_nor_torch() -> None:
    code = (
        "import sys; from medtl_dist.cli.main import run; assert run(['doctor', '--json']) == 0\n"
        "assert not {'ray', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
