"""Settings are checked as a whole; a wrong one gets a sentence that names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from geoseg.config import Job, PredictConfig, job_schema, load_job
from geoseg.errors import ConfigError

MINIMAL = 'scenes = ["a.tif"]\nout = "out"\n'


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (MINIMAL + "[predict]\nwindw = 512\n", "no setting 'predict.windw'; did you mean 'window'"),
        (MINIMAL + "[predict]\nwindow = 500\n", "predict.window.*512.*got 500"),
        (MINIMAL + "[predict]\nscale = [5, 5]\n", "rising"),
        (MINIMAL + "[predict]\nresolution = 'fine'\n", "resolution.*got 'fine'"),
        (MINIMAL + "[cluster]\nworkers = 0\n", "cluster.workers.*greater than or equal to 1"),
        ('scenes = ["a.tif"]\n', "'out' is missing"),
        ('scenes = []\nout = "o"\n', "scenes"),
        ("scenes = [", "not a readable TOML file"),
    ],
)
def test_a_wrong_job_file_is_refused_in_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(text)
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_job(str(tmp_path / "job.toml"), {})
    assert "\n" not in str(caught.value)
    assert "job.toml" in str(caught.value)


def test_the_command_line_overrules_the_file(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(MINIMAL + "[predict]\nwindow = 512\nprobabilities = true\n")
    job = load_job(
        str(tmp_path / "job.toml"), {"out": "other", "scenes": None, "predict": {"window": 1024, "aoi": None}}
    )
    assert (job.out, job.scenes, job.predict.window, job.predict.probabilities) == ("other", ("a.tif",), 1024, True)


def test_the_schema_knows_every_section() -> None:
    schema = json.loads(job_schema())
    assert set(schema["properties"]) == set(Job.model_fields)


def test_every_setting_of_pixels_is_in_the_fingerprint_and_no_other() -> None:
    assert set(PredictConfig.model_fields) - set(PredictConfig().pixel_settings()) == {"window", "batch", "aoi"}


def test_the_example_job_is_valid() -> None:
    job = load_job(str(Path(__file__).parents[1] / "jobs" / "configs" / "predict.toml"), {})
    assert job.cluster.workers == 8
