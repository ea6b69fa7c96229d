"""S3 as Arrow sees it, whose writes name a key of AWS KMS: Arrow sends no such header, so here botocore (extra ``s3``) puts.

Reads, listings and their time-outs stay Arrow's. What is written waits in memory for its one PUT (5 GB at most). Nothing makes
the empty objects by which Arrow marks folders: a bucket that refuses writes without the header would refuse those.
"""

from __future__ import annotations

import errno
import functools
import io
import re
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from medtl_dist.errors import UserError
from medtl_dist.storage import StorageOptions, environment, region_of

_CAPITAL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def encryption_of(options: StorageOptions) -> dict[str, str]:
    """What a PUT or a copy is given beside its name, for botocore; nothing where the bucket decides."""
    key = options.encryption_key
    return {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": key} if key else {}


@functools.lru_cache(maxsize=8)
def client_of(made_for: tuple[object, ...], bucket: str, options: StorageOptions) -> tuple[Any, Any]:
    """botocore's client and its exceptions. ``made_for``: ``environment()``. Raises: UserError, it is not installed."""
    del made_for
    try:
        import botocore.config
        import botocore.exceptions
        import botocore.session
    except ImportError:
        raise UserError("writing to s3:// needs botocore here: pip install 'medtl_dist[s3]'.") from None
    endpoint = options.endpoint
    client = botocore.session.Session().create_client(
        "s3",
        region_name=region_of(bucket, endpoint) or "us-east-1",
        endpoint_url=endpoint,
        verify=options.authorities,
        config=botocore.config.Config(
            connect_timeout=min(10.0, options.timeout_s),
            read_timeout=options.timeout_s,
            retries={"total_max_attempts": 1},
            s3={"addressing_style": "path" if endpoint else "auto"},
            request_checksum_calculation="when_required",  # other servers than Amazon's refuse its newest checksums
            response_checksum_validation="when_required",
        ),
    )
    return client, botocore.exceptions


class EncryptedS3(pafs.FileSystemHandler):
    """``inner`` for all that reads; for ``pyarrow.fs.PyFileSystem``. Every method raises OSError, as Arrow's do.

    ``attempts``: of each request, those after a failure that may pass.
    """

    def __init__(self, inner: pafs.FileSystem, options: StorageOptions, attempts: int) -> None:
        self.inner, self.options, self.attempts = inner, options, attempts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EncryptedS3) and (self.inner, self.options) == (other.inner, other.options)

    def __hash__(self) -> int:
        return hash(self.options)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def get_type_name(self) -> str:
        return "s3"

    def normalize_path(self, path: str) -> str:
        return self.inner.normalize_path(path)

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        return self.inner.get_file_info(paths)

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        return self.inner.get_file_info(selector)

    def open_input_stream(self, path: str) -> Any:
        return self.inner.open_input_stream(path, compression=None)

    def open_input_file(self, path: str) -> Any:
        return self.inner.open_input_file(path)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        del metadata
        return pa.PythonFile(_Body(functools.partial(self._put, path)), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        return self.inner.open_append_stream(path, metadata=metadata)

    def copy_file(self, src: str, dest: str) -> None:
        source = dict(zip(("Bucket", "Key"), _split(src), strict=True))
        self._asked(dest, "copy_object", CopySource=source, **encryption_of(self.options))

    def move(self, src: str, dest: str) -> None:
        self.copy_file(src, dest)
        self.delete_file(src)

    def create_dir(self, path: str, recursive: bool) -> None:
        """Nothing: a folder is there as soon as something lies in it."""

    def delete_file(self, path: str) -> None:
        self._asked(path, "delete_object")

    def delete_dir(self, path: str) -> None:
        self.delete_dir_contents(path, missing_dir_ok=True)
        self.delete_file(f"{path.rstrip('/')}/")  # the mark that another writer may have left

    def delete_dir_contents(self, path: str, missing_dir_ok: bool) -> None:
        found = self.inner.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=missing_dir_ok))
        for info in found:
            self.delete_file(info.path if info.type == pafs.FileType.File else f"{info.path.rstrip('/')}/")

    def delete_root_dir_contents(self) -> None:
        raise OSError(errno.EPERM, "a whole store is not deleted")

    def _put(self, path: str, data: bytes) -> None:
        self._asked(path, "put_object", Body=data, **encryption_of(self.options))

    def _asked(self, path: str, call: str, **arguments: Any) -> None:
        bucket, key = _split(path)
        client, exceptions = client_of(environment(), bucket, self.options)
        for left in reversed(range(self.attempts)):
            try:
                getattr(client, call)(Bucket=bucket, Key=key, **arguments)
                return
            except exceptions.ClientError as error:
                code, status = (
                    error.response["Error"].get("Code", ""),
                    error.response["ResponseMetadata"]["HTTPStatusCode"],
                )
                if left == 0 or (status < 500 and status not in (408, 429)):
                    # As Arrow words it, which is what is told apart by ``storage.classify``.
                    raise OSError(f"AWS Error {_CAPITAL.sub('_', code).upper()} (HTTP status {status})") from None
            except exceptions.NoCredentialsError:
                raise PermissionError(errno.EACCES, "no credentials found") from None
            except exceptions.SSLError:
                raise OSError("curlCode: 60, the certificate is not trusted") from None
            except exceptions.BotoCoreError as error:
                if left == 0:
                    raise OSError(errno.EIO, type(error).__name__) from None
            time.sleep(min(8.0, 0.5 * 2.0 ** (self.attempts - left)))


class _Body(io.BytesIO):
    """What is written, put as a whole when it is closed."""

    def __init__(self, put: Callable[[bytes], None]) -> None:
        super().__init__()
        self._put: Callable[[bytes], None] | None = put

    def close(self) -> None:
        put, self._put = self._put, None
        if put is not None:
            put(self.getvalue())
        super().close()


def _split(path: str) -> tuple[str, str]:
    bucket, _, key = path.partition("/")
    return bucket, key
