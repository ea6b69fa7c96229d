"""A small stand-in for Ray's job server on the loopback: the routes that ``cluster.job_api`` asks, a token, and a memory."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "canary-token-5f1c9e7a2b"


class FakeJobs:
    """What the server knows, for tests to read and to change."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, str] = {}
        self.default_log = ""
        self.packages: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, bytes]] = []
        self.token: str | None = TOKEN
        self.ray_version = "2.60.0"
        self.redirect_to: str | None = None
        self.endings: list[tuple[str, int | None]] = []  # status and exit code that jobs take at the next question
        self.lock = threading.Lock()
        self.address = ""

    def end(self, submission_id: str, status: str, exit_code: int | None) -> None:
        self.jobs[submission_id] |= {"status": status, "driver_exit_code": exit_code, "end_time": 2000}


class _Handler(BaseHTTPRequestHandler):
    state: FakeJobs

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def _answer(self, status: int, body: object = None) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if status == 302:
            self.send_header("Location", str(self.state.redirect_to))
        self.end_headers()
        self.wfile.write(data)

    def _serve(self) -> None:
        state, given = self.state, self.headers.get("Authorization")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with state.lock:
            state.requests.append((self.command, self.path, body))
            if state.redirect_to is not None:
                answer: tuple[int, object] = (302, "")
            elif state.token is not None and given != f"Bearer {state.token}":
                answer = (401, "Unauthorized") if given is None else (403, "Forbidden")
            else:
                answer = self._route(self.path.strip("/").split("/"), body)
        self._answer(*answer)

    do_GET = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def _route(self, parts: list[str], body: bytes) -> tuple[int, object]:
        if parts == ["api", "version"]:
            return 200, {"ray_version": self.state.ray_version}
        if parts[:3] == ["api", "packages", "gcs"]:
            if self.command == "PUT":
                self.state.packages[parts[3]] = body
            return (200 if parts[3] in self.state.packages else 404), ""
        if parts == ["api", "jobs"]:
            return self._submit(json.loads(body)) if self.command == "POST" else (200, list(self.state.jobs.values()))
        return self._job(parts[2], parts[3:])

    def _submit(self, request: dict[str, Any]) -> tuple[int, object]:
        name = request["submission_id"]
        if name in self.state.jobs:
            return 400, f"Traceback …\nValueError: Job with submission_id {name} already exists. Use a different one."
        self.state.jobs[name] = request | {"status": "RUNNING", "start_time": 1000, "driver_exit_code": None}
        return 200, {"submission_id": name}

    def _job(self, name: str, rest: list[str]) -> tuple[int, object]:
        state, job = self.state, self.state.jobs.get(name)
        if job is None:
            return 404, f"Job {name} does not exist"
        if rest == ["logs"]:
            return 200, {"logs": state.logs.get(name, state.default_log)}
        if rest == ["stop"]:
            stopped = job["status"] == "RUNNING"
            if stopped:
                state.end(name, "STOPPED", None)
            return 200, {"stopped": stopped}
        if state.endings and job["status"] == "RUNNING":
            state.end(name, *state.endings.pop(0))
        return 200, job


@contextlib.contextmanager
def fake_job_server() -> Iterator[FakeJobs]:
    """A running server; ``address`` is where."""
    state = FakeJobs()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
