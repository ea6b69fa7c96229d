"""Places: an address or a path ─► filesystem and path, for whatever is read from or written to a store.

``file``, ``s3`` and ``gs`` are Arrow's filesystems, ``http`` and ``https`` can be read only (``data/ranges.py``). What
is not on the list is refused: a scheme such as ``pipe:`` would run a command. Nothing here is made before it is used, and
nothing crosses processes but the options, so a filesystem belongs to the process that made it.
"""

from __future__ import annotations

import datetime
import functools
import os
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from pyarrow import fs as pafs

from medtl_dist.errors import DataError, MedtlError, UserError

SCHEMES = ("file", "s3", "gs", "http", "https")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?")
_CONNECT_S = 10
EMULATOR = "CLOUD_STORAGE_EMULATOR_ENDPOINT"  # of Google's storage, as its own clients call it; asks for no credentials

T = TypeVar("T")


@dataclass(frozen=True)
class StorageOptions:
    """How stores are reached; credentials are none of it: those come from the environment or the instance. Picklable.

    Attributes:
        endpoint_url: S3 endpoint; None: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, else Amazon's.
        ca_bundle: PEM file of trusted authorities; None: AWS_CA_BUNDLE, SSL_CERT_FILE, else the system's.
        kms_key: key of AWS KMS that encrypts what is written to s3://; None: MEDTL_S3_KMS_KEY, else as the bucket says.
        anonymous: no credentials, for public buckets.
        timeout_s: a request silent for so long has failed; nothing may take more than twice that.
        retries: further tries of a failed read without a byte gained.
        cache_dir: folder of the local cache; None: no cache.
        cache_mib: its size limit.
    """

    endpoint_url: str | None = None
    ca_bundle: str | None = None
    kms_key: str | None = None
    anonymous: bool = False
    timeout_s: float = 20.0
    retries: int = 5
    cache_dir: str | None = None
    cache_mib: int = 16384

    @property
    def endpoint(self) -> str | None:
        """The S3 endpoint in force. Raises: UserError, one that is no plain http(s) address."""
        url = self.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if not url:
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"S3 endpoint {redact(url)}: expected an address like https://minio.example:9000 "
                "(data.endpoint_url or AWS_ENDPOINT_URL)"
            )
        _refuse_secrets(url)
        return url.rstrip("/")

    @property
    def encryption_key(self) -> str | None:
        """The KMS key in force. Raises: UserError, what no header can hold."""
        key = self.kms_key or os.environ.get("MEDTL_S3_KMS_KEY") or None
        if key is not None and not _KMS_KEY.fullmatch(key):
            raise UserError(
                f"KMS key {key!r}: expected a key's id, its ARN or alias/NAME (data.kms_key or MEDTL_S3_KMS_KEY)"
            )
        return key

    @property
    def authorities(self) -> str | None:
        """The CA bundle in force. Raises: UserError, no such file."""
        path = self.ca_bundle or os.environ.get("AWS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")
        if path and not os.path.isfile(path):
            raise UserError(f"CA bundle {path}: no such file; name a PEM file (data.ca_bundle or AWS_CA_BUNDLE)")
        return path or None


@dataclass(frozen=True)
class Place:
    """``url``: an absolute path for ``file``, else the address without a slash at its end, safe to show."""

    scheme: str
    url: str

    @property
    def remote(self) -> bool:
        return self.scheme != "file"

    @property
    def path(self) -> str:
        """As Arrow's filesystems want it: ``bucket/key``, or the absolute path."""
        return self.url.split("://", 1)[1] if self.remote else self.url

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]


def parse_place(text: str | Path) -> Place:
    """The place that a path or an address names.

    Raises: UserError, a scheme that is not on the list, no bucket or host, or credentials in the address (which would end
    in configs and logs).
    """
    found = None if isinstance(text, Path) else _SCHEME.match(text)
    if found is None:
        return Place("file", str(Path(text).expanduser().absolute()))
    assert isinstance(text, str)
    scheme = found.group(1).lower()
    if scheme not in SCHEMES or not found.group(2):
        allowed = ", ".join(f"{name}://" for name in SCHEMES)
        raise UserError(
            f"{scheme}: is no kind of place that can be read; expected a path or one of {allowed} (a local name "
            "with a colon in it: write ./ before it)"
        )
    parts = urlsplit(text)
    if scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise UserError(f"{redact(text)}: a local file address is file:///absolute/path")
        return Place("file", str(Path(unquote(parts.path)).absolute()))
    _refuse_secrets(text)
    path = parts.path.strip("/")
    if not parts.netloc or any(part in ("", ".", "..") for part in path.split("/") if path):
        raise UserError(f"{redact(text)}: expected an address like {scheme}://bucket-or-host/folder")
    return Place(scheme, f"{scheme}://{parts.netloc}/{path}".rstrip("/"))


def is_remote(text: str | Path) -> bool:
    """Whether it names a store rather than a folder of this machine. Raises: UserError, see ``parse_place``."""
    return parse_place(text).remote


def redact(url: str) -> str:
    """The address without what could be a secret: user and password, query (signatures), fragment."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(an address that makes no sense)"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _refuse_secrets(url: str) -> None:
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            f"{redact(url)}: an address must hold no user, password, query or signature, since addresses are written to "
            "configs and logs; give credentials by the environment (AWS_ACCESS_KEY_ID …), a profile or the instance"
        )


def filesystem(place: Place, options: StorageOptions, *, attempts: int | None = None) -> pafs.FileSystem:
    """Arrow's filesystem of a place, one per process. ``attempts``: of each request; None: as ``options`` say.

    Raises: UserError, http (which can't be written or listed), or a bad endpoint or CA bundle.
    """
    if place.scheme == "file":
        return pafs.LocalFileSystem()
    if place.scheme in ("http", "https"):
        raise UserError(f"{place.url}: a web server can only be read from; expected a folder, s3:// or gs://")
    bucket = place.path.split("/", 1)[0]
    return _filesystem(environment(), place.scheme, bucket, options, attempts or options.retries + 1)


_KMS_KEY = re.compile(r"[A-Za-z0-9:/_-]{1,2048}")
_ENVIRONMENT = (
    "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_CA_BUNDLE", "SSL_CERT_FILE", "AWS_REGION", "AWS_DEFAULT_REGION",
    "AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS",
    "MEDTL_S3_KMS_KEY", EMULATOR,
)  # fmt: skip


def environment() -> tuple[object, ...]:
    """This process, and what of its environment decides how a store is reached: connections are kept for as long as it is
    equal. A forked child must not use its parent's."""
    return (os.getpid(), *map(os.environ.get, _ENVIRONMENT))


@functools.lru_cache(maxsize=16)
def _filesystem(
    made_for: tuple[object, ...], scheme: str, bucket: str, options: StorageOptions, attempts: int
) -> pafs.FileSystem:
    del made_for
    if scheme == "gs":
        patience = datetime.timedelta(seconds=max(1, round(options.timeout_s * (1 if attempts == 1 else 3))))
        anonymous = options.anonymous or bool(os.environ.get(EMULATOR))
        return pafs.GcsFileSystem(anonymous=anonymous, retry_time_limit=patience)
    endpoint = options.endpoint
    found = pafs.S3FileSystem(
        anonymous=options.anonymous,
        endpoint_override=endpoint,
        region=region_of(bucket, endpoint),
        tls_ca_file_path=options.authorities,
        connect_timeout=min(_CONNECT_S, options.timeout_s),
        request_timeout=options.timeout_s,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=attempts),
        background_writes=False,  # a failed part is told by the write that made it
        allow_delayed_open=True,  # a small file is one request, and a writer that is killed leaves no part of it
    )
    if options.encryption_key is None:
        return found
    from medtl_dist.encrypted_s3 import EncryptedS3

    return pafs.PyFileSystem(EncryptedS3(found, options, attempts))


def region_of(bucket: str, endpoint: str | None) -> str | None:
    """The environment's, else the bucket's own at Amazon; other servers mostly don't care which is signed for."""
    given = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if given or os.environ.get("AWS_PROFILE"):
        return given
    if endpoint:
        return "us-east-1"
    try:
        return pafs.resolve_s3_region(bucket)
    except OSError:
        return None


