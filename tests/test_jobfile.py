"""What travels with a job: its settings and the small files it names; never imagery, never a secret."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from geoseg.errors import ConfigError
from geoseg.jobfile import load_job_file

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


def test_the_name_of_a_source_is_no_path(tmp_path: Path) -> None:
    (tmp_path / "dubai").mkdir()
    (tmp_path / "dubai" / "a.tif").write_bytes(b"x")
    text = 'out = "s3://bundles/x"\n[[source]]\nname = "dubai"\nscenes = ["s3://imagery/dubai/"]\n'
    assert load_job_file(written(tmp_path, text), folder=tmp_path).files == ()


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
    f'note = "ghp_{CANARY}"',
    "key = '''-----BEGIN RSA PRIVATE KEY-----\n'''",
]


@pytest.mark.parametrize("line", SECRETS)
def test_a_secret_is_refused_and_not_repeated(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError, match="looks like it holds") as refusal:
        load_job_file(written(tmp_path, f"{JOB}{line}\n"), folder=tmp_path)
    assert CANARY not in str(refusal.value)
    assert "line" in str(refusal.value)


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_configs_that_come_along_hold_none(config: Path) -> None:
    from geoseg.jobfile import refuse_secrets

    refuse_secrets(str(config), config.read_text())
