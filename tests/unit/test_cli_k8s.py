"""`medtl k8s render` as a user types it: YAML on standard output, sizes on standard error, --apply through kubectl."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from medtl_dist.cli.k8s import render
from medtl_dist.cli.main import run

IMAGE = "medtl@sha256:" + "1" * 64
RENDER = [
    "k8s", "render", "--preset", "resnet101", "--set", "data.shards=sets/x", "--name", "xrays-1", "--gpus", "8", "--image", IMAGE,
    "--store", "s3://bucket/medtl",
]  # fmt: skip


def kinds(text: str) -> list[str]:
    return [manifest["kind"] for manifest in yaml.safe_load_all(text)]


def test_render_prints_yaml_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run([*RENDER, "--gpus-per-worker", "4", "--min-gpus", "4", "--spot", "a/b=spot", "--identity", "c/d=e=f"]) == 0
    )
    out, err = capsys.readouterr()
    assert kinds(out) == ["ServiceAccount", "ConfigMap", "NetworkPolicy", "RayJob"]
    account, _, _, job = yaml.safe_load_all(out)
    assert account["metadata"]["annotations"] == {"c/d": "e=f"}
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (1, 2)
    assert group["template"]["spec"]["nodeSelector"] == {"a/b": "spot"}
    assert "2 worker pods (at least 1) of 12 CPUs, 30 GiB, 4 GPUs; 2 loaders per GPU" in err
    assert len(err.splitlines()) == 1


def test_render_says_how_fast_loading_must_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*RENDER, "--gpu-images-per-s", "3000", "--loader-images-per-s-core", "1000"]) == 0
    out, err = capsys.readouterr()
    assert "8 worker pods of 5 CPUs, 10 GiB, 1 GPU; 4 loaders per GPU, from 1000 images/s per core" in err
    (config,) = [m for m in yaml.safe_load_all(out) if m["kind"] == "ConfigMap"]
    assert yaml.safe_load(config["data"]["config.yaml"])["data"]["loader_workers"] == 4


def test_a_sweep_is_rendered_with_its_space_beside_its_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("# mine\nknobs: [{key: optim.lr, type: log_uniform, low: 1.0e-4, high: 1.0e-2}]\n")
    more = ["--kind", "tune", "--space", str(file), "--set", "cluster.num_workers=2", "--set", "tune.num_trials=9"]
    assert run([*RENDER, *more]) == 0
    out, err = capsys.readouterr()
    _, config_map, _, job = yaml.safe_load_all(out)
    assert config_map["data"]["space.yaml"] == file.read_text()
    assert str(tmp_path) not in out
    assert job["spec"]["entrypoint"].endswith("/runs/xrays-1 --resume --space /etc/medtl/space.yaml")
    assert err.endswith("; 4 of 9 trials at once\n")
    assert run([*RENDER, "--kind", "tune", "--set", "tune.space=smoke"]) == 0
    assert capsys.readouterr().out.count("--resume --space smoke\n") == 1


def test_a_cluster_to_work_on_needs_neither_store_nor_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(["k8s", "render", "--kind", "cluster", "--name", "notebook", "--image", IMAGE, "--cpu-workers", "1"]) == 0
    )
    assert kinds(capsys.readouterr().out) == ["ServiceAccount", "NetworkPolicy", "RayCluster"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--name", "X"], "--name 'X'"),
        (["--store", "/data"], "--store '/data'"),
        (["--claim", "c"], "--claim c with --store s3://bucket/medtl"),
        (["--spot", "spot"], "--spot spot: expected KEY=VALUE"),
        (["--gpus-per-worker", "3"], "expected multiples of --gpus-per-worker"),
        (["--set", "data.shards=/here"], "pods can't see this machine's folders"),
        (["--image", "medtl:1"], "add --allow-tag"),
        (["--kind", "doctor", "--test"], "--test with --kind doctor: only a training scores the test split"),
        (["--kind", "tune", "--test"], "--test with --kind tune: only a training scores the test split"),
        (["--space", "smoke"], "--space smoke with --kind train: only a sweep has a space"),
        (["--kind", "tune", "--space", "nowhere.yaml"], "space nowhere.yaml: can't be read"),
        (["--kind", "tune", "--set", "cluster.num_workers=9"], "--gpus 8: no room for one trial, which has 9 workers"),
        (["--ray-version", "nightly"], "--ray-version 'nightly'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*RENDER, *more]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert (len(err.splitlines()), out) == (1, "")


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kubectl that notes its arguments and input, and fails when told so; it is the only program on the PATH."""
    seen = tmp_path / "seen.json"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/kubectl").write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"json.dump([sys.argv[1:], sys.stdin.read()], open({str(seen)!r}, 'w'))\nsys.exit(int(os.environ['FAIL']))\n"
    )
    (tmp_path / "bin/kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("FAIL", "0")
    return seen


def test_apply_hands_the_manifests_to_kubectl(kubectl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(RENDER) == 0
    printed = capsys.readouterr().out
    assert not kubectl.exists()
    assert run([*RENDER, "--apply"]) == 0
    assert json.loads(kubectl.read_text()) == [["apply", "--filename", "-"], printed]
    assert capsys.readouterr().out == ""


def test_apply_tells_when_kubectl_fails_or_is_missing(
    kubectl: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAIL", "3")
    assert run([*RENDER, "--apply"]) == 2
    assert "kubectl apply ended with exit code 3" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(kubectl.parent))
    assert run([*RENDER, "--apply"]) == 2
    assert "--apply needs kubectl" in capsys.readouterr().err


def documented_commands() -> list[str]:
    texts = [(Path(__file__).parents[2] / "docs/kubernetes.md").read_text(encoding="utf-8"), render.__doc__ or ""]
    lines = [line.strip() for text in texts for line in re.sub(r"\\\n\s*", "", text).splitlines()]
    return [line for line in lines if line.startswith("medtl k8s render ")]


def test_the_documented_commands_run(kubectl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = documented_commands()
    assert len(commands) == 8
    for command in commands:
        words = shlex.split(
            command.replace("@sha256:…", f"@sha256:{'2' * 64}").replace("--image …", f"--image {IMAGE}").split(">")[0]
        )
        assert run(words[1:]) == 0, capsys.readouterr().err
        assert bool(capsys.readouterr().out) == ("--apply" not in words)
    assert kubectl.exists()


def test_the_renderer_imports_neither_ray_nor_torch() -> None:
    code = (
        "import sys; from medtl_dist.cli.main import run; "
        f"assert run({[*RENDER]!r}) == 0; sys.exit(any(name in sys.modules for name in ('ray', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
