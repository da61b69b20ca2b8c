"""Which windows and batches a device is fastest with, by measuring it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from geoseg.config import PredictConfig
from geoseg.model.bundle import Bundle
from geoseg.predict.mask import class_mask
from geoseg.predict.memory import set_memory_up, window_bytes
from geoseg.predict.plan import peak_of_window
from geoseg.predict.predictor import Predictor, default_device, network_spec
from geoseg.predict.tuning import Measured, device_name, remember
from geoseg.raster.raster import Raster

WINDOWS = (512, 1024, 2048, 4096, 8192)
_GPU_BATCHES = (1, 2, 4, 8, 16)
_AS_FAST = 0.97  # of the fastest: then less memory and finer pieces of work count for more
_ROUNDS = 2


def tune_device(bundle: Bundle) -> Iterator[str]:
    """Measure the device with a bundle, keep what is fastest, and tell of it line by line."""
    device = torch.device(default_device())
    yield f"{bundle.description.name} on {device_name(device)}"
    yield f"{'window':>6} {'batch':>5} {'Mpx/s':>8}"
    measured = []
    for one in measure(bundle, device=str(device)):
        measured.append(one)
        yield f"{one.window:>6} {one.batch:>5} {one.pixels_per_s / 1e6:>8.2f}"
    best = fastest(measured)
    path = remember(best, digest=bundle.digest, device=device)
    yield f"kept in {path}; to say so in a job file:"
    yield "[predict]"
    yield f"window = {best.window}"
    yield f"batch = {best.batch}"


def measure(bundle: Bundle, *, device: str) -> Iterator[Measured]:
    """The rate of each window and batch that fits the device's memory, from pixels in memory to a mask in memory."""
    set_memory_up()
    config = PredictConfig()
    predictor, spec = Predictor(bundle, config, device=device), network_spec(bundle, config)
    is_gpu = predictor.device.type == "cuda"
    room = _gpu_bytes(predictor.device) if is_gpu else window_bytes()
    rng = np.random.default_rng(0)
    for window in WINDOWS:
        core = -(-window // spec.stride) * spec.stride
        side = core + 2 * spec.margin
        shape = (len(bundle.description.bands) * bundle.description.dates, side, side)
        low, high = bundle.description.value_range
        valid = np.ones(
            (bundle.description.dates, side, side) if bundle.description.dates > 1 else (side, side), np.bool_
        )
        around = Raster(rng.integers(int(low), int(high) + 1, shape).astype(bundle.description.dtype), valid)
        for batch in _GPU_BATCHES if is_gpu else (1,):
            if window > WINDOWS[0] and batch * peak_of_window(spec, window) > room:
                break
            yield Measured(window=window, batch=batch, pixels_per_s=_rate(predictor, [around] * batch, core))


def fastest(measured: Sequence[Measured]) -> Measured:
    """The one to take: of those that are nearly the fastest the one that holds the fewest pixels at once."""
    most = max(one.pixels_per_s for one in measured)
    return min(
        (one for one in measured if one.pixels_per_s >= _AS_FAST * most), key=lambda one: one.window**2 * one.batch
    )


def _rate(predictor: Predictor, around: list[Raster], core: int) -> float:
    valid = np.ones((core, core), np.bool_)
    seconds = []
    for _ in range(1 + _ROUNDS):  # the first one also warms up
        start = time.perf_counter()
        for logits_chw, _ in predictor.cores(around):
            class_mask(logits_chw, valid, predictor.description)
        seconds.append(time.perf_counter() - start)
    return len(around) * core**2 / min(seconds[1:])


def _gpu_bytes(device: torch.device) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    return int(0.8 * free)
