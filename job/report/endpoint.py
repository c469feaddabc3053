"""The small web server of the supervisor: metrics and a health check, for scrapers and probes.

It runs in the process that holds the lease, so nobody outside may make it hold threads or file descriptors for long:
a connection has seconds to ask, there are few at a time, and when there are too many the oldest gives way.
"""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

MOST_CONNECTIONS = 32
_SECONDS = 5.0  # to send the request, between two of its bytes

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def serve(address: str, port: int, application: Application) -> socketserver.BaseServer:
    """Answer from a thread until the process ends. Raises OSError if the address or the port cannot be used."""
    server = make_server(address, port, application, _Server, _Handler)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self._open: OrderedDict[int, socket.socket] = OrderedDict()
        self._lock = threading.Lock()
        super().__init__(*arguments, **named)

    def server_bind(self) -> None:
        """As WSGIServer does, without the look-up of the host's name, which may wait for a name server."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            while len(self._open) >= MOST_CONNECTIONS:
                _, oldest = self._open.popitem(last=False)
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # its thread wakes up and ends
            self._open[id(request)] = request
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(id(request), None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away or sends nonsense is not news."""


class _Handler(WSGIRequestHandler):
    timeout = _SECONDS

    def address_string(self) -> str:
        return str(self.client_address[0])

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: a probe every few seconds is not news."""
