"""How far a training run is: stage, step, loss, the last IoU, speed, what it waits for and when it will be done."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from geoseg.progress import StatusLine, duration

_STEPS_OF_LOSS = 50


@dataclass(frozen=True, slots=True)
class StageWork:
    """What a stage is: its pixel size in metres (None for that of the scenes), its steps, and the pixels of a step's chips."""

    resolution_m: float | None
    steps: int
    pixels_per_step: int


class TrainProgress:
    """Counts steps, chips and waiting of one process, and shows them on a stream (stderr unless told otherwise).

    A pixel of any stage is taken to cost the same, so the time left is known from the first steps on. What an earlier
    process did is not work of this one and does not count in the rates.
    """

    def __init__(self, stages: Sequence[StageWork], *, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._status = StatusLine(stream=stream, quiet=quiet)
        self._stages = tuple(stages)
        self._stage = self._step = 0
        self._losses: deque[float] = deque(maxlen=_STEPS_OF_LOSS)
        self._iou: Mapping[str, float | None] = {}
        self._started = self._stage_started = self._told = time.perf_counter()
        self._pixels_done = self._chips_of_stage = 0
        self._waited_s = 0.0

    def stage_started(self, stage: int, *, steps_done: int = 0) -> None:
        """A stage, counted from 0, begins, or goes on after steps that an earlier process took.

        It began when the last thing of the stage before was told.
        """
        self._stage, self._step = stage, steps_done
        self._losses.clear()
        self._stage_started, self._chips_of_stage, self._waited_s = self._told, 0, 0.0

    def step_done(self, loss: float, *, num_chips: int, waited_s: float) -> None:
        """A step was taken on so many chips, after ``waited_s`` seconds in which they were not there yet."""
        self._step += 1
        self._losses.append(loss)
        self._pixels_done += self._stages[self._stage].pixels_per_step
        self._chips_of_stage += num_chips
        self._waited_s += waited_s
        self._told = time.perf_counter()
        self.show()

    def validated(self, iou: Mapping[str, float | None]) -> None:
        """The IoU of each class by name; None for a class that nothing is labelled with."""
        self._iou = dict(iou)
        self._told = time.perf_counter()
        self.show()

    @property
    def chips_per_s(self) -> float:
        """Chips of this stage in a second of this process, validation and checkpoints included."""
        return self._chips_of_stage / max(1e-9, time.perf_counter() - self._stage_started)

    @property
    def share_waiting(self) -> float:
        """The share of this stage's time in which a step waited for its chips, 0 to 1."""
        return self._waited_s / max(1e-9, time.perf_counter() - self._stage_started)

    @property
    def left_s(self) -> float | None:
        """Seconds until the last stage ends, None before the first step."""
        if not self._pixels_done:
            return None
        here = self._stages[self._stage]
        left = (here.steps - self._step) * here.pixels_per_step
        left += sum(stage.steps * stage.pixels_per_step for stage in self._stages[self._stage + 1 :])
        return left * (time.perf_counter() - self._started) / self._pixels_done

    def line(self) -> str:
        """One line: how far, how well, how fast, how long still."""
        here = self._stages[self._stage]
        at = "" if here.resolution_m is None else f" at {here.resolution_m:g} m"
        parts = [f"stage {self._stage + 1}/{len(self._stages)}{at}", f"step {self._step}/{here.steps}"]
        if self._losses:
            parts.append(f"loss {sum(self._losses) / len(self._losses):.4f}")
        if self._iou:
            scores = (f"{name} {'-' if value is None else f'{value:.3f}'}" for name, value in self._iou.items())
            parts.append("IoU " + ", ".join(scores))
        parts.append(f"{self.chips_per_s:.3g} chips/s, {self.share_waiting:.0%} waiting for chips")
        parts.append("ETA " + ("not known yet" if self.left_s is None else duration(self.left_s)))
        return " | ".join(parts)

    def show(self, *, last: bool = False) -> None:
        """Show the line if it is time to."""
        self._status.show(self.line, last=last)
