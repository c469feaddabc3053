"""An in-memory Hub that speaks the Hub's real protocol over a socket, as far as huggingface_hub needs it here.

Repositories are commits of {path: bytes}, on `main` and on other branches. `refuse` makes every call fail with a status,
and `fault` may choose one for each request. `gated` names repositories that answer 403 with the Hub's own error code.
`corrupt_uploads` flips a byte of every upload. Files above `part_bytes` are uploaded in parts, and of those above
`kept_bytes` only size and hash are kept.
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request: an error status, a wait, or a connection that ends `before` or `after` it is done."""

    status: int | None = None
    seconds: float = 0.0
    ends: str | None = None
    retry_after: int | None = None
    said: str = "by the test"


class Sparse(bytes):
    """What is kept of a large file: no bytes, but its size and its SHA-256."""

    size: int
    sha256: str


class FakeHub:
    """Use as a context manager. Set HF_ENDPOINT to `url`."""

    def __init__(self, port: int = 0) -> None:
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.branches: dict[tuple[str, str], list[tuple[str, dict[str, bytes]]]] = {}
        self.tags: dict[tuple[str, str], str] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, tuple[int, bytes]]] = {}
        self.part_bytes, self.kept_bytes = 64 << 20, 256 << 20
        self.lock = threading.Lock()
        self.fault: Callable[[str, str], Fault | None] | None = None
        self.refuse: int | None = None
        self.gated: set[str] = set()
        self.writable = True
        self.read_only: set[str] = set()  # repositories that exist, and that the token may only read
        self.corrupt_uploads = False
        self.refused_card: str | None = None  # a text in a card for which the Hub refuses it
        self.requests: list[tuple[str, str, str | None]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _handler_for(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, files: dict[str, bytes] | Path) -> str:
        """Commit `files` (or a folder) to `kind/user/name`, e.g. `models/user/name`. Returns the commit."""
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()
            }
        return self.commit(name, files)

    def commit(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        commits = self.repositories.setdefault(name, []) if branch == "main" else self.branches[name, branch]
        sha = hashlib.sha1(f"{name}{branch}{len(commits)}{sorted(files)}".encode()).hexdigest()
        commits.append((sha, dict(files)))
        return sha

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        return self.commits(name, branch)[-1][1]

    def commits(self, name: str, branch: str = "main") -> list[tuple[str, dict[str, bytes]]]:
        return self.repositories.get(name, []) if branch == "main" else self.branches.get((name, branch), [])

    def find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit that a branch, a tag or a hash names."""
        if commits := self.commits(name, revision):
            return commits[-1]
        wanted = self.tags.get((name, revision), revision)
        every = [
            self.repositories.get(name, []),
            *(found for (owner, _), found in self.branches.items() if owner == name),
        ]
        return next((item for commits in every for item in commits if item[0] == wanted), None)


def _handler_for(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        state = hub

    return Handler


class _Handler(BaseHTTPRequestHandler):
    state: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # the head and body of a response are two writes

    def log_message(self, *_: Any) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET
    _silent = False

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self._silent = False
        try:
            body = self._received(path)
        except ConnectionError:  # the client was killed
            self.close_connection = True
            return
        self.state.requests.append((self.command, path, self.headers.get("Authorization")))
        fault = self.state.fault(self.command, path) if self.state.fault is not None else None
        if fault is not None:
            time.sleep(fault.seconds)
            if fault.ends == "before":
                self._hang_up()
                return
            if fault.status is not None:
                wish = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
                self._json(fault.status, {"error": fault.said}, wish)
                return
            self._silent = fault.ends == "after"
        self._answer(path, body)
        if self._silent:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _received(self, path: str) -> bytes:
        """The body. Of an upload that is too large to keep, only size and hash."""
        length = int(self.headers.get("Content-Length") or 0)
        if length <= self.state.kept_bytes or not path.startswith("/lfs/"):
            body = self.rfile.read(length) if length else self._chunked()
            if len(body) < length:
                raise ConnectionError
            return body
        digest, left = hashlib.sha256(), length
        while left:
            part = self.rfile.read(min(left, 1 << 20))
            if not part:
                raise ConnectionError
            digest.update(part)
            left -= len(part)
        found = Sparse()
        found.size, found.sha256 = length, digest.hexdigest()
        return found

    def _answer(self, path: str, body: bytes) -> None:
        if self.state.refuse is not None:
            return self._json(self.state.refuse, {"error": "refused by the test"})
        if path.startswith("/api/"):
            return self._api(path.removeprefix("/api/"), body)
        if "/resolve/" in path:
            return self._resolve(path.lstrip("/"))
        if path.endswith("/info/lfs/objects/batch"):
            return self._lfs_batch(json.loads(body))
        if path.startswith("/lfs/"):
            return self._upload(path.removeprefix("/lfs/"), body)
        return self._json(404, {"error": path})

    # -- /api ------------------------------------------------------------------------------------------------------

    def _api(self, path: str, body: bytes) -> None:
        if path == "validate-yaml":
            if self.state.refused_card is not None and self.state.refused_card in json.loads(body)["content"]:
                name = self.state.refused_card.partition(":")[0]
                return self._json(400, {"errors": [{"message": f'"{name}" is not allowed'}], "warnings": []})
            return self._json(200, {"errors": [], "warnings": []})
        if path == "repos/create":
            return self._create(json.loads(body))
        kind, user, name, *rest = path.split("/")
        repository = f"{kind}/{user}/{name}"
        if repository in self.state.gated:
            return self._json(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        if repository not in self.state.repositories:
            return self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if rest == ["auth-check", "write"] or rest == ["auth-check"]:
            may = self.state.writable and repository not in self.state.read_only
            return self._json(200 if may else 403, {"error": "no write access"})
        if rest and rest[0] == "preupload":
            files = json.loads(body)["files"]
            return self._json(
                200,
                {
                    "files": [
                        {"path": item["path"], "uploadMode": _mode(item["path"]), "shouldIgnore": False}
                        for item in files
                    ]
                },
            )
        if rest and rest[0] == "commit":
            with self.state.lock:
                return self._commit(repository, rest[1], body)
        if rest and rest[0] in ("branch", "tag"):
            return self._name_a_commit(repository, rest[0], rest[1], body)
        if rest and rest[0] == "commits":
            commits = [
                {"id": sha, "title": "", "message": "", "date": "2026-01-01T00:00:00.000Z", "authors": []}
                for sha, _ in reversed(self.state.commits(repository, rest[1]))
            ]
            return self._json(200, commits)
        commit = self._find(repository, rest[1] if len(rest) > 1 else "main")
        if commit is None:
            return self._json(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        sha, files = commit
        if rest and rest[0] == "tree":
            return self._json(200, [_entry(name, data) for name, data in sorted(files.items())])
        siblings = [_sibling(name, data) for name, data in sorted(files.items())]
        return self._json(
            200,
            {
                "id": f"{user}/{name}",
                "modelId": f"{user}/{name}",
                "sha": sha,
                "siblings": siblings,
                "private": False,
                "tags": [],
            },
        )

    def _create(self, wanted: dict[str, Any]) -> None:
        if not self.state.writable:
            return self._json(403, {"error": "You don't have the rights to create a model under this namespace"})
        user = wanted.get("organization") or "me"
        repository, url = f"models/{user}/{wanted['name']}", f"{self.state.url}/{user}/{wanted['name']}"
        if repository in self.state.repositories:
            return self._json(409, {"error": "exists", "url": url})
        self.state.commit(repository, {".gitattributes": b""})
        return self._json(200, {"url": url, "name": f"{user}/{wanted['name']}"})

    def _name_a_commit(self, repository: str, kind: str, name: str, body: bytes) -> None:
        wanted = json.loads(body or b"{}")
        if kind == "tag":  # posted to the revision, with the tag's name in the body
            if self.command == "DELETE":
                self.state.tags.pop((repository, name), None)
                return self._json(200, {})
            if (repository, wanted["tag"]) in self.state.tags:
                return self._json(409, {"error": "exists"})
            commit = self.state.find(repository, name)
            assert commit is not None
            self.state.tags[repository, wanted["tag"]] = commit[0]
        else:
            if (repository, name) in self.state.branches:
                return self._json(409, {"error": "exists"})
            commit = self.state.find(repository, wanted.get("startingPoint") or "main")
            assert commit is not None
            self.state.branches[repository, name] = [commit]
        return self._json(200, {})

    def _commit(self, repository: str, branch: str, body: bytes) -> None:
        files = dict(self.state.files(repository, branch))
        header = json.loads(body.decode().splitlines()[0])["value"]
        if header.get("parentCommit") not in (None, self.state.commits(repository, branch)[-1][0]):
            self._json(412, {"error": "the branch has moved"})
            return
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.state.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.state.commit(repository, files, branch)
        self._json(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.state.url}/{repository}/commit/{sha}"})

    # -- files -----------------------------------------------------------------------------------------------------

    def _resolve(self, path: str) -> None:
        kind = "datasets" if path.startswith("datasets/") else "models"
        name, _, rest = path.removeprefix("datasets/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        if f"{kind}/{name}" in self.state.gated:
            return self._json(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        commit = self._find(f"{kind}/{name}", revision)
        if commit is None or file not in commit[1]:
            return self._json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        data = commit[1][file]
        headers = {
            "X-Repo-Commit": commit[0],
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        return self._send(206 if start else 200, data[start:], headers)

    def _lfs_batch(self, wanted: dict[str, Any]) -> None:
        """What is already there is not asked for again. A large file gets an address for each part."""
        objects = []
        multipart = False
        for item in wanted["objects"]:
            oid, size = item["oid"], item["size"]
            found: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.state.blobs or self.state.corrupt_uploads:
                upload: dict[str, Any] = {"href": f"{self.state.url}/lfs/{oid}"}
                if size > self.state.part_bytes:
                    multipart = True
                    count = -(-size // self.state.part_bytes)
                    upload["header"] = {"chunk_size": str(self.state.part_bytes)} | {
                        f"{number:05}": f"{self.state.url}/lfs/{oid}/{number}" for number in range(1, count + 1)
                    }
                found["actions"] = {"upload": upload}
            objects.append(found)
        self._json(200, {"transfer": "multipart" if multipart else "basic", "objects": objects})

    def _upload(self, place: str, body: bytes) -> None:
        oid, _, number = place.partition("/")
        if number:
            kept = body if len(body) <= self.state.kept_bytes // 8 else b""
            size = body.size if isinstance(body, Sparse) else len(body)
            self.state.parts.setdefault(oid, {})[int(number)] = size, kept
            return self._send(200, b"", {"ETag": f'"{number}"'})
        if self.command == "POST":  # the parts are there
            parts = [self.state.parts[oid][item["partNumber"]] for item in json.loads(body)["parts"]]
            if all(len(data) == size for size, data in parts):
                body = b"".join(data for _, data in parts)
            else:
                body = Sparse()
                body.size, body.sha256 = sum(size for size, _ in parts), oid  # type: ignore[attr-defined]
        if isinstance(body, Sparse):
            self.state.blobs[oid] = body
        else:
            self.state.blobs[oid] = body[:-1] + bytes([body[-1] ^ 1]) if self.state.corrupt_uploads else body
        return self._json(200, {})

    def _find(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        return self.state.find(repository, revision)

    def _chunked(self) -> bytes:
        body = b""
        while self.headers.get("Transfer-Encoding") == "chunked":
            size = int(self.rfile.readline().strip() or b"0", 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if size == 0:
                break
        return body

    def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        if self._silent:
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".png", ".model")) else "regular"


def _sibling(name: str, data: bytes) -> dict[str, Any]:
    entry = _entry(name, data)
    return {"rfilename": name, "size": entry["size"], "blobId": entry["oid"]} | (
        {"lfs": {"size": entry["size"], "sha256": entry["lfs"]["oid"], "pointerSize": 130}} if "lfs" in entry else {}
    )


def _entry(name: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": blob}
    if _mode(name) == "lfs":
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    if isinstance(data, Sparse):
        entry |= {"size": data.size, "lfs": {"oid": data.sha256, "size": data.size, "pointerSize": 134}}
    return entry
