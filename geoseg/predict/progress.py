"""Progress with a rate and an ETA: a live line on a terminal, one line every few seconds in a log."""

from __future__ import annotations

import time
from typing import TextIO

from geoseg.predict.plan import ScenePlan
from geoseg.progress import StatusLine, duration


class Progress:
    """Counts scenes, windows, pixels and ground, and shows them on a stream (stderr unless told otherwise)."""

    def __init__(self, num_scenes: int, *, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._status = StatusLine(stream=stream, quiet=quiet)
        self.num_scenes = num_scenes
        self.scenes_planned = self.scenes_settled = self.scenes_bad = 0
        self.windows_planned = self.windows_done = self.windows_failed = 0
        self.pixels_planned = self.pixels_done = self.bytes_fetched = 0
        self.area_km2 = 0.0
        self.num_gpus = self.num_cpus = 0.0
        self.started = time.perf_counter()
        self.startup_s = 0.0
        self._working_since = self.started
        self._ended = 0.0

    def ready(self, at: float | None = None) -> None:
        """The first worker stands (``at``: since when, in seconds since 1970; now if None).

        The time until then was start-up and does not count in the rates. Only the first call has a say.
        """
        if self.startup_s:
            return
        ago = max(0.0, time.time() - at) if at is not None else 0.0
        self._working_since = max(self.started, time.perf_counter() - ago)
        self.startup_s = self._working_since - self.started

    def held_by_workers(self, *, gpus: float, cpus: float) -> None:
        """The workers take up as many GPUs and CPU cores."""
        self.num_gpus, self.num_cpus = gpus, cpus

    def scene_planned(self, plan: ScenePlan, num_windows: int) -> None:
        """A scene's windows are known."""
        self.scenes_planned += 1
        self.windows_planned += num_windows
        whole = plan.scene.grid.width * plan.scene.grid.height
        self.pixels_planned += whole * num_windows // plan.num_windows

    def plan_anew(self) -> None:
        """What was planned and is not done will be planned again."""
        self.scenes_planned, self.windows_planned = self.scenes_settled, self.windows_done
        self.pixels_planned = self.pixels_done

    def window_skipped(self, pixels: int) -> None:
        """A window was done by an earlier run, and so is no work of this one."""
        self.windows_planned -= 1
        self.pixels_planned -= pixels

    def window_done(self, *, pixels: int, area_km2: float, bytes_fetched: int, failed: bool) -> None:
        """A window ended, well or not."""
        self.windows_done += 1
        self.windows_failed += failed
        self.pixels_done += pixels
        self.area_km2 += area_km2
        self.bytes_fetched += bytes_fetched

    def scene_settled(self, status: str) -> None:
        """A scene is published, unchanged, held back, refused or failed."""
        self.scenes_settled += 1
        if self.scenes_settled == self.num_scenes:
            self._ended = time.perf_counter()
        self.scenes_bad += status in ("held", "refused", "failed")
        if status in ("refused", "unchanged"):
            self.scenes_planned += 1
        self.show()

    @property
    def working_s(self) -> float:
        """Seconds from when the first worker stood until now, or until the last scene was settled."""
        return max(1e-9, (self._ended or time.perf_counter()) - self._working_since)

    def line(self) -> str:
        """One line: how far, how fast, how long still."""
        mpx = self.pixels_done / 1e6
        rate = mpx / self.working_s
        km2_h = self.area_km2 / self.working_s * 3600
        known = self.pixels_planned * (self.num_scenes / self.scenes_planned if self.scenes_planned else 1)
        left_s = (known - self.pixels_done) / (self.pixels_done / self.working_s) if self.pixels_done else float("nan")
        eta = duration(left_s) if self.pixels_done else "not known yet"
        bad = f", {self.scenes_bad} bad" if self.scenes_bad else ""
        return (
            f"scenes {self.scenes_settled}/{self.num_scenes}{bad} | windows {self.windows_done}/{self.windows_planned} | "
            f"{mpx:.1f} Mpx at {rate:.2f} Mpx/s, {km2_h:.3g} km2/h | ETA {eta}"
        )

    def show(self, *, last: bool = False) -> None:
        """Show the line if it is time to."""
        self._status.show(self.line, last=last)
