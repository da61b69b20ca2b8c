"""S3 servers for tests on 127.0.0.1: the real one of ``infra/object-store.sh``, and moto's mock as a process."""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import boto3
from botocore.client import BaseClient
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

SCRIPT = Path(__file__).resolve().parents[2] / "infra" / "object-store.sh"
REGION = "us-east-1"
# Below the ports that Linux gives to outgoing connections, so that none takes a server's port while it restarts.
PORTS = range(20000, 32000)


class ServerError(RuntimeError):
    """A server did not start, stop or answer as it should."""


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """A Ceph RADOS Gateway with its objects in ``directory``; it serves from ``start`` to ``stop`` or ``kill9``."""

    directory: Path
    port: int
    monitor_port: int
    key: str = "geoseg-test"
    secret: str = field(default_factory=secrets.token_hex, repr=False)

    @classmethod
    def on_free_ports(cls, directory: Path) -> ObjectStore:
        """Return a store, not started yet, on ports that nothing listens on now."""
        port, monitor_port = free_ports(2)
        return cls(directory, port, monitor_port)

    @property
    def endpoint(self) -> str:
        """The URL of the server."""
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """Return the variables by which S3 clients find the server and sign for it."""
        return client_environment(self.endpoint, self.key, self.secret)

    def start(self, *, timeout_s: float = 60) -> None:
        """Start the server, over the objects it had, and return when it makes buckets; no harm if it runs already.

        Raises ServerError when it does not start, or makes no bucket within ``timeout_s`` after that.
        """
        self._run("start")
        give_up = time.monotonic() + timeout_s
        while not self._makes_buckets():
            if time.monotonic() > give_up:
                raise ServerError(
                    f"{self.endpoint} made no bucket in {timeout_s} s; see the logs in {self.directory}/log"
                )
            time.sleep(0.2)

    def make_bucket(self, name: str) -> None:
        """Make a bucket; one that is there already is left as it is."""
        self._client().create_bucket(Bucket=name)

    def stop(self) -> None:
        """End the server in good order; the objects stay."""
        self._run("stop")

    def kill9(self) -> None:
        """End the server by SIGKILL, as a crash would; the objects stay."""
        self._run("kill9")

    def wipe(self) -> None:
        """End the server and delete its directory."""
        self._run("wipe")

    def _makes_buckets(self) -> bool:
        try:
            self.make_bucket("ready")
            self._client().delete_bucket(Bucket="ready")
        except (BotoCoreError, ClientError):
            return False
        return True

    def _client(self) -> BaseClient:
        config = Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, read_timeout=30)
        session = boto3.Session(self.key, self.secret, region_name=REGION)
        return session.client("s3", endpoint_url=self.endpoint, config=config)

    def _run(self, command: str) -> None:
        settings = {
            "AK": self.key,
            "SK": self.secret,
            "GEOSEG_S3_PORT": str(self.port),
            "GEOSEG_S3_MON_PORT": str(self.monitor_port),
        }
        done = subprocess.run(
            [str(SCRIPT), command, str(self.directory)],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        if done.returncode != 0:
            raise ServerError(f"{SCRIPT.name} {command} ended with status {done.returncode}: {done.stderr.strip()}")


@contextlib.contextmanager
def running_store(directory: Path) -> Iterator[ObjectStore]:
    """Run the real server, empty at first, with its objects in ``directory``, for the length of the block; then all is wiped."""
    store = ObjectStore.on_free_ports(directory)
    try:
        store.start()
        yield store
    finally:
        store.wipe()


def deny(bucket: str, action: str, *resources: str) -> None:
    """Deny an action on a bucket (no resource) or on some of its keys; the ``AWS_*`` variables lead to its server."""
    arns = [f"arn:aws:s3:::{bucket}/{key}" for key in resources] or [f"arn:aws:s3:::{bucket}"]
    statement = {"Effect": "Deny", "Principal": "*", "Action": [action], "Resource": arns}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    boto3.Session().client("s3").put_bucket_policy(Bucket=bucket, Policy=policy)


def is_installed() -> bool:
    """Return whether the programs of the real server are on this machine."""
    return all(shutil.which(program) for program in ("ceph-mon", "ceph-osd", "radosgw"))


@contextlib.contextmanager
def moto_server(*, timeout_s: float = 30) -> Iterator[dict[str, str]]:
    """Run moto's mock S3, empty and in memory, for the length of the block; yield the variables for its clients.

    It takes any key and signature. Raises ServerError when it does not answer within ``timeout_s``.
    """
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            give_up = time.monotonic() + timeout_s
            while not is_open(port):
                if process.poll() is not None or time.monotonic() > give_up:
                    log.seek(0)
                    raise ServerError(f"moto did not serve on port {port}: {log.read().decode(errors='replace')}")
                time.sleep(0.05)
            yield client_environment(f"http://127.0.0.1:{port}", "any", "any")
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def client_environment(endpoint: str, key: str, secret: str) -> dict[str, str]:
    """Return the variables by which S3 clients find ``endpoint`` and keep off this user's own files of credentials."""
    return {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


def free_ports(count: int) -> list[int]:
    """Return that many different ports of 127.0.0.1 on which nothing listens now."""
    free = (port for port in random.sample(PORTS, len(PORTS)) if not is_open(port))
    return [next(free) for _ in range(count)]


def is_open(port: int) -> bool:
    """Return whether something on 127.0.0.1 accepts connections on ``port``."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
