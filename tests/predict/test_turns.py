"""A huge scene keeps nobody waiting, and nobody keeps it from going on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit.oracle import digests
from kit.scenes import noise, tiny_bundle, write_scene

from geoseg.config import load_job
from geoseg.predict.drain import Drain
from geoseg.predict.ledger import Ledger, prepare_scene
from geoseg.predict.local import predict_locally
from geoseg.predict.plan import RunSpec, ScenePlan, plan_from_json
from geoseg.predict.progress import Progress
from geoseg.predict.reading import Task, WindowDone
from geoseg.predict.turns import Turn, take_turns
from geoseg.raster.scene import SceneRef
from geoseg.raster.versions import Versions
from geoseg.raster.window import Window
from geoseg.run import list_refs, make_run_spec

MIB = 1 << 20


class Known(Versions):
    """Sizes as a test says."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        self._sizes = sizes


def turns_of(sizes: dict[str, int]) -> list[Turn]:
    return take_turns([SceneRef(name, name) for name in sizes], Known(sizes))


def test_small_scenes_come_first_and_those_of_a_size_stay_in_order() -> None:
    sizes = {"huge": 500 * MIB, "z": 3000, "b": 40_000, "a": 2100, "y": 33_000, "unknown": 0}
    turns = turns_of(sizes)
    assert [turn.ref.id for turn in turns[:5]] == ["unknown", "z", "a", "b", "y"]
    assert turns[5:] == [Turn(SceneRef("huge", "huge"), index, 8) for index in range(8)]


def test_scenes_of_one_size_or_of_none_that_is_known_are_not_cut() -> None:
    for size in (0, 5000 * MIB):
        assert turns_of(dict.fromkeys("cab", size)) == [Turn(SceneRef(name, name)) for name in "cab"]
    assert turns_of({}) == []


def test_a_huge_scene_gets_a_fourth_of_the_work_however_many_small_ones_there_are() -> None:
    turns = turns_of({"huge": 640 * MIB, **{f"s{number}": MIB for number in range(10_000)}})
    places = [place for place, turn in enumerate(turns) if turn.ref.id == "huge"]
    assert places == [193 * number + 192 for number in range(10)]


def test_a_few_large_scenes_are_at_work_at_once() -> None:
    small = dict.fromkeys((f"s{number}" for number in range(99)), MIB)
    turns = turns_of({**{f"l{number}": 300 * MIB for number in range(9)}, **small})[99:]
    assert len(turns) == 9 * 5
    open_at = [len({t.ref.id for t in turns[:at]} & {t.ref.id for t in turns[at:]}) for at in range(len(turns))]
    assert max(open_at) == 4
    assert turns[0].ref.id != turns[1].ref.id


@pytest.mark.parametrize("num", [0, 1, 2, 7, 144, 160_001])
def test_each_window_is_in_one_turn(num: int) -> None:
    windows = [Window(number, 0, 1, 1) for number in range(num)]
    ref = SceneRef("a", "a")
    shares = [list(Turn(ref, index, 5).share(iter(windows), num)) for index in range(5)]
    assert [window for share in shares for window in share] == windows


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene of 16 windows that is the first by name, and six of one window."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scene(folder / "a-huge.tif", noise(3, 2000, 2000))
    for number in range(6):
        write_scene(folder / f"b{number}.tif", noise(3, 60 + number, 50, seed=number))
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


def run_of(scenes: Path, out: Path, bundle: str) -> tuple[RunSpec, list[SceneRef]]:
    values = {"scenes": [str(scenes)], "out": str(out), "bundle": bundle, "predict": {"window": 512}}
    job = load_job(None, values)
    run = make_run_spec(job)
    return run, list_refs(job, run)


class Watched(Progress):
    """Keeps how many windows were done as each scene was settled."""

    def __init__(self, num_scenes: int) -> None:
        super().__init__(num_scenes, quiet=True)
        self.windows_before: list[int] = []

    def scene_settled(self, status: str) -> None:
        super().scene_settled(status)
        self.windows_before.append(self.windows_done)


