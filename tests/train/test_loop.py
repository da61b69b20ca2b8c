"""The loop: the same weights however passes are dealt out, wherever it was interrupted; and it stops at nonsense."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit.object_store import free_ports
from kit.training import scenes, training, values
from safetensors.torch import load_file

from geoseg.errors import ConfigError, StopError, StoreError
from geoseg.predict.bundles import load_bundle
from geoseg.predict.plan import NetworkSpec, ScenePlan, plan_scene
from geoseg.raster.scene import SceneRef
from geoseg.train import checkpoint as checkpoints
from geoseg.train.feed import ChipBatch, feed_from_threads, passes_of
from geoseg.train.job import TrainJob
from geoseg.train.log import MetricsLog
from geoseg.train.loop import Group
from geoseg.training import Prepared, keep_tables_in_threads, prepare, train_share

WORKER = Path(__file__).parents[1] / "kit" / "one_worker.py"
WHOLE = partial(feed_from_threads, threads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes(tmp_path_factory.mktemp("scenes"))


def ready(job: TrainJob) -> Prepared:
    torch.set_num_threads(1)
    return prepare(job, keep_tables=keep_tables_in_threads)


def train(job: TrainJob, *, feed: Any = WHOLE, tell: Any = lambda *_: None) -> Path:
    train_share(ready(job), feed, tell, group=Group(), device="cpu")
    return Path(job.out)


def weights(out: Path, name: str = "stage-2/last") -> dict[str, torch.Tensor]:
    return load_file(out / name / "model.safetensors")


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in MetricsLog.load(str(out), up_to=(9, 99)).records if record["kind"] == "train"]


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    return train(training(folder, folder / "undisturbed"))


def test_stages_end_with_bundles_that_predict_at_their_resolution(undisturbed: Path) -> None:
    for name, resolution_m in (("stage-1", 1.0), ("stage-2", 0.5)):
        for which in ("best", "last"):
            bundle = load_bundle(str(undisturbed / name / which))
            assert bundle.description.resolution_m == resolution_m
    assert [path.name for path in sorted((undisturbed / "checkpoints").iterdir())] == [
        "001-000000003.safetensors",
        "002-000000000.safetensors",
    ]


def test_the_log_has_each_step_and_each_evaluation_once(undisturbed: Path) -> None:
    records = MetricsLog.load(str(undisturbed), up_to=(9, 99)).records
    steps = [(record["stage"], record["stage_step"], record["step"]) for record in records if record["kind"] == "train"]
    assert steps == [(0, at, at) for at in range(1, 6)] + [(1, at, at + 5) for at in range(1, 5)]
    assert [record["step"] for record in records if record["kind"] == "validate"] == [3, 5, 9]
    assert all(0 <= record["score"] <= 1 for record in records if record["kind"] == "validate")
    gflop = [record["gflop"] for record in records]
    assert gflop == sorted(gflop)


def test_a_coarse_step_costs_what_its_pixels_cost(undisturbed: Path) -> None:
    gflop = {record["step"]: record["gflop"] for record in MetricsLog.load(str(undisturbed), up_to=(9, 99)).records}
    assert gflop[2] - gflop[1] == pytest.approx(gflop[8] - gflop[7]), "chips and batch are equal, so pixels are"


@pytest.mark.sample("[1, 4]")
@pytest.mark.parametrize("die_at", [[0, 2], [0, 4], [1, 1], [1, 4]], ids=str)
def test_killed_at_any_step_the_weights_are_those_of_an_undisturbed_run(
    folder: Path, tmp_path: Path, undisturbed: Path, die_at: list[int]
) -> None:
    out = tmp_path / "out"
    told = tmp_path / "job.json"
    told.write_text(json.dumps(values(folder, out) | {"die_at": die_at}))
    killed = subprocess.run([sys.executable, WORKER, told, "0", "1", "0"], check=False, capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()
    taken = []
    train(training(folder, out), tell=lambda kind, what: taken.append(what["step"]) if kind == "stepped" else None)
    died_at = die_at[1] + 5 * die_at[0]
    assert died_at - taken[0] < 3, "no more than the steps since the last checkpoint are repeated"
    for name in ("stage-1/best", "stage-1/last", "stage-2/best", "stage-2/last"):
        assert largest_difference(weights(out, name), weights(undisturbed, name)) == 0
    assert losses(out) == losses(undisturbed)


def test_two_workers_take_the_steps_of_one(folder: Path, tmp_path: Path, undisturbed: Path) -> None:
    """Same chips, and the mean of the gradients of the same passes; only the order of a sum differs."""
    told = tmp_path / "job.json"
    told.write_text(json.dumps(values(folder, tmp_path / "out")))
    (port,) = free_ports(1)
    workers = [
        subprocess.Popen([sys.executable, WORKER, told, str(rank), "2", str(port)], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for worker in workers:
        _, said = worker.communicate(timeout=300)
        assert worker.returncode == 0, said.decode()
    assert np.allclose(losses(tmp_path / "out"), losses(undisturbed), rtol=1e-4)
    assert largest_difference(weights(tmp_path / "out"), weights(undisturbed)) < 1e-3
    last = [
        record
        for record in MetricsLog.load(str(tmp_path / "out"), up_to=(9, 99)).records
        if record["kind"] == "validate"
    ]
    ours = [
        record for record in MetricsLog.load(str(undisturbed), up_to=(9, 99)).records if record["kind"] == "validate"
    ]
    assert np.allclose([one["score"] for one in last], [one["score"] for one in ours], atol=0.01)


@pytest.mark.parametrize(("num_passes", "world"), [(1, 1), (4, 2), (5, 2), (7, 3), (3, 3)])
def test_every_pass_has_one_worker(folder: Path, num_passes: int, world: int) -> None:
    stage = replace(ready(training(folder, folder / "dealt")).plan.stages[0], num_passes=num_passes)
    shares = [passes_of(stage, rank=rank, world=world) for rank in range(world)]
    assert [one for share in shares for one in share] == list(range(num_passes))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert min(map(len, shares)) >= 1


def test_more_workers_than_passes_are_refused(folder: Path, tmp_path: Path) -> None:
    for workers in (3, [1, 3]):
        with pytest.raises(ConfigError, match="stage 1: 3 workers share 2 passes"):
            ready(training(folder, tmp_path, cluster={"engine": "ray", "workers": workers}))


def test_another_setting_does_not_go_on_from_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    train(training(folder, tmp_path))
    with pytest.raises(ConfigError, match="other settings or other data"):
        train(training(folder, tmp_path, seed=6))
    assert losses(tmp_path), "what was there stays"


def test_a_finished_training_takes_no_step_more(folder: Path, tmp_path: Path) -> None:
    train(training(folder, tmp_path))
    train(training(folder, tmp_path), feed=lambda *_, **__: pytest.fail("a chip was asked for"))


def test_a_damaged_checkpoint_is_named(folder: Path, tmp_path: Path) -> None:
    train(training(folder, tmp_path))
    path = max((tmp_path / "checkpoints").iterdir())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StoreError, match=rf"{path.name}.*remove it"):
        train(training(folder, tmp_path))


def poisoned(*args: Any, **share: Any) -> Any:
    """Chips whose values are not numbers from the third pass on."""
    for number, batch in enumerate(feed_from_threads(*args, **share, threads=1)):
        pixels = batch.chips.pixels_bkhw.float() * (1e38 if number >= 2 else 1)
        yield ChipBatch(replace(batch.chips, pixels_bkhw=pixels), batch.failures)


def test_a_loss_that_is_no_number_stops_with_a_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StopError, match=r"stage 1, step 2: the loss is .*learning_rate"):
        train(training(folder, tmp_path), feed=poisoned)
    for path in (tmp_path / "checkpoints").glob("*"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values() if tensor.is_floating_point())


def unreadable(*args: Any, **share: Any) -> Any:
    """Chips that hold nothing."""
    for batch in feed_from_threads(*args, **share, threads=1):
        yield ChipBatch(batch.chips, tuple("a: gone" for _ in batch.chips.labels_bhw))


def test_a_step_without_a_chip_stops_with_a_sentence(folder: Path, tmp_path: Path) -> None:
    warned = []
    with pytest.raises(StopError, match=r"stage 1, step 1: not one of its chips could be read: a: gone"):
        train(training(folder, tmp_path), feed=unreadable, tell=lambda kind, what: warned.append((kind, what)))
    assert warned.count(("warned", "a: gone")) == 1, "said once"


def test_a_stage_ends_when_its_score_stands_still(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.3, 0.5, 0.5, 0.4, 0.9])
    monkeypatch.setattr("geoseg.training.Validation.scores", lambda *_: {"score": next(scores)})
    stage = {
        "chip": 32,
        "steps": 20,
        "batch": 4,
        "learning_rate": 0.01,
        "evaluate_every": 2,
        "plateau": {"patience": 2},
    }
    out = train(training(folder, tmp_path, stage=[stage]))
    assert len(losses(out)) == 8
    assert largest_difference(weights(out, "stage-1/best"), weights(out, "stage-1/last")) > 0


def test_where_no_score_is_known_the_last_is_the_best(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the scenes to validate on have no object, and the network finds none."""
    scores = iter(())
    monkeypatch.setattr("geoseg.training.Validation.scores", lambda *_: {"score": next(scores)})
    stage = {"chip": 32, "batch": 4, "learning_rate": 0.01, "schedule": "constant", "evaluate_every": 2}
    best = []
    for steps in (4, 6, 10):
        scores = iter([float("nan"), float("nan"), 0.3, float("nan"), 0.1])
        out = train(
            training(folder, tmp_path / str(steps), stage=[{**stage, "steps": steps, "plateau": {"patience": 2}}])
        )
        best.append(weights(out, "stage-1/best"))
        if steps < 10:
            assert largest_difference(best[-1], weights(out, "stage-1/last")) == 0
    assert largest_difference(best[1], best[0]) > 0
    assert largest_difference(best[2], best[1]) == 0, "one that is known stays until a better one is"


