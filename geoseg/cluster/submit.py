"""A job file to a Ray cluster through its job API: handed in once a night, followed, asked after, stopped."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import ray
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from geoseg.errors import AccessDeniedError, ConfigError, OutputHeldError, StopError
from geoseg.jobfile import JobFile, Kind

_COMMANDS: dict[Kind, tuple[str, ...]] = {
    "nightly": ("nightly", "--address", "auto"),
    "predict": ("predict", "--address", "auto", "--config"),
    "train": ("train", "--address", "auto"),
    "evaluate": ("evaluate", "--address", "auto"),
}
_POLL_S = 2.0
_NO_NODE_YET_S = 60.0
_TRIES = 5  # in a row without a new line, while a job is followed
_DROPPED: tuple[type[Exception], ...] = (RuntimeError, OSError)  # how a connection to a log ends before its time
with suppress(ImportError):  # without the extra Ray's client says what is missing
    import aiohttp

    _DROPPED += (aiohttp.ClientError,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A job as the cluster tells it. ``exit_code``: that of the job's process; None while it runs."""

    id: str
    status: str
    message: str
    exit_code: int | None

    def line(self) -> str:
        """One line for a person."""
        return f"{self.id}: {self.status.lower()}" + (f". {self.message}" if self.message else "")


class Cluster:
    """A Ray cluster's job API. ``address`` is that of its dashboard: ``http://head:8265``.

    With token authentication the token comes from ``RAY_AUTH_TOKEN``, the file that ``RAY_AUTH_TOKEN_PATH`` names, or
    ``~/.ray/auth_token``. Raises AccessDeniedError without the right one, StopError when nothing answers.
    """

    def __init__(self, address: str) -> None:
        if not address.startswith(("http://", "https://")):
            raise ConfigError(
                f"--address {address}: jobs are submitted to the dashboard of a cluster, for example http://head:8265"
            )
        self.address = address
        _use_token()
        with self._told("reach it"):
            self._client = JobSubmissionClient(address)

    def submit(self, job: JobFile, *, kind: Kind, day: date, name: str | None = None) -> Submission:
        """Hand a job in, with the files it names as its working directory. Raises OutputHeldError when it is there already.

        ``name`` takes the place of the id that day and settings give.
        """
        submission_id = name or job.submission_id(kind, day)
        there = self._find(submission_id)
        if there is not None:
            raise _twice(there)
        with tempfile.TemporaryDirectory(prefix="geoseg-submit-") as folder:
            for path, content in ((job.name, job.text.encode()), *job.files):
                target = Path(folder) / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
            self._hand_in(submission_id, job, kind, folder)
        return self.status(submission_id)

    def _hand_in(self, submission_id: str, job: JobFile, kind: Kind, folder: str) -> None:
        """Submit, for a while again when the cluster has only just been started and no node of it takes jobs yet."""
        give_up = time.monotonic() + _NO_NODE_YET_S
        while True:
            try:
                with self._told("hand the job in"):
                    self._client.submit_job(
                        entrypoint=shlex.join(["python", "-m", "geoseg", *_COMMANDS[kind], job.name]),
                        submission_id=submission_id,
                        runtime_env={"working_dir": folder},
                        metadata={"geoseg": kind, "job_sha256": job.digest},
                    )
                return
            except StopError as error:
                if "No available agent" not in str(error) or time.monotonic() > give_up:
                    there = self._find(submission_id)  # handed in by another in the same moment
                    if there is None:
                        raise
                    raise _twice(there) from None
            time.sleep(_POLL_S)

    def status(self, submission_id: str) -> Submission:
        """How a job stands. Raises ConfigError when the cluster knows none of that id."""
        found = self._find(submission_id)
        if found is None:
            raise ConfigError(
                f"{submission_id}: {self.address} knows no such job; a cluster that was made anew has forgotten it"
            )
        return found

    def follow(self, submission_id: str, tell: Callable[[str], None]) -> Submission:
        """Pass a job's log on until it ends. Interrupting it leaves the job alone. A connection that drops is taken up again."""
        log, tries = _Log(tell), 0
        while True:
            told, failure = log.told, None
            try:
                asyncio.run(log.take(self._client.tail_job_logs(submission_id)))
            except _DROPPED as error:
                failure = error
            try:
                now = self.status(submission_id)
                if now.exit_code is not None:
                    return now
            except (AccessDeniedError, ConfigError):
                raise
            except StopError as error:
                failure = error
            if failure is None or log.told > told:
                tries = 0
            if failure is not None:
                tries += 1
                if tries == _TRIES:
                    raise StopError(
                        f"{submission_id}: its log could not be read {_TRIES} times in a row ({_first_line(failure)}); the job "
                        f"goes on; ask with: geoseg submit --status {submission_id} --address {self.address}"
                    ) from failure
            time.sleep(_POLL_S)

    def stop(self, submission_id: str) -> Submission:
        """Ask a job to end; what it published stays. Returns at once, whether or not it has ended."""
        self.status(submission_id)
        with self._told(f"stop {submission_id}"):
            self._client.stop_job(submission_id)
        return self.status(submission_id)

    def _find(self, submission_id: str) -> Submission | None:
        with self._told(f"ask after {submission_id}"):
            try:
                return _submission(self._client.get_job_info(submission_id))
            except RuntimeError as error:
                if "status code 404" in str(error):
                    return None
                raise

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Ray's errors as ours."""
        try:
            yield
        except ray.exceptions.AuthenticationError as error:
            raise AccessDeniedError(
                f"{self.address} takes no one without the right token; set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that "
                "holds it"
            ) from error
        except (RuntimeError, OSError) as error:  # requests' errors are OSErrors
            if "status code 413" in str(error):
                raise ConfigError(
                    "the files that the job names are too large to travel with it; put them into a bucket"
                ) from error
            raise StopError(f"{self.address}: could not {what}: {_first_line(error)}") from error


