"""EC2's instance metadata service on loopback, as far as spot notices go: IMDSv2 alone, with tokens that run out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class MetadataService:
    """``notice`` is the body of the notice, None as long as there is none; ``asked`` lists method, path and status."""

    def __init__(self) -> None:
        self.notice: str | None = None
        self.asked: list[tuple[str, str, int]] = []
        self.url = ""
        self._tokens: set[str] = set()
        self._count = 0

    def forget_tokens(self) -> None:
        """Let all tokens run out."""
        self._tokens.clear()

    def answer(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        """Status and body."""
        if (method, path) == ("PUT", "/latest/api/token"):
            if not headers.get("x-aws-ec2-metadata-token-ttl-seconds", "").isdigit():
                return 400, ""
            self._count += 1
            self._tokens.add(f"token-{self._count}")
            return 200, f"token-{self._count}"
        if headers.get("x-aws-ec2-metadata-token") not in self._tokens:
            return 401, ""
        if (method, path) == ("GET", "/latest/meta-data/spot/instance-action") and self.notice is not None:
            return 200, self.notice
        return 404, ""


@contextmanager
def metadata_service() -> Iterator[MetadataService]:
    """Serve for the length of the block."""
    service = MetadataService()

    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            status, body = service.answer(
                self.command, self.path, {name.lower(): value for name, value in self.headers.items()}
            )
            service.asked.append((self.command, self.path.rpartition("/")[2], status))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_PUT = _reply  # noqa: N815 - the names that http.server looks for

        def log_message(self, *told: object) -> None:
            del told

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
