"""On a spot node of EC2: the notice that it is taken back in, Ray's drain of the node out, so that no new task comes to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone

from geoseg.errors import StopError

METADATA = "http://169.254.169.254"
_NOTICE_S = 120.0  # what EC2 gives
_TOKEN_S = 21600
_POLL_S = 5.0
_TIMEOUT_S = 2.0
_TRIES, _PAUSE_S = 5, 3.0


@dataclass(frozen=True, slots=True)
class Notice:
    """What is to become of this node ("terminate", "stop", "hibernate"), and in how many seconds."""

    action: str
    seconds_left: float


class Metadata:
    """The instance metadata service (IMDSv2) of the node that asks."""

    def __init__(self, url: str = METADATA) -> None:
        self._url = url.rstrip("/")
        self._token = ""

    def notice(self) -> Notice | None:
        """The notice, if there is one. A service that does not answer for a moment has none to give."""
        try:
            if not self._token:
                headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_S)}
                self._token = self._ask("PUT", "/latest/api/token", headers)
            told = self._ask("GET", "/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": self._token})
        except urllib.error.HTTPError as error:
            if error.code == 401:  # the token has run out
                self._token = ""
            return None
        except OSError:
            return None
        return _parse(told)

    def _ask(self, method: str, path: str, headers: dict[str, str]) -> str:
        request = urllib.request.Request(self._url + path, method=method, headers=headers)  # noqa: S310 - http, on this very node
        with _without_proxy().open(request, timeout=_TIMEOUT_S) as answer:
            return str(answer.read().decode())


def _without_proxy() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _parse(told: str) -> Notice:
    """A notice that cannot be read is one all the same."""
    try:
        fields = json.loads(told)
        at = datetime.strptime(fields["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
        return Notice(str(fields["action"]), max(0.0, (at - datetime.now(timezone.utc)).total_seconds()))
    except (ValueError, KeyError, TypeError):
        return Notice("terminate", _NOTICE_S)


def watch_notices(metadata: Metadata, drain: Callable[[Notice], None], *, poll_s: float = _POLL_S) -> Notice:
    """Wait for a notice, drain the node, and give the notice back. Raises StopError when Ray does not drain it."""
    while (notice := metadata.notice()) is None:
        time.sleep(poll_s)
    drain(notice)
    return notice


def drain_node(notice: Notice, *, address: str | None = None, node_id: str | None = None) -> None:
    """Have Ray drain a node (this one) of the cluster at ``address`` (this one's): nothing new is placed on it.

    What is at work there goes on until the node is gone. Raises StopError when Ray does not agree after some tries.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", f"spot notice: {notice.action}"]
    command += ["--deadline-remaining-seconds", str(int(notice.seconds_left))]
    command += ["--address", address] if address else []
    command += ["--node-id", node_id] if node_id else []
    for left in reversed(range(_TRIES)):
        done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode == 0:
            return
        if left:
            time.sleep(_PAUSE_S)
    lines = (done.stderr or done.stdout).strip().splitlines()
    raise StopError(f"Ray did not drain this node: {lines[-1] if lines else f'exit code {done.returncode}'}")
