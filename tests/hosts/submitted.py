"""`medtl submit train` on a host outside of the cluster: its run folder lies in the store, and is seen there from here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hosts import API_URL, S3_URL, Hosts
from nodes import Command
from s3_server import S3Server

from medtl_dist.errors import MedtlError
from medtl_dist.storage import Folder, StorageOptions
from medtl_dist.store_folder import StoreFolder, store_folder

_STORE = "s3://sets/medtl"


@dataclass(frozen=True)
class Outside:
    """Where runs are submitted from. ``server``: the S3 server as it is reached from here."""

    network: Hosts
    server: S3Server

    def command(self, *arguments: str | Path) -> list[str]:
        return self.network.outside(sys.executable, "-m", "medtl_dist.cli.main", *map(str, arguments))

    @property
    def address(self) -> list[str]:
        return ["--address", API_URL, "--token-file", str(self.network.token_file)]

    def folder(self, name: str) -> StoreFolder:
        """Of the store, with requests that are not tried again."""
        return store_folder(f"{_STORE}/{name}", StorageOptions(endpoint_url=self.server.url)).once()

    def put_set(self, local: Path) -> None:
        """Copies a set to where ``data.shards=set`` finds it."""
        there = Folder.at_url(f"{_STORE}/set", StorageOptions(endpoint_url=self.server.url))
        for path in local.iterdir():
            there.write(path.name, path.read_bytes())

    def arguments(self, name: str, out: Path, options: Sequence[str], *more: str, kind: str = "train") -> list[str]:
        """`medtl submit train` or another `kind`: nothing that it names is a path on a disk but what is read and written here."""
        given = ("data.shards=set", f"data.endpoint_url={S3_URL}", *options)
        settings = [part for option in given for part in ("--set", option)]
        place = ["--name", name, "--store", _STORE, "--out", str(out)]
        return ["submit", kind, "--preset", "smoke", *settings, *place, *self.address, *more]

    def train(self, name: str, out: Path, options: Sequence[str], *more: str) -> SubmittedRun:
        command = self.command(*self.arguments(name, out, options, *more))
        return SubmittedRun(command, self.network.environment_outside(), out, self.folder(f"runs/{name}"))

    def tune(self, name: str, out: Path, options: Sequence[str], *more: str) -> SubmittedRun:
        """`medtl submit tune`; what is watched is the run of its first trial."""
        command = self.command(*self.arguments(name, out, options, *more, kind="tune"))
        trial = self.folder(f"runs/{name}/trials/00000")
        return SubmittedRun(command, self.network.environment_outside(), out, trial)


class SubmittedRun(Command):
    """The client's process, and the run that it waits for."""

    look_every_s = 0.3  # each look is a few requests, and the machine has little to spare

    def __init__(self, command: list[str], environment: dict[str, str], out: Path, folder: StoreFolder) -> None:
        super().__init__(command, environment, out)
        self.folder = folder

    def reached(self, step: int) -> bool:
        return any(
            int(name.partition("-")[0]) >= step and self.folder.exists(f"checkpoints/{name}/manifest.json")
            for name in self._names("checkpoints")
        )

    def _names(self, name: str) -> list[str]:
        try:
            return self.folder.names(name)
        except MedtlError:
            return []

    def log(self) -> bytes:
        try:
            return self.folder.read("log.jsonl")
        except MedtlError:
            return b""
