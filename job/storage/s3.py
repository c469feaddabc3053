"""A store in an S3 bucket, through boto3. Credentials and endpoint come from boto3's own configuration (`AWS_*`)."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

import boto3
import botocore.session
from boto3.exceptions import Boto3Error, S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from job.errors import NodeError, PermissionRefused, SettingsError, TransientError, from_os_error
from job.storage import Conflict, refuse_large
from job.storage.partial import Partial
from job.storage.s3_answers import Answer, Meaning, answer_of, is_answer

_T = TypeVar("_T")
_THREADS = 8
_PAUSES_SECONDS = (0.1, 0.5, 2.0, 5.0)
_METADATA_SECONDS, _METADATA_PAUSE = 60.0, 3.0  # how long an Amazon machine is asked for its role's credentials


class S3Store:
    """Keys are objects below `s3://bucket/prefix`.

    Whether and how requests carry checksums is boto3's own decision (AWS_REQUEST_CHECKSUM_CALCULATION or its file), since
    some services refuse them. What the job stores is compared with its manifest's SHA-256 when it is read, always.
    """

    def __init__(self, url: str) -> None:
        self.bucket, _, prefix = url.partition("://")[2].partition("/")  # `#` and `?` may be part of a key
        self._prefix = prefix.strip("/")
        self._client: Any = None
        self._trouble: tuple[float, str] = (0.0, "")
        self._served = False  # one request has succeeded, so these credentials were good
        self._keeps_versions = False

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self._prefix}".rstrip("/")

    @property
    def keeps_versions(self) -> bool:
        return self._keeps_versions

    def put(self, key: str, data: bytes) -> None:
        with self._errors(key):
            _patiently(lambda: self._put(key, data))

    def _put(self, key: str, data: bytes, **conditions: str) -> Any:
        return self.client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data, **conditions)

    def put_if_absent(self, key: str, data: bytes) -> None:
        with self._errors(key), _conditional(key):
            _patiently(lambda: self._put(key, data, IfNoneMatch="*"))

    def put_if_unchanged(self, key: str, data: bytes, version: str) -> str:
        with self._errors(key), _conditional(key):
            answer = _patiently(lambda: self._put(key, data, IfMatch=version))
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

    def upload(self, source: Path, key: str, *, always_in_parts: bool = False) -> None:
        parts = TransferConfig(multipart_threshold=1) if always_in_parts else TransferConfig()
        with self._errors(key):
            _patiently(lambda: self.client.upload_file(str(source), self.bucket, self._key(key), Config=parts))

    def download(self, key: str, target: Path) -> None:
        with self._errors(key):
            head = self._head(key)
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

    def _head(self, key: str) -> Any:
        """The object's headers. A refused HEAD has no body that says why, so a GET asks again."""
        where = {"Bucket": self.bucket, "Key": self._key(key)}
        try:
            return self.client.head_object(**where)
        except ClientError as error:
            if (answer := answer_of(error)) is None or answer.code.strip("0123456789"):
                raise
            response = _patiently(lambda: self.client.get_object(**where))
            response["Body"].close()
            return response

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
        return ((key, size) for key, size, _ in self.entries(prefix))

    def entries(self, prefix: str) -> Iterator[tuple[str, int, str]]:
        base = f"{self._key(prefix)}/" if prefix else (f"{self._prefix}/" if self._prefix else "")
        drop = len(self._prefix) + 1 if self._prefix else 0
        with self._errors(prefix):
            for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=base):
                for item in page.get("Contents", ()):
                    yield item["Key"][drop:], item["Size"], str(item.get("ETag", ""))

    def delete(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._errors(key):  # Google says so of an absent one
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

    def age_seconds(self, key: str) -> float:
        """By the service's clock: it says when it answered, and when the object was written."""
        with self._errors(key):
            head = self._head(key)
            told = head["ResponseMetadata"]["HTTPHeaders"].get("date")
            answered = parsedate_to_datetime(told) if told else datetime.now(UTC)
            return float((answered - head["LastModified"]).total_seconds())

    @property
    def client(self) -> Any:
        if self._client is None:
            retries: Any = {"mode": "standard", "total_max_attempts": 6}
            with self._errors(""):
                self._client = _session().client(
                    "s3", config=Config(retries=retries, connect_timeout=10, read_timeout=60)
                )
                self._client.meta.events.register("before-parameter-build.s3", _add_arguments)
                self._client.meta.events.register("needs-retry.s3", self._note_trouble)
                self._client.meta.events.register("before-call.s3.HeadBucket", _asks_once)
                self._client.meta.events.register("after-call.s3", self._note_success)
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

    def _note_success(self, http_response: Any = None, parsed: Any = None, **_: Any) -> None:
        if http_response is not None and http_response.status_code < 300:
            self._served = True
            if isinstance(parsed, dict) and parsed.get("VersionId") not in (None, "", "null"):
                self._keeps_versions = True

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{key}".strip("/")

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Translate botocore's errors into those that every store raises."""
        what = f"{self.url}/{key}".rstrip("/")
        try:
            yield
        except (BotoCoreError, Boto3Error, ClientError, ResponseParserError, HTTPError, RuntimeError, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            answer = answer_of(error)
            if answer is not None:
                raise self._explained(answer, what) from error
            if isinstance(error, RuntimeError):
                raise
            if (refusal := from_os_error(error)) is not None:  # the local disk failed, not S3
                raise refusal from error
            raise TransientError(
                f"S3 did not respond for {what}: {type(error).__name__}: {error}",
                "On a first start, check AWS_ENDPOINT_URL and AWS_DEFAULT_REGION. Otherwise start the job again.",
            ) from error
        except ValueError as error:
            if key:  # S3 sent a malformed response
                raise TransientError(
                    f"S3 sent an unreadable response for {what}: {error}", "Start the job again."
                ) from error
            raise self._misspelt(str(error)) from error

    def _misspelt(self, words: str) -> SettingsError:
        return SettingsError(
            f"{self.url}, AWS_PROFILE, AWS_DEFAULT_REGION or AWS_ENDPOINT_URL is not valid: {words}",
            "Write the store as s3://bucket/prefix and the endpoint as https://host, and name a profile and a region that exist.",
        )

    def _explained(self, answer: Answer, what: str) -> Exception:
        match answer.meaning:
            case Meaning.ABSENT:
                return FileNotFoundError(what)
            case Meaning.EXPIRED if self._served:
                return TransientError(
                    f"The AWS credentials have expired: S3 answers {answer.words} for {what}.",
                    "Start the job again with new credentials. A role's credentials renew themselves.",
                )
            case Meaning.EXPIRED | Meaning.REFUSED:
                if "NoCredentials" in answer.words or "PartialCredentials" in answer.words:
                    return PermissionRefused(
                        f"No AWS credentials for {what}.",
                        "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the pod a role.",
                    )
                hint = "Check the AWS credentials and the bucket policy."
                if answer.right and answer.meaning is Meaning.REFUSED:
                    hint = f"{answer.operation} needs the right {answer.right}. {hint}"
                if answer.code == "SignatureDoesNotMatch":
                    hint += " Google and Oracle also say so of checksums: set AWS_REQUEST_CHECKSUM_CALCULATION=when_required."
                return PermissionRefused(f"S3 refused access to {what}: {answer.words}.", hint)
            case Meaning.CLOCK:
                return NodeError(
                    f"This machine's clock is wrong: S3 answers {answer.words} for {what}.",
                    "Set the clock (NTP), or use another machine.",
                )
            case Meaning.ELSEWHERE if not answer.code:
                return self._misspelt(answer.words)
            case _ if answer.meaning is Meaning.ELSEWHERE or answer.code == "404":
                return SettingsError(
                    f"S3 has no bucket {self.bucket!r} here: {answer.words}.",
                    "Check the bucket's name, AWS_DEFAULT_REGION and AWS_ENDPOINT_URL.",
                )
            case Meaning.NEVER:
                return SettingsError(
                    f"S3 cannot do what the job needs, for {what}: {answer.words}.",
                    "Another start would get the same answer. If it is about checksums, set "
                    "AWS_REQUEST_CHECKSUM_CALCULATION=when_required; if about space, free some; otherwise use another store.",
                )
            case _:
                return TransientError(f"S3 failed for {what}: {answer.words}.", "Start the job again.")


# Like boto3's own AWS_…, they are read from the environment, and hold for every bucket that a process uses.
_ARGUMENTS = {
    "FT_S3_SERVER_SIDE_ENCRYPTION": "ServerSideEncryption",
    "FT_S3_SSE_KMS_KEY_ID": "SSEKMSKeyId",
    "FT_S3_REQUEST_PAYER": "RequestPayer",
}


def _add_arguments(params: Any, model: Any, **_: Any) -> None:
    """Add what the settings ask for to every request that knows such an argument."""
    for variable, argument in _ARGUMENTS.items():
        value = os.environ.get(variable)
        if value and argument in model.input_shape.members:
            params.setdefault(argument, value)


def _asks_once(params: Any = None, **_: Any) -> None:
    """botocore asks where a bucket is when it is redirected, and for ever if that is redirected too."""
    params["context"].get("s3_redirect", {})["redirected"] = True


def _session() -> boto3.session.Session:
    """A session whose credentials are known. A machine of Amazon's may answer late when it has just started."""
    core = botocore.session.get_session()
    if _on_amazon():
        if "AWS_METADATA_SERVICE_TIMEOUT" not in os.environ:
            core.set_config_variable("metadata_service_timeout", 5)
        if "AWS_METADATA_SERVICE_NUM_ATTEMPTS" not in os.environ:
            core.set_config_variable("metadata_service_num_attempts", 3)
        until = time.monotonic() + _METADATA_SECONDS
        while core.get_credentials() is None and time.monotonic() < until:
            time.sleep(_METADATA_PAUSE)
    return boto3.session.Session(botocore_session=core)


def _on_amazon() -> bool:
    """Whether this machine has a metadata service that may know credentials."""
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return False
    if "AWS_EC2_METADATA_SERVICE_ENDPOINT" in os.environ:
        return True
    try:
        return "Amazon" in Path("/sys/class/dmi/id/sys_vendor").read_text(encoding="utf-8")
    except OSError:
        return False


@contextmanager
def _conditional(key: str) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        answer = answer_of(error)
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        gone = answer is not None and answer.meaning in (Meaning.CONFLICT, Meaning.ABSENT)
        if gone or (status == 409 and answer is not None and not answer.code.strip("0123456789")):
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
            if not is_answer(error, Meaning.DAMAGED):
                raise
            time.sleep(pause)
    return fetch()
