"""The listener and its connections: reads requests, carries faults out, counts bytes."""

from __future__ import annotations

import socket
import struct
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import TYPE_CHECKING, Any

from .calls import Answer, Dropped, Request, refusal
from .faults import Action, Corrupt, CutDownload, CutUpload, LoseAnswer, Refuse, Truncate

if TYPE_CHECKING:
    from .standin import HubStandIn

_CHUNK = 1 << 16


class Server(ThreadingHTTPServer):
    """One listener with its connections."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, hub: HubStandIn, port: int) -> None:
        self.hub = hub
        self.resets: set[socket.socket] = set()
        self._open: dict[socket.socket, threading.Thread] = {}
        self._guard = threading.Lock()
        self._closed = False
        super().__init__(("127.0.0.1", port), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), name="hub-standin", daemon=True)
        self._thread.start()

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's own looks the host's name up
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        with self._guard:
            self._open[request] = threading.current_thread()
            if self._closed:
                request.shutdown(socket.SHUT_RDWR)
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._guard:
                self._open.pop(request, None)

    def shutdown_request(self, request: Any) -> None:
        if request in self.resets:
            self.resets.discard(request)
            _wait_until_sent(request)
            request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.close()
        else:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = traceback.format_exc()
        if "ConnectionResetError" not in error and "BrokenPipeError" not in error:
            self.hub.errors.append(error)

    def drop_all(self) -> None:
        """End all connections, and wait until they have ended."""
        with self._guard:
            connections = dict(self._open)
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in connections.values():
            thread.join(1)

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()
        with self._guard:
            self._closed = True
        self.drop_all()


def _wait_until_sent(connection: socket.socket) -> None:
    """Wait until the other side has all that was sent: a reset would throw away what is still on its way."""
    import fcntl
    import termios

    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        if struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, b"\0" * 4))[0] == 0:
            return
        time.sleep(0.001)


class _Handler(BaseHTTPRequestHandler):
    """One connection: reads requests, meets faults, counts bytes."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def handle(self) -> None:
        try:
            super().handle()
        except Dropped as dropped:
            if dropped.reset:
                self.server.resets.add(self.connection)
        except OSError:
            pass  # the client went away

    def finish(self) -> None:
        with suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def serve(self) -> None:
        hub = self.server.hub
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.record = Request(self.command, self.path, headers)
        hub.requests.append(self.record)
        fault = hub.faults.match(self.command, self.path)
        body = self._read_body(headers, fault.after if isinstance(fault, CutUpload) else None)
        if isinstance(fault, Refuse):
            answer = refusal(fault.status, fault.message, fault.code, {})
            answer = Answer(answer.status, answer.body, {**answer.headers, **fault.headers})
        else:
            answer = hub.answer(self.command, self.path, headers, body)
        if isinstance(fault, LoseAnswer):
            raise Dropped(fault.reset)
        self._send(_spoil(answer, fault), fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve  # noqa: N815

    def _read_body(self, headers: Mapping[str, str], cut: int | None) -> bytes:
        """The request's body. Raises Dropped where a fault or the budget ends it."""
        if self.server.hub.wire.broken:
            self._drop(unread=int(headers.get("content-length", "0")) > 0 or "transfer-encoding" in headers)
        read = bytearray()
        for size in self._pieces(headers):
            left = size
            while left:
                wanted = min(left, _CHUNK) if cut is None else min(left, _CHUNK, cut - len(read))
                allowed, _ = self.server.hub.wire.take(wanted)
                piece = self.rfile.read(allowed)
                read += piece
                self.record.received += len(piece)
                left -= len(piece)
                if len(piece) < allowed:
                    raise Dropped(reset=False)  # the client went away
                if (allowed < wanted) or len(read) == cut:
                    self._drop(unread=True)
        if cut is not None:
            self._drop(unread=False)
        return bytes(read)

    def _pieces(self, headers: Mapping[str, str]) -> Iterable[int]:
        """The sizes of the body's pieces; each is to be read before the next is asked for."""
        if headers.get("transfer-encoding", "").lower() != "chunked":
            yield int(headers.get("content-length", "0"))
            return
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            yield size
            self.rfile.readline()
        self.rfile.readline()

    def _send(self, answer: Answer, fault: Action | None) -> None:
        wire = self.server.hub.wire
        if wire.broken:
            self._drop(unread=False)
        self.record.status = answer.status
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        whole = memoryview(answer.body)
        body = whole[: fault.after] if isinstance(fault, CutDownload) else whole
        while body:
            wanted = min(len(body), _CHUNK)
            allowed, broken = wire.take(wanted)
            self.record.sent += allowed
            self.wfile.write(body[:allowed])
            body = body[allowed:]
            if broken:
                self._drop(unread=False)
        if isinstance(fault, CutDownload):
            raise Dropped(fault.reset)

    def _drop(self, *, unread: bool) -> None:
        """End the connection. What the client still sends makes it a reset in any case; then always, to be the same."""
        raise Dropped(unread or self.server.hub.wire.reset)


def _spoil(answer: Answer, fault: Action | None) -> Answer:
    if isinstance(fault, Truncate):
        return Answer(answer.status, answer.body[: fault.keep], answer.headers)
    if isinstance(fault, Corrupt) and answer.body:
        body = bytearray(answer.body)
        body[fault.at] ^= 0xFF
        return Answer(answer.status, bytes(body), answer.headers)
    return answer
