"""Secrets stay where they are: canaries in every place that may hold one, and a search of all that was written after."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from kit import canaries
from kit.canaries import SECRETS, SIGNED, USER, manifest, search, secrets_in, telltale
from kit.object_store import ObjectStore, is_installed
from kit.ray_head import RayHead, ray_head
from kit.scenes import noise, tiny_bundle, write_scene
from kit.training import LABELS, scenes, values

from geoseg.cli import main
from geoseg.raster import buckets, store
from geoseg.raster.buckets import Limits


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run commands with secrets in the environment; what they told, tracebacks too, is kept in a file below ``tmp_path``."""
    for name, value in canaries.environment().items():
        monkeypatch.setenv(name, value)
    (tmp_path / "told").mkdir()

    def run(command: str, *arguments: str, exit_code: int = 0) -> str:
        done = CliRunner().invoke(main, [*shlex.split(command), *arguments])
        told = done.output
        if done.exc_info and not isinstance(done.exception, SystemExit):
            told += "".join(traceback.format_exception(*done.exc_info))
        place = tmp_path / "told" / f"{len(list((tmp_path / 'told').iterdir()))}.log"
        place.write_text(told)
        assert done.exit_code == exit_code, told
        return told

    return run


def toml(value: Any) -> str:
    """Return a value as TOML, tables within tables too."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


def job(folder: Path, name: str, **values: Any) -> str:
    """Write a job file."""
    (folder / name).write_text("\n".join(f"{key} = {toml(value)}" for key, value in values.items()))
    return str(folder / name)


def test_the_search_finds_each_secret_in_each_form() -> None:
    """What cannot find cannot miss."""
    for name, secret in SECRETS.items():
        assert secrets_in(f"x {secret}".encode()) == [name]
    assert set(secrets_in(SIGNED.encode())) == {"access key", "signature", "shared access", "bearer token"}


def test_a_run_on_signed_hrefs_writes_no_secret(
    told: Callable[..., str], tmp_path: Path, figure: Callable[..., None]
) -> None:
    """The scene's own name is a signed one, so that it goes wherever names go: plan, parts, item, record, page, catalogue."""
    bundle = tiny_bundle(tmp_path / "bundle")
    scene = write_scene(tmp_path / "in" / f"a.tif?{SIGNED}", noise(3, 64, 64))
    hrefs = {"good": str(scene), "gone": f"{tmp_path}/gone.tif?{SIGNED}", "web": f"https://{USER}@host/x.tif?{SIGNED}"}
    listed = manifest(tmp_path / "in" / "list.json", hrefs)
    out = str(tmp_path / "out")
    source = {"manifest": str(listed), "rewrite": {f"https://{USER}@elsewhere/": "s3://elsewhere/"}}
    run = job(tmp_path / "in", "job.toml", out=out, bundle=bundle, source=[source])
    assert "1 published" in told("predict --engine local --config", run, exit_code=1)
    told("nightly", run, "--engine", "local", exit_code=1)
    for command in (["verify", out], ["status", out], ["catalogue", out], ["why", out, "good"], ["why", out, "gone"]):
        told(*command)
    num_files, found = search(tmp_path / "out")
    num_logs, leaked = search(tmp_path / "told")
    figure("S9", f"secrets in {num_files + num_logs} files of local runs", len(found) + len(leaked), goal="0")
    assert num_files > 8
    assert not found | leaked


WRONG_JOBS: dict[str, dict[str, Any]] = {
    "an unknown key": {"aws_secret_access_key": SECRETS["secret key"]},
    "a user in the output": {"out": f"https://{USER}@host/out?{SIGNED}"},
    "a signed scene": {"scenes": [f"https://{USER}@host/x.tif?{SIGNED}"]},
    "a signed bundle": {"bundle": f"/nowhere/bundle?{SIGNED}"},
    "a signed list": {"scenes": [f"/nowhere/list.txt?{SIGNED}"]},
    "a signed manifest": {"source": [{"manifest": f"/nowhere/list.json?{SIGNED}"}]},
    "a signed catalogue": {"source": [{"catalog": f"/nowhere/catalog.json?{SIGNED}"}]},
    "an interval that is none": {"source": [{"manifest": "x", "datetime": f"sig={SECRETS['shared access']}"}]},
    "an address that is none": {"source": [{"api": f"ftp://{USER}@host?{SIGNED}", "allow": ["x"]}]},
    "a rewrite that is none": {"source": [{"manifest": "x", "rewrite": f"https://{USER}@host?{SIGNED}"}]},
}


