"""An in-memory Hub that speaks the Hub's real protocol over a socket, as far as huggingface_hub needs it here.

Repositories are commits of {path: bytes}. `refuse` makes every call fail with a status. `gated` names repositories that
answer 403 with the Hub's own error code. `corrupt_uploads` flips a byte of every upload.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class FakeHub:
    """Use as a context manager. Set HF_ENDPOINT to `url`."""

    def __init__(self) -> None:
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.blobs: dict[str, bytes] = {}
        self.refuse: int | None = None
        self.gated: set[str] = set()
        self.writable = True
        self.corrupt_uploads = False
        self.requests: list[tuple[str, str, str | None]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_for(self))
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

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        commits = self.repositories.setdefault(name, [])
        sha = hashlib.sha1(f"{name}{len(commits)}{sorted(files)}".encode()).hexdigest()
        commits.append((sha, dict(files)))
        return sha

    def files(self, name: str) -> dict[str, bytes]:
        return self.repositories[name][-1][1]


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

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self._chunked()
        self.state.requests.append((self.command, path, self.headers.get("Authorization")))
        if self.state.refuse is not None:
            return self._json(self.state.refuse, {"error": "refused by the test"})
        if path.startswith("/api/"):
            return self._api(path.removeprefix("/api/"), body)
        if "/resolve/" in path:
            return self._resolve(path.lstrip("/"))
        if path.endswith("/info/lfs/objects/batch"):
            return self._lfs_batch(json.loads(body))
        if path.startswith("/lfs/"):
            oid = path.removeprefix("/lfs/")
            self.state.blobs[oid] = body[:-1] + bytes([body[-1] ^ 1]) if self.state.corrupt_uploads else body
            return self._json(200, {})
        return self._json(404, {"error": path})

    # -- /api ------------------------------------------------------------------------------------------------------

    def _api(self, path: str, body: bytes) -> None:
        if path == "validate-yaml":
            return self._json(200, {"errors": [], "warnings": []})
        if path == "repos/create":
            return self._create(json.loads(body))
        kind, user, name, *rest = path.split("/")
        repository = f"{kind}/{user}/{name}"
        if repository in self.state.gated:
            return self._json(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        if repository not in self.state.repositories:
            return self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
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
            return self._commit(repository, body)
        commit = self._find(repository, rest[1] if len(rest) > 1 else "main")
        if commit is None:
            return self._json(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        sha, files = commit
        if rest and rest[0] == "tree":
            return self._json(200, [_entry(name, data) for name, data in sorted(files.items())])
        siblings = [{"rfilename": name, "size": len(data)} for name, data in sorted(files.items())]
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

    def _commit(self, repository: str, body: bytes) -> None:
        files = dict(self.state.files(repository))
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.state.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.state.commit(repository, files)
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
        objects = [
            {
                "oid": item["oid"],
                "size": item["size"],
                "actions": {"upload": {"href": f"{self.state.url}/lfs/{item['oid']}"}},
            }
            for item in wanted["objects"]
        ]
        self._json(200, {"transfer": "basic", "objects": objects})

    def _find(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.state.repositories.get(repository, [])
        return (
            commits[-1]
            if revision == "main" and commits
            else next((item for item in commits if item[0] == revision), None)
        )

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
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".png", ".model")) else "regular"


def _entry(name: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": blob}
    if _mode(name) == "lfs":
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry
