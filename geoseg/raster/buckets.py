"""Clients of buckets: how long they wait, how often they try, with which credentials; a store's failures become sentences.

Clients send each request once and ``Tries`` sends it again: they would know nothing of an answer that is too short, of a
conflict that passes, of a token that ended before its time, nor of what other threads were told by the same store. Only a
stream of parts is tried again part by part where it is, as its parts are gone when it ends.
"""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from typing import Any

from obstore import exceptions as failures
from obstore.store import AzureStore, GCSStore, S3Store

from geoseg.errors import AccessDeniedError, ConfigError, GeosegError, SceneReadError, StoreError
from geoseg.redaction import redact

SCHEMES = ("s3", "gs", "az")
_WRONG_KEY = (
    "SignatureDoesNotMatch",
    "InvalidAccessKeyId",
    "ExpiredToken",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "AuthenticationFailed",
)
_SLOWER = ("SlowDown", "SlowDownRead", "SlowDownWrite", "ServiceUnavailable", "Throttling", "RequestLimitExceeded")
_PASSES = (
    "ConditionalRequestConflict",
    "OperationAborted",
    "BadDigest",
    "XAmzContentSHA256Mismatch",
    "XAmzContentChecksumMismatch",
    "IncompleteBody",
    "RequestTimeout",
    "InternalError",
)
_NO_ACCESS = "access denied; check the credentials and the bucket's policy"
CHANGED = "was changed by somebody else in the meantime"
Environment = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long a connection and a whole request may take, how often one is tried, and for how long, with which pauses.

    What a store asks to slow down is tried as long as it may be, however often.
    """

    connect_s: float = 10.0
    request_s: float = 60.0
    num_tries: int = 9
    tries_s: float = 90.0
    first_pause_s: float = 0.1
    longest_pause_s: float = 15.0


LIMITS = Limits()


class ObjectExistsError(GeosegError):
    """A create-only write found an object in its place, or a conditional one found another version."""


class ObjectMissingError(SceneReadError):
    """There is no object of this name."""


class DamagedAnswerError(Exception):
    """An answer that came to its end and is not the object: too short, or other bytes than the store's own sum says."""


def environment() -> Environment:
    """The variables that say which stores there are and who asks."""
    return tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith(("AWS_", "GOOGLE_", "AZURE_"))))


class _Pace:
    """How many requests a second all threads of the process send to a store together, once it has told one to slow down.

    The rate is halved each time and grows steadily, as TCP's does (additive increase, multiplicative decrease: Chiu and Jain
    1989). Threads that are told at once count once: only a request that was sent after the last slowing down halves it again.
    """

    _GROWS = 100.0  # requests a second, each second
    _LEAST, _FREE = 1.0, 2000.0

    def __init__(self) -> None:
        self._rate = self._FREE
        self._next = self._slowed_at = self._grown_at = self._counted_from = 0.0
        self._num_counted = 0
        self._lock = threading.Lock()

    def wait(self) -> float:
        """Wait for a turn; the moment at which the request may be sent."""
        with self._lock:
            now = time.monotonic()
            if now - self._counted_from > 1:
                self._counted_from, self._num_counted = now, 0
            self._num_counted += 1
            self._rate = min(self._FREE, self._rate + self._GROWS * (now - self._grown_at))
            self._grown_at = now
            if self._rate == self._FREE:
                return now
            turn = max(now, self._next)
            self._next = turn + 1 / self._rate
        time.sleep(turn - now)
        return turn

    def slow_down(self, sent_at: float) -> None:
        """A request that was sent at this moment came too soon."""
        with self._lock:
            if sent_at < self._slowed_at:
                return
            now = time.monotonic()
            if self._rate == self._FREE:
                self._rate = self._num_counted / max(0.1, now - self._counted_from)
            self._rate = max(self._LEAST, min(self._FREE, self._rate) / 2)
            self._slowed_at = self._grown_at = now


@lru_cache(maxsize=64)
def _pace(_store: str) -> _Pace:
    return _Pace()


class _Credentials:
    """boto3's chain in one environment: what it gives now, and walked anew when the store says that this is over.

    obstore asks it ten times a second at most, as what it gives is said to end soon; botocore knows when it does and gets new
    ones before. With a longer time obstore would go on with a token that has ended.
    """

    _KEPT = timedelta(seconds=1)

    def __init__(self) -> None:
        self.generation = 0
        self._lock = threading.Lock()
        self._walk()

    def _walk(self) -> None:
        import boto3
        from botocore.exceptions import BotoCoreError

        try:
            self.session = boto3.Session()
            self.found = self.session.get_credentials()
            self._given = self.found.get_frozen_credentials() if self.found else None
        except BotoCoreError as error:
            raise AccessDeniedError(f"the AWS credentials cannot be had: {redact(str(error))}") from error

    def __call__(self) -> Any:
        """What obstore wants of a provider of credentials."""
        now = self.found.get_frozen_credentials()
        return {
            "access_key_id": now.access_key,
            "secret_access_key": now.secret_key,
            "token": now.token,
            "expires_at": datetime.now(timezone.utc) + self._KEPT,
        }

    def renew(self, generation: int) -> bool:
        """Walk the chain anew, unless another thread has since that generation; whether other credentials are there now."""
        with self._lock:
            if generation != self.generation:
                return True
            before = self._given
            self._walk()
            if self._given == before:
                return False
            self.generation += 1
            return True


