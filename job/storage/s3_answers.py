"""What an S3 service's refusals mean: who must act, and whether another try can succeed. Decided in this one table.

The codes are those of Amazon S3's list of error responses, and of what Cloudflare R2, MinIO, Google Cloud Storage, Backblaze B2, Oracle
OCI and Ceph answer through the same protocol. A code that is not listed is judged by its HTTP status (RFC 9110).
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from boto3.exceptions import S3UploadFailedError
from botocore import exceptions as botocore
from botocore.exceptions import ClientError


class Meaning(Enum):
    """What an answer asks of whom."""

    ABSENT = auto()  # there is no such object
    CONFLICT = auto()  # a condition did not hold: somebody else wrote the object
    REFUSED = auto()  # these credentials may not do this
    EXPIRED = auto()  # these credentials did work, or may have, and do not any longer
    CLOCK = auto()  # this machine's clock is wrong
    ELSEWHERE = auto()  # the bucket's name, region or endpoint is wrong
    NEVER = auto()  # the service cannot do this, or will not
    DAMAGED = auto()  # the bytes arrived damaged: send them again
    LATER = auto()  # a later try may succeed


_CODES = {
    Meaning.ABSENT: "NoSuchKey NotFound NoSuchVersion",
    Meaning.CONFLICT: "PreconditionFailed ConditionNotMet",
    Meaning.REFUSED: (
        "AccessDenied AccessForbidden Forbidden AllAccessDisabled AccountProblem NotSignedUp SignatureDoesNotMatch InvalidPayer "
        "InvalidSecurity CrossLocationLoggingProhibited UserSuspended Unauthorized UnauthorizedAccess NotAuthenticated "
        "NotAuthorizedOrNotFound UserProjectAccountProblem"
    ),
    Meaning.EXPIRED: (
        "ExpiredToken ExpiredTokenException TokenRefreshRequired InvalidToken InvalidTokenId InvalidAccessKeyId "
        "InvalidClientTokenId ExpiredSession"
    ),
    Meaning.CLOCK: "RequestTimeTooSkewed RequestExpired ExpiredRequest",
    Meaning.ELSEWHERE: (
        "NoSuchBucket PermanentRedirect AuthorizationHeaderMalformed InvalidBucketName IllegalLocationConstraintException "
        "InvalidRegionName BucketNotFound NamespaceNotFound"
    ),
    Meaning.NEVER: (
        "NotImplemented MethodNotAllowed InvalidArgument InvalidRequest MalformedXML MissingContentLength EntityTooLarge EntityTooSmall "
        "InvalidEncryptionAlgorithmError InvalidStorageClass InvalidURI KeyTooLongError UnsupportedSignature QuotaExceeded "
        "XMinioStorageFull XMinioAdminBucketQuotaExceeded StorageFull InsufficientStorage CapExceeded StorageQuotaExceeded "
        "TransactionCapExceeded StorageCapExceeded InvalidObjectState UserKeyMustBeSpecified "
        "XMinioObjectExistsAsDirectory XMinioParentIsObject InvalidBucketState"
    ),
    Meaning.DAMAGED: "BadDigest InvalidDigest XAmzContentChecksumMismatch XAmzContentSHA256Mismatch IncompleteBody ClientDisconnect "
    "ConditionalRequestConflict",
    Meaning.LATER: (
        "InternalError ServiceUnavailable SlowDown SlowDownRead SlowDownWrite RequestTimeout OperationAborted TooManyRequests Throttling "
        "ThrottlingException RequestLimitExceeded BandwidthLimitExceeded InvalidPart InvalidPartOrder NoSuchUpload XMinioServerNotInitialized "
        "XMinioReadQuorum XMinioWriteQuorum RequestThrottled UserRateLimitExceeded"
    ),
}
_BY_CODE = {code: meaning for meaning, codes in _CODES.items() for code in codes.split()}
_BY_STATUS = {
    301: Meaning.ELSEWHERE,
    302: Meaning.ELSEWHERE,
    308: Meaning.ELSEWHERE,
    401: Meaning.REFUSED,
    402: Meaning.NEVER,
    403: Meaning.REFUSED,
    404: Meaning.DAMAGED,  # of an object that is absent, every service says NoSuchKey, unless that was cut off
    408: Meaning.LATER,
    409: Meaning.LATER,
    412: Meaning.CONFLICT,
    423: Meaning.LATER,
    425: Meaning.LATER,
    429: Meaning.LATER,
    501: Meaning.NEVER,
    505: Meaning.NEVER,
    507: Meaning.NEVER,
}

# What botocore itself raises before, or instead of, an answer
_WITHOUT_ANSWER: tuple[tuple[tuple[type[Exception], ...], Meaning], ...] = (
    (
        (
            botocore.NoCredentialsError,
            botocore.PartialCredentialsError,
            botocore.CredentialRetrievalError,
            botocore.MetadataRetrievalError,
            botocore.UnauthorizedSSOTokenError,
            botocore.TokenRetrievalError,
            botocore.SSOError,
        ),
        Meaning.EXPIRED,
    ),
    (
        (
            botocore.ProfileNotFound,
            botocore.ConfigNotFound,
            botocore.ConfigParseError,
            botocore.InvalidConfigError,
            botocore.InvalidRegionError,
            botocore.NoRegionError,
            botocore.EndpointProviderError,
            botocore.UnknownEndpointError,
            botocore.ParamValidationError,
            botocore.UnknownCredentialError,
            botocore.InvalidRetryModeError,
            botocore.InvalidMaxRetryAttemptsError,
            botocore.InvalidDefaultsMode,
            botocore.InvalidS3AddressingStyleError,
        ),
        Meaning.ELSEWHERE,
    ),
)


# The right that each of the job's requests needs (Amazon S3's "Required permissions for Amazon S3 API operations")
_RIGHTS = {
    "HeadBucket": "s3:ListBucket", "ListObjectsV2": "s3:ListBucket", "GetObject": "s3:GetObject", "HeadObject": "s3:GetObject",
    "PutObject": "s3:PutObject", "CreateMultipartUpload": "s3:PutObject", "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject", "DeleteObject": "s3:DeleteObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload", "ListMultipartUploads": "s3:ListBucketMultipartUploads",
}  # fmt: skip
_ALSO = " (and s3:ListBucket, without which S3 refuses to say that an object is absent)"
_UNKNOWN_USER = ("SignatureDoesNotMatch", "InvalidAccessKeyId", "InvalidToken")  # no right would help


@dataclass(frozen=True)
class Answer:
    """A failed request: what it means, the service's own words for it, and which operation it was."""

    meaning: Meaning
    words: str
    code: str = ""
    operation: str = ""

    @property
    def right(self) -> str:
        """The right that the request needs: the one that the service names, or else the usual one. Empty if it is not known."""
        if (named := re.search(r"not authorized to perform: ([\w-]+:\w+)", self.words)) is not None:
            return named[1]
        if self.code in _UNKNOWN_USER:
            return ""
        right = _RIGHTS.get(self.operation, "")
        return right + _ALSO if right == "s3:GetObject" else right