def test_validation_scenes_are_planned_once_for_each_resolution(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = []

    def plan(ref: SceneRef, spec: NetworkSpec) -> ScenePlan:
        planned.append(spec.description.resolution_m)
        return plan_scene(ref, spec)

    monkeypatch.setattr("geoseg.training.plan_scene", plan)
    out = train(training(folder, tmp_path))
    told = [one for one in MetricsLog.load(str(out), up_to=(9, 99)).records if one["kind"] == "validate"]
    assert [one["resolution_m"] for one in told] == [1.0, 1.0, 0.5]
    assert planned == [1.0, 0.5]


def test_a_training_begins_with_the_weights_of_a_bundle(folder: Path, tmp_path: Path, undisturbed: Path) -> None:
    model = values(folder, tmp_path)["model"] | {"start": str(undisturbed / "stage-2" / "best")}
    still = {"chip": 32, "steps": 1, "batch": 2, "learning_rate": 1e-12}
    out = train(training(folder, tmp_path, model=model, stage=[still], optimizer={"ema": 0.0, "weight_decay": 0.0}))
    begun = weights(undisturbed, "stage-2/best")
    ended = weights(out, "stage-1/last")
    assert all(
        torch.allclose(ended[name], begun[name], atol=1e-5)
        for name in begun
        if begun[name].is_floating_point() and "running" not in name
    )
    other = model | {"variant": {"name": "unet", "depth": 3, "width": 4, "norm": "batch"}}
    with pytest.raises(ConfigError, match=r"model\.start: tiny has variant"):
        ready(training(folder, tmp_path / "b", model=other))


@pytest.mark.parametrize("name", ["unet", "attention-unet", "resunet", "unet++"])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_each_network_trains_either_way(folder: Path, tmp_path: Path, name: str, padding: str) -> None:
    model = values(folder, tmp_path)["model"] | {"variant": {"name": name, "depth": 2, "width": 4, "norm": "batch"}}
    stage = {"chip": 32, "steps": 2, "batch": 2, "learning_rate": 0.01, "padding": padding}
    out = train(training(folder, tmp_path, model=model, stage=[stage]))
    assert np.isfinite(losses(out)).all()
    load_bundle(str(out / "stage-1" / "last"))


def test_losses_and_border_weights_of_a_stage_are_heeded(folder: Path, tmp_path: Path) -> None:
    """The first step sees the same chips and weights of the network, so only what the stage asks for tells losses apart."""
    stage = {"chip": 32, "steps": 1, "batch": 4, "learning_rate": 0.01, "focus": 1.0}
    asked = {
        "plain": {},
        "border": {"border": {"label": "building", "w0": 20.0}},
        "dice": {"loss": {"terms": [{"loss": {"name": "dice", "classes": [1, 2]}}]}},
        "both": {
            "loss": {"terms": [{"loss": {"name": "cross_entropy"}}, {"loss": {"name": "dice", "classes": [1, 2]}}]}
        },
    }
    first = {
        name: losses(train(training(folder, tmp_path / name, stage=[stage | one])))[0] for name, one in asked.items()
    }
    assert first["both"] == pytest.approx(first["plain"] + first["dice"], rel=1e-5)
    assert abs(first["border"] - first["plain"]) > 1e-4


def test_checkpoints_that_are_not_needed_go(tmp_path: Path) -> None:
    for step in range(1, 5):
        position = checkpoints.Position(
            stage=0, step=step, total_steps=step, seconds=0, gflop=0, best=None, worse=0, settings="s"
        )
        checkpoints.save_checkpoint(str(tmp_path), checkpoints.Checkpoint(position, {"x": torch.tensor([step])}))
    loaded = checkpoints.load_checkpoint(str(tmp_path))
    assert loaded is not None
    assert (loaded.position.step, loaded.tensors["x"].item()) == (4, 4)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert (checkpoints.last_step(str(tmp_path), 0), checkpoints.last_step(str(tmp_path), 1)) == (4, 0)
