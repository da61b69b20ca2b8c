"""Training step by step: batches in, better weights out; checkpoints that it goes on from. Knows no engine.

A step is made of passes: each computes the gradient of its own chips' mean loss, and the step takes the mean over passes, so that
it does not matter which worker computes which. Batch norm sees one pass at a time; its running statistics move by the mean
over a step's passes. Legend of axes: b batch, k bands, c classes, h rows, w columns.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from geoseg.errors import StopError
from geoseg.model.bundle import Bundle
from geoseg.model.costs import shadow_of
from geoseg.model.network import Network
from geoseg.model.outside import Outside
from geoseg.model.unet_plus_plus import UNetPlusPlus
from geoseg.model.variants import build
from geoseg.raster import store
from geoseg.train.augment import augmented
from geoseg.train.checkpoint import (
    Checkpoint,
    Position,
    check_settings,
    load_checkpoint,
    load_optimizer,
    of_prefix,
    optimizer_tensors,
    save_checkpoint,
)
from geoseg.train.chips import Place, augmentation_of
from geoseg.train.feed import ChipBatch, passes_of
from geoseg.train.loss import DeepSupervision, OpenClasses, build_loss
from geoseg.train.plan import TrainPlan
from geoseg.train.stages import Stage


@dataclass(frozen=True, slots=True)
class Group:
    """The workers that train together, of which this is number ``rank``; more than one are a ``torch.distributed`` group."""

    rank: int = 0
    world: int = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all workers, in place."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor


class Feed(Protocol):
    """Gives the batches of this worker in a stage, pass by pass, from a step on."""

    def __call__(self, plan: TrainPlan, number: int, *, step: int, rank: int, world: int) -> Iterator[ChipBatch]:
        """See the class."""
        ...


class Observer(Protocol):
    """Is told how training goes; on the worker with rank 0 alone."""

    def resumed(self, position: Position) -> None:
        """Training goes on from a position, whose ``total_steps`` are 0 when it begins."""
        ...

    def stepped(self, record: dict[str, Any]) -> None:
        """Some steps were taken."""
        ...

    def evaluated(self, record: dict[str, Any]) -> None:
        """The validation scenes were looked at."""
        ...

    def warned(self, sentence: str) -> None:
        """Something went wrong that does not end training."""
        ...

    def kept(self) -> None:
        """A checkpoint is about to be put; what was told until now counts."""
        ...

    def exported(self, bundle: Bundle, name: str, stage: int) -> None:
        """The ``best`` or ``last`` bundle of a stage."""
        ...


Evaluate = Callable[[Bundle, Group], dict[str, float]]


class Trainer:
    """One worker's part of a training. ``run`` goes from the last checkpoint below ``plan.out`` to the end of the last stage.

    ``start`` has the first weights, which are random without one. ``evaluate`` gives the scores of a bundle on the validation
    scenes, the same on all workers, ``score`` among them; None when there are none.
    """

    def __init__(
        self,
        plan: TrainPlan,
        feed: Feed,
        observer: Observer,
        *,
        group: Group,
        device: str,
        start: Bundle | None,
        evaluate: Evaluate | None,
    ) -> None:
        self._plan, self._feed, self._observer, self._group = plan, feed, observer, group
        self._evaluate = evaluate
        self._device = torch.device(device)
        self._dtype = _dtype(plan.optimizer.precision, self._device)
        torch.manual_seed(plan.seed)
        network = _first_network(plan) if start is None else start.network()
        self._network = network.laid_channels_last().to(self._device)
        self._average = copy.deepcopy(self._network)
        self._optimizer = torch.optim.AdamW(_groups(self._network, plan.optimizer.weight_decay), lr=0.0)
        self._module: nn.Module = _EachLogits(self._network)
        if group.world > 1:
            # Some encoders have layers that their logits do not follow from.
            self._module = DistributedDataParallel(
                self._module, broadcast_buffers=False, find_unused_parameters=isinstance(self._network, Outside)
            )
        self._position = Position(
            stage=0, step=0, total_steps=0, seconds=0.0, gflop=0.0, best=None, worse=0, settings=plan.settings
        )
        self._speed = _Speed()

    def run(self) -> None:
        """Train to the end. Raises StopError kinds, StoreError."""
        self._resume()
        while self._position.stage < len(self._plan.stages):
            self._run_stage(self._plan.stages[self._position.stage])

    def _resume(self) -> None:
        checkpoint = load_checkpoint(self._plan.out)
        if checkpoint is not None:
            check_settings(checkpoint, self._plan.settings, self._plan.out)
            self._network.load_state_dict(of_prefix(checkpoint.tensors, "network"))
            self._average.load_state_dict(of_prefix(checkpoint.tensors, "average"))
            load_optimizer(self._optimizer, checkpoint.tensors)
            self._position = checkpoint.position
        self._check_same_position()
        if self._group.rank == 0:
            self._observer.resumed(self._position)

    def _check_same_position(self) -> None:
        """Raise StopError, on all workers, unless all of them go on from the same checkpoint."""
        ours = torch.tensor([self._position.stage, self._position.step], device=self._device)
        all_of_them = self._group.sum(ours.clone())
        if not torch.equal(all_of_them, ours * self._group.world):
            raise StopError(
                f"{store.redact(self._plan.out)}: the workers do not see the same checkpoints there; name a bucket, or a "
                "folder that all nodes share"
            )

    def _run_stage(self, stage: Stage) -> None:
        position = self._position
        group = self._group
        loss = DeepSupervision(OpenClasses(build_loss(stage.loss), self._plan.codes))
        gflop = stage.num_passes * pass_gflop(self._network, self._plan, stage)
        batches = self._feed(self._plan, position.stage, step=position.step, rank=group.rank, world=group.world)
        self._speed.forget()
        ended = False
        try:
            while not ended:
                step = self._position.step
                started = time.perf_counter()
                told = self._step(stage, step, loss, batches)
                position = self._position
                self._position = replace(
                    position,
                    step=step + 1,
                    total_steps=position.total_steps + 1,
                    seconds=position.seconds + time.perf_counter() - started,
                    gflop=position.gflop + gflop,
                )
                self._tell(stage, told)
                evaluated = stage.is_evaluated_after(step)
                if evaluated:
                    ended = self._look(stage)
                ended = ended or step + 1 == stage.steps
                if ended:
                    self._end(stage)
                if ended or evaluated or (step + 1) % self._plan.checkpoint_every == 0:
                    self._keep()
        finally:
            close = getattr(batches, "close", None)
            if close is not None:
                close()

    def _step(self, stage: Stage, step: int, loss: DeepSupervision, batches: Iterator[ChipBatch]) -> dict[str, float]:
        """One update of the weights from this worker's passes and the others': loss, learning rate, wait for chips."""
        self._network.train()
        rate = stage.learning_rate_at(step)
        for parameters in self._optimizer.param_groups:
            parameters["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        passes = passes_of(stage, rank=self._group.rank, world=self._group.world)
        buffers = _Buffers(self._network)
        waited_s = 0.0
        totals = torch.zeros(2, dtype=torch.float64, device=self._device)  # the loss, and chips that hold nothing
        for index, number in enumerate(passes):
            started = time.perf_counter()
            batch = next(batches)
            waited_s += time.perf_counter() - started
            for sentence in batch.failures:
                self._observer.warned(sentence)
            # Layers that drop at random, as networks from outside have them, drop the same on whichever worker.
            torch.manual_seed(hash((self._plan.seed, self._position.stage, step, number)) & 0x7FFFFFFF)
            last = index == len(passes) - 1
            with contextlib.nullcontext() if last or self._group.world == 1 else self._module.no_sync():  # type: ignore[operator]
                value = self._value(stage, step, number, batch, loss)
                # The gradients of all workers are averaged, so each weighs its passes with their number.
                (value * (self._group.world / stage.num_passes)).backward()  # type: ignore[no-untyped-call]
            totals += torch.stack([value.detach().double(), totals.new_tensor(float(len(batch.failures)))])
            buffers.add()
        buffers.settle(self._group, stage.num_passes)
        norm = torch.nn.utils.clip_grad_norm_(self._network.parameters(), self._plan.optimizer.clip_norm)
        self._optimizer.step()
        self._average_weights()
        loss_sum, num_failed = self._group.sum(totals).tolist()
        mean = loss_sum / stage.num_passes
        if num_failed == stage.batch:
            raise StopError(
                f"stage {self._position.stage + 1}, step {step + 1}: not one of its chips could be read"
                + (f": {batch.failures[0]}" if batch.failures else "")
            )
        if not (math.isfinite(mean) and bool(norm.isfinite())):
            raise StopError(
                f"stage {self._position.stage + 1}, step {step + 1}: the loss is {mean:g} and the gradient's norm "
                f"{float(norm):g}; the last checkpoint stands. Lower learning_rate (it was {rate:g}) or lengthen warmup_steps, "
                "or look at the imagery for values out of range"
            )
        return {"loss": mean, "learning_rate": rate, "waited_s": waited_s}

    def _value(self, stage: Stage, step: int, number: int, batch: ChipBatch, loss: DeepSupervision) -> Tensor:
        """The mean loss of a pass."""
        plan, first = self._plan, number * stage.chips_per_pass
        num_bands = len(plan.description.bands)
        augmentations = [
            augmentation_of(
                Place(self._position.stage, step, first + index), stage, seed=plan.seed, num_bands=num_bands
            )
            for index in range(stage.chips_per_pass)
        ]
        chips = augmented(
            batch.chips.to(self._device),
            augmentations,
            mean=plan.description.mean,
            value_range=plan.description.value_range,
        )
        image_bkhw = plan.description.normalization(chips.pixels_bkhw, chips.valid)
        with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            self._network.padding = stage.padding
            each_logits_bchw = self._module(image_bkhw)
        side = chips.labels_bhw.shape[-1]
        value: Tensor = loss(
            [_centre(one.float(), side) for one in each_logits_bchw], chips.labels_bhw, weights_bhw=chips.weights_bhw
        )
        return value

    def _average_weights(self) -> None:
        taken = self._position.total_steps
        keep = min(self._plan.optimizer.ema, (1 + taken) / (10 + taken)) if self._plan.optimizer.ema else 0.0
        ours, theirs = self._average.state_dict(), self._network.state_dict()
        with torch.no_grad():
            for name, tensor in theirs.items():
                if tensor.is_floating_point():
                    ours[name].lerp_(tensor, 1 - keep)
                else:
                    ours[name].copy_(tensor)

    def _tell(self, stage: Stage, told: dict[str, float]) -> None:
        self._speed.took(stage.batch, told["waited_s"])
        if self._group.rank == 0:
            shared = {"workers": self._group.world}
            self._observer.stepped({"kind": "train", **self._where(stage), **told, **shared, **self._speed.record()})

    def _where(self, stage: Stage) -> dict[str, Any]:
        """What each record of the log begins with."""
        position = self._position
        return {
            "step": position.total_steps,
            "stage": position.stage,
            "stage_step": position.step,
            "resolution_m": stage.bundle_resolution_m,
            "seconds": position.seconds,
            "gflop": position.gflop,
        }

    def _look(self, stage: Stage) -> bool:
        """Evaluate, keep the best, or the last while no score is known; whether the stage's score stands still."""
        bundle = self._bundle(stage)
        if self._evaluate is None:
            return False
        started = time.perf_counter()
        scores = self._evaluate(bundle, self._group)
        position = self._position
        score = scores["score"]
        gain = stage.plateau.gain if stage.plateau else 0.0
        is_known = math.isfinite(score)  # there is none where neither labels nor masks have a class
        better = is_known and (position.best is None or score > position.best + gain)
        is_best = position.best is None or (is_known and score > position.best)
        if is_known:
            best = score if is_best else position.best
            self._position = replace(position, best=best, worse=0 if better else position.worse + 1)
        if self._group.rank == 0:
            took = {"evaluation_s": time.perf_counter() - started}
            self._observer.evaluated({"kind": "validate", **self._where(stage), **took, **scores})
            if is_best:
                self._observer.exported(bundle, "best", position.stage)
        self._speed.forget()
        return stage.plateau is not None and self._position.worse >= stage.plateau.patience

    def _end(self, stage: Stage) -> None:
        """Export the stage's last bundle and stand at the beginning of the next."""
        if self._group.rank == 0:
            self._observer.exported(self._bundle(stage), "last", self._position.stage)
        self._position = replace(self._position, stage=self._position.stage + 1, step=0, best=None, worse=0)

    def _bundle(self, stage: Stage) -> Bundle:
        self._average.padding = "same"
        return Bundle.from_network(self._average.eval(), self._plan.description_at(stage))

    def _keep(self) -> None:
        if self._group.rank:
            return
        tensors = {f"network.{name}": tensor for name, tensor in self._network.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self._average.state_dict().items()}
        self._observer.kept()
        save_checkpoint(self._plan.out, Checkpoint(self._position, tensors | optimizer_tensors(self._optimizer)))


def pass_gflop(network: Network, plan: TrainPlan, stage: Stage) -> float:
    """Billions of floating-point operations of a pass and its gradient, counted on shapes alone."""
    shadow = _EachLogits(shadow_of(network))
    shadow.network.padding = stage.padding
    side = stage.chip + 2 * plan.context(stage)
    image_bkhw = torch.empty((stage.chips_per_pass, plan.description.num_channels, side, side), device="meta")
    with FlopCounterMode(display=False) as counter:
        torch.stack([logits_bchw.sum() for logits_bchw in shadow(image_bkhw)]).sum().backward()  # type: ignore[no-untyped-call]
    return float(counter.get_total_flops()) / 1e9


class _EachLogits(nn.Module):
    """A network's logits as a list: one, or those of each depth of a U-Net++."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, image_bkhw: Tensor) -> list[Tensor]:
        if isinstance(self.network, UNetPlusPlus):
            return self.network.all_logits(image_bkhw)
        return [self.network(image_bkhw)]


class _Buffers:
    """The running statistics of norms: each pass moves them from where the step began, and the step by the mean of that."""

    def __init__(self, network: Network) -> None:
        self._buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
        self._numbers = [buffer for buffer in network.buffers() if not buffer.is_floating_point()]
        self._counted = [number.clone() for number in self._numbers]
        self._began = [buffer.clone() for buffer in self._buffers]
        self._sums = [torch.zeros_like(buffer) for buffer in self._buffers]

    def add(self) -> None:
        """Take a pass's statistics in."""
        for buffer, began, total in zip(self._buffers, self._began, self._sums, strict=True):
            total.add_(buffer - began)
            buffer.copy_(began)

    def settle(self, group: Group, num_passes: int) -> None:
        """Move the network's statistics by the mean over the passes of all workers; a step counts as one."""
        for number, counted in zip(self._numbers, self._counted, strict=True):
            number.copy_(counted + 1)
        if not self._buffers:
            return
        moved = group.sum(torch.cat([total.flatten() for total in self._sums])) / num_passes
        parts = torch.split(moved, [buffer.numel() for buffer in self._buffers])
        for buffer, part in zip(self._buffers, parts, strict=True):
            buffer.add_(part.view_as(buffer))