@lru_cache(maxsize=4)
def _credentials(_environment: Environment, _pid: int) -> _Credentials:
    return _Credentials()


def _here(bucket_uri: str) -> _Credentials:
    """Of this process: after a fork two would share locks that one of them held."""
    try:
        return _credentials(environment(), os.getpid())
    except AccessDeniedError as error:
        raise AccessDeniedError(f"{bucket_uri}: {error}") from error


def bucket(uri: str, *, stream: bool = False) -> Any:
    """The store of a URI's bucket as obstore has it; with ``stream`` one that tries each part of an upload again itself.

    Raises AccessDeniedError when there are no credentials.
    """
    scheme, _, rest = uri.partition("://")
    name = rest.partition("/")[0]
    if scheme != "s3":
        return _other_bucket(scheme, name, environment(), stream, LIMITS)
    credentials = _here(f"s3://{name}")
    return _s3_bucket(name, environment(), os.getpid(), credentials.generation, stream, LIMITS)


def _client_settings(limits: Limits, *, stream: bool) -> dict[str, Any]:
    """What all of obstore's stores take."""
    pauses = {
        "init_backoff": timedelta(seconds=limits.first_pause_s),
        "max_backoff": timedelta(seconds=limits.longest_pause_s),
    }
    tries = {"max_retries": limits.num_tries - 1 if stream else 0, "retry_timeout": timedelta(seconds=limits.tries_s)}
    times = {"timeout": timedelta(seconds=limits.request_s), "connect_timeout": timedelta(seconds=limits.connect_s)}
    return {"client_options": times, "retry_config": {**tries, "backoff": pauses}}


@lru_cache(maxsize=64)
def _other_bucket(scheme: str, name: str, _environment: Environment, stream: bool, limits: Limits) -> Any:  # noqa: FBT001
    settings = _client_settings(limits, stream=stream)
    try:
        return GCSStore(name, **settings) if scheme == "gs" else AzureStore(container_name=name, **settings)
    except failures.BaseError as error:
        raise AccessDeniedError(
            f"{scheme}://{name}: the credentials in the environment cannot be used: {redact(str(error)).splitlines()[0]}"
        ) from error


@lru_cache(maxsize=64)
def _s3_bucket(
    name: str,
    _environment: Environment,
    _pid: int,
    _generation: int,
    stream: bool,  # noqa: FBT001
    limits: Limits,
) -> Any:
    credentials = _here(f"s3://{name}")
    settings = {**_client_settings(limits, stream=stream), "region": credentials.session.region_name or "us-east-1"}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        settings["endpoint"] = endpoint
        settings["client_options"]["allow_http"] = endpoint.startswith("http://")
    if _is_unsigned():
        settings["skip_signature"] = True
    elif credentials.found is None:
        raise AccessDeniedError(
            f"s3://{name}: no AWS credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, "
            "give the machine a role, or set AWS_NO_SIGN_REQUEST=YES for a public bucket"
        )
    else:
        settings["credential_provider"] = credentials
    return S3Store(name, **settings)


def _is_unsigned() -> bool:
    return os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "yes", "true")


def s3_client(uri: str) -> Any:
    """boto3's client of S3, for what obstore does not do with a URI. Raises AccessDeniedError when there are no credentials."""
    credentials = _here(uri)
    return _s3_client(environment(), os.getpid(), credentials.generation, LIMITS)


@lru_cache(maxsize=4)
def _s3_client(_environment: Environment, _pid: int, _generation: int, limits: Limits) -> Any:
    """One for each process: after a fork two would talk over one connection."""
    from botocore import UNSIGNED
    from botocore.config import Config

    session = _here("s3://").session
    config = Config(
        s3={"addressing_style": "path"},
        signature_version=UNSIGNED if _is_unsigned() else None,
        connect_timeout=limits.connect_s,
        read_timeout=limits.request_s,
        retries={"mode": "standard", "total_max_attempts": 1},
        request_checksum_calculation="when_required",  # else each sum would have to be kept until the end of an upload
    )
    return session.client("s3", region_name=session.region_name or "us-east-1", config=config)