class Transient(Exception):
    """A failure that may pass: time-outs, broken connections, 5xx. ``wait_s``: what the server asked for."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


_AWS = re.compile(r"AWS Error ([A-Z0-9_]+)(?: \(HTTP status (\d+)\))?")
_CURL = re.compile(r"curlCode: (\d+), ([^;:]+)")
_GOOGLE = re.compile(r"google::cloud::Status\(([A-Z_]+)|code(?::|=) ?([A-Z_]+)")
_REFUSED = ("ACCESS_DENIED", "FORBIDDEN", "INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT_MATCH", "UNRECOGNIZED_CLIENT",
            "INVALID_CLIENT_TOKEN", "MISSING_AUTHENTICATION", "EXPIRED_TOKEN", "INVALID_SIGNATURE",
            "PERMISSION_DENIED", "UNAUTHENTICATED", "REQUEST_EXPIRED")  # fmt: skip
_MISSING = ("NO_SUCH_BUCKET", "NO_SUCH_KEY", "RESOURCE_NOT_FOUND", "NOT_FOUND")
_TLS_CODES = ("35", "51", "53", "58", "59", "60", "77", "83", "90", "91")


def classify(error: OSError, url: str) -> MedtlError | Transient:
    """What an Arrow filesystem's error means. Only codes are taken from its text, which might quote a secret."""
    text = str(error)
    aws, curl, google = _AWS.search(text), _CURL.search(text), _GOOGLE.search(text)
    code = aws.group(1) if aws else next((part for part in google.groups() if part), "") if google else ""
    status = aws.group(2) if aws else None
    if isinstance(error, FileNotFoundError) or code in _MISSING or status == "404":
        return missing(url)
    if isinstance(error, PermissionError) or code.startswith(_REFUSED) or status in ("401", "403"):
        return refused(url, code.lower().replace("_", " ") or "permission denied")
    if curl and curl.group(1) in _TLS_CODES:
        return untrusted(url)
    if status and status.startswith("4") and status not in ("408", "429"):
        return UserError(f"{url}: the store refuses this request (HTTP {status}): check the address and the endpoint")
    reason = curl.group(2).strip() if curl else f"HTTP {status}" if status else code.replace("_", " ")
    return Transient((reason if status else reason.lower()) or error.strerror or type(error).__name__)


def missing(url: str) -> DataError:
    return DataError(f"{url} is missing: check the address, or copy or pack the set again")


def refused(url: str, reason: str) -> UserError:
    sources = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, the instance's role"
    if url.startswith("gs://"):
        sources = "GOOGLE_APPLICATION_CREDENTIALS, gcloud's application-default login, the instance's service account"
    return UserError(
        f"{url}: access refused ({reason}); check the credentials ({sources}; public: data.anonymous=true), their rights on "
        "this address, and the clock"
    )


def untrusted(url: str) -> UserError:
    return UserError(
        f"{url}: the server's certificate is not trusted; name its authority with data.ca_bundle or AWS_CA_BUNDLE"
    )


_stuck: list[threading.Thread] = []


