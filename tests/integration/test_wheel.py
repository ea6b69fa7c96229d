"""The wheel holds our packages (``cluster`` is also an old name on PyPI) and works from another folder."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # built from a copy: setuptools leaves a build folder beside the sources
    source.mkdir()
    for name in ("medtl_dist", "cluster", "tune_spaces"):
        subprocess.run(["cp", "-r", str(_ROOT / name), str(source / name)], check=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", str(_ROOT / name), str(source / name)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_contains_our_packages_and_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "cluster/train.py",
        "cluster/ray_run.py",
        "tune_spaces/__init__.py",
        "medtl_dist/py.typed",
        "medtl_dist/presets/classic.yaml",
        "medtl_dist/report/template.html",
        "medtl_dist/report/style.css",
    ):
        assert name in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]
    packages = ("medtl_dist", "cluster", "tune_spaces")
    every_module = {str(path.relative_to(_ROOT)) for name in packages for path in (_ROOT / name).rglob("*.py")}
    assert every_module <= names


def test_the_installed_wheel_runs_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # The target folder comes first on the path, over the environment's own installation of the project.
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import cluster, medtl_dist.cli.main as main; "
        f"assert cluster.__file__.startswith({str(site)!r}) and main.__file__.startswith({str(site)!r}); "
        "sys.exit(main.run(['--help']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout
