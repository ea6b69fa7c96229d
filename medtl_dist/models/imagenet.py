"""network → files: the ImageNet weights of a backbone, from torchvision's cache or, once, from its address."""

from __future__ import annotations

import hashlib
import http.client
import os
import queue
import re
import shutil
import sys
import threading
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import wrap_file

from medtl_dist.errors import UserError
from medtl_dist.models import registry
from medtl_dist.models.registry import BackboneSpec

ANSWER_TIMEOUT_S = 8.0  # until the server answers, name look-up included
HUB_FILE = "model.safetensors"
READ_TIMEOUT_S = 20.0  # without a byte arriving


def imagenet_file(spec: BackboneSpec) -> Path:
    """The local file of the ImageNet weights that torchvision recommends for ``spec``, fetched unless it is cached.

    The cache is torchvision's own (``TORCH_HOME``, by default ``~/.cache/torch``); a file counts when its sha256 is
    the one in its name.

    For ``timm/NAME`` it is the file that timm publishes on the Hugging Face hub, in that hub's own cache, or else the
    one at the model's address.

    Raises:
        UserError: neither cached nor to be had; the message names the file and how to pass it.
    """
    if spec.hub is not None:
        return _hub_file(spec, spec.hub)
    if not spec.weights_urls or not spec.weights_urls[0].endswith((".pth", ".safetensors")):
        raise UserError(
            f"model.weights: {spec.name} has no published weights that can be read here; give a .pth or .safetensors "
            "file, or train from scratch with --set model.weights=random"
        )
    url = spec.weights_urls[0]
    name = _file_name(url)
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    try:
        if not path.is_file() or not sha256_of(path).startswith(sha256_start(name)):
            _download(url, path)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(
            f"model.weights: the ImageNet weights of {spec.name} are not at {path} and could not be fetched from {url} "
            f"({_reason(error)}); fetch {name} where there is a network and give --set model.weights=/path/to/{name}, "
            "or train from scratch with --set model.weights=random"
        ) from None
    return path


def _hub_file(spec: BackboneSpec, hub: str) -> Path:
    import huggingface_hub  # timm's own dependency

    repository, _, revision = hub.partition("@")
    try:
        # The cache first: it needs no answer from anywhere.
        cached = huggingface_hub.try_to_load_from_cache(repository, HUB_FILE, revision=revision or None)
        if isinstance(cached, str):
            return Path(cached)
        address = huggingface_hub.hf_hub_url(repository, HUB_FILE, revision=revision or None)
        _open_url(address).close()  # is there a network? without one the hub's client tries for 25 s
        return Path(huggingface_hub.hf_hub_download(repository, HUB_FILE, revision=revision or None))
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(
            f"model.weights: the weights of {spec.name} could not be fetched from https://huggingface.co/{repository} "
            f"({_reason(error)}); fetch its {HUB_FILE} where there is a network and give "
            f"--set model.weights=/path/to/{HUB_FILE}, or train from scratch with --set model.weights=random"
        ) from None


def imagenet_file_names() -> set[str]:
    """Names of all files that torchvision offers for the registered backbones."""
    return {_file_name(url) for name in registry.names() for url in registry.spec(name).weights_urls}


def sha256_of(path: Path) -> str:
    """sha256 (hex) of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_start(name: str) -> str:
    """The hex digits that torchvision puts into its file names: "cd907fc2" of ``resnet101-cd907fc2.pth``."""
    found = re.search(r"-([0-9a-f]{8,64})\.\w+$", name)
    return found.group(1) if found else ""


def _file_name(url: str) -> str:
    return url.rpartition("/")[2]


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        error.close()  # it holds the connection
        return str(error)
    return str(getattr(error, "reason", "") or error) or type(error).__name__


def _download(url: str, target: Path) -> None:
    """Fetch ``url`` to ``target``: whole and with the sha256 that its name promises, or not at all.

    Raises:
        OSError, http.client.HTTPException, ValueError: with the reason.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.part")  # two processes may fetch the same file
    console = Console(stderr=True)
    try:
        with _open_url(url) as response, part.open("xb") as destination:
            total = int(response.headers.get("Content-Length") or 0)
            with wrap_file(
                response, total, description=target.name, console=console, disable=not sys.stderr.isatty()
            ) as source:
                shutil.copyfileobj(source, destination)
        if not sha256_of(part).startswith(sha256_start(target.name)):
            raise ConnectionError("what arrived has another sha256 than the file name says: cut off, or a proxy's page")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _open_url(url: str) -> Any:
    """``urlopen`` (proxies from the environment) that answers within ANSWER_TIMEOUT_S altogether.

    Its own time-out holds per address, and not for the name look-up: behind a firewall that drops packets it can
    take minutes. So it runs in a thread that is left behind when it is late.
    """
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def open_url() -> None:
        try:
            answers.put(urllib.request.urlopen(url, timeout=READ_TIMEOUT_S))
        except Exception as error:  # handed to the caller below
            answers.put(error)

    threading.Thread(target=open_url, daemon=True, name="open weights address").start()
    try:
        answer = answers.get(timeout=ANSWER_TIMEOUT_S)
    except queue.Empty:
        raise TimeoutError(f"no answer within {ANSWER_TIMEOUT_S:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer
