"""Fixtures that all tests share."""

from __future__ import annotations

import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kit.figures import Figure, note
from kit.object_store import ObjectStore, is_installed, running_store

# They would win over, or fail beside, the key and the endpoint that a test sets.
OWN_ACCOUNT = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of the processes that share the tests one takes a file's tests, and one takes all that start Ray.

    Side by side these would wait for each other's processes; together they share one Ray.
    """
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if _is_named_after_ray(nodeid) else str(super()._split_scope(nodeid))

    return Together(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that note a figure, so that ``-m figure`` runs them all; those that start Ray take the longest and begin."""
    _leave_some_out(items, are_all=not any("::" in one for one in config.args))
    for item in items:
        if "figure" in getattr(item, "fixturenames", ()):
            item.add_marker("figure")
        is_shared_out = item.get_closest_marker("chaos") is None
        if is_shared_out and _starts_ray(item) and not _is_named_after_ray(item.nodeid):
            raise pytest.UsageError(f"{item.nodeid}: starts Ray, so it has 'ray' in its name, or lies in tests/cluster")
    if any(hasattr(item.config, "workerinput") for item in items[:1]):
        items.sort(key=lambda item: not _starts_ray(item))


def _leave_some_out(items: list[pytest.Item], *, are_all: bool) -> None:
    """Of a test with ``sample("these", ...)``, or ``sample(without=["those", ...])``, mark the other cases ``thorough``."""
    cases: dict[str, tuple[pytest.Mark, dict[str, pytest.Item]]] = {}
    for item in items:
        mark = item.get_closest_marker("sample")
        if mark is not None:
            name, _, case = item.nodeid.partition("[")
            cases.setdefault(name, (mark, {}))[1][case.removesuffix("]")] = item
    for name, (mark, each) in cases.items():
        without = mark.kwargs.get("without")
        named = {*(mark.args if without is None else without)}
        if are_all and (not named or not named < each.keys()):
            raise pytest.UsageError(f"{name}: its cases are {', '.join(each)}; sample() names {', '.join(named)}")
        for case, item in each.items():
            if (case in named) == (without is not None):
                item.add_marker("thorough")


def _is_named_after_ray(nodeid: str) -> bool:
    file, _, name = nodeid.partition("::")
    return "ray" in name.split("_") or file.startswith("tests/cluster/")


def _starts_ray(item: pytest.Item) -> bool:
    return item.get_closest_marker("ray") is not None


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the Ray that tests share with the last of them."""
    if _starts_ray(item) and (nextitem is None or not _starts_ray(nextitem)):
        import ray

        ray.shutdown()


@pytest.fixture
def shared_ray() -> None:
    """Ray runs in this process, one for all tests that want no more of it."""
    from kit.own_ray import share_ray

    share_ray()


@pytest.fixture
def no_ray_yet() -> Iterator[None]:
    """No Ray runs in this process, so that the run in the test starts one, with the environment of the test."""
    from kit.own_ray import no_ray

    with no_ray():
        yield


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Note what a test of a promise measured, as ``figure("R5", "partial scenes seen", 0, goal="0")``."""

    def noted(promise: str, what: str, value: object, *, goal: str = "") -> None:
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        note(
            Figure(
                promise=promise,
                what=what,
                value=shown,
                goal=goal,
                test=request.node.nodeid.removeprefix("tests/"),
            )
        )

    return noted


@pytest.fixture(scope="session", autouse=True)
def interrupts_arrive() -> None:
    """A process that runs a share of the tests ignores SIGINT, and so would those that it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def no_own_account() -> Iterator[None]:
    """Keep the tests off the cloud account of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in OWN_ACCOUNT:
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def ray_is_not_last() -> Iterator[None]:
    """Ray gives its workers the last turn of all processes (niceness 15); beside other tests they would hardly have one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        yield


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """Yield a real S3 server, empty at first, for all tests of the session; a test that ends it starts it again."""
    if not is_installed():
        pytest.skip("a real S3 server is not installed; get it with: infra/object-store.sh install")
    with running_store(tmp_path_factory.mktemp("object-store") / "store") as store:
        yield store


@pytest.fixture
def bucket(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a new, empty bucket; during the test the AWS_* variables lead to its server."""
    for name, value in object_store.environment().items():
        monkeypatch.setenv(name, value)
    unique = f"geoseg-{uuid.uuid4().hex[:12]}"
    object_store.make_bucket(unique)
    return unique


@pytest.fixture(params=["folder", "memory", pytest.param("bucket", marks=pytest.mark.bucket)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URI of an empty place of each kind: a folder, memory, a bucket."""
    if request.param == "folder":
        return str(tmp_path)
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    return f"s3://{request.getfixturevalue('bucket')}"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return two bundles of one kind with other weights."""
    from kit.oracle import seeded_bundle  # torch, which not every test needs

    return seeded_bundle(tmp_path_factory.mktemp("one")), seeded_bundle(tmp_path_factory.mktemp("two"), seed=1)


@pytest.fixture
def pixels(tmp_path: Path) -> Callable[[int], bytes]:
    """Give the bytes of a small scene, others for each seed."""
    from kit.scenes import noise, write_scene

    def made(seed: int) -> bytes:
        return write_scene(tmp_path / "made.tif", noise(3, 40, 53, seed=seed)).read_bytes()

    return made
