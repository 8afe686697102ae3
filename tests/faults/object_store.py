"""A local server that speaks enough of S3 to be read from, and fails as it is told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class ObjectStore(ThreadingHTTPServer):
    """Serves `root/BUCKET/KEY`.

    `faults` has, for a part of a file's name, what befalls the next requests of it, the last for ever: "ok", "500",
    "stall" (no answer), "short" (the connection ends early), "noise" (other bytes of the same number).
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.faults: dict[str, list[str]] = {}
        self.requests: list[str] = []
        self.lock = threading.Lock()

    def fault(self, path: str) -> str:
        with self.lock:
            self.requests.append(path)
            for name, coming in self.faults.items():
                if name in path:
                    return coming.pop(0) if len(coming) > 1 else coming[0]
        return "ok"


class _Handler(BaseHTTPRequestHandler):
    server: ObjectStore

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self, body: bool) -> None:
        path = self.server.root / self.path.split("?")[0].lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        fault = self.server.fault(self.path) if body else "ok"
        content = path.read_bytes()
        if fault == "stall":
            time.sleep(10)
            return
        if fault == "500":
            self.send_error(500)
            return
        if fault == "noise":
            content = bytes(byte ^ 0x5A for byte in content)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", '"x"')
        self.send_header("Last-Modified", "Fri, 27 Nov 2026 00:00:00 GMT")
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if fault == "short" else content)
            self.close_connection = True


@contextmanager
def serving(root: Path) -> Iterator[ObjectStore]:
    """Serve while this is open."""
    store = ObjectStore(root)
    thread = threading.Thread(target=store.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield store
    finally:
        store.shutdown()
        store.server_close()