def answer_of(error: BaseException) -> Answer | None:
    """What a failed request means, or None for an error that is not one of S3 or botocore."""
    if isinstance(error, S3UploadFailedError) and error.__context__ is not None:
        return answer_of(error.__context__)
    if isinstance(error, ClientError):
        return _answered(error)
    for kinds, meaning in _WITHOUT_ANSWER:
        if isinstance(error, kinds):
            return Answer(meaning, f"{type(error).__name__}: {error}")
    if isinstance(error, (botocore.SSLError, botocore.ProxyConnectionError)) and (why := _for_good(error)):
        return Answer(Meaning.ELSEWHERE, f"{type(error).__name__}: {error} {why}".strip())
    if isinstance(error, RuntimeError) and "credentials" in str(error).lower():  # botocore's, after a refresh in vain
        return Answer(Meaning.EXPIRED, str(error))
    return None


def is_answer(error: BaseException, meaning: Meaning) -> bool:
    """Whether a failed request has this meaning."""
    answer = answer_of(error)
    return answer is not None and answer.meaning is meaning


def _answered(error: ClientError) -> Answer:
    response: Any = error.response
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    told = response.get("Error", {})
    code = str(told.get("Code", ""))
    meaning = _BY_CODE.get(code)
    if meaning is None and code.startswith("KMS.") and not re.search("Throttl|Timeout|Internal|Unavailable", code):
        meaning = Meaning.NEVER
    if meaning is None:
        meaning = _BY_STATUS.get(status) or (Meaning.NEVER if 400 <= status < 500 else Meaning.LATER)
    words = " ".join(filter(None, [str(status), "" if code.isdigit() else code]))
    text = str(told.get("Message", "")).strip()
    return Answer(meaning, f"{words}: {text}" if text else words, code, str(getattr(error, "operation_name", "")))


def _for_good(error: BaseException) -> str:
    """Why no later try can reach the service, or nothing if the connection was cut."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (ssl.SSLCertVerificationError, FileNotFoundError)) or any(
            words in str(seen)
            for words in ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER", "Tunnel connection failed: 407")
        ):
            return f"({seen})"
        seen = seen.__cause__ or seen.__context__
    return ""
