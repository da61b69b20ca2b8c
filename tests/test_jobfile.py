"""What travels with a job: its settings and the small files it names; never imagery, never a secret."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, get_args

import pytest

from geoseg.config import Job, Section
from geoseg.errors import ConfigError
from geoseg.evaluate.job import EvaluationJob
from geoseg.jobfile import PATHS, load_job_file
from geoseg.train.job import TrainJob

CONFIGS = Path(__file__).resolve().parents[1] / "jobs" / "configs"
JOB = 'scenes = ["s3://imagery/"]\nout = "s3://masks/x"\n'


def written(folder: Path, text: str) -> str:
    path = folder / "job.toml"
    path.write_text(text)
    return str(path)


def test_files_named_by_relative_paths_travel(tmp_path: Path) -> None:
    (tmp_path / "areas").mkdir()
    (tmp_path / "areas" / "town.geojson").write_text("{}")
    (tmp_path / "scenes.txt").write_text("s3://imagery/a.tif\n")
    (tmp_path / "not-named.txt").write_text("stays")
    text = 'scenes = ["scenes.txt", "/mnt/shared/x.tif"]\nout = "s3://masks/x"\n[predict]\naoi = "areas/town.geojson"\n'
    job = load_job_file(written(tmp_path, text), folder=tmp_path)
    assert job.files == (("areas/town.geojson", b"{}"), ("scenes.txt", b"s3://imagery/a.tif\n"))


def test_a_bundle_travels_whole(tmp_path: Path) -> None:
    (tmp_path / "bundles" / "mine").mkdir(parents=True)
    for name in ("model.json", "model.safetensors"):
        (tmp_path / "bundles" / "mine" / name).write_bytes(b"x")
    job = load_job_file(written(tmp_path, JOB + 'bundle = "bundles/mine"\n'), folder=tmp_path)
    assert [name for name, _ in job.files] == ["bundles/mine/model.json", "bundles/mine/model.safetensors"]


@pytest.mark.parametrize(
    "settings",
    [
        '[[source]]\nname = "data"\nscenes = ["s3://i/"]\n',
        '[[source]]\nmanifest = "s3://i/list.json"\nroles = ["data"]\nassets = ["data"]\ncollections = ["data"]\n',
        '[cluster]\nengine = "data"\n',
        '[vectors.buildings]\nclasses = ["data"]\n',
        'model = { name = "data", classes = [{ name = "data" }] }\n',
        'bundle = "roads-buildings"\n',
        'model = { start = "demo" }\n',
    ],
)
def test_what_is_only_called_like_a_folder_does_not_travel(tmp_path: Path, settings: str) -> None:
    for name in ("data", "roads-buildings", "demo"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.tif").write_bytes(b"x")
    assert load_job_file(written(tmp_path, f'out = "s3://b/x"\n{settings}'), folder=tmp_path).files == ()


NO_PATHS = """
out stack_by cluster.address predict.assume_crs vectors.buildings.classes vectors.roads.classes stacks.name
source.api source.collections source.datetime source.assets source.roles source.allow source.rewrite source.token_env
source.name source.stack_by source.assume_crs source.labels.class source.labels.class_field source.labels.values
source.labels.layer source.labels.width_field
"""


def texts(kind: Any, place: str = "") -> Iterator[str]:
    """Yield the settings of a model that are texts, or lists or tables of texts."""
    if kind is str:
        yield place
    elif isinstance(kind, type) and issubclass(kind, Section):
        for name, field in kind.model_fields.items():
            yield from texts(field.annotation, f"{place}.{field.alias or name}".removeprefix("."))
    for each in get_args(kind):
        yield from texts(each, place)


def test_each_setting_is_a_path_or_known_to_be_none() -> None:
    """One that is new must be told to be a path, or its file stays behind."""
    found = {place for job in (Job, TrainJob, EvaluationJob) for place in texts(job)}
    assert found >= PATHS
    assert {place for place in found - PATHS if not place.startswith(("model.", "stage."))} == set(NO_PATHS.split())


def test_the_id_is_of_the_day_and_of_what_is_asked(tmp_path: Path) -> None:
    night = date(2026, 11, 27)
    first = load_job_file(written(tmp_path, JOB), folder=tmp_path).submission_id("nightly", night)
    assert first.startswith("geoseg-nightly-2026-11-27-")
    assert len(first) <= 47, "the name of a RayJob"
    reordered = '# a remark\nout = "s3://masks/x"\nscenes = ["s3://imagery/"]\n'
    assert load_job_file(written(tmp_path, reordered), folder=tmp_path).submission_id("nightly", night) == first
    other = load_job_file(written(tmp_path, JOB + 'bundle = "s3://b/new"\n'), folder=tmp_path)
    assert other.submission_id("nightly", night) != first
    (tmp_path / "aoi.geojson").write_text("{}")
    with_area = written(tmp_path, JOB + '[predict]\naoi = "aoi.geojson"\n')
    before = load_job_file(with_area, folder=tmp_path).digest
    (tmp_path / "aoi.geojson").write_text('{"type": "FeatureCollection"}')
    assert load_job_file(with_area, folder=tmp_path).digest != before, "another area is another job"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('scenes = ["a.tif"]\nout = "s3://m/x"\n', "imagery on this machine"),
        ('scenes = ["*.tif"]\nout = "s3://m/x"\n', "relative and not a file here"),
        ('scenes = ["s3://i/"]\nout = "masks"\n', "folder on whichever node"),
        (JOB + 'bundle = "../elsewhere"\n', "lies outside"),
        ('scenes = ["s3://i/"\n', "not a readable TOML file"),
    ],
    ids=["imagery", "a glob", "a folder for results", "outside", "no TOML"],
)
def test_what_would_not_be_found_on_the_cluster_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "a.tif").write_bytes(b"x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "model.json").write_text("{}")
    with pytest.raises(ConfigError, match=sentence):
        load_job_file(written(here, text), folder=here)


CANARY = "Canary0123456789abcdef"
SECRETS = [
    f'aws_secret_access_key = "{CANARY}"',
    f'api-key = "{CANARY}"',
    f'[source.options]\ntoken = "{CANARY}"',
    f'options = {{ password = "{CANARY}" }}',
    f'"sas_key" = "{CANARY}"',
    f"# an old one: AKIA{CANARY.upper()[:16]}",
    f'bundle = "https://me:{CANARY}@example.org/b"',
    f'bundle = "https://x.example.org/b?X-Amz-Signature={CANARY}"',
    f'bundle = "https://x.example.org/b?sv=1&sig={CANARY}"',
    f'header = "Authorization: Bearer {CANARY}"',
    f"connection = 'AccountName=a;AccountKey={CANARY}'",
    f'bundle = "https://x.example.org/b?subscription-key={CANARY}"',
    f'note = "ghp_{CANARY}"',
    "key = '''-----BEGIN RSA PRIVATE KEY-----\n'''",
]


@pytest.mark.parametrize("line", SECRETS)
def test_a_secret_is_refused_and_not_repeated(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError, match="looks like it holds") as refusal:
        load_job_file(written(tmp_path, f"{JOB}{line}\n"), folder=tmp_path)
    assert CANARY not in str(refusal.value)
    assert "line" in str(refusal.value)


ALONG = {
    ".env": f"REGION=x\nexport API_TOKEN={CANARY}\n",
    "list.json": f'{{"type": "FeatureCollection",\n"href": "https://h/a.tif?X-Amz-Date=1&X-Amz-Signature={CANARY}"}}',
    "go.json": f'{{"n": 1,\n"href": "https://h/a.tif?x=1\\\\u0026sig={CANARY}"}}',
    "settings.json": f'{{"n": 1,\n"password": "{CANARY}"}}',
    "secret.yaml": f"kind: Secret\n  password: {CANARY}\n",
}


@pytest.mark.parametrize("name", ALONG)
def test_a_secret_in_a_file_that_travels_is_refused_and_not_repeated(tmp_path: Path, name: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"\xff\x00token=x")
    (tmp_path / "mine" / name).write_text(ALONG[name])
    with pytest.raises(ConfigError, match=f"mine/{name} would travel.*line 2 looks like it holds") as refusal:
        load_job_file(written(tmp_path, f'{JOB}bundle = "mine"\n'), folder=tmp_path)
    assert CANARY not in str(refusal.value)


@pytest.mark.parametrize(
    "text",
    [
        '{"href": "https://h/search?token=next:abc"}',
        '{"href": "https://h/a.tif?sig=***&n=1", "token": "***"}',
        '{"href": "https://h/{z}/{x}/{y}?api_key={key}"}',
        "s3://imagery/token=a/x.tif\nTOKEN=${TOKEN}\n",
    ],
)
def test_what_only_looks_like_a_secret_travels(tmp_path: Path, text: str) -> None:
    (tmp_path / "list.json").write_text(text)
    job = written(tmp_path, 'out = "s3://b/x"\n[[source]]\nmanifest = "list.json"\n')
    assert load_job_file(job, folder=tmp_path).files == (("list.json", text.encode()),)


def test_a_long_line_takes_no_longer_than_short_ones(tmp_path: Path) -> None:
    (tmp_path / "area.geojson").write_text("token-" * 50_000 + "\n" * 100_000 + "[1.5, 2.5], " * 20_000)
    began = time.process_time()
    load_job_file(written(tmp_path, JOB + '[predict]\naoi = "area.geojson"\n'), folder=tmp_path)
    assert time.process_time() - began < 2.0


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_configs_that_come_along_hold_none(config: Path) -> None:
    from geoseg.jobfile import refuse_secrets

    refuse_secrets(str(config), config.read_text())
