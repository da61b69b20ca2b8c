"""A job's log is followed over connections that drop: each line is told once, and the job's end is what ends it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from geoseg.cluster import submit
from geoseg.errors import ConfigError, StopError

LINES = [f"line {number}\n" for number in range(12)]


class Client:
    """Stands in for Ray's: connection after connection gives a log's lines up to some number, and drops or ends."""

    def __init__(self, reach: list[int], error: Callable[[], Exception], away: dict[int, str]) -> None:
        self.reach, self.error, self.away = reach, error, away
        self.connections = self.asked = 0

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        """Yield the log from its beginning."""
        upto = self.reach[min(self.connections, len(self.reach) - 1)]
        self.connections += 1
        for line in LINES[:upto]:
            yield line
        if upto < len(LINES):
            raise self.error()

    def get_job_info(self, submission_id: str) -> Any:
        """Tell that the job runs until its last line was read, or whatever else is told at that time."""
        self.asked += 1
        if self.asked in self.away:
            raise RuntimeError(self.away[self.asked])
        ended = self.connections >= len(self.reach) and self.reach[-1] == len(LINES)
        status = JobStatus.SUCCEEDED if ended else JobStatus.RUNNING
        return SimpleNamespace(submission_id=submission_id, status=status, message="", driver_exit_code=None)


def followed(
    monkeypatch: pytest.MonkeyPatch,
    reach: list[int],
    error: Callable[[], Exception] = lambda: RuntimeError("closed with close code 1006"),
    away: dict[int, str] | None = None,
) -> list[str]:
    client = Client(reach, error, away or {})
    monkeypatch.setattr(submit, "JobSubmissionClient", lambda _: client)
    monkeypatch.setattr(submit, "_POLL_S", 0.0)
    told: list[str] = []
    assert submit.Cluster("http://head:8265").follow("night", told.append).exit_code == 0
    return told


def disconnected() -> Exception:
    error: Exception = pytest.importorskip("aiohttp").ServerDisconnectedError()
    return error


def refused() -> Exception:
    error: Exception = pytest.importorskip("aiohttp").WSServerHandshakeError(SimpleNamespace(), (), status=503)
    return error


@pytest.mark.parametrize("error", [lambda: RuntimeError("1006"), lambda: OSError("reset"), disconnected, refused])
def test_a_connection_that_drops_is_taken_up_where_it_was(
    error: Callable[[], Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert followed(monkeypatch, [3, 3, 0, 5, 12], error) == LINES


def test_a_night_may_drop_more_often_than_it_is_tried_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert followed(monkeypatch, list(range(1, 13))) == LINES


def test_a_dashboard_that_is_away_for_a_moment_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert followed(monkeypatch, [0, 3, 12], away={1: "status code 502", 3: "cannot connect"}) == LINES


@pytest.mark.parametrize(
    ("reach", "away", "kind", "sentence"),
    [
        ([3], {}, StopError, "could not be read 5 times in a row .*1006.*the job goes on"),
        ([3], dict.fromkeys(range(1, 20), "status code 502"), StopError, "5 times in a row .*status code 502"),
        ([3], {2: "status code 404"}, ConfigError, "knows no such job"),
    ],
    ids=["no line more", "a dashboard that stays away", "a cluster made anew"],
)
def test_what_does_not_come_back_ends_the_command(
    reach: list[int], away: dict[int, str], kind: type[Exception], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(kind, match=sentence):
        followed(monkeypatch, reach, away=away)