@pytest.mark.parametrize("name", WRONG_JOBS)
def test_a_wrong_job_is_refused_without_repeating_a_secret(name: str, told: Callable[..., str], tmp_path: Path) -> None:
    sound = {"out": str(tmp_path / "out"), "bundle": tiny_bundle(tmp_path / "bundle")}
    if "source" not in WRONG_JOBS[name]:
        sound["scenes"] = [str(write_scene(tmp_path / "a.tif", noise(3, 16, 16)))]  # type: ignore[assignment]
    run = job(tmp_path, "job.toml", **{**sound, **WRONG_JOBS[name]})
    text = told("predict --engine local --config", run, exit_code=3 if name == "a signed list" else 2)
    assert not secrets_in(text.encode()), text


ANSWERS = {403: "AccessDenied", 400: "Odd", 404: "NoSuchKey", 501: "NotImplemented"}
ASKED = ("s3://bucket/in/", "s3://bucket/a.tif", "az://bucket/a.tif")
SOON = {(ASKED[0], 404), (ASKED[1], 400), (ASKED[2], 403)}  # 501 is tried again for seconds
LATER = (pytest.mark.chaos, pytest.mark.slow)


@pytest.mark.parametrize(
    ("uri", "status"),
    [pytest.param(uri, status, marks=() if (uri, status) in SOON else LATER) for uri in ASKED for status in ANSWERS],
)
def test_what_a_store_repeats_of_a_request_is_not_told(
    uri: str, status: int, told: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(buckets, "LIMITS", Limits(num_tries=2, first_pause_s=0.01, longest_pause_s=0.02))
    with telltale(status, ANSWERS[status]) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server)
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", server)
        monkeypatch.setenv("AZURE_STORAGE_ALLOW_HTTP", "true")
        done = CliRunner().invoke(main, ["predict", uri, "--out", str(tmp_path / "out"), "--engine", "local"])
    assert done.exit_code in (1, 2, 3, 4), done
    assert "s3://bucket" in done.output or "az://bucket" in done.output
    assert not secrets_in(done.output.encode()), done.output
    assert not search(tmp_path / "out")[1]


# --- on a cluster, from bucket to bucket ------------------------------------------------------------------------------

_TOLD_BY_RAY = (
    "api/jobs/",
    "api/cluster_status",
    "nodes?view=summary",
    *(f"api/v0/{what}?detail=true&limit=10000" for what in ("jobs", "tasks", "actors", "workers", "objects", "nodes")),
    "api/v0/runtime_envs?detail=true",
)