def predict(turns: list[Turn], run: RunSpec, progress: Progress) -> Ledger:
    ledger = Ledger(progress)
    predict_locally(turns, run, ledger, read_threads=1, check=lambda: None, drain=Drain())
    return ledger


def test_small_scenes_are_published_before_a_huge_one_is_through(scenes: Path, bundle: str, tmp_path: Path) -> None:
    run, refs = run_of(scenes, tmp_path, bundle)
    versions = Versions()
    versions.look_up(ref.uri for ref in refs)
    progress = Watched(len(refs))
    ledger = predict(take_turns(refs, versions), run, progress)
    assert [report.status for report in ledger.reports] == ["published"] * 7
    assert ledger.reports[-1].id == "a-huge"
    assert progress.windows_before[-2] <= 8, "with the huge scene first all of its 16 windows came before"


def test_turns_change_no_mask(scenes: Path, bundle: str, tmp_path: Path) -> None:
    run, refs = run_of(scenes, tmp_path / "whole", bundle)
    predict([Turn(ref) for ref in refs], run, Progress(7, quiet=True))
    cut, refs = run_of(scenes, tmp_path / "cut", bundle)
    huge, *small = refs
    progress = Watched(7)
    turns = [Turn(huge, 1, 3), *map(Turn, small[:3]), Turn(huge, 0, 3), *map(Turn, small[3:]), Turn(huge, 2, 3)]
    predict(turns, cut, progress)
    assert progress.windows_done == progress.windows_planned == 16 + 6
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_a_scene_that_is_replaced_between_its_turns_fails(scenes: Path, bundle: str, tmp_path: Path) -> None:
    run, (huge, *_) = run_of(scenes, tmp_path / "out", bundle)
    path = write_scene(tmp_path / "a-huge.tif", np.zeros((3, 1000, 1000), np.uint8))
    ref = SceneRef(huge.id, str(path))
    ledger, plans = Ledger(Progress(1, quiet=True)), []
    for seed in (1, 2):
        write_scene(path, noise(3, 1000, 1000, seed=seed))
        plan = prepare_scene(ref, run)
        assert isinstance(plan, ScenePlan)
        plans.append(plan)
        assert ledger.planned(plan, 4) is None
    for number in range(4):
        assert ledger.window_done(ref.id, Window(512 * (number % 2), 512 * (number // 2), 8, 8)) is None
    assert ledger.reports[0].status == "failed"
    assert "replaced in its store while it was at work" in ledger.reports[0].sentence


def test_a_scene_is_planned_on_a_cluster_when_it_has_its_turn(scenes: Path, bundle: str, tmp_path: Path) -> None:
    """In the order of the turns, be they many or few."""
    rows = pytest.importorskip("geoseg.cluster.rows")
    run, refs = run_of(scenes, tmp_path, bundle)
    for turns in ([Turn(ref, 1, 2) for ref in refs], [Turn(ref) for ref in refs] * 40):
        source = rows.PlannedScenes(turns, run, alone=False)
        tables = [table for task in source.get_read_tasks(1) for table in task()]
        assert [one.turn for one in unpacked(tables)] == turns
        assert len(source.get_read_tasks(1)) == source.num_tasks


def test_a_turn_lists_its_windows_and_tells_how_many_the_scene_has(scenes: Path, bundle: str, tmp_path: Path) -> None:
    rows = pytest.importorskip("geoseg.cluster.rows")
    run, (huge, *_) = run_of(scenes, tmp_path, bundle)
    sizes = rows.Sizes(least=5, most=5, workers=1)
    listed: list[Window] = []
    for index in range(3):
        (task,) = rows.PlannedScenes([Turn(huge, index, 3)], run, alone=False).get_read_tasks(1)
        (table,) = task()
        first, *others = unpacked(rows.list_scene_windows(table, run, sizes=sizes, only_todo=False))
        assert [one.num_windows for one in first.opened] == [16]
        assert not any(share.opened for share in others)
        listed += [window for share in (first, *others) for _, window in share.windows]
        assert len(listed) == 16 * (index + 1) // 3
    assert len(set(listed)) == 16


def test_shares_are_large_at_first_and_small_in_the_end(scenes: Path, bundle: str, tmp_path: Path) -> None:
    """16 windows for 2 workers; then small scenes, of which several come together unless each is to be alone."""
    rows = pytest.importorskip("geoseg.cluster.rows")
    run, refs = run_of(scenes, tmp_path, bundle)
    table = rows.pa.concat_tables(
        table
        for task in rows.PlannedScenes(list(map(Turn, refs)), run, alone=False).get_read_tasks(1)
        for table in task()
    )

    def sizes_of(sizes: Any) -> list[tuple[int, int]]:
        shares = unpacked(rows.list_scene_windows(table, run, sizes=sizes, only_todo=False))
        told = [plan_from_json(share.plans[place]).scene.id for share in shares for place, _ in share.windows]
        assert sorted(told) == sorted(["a-huge"] * 16 + [ref.id for ref in refs[1:]])
        assert [one.turn.ref for share in shares for one in share.opened] == refs
        return [(len(share.opened), len(share.windows)) for share in shares]

    assert sizes_of(rows.Sizes(least=2, most=64, workers=2)) == [
        (1, 4), (0, 2), (0, 2), (0, 2), (0, 2), (0, 2), (0, 2), (2, 2), (2, 2), (2, 2)
    ]  # fmt: skip
    wide = rows.Sizes(least=4, most=64, workers=2)
    assert [wide.of(window) for window in (512, 1024, 2048, 8192)] == [
        wide, wide, rows.Sizes(least=2, most=32, workers=2), rows.Sizes(least=1, most=2, workers=2)
    ]  # fmt: skip
    alone = sizes_of(rows.Sizes(least=1, most=1, workers=2))
    assert sorted(set(alone)) == [(0, 1), (1, 0)]


@pytest.mark.parametrize("num_begun", [16, 9, 0])
def test_a_share_gives_the_same_rows_whenever_it_is_worked_on(
    num_begun: int, scenes: Path, bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever order windows end, and whether they are begun: of a second try Ray drops as many rows as came of the first."""
    rows, operators = (pytest.importorskip(f"geoseg.cluster.{name}") for name in ("rows", "operators"))
    run, (huge, *_) = run_of(scenes, tmp_path, bundle)
    (task,) = rows.PlannedScenes([Turn(huge)], run, alone=True).get_read_tasks(1)
    (table,) = rows.list_scene_windows(*task(), run, sizes=rows.Sizes(least=16, most=16, workers=1), only_todo=False)
    actor = operators.PredictWindows.__new__(operators.PredictWindows)
    actor._ready_at, actor._told_together = 1.0, 5
    actor._worker, actor._meter, actor._rest = Backwards(), Silent(), Silent()
    monkeypatch.setattr(Silent, "asked", -num_begun)
    first, *others = unpacked(actor(table))
    assert [one.turn.ref for one in first.opened] == [huge]
    assert [len(outcome.windows) for outcome in others] == [5, 5, 5, 1]
    ended = [one for outcome in others for one in outcome.windows]
    assert [one.window for one in ended] == [task.window for share in unpacked([table]) for task in share.tasks()]
    assert [one.left for one in ended] == [False] * num_begun + [True] * (16 - num_begun)


class Backwards:
    """A worker that takes all windows and tells of the last one first."""

    waited_s = 0.0

    def run(self, tasks: Iterable[Task], _: None) -> list[WindowDone]:
        """See ``Worker``."""
        return [WindowDone(task=task) for task in tasks][::-1]


class Silent:
    """A meter that nobody reads, and a sign that goes up when it was asked some times."""

    asked = 0

    def window(self, done: WindowDone) -> None:
        """See ``WindowMeter``."""

    def waited(self, in_all_s: float) -> None:
        """See ``WindowMeter``."""

    def is_up(self) -> bool:
        """See ``RestSign``."""
        Silent.asked += 1
        return Silent.asked > 0


def unpacked(tables: Iterable[Any]) -> list[Any]:
    """What the rows of some tables hold."""
    rows = pytest.importorskip("geoseg.cluster.rows")
    return [rows.unpack(packed) for table in tables for packed in table["packed"].to_pylist()]
