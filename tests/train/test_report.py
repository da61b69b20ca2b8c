"""A training run as it is shown and kept: status line, log, TensorBoard events, curves and example chips."""

from __future__ import annotations

import io
import itertools
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from geoseg.errors import ConfigError
from geoseg.model.description import ClassName
from geoseg.model.pictures import as_rgb, round_ticks
from geoseg.raster import store
from geoseg.train.codes import UNLABELLED, LabelCodes
from geoseg.train.log import EVENTS, METRICS, MetricsLog, Record
from geoseg.train.progress import StageWork, TrainProgress
from geoseg.train.report import ExampleChip, chips_png, curves_png, tick_label

CLASSES = (
    ClassName(name="background", color=(0, 0, 0)),
    ClassName(name="building", color=(230, 85, 60)),
    ClassName(name="road", color=(250, 200, 60)),
)
_MEMORIES = itertools.count()


def run(*, steps: tuple[int, ...] = (6, 4), wall_clock: float = 0.0) -> list[Record]:
    """The records of a run: one for each step, and a validation after every other."""
    records: list[Record] = []
    step = 0
    for stage, num in enumerate(steps):
        for _ in range(num):
            step += 1
            at: Record = {"step": step, "stage": stage, "resolution_m": 1.2 / 2**stage, "gflop": 2.5 * step}
            records.append({**at, "kind": "train", "time": wall_clock + step, "loss": 1 / step, "learning_rate": 1e-3})
            if step % 2 == 0:
                scores: Record = {"iou/building": step / 20, "iou/road": None if step == 4 else 0.25}
                records.append({**at, "kind": "validate", "time": wall_clock + step, "loss": 1.1 / step, **scores})
    return records


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "folder" else f"memory://train-report-{next(_MEMORIES)}/run"


def crc32c(data: bytes) -> int:
    """Castagnoli's, bit by bit (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    """TFRecord's checksum of some bytes."""
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def events_of(data: bytes) -> Iterator[Event]:
    """The events of a file: 8 bytes of length, their checksum, the event, its checksum."""
    while data:
        (length,) = struct.unpack_from("<Q", data)
        content = data[12 : 12 + length]
        assert data[8:12] == masked(data[:8])
        assert data[12 + length : 16 + length] == masked(content)
        yield Event.FromString(content)
        data = data[16 + length :]


class TestMetricsLog:
    def test_comes_back_as_it_was(self, place: str) -> None:
        MetricsLog(run()).write(place)
        assert MetricsLog.load(place, up_to=(1, 10)).records == run()
        assert len(store.read(store.join(place, METRICS)).decode().splitlines()) == len(run())

    @pytest.mark.parametrize("cut", [(0, 4), (0, 6), (1, 9)])
    def test_a_resumed_run_leaves_the_log_of_an_undisturbed_one(self, place: str, cut: tuple[int, int]) -> None:
        undisturbed = MetricsLog(run())
        MetricsLog(run()[:-2]).write(place)
        resumed = MetricsLog.load(place, up_to=cut)
        assert max(record["step"] for record in resumed.records) == cut[1]
        for record in run(wall_clock=1000.0):
            if (record["stage"], record["step"]) > cut:
                resumed.add(record)
        resumed.write(place)
        kept = MetricsLog.load(place, up_to=(9, 99)).records
        without_time = [[{**record, "time": 0} for record in records] for records in (kept, undisturbed.records)]
        assert without_time[0] == without_time[1]

    def test_a_record_made_again_takes_the_place_of_the_first(self) -> None:
        log = MetricsLog(run())
        log.add({**run()[1], "loss": 7.0})
        assert [record["loss"] for record in log.records[:3]] == [run()[0]["loss"], 7.0, run()[2]["loss"]]
        assert len(log.records) == len(run())

    def test_no_log_is_an_empty_one(self, place: str) -> None:
        assert MetricsLog.load(place, up_to=(0, 0)).records == []

    @pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
    def test_what_json_has_no_number_for_is_null(self, place: str, number: float) -> None:
        log = MetricsLog([{"step": 1, "stage": 0, "kind": "train", "loss": number, "iou/road": None}])
        log.write(place)
        line = json.loads(store.read(store.join(place, METRICS)), parse_constant=pytest.fail)
        assert line["loss"] is None
        begin, only = events_of(store.read(store.join(place, *EVENTS)))
        assert begin.file_version == "brain.Event:2"
        assert list(only.summary.value) == []

    @pytest.mark.parametrize("content", [b"{", b'{"loss": 1}\n', b"3\n", b"\xff"])
    def test_a_log_of_another_kind_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / METRICS).write_bytes(content)
        with pytest.raises(ConfigError, match=r"metrics.jsonl: each line must be a record.*move the file away"):
            MetricsLog.load(str(tmp_path), up_to=(9, 9))

    def test_tensorboard_has_each_number_of_each_record(self, place: str) -> None:
        MetricsLog(run()).write(place)
        _, *events = events_of(store.read(store.join(place, *EVENTS)))
        told = {(event.step, value.tag): value.simple_value for event in events for value in event.summary.value}
        expected = {
            (record["step"], f"{record['kind']}/{name}"): value
            for record in run()
            for name, value in record.items()
            if name not in ("step", "stage", "kind", "time") and value is not None
        }
        assert told == pytest.approx(expected, rel=1e-6)
        assert [event.wall_time for event in events] == [record["time"] for record in run()]

    def test_a_watching_tensorboard_reads_on(self, place: str) -> None:
        """One file, whose bytes a later write only adds to."""
        log, before = MetricsLog(), b""
        for record in run():
            log.add(record)
            log.write(place)
            now = store.read(store.join(place, *EVENTS))
            assert now.startswith(before)
            assert len(now) > len(before)
            before = now
        assert len([one for one in store.walk(place) if "tfevents" in one.uri]) == 1


