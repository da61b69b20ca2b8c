"""A loopback proxy before an S3 server that loses some of the answers, or what some headers ask for."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass
class LossyProxy:
    """``loses`` is asked after each request (method, path) was answered; ``lost`` lists those whose answer was lost."""

    endpoint: str
    loses: Callable[[str, str], bool]
    lost: list[tuple[str, str]] = field(default_factory=list)


@contextlib.contextmanager
def lossy_proxy(
    server: str, loses: Callable[[str, str], bool], *, without: tuple[str, ...] = ()
) -> Iterator[LossyProxy]:
    """Run a proxy before the server with this URL for the length of the block; headers ``without`` do not get through."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            upstream = http.client.HTTPConnection(urlsplit(server).netloc, timeout=30)
            headers = {name: value for name, value in self.headers.items() if name.lower() not in without}
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
            content = answer.read()
            upstream.close()
            if loses(self.command, self.path):
                proxy.lost.append((self.command, self.path))
                self.close_connection = True
                return
            self.send_response_only(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward  # noqa: N815 - http.server's names

        def log_message(self, *_: object) -> None:
            """Keep the tests' output to themselves."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        listener.daemon_threads = True
        proxy = LossyProxy(f"http://127.0.0.1:{listener.server_address[1]}", loses)
        serving = threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True)
        serving.start()
        try:
            yield proxy
        finally:
            listener.shutdown()
            serving.join()