@pytest.fixture
def secret_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """A store that is opened by canaries, which are in the environment."""
    if not is_installed():
        pytest.skip("a real S3 server is not installed; get it with: infra/object-store.sh install")
    place = tmp_path / "server"
    one = replace(ObjectStore.on_free_ports(place), key=SECRETS["access key"], secret=SECRETS["secret key"])
    try:
        one.start()
        one.make_bucket("canaries")
        for name, value in {**canaries.environment(), **one.environment()}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_SESSION_TOKEN")  # the store gives no such thing out
        yield one
    finally:
        one.wipe()


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.bucket
@pytest.mark.timeout(1800)
def test_no_command_on_a_cluster_writes_a_secret(
    secret_store: ObjectStore, tmp_path: Path, figure: Callable[..., None]
) -> None:
    """The nodes have the store's keys in their environment; searched are logs, outputs, and all that Ray keeps and tells."""
    here = tmp_path / "here"
    bundle = tiny_bundle(here / "bundle")
    pixels = {
        name: write_scene(here / name, noise(3, 300, 200, seed=seed)).read_bytes() for seed, name in enumerate("ab")
    }
    hrefs = {"a": f"s3://canaries/in/a.tif?{SIGNED}", "b": "s3://canaries/in/b.tif"}
    for name, uri in hrefs.items():
        store.write(uri, pixels[name])
    hrefs |= {"gone": f"s3://canaries/gone.tif?{SIGNED}", "web": f"https://{USER}@host/x.tif?{SIGNED}"}
    store.write("s3://canaries/list.json", manifest(here / "list.json", hrefs).read_bytes())
    out, to = "s3://canaries/out", "s3://canaries/trained"
    settings = {"out": out, "bundle": bundle, "source": [{"manifest": "s3://canaries/list.json"}]}
    run = job(here, "job.toml", **settings)
    labelled = scenes(here / "labelled")
    train = job(here, "train.toml", **values(labelled, to))
    source = {"name": "v", "scenes": [f"{labelled}/v.tif"], "labels": [LABELS]}
    judge = job(here, "judge.toml", source=[source], out="s3://canaries/judged", bundle=bundle)
    with ray_head() as head:
        on = ["--address", f"{head.host}:{head.port}"]
        cli = _Commands(tmp_path / "told", here, head)
        cli.run("submit", "job.toml", "--run", "predict", "--address", head.address, exit_code=1)
        cli.run("predict", "--config", run, *on, "--out", "s3://canaries/direct", exit_code=1)
        cli.run("nightly", run, *on, exit_code=1)
        cli.run("train", train, *on, "--engine", "ray")
        cli.run("evaluate", judge, *on, "--workers", "1")
        for command in (["verify", out], ["status", out], ["catalogue", out], ["why", out, "a"], ["why", out, "gone"]):
            cli.run(*command)
        cli.run("vectorize", out, *on)
        cli.run("retry", out, exit_code=3)
        cli.view(out)
        wrong = {"AWS_SECRET_ACCESS_KEY": SECRETS["secret key"] + "x", "AWS_SESSION_TOKEN": SECRETS["session token"]}
        cli.run("predict", "--config", run, *on, exit_code=4, **wrong)
        cli.run("predict", "s3://canaries/in/", "--out", out, *on, exit_code=4, **wrong)
        cli.run("--debug", "verify", out, exit_code=4, **wrong)
        for place, path in enumerate(_TOLD_BY_RAY):
            request = urllib.request.Request(
                f"{head.address}/{path}", headers={"Authorization": f"Bearer {head.token}"}
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                (tmp_path / "told" / f"ray-{place}.json").write_bytes(answer.read())
        for place, info in enumerate(store.walk("s3://canaries/")):
            if not info.uri.startswith(("s3://canaries/in/", "s3://canaries/list.json")):
                dumped = tmp_path / "written" / str(place) / store.base_name(info.uri)
                dumped.parent.mkdir(parents=True)
                dumped.write_bytes(store.read(info.uri))
        searched = {
            place: search(place, [head.token]) for place in (head.folder, tmp_path / "told", tmp_path / "written")
        }
    num_files = sum(num for num, _ in searched.values())
    found = {f"{place.name}/{name}": names for place, (_, leaks) in searched.items() for name, names in leaks.items()}
    figure("S9", f"secrets in {num_files:,} files: outputs, logs, Ray's own", len(found), goal="0")
    assert all(num > 20 for num, _ in searched.values()), searched
    assert not found


class _Commands:
    """Runs commands in processes of their own, as an operator would, and keeps what they told."""

    def __init__(self, told: Path, here: Path, head: RayHead) -> None:
        self.told, self.here = told, here
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        root = str(Path(__file__).resolve().parents[1])
        self.environment = {**clean, **head.client_environment(), "PYTHONPATH": root, "HOME": str(here)}
        told.mkdir()

    def run(self, *arguments: str, exit_code: int = 0, **environment: str) -> None:
        """Run one to its end."""
        place = self.told / f"{len(list(self.told.iterdir())):02}-{arguments[0].strip('-')}.log"
        with place.open("wb") as log:
            done = subprocess.run(
                [sys.executable, "-m", "geoseg", *arguments],
                cwd=self.here,
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=False,
            )
        assert done.returncode == exit_code, f"{arguments}: {done.returncode}\n{place.read_text()[-3000:]}"

    def view(self, out: str) -> None:
        """Look at an output's page, and at what it says of its scenes."""
        command = [sys.executable, "-m", "geoseg", "view", out, "--no-open"]
        with (self.told / "view.log").open("wb") as log:
            server = subprocess.Popen(command, cwd=self.here, env=self.environment, stdout=subprocess.PIPE, stderr=log)
        assert server.stdout is not None
        url = server.stdout.readline().decode().strip()
        for place, path in enumerate(("", "scenes.json", "scenes/a/scene.json", "scenes/a/image.json")):
            with urllib.request.urlopen(url + path, timeout=60) as answer:
                (self.told / f"view-{place}").write_bytes(answer.read())
        server.send_signal(signal.SIGINT)
        (self.told / "view-said").write_bytes(server.communicate(timeout=60)[0])
