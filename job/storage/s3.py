"""A store in an S3 bucket, through boto3. Credentials and endpoint come from boto3's own configuration (`AWS_*`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3
from boto3.exceptions import Boto3Error, S3UploadFailedError
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from job.errors import PermissionRefused, SettingsError, TransientError, from_os_error
from job.storage import Conflict, refuse_large
from job.storage.partial import Partial

_T = TypeVar("_T")
_THREADS = 8
_PAUSES_SECONDS = (0.1, 0.5, 2.0, 5.0)

_ABSENT = {"404", "NoSuchKey", "NotFound"}
_REFUSED = {
    "401",
    "403",
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "AllAccessDisabled",
    "InvalidToken",
}
_DAMAGED = {"BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"}
_MISDIRECTED = {"NoSuchBucket", "PermanentRedirect", "AuthorizationHeaderMalformed", "301", "InvalidBucketName"}


class S3Store:
    """Keys are objects below `s3://bucket/prefix`."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.bucket, self._prefix = parts.netloc, parts.path.strip("/")
        self._client: Any = None
        self._trouble: tuple[float, str] = (0.0, "")

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self._prefix}".rstrip("/")

    def put(self, key: str, data: bytes) -> None:
        with self._errors(key):
            self.client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data, ChecksumAlgorithm="SHA256")

    def put_if_absent(self, key: str, data: bytes) -> None:
        with self._errors(key), _conditional(key):
            self.client.put_object(
                Bucket=self.bucket, Key=self._key(key), Body=data, ChecksumAlgorithm="SHA256", IfNoneMatch="*"
            )

    def put_if_unchanged(self, key: str, data: bytes, version: str) -> str:
        with self._errors(key), _conditional(key):
            answer = self.client.put_object(
                Bucket=self.bucket, Key=self._key(key), Body=data, ChecksumAlgorithm="SHA256", IfMatch=version
            )
        return str(answer["ETag"])

    def get(self, key: str) -> bytes:
        return self.get_with_version(key)[0]

    def get_with_version(self, key: str) -> tuple[bytes, str]:
        with self._errors(key):
            return _patiently(lambda: self._get(key))

    def _get(self, key: str, **conditions: str) -> tuple[bytes, str]:
        response = self.client.get_object(Bucket=self.bucket, Key=self._key(key), **conditions)
        refuse_large(key, int(response["ContentLength"]))
        return response["Body"].read(), response["ETag"]

    def upload(self, source: Path, key: str) -> None:
        extra = {"ChecksumAlgorithm": "SHA256"}
        with self._errors(key):
            _patiently(lambda: self.client.upload_file(str(source), self.bucket, self._key(key), ExtraArgs=extra))

    def download(self, key: str, target: Path) -> None:
        with self._errors(key):
            head = self.client.head_object(Bucket=self.bucket, Key=self._key(key))
            partial = Partial(target, head["ETag"], head["ContentLength"])
            with partial.open() as file, ThreadPoolExecutor(_THREADS) as pool:
                # Each thread reads one whole part at a time, so at most _THREADS parts are in memory.
                fetched = [pool.submit(self._fetch, key, head["ETag"], file, part) for part in file.missing()]
                try:
                    for future in as_completed(fetched):
                        future.result()
                except BaseException:
                    pool.shutdown(cancel_futures=True)  # the remaining parts would fail the same way
                    raise
            partial.finish()

    def _fetch(self, key: str, etag: str, file: Partial, part: tuple[int, int]) -> None:
        begin, end = part
        conditions = {"IfMatch": etag} | ({"Range": f"bytes={begin}-{end - 1}"} if end - begin < file.size else {})
        data = _patiently(lambda: self._get(key, **conditions))[0] if end > begin else b""
        if len(data) != end - begin:
            raise TransientError(
                f"S3 returned {len(data)} bytes of {key} instead of {end - begin}.", "Start the job again."
            )
        file.write(begin, data)

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        base = f"{self._key(prefix)}/" if prefix else (f"{self._prefix}/" if self._prefix else "")
        drop = len(self._prefix) + 1 if self._prefix else 0
        with self._errors(prefix):
            for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=base):
                for item in page.get("Contents", ()):
                    yield item["Key"][drop:], item["Size"]

    def delete(self, key: str) -> None:
        with self._errors(key):
            self.client.delete_object(Bucket=self.bucket, Key=self._key(key))

    def sweep(self, prefix: str) -> int:
        """Abort the multipart uploads below `prefix/`. They are billed, but no listing shows them."""
        swept = 0
        with self._errors(prefix):
            pages = self.client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self.bucket, Prefix=f"{self._key(prefix)}/"):
                for upload in page.get("Uploads", ()):
                    self.client.abort_multipart_upload(
                        Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )
                    swept += 1
        return swept

    @property
    def client(self) -> Any:
        if self._client is None:
            retries: Any = {"mode": "standard", "total_max_attempts": 6}
            with self._errors(""):
                self._client = boto3.session.Session().client(
                    "s3", config=Config(retries=retries, connect_timeout=10, read_timeout=60)
                )
                self._client.meta.events.register("needs-retry.s3", self._note_trouble)
        return self._client

    def trouble(self, since: float) -> str | None:
        when, why = self._trouble
        return why if when > since else None

    def _note_trouble(self, response: Any = None, caught_exception: Exception | None = None, **_: Any) -> None:
        """botocore asks after every response whether to retry; this only listens."""
        if caught_exception is not None:
            self._trouble = time.monotonic(), f"{type(caught_exception).__name__}: {caught_exception}"
        elif response is not None and response[0].status_code >= 500:
            code = response[1].get("Error", {}).get("Code", "") if isinstance(response[1], dict) else ""
            self._trouble = time.monotonic(), f"S3 answers {response[0].status_code} {code}".rstrip()

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{key}".strip("/")

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Translate botocore's errors into those that every store raises."""
        what = f"{self.url}/{key}".rstrip("/")
        try:
            yield
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise PermissionRefused(
                f"No AWS credentials for {what}.",
                "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the pod a role.",
            ) from error
        except (ClientError, S3UploadFailedError) as error:
            raise self._explained(error, what) from error
        except ValueError as error:
            if key:  # S3 sent a malformed response
                raise TransientError(
                    f"S3 sent an unreadable response for {what}: {error}", "Start the job again."
                ) from error
            raise self._misspelt(error) from error
        except ParamValidationError as error:
            raise self._misspelt(error) from error
        except (BotoCoreError, Boto3Error, ResponseParserError, HTTPError, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            if (refusal := from_os_error(error)) is not None:  # the local disk failed, not S3
                raise refusal from error
            raise TransientError(
                f"S3 did not respond for {what}: {type(error).__name__}: {error}",
                "On a first start, check AWS_ENDPOINT_URL and AWS_DEFAULT_REGION. Otherwise start the job again.",
            ) from error

    def _misspelt(self, error: Exception) -> SettingsError:
        return SettingsError(
            f"{self.url} or AWS_ENDPOINT_URL is not valid: {error}",
            "Write the store as s3://bucket/prefix and the endpoint as https://host.",
        )

    def _explained(self, error: Exception, what: str) -> Exception:
        code = _code_of(error)
        if code in _ABSENT:
            return FileNotFoundError(what)
        if code in _REFUSED:
            return PermissionRefused(
                f"S3 refused access to {what} ({code}).", "Check the AWS credentials and the bucket policy."
            )
        if code in _MISDIRECTED:
            return SettingsError(
                f"S3 has no bucket {self.bucket!r} here ({code}).", "Check the bucket name and AWS_DEFAULT_REGION."
            )
        return TransientError(f"S3 failed for {what}: {error}", "Start the job again.")


@contextmanager
def _conditional(key: str) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        if _code_of(error) in ("PreconditionFailed", "412", "ConditionalRequestConflict", *_ABSENT):
            raise Conflict(key) from None
        raise


def _patiently(fetch: Callable[[], _T]) -> _T:
    """Retry a transfer whose body breaks off or arrives damaged. boto3 itself retries only requests."""
    for pause in _PAUSES_SECONDS:
        try:
            return fetch()
        except (HTTPError, FlexibleChecksumError, IncompleteReadError, ResponseStreamingError, ReadTimeoutError):
            time.sleep(pause)
        except (ClientError, S3UploadFailedError) as error:
            if _code_of(error) not in _DAMAGED:
                raise
            time.sleep(pause)
    return fetch()


def _code_of(error: BaseException | None) -> str:
    """S3's code for an error, or the HTTP status if it has none. Every refusal becomes 403."""
    if isinstance(error, S3UploadFailedError):
        error = error.__context__
    if not isinstance(error, ClientError):
        return ""
    response: Any = error.response
    status = str(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = str(response.get("Error", {}).get("Code", ""))
    if code in _REFUSED or status in ("401", "403"):
        return "403"
    return code if code and not code.isdigit() else status  # a HEAD response has no body, only a status
