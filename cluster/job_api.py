"""client ─► Ray's job server, over HTTP: the few requests that submission needs, and where the token comes from.

Ray's own client is not used: it lets RAY_ADDRESS override the address it was given, waits without limit, and uploads a
wheel under its bare file name, so that a second build of one version would run the first one's code.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import ssl
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import urllib3

from medtl_dist.errors import Interrupted, UserError
from medtl_dist.storage import redact

_CONNECT_S, _READ_S = 10.0, 60.0
_ANSWER_BYTES = 64 * 2**20  # of one answer: a job's whole log is one
_TOKEN = re.compile(r"[!-~]{8,4096}")
_HOST = re.compile(r"[A-Za-z0-9.-]{1,253}|[0-9a-fA-F:]{2,45}")


@dataclass(frozen=True)
class Server:
    """A job server, and the token for it, which no ``repr`` shows.

    Raises:
        UserError: an address that is none, or http to another machine without a token.
    """

    address: str
    token: str | None = field(default=None, repr=False)
    ca_bundle: Path | None = None

    def __post_init__(self) -> None:
        parts = _split(self.address)
        if self.ca_bundle is not None and not self.ca_bundle.is_file():
            raise UserError(f"--ca-bundle {self.ca_bundle}: no such file; name a PEM file of trusted authorities.")
        if self.token is None and parts.scheme == "http" and not is_loopback(parts.hostname or ""):
            raise UserError(
                f"--address {self.address}: http to another machine without a token. A job server runs code for whoever "
                "reaches it: give the cluster's token with --token-file or RAY_AUTH_TOKEN_PATH, and use https or a tunnel."
            )

    @property
    def in_the_clear(self) -> bool:
        """Whether the token travels unencrypted over a network."""
        parts = _split(self.address)
        return parts.scheme == "http" and not is_loopback(parts.hostname or "")


def _split(address: str) -> Any:
    expected = "expected the address of Ray's dashboard, such as http://127.0.0.1:8265 or https://ray.example.org"
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        raise UserError(f"--address {redact(address)}: {expected}.") from None
    if parts.scheme not in ("http", "https") or not _HOST.fullmatch(parts.hostname or "") or port == 0:
        raise UserError(f"--address {redact(address)}: {expected}.")
    if "@" in parts.netloc or parts.query or parts.fragment or parts.path not in ("", "/"):
        raise UserError(
            f"--address {redact(address)}: {expected}; no path, login or token in it: tokens come from a file (--token-file)."
        )
    return parts


def is_loopback(host: str) -> bool:
    """Whether the host is this machine by name or number; other names are not looked up, since the answer may change."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def find_token(token_file: Path | None, environment: Mapping[str, str] | None = None) -> str | None:
    """The token of ``--token-file``, else as Ray looks for it: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token; else None.

    Raises:
        UserError: a named file that is missing, is readable by everyone, or holds no token.
    """
    known = os.environ if environment is None else environment
    if token_file is None and known.get("RAY_AUTH_TOKEN"):
        return _checked(known["RAY_AUTH_TOKEN"], "RAY_AUTH_TOKEN")
    named = token_file or (Path(known["RAY_AUTH_TOKEN_PATH"]) if known.get("RAY_AUTH_TOKEN_PATH") else None)
    place = named or Path(known.get("HOME") or Path.home()) / ".ray" / "auth_token"
    try:
        text = place.expanduser().read_text(encoding="utf-8")
        mode = place.expanduser().stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        if named is None:
            return None
        reason = getattr(error, "strerror", None) or "no text"
        raise UserError(f"{place}: the token file can't be read ({reason}).") from None
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        raise UserError(
            f"{place}: every user of this machine can read or change this token file; run `chmod 600` on it."
        )
    return _checked(text, str(place))


def _checked(text: str, source: str) -> str:
    token = text.strip()
    if not _TOKEN.fullmatch(token):  # a line break in it would become a header of its own
        raise UserError(f"{source} holds no token: expected 8 or more printable characters in one line.")
    return token


