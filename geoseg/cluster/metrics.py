"""What a run tells Prometheus through Ray: counters with the run's id as a label, exported as ``ray_<name>_total``.

Rates are sums over workers: series of workers that ended linger, so ``sum by (run) (rate(...))``, never a raw value.
"""

from __future__ import annotations

from collections.abc import Sequence

from ray.util.metrics import Counter

from geoseg.predict.ledger import SceneReport
from geoseg.predict.reading import WindowDone

# The name of each counter, what it counts, and its labels beside ``run``; the dashboard in infra/grafana asks for these.
COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "geoseg_scenes": ("Scenes settled, by status", ("status",)),
    "geoseg_windows": ("Write windows ended, by outcome", ("outcome",)),
    "geoseg_pixels": ("Valid pixels predicted", ()),
    "geoseg_km2": ("Ground under the valid pixels predicted, in square kilometres", ()),
    "geoseg_bytes_read": ("Bytes of imagery fetched", ()),
    "geoseg_seconds": ("Seconds of workers, by step; 'wait' is the network waiting for pixels", ("step",)),
}


def _counter(name: str, run_id: str) -> Counter:
    description, labels = COUNTERS[name]
    counter = Counter(name, description, tag_keys=("run", *labels))
    counter.set_default_tags({"run": run_id})
    return counter


class WindowMeter:
    """A worker's counters."""

    def __init__(self, run_id: str) -> None:
        self._windows = _counter("geoseg_windows", run_id)
        self._pixels = _counter("geoseg_pixels", run_id)
        self._km2 = _counter("geoseg_km2", run_id)
        self._bytes = _counter("geoseg_bytes_read", run_id)
        self._seconds = _counter("geoseg_seconds", run_id)
        self._waited_s = 0.0

    def window(self, done: WindowDone) -> None:
        """A window ended, well or not."""
        self._windows.inc(1, {"outcome": "failed" if done.failure else "skipped" if done.skipped else "done"})
        for counter, amount in (
            (self._pixels, done.valid_pixels),
            (self._km2, done.area_km2),
            (self._bytes, done.bytes_fetched),
        ):
            if amount > 0:
                counter.inc(amount)
        for step, seconds in (("read", done.read_s), ("predict", done.predict_s), ("write", done.write_s)):
            if seconds > 0:
                self._seconds.inc(seconds, {"step": step})

    def waited(self, in_all_s: float) -> None:
        """The network has waited that long for pixels since the worker began."""
        if in_all_s > self._waited_s:
            self._seconds.inc(in_all_s - self._waited_s, {"step": "wait"})
            self._waited_s = in_all_s


class SceneMeter:
    """The driver's counter."""

    def __init__(self, run_id: str) -> None:
        self._scenes = _counter("geoseg_scenes", run_id)
        self._told = 0

    def settled(self, reports: Sequence[SceneReport]) -> None:
        """Count the reports that were added since the last call."""
        for report in reports[self._told :]:
            self._scenes.inc(1, {"status": report.status})
        self._told = len(reports)
