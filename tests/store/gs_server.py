"""The emulator of Google's storage, running: for tests that read and write there."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import urllib3
from s3_server import free_ports


@contextlib.contextmanager
def running_emulator(folder: Path, *words: str) -> Iterator[str]:
    """Its address, with an empty bucket ``sets``; ends with the block. ``words``: of ``gs_emulator.py``."""
    if importlib.util.find_spec("gcp_storage_emulator") is None:
        pytest.skip("no emulator of Google's storage: pip install gcp-storage-emulator")
    [port] = free_ports(1)
    command = [sys.executable, str(Path(__file__).with_name("gs_emulator.py")), str(port), *words]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 30
        while True:
            with contextlib.suppress(urllib3.exceptions.HTTPError):
                urllib3.request("GET", url, retries=False)
                break
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait()