class _Log:
    """A log that is told once, however often it is read from its beginning. ``told``: its characters so far."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self.told = 0

    async def take(self, parts: AsyncIterator[str]) -> None:
        """Tell what is new in a log that comes from its beginning."""
        seen = 0
        async for part in parts:
            new = part[max(0, self.told - seen) :]
            seen += len(part)
            if new:
                self._tell(new)
                self.told = seen


def _use_token() -> None:
    """A token that is there is meant to be used; Ray sends none unless its mode is named too, and reads that once."""
    has_token = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if "RAY_AUTH_MODE" not in os.environ and (has_token or (Path.home() / ".ray" / "auth_token").is_file()):
        os.environ["RAY_AUTH_MODE"] = "token"
        ray._raylet.Config.initialize("")  # type: ignore[attr-defined]  # noqa: SLF001 - as Ray's own commands do it
    for name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(name).setLevel(logging.WARNING)  # what is uploaded is told by geoseg


def _submission(info: JobDetails) -> Submission:
    exit_code: int | None = None
    if info.status == JobStatus.SUCCEEDED:
        exit_code = 0
    elif info.status == JobStatus.STOPPED:
        exit_code = 130
    elif info.status == JobStatus.FAILED:
        exit_code = info.driver_exit_code or 1
    message = "" if info.status == JobStatus.SUCCEEDED else " ".join(str(info.message or "").split())
    return Submission(id=str(info.submission_id), status=str(info.status), message=message[:300], exit_code=exit_code)


def _twice(there: Submission) -> OutputHeldError:
    again = "; --name takes another id" if there.exit_code is not None else ""
    return OutputHeldError(
        f"{there.id} was submitted already and is {there.status.lower()}: the same settings on the same day are the same job{again}"
    )


def _first_line(error: BaseException) -> str:
    lines: Any = [line.strip() for line in str(error).splitlines() if line.strip()]
    return str(lines[0])[:300] if lines else type(error).__name__


def submit_and_follow(
    job: JobFile, address: str, *, kind: Kind, name: str | None, wait: bool, tell: Callable[[str], None]
) -> Submission:
    """Hand a job in for today and, unless told not to ``wait``, follow it to its end."""
    cluster = Cluster(address)
    handed_in = cluster.submit(job, kind=kind, day=date.today(), name=name)  # noqa: DTZ011 - the day of who submits
    tell(f"{handed_in.id} submitted to {address}\n")
    return cluster.follow(handed_in.id, tell) if wait else handed_in
