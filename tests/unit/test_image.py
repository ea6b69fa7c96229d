"""cluster/Dockerfile: clean by hadolint, and holding what its comments say. It is built elsewhere: here is no Docker engine."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "cluster/Dockerfile"
TEXT = DOCKERFILE.read_text(encoding="utf-8")


def hadolint(text: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "hadolint"), "--failure-threshold", "style", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


def test_hadolint_has_nothing_to_say() -> None:
    done = hadolint(TEXT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_hadolint_would_say_it() -> None:
    assert (
        "DL3007"
        in hadolint(
            TEXT.replace("python:3.11-slim-bookworm\n", "python:latest\n").replace("${BASE}", "python:latest")
        ).stdout
    )
    assert "DL3002" in hadolint(TEXT.replace("USER 1000:0", "USER root")).stdout
    assert "DL4000" in hadolint(TEXT + "MAINTAINER me\n").stdout


def test_the_image_runs_as_any_uid_of_group_0_and_never_as_root() -> None:
    assert re.findall(r"^USER (.*)$", TEXT, re.MULTILINE) == ["1000:0"]
    owned, shared = re.search(r"chown -R 1000:0 (.*) \\", TEXT), re.search(r"chmod -R g=u (.*)\n", TEXT)
    assert owned is not None
    assert shared is not None
    assert owned[1].split() == shared[1].split() == ["/home/medtl", "/cache", "/mnt/store"]
    from cluster.pods import CACHE, HOME

    assert {HOME, CACHE} <= set(shared[1].split())
    assert f"HOME={HOME}" in TEXT


@pytest.mark.parametrize(("ending", "health"), [(0, 0), (1, 1), (2, 1), (3, 1), (127, 1)])
def test_the_doctors_every_failure_is_dockers_one(ending: int, health: int, tmp_path: Path) -> None:
    [words] = re.findall(r"^HEALTHCHECK (?:--\S+ )*CMD (.*)$", TEXT, re.MULTILINE)
    (tmp_path / "medtl").write_text(f'#!/bin/sh\ntest "$*" = doctor && exit {ending}\n', encoding="utf-8")
    (tmp_path / "medtl").chmod(0o755)
    done = subprocess.run(json.loads(words), env={"PATH": f"{tmp_path}:/bin"}, check=False)
    assert done.returncode == health


def test_dependencies_come_by_the_constraints_file() -> None:
    installs = re.findall(r"pip install[^\n]*", TEXT)
    assert len(installs) == 2
    assert all("-c constraints.txt" in line for line in installs)
    line = re.search(r'^RUN (python -c "import tomllib.*) \\\n', TEXT, re.MULTILINE)
    assert line is not None
    command = line[1].replace("python", sys.executable, 1)
    listed = subprocess.run(
        ["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert listed == tomllib.load(file)["project"]["dependencies"]


def test_every_package_and_nothing_else_reaches_the_builder() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", TEXT, re.MULTILINE) for word in line.split()}
    assert allowed == copied
    with (ROOT / "pyproject.toml").open("rb") as file:
        packages = {name.split(".")[0] for name in tomllib.load(file)["tool"]["setuptools"]["packages"]}
    assert packages <= allowed
    hidden = [rule for rule in rules[1:] if not rule.startswith("!")]
    for name in ("cluster/token.key", "medtl_dist/x.private", "cluster/.env", "cluster/.env.local"):
        assert any(fnmatch.fnmatch(name, rule.replace("**/", "*")) for rule in hidden)
