"""Machines that are none: network namespaces with an address each, joined to this one by a bridge. They share its files."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest


@dataclass(frozen=True, slots=True)
class Machine:
    """Its name and its address; ``command`` is what runs a program there, ``cable`` is this machine's end of its network."""

    name: str
    address: str
    cable: str

    def command(self, *words: str) -> list[str]:
        """The words of a command as they are run on the machine."""
        return ["ip", "netns", "exec", self.name, *words]

    @contextlib.contextmanager
    def cut_off(self) -> Iterator[None]:
        """Within the block nothing reaches it and it reaches nothing; connections are not closed, as when a cable is pulled."""
        _ip("link", "set", self.cable, "down")
        try:
            yield
        finally:
            _ip("link", "set", self.cable, "up")


@contextlib.contextmanager
def machines(num: int) -> Iterator[tuple[str, list[Machine]]]:
    """Make machines for the length of the block; yield also the address at which they find this one.

    Skips the test where namespaces cannot be made.
    """
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the program ip (package iproute2)")
    unique = os.getpid() % 10_000
    bridge, net = f"gs{unique}b", f"10.231.{unique % 250}"
    made = [Machine(f"gs{unique}n{number}", f"{net}.{10 + number}", f"gs{unique}o{number}") for number in range(num)]
    with contextlib.ExitStack() as undo:
        _make(undo, ["link", "add", bridge, "type", "bridge"], ["link", "del", bridge])
        _ip("addr", "add", f"{net}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for number, machine in enumerate(made):
            outer, inner = machine.cable, f"gs{unique}i{number}"
            _make(undo, ["netns", "add", machine.name], ["netns", "del", machine.name])
            _ip("link", "add", outer, "type", "veth", "peer", "name", inner)  # goes with its namespace
            _ip("link", "set", outer, "master", bridge)
            _ip("link", "set", inner, "netns", machine.name)
            _ip("link", "set", outer, "up")
            _ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", inner)
            _ip("-n", machine.name, "link", "set", inner, "up")
            _ip("-n", machine.name, "link", "set", "lo", "up")
        yield f"{net}.1", made


def _make(undo: contextlib.ExitStack, words: list[str], back: list[str]) -> None:
    _ip(*words)
    undo.callback(_ip, *back)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"ip {' '.join(words)} does not work here: {done.stderr.strip()}")
