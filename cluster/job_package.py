"""Installed code, config and space ─► packages for Ray, named by their bytes.

A wheel is uploaded as the zip file that it is: given a ``.whl``, Ray 2.60 would `pip install` it on every node *with* its
dependencies (torch among them, from the network), and tell two builds of one version by their file name, not at all.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from medtl_dist.errors import UserError

PACKAGES = ("medtl_dist", "cluster", "tune_spaces")
WHEEL_BYTES = 32 * 2**20
FILES_BYTES = 2 * 2**20
_EPOCH = (1980, 1, 1, 0, 0, 0)


def package_name(data: bytes) -> str:
    """The name under which Ray stores a zip file: the same bytes, the same name."""
    return f"_ray_pkg_{hashlib.sha256(data).hexdigest()[:40]}.zip"


def zipped(files: Mapping[str, str]) -> bytes:
    """Files of text as a zip, the same bytes for the same files. Raises UserError where they are too large."""
    if sum(len(text) for text in files.values()) > FILES_BYTES:
        raise UserError(f"config and space together are larger than {FILES_BYTES // 2**20} MiB.")
    box = io.BytesIO()
    with zipfile.ZipFile(box, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), text)
    return box.getvalue()


def checked_wheel(path: Path) -> bytes:
    """A wheel of this project. Raises UserError where the file is something else."""
    try:
        data = path.read_bytes() if path.stat().st_size <= WHEEL_BYTES else b""
        names = zipfile.ZipFile(io.BytesIO(data)).namelist()
    except (OSError, zipfile.BadZipFile):
        raise UserError(
            f"--wheel {path}: expected a wheel of medtl_dist, at most {WHEEL_BYTES // 2**20} MiB."
        ) from None
    wanted = [f"{name}/__init__.py" for name in PACKAGES]
    if not set(wanted) <= set(names) or any(name.startswith("/") or ".." in name.split("/") for name in names):
        raise UserError(f"--wheel {path}: expected a wheel of medtl_dist; it must hold {', '.join(wanted)}.")
    return data


def reproducible(wheel: bytes) -> bytes:
    """The wheel's files in sorted order without their times: code that has not changed is not uploaded again."""
    box = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(wheel)) as source, zipfile.ZipFile(box, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(name for name in source.namelist() if not name.endswith("/")):
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), source.read(name))
    return box.getvalue()


def checkout() -> Path | None:
    """The folder of sources that this program runs from; None where it is installed."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").is_file() and (root / "medtl_dist" / "__init__.py").is_file() else None


def build_wheel() -> bytes:
    """The wheel of the sources that this program runs from, built offline and without dependencies.

    Raises:
        UserError: the program does not run from its sources, or setuptools can't build them.
    """
    root = checkout()
    if root is None:
        raise UserError(
            "--code wheel: this program is installed, not run from its sources: name its wheel with --wheel, or use "
            "--code image where the cluster's image holds it."
        )
    with tempfile.TemporaryDirectory(prefix="medtl-wheel-") as scratch:
        source = Path(scratch) / "source"  # a copy: setuptools leaves a build folder beside the sources
        source.mkdir()
        for name in PACKAGES:
            shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            if (root / name).is_file():
                shutil.copy2(root / name, source / name)
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
        done = subprocess.run([*command, "-w", scratch, str(source)], capture_output=True, text=True, check=False)
        built = list(Path(scratch).glob("*.whl"))
        if done.returncode or len(built) != 1:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
            raise UserError(
                f"the wheel can't be built ({lines[-1][:200]}): install pip and setuptools ≥ 77, or name a wheel with --wheel, "
                "or use --code image."
            )
        return checked_wheel(built[0])
