"""a name and bytes ─► a file that did not exist, or the news that it does: the one write that two processes can't both win.

Arrow has none. On a disk it is ``O_EXCL``; on S3 a PUT with ``If-None-Match: *``, by botocore (extra ``s3``), which finds the
same credentials as Arrow does. Amazon, MinIO, Ceph, R2 and SeaweedFS honour it; ``store_is_safe`` asks the store at hand. In
Google's storage it is an upload with ``ifGenerationMatch=0``, with the credentials that google-auth (which Ray brings) finds.
"""

from __future__ import annotations

import functools
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from medtl_dist.encrypted_s3 import client_of, encryption_of
from medtl_dist.errors import Interrupted, UserError
from medtl_dist.storage import EMULATOR, Folder, environment, refused
from medtl_dist.store_folder import StoreFolder

_TRIES = 6
_GOOGLE_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_REFUSED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken")


def create(folder: Folder, name: str, data: bytes) -> bool:
    """Make the file ``name`` with ``data``; False where it exists already. Of many at once one gets True.

    Raises: UserError, no way to do so here, or refused; Interrupted, the store can't be reached.
    """
    if isinstance(folder, StoreFolder):
        return _create_in_store(folder, name, data)
    path = Path(folder.at(name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror}).") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return True


def store_is_safe(folder: StoreFolder) -> bool:
    """Whether the store refuses to make the same file twice: one that ignores the condition says yes to both."""
    probe = f"probe-{secrets.token_hex(8)}"
    safe = create(folder, probe, b"first") and not create(folder, probe, b"second")
    folder.delete(probe)
    return safe


def _create_in_store(folder: StoreFolder, name: str, data: bytes) -> bool:
    if folder.place.scheme == "gs":
        return _create_in_google(folder, name, data)
    client, exceptions = client_of(environment(), folder.place.path.split("/", 1)[0], folder.options)
    bucket, _, key = folder.at(name).partition("/")
    last = ""
    for number in range(_TRIES):
        if number:
            time.sleep(min(8.0, 0.5 * 2.0**number))
        try:
            client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*", **encryption_of(folder.options))
            return True
        except exceptions.ClientError as error:
            code, status = error.response["Error"].get("Code", ""), error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status == 412:
                # Of a try whose answer was lost: it may have been ours.
                return number > 0 and folder.read(name) == data
            if status in (401, 403) or code in _REFUSED:
                raise refused(folder.shown(name), code) from None
            if status == 404:
                raise UserError(f"{folder.url}: no such bucket; make it first, or check the address") from None
            if status == 501:
                raise UserError(
                    f"{folder.url}: this store has no conditional writes (If-None-Match), so two runs could write there at "
                    "once; use another store for run folders."
                ) from None
            last = f"HTTP {status}"
        except exceptions.NoCredentialsError:
            raise refused(folder.shown(name), "no credentials found") from None
        except exceptions.BotoCoreError as error:
            last = type(error).__name__
    raise _unreachable(folder.shown(name), last)


def _unreachable(shown: str, last: str) -> Interrupted:
    return Interrupted(
        f"{shown} can't be written to ({last}; {_TRIES} tries); when the store can be reached again, the same command goes on."
    )


def _create_in_google(folder: StoreFolder, name: str, data: bytes) -> bool:
    import urllib3

    pool, credentials, failures = _google(environment(), folder.options.timeout_s)
    bucket, _, key = folder.at(name).partition("/")
    base = os.environ.get(EMULATOR) or "https://storage.googleapis.com"
    query = urlencode({"uploadType": "media", "name": key, "ifGenerationMatch": "0"})
    url = f"{base.rstrip('/')}/upload/storage/v1/b/{quote(bucket, safe='')}/o?{query}"
    last = ""
    for number in range(_TRIES):
        if number:
            time.sleep(min(8.0, 0.5 * 2.0**number))
        headers = {"Content-Type": "application/octet-stream"}
        try:
            if credentials is not None:
                credentials.before_request(failures.request, "POST", url, headers)
            answer = pool.request("POST", url, body=data, headers=headers, retries=False, redirect=False)
        except urllib3.exceptions.HTTPError as error:
            last = type(error).__name__
            continue
        except failures.transport as error:
            last = type(error).__name__
            continue
        except failures.refresh as error:
            raise refused(folder.shown(name), type(error).__name__) from None
        if answer.status == 200:
            return True
        if answer.status == 412:  # of a try whose answer was lost: it may have been ours
            return number > 0 and folder.read(name) == data
        if answer.status in (401, 403):
            raise refused(folder.shown(name), f"HTTP {answer.status}")
        if answer.status == 404:
            raise UserError(f"{folder.url}: no such bucket; make it first, or check the address")
        last = f"HTTP {answer.status}"
    raise _unreachable(folder.shown(name), last)