class _Speed:
    """Chips per second of all workers, and the share of time that this one waited for chips, since the last evaluation."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self._waited_s = 0.0
        self._since = time.perf_counter()
        self._chips = 0

    def took(self, chips: int, waited_s: float) -> None:
        """A step is done, for whose chips this worker waited ``waited_s`` seconds."""
        self._chips += chips
        self._waited_s += waited_s

    def record(self) -> dict[str, float]:
        """Both figures."""
        seconds = max(1e-9, time.perf_counter() - self._since)
        return {"chips_per_s": self._chips / seconds, "waiting": self._waited_s / seconds}


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    """What passes are computed in."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def _first_network(plan: TrainPlan) -> Network:
    description = plan.description
    return build(description.variant, len(description.bands), len(description.classes), dates=description.dates)


def _groups(network: Network, weight_decay: float) -> list[dict[str, Any]]:
    """Weights that decay, and biases and norms that do not."""
    parameters = list(network.parameters())
    return [
        {"params": [one for one in parameters if one.ndim > 1], "weight_decay": weight_decay},
        {"params": [one for one in parameters if one.ndim <= 1], "weight_decay": 0.0},
    ]


def _centre(logits_bchw: Tensor, side: int) -> Tensor:
    """The middle of logits that reach further than the labels."""
    spare = (logits_bchw.shape[-1] - side) // 2
    return logits_bchw[..., spare : spare + side, spare : spare + side]
