from __future__ import annotations

import hashlib
import io
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from medtl_dist.errors import UserError
from medtl_dist.models import imagenet
from medtl_dist.models.imagenet import imagenet_file, imagenet_file_names, sha256_start
from medtl_dist.models.registry import BackboneSpec, spec
from medtl_dist.models.weights import find_weights

CONTENT = b"weights " * 5000
NAME = f"resnet18-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torchvision's cache in a folder of the test, and no proxy between the test and its own server."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "checkpoints"


class Server(ThreadingHTTPServer):
    requests: list[str]


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.requests.append(self.path)
        folder = self.path.split("/")[1]
        content = {"good": CONTENT, "cut": CONTENT[:1000], "page": b"<html>please log in</html>"}.get(folder)
        self.send_response(200 if content else 403)
        self.send_header("Content-Length", str(len(CONTENT) if folder == "cut" else len(content or b"")))
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Answer) as running:
        running.requests = []
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def served(server: Server, folder: str) -> BackboneSpec:
    return replace(spec("resnet18"), weights_urls=(f"http://127.0.0.1:{server.server_port}/{folder}/{NAME}",))


def test_fetched_once_then_taken_from_the_cache(server: Server, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = imagenet_file(served(server, "good"))
    assert first == cache / NAME
    assert first.read_bytes() == CONTENT
    again = find_weights("imagenet", served(server, "good"))
    assert again is not None
    assert again.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert again.label == f"ImageNet weights {NAME}"
    assert server.requests == [f"/good/{NAME}"]
    assert capfd.readouterr() == ("", "")  # no terminal, no progress bar
    assert [path.name for path in cache.iterdir()] == [NAME]


def test_a_cached_file_with_another_content_is_fetched_again(server: Server, cache: Path) -> None:
    cache.mkdir()
    (cache / NAME).write_bytes(CONTENT[:100])
    assert imagenet_file(served(server, "good")).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("folder", "reason"), [("refused", "HTTP Error 403"), ("page", "another sha256"), ("cut", "another sha256")]
)
def test_what_cannot_be_fetched_names_the_file_and_leaves_nothing(
    server: Server, cache: Path, folder: str, reason: str
) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        imagenet_file(served(server, folder))
    assert f"--set model.weights=/path/to/{NAME}" in caught.value.message
    assert "--set model.weights=random" in caught.value.message
    assert str(cache / NAME) in caught.value.message
    assert "\n" not in caught.value.message
    assert list(cache.iterdir()) == []


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet, "ANSWER_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/{NAME}"
        with pytest.raises(UserError, match=r"no answer within 0\.2 s"):
            imagenet_file(replace(spec("resnet18"), weights_urls=(url,)))


def test_no_network_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    url = f"http://127.0.0.1:{port}/resnet101-cd907fc2.pth"  # nobody listens any more
    with pytest.raises(
        UserError, match=r"weights of resnet101 .* fetch resnet101-cd907fc2\.pth where there is a network"
    ):
        imagenet_file(replace(spec("resnet101"), weights_urls=(url,)))


def test_a_cache_that_cannot_be_written_is_told(server: Server, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(UserError, match="File exists"):
        imagenet_file(served(server, "good"))


def test_a_terminal_gets_a_progress_bar(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    imagenet_file(served(server, "good"))
    assert NAME in terminal.getvalue()


def test_the_hash_is_read_from_torchvision_names() -> None:
    assert sha256_start("resnet101-cd907fc2.pth") == "cd907fc2"
    assert sha256_start("mine.pth") == ""
    assert all(sha256_start(name) for name in imagenet_file_names())


def hub_spec() -> BackboneSpec:
    return replace(spec("resnet18"), name="timm/some", hub="timm/some.in1k", weights_urls=())


def test_timm_weights_come_from_the_hubs_cache_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="timm is not installed")
    (tmp_path / "model.safetensors").write_bytes(CONTENT)
    asked: list[tuple[str, str]] = []

    def cached(repository: str, name: str, revision: str | None) -> str:
        asked.append((repository, name))
        return str(tmp_path / "model.safetensors")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    found = find_weights("imagenet", hub_spec())
    assert found is not None
    assert asked == [("timm/some.in1k", "model.safetensors")]
    assert found.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert found.label == "ImageNet weights timm/some.in1k"


def test_timm_weights_without_a_network_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="timm is not installed")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda *_, **__: f"http://127.0.0.1:{port}/x")
    with pytest.raises(
        UserError,
        match=r"weights of timm/some could not be fetched from https://huggingface\.co/timm/some\.in1k .*refused",
    ) as caught:
        imagenet_file(hub_spec())
    assert "--set model.weights=/path/to/model.safetensors" in caught.value.message


def test_a_model_without_published_weights_says_so() -> None:
    with pytest.raises(UserError, match=r"timm/some has no published weights that can be read here"):
        imagenet_file(replace(hub_spec(), hub=None, weights_urls=("https://example.invalid/w.npz",)))