class Tries:
    """The tries of one request about ``uri``: which failure another one may mend, and when it may be sent.

    ``action`` is what it does, for the sentence; ``denied`` the kind of error for a refusal that blames no key. What is no
    bucket is asked once.
    """

    def __init__(self, uri: str, action: str, *, denied: type[GeosegError] = AccessDeniedError) -> None:
        self.num_failed = 0
        self._uri, self._action, self._denied = uri, action, denied
        scheme, _, rest = uri.partition("://")
        self._bucket = f"{scheme}://{rest.partition('/')[0]}" if scheme in SCHEMES and rest else ""
        self._pace = _pace(self._bucket)
        self._began = time.monotonic()
        self._has_renewed = False
        self._generation = 0
        self._sent_at = 0.0

    def run(self, request: Callable[[], Any]) -> Any:
        """What ``request`` gives, in the end. Raises what ``failed`` raises."""
        while True:
            self.begin()
            try:
                answer = request()
            except GeosegError:
                raise
            except Exception as error:  # noqa: BLE001 - ``failed`` sorts them
                self.failed(error)
            else:
                self.went_well()
                return answer

    def begin(self) -> None:
        """A try begins: wait until the store wants to be asked."""
        if self._bucket:
            self._sent_at = self._pace.wait()
            self._generation = _here(self._bucket).generation if self._bucket.startswith("s3:") else 0

    def went_well(self) -> None:
        """The store has answered; what follows begins to count anew."""
        self.num_failed, self._began = 0, time.monotonic()

    def failed(self, error: Exception) -> None:
        """Pause when another try may do; else raise what went wrong, as an error of ours (or as it is, if it is no store's)."""
        if not _is_of_a_store(error):
            raise error
        limits, code, status = LIMITS, *_told(error)
        is_slow = status in (429, 503) or code in _SLOWER
        if self._bucket and code == "ExpiredToken" and not self._has_renewed:
            self._has_renewed = True
            if _here(self._bucket).renew(self._generation):
                return
        seconds = time.monotonic() - self._began
        is_over = seconds > limits.tries_s or (self.num_failed + 1 >= limits.num_tries and not is_slow)
        if not self._bucket or is_over or not (is_slow or _passes(error, code, status)):
            raise _as_ours(error, redact(self._uri), self._action, self._denied) from error
        self.num_failed += 1
        if is_slow:
            self._pace.slow_down(self._sent_at)
        longest = min(limits.longest_pause_s, limits.first_pause_s * 2**self.num_failed)
        time.sleep(random.uniform(limits.first_pause_s, longest))


def _is_of_a_store(error: Exception) -> bool:
    return isinstance(error, (failures.BaseError, DamagedAnswerError, OSError, ValueError)) or type(
        error
    ).__module__.startswith(("botocore.", "boto3."))


def _told(error: Exception) -> tuple[str, int]:
    """S3's word for what is wrong, and the HTTP status; "" and 0 where none was told."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return str(response["Error"].get("Code", "")), int(response["ResponseMetadata"]["HTTPStatusCode"])
    text = str(error)
    code = re.search(r"(?:<Code>|\(code: )(\w+)", text)  # the second of one of several that were to be deleted
    status = re.search(r"Server returned non-2xx status code: (\d{3})", text)
    return (code[1] if code else ""), (int(status[1]) if status else 0)


def _passes(error: Exception, code: str, status: int) -> bool:
    """Whether another try may go better."""
    if status or code:
        return status >= 500 or status == 408 or code in _PASSES
    if isinstance(error, failures.BaseError):  # no answer, a part of one, or one that makes no sense
        return type(error) is failures.GenericError
    return isinstance(error, DamagedAnswerError) or _is_of_the_way(error)


def _is_of_the_way(error: Exception) -> bool:
    """Whether boto3 says that it got no answer or a part of one."""
    if not type(error).__module__.startswith("botocore."):
        return False
    from botocore.exceptions import HTTPClientError, IncompleteReadError, ResponseStreamingError

    return isinstance(error, (HTTPClientError, IncompleteReadError, ResponseStreamingError))


_KINDS: tuple[tuple[tuple[type[Exception], ...], type[GeosegError], str], ...] = (
    (
        (FileNotFoundError, NotADirectoryError, failures.NotFoundError),
        ObjectMissingError,
        "there is no such file or object",
    ),
    ((failures.AlreadyExistsError, FileExistsError), ObjectExistsError, "exists already"),
    ((failures.PreconditionError,), ObjectExistsError, CHANGED),
    ((failures.UnauthenticatedError,), AccessDeniedError, _NO_ACCESS),
    (
        (failures.InvalidPathError,),
        ConfigError,
        "holds a name that cannot be listed (an empty part, '.', '..', a control character); rename it, or list scenes in a .txt",
    ),
)


def _as_ours(error: Exception, name: str, action: str, denied: type[GeosegError]) -> GeosegError:
    text = str(error).strip()
    code, status = _told(error)
    if code == "NoSuchBucket":
        return ConfigError(f"{name}: there is no such bucket")
    if code == "NoSuchUpload":
        return ObjectMissingError(f"{name}: there is no such upload any more")
    if code in _WRONG_KEY:
        return AccessDeniedError(f"{name}: {_NO_ACCESS} ({code})")
    if isinstance(error, (PermissionError, failures.PermissionDeniedError)) or code == "AccessDenied" or status == 403:
        return denied(f"{name}: {_NO_ACCESS}" + (f" ({code})" if code else ""))
    for kinds, ours, sentence in _KINDS:
        if isinstance(error, kinds) and code not in _PASSES:
            return ours(f"{name}: {sentence}")
    first_line = redact(text.splitlines()[0]) if text else type(error).__name__
    return StoreError(f"{name}: the store failed on {action}: {first_line}")