def bounded(act: Callable[[], T], timeout_s: float) -> T:
    """``act()`` in a thread of its own, given up after ``timeout_s``: the AWS SDK waits for ever on a trickle of bytes.

    Raises: Transient, the time is up; what ``act`` raises.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(act())
        except BaseException as error:  # raised in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="medtl-store")
    thread.start()
    thread.join(timeout_s)
    if results:
        return results[0]
    if errors:
        raise errors[0]
    given_up(thread)
    raise Transient(f"no answer within {timeout_s:.0f} s")


def given_up(thread: threading.Thread) -> None:
    """Nobody waits for this thread any more: where it still hangs, the process ends without the clean-up that it would break."""
    _stuck.append(thread)


def leave(code: int) -> NoReturn:
    """End this process, at once where a thread given up still hangs: Arrow's clean-up would wait for it, Ray's crash."""
    leave_if_stuck(code)
    sys.exit(code)


def leave_if_stuck(code: int = 0) -> None:
    """End this process at once where a call given up still hangs, else return: the last act of a worker process."""
    if any(thread.is_alive() for thread in _stuck):
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


@dataclass(frozen=True)
class Folder:
    """A folder as filesystem and path; names below it use ``/``. Run folders in stores: ``store_folder.StoreFolder``."""

    fs: pafs.FileSystem
    path: str
    remote = False

    @classmethod
    def local(cls, path: str | Path) -> Folder:
        return cls(pafs.LocalFileSystem(), str(Path(path).absolute()))

    @classmethod
    def at_url(cls, url: str | Path, options: StorageOptions | None = None) -> Folder:
        """The folder at a path or an ``s3://`` or ``gs://`` address. Raises: UserError, another kind of place."""
        place = parse_place(url)
        return cls(filesystem(place, options or StorageOptions()), place.path)

    @property
    def url(self) -> str:
        return self.path  # what names it for a person, and for another process

    def at(self, name: str) -> str:
        return f"{self.path}/{name}"

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises DataError where it is missing or can't be read."""
        try:
            with self.fs.open_input_stream(self.at(name), compression=None) as stream:
                return stream.read()
        except OSError as error:
            raise DataError(f"{self.at(name)}: can't be read ({_reason(error)}).") from None

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file so that a reader sees the old one or the new one, never a part. Raises OSError when full."""
        target = self.at(name)
        self._make_parent(target)
        # A rename inside one folder is atomic on a local disk; object stores commit a file when its stream closes.
        local = isinstance(self.fs, pafs.LocalFileSystem)
        place = f"{target}.{os.getpid()}.tmp" if local else target
        try:
            with self.fs.open_output_stream(place, compression=None) as stream:
                stream.write(data)
            if local:
                _sync(place)
                os.replace(place, target)
                _sync(os.path.dirname(target))  # the new name, too, survives a power cut
        except OSError:
            if local and os.path.exists(place):
                os.unlink(place)
            raise

    def _make_parent(self, target: str) -> None:
        if isinstance(self.fs, pafs.LocalFileSystem):  # a store has no folders, only names with slashes
            self.fs.create_dir(target.rpartition("/")[0], recursive=True)

    def link(self, name: str, other: str) -> None:
        """Give a whole file a second name, a copy where there are no links. Raises FileNotFoundError; OSError as ``write``."""
        target = self.at(other)
        self._make_parent(target)
        if not isinstance(self.fs, pafs.LocalFileSystem):
            self.fs.copy_file(self.at(name), target)
            return
        try:
            os.link(self.at(name), target)
        except FileNotFoundError:
            raise
        except OSError:  # a disk without links
            self.write(other, self.read(name))
        else:
            _sync(os.path.dirname(target))

    def part(self, name: str) -> Folder:
        """The folder ``name`` in this one: a part of what this one holds."""
        return Folder(self.fs, self.at(name))

    def exists(self, name: str) -> bool:
        return self.fs.get_file_info(self.at(name)).type != pafs.FileType.NotFound

    def names(self, name: str = "") -> list[str]:
        """Sorted base names of what lies in the folder ``name``; empty where it does not exist."""
        selector = pafs.FileSelector(self.at(name) if name else self.path, allow_not_found=True)
        return sorted(info.base_name for info in self.fs.get_file_info(selector))

    def delete(self, name: str) -> None:
        """Delete a file that may be gone already."""
        try:
            self.fs.delete_file(self.at(name))
        except FileNotFoundError:
            return

    def delete_tree(self, name: str) -> None:
        if self.exists(name):
            self.fs.delete_dir(self.at(name))

    @property
    def local_path(self) -> Path:
        """The folder as a path of this machine. Raises DataError for other filesystems."""
        if not isinstance(self.fs, pafs.LocalFileSystem):
            raise DataError(f"{self.path}: this step needs a local folder.")
        return Path(self.path)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: OSError) -> str:
    return error.strerror or ("no such file" if isinstance(error, FileNotFoundError) else type(error).__name__)
