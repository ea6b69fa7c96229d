"""shards on a web server ─► bytes: range requests by urllib3, for ``data/ranges.py``.

What came before a connection broke is kept. A server that sends something else (a page to log in, the whole file, another
range) is told apart from one that is damaged.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from urllib.parse import quote

import urllib3

from medtl_dist.errors import DataError, UserError
from medtl_dist.storage import StorageOptions, Transient, missing, refused, untrusted

_CHUNK = 64 * 2**10
_AGAIN = "copy the set again or pack it again"


@dataclass(frozen=True)
class Fetched:
    """What one request gave: bytes from the start of what was asked, fewer with the ``problem`` that ended it."""

    data: bytes | memoryview
    problem: Transient | None = None


def another_length(url: str, found: int, expected: int, kind: str | None) -> DataError:
    """Something else lies there."""
    if kind and "html" in kind.lower():
        return DataError(
            f"{url}: an HTML page came instead; a login page or a proxy in between? Open the address in a browser"
        )
    return DataError(f"{url} is damaged: {found} bytes, {expected} expected; {_AGAIN}")


def looks_like_html(data: bytes | memoryview) -> bool:
    """Whether the bytes begin like a web page: a login page or a proxy's error in place of data."""
    return bytes(data[:256]).lstrip().lower().startswith((b"<!doctype html", b"<html"))


class HttpSource:
    """Web servers that know ranges; read only, without credentials."""

    def __init__(self, folder: str, options: StorageOptions) -> None:
        self._folder = folder
        self._limit_s = 2 * options.timeout_s
        self._pool = urllib3.PoolManager(
            maxsize=16,
            ca_certs=options.authorities,
            timeout=urllib3.Timeout(connect=min(10.0, options.timeout_s), read=options.timeout_s),
            retries=urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=5),
            headers={"Accept-Encoding": "identity"},
        )

    def size(self, name: str) -> int | None:
        response = self._ask("HEAD", name, {})
        if response is None:
            return None
        length = response.headers.get("Content-Length")
        if length is None or not length.isdecimal():
            raise DataError(
                f"{self._url(name)}: the server does not say its length; copy the set to a folder or a store"
            )
        return int(length)

    def fetch(self, name: str, start: int, stop: int, size: int) -> Fetched:
        end = time.monotonic() + self._limit_s
        response = self._ask("GET", name, {"Range": f"bytes={start}-{stop - 1}"})
        if response is None:
            raise missing(self._url(name))
        try:
            self._check_range(response, name, start, stop, size)
            got = _read_body(response, stop - start, end)
            if got.problem is None and response.status == 206:
                response.drain_conn()  # at its end already: the connection goes back to the pool
            return got
        finally:
            response.close()  # what is left of a body is not worth reading

    def names(self) -> None:
        """A web server has no list of its files that could be relied on."""
        return

    def _url(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _ask(self, method: str, name: str, headers: dict[str, str]) -> urllib3.BaseHTTPResponse | None:
        """The answer, 200 or 206; None: no such file. Raises: as ``size``."""
        url = self._url(name)
        try:
            response = self._pool.request(
                method, quote(url, safe=":/"), headers={**self._pool.headers, **headers}, preload_content=False
            )
        except urllib3.exceptions.HTTPError as error:
            raise _classify_http(error, url) from None
        if response.status in (200, 206):
            return response
        status, wait = response.status, response.headers.get("Retry-After", "")
        response.close()
        if status in (404, 410):
            return None
        if status in (401, 403):
            raise refused(url, f"HTTP {status}")
        if status in (408, 425, 429) or status >= 500:
            raise Transient(f"HTTP {status}", float(wait) if wait.isdecimal() else 0.0)
        if status == 416:
            raise DataError(f"{url} is damaged: shorter than its index says; {_AGAIN}")
        raise DataError(f"{url}: the server answers HTTP {status}; check the address")

    def _check_range(self, response: urllib3.BaseHTTPResponse, name: str, start: int, stop: int, size: int) -> None:
        kind = response.headers.get("Content-Type")
        if response.status == 200:
            length = response.headers.get("Content-Length", "")
            if length.isdecimal() and int(length) != size:
                raise another_length(self._url(name), int(length), size, kind)
            if start or not length:
                raise UserError(
                    f"{self._url(name)}: the server does not know range requests; copy the set to a folder, or to a server "
                    "that does (nginx, Apache, an object store)"
                )
            return
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != start:
            raise Transient("an answer for another range")
        if found[3] != "*" and int(found[3]) != size:
            raise another_length(self._url(name), int(found[3]), size, kind)


def _read_body(response: urllib3.BaseHTTPResponse, length: int, end: float) -> Fetched:
    data = bytearray()
    while len(data) < length:
        try:
            chunk = response.read1(min(_CHUNK, length - len(data)), decode_content=False)
        except urllib3.exceptions.HTTPError as error:
            return Fetched(bytes(data), Transient(_why(error)))
        except OSError as error:
            return Fetched(bytes(data), Transient(error.strerror or type(error).__name__))
        if not chunk:
            return Fetched(bytes(data), Transient("the connection ended early"))
        data += chunk
        if time.monotonic() > end and len(data) < length:
            return Fetched(bytes(data), Transient("too slow"))
    return Fetched(bytes(data))


def _classify_http(error: urllib3.exceptions.HTTPError, url: str) -> Exception:
    cause = error.reason if isinstance(error, urllib3.exceptions.MaxRetryError) else error
    if isinstance(cause, urllib3.exceptions.SSLError) and "CERTIFICATE" in str(cause).upper():
        return untrusted(url)
    if isinstance(cause, urllib3.exceptions.LocationValueError):
        return UserError(f"{url}: not an address; expected https://host/folder")
    if isinstance(cause, urllib3.exceptions.ResponseError):
        return DataError(f"{url}: the server redirects without end; check the address")
    return Transient(_why(cause))


def _why(error: BaseException | None) -> str:
    """A failure in a few words, none of them from the address."""
    for kinds, words in (
        (urllib3.exceptions.NameResolutionError, "the host's name can't be resolved"),
        (urllib3.exceptions.NewConnectionError, "could not connect to server"),  # one of the next, too
        (urllib3.exceptions.TimeoutError, "no answer in time"),
        ((urllib3.exceptions.ProtocolError, urllib3.exceptions.IncompleteRead), "the connection broke"),
    ):
        if isinstance(error, kinds):
            return words
    return type(error).__name__
