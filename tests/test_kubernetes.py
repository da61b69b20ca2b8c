"""The night's start, against an API server that behaves as told: once a night, whatever is lost on the way."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from geoseg.errors import AccessDeniedError, ConfigError, StopError, StoreError
from geoseg.kubernetes import ApiServer, start_ray_job

TEMPLATE = yaml.safe_load(
    (Path(__file__).resolve().parents[1] / "infra" / "kubernetes" / "base" / "nightly.yaml").read_text()
)
NAME = "geoseg-nightly-2026-11-27-0123abcd"


class FakeApi:
    """RayJobs by name, the states that a started one goes through, and answers that go wrong first."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {"geoseg-nightly": TEMPLATE}
        self.states: list[dict[str, str]] = []
        self.faults: list[int] = []  # the answer's code; 0: what was asked is done and the answer is lost
        self.asked: list[tuple[str, str]] = []
        self.tokens: set[str] = set()

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.asked.append((method, path))
        if self.faults and self.faults[0] > 0:
            return self.faults.pop(0), {"message": "as told"}
        if method == "POST":
            name = body["metadata"]["name"]
            if name in self.jobs:
                return 409, {"reason": "AlreadyExists"}
            self.jobs[name] = body
            return 201, body
        name = path.rpartition("/")[2]
        if name not in self.jobs:
            return 404, {"reason": "NotFound"}
        if name != "geoseg-nightly" and self.states:
            self.jobs[name] = {**self.jobs[name], "status": self.states.pop(0)}
        return 200, self.jobs[name]


@pytest.fixture
def api() -> FakeApi:
    return FakeApi()


@pytest.fixture
def server(api: FakeApi, tmp_path: Path) -> Iterator[ApiServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"{}")
            api.tokens.add(self.headers["Authorization"])
            code, answer = api.answer(self.command, self.path, body)
            if api.faults and api.faults[0] == 0:
                api.faults.pop(0)
                self.close_connection = True
                return
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        do_POST = do_GET  # noqa: N815 - http.server asks for this name

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    (tmp_path / "token").write_text("of-the-pod\n")
    yield ApiServer(f"http://127.0.0.1:{http.server_port}", "geoseg", tmp_path / "token", None)
    http.shutdown()
    http.server_close()


def start(server: ApiServer, told: list[str] | None = None, **how: Any) -> int:
    return start_ray_job(
        server,
        "geoseg-nightly",
        NAME,
        owner=how.get("owner"),
        tell=(told if told is not None else []).append,
        sleep=how.get("sleep", lambda _: None),
    )


DONE = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}


def test_the_copy_is_the_template_awake_and_with_the_nights_name(server: ApiServer, api: FakeApi) -> None:
    api.states = [
        {"jobDeploymentStatus": "Initializing"},
        {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"},
        DONE,
    ]
    told: list[str] = []
    assert start(server, told, owner=("geoseg-nightly-29", "uid-1")) == 0
    made = api.jobs[NAME]
    assert made["spec"] == {**TEMPLATE["spec"], "suspend": False, "jobId": NAME}
    assert made["metadata"]["ownerReferences"][0]["uid"] == "uid-1", "it goes when the Job that started it goes"
    assert told == [
        f"{NAME} started",
        f"{NAME}: Initializing",
        f"{NAME}: Running RUNNING",
        f"{NAME}: Complete SUCCEEDED",
    ]
    assert {path for _, path in api.asked} == {
        f"/apis/ray.io/v1/namespaces/geoseg/rayjobs{end}" for end in ("", "/geoseg-nightly", f"/{NAME}")
    }, "no more than get and create of RayJobs"
    assert api.tokens == {"Bearer of-the-pod"}


def test_started_twice_is_started_once(server: ApiServer, api: FakeApi) -> None:
    api.states = [DONE]
    assert start(server) == 0
    told: list[str] = []
    assert start(server, told) == 0
    assert told[0] == f"{NAME} was started already; following it"
    assert len(api.jobs) == 2


def test_an_answer_that_is_lost_starts_no_second_run(server: ApiServer, api: FakeApi) -> None:
    api.states = [DONE]
    api.faults = [503, 429]
    assert start(server) == 0
    del api.jobs[NAME]
    api.states, api.asked = [DONE], []

    def lose_the_answer_to_the_post(method: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if method == "POST" and NAME not in api.jobs:
            api.faults = [0]
        return FakeApi.answer(api, method, path, body)

    api.answer = lose_the_answer_to_the_post  # type: ignore[method-assign]
    told: list[str] = []
    assert start(server, told) == 0
    assert told[0].endswith("following it")
    assert [method for method, _ in api.asked].count("POST") == 2


@pytest.mark.parametrize(
    "state",
    [
        {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "exit code 3"},
        {**DONE, "jobStatus": "STOPPED"},
    ],
    ids=["failed", "stopped"],
)
def test_a_run_that_failed_is_a_failed_job(server: ApiServer, api: FakeApi, state: dict[str, str]) -> None:
    api.states = [state]
    assert start(server) == 1


def test_what_cannot_go_on_is_told(server: ApiServer, api: FakeApi) -> None:
    api.faults = [403]
    with pytest.raises(AccessDeniedError, match="refuses GET"):
        start(server)
    api.faults = [503] * 100
    with pytest.raises(StoreError, match="answers 503"):
        start(server)
    api.faults = []
    api.jobs[NAME] = {}
    api.states = [{"jobDeploymentStatus": "Running"}]

    def removed(_: float) -> None:
        api.jobs.pop(NAME, None)

    with pytest.raises(StopError, match="was removed"):
        start(server, sleep=removed)
    del api.jobs["geoseg-nightly"]
    with pytest.raises(ConfigError, match="apply infra/kubernetes first"):
        start(server)


def test_outside_a_pod_it_says_what_it_is_for() -> None:
    with pytest.raises(ConfigError, match="service account"):
        ApiServer.of_this_pod({})