class JobServer:
    """Requests to one server. Redirects are not followed: they would carry the token to another host."""

    def __init__(self, server: Server) -> None:
        self.address = server.address.rstrip("/")
        self._headers = {} if server.token is None else {"Authorization": f"Bearer {server.token}"}
        context = ssl.create_default_context(cafile=str(server.ca_bundle) if server.ca_bundle else None)
        self._pool = urllib3.PoolManager(
            ssl_context=context, timeout=urllib3.Timeout(connect=_CONNECT_S, read=_READ_S), maxsize=2
        )

    def version(self) -> dict[str, Any]:
        """The server's ``ray_version`` and more."""
        return dict(self._json("GET", "/api/version"))

    def asks_for_token(self) -> bool:
        """Whether the server refuses who comes without a token."""
        try:
            answer = self._pool.request("GET", f"{self.address}/api/jobs/", redirect=False, retries=False)
        except urllib3.exceptions.HTTPError as error:
            raise _unreachable(self.address, error) from None
        return answer.status in (401, 403)

    def jobs(self) -> list[dict[str, Any]]:
        """Every job the cluster knows, submitted by us or not."""
        return [job for job in self._json("GET", "/api/jobs/") if isinstance(job, dict)]

    def job(self, submission_id: str) -> dict[str, Any] | None:
        """A job's record, None where there is none."""
        status, body = self.request("GET", f"/api/jobs/{submission_id}", allowed=(404,))
        return None if status == 404 else _parsed(body)

    def logs(self, submission_id: str) -> str:
        """Everything the job has printed."""
        return str(self._json("GET", f"/api/jobs/{submission_id}/logs").get("logs") or "")

    def submit(self, request: Mapping[str, Any]) -> bool:
        """Start a job; False where its submission_id is taken: the server lets one of two submitters win."""
        status, body = self.request("POST", "/api/jobs/", json.dumps(dict(request)).encode(), allowed=(400, 500))
        if status == 200:
            return True
        if b"already exists" in body or b"already been" in body:
            return False
        raise UserError(f"{self.address} refused the job: {_last_line(body)}")

    def stop(self, submission_id: str) -> bool:
        """Ask the job to end; False where it had ended."""
        return bool(self._json("POST", f"/api/jobs/{submission_id}/stop").get("stopped"))

    def upload(self, name: str, data: bytes) -> str:
        """Store a package under a name made from its bytes, unless it is there; returns its URI."""
        path = f"/api/packages/gcs/{name}"
        if self.request("GET", path, allowed=(404,))[0] == 404:
            self.request("PUT", path, data)
        return f"gcs://{name}"

    def request(
        self, method: str, path: str, body: bytes | None = None, *, allowed: tuple[int, ...] = ()
    ) -> tuple[int, bytes]:
        """One request: the answer's status and body.

        Raises:
            UserError: no or a wrong token, an untrusted certificate, a redirect, or a request that the server refuses.
            Interrupted: the server can't be reached or does not answer: asking again may help.
        """
        kind = {"Content-Type": "application/json"} if body and body[:1] == b"{" else {}
        try:
            answer = self._pool.request(
                method, self.address + path, body=body, headers=self._headers | kind, redirect=False, preload_content=False,
                retries=urllib3.Retry(3, redirect=False, status=False, backoff_factor=0.2, allowed_methods={"GET"}),
            )  # fmt: skip
            try:
                text = answer.read(_ANSWER_BYTES + 1)
            finally:
                answer.drain_conn() if answer.status >= 400 else None
                answer.release_conn()
        except urllib3.exceptions.HTTPError as error:
            raise _unreachable(self.address, error) from None
        if len(text) > _ANSWER_BYTES:
            raise UserError(f"{self.address}{path}: an answer of more than {_ANSWER_BYTES // 2**20} MiB; ask for less.")
        if answer.status in (401, 403):
            what = "asks for a token and got none" if answer.status == 401 else "refuses this token"
            raise UserError(
                f"{self.address} {what} (HTTP {answer.status}): name the file of the cluster's token with --token-file, or set "
                "RAY_AUTH_TOKEN_PATH."
            )
        if answer.status != 200 and answer.status not in allowed:
            if answer.status >= 500:
                raise Interrupted(f"{self.address}{path}: HTTP {answer.status}: {_last_line(text)}")
            raise UserError(f"{self.address}{path}: HTTP {answer.status}: {_last_line(text)}")
        return answer.status, text

    def _json(self, method: str, path: str) -> Any:
        return _parsed(self.request(method, path)[1])


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        raise UserError("the answer is not JSON: is the address that of Ray's dashboard?") from None


def _unreachable(address: str, error: Exception) -> Interrupted | UserError:
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, ssl.SSLError | urllib3.exceptions.SSLError):
        return UserError(f"{address}: its certificate is not trusted; name its authority with --ca-bundle.")
    return Interrupted(
        f"{address} can't be reached ({type(reason).__name__}): is the cluster up, and the address right?"
    )


def _last_line(body: bytes) -> str:
    """The end of what a server says of its failure, which may be a traceback."""
    lines = [line.strip() for line in body.decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason given"