class TestTrainProgress:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        now = [0.0]
        monkeypatch.setattr("time.perf_counter", lambda: now[0])
        return now

    def test_tells_how_far_how_well_how_fast_and_how_long(self, clock: list[float]) -> None:
        """200 pixels in 8 s, 1200 are left: 48 s."""
        progress = TrainProgress([StageWork(1.2, 4, 100), StageWork(0.6, 2, 500)], quiet=True)
        progress.stage_started(0)
        assert "ETA not known yet" in progress.line()
        for loss in (1.0, 0.5):
            clock[0] += 4
            progress.step_done(loss, num_chips=16, waited_s=1.0)
        progress.validated({"building": 0.5, "road": None})
        assert progress.line() == (
            "stage 1/2 at 1.2 m | step 2/4 | loss 0.7500 | IoU building 0.500, road - | "
            "4 chips/s, 25% waiting for chips | ETA 48 s"
        )

    def test_steps_of_an_earlier_process_are_done_but_no_work_of_this_one(self, clock: list[float]) -> None:
        progress = TrainProgress([StageWork(1.2, 4, 100), StageWork(None, 10, 500)], quiet=True)
        progress.stage_started(1, steps_done=6)
        clock[0] += 3
        progress.step_done(0.25, num_chips=6, waited_s=0.0)
        assert progress.line() == ("stage 2/2 | step 7/10 | loss 0.2500 | 2 chips/s, 0% waiting for chips | ETA 9 s")

    def test_says_a_line_in_a_log_every_few_seconds(self, clock: list[float]) -> None:
        stream = io.StringIO()
        progress = TrainProgress([StageWork(None, 100, 1)], stream=stream)
        progress.stage_started(0)
        for _ in range(20):
            clock[0] += 1
            progress.step_done(1.0, num_chips=1, waited_s=0.0)
        assert [line.split(" | ")[1] for line in stream.getvalue().splitlines()] == [
            "step 5/100", "step 10/100", "step 15/100", "step 20/100"
        ]  # fmt: skip

    def test_keeps_one_line_on_a_terminal(self, clock: list[float]) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        stream = Terminal()
        progress = TrainProgress([StageWork(None, 2, 1)], stream=stream)
        progress.stage_started(0)
        for _ in range(2):
            clock[0] += 1
            progress.step_done(1.0, num_chips=1, waited_s=0.0)
        progress.show(last=True)
        assert stream.getvalue().count("\r") == 3
        assert stream.getvalue().count("\n") == 1


def pixels_of(data: bytes) -> npt.NDArray[np.uint8]:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


class TestCurves:
    def test_a_better_run_is_drawn_higher(self) -> None:
        """Flat IoU 0.25 and 0.75: the rows of their colours are as far apart as half the axis."""
        flat = [
            [{"step": step, "stage": 0, "kind": "validate", "iou/road": iou} for step in range(10)]
            for iou in (0.25, 0.75)
        ]
        picture = pixels_of(curves_png({"worse": flat[0], "better": flat[1]}))
        half = picture[80:-60, picture.shape[1] // 2 :]  # without the legend
        rows = [np.flatnonzero((half == color).all(-1).any(1)).mean() for color in ((0, 114, 178), (213, 94, 0))]
        assert rows[0] - rows[1] == pytest.approx(165, abs=2)

    @pytest.mark.parametrize("x", ["step", "gflop"])
    def test_a_run_and_several_can_be_drawn(self, x: str) -> None:
        one = pixels_of(curves_png({"run": run()}, x=x))  # type: ignore[arg-type]
        two = pixels_of(curves_png({"first": run(), "second": run(steps=(8,))}, x=x))  # type: ignore[arg-type]
        assert one.shape[1] == two.shape[1]
        assert two.shape[0] > 2 * one.shape[0]

    @pytest.mark.parametrize(
        "records",
        [[], run()[:1], [{"step": 0, "stage": 0, "kind": "train", "loss": None}]],
        ids=["nothing yet", "one step", "no number"],
    )
    def test_a_run_that_has_hardly_begun_can_be_drawn(self, records: list[Record]) -> None:
        assert pixels_of(curves_png({"run": records})).any()

    def test_a_legend_of_many_curves_takes_rows_and_leaves_the_title_and_the_curves_as_they_are(self) -> None:
        def drawn(num: int) -> npt.NDArray[np.uint8]:
            scores = {f"iou/building/a source of number {number}": 0.5 for number in range(num)}
            records: list[Record] = [{"step": step, "stage": 0, "kind": "validate", **scores} for step in range(10)]
            return pixels_of(curves_png({"run": records}))

        few, many = drawn(1), drawn(12)
        more = many.shape[0] - few.shape[0]
        assert more > 0
        left = few.shape[1] // 2
        title = few[:34, left : left + 190]
        assert (title != title[0, 0]).any()
        assert np.array_equal(many[more : more + 34, left : left + 190], title)
        assert (many[: more + 34, left : left + 190] != title[0, 0]).any(-1).sum() == (title != title[0, 0]).any(
            -1
        ).sum()
        assert (many[:more, left + 190 :] != title[0, 0]).any(), "above the title's line"

    def test_records_without_the_axis_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="run: curves over seconds need it in each record"):
            curves_png({"run": run()}, x="seconds")

    @pytest.mark.parametrize("highest", [0.003, 0.9, 1.0, 7.0, 1234.0, 25_600.0, 3.1e9])
    def test_ticks_are_round_and_neither_few_nor_many(self, highest: float) -> None:
        ticks = round_ticks(0.0, highest)
        assert 3 <= len(ticks) <= 7
        assert ticks[0] == 0
        assert highest - ticks[1] < ticks[-1] <= highest
        assert f"{ticks[1]:e}"[0] in "125"

    def test_tick_labels_are_short(self) -> None:
        assert [tick_label(value) for value in (0.0, 0.05, 250.0, 1500.0, 2e7, 3e9)] == [
            "0", "0.05", "250", "1.5k", "20M", "3G"
        ]  # fmt: skip


