"""An HTTP proxy in front of a real S3 server that fails as networks and loaded servers do."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

FAULTS = ("503", "reset", "delay", "truncated", "flipped down", "flipped up", "response lost", "stale list")
_SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
_HOP = {"connection", "transfer-encoding", "keep-alive"}


class FaultProxy:
    """Forwards to `upstream`. Each request meets one of `faults` with probability `rate`, drawn from `seed`.

    `injected` counts the faults. `bytes_per_second` limits the uploads of all connections together.
    """

    def __init__(
        self,
        upstream: str,
        *,
        rate: float = 0.0,
        seed: int = 0,
        faults: tuple[str, ...] = FAULTS,
        bytes_per_second: float | None = None,
    ) -> None:
        self.upstream, self.rate, self.faults = urlsplit(upstream).netloc, rate, faults
        self.bytes_per_second = bytes_per_second
        self.injected: Counter[str] = Counter()
        self._random, self._lock, self._send_lock = random.Random(seed), threading.Lock(), threading.Lock()
        self._lists: dict[str, tuple[int, list[tuple[str, str]], bytes]] = {}
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def draw(self, method: str, path: str) -> str | None:
        """The fault for this request, if any."""
        with self._lock:
            if self._random.random() >= self.rate:
                return None
            fault = self._random.choice(self.faults)
            possible = {
                "flipped down": method == "GET",
                "truncated": method == "GET",
                "flipped up": method == "PUT",
                "stale list": method == "GET" and path in self._lists,
            }
            if not possible.get(fault, True):
                return None
            self.injected[fault] += 1
            return fault

    def position(self, length: int) -> int:
        with self._lock:
            return self._random.randrange(length)

    def throttle(self, count: int) -> None:
        if self.bytes_per_second:
            with self._send_lock:
                time.sleep(count / self.bytes_per_second)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # the head and body of a response are two writes
    proxy: FaultProxy

    def _serve(self) -> None:
        body = self._body()
        fault = self.proxy.draw(self.command, self.path)
        if fault == "503":
            return self._answer(503, [("Content-Type", "application/xml")], _SLOW_DOWN)
        if fault == "reset":
            return self._reset()
        if fault == "delay":
            time.sleep(self.proxy.position(100) / 500)
        if fault == "stale list":
            return self._answer(*self.proxy._lists[self.path])
        if fault == "flipped up" and body:
            body = self._flipped(body)
        status, headers, data = self._forward(body)
        if fault == "response lost":
            return self._reset()
        if "list-type=2" in self.path and status == 200:
            self.proxy._lists.setdefault(self.path, (status, headers, data))
            if fault is None and self.proxy.position(4) == 0:
                self.proxy._lists[self.path] = (status, headers, data)
        if fault == "flipped down" and data:
            data = self._flipped(data)
        return self._answer(status, headers, data, cut=len(data) // 2 if fault == "truncated" and data else None)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(parts)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.proxy.throttle(len(body))
        return body

    def _flipped(self, data: bytes) -> bytes:
        changed = bytearray(data)
        changed[self.proxy.position(len(data))] ^= 1
        return bytes(changed)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.proxy.upstream, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in (*_HOP, "expect")}
            headers["Content-Length"] = str(len(body))
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, cut: int | None = None) -> None:
        self.send_response_only(status)
        length = str(len(data))
        for name, value in headers:
            if name.lower() == "content-length":
                length = value if self.command == "HEAD" else length
            elif name.lower() not in _HOP:
                self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", length)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(data if cut is None else data[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _reset(self) -> None:
        """Close with a TCP reset, as a router does that has forgotten the connection."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, ValueError, http.client.HTTPException):
            self.close_connection = True

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the connection was reset above
            super().finish()

    def log_message(self, *_: Any) -> None:
        pass