@dataclass(frozen=True)
class _Failures:
    """What google-auth raises, and asks for tokens with: ``transport`` may pass, ``refresh`` does not."""

    transport: type[Exception]
    refresh: type[Exception]
    request: Any


@functools.lru_cache(maxsize=8)
def _google(made_for: tuple[object, ...], timeout_s: float) -> tuple[Any, Any, _Failures]:
    """A pool of connections, the credentials (None: an emulator, which asks for none), and google-auth's failures.

    Raises: UserError, google-auth is not installed, or finds no credentials."""
    del made_for
    import urllib3

    pool = urllib3.PoolManager(timeout=urllib3.Timeout(connect=min(10.0, timeout_s), read=timeout_s))
    if os.environ.get(EMULATOR):
        return pool, None, _Failures(urllib3.exceptions.HTTPError, urllib3.exceptions.HTTPError, None)
    try:
        import google.auth
        import google.auth.exceptions
        import google.auth.transport.urllib3
    except ImportError:
        raise UserError("run folders on gs:// need google-auth: pip install 'medtl_dist[gs]'.") from None
    request = google.auth.transport.urllib3.Request(pool)
    try:
        credentials, _ = google.auth.default(scopes=[_GOOGLE_SCOPE], request=request)
    except google.auth.exceptions.GoogleAuthError:
        raise refused("gs://", "no credentials found") from None
    return (
        pool,
        credentials,
        _Failures(google.auth.exceptions.TransportError, google.auth.exceptions.GoogleAuthError, request),
    )


def unfinished_uploads(folder: StoreFolder) -> list[tuple[str, str]]:
    """``(name, upload id)`` of the uploads below a folder that were begun and never completed; S3 keeps, and bills, their parts.

    Google's storage lists none, bills none, and forgets them after a week.

    Raises: UserError, refused; Interrupted, the store can't be reached.
    """
    if folder.place.scheme != "s3":
        return []
    bucket, _, prefix = folder.path.partition("/")
    found = _asked(folder, "list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/").get("Uploads", [])
    return [(str(row["Key"]).removeprefix(f"{prefix}/"), str(row["UploadId"])) for row in found]


def abort_upload(folder: StoreFolder, name: str, upload: str) -> None:
    """Forget an unfinished upload and its parts. Raises as ``unfinished_uploads``."""
    bucket, _, key = folder.at(name).partition("/")
    _asked(folder, "abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)


def _asked(folder: StoreFolder, call: str, **arguments: str) -> Any:
    client, exceptions = client_of(environment(), folder.place.path.split("/", 1)[0], folder.options)
    try:
        return getattr(client, call)(**arguments)
    except exceptions.ClientError as error:
        code = error.response["Error"].get("Code", "")
        if code in ("NoSuchUpload", "NotImplemented"):
            return {}
        if error.response["ResponseMetadata"]["HTTPStatusCode"] in (401, 403):
            raise refused(folder.url, code) from None
        raise Interrupted(f"{folder.url}: the store's uploads can't be listed ({code}); try again.") from None
    except exceptions.BotoCoreError as error:
        raise Interrupted(
            f"{folder.url}: the store's uploads can't be listed ({type(error).__name__}); try again."
        ) from None