class TestChips:
    CODES = LabelCodes.for_sources(3, [(1,)])

    def page(self, code: int, *, image: npt.NDArray[np.generic] | None = None) -> npt.NDArray[np.uint8]:
        """The panels of one chip whose label is one code and whose mask is road, side by side."""
        image = np.full((3, 40, 40), 90, np.uint8) if image is None else image
        labels, mask = np.full((40, 40), code, np.uint8), np.full((40, 40), 2, np.uint8)
        chip = ExampleChip(image, np.ones((40, 40), np.bool_), labels, mask)
        picture = pixels_of(chips_png([chip], CLASSES, self.CODES))
        return picture[-12 - 288 : -12]

    def test_a_row_shows_image_label_and_mask(self) -> None:
        row = self.page(1)
        assert row[144, 12 + 144].tolist() == [90, 90, 90]
        assert row[144, 312 + 144].tolist() == [230, 85, 60]
        assert row[144, 612 + 144].tolist() == [250, 200, 60]

    def test_background_open_and_unlabelled_look_different(self) -> None:
        seen = [self.page(code)[:, 312:600] for code in (0, 1, 2, self.CODES.background_of((1,)), UNLABELLED)]
        means = np.array([one.reshape(-1, 3).mean(0) for one in seen])
        apart = np.abs(means[:, None] - means).max(-1) + 255 * np.eye(len(seen))
        assert apart.min() > 30
        assert len(np.unique(seen[4].reshape(-1, 3), axis=0)) > 1  # hatched
        assert len(np.unique(seen[3].reshape(-1, 3), axis=0)) == 1

    @pytest.mark.parametrize("num_bands", [1, 2, 3, 5])
    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
    def test_any_imagery_can_be_shown(self, num_bands: int, dtype: str) -> None:
        image = np.random.default_rng(0).integers(0, 200, (num_bands, 40, 40)).astype(dtype)
        assert self.page(0, image=image)[:, 12:300].std() > 10

    def test_chips_of_other_sides_share_a_page(self) -> None:
        chips = []
        for side in (64, 256):
            codes = np.zeros((side, side), np.uint8)
            chips.append(ExampleChip(np.zeros((3, side, side), np.uint8), codes == 0, codes, codes))
        assert pixels_of(chips_png(chips, CLASSES, self.CODES)).shape[0] >= 2 * 288


class TestImagesToLookAt:
    def test_bytes_stay_as_they_are_and_invalid_ones_are_grey(self) -> None:
        image = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
        valid = np.array([[True, True], [True, False]])
        seen = as_rgb(image, valid)
        assert seen[0, 1].tolist() == [1, 5, 9]
        assert seen[1, 1].tolist() == [225, 223, 218]

    def test_other_dtypes_are_stretched_by_their_valid_pixels_alone(self) -> None:
        image = np.linspace(1000, 3000, 10_000).reshape(1, 100, 100)
        valid = np.ones((100, 100), np.bool_)
        expected = as_rgb(image, valid)
        assert expected[valid].min() == 0
        assert expected[valid].max() == 255
        assert int(expected[50, 0, 0]) == pytest.approx(127, abs=2)
        valid[:10] = False
        expected = as_rgb(image, valid)
        image[0, :5], image[0, 5:10] = 1e9, np.nan
        assert np.array_equal(as_rgb(image, valid), expected)

    def test_one_value_is_a_middle_grey(self) -> None:
        seen = as_rgb(np.full((1, 4, 4), 7, np.int16), np.ones((4, 4), np.bool_))
        assert (seen == 128).all()
