"""What S3-compatible services really answer, and the exit code the job makes of it at each moment of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import io
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import boto3
import pytest

from job.checkpoints.manifest import MANIFEST, commit, read
from job.errors import ExitCode, JobError, TransientError
from job.storage import Store, open_store
from job.storage.proof import prove


@dataclass(frozen=True)
class Refusal:
    """A service's answer to a request that it does not serve, and where somebody published it."""

    name: str
    status: int
    code: str
    message: str
    source: str
    first: ExitCode  # before anything succeeded with these credentials
    later: ExitCode
    page: str = ""  # what is sent instead of S3's XML
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def body(self) -> bytes:
        told = f"<Message>{escape(self.message)}</Message>" if self.message else ""
        xml = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{self.code}</Code>{told}</Error>'
        return (self.page or xml).encode()

    @property
    def told(self) -> tuple[str, ...]:
        """What the job must repeat."""
        if self.page:
            return str(self.status), HTTPStatus(self.status).phrase.split()[-1]
        return tuple(filter(None, (str(self.status), self.code, self.message)))


def _nginx(status: str) -> str:
    body = f"<center><h1>{status}</h1></center>\n<hr><center>nginx</center>"
    return f"<html>\n<head><title>{status}</title></head>\n<body>\n{body}\n</body>\n</html>\n"


NODE, AGAIN, PERMISSION, SETTINGS = ExitCode.NODE_UNFIT, ExitCode.TRY_AGAIN, ExitCode.PERMISSION, ExitCode.SETTINGS
_AWS_LIST = "https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html"
_R2_LIST = "https://developers.cloudflare.com/r2/api/error-codes/"
_REFUSALS = (
    # Credentials and permissions
    Refusal("Amazon: a session token has expired", 400, "ExpiredToken", "The provided token has expired.",
            "https://github.com/aws/aws-sdk-php/issues/1895", PERMISSION, AGAIN),
    Refusal("Amazon and MinIO: the access key is unknown, or was a temporary one", 403, "InvalidAccessKeyId",
            "The AWS Access Key Id you provided does not exist in our records.", _AWS_LIST, PERMISSION, AGAIN),
    Refusal("Amazon: access denied", 403, "AccessDenied", "Access Denied", _AWS_LIST, PERMISSION, PERMISSION),
    Refusal("Cloudflare R2: wrong credentials", 401, "Unauthorized", "Unauthorized", _R2_LIST, PERMISSION, PERMISSION),
    Refusal("Cloudflare R2: no subscription", 403, "NotEntitled", "Account not entitled to this feature.",
            _R2_LIST, PERMISSION, PERMISSION),
    Refusal("Backblaze B2: the key lacks a capability", 403, "AccessDenied", "Cannot access bucket",
            "https://github.com/kopia/kopia/issues/5329", PERMISSION, PERMISSION),
    Refusal("Oracle OCI: the key is unknown in this region", 403, "SignatureDoesNotMatch",
            "The secret key required to complete authentication could not be found. The region must be specified if "
            "this is not the home region for the tenancy.",
            "https://github.com/nextflow-io/nextflow/pull/4481", PERMISSION, PERMISSION),
    Refusal("Google: boto3's checksum headers break the signature", 403, "SignatureDoesNotMatch", "Invalid argument.",
            "https://github.com/EnterpriseDB/barman/issues/1112", PERMISSION, PERMISSION),
    # This machine
    Refusal("Amazon and MinIO: the clock is wrong", 403, "RequestTimeTooSkewed",
            "The difference between the request time and the current time is too large.",
            "https://github.com/aws/aws-sdk-php/issues/612", NODE, NODE),
    # The bucket's name, its region, or the endpoint
    Refusal("Amazon: no such bucket", 404, "NoSuchBucket", "The specified bucket does not exist",
            _AWS_LIST, SETTINGS, SETTINGS),
    Refusal("Amazon: the bucket is in another region", 301, "PermanentRedirect",
            "The bucket you are attempting to access must be addressed using the specified endpoint. Please send all "
            "future requests to this endpoint.",
            "https://github.com/yanganto/s3rs/issues/18", SETTINGS, SETTINGS,
            headers=(("x-amz-bucket-region", "ap-northeast-1"),)),
    Refusal("a proxy that redirects", 301, "", "", "https://github.com/boto/botocore/pull/1512", SETTINGS, SETTINGS,
            page=_nginx("301 Moved Permanently"), headers=(("Location", "https://127.0.0.1:1/"),)),
    Refusal("Oracle OCI: no such bucket", 404, "BucketNotFound",
            "Either the bucket named 'bucket' does not exist in the namespace 'bling' or you are not authorized to "
            "access it",
            "https://github.com/oracle/oci-python-sdk/issues/484", SETTINGS, SETTINGS),
    Refusal("Oracle OCI: no such namespace", 404, "NamespaceNotFound",
            "You do not have authorization to perform this request, or the requested resource could not be found.",
            "https://github.com/oracle/oci-cli/issues/554", SETTINGS, SETTINGS),
    Refusal("an endpoint that is not one of S3", 404, "", "", "https://github.com/boto/boto3/issues/2559",
            SETTINGS, SETTINGS, page="404 page not found\n"),
    # What the service cannot do, or will not
    Refusal("Cloudflare R2: boto3's checksum header", 501, "NotImplemented",
            "Header 'x-amz-checksum-crc32' with value '8FJbTw==' not implemented",
            "https://github.com/f2face/cloudflare-r2/issues/12", SETTINGS, SETTINGS),
    Refusal("Backblaze B2: boto3's checksum header", 400, "InvalidArgument",
            "Unsupported header 'x-amz-sdk-checksum-algorithm' received for this API call.",
            "https://github.com/home-assistant/core/issues/143995", SETTINGS, SETTINGS),
    Refusal("OVH: boto3's way to send a checksum", 501, "NotImplemented",
            "Transfering payloads in multiple chunks using aws-chunked is not supported.",
            "https://github.com/treeverse/lakeFS/issues/2471", SETTINGS, SETTINGS),
    Refusal("Qumulo: boto3's way to send a checksum", 400, "AuthorizationHeaderMalformed", "BadRequest(400)",
            "https://github.com/boto/botocore/issues/3352", SETTINGS, SETTINGS),
    Refusal("Cloudflare R2: no length", 411, "MissingContentLength",
            "`Content-Length` header required but missing.", _R2_LIST, SETTINGS, SETTINGS),
    Refusal("Alibaba OSS: conditional writes", 501, "NotImplemented",
            "A header you provided implies functionality that is not implemented",
            "https://github.com/tobi/walgit/issues/67", SETTINGS, SETTINGS),
    Refusal("MinIO: the disks are full", 507, "XMinioStorageFull",
            "Storage backend has reached its minimum free disk threshold. Please delete a few objects to proceed.",
            "https://github.com/minio/minio/issues/6795", SETTINGS, SETTINGS),
    Refusal("MinIO: a folder has the object's name", 409, "XMinioObjectExistsAsDirectory",
            "Object name already exists as a directory.",
            "https://github.com/minio/minio-java/issues/1027", SETTINGS, SETTINGS),
    Refusal("Ceph: the quota is used up", 403, "QuotaExceeded", "",
            "https://github.com/bloomberg/chef-bcpc/pull/825", SETTINGS, SETTINGS),
    Refusal("Versity: the quota is used up", 403, "QuotaExceeded", "Your request was denied due to quota exceeded.",
            "https://github.com/versity/versitygw/pull/503", SETTINGS, SETTINGS),
    Refusal("Amazon: the encryption key does not exist", 400, "KMS.NotFoundException", "Invalid keyId aws/s3",
            "https://github.com/aws/aws-cli/issues/4507", SETTINGS, SETTINGS),
    Refusal("Amazon: the method is not allowed", 405, "MethodNotAllowed",
            "The specified method is not allowed against this resource.", _AWS_LIST, SETTINGS, SETTINGS),
    Refusal("a proxy that limits uploads", 413, "", "", "https://github.com/mickael-kerjean/filestash/issues/423",
            SETTINGS, SETTINGS, page=_nginx("413 Request Entity Too Large")),
    Refusal("a proxy that expects https", 400, "", "", "https://github.com/Hubs-Foundation/hubs-cloud/issues/376",
            SETTINGS, SETTINGS, page=_nginx("400 Bad Request")),
    # What may pass
    Refusal("Amazon: too many requests to its KMS", 503, "SlowDown",
            "Please reduce your request rate for operations involving AWS KMS.",
            "https://github.com/aws-samples/cql-replicator/issues/92", AGAIN, AGAIN),
    Refusal("Amazon: an internal error", 500, "InternalError", "We encountered an internal error. Please try again.",
            "https://github.com/onnela-lab/beiwe-backend/issues/36", AGAIN, AGAIN),
    Refusal("Amazon: the upload stalled", 400, "RequestTimeout",
            "Your socket connection to the server was not read from or written to within the timeout period. Idle "
            "connections will be closed.",
            "https://github.com/ncri/s3_uploader_example/issues/3", AGAIN, AGAIN),
    Refusal("Amazon: another operation is in progress", 409, "OperationAborted",
            "A conflicting conditional operation is currently in progress against this resource. Try again.",
            _AWS_LIST, AGAIN, AGAIN),
    Refusal("Cloudflare R2: too many writes of one object", 429, "ServiceUnavailable",
            "Reduce your concurrent request rate for the same object.",
            "https://github.com/unkeyed/unkey/issues/6021", AGAIN, AGAIN),
    Refusal("Cloudflare R2: too many requests", 429, "TooManyRequests", "Rate limit exceeded.", _R2_LIST, AGAIN, AGAIN),
    Refusal("Cloudflare R2: the connection was cut", 400, "ClientDisconnect",
            "Client disconnected before request completed.", _R2_LIST, AGAIN, AGAIN),
    Refusal("Google: too many writes of one object", 429, "SlowDown", "Please reduce your request rate.",
            "https://github.com/nextcloud/server/issues/12537", AGAIN, AGAIN),
    Refusal("Backblaze B2: no room on this connection", 503, "ServiceUnavailable", "no tomes available",
            "https://github.com/mastodon/mastodon/issues/30030", AGAIN, AGAIN),
    Refusal("a proxy whose server is down", 502, "", "", "https://github.com/pangeo-data/pangeo-eosc/issues/110",
            AGAIN, AGAIN, page=_nginx("502 Bad Gateway")),
)  # fmt: skip

_BY_NAME = [pytest.param(refusal, id=refusal.name) for refusal in _REFUSALS]
CUT = Refusal("the connection is cut", 0, "", "", "", AGAIN, AGAIN)  # the connection ends without an answer


@dataclass(frozen=True)
class Request:
    """A request as the server got it."""

    method: str
    key: str
    query: dict[str, list[str]]
    headers: dict[str, str]  # by lower-case name
    body: bytes = field(repr=False)


When = Callable[[Request], bool]


class Service:
    """An S3 service with one bucket, `bucket`, that refuses what it is told to refuse."""

    def __init__(self, certificate: tuple[Path, Path] | None = None) -> None:
        self.objects: dict[str, tuple[bytes, str]] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.got: list[Request] = []
        self.keeps_versions = self.deletes_only_what_exists = False
        self._refusals: list[tuple[When, Refusal, list[None]]] = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"service": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self.url = self.url.replace("http", "https")
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def refuse(self, refusal: Refusal, when: When = lambda request: True, times: int = 1_000) -> None:
        self._refusals.append((when, refusal, [None] * times))

    def refusal(self, request: Request) -> Refusal | None:
        with self.lock:
            for when, refusal, left in self._refusals:
                if left and when(request):
                    left.pop()
                    return refusal
        return None

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    service: Service
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = -1, True

    def handle_expect_100(self) -> bool:
        going_on = super().handle_expect_100()
        self.wfile.flush()
        return going_on

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        url = urlsplit(self.path)
        key = unquote(url.path).lstrip("/").partition("/")[2]
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, key, parse_qs(url.query, True), headers, self._body(headers))
        self.service.got.append(request)
        refusal = self.service.refusal(request)
        if refusal is CUT:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif refusal is not None:
            kind = "text/html" if refusal.page else "application/xml"
            self._answer(refusal.status, refusal.body, {"Content-Type": kind, **dict(refusal.headers)})
        else:
            with self.service.lock:
                getattr(self, f"_{self.command.lower()}")(request)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _body(self, headers: dict[str, str]) -> bytes:
        chunked = headers.get("transfer-encoding") == "chunked"
        body = _chunks(self.rfile) if chunked else self.rfile.read(int(headers.get("content-length", 0)))
        return _chunks(io.BytesIO(body)) if "aws-chunked" in headers.get("content-encoding", "") else body

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _no(self, status: int, code: str) -> None:
        self._answer(status, Refusal("", status, code, code, "", AGAIN, AGAIN).body)

    def _version(self) -> dict[str, str]:
        return {"x-amz-version-id": "3sL4kqtJlcpXroDTDmJ+rmSpXd3dIbrHY"} if self.service.keeps_versions else {}

    def _put(self, request: Request) -> None:
        found = self.service.objects.get(request.key)
        wanted = request.headers.get("if-match")
        etag = f'"{hashlib.md5(request.body).hexdigest()}"'
        if "uploadId" in request.query:
            self.service.parts[request.query["uploadId"][0]][int(request.query["partNumber"][0])] = request.body
        elif wanted is not None and found is None:
            return self._no(404, "NoSuchKey")
        elif ("if-none-match" in request.headers and found) or (wanted is not None and found and found[1] != wanted):
            return self._no(412, "PreconditionFailed")
        else:
            self.service.objects[request.key] = request.body, etag
        return self._answer(200, headers={"ETag": etag, **self._version()})

    def _post(self, request: Request) -> None:
        if "uploads" in request.query:
            upload = f"upload-{len(self.service.parts)}"
            self.service.parts[upload] = {}
            told = f"<Key>{escape(request.key)}</Key><UploadId>{upload}</UploadId>"
            return self._answer(200, f"<InitiateMultipartUploadResult>{told}</InitiateMultipartUploadResult>".encode())
        parts = self.service.parts.pop(request.query["uploadId"][0])
        data, etag = b"".join(parts[number] for number in sorted(parts)), f'"{len(parts)}-{len(self.service.got)}"'
        self.service.objects[request.key] = data, etag
        told = f"<Key>{escape(request.key)}</Key><ETag>{escape(etag)}</ETag>"
        return self._answer(
            200,
            f"<CompleteMultipartUploadResult>{told}</CompleteMultipartUploadResult>".encode(),
            self._version(),
        )

    def _get(self, request: Request) -> None:
        if "list-type" in request.query:
            return self._list(request.query.get("prefix", [""])[0])
        if not request.key:
            return self._answer(200)
        if request.key not in self.service.objects:
            return self._no(404, "NoSuchKey")
        data, etag = self.service.objects[request.key]
        if request.headers.get("if-match", etag) != etag:
            return self._no(412, "PreconditionFailed")
        if "range" in request.headers:
            first, _, last = request.headers["range"].removeprefix("bytes=").partition("-")
            data = data[int(first) : int(last) + 1]
        when = {"Last-Modified": "Wed, 01 Jul 2026 12:00:00 GMT"}
        return self._answer(206 if "range" in request.headers else 200, data, {"ETag": etag, **when, **self._version()})

    _head = _get

    def _list(self, prefix: str) -> None:
        found = "".join(
            f"<Contents><Key>{escape(key)}</Key><ETag>{escape(etag)}</ETag><Size>{len(data)}</Size></Contents>"
            for key, (data, etag) in sorted(self.service.objects.items())
            if key.startswith(prefix)
        )
        told = f"<Name>bucket</Name><IsTruncated>false</IsTruncated>{found}"
        self._answer(200, f"<ListBucketResult>{told}</ListBucketResult>".encode())

    def _delete(self, request: Request) -> None:
        if self.service.objects.pop(request.key, None) is None and self.service.deletes_only_what_exists:
            return self._no(404, "NoSuchKey")
        return self._answer(204)


def _chunks(stream: Any) -> bytes:
    """A body in chunks, each behind a line with its length. HTTP and aws-chunked do it alike; trailers are dropped."""
    found = b""
    while size := int(stream.readline().partition(b";")[0], 16):
        found += stream.read(size)
        stream.readline()
    while stream.readline().strip():
        pass
    return found


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Credentials, nothing of the developer's, and no waiting between tries."""
    for name in ("AWS_PROFILE", "AWS_CA_BUNDLE", "AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION",
                 "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1",
                        "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
                        "AWS_EC2_METADATA_DISABLED": "true"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return monkeypatch


@pytest.fixture
def service(environment: pytest.MonkeyPatch) -> Iterator[Service]:
    found = Service()
    environment.setenv("AWS_ENDPOINT_URL", found.url)
    yield found
    found.close()


@pytest.fixture
def store(environment: pytest.MonkeyPatch) -> Store:
    """A store. boto3's description of S3 is read once for all of them, since that takes most of its time."""
    environment.setattr("job.storage.s3._session", _session)
    return open_store("s3://bucket/runs")


@functools.cache
def _session() -> boto3.session.Session:
    return boto3.session.Session()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that nobody has signed but its own key, and that key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - day, now + day)
        .add_extension(address, critical=True)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("certificate")
    (folder / "certificate.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    (folder / "key.pem").write_bytes(pem)
    return folder / "certificate.pem", folder / "key.pem"


@pytest.fixture
def encrypted(environment: pytest.MonkeyPatch, certificate: tuple[Path, Path]) -> Iterator[Service]:
    """The same service behind TLS, with a certificate that is trusted only if AWS_CA_BUNDLE says so."""
    found = Service(certificate)
    environment.setenv("AWS_ENDPOINT_URL", found.url)
    yield found
    found.close()


def _checkpoint(folder: Path) -> Path:
    folder.mkdir()
    for name in ("adapter.safetensors", "trainer_state.json"):
        (folder / name).write_text(f"{folder.name}/{name}")
    return folder


def _first_request(service: Service, store: Store, folder: Path, refusal: Refusal) -> None:
    service.refuse(refusal)
    prove(store, "one")


def _conditional_write(service: Service, store: Store, folder: Path, refusal: Refusal) -> None:
    service.refuse(refusal, lambda request: "if-match" in request.headers and request.method == "PUT")
    prove(store, "one")


def _part_of_a_file(service: Service, store: Store, folder: Path, refusal: Refusal) -> None:
    service.refuse(refusal, lambda request: "partNumber" in request.query)
    prove(store, "one")


def _file_sent(service: Service, store: Store, folder: Path, refusal: Refusal) -> None:
    store.put("one/lease.json", b"data")
    service.refuse(refusal, lambda request: request.key.endswith("/adapter.safetensors"))
    commit(store, "one/checkpoint-2", _checkpoint(folder / "2"), "")


def _file_read(service: Service, store: Store, folder: Path, refusal: Refusal) -> None:
    store.put("one/file", b"data")
    service.refuse(refusal, lambda request: request.method == "GET")
    store.download("one/file", folder / "read")


def _manifest_written(service: Service, store: Store, folder: Path, refusal: Refusal) -> None:
    service.refuse(refusal, lambda request: request.key.endswith(MANIFEST) and request.method == "PUT")
    commit(store, "one/result", _checkpoint(folder / "result"), "")


Moment = Callable[[Service, Store, Path, Refusal], None]
_LATER: dict[str, Moment] = {
    "preflight, a conditional write": _conditional_write,
    "preflight, a part of a file": _part_of_a_file,
    "mid-run, a file is sent": _file_sent,
    "mid-run, a file is read": _file_read,
    "last upload, its manifest": _manifest_written,
}


@pytest.mark.parametrize("refusal", _BY_NAME)
def test_the_first_request_of_preflight_is_refused(
    service: Service, store: Store, tmp_path: Path, refusal: Refusal
) -> None:
    _expect(refusal, refusal.first, lambda: _first_request(service, store, tmp_path, refusal))


@pytest.mark.parametrize("moment", [pytest.param(moment, id=name) for name, moment in _LATER.items()])
@pytest.mark.parametrize("refusal", _BY_NAME)
def test_a_request_is_refused_after_others_succeeded(
    service: Service, store: Store, tmp_path: Path, refusal: Refusal, moment: Moment
) -> None:
    _expect(refusal, refusal.later, lambda: moment(service, store, tmp_path, refusal))


def _expect(refusal: Refusal, code: ExitCode, work: Callable[[], object]) -> None:
    with pytest.raises(JobError) as met:
        work()
    assert met.value.exit_code == code, met.value.message
    for word in refusal.told:
        assert word in met.value.message, "the service's own words"


@pytest.mark.parametrize("refusal", _BY_NAME)
def test_a_head_request_is_refused_whose_answer_has_no_words(
    service: Service, store: Store, tmp_path: Path, refusal: Refusal
) -> None:
    """Most services answer HEAD without a body. The file must not pass for a missing one."""
    store.put("one/file", b"data")
    service.refuse(refusal, lambda request: request.method in ("GET", "HEAD"))
    with pytest.raises(JobError) as met:
        store.download("one/file", tmp_path / "read")
    assert met.value.exit_code == refusal.later, met.value.message
    assert str(refusal.status) in met.value.message


def test_a_service_that_refuses_nothing_passes_and_holds_what_was_committed(
    service: Service, store: Store, tmp_path: Path
) -> None:
    prove(store, "one")
    assert not service.objects, "preflight left something behind"
    written = commit(store, "one/result", _checkpoint(tmp_path / "result"), "")
    assert read(store, "one/result") == written
    assert len(service.objects) == 3


_BUSY = [
    refusal for refusal in _REFUSALS if refusal.later is AGAIN and (refusal.status == 429 or refusal.status >= 500)
]


@pytest.mark.parametrize("refusal", [pytest.param(refusal, id=refusal.name) for refusal in (*_BUSY, CUT)])
def test_a_service_that_was_busy_once_is_asked_again(service: Service, store: Store, refusal: Refusal) -> None:
    service.refuse(refusal, times=1)
    store.put("one/record", b"data")
    assert [request.method for request in service.got] == ["PUT", "PUT"]


def test_a_connection_that_is_always_cut_is_no_reason_to_give_up_for_ever(service: Service, store: Store) -> None:
    service.refuse(CUT)
    with pytest.raises(JobError) as met:
        prove(store, "one")
    assert met.value.exit_code == AGAIN


def test_an_error_in_the_body_of_a_success_is_an_error(service: Service, store: Store, tmp_path: Path) -> None:
    """Amazon says 200 before it has put the parts together: https://github.com/boto/boto/issues/3863"""
    (tmp_path / "file").write_bytes(b"data")
    error = Refusal("", 200, "InternalError", "We encountered an internal error. Please try again.", "", AGAIN, AGAIN)
    service.refuse(error, lambda request: request.method == "POST" and "uploadId" in request.query)
    with pytest.raises(JobError, match="InternalError: We encountered an internal error") as met:
        store.upload(tmp_path / "file", "one/file", always_in_parts=True)
    assert met.value.exit_code == AGAIN


def test_a_conflict_that_amazon_says_to_retry_is_not_a_missing_ability(service: Service, store: Store) -> None:
    """https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-requests.html: on a 409, upload again."""
    conflict = "The conditional request cannot succeed due to a conflicting operation against this resource."
    refusal = Refusal("", 409, "ConditionalRequestConflict", conflict, "", AGAIN, AGAIN)
    service.refuse(refusal, lambda request: "if-match" in request.headers and request.method == "PUT", times=1)
    with contextlib.suppress(TransientError):
        prove(store, "one")


@pytest.mark.parametrize("header", ["if-match", "if-none-match"])
def test_a_service_that_ignores_a_condition_is_refused(service: Service, store: Store, header: str) -> None:
    """https://github.com/chimera-nas/chimera/issues/471"""

    def forget(request: Request) -> bool:
        if request.method == "PUT":
            request.headers.pop(header, None)
        return False

    service.refuse(CUT, forget)
    with pytest.raises(JobError, match=f"(?i){header}") as met:
        prove(store, "one")
    assert met.value.exit_code == SETTINGS


def test_deleting_nothing_is_no_error_where_the_service_says_404(
    service: Service, store: Store, tmp_path: Path
) -> None:
    """Google does: https://github.com/yandex/ch-backup/pull/69"""
    service.deletes_only_what_exists = True
    store.delete("one/absent")
    prove(store, "one")
    commit(store, "one/result", _checkpoint(tmp_path / "result"), "")


_CHECKSUMS = ("x-amz-checksum-", "x-amz-sdk-checksum-algorithm", "x-amz-trailer", "trailer")


def _carries_a_checksum(request: Request) -> bool:
    return (
        any(name.startswith(_CHECKSUMS) for name in request.headers)
        or "aws-chunked" in request.headers.get("content-encoding", "")
        or request.headers.get("x-amz-content-sha256", "").startswith("STREAMING")
    )


@pytest.mark.parametrize("asked", ["when_required", None])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_when_required_keeps_checksums_out_of_every_request(
    request: pytest.FixtureRequest,
    environment: pytest.MonkeyPatch,
    certificate: tuple[Path, Path],
    tmp_path: Path,
    scheme: Literal["http", "https"],
    asked: str | None,
) -> None:
    service: Service = request.getfixturevalue("service" if scheme == "http" else "encrypted")
    environment.setenv("AWS_CA_BUNDLE", str(certificate[0]))
    if asked:
        environment.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", asked)
    store = open_store("s3://bucket/runs")
    prove(store, "one")
    commit(store, "one/result", _checkpoint(tmp_path / "result"), "")
    writes = [request for request in service.got if request.method in ("PUT", "POST")]
    assert len(writes) >= 10
    assert any(map(_carries_a_checksum, writes)) is (asked is None), "else this test looks for the wrong thing"


@pytest.mark.parametrize("in_parts", [False, True])
def test_encryption_and_the_payer_are_asked_for_in_every_request_that_knows_them(
    service: Service, store: Store, environment: pytest.MonkeyPatch, tmp_path: Path, in_parts: bool
) -> None:
    key = "arn:aws:kms:eu-central-1:123456789012:key/of-mine"
    environment.setenv("FT_S3_SERVER_SIDE_ENCRYPTION", "aws:kms")
    environment.setenv("FT_S3_SSE_KMS_KEY_ID", key)
    environment.setenv("FT_S3_REQUEST_PAYER", "requester")
    (tmp_path / "file").write_bytes(b"words")
    store.upload(tmp_path / "file", "a/file", always_in_parts=in_parts)
    store.download("a/file", tmp_path / "again")
    assert list(store.list("a")) == [("a/file", 5)]
    store.delete("a/file")
    assert (tmp_path / "again").read_bytes() == b"words"
    writes = [one for one in service.got if "x-amz-server-side-encryption" in one.headers]
    assert [one.method for one in writes] == ["POST" if in_parts else "PUT"], "what begins to write, and nothing else"
    assert {one.headers["x-amz-server-side-encryption-aws-kms-key-id"] for one in writes} == {key}
    assert {one.headers.get("x-amz-request-payer") for one in service.got} == {"requester"}


def test_a_bucket_that_keeps_versions_is_noticed(service: Service, store: Store) -> None:
    store.put("one/record", b"data")
    assert not store.keeps_versions
    service.keeps_versions = True
    store.put("one/record", b"data")
    assert store.keeps_versions


_WORK: dict[str, Callable[[Store, Path], object]] = {
    "a record": lambda store, folder: store.put("one/record", b"data"),
    "a file that is sent": lambda store, folder: store.upload(folder / "file", "one/file"),
    "a file that is read": lambda store, folder: store.download("one/file", folder / "read"),
    "a listing": lambda store, folder: list(store.list("one")),
}


@pytest.mark.parametrize("work", [pytest.param(work, id=name) for name, work in _WORK.items()])
def test_a_certificate_that_is_not_trusted_is_a_matter_of_settings(
    encrypted: Service, store: Store, tmp_path: Path, work: Callable[[Store, Path], object]
) -> None:
    (tmp_path / "file").write_bytes(b"data")
    with pytest.raises(JobError, match="CERTIFICATE_VERIFY_FAILED") as met:
        work(store, tmp_path)
    assert met.value.exit_code == SETTINGS


@pytest.mark.parametrize("work", [pytest.param(work, id=name) for name, work in _WORK.items()])
def test_an_endpoint_that_does_not_speak_https_is_a_matter_of_settings(
    service: Service,
    store: Store,
    environment: pytest.MonkeyPatch,
    tmp_path: Path,
    work: Callable[[Store, Path], object],
) -> None:
    """https://github.com/nixys/nxs-backup/issues/41"""
    (tmp_path / "file").write_bytes(b"data")
    environment.setenv("AWS_ENDPOINT_URL", service.url.replace("http:", "https:"))
    with pytest.raises(JobError, match="SSL") as met:
        work(store, tmp_path)
    assert met.value.exit_code == SETTINGS


@pytest.mark.parametrize("work", [pytest.param(work, id=name) for name, work in _WORK.items()])
def test_a_file_of_certificates_that_does_not_exist_is_a_matter_of_settings(
    encrypted: Service,
    store: Store,
    environment: pytest.MonkeyPatch,
    tmp_path: Path,
    work: Callable[[Store, Path], object],
) -> None:
    (tmp_path / "file").write_bytes(b"data")
    environment.setenv("AWS_CA_BUNDLE", str(tmp_path / "absent.pem"))
    with pytest.raises(JobError, match="No such file") as met:
        work(store, tmp_path)
    assert met.value.exit_code == SETTINGS


def test_a_profile_that_does_not_exist_is_a_matter_of_settings(
    service: Service, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(JobError, match=r"AWS_PROFILE.*nobody") as met:
        prove(open_store("s3://bucket/runs"), "one")
    assert met.value.exit_code == SETTINGS


def test_a_proxy_that_wants_a_password_is_no_reason_to_start_again(
    store: Store, environment: pytest.MonkeyPatch
) -> None:
    class Proxy(BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            self.send_error(407)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    environment.setenv("HTTPS_PROXY", f"http://127.0.0.1:{server.server_port}")
    environment.setenv("AWS_ENDPOINT_URL", "https://s3.example.com")
    with pytest.raises(JobError, match=r"(?i)proxy") as met:
        store.put("one/record", b"data")
    server.shutdown()
    server.server_close()
    assert met.value.exit_code in (PERMISSION, SETTINGS)


# A policy that lacks one right: what Amazon answers to the requests that need it
_DENIED = Refusal("denied", 403, "AccessDenied", "Access Denied", _AWS_LIST, PERMISSION, PERMISSION)


@pytest.mark.parametrize(
    ("right", "needs"),
    [
        ("s3:ListBucket", lambda request: request.method in ("GET", "HEAD") and not request.key),
        ("s3:GetObject", lambda request: request.method in ("GET", "HEAD") and bool(request.key)),
        ("s3:PutObject", lambda request: request.method in ("PUT", "POST")),
        ("s3:DeleteObject", lambda request: request.method == "DELETE" and "uploadId" not in request.query),
    ],
)
def test_before_anything_is_paid_for_the_right_that_a_policy_lacks_is_named(
    service: Service, right: str, needs: When
) -> None:
    """A service of few words. Amazon names the right itself: see the next test."""
    service.refuse(_DENIED, needs)
    with pytest.raises(JobError) as raised:
        prove(open_store("s3://bucket/runs"), "run")
    assert raised.value.exit_code == ExitCode.PERMISSION
    assert f"needs the right {right}" in raised.value.hint, raised.value.hint
    assert "AccessDenied" in raised.value.message


@pytest.mark.parametrize(
    ("right", "needs"),
    [
        ("s3:ListBucket", lambda request: request.method in ("GET", "HEAD")),  # 403 instead of 404 for absent objects
        ("kms:GenerateDataKey", lambda request: request.method in ("PUT", "POST")),
        ("kms:Decrypt", lambda request: request.method == "GET" and bool(request.key)),
    ],
)
def test_the_right_that_the_service_names_is_the_one_that_is_told(service: Service, right: str, needs: When) -> None:
    words = f"User: arn:aws:iam::1:user/me is not authorized to perform: {right} on resource: arn:aws:x because no policy allows it"
    service.refuse(dataclasses.replace(_DENIED, message=words), needs)
    with pytest.raises(JobError) as raised:
        prove(open_store("s3://bucket/runs"), "run")
    assert f"needs the right {right}. " in raised.value.hint, raised.value.hint


def test_no_right_is_asked_for_when_the_service_does_not_know_the_user(service: Service) -> None:
    service.refuse(dataclasses.replace(_DENIED, code="SignatureDoesNotMatch"), lambda request: True)
    with pytest.raises(JobError) as raised:
        prove(open_store("s3://bucket/runs"), "run")
    assert "needs the right" not in raised.value.hint and "credentials" in raised.value.hint
