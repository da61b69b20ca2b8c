"""A relay before a server, in a process of its own, that counts the requests and bytes that pass."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

_REQUEST = re.compile(rb"(?:GET|PUT|HEAD|POST|DELETE) \S+ HTTP/1\.1\r\n")
_LONGEST = 4096
_PIECE = 1 << 16


@dataclass(frozen=True, slots=True)
class Counts:
    """What passed: requests, and bytes in both directions, headers and signatures among them."""

    requests: int
    num_bytes: int

    def __sub__(self, other: Counts) -> Counts:
        return Counts(self.requests - other.requests, self.num_bytes - other.num_bytes)


@dataclass(frozen=True, slots=True)
class CountingRelay:
    """``endpoint`` leads to the server by way of the relay."""

    endpoint: str
    _counters: Any

    def counts(self) -> Counts:
        """What has passed since the relay began."""
        return Counts(*self._counters)


@contextlib.contextmanager
def counting_relay(server: str, *, host: str = "127.0.0.1") -> Iterator[CountingRelay]:
    """Run a relay before the server with this URL for the length of the block, at an address of this machine."""
    counters, port = multiprocessing.Array("q", 2), multiprocessing.Queue()
    process = multiprocessing.Process(target=_serve, args=(urlsplit(server).netloc, counters, host, port), daemon=True)
    process.start()
    try:
        yield CountingRelay(f"http://{host}:{port.get(timeout=30)}", counters)
    finally:
        process.terminate()
        process.join()


def _serve(server: str, counters: Any, host: str, port: Any) -> None:
    server_host, _, number = server.partition(":")

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back_reader, back_writer = await asyncio.open_connection(server_host, int(number))
        await asyncio.gather(
            _pass_on(reader, back_writer, counters, True), _pass_on(back_reader, writer, counters, False)
        )

    async def run() -> None:
        listener = await asyncio.start_server(relay, host, 0)
        port.put(listener.sockets[0].getsockname()[1])
        async with listener:
            await listener.serve_forever()

    asyncio.run(run())


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counters: Any, asks: bool) -> None:
    tail = b""
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(_PIECE):
            counters[1] += len(piece)
            if asks:
                text = tail + piece
                ends = [found.end() for found in _REQUEST.finditer(text)]
                counters[0] += len(ends)
                tail = text[max(ends[-1] if ends else 0, len(text) - _LONGEST) :]
            writer.write(piece)
            await writer.drain()
    with contextlib.suppress(ConnectionError, RuntimeError):
        writer.close()
