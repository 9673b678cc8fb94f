"""The training loop: loss, optimizer steps, schedules, epochs."""

import copy
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from .._engine.devices import Precision, autocast, empty_cache, is_out_of_memory
from .._engine.threads import Workers
from .._layers.trace import first_tensor
from .augmentation import Augment
from .freezing import Trained, group_parameters, set_train_mode
from .mixing import mix
from .objectives import Objective
from .sources import Batch, Source

Score: TypeAlias = Callable[[NDArray[Any], float], float]  # of logits and their mean loss
OptimizerName: TypeAlias = Literal["adamw", "sgd"]
ScheduleName: TypeAlias = Literal["cosine", "one-cycle", "constant"]

_MOMENTUM = 0.9
_RISE = 0.3  # share of the steps in which a one-cycle schedule rises, as in torch
_AUXILIARY_WEIGHT = 0.3  # Szegedy et al. (2015), "Going Deeper with Convolutions"
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class TrainingConfig:
    """How a network is trained: parameters of the classifier, most by the same names.

    If `epochs` is None, it is trained for one epoch at constant learning rates. `score` is what
    validation images are scored by; None stands for accuracy.
    """

    objective: Objective
    epochs: int | None
    batch_size: int
    optimizer: OptimizerName
    learning_rate: float
    backbone_learning_rate: float
    weight_decay: float
    schedule: ScheduleName
    warmup_epochs: float
    label_smoothing: float
    cutmix: float
    max_grad_norm: float | None
    augment: Augment
    early_stopping: bool
    n_iter_no_change: int
    tol: float
    score: Score | None
    device: torch.device
    precision: Precision
    num_workers: Workers
    seed: int
    verbose: int


@dataclass(frozen=True)
class Epoch:
    """Metrics of one epoch; those of validation are None without validation images."""

    epoch: int
    train_loss: float
    train_score: float
    validation_loss: float | None
    validation_score: float | None
    learning_rate: float  # at the start of the epoch
    backbone_learning_rate: float
    seconds: float
    images_per_second: float


def train(
    trainer: "Trainer",
    source: Source,
    validation: Source | None,
    *,
    start: int = 1,
    report: Callable[[float], None] = lambda loss: None,
) -> Iterator[Epoch]:
    """Train and validate, one epoch per step; the caller decides when to stop and what to keep.

    Epochs count from `start`. `report` is called with the loss of each batch.
    """
    for number in itertools.count(start):
        begin = time.perf_counter()
        rates = trainer.learning_rates()
        loss, score = trainer.run_epoch(source, number, report)
        seconds = time.perf_counter() - begin
        validated = (None, None) if validation is None else trainer.evaluate(validation)
        if validated[0] is not None and not math.isfinite(validated[0]):
            raise trainer.diverged(f"The validation loss became {validated[0]}", number)
        yield Epoch(
            epoch=number,
            train_loss=loss,
            train_score=score,
            validation_loss=validated[0],
            validation_score=validated[1],
            learning_rate=rates[0],
            backbone_learning_rate=rates[1],
            seconds=time.perf_counter() - begin,
            images_per_second=len(source) / seconds,
        )


class Trainer:
    """A network with its optimizer, its schedule, and the part of a batch that fits into memory.

    Parameters
    ----------
    module : torch.nn.Module
        The network, on the device of `config`, with all but the `trained` part frozen.
    trained : Trained
        The part that is trained.
    config : TrainingConfig
        How it is trained.
    batches : int
        Batches per epoch.
    """

    def __init__(self, module: nn.Module, trained: Trained, config: TrainingConfig, batches: int):
        self.module = module
        self.trained = trained
        self.config = config
        head, backbone = group_parameters(module, trained)
        self._parameters = head + backbone
        self.optimizer = make_optimizer(config, head, backbone)
        self._schedule = make_schedule(config, self.optimizer, batches)
        self._scaler = torch.amp.GradScaler(
            config.device.type, enabled=config.precision == "float16"
        )
        self._part_size = config.batch_size  # images that fit into memory at once

    def state_dict(self) -> dict[str, Any]:
        """Return all that changes from step to step but the network."""
        return {
            "names": [name for name, _ in self.module.named_parameters() if name in self.trained],
            "optimizer": self.optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
            "part_size": self._part_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from the state of a trainer of the same network and configuration."""
        self.optimizer.load_state_dict(state["optimizer"])
        self._match_formats()
        self._schedule.load_state_dict(state["schedule"])
        self._scaler.load_state_dict(state["scaler"])
        self._part_size = state["part_size"]

    def load_moments(self, state: dict[str, Any]) -> None:
        """Take over what an optimizer of the same kind knows of the same parameters.

        Any other state is ignored.
        """
        own = self.state_dict()
        groups, own_groups = state["optimizer"]["param_groups"], own["optimizer"]["param_groups"]
        if state["names"] == own["names"] and groups[0].keys() == own_groups[0].keys():
            # A copy: an optimizer updates in place the tensors that it is given.
            moments = copy.deepcopy(state["optimizer"]["state"])
            self.optimizer.load_state_dict({"state": moments, "param_groups": own_groups})
            if self._scaler.is_enabled() and state["scaler"]:
                self._scaler.load_state_dict(state["scaler"])

    def _match_formats(self) -> None:
        """Give moments the memory format of their parameters, which a file does not keep."""
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)

    def learning_rates(self) -> tuple[float, float]:
        """Return the current learning rates of the head and of the backbone."""
        head, backbone = (float(group["lr"]) for group in self.optimizer.param_groups)
        return head, backbone

    def run_epoch(
        self, source: Source, number: int, report: Callable[[float], None]
    ) -> tuple[float, float]:
        """Train on each image once, in random order; return mean loss and accuracy."""
        set_train_mode(self.module, self.trained)
        rng = np.random.default_rng([self.config.seed, number])
        _seed_dropout(self.config.device, int(rng.integers(2**62)))
        indices = rng.permutation(len(source))
        totals = torch.zeros(3, device=self.config.device)
        latest: Tensor | None = None
        for batch in source.draw(indices, self.config.batch_size, number):
            mixed = mix(batch, self.config.cutmix) if self.config.cutmix else batch
            sums = self._step(source, mixed)
            totals += sums
            # Read one batch late, the loss does not stall the device.
            if latest is not None:
                report(self._check_loss(latest, number))
            latest = sums[0] / sums[2].clamp(min=1e-12)
        if latest is not None:
            report(self._check_loss(latest, number))
        if not all(bool(torch.isfinite(value).all()) for value in self._parameters):
            raise self.diverged("The weights became infinite or NaN", number)
        return _means(totals)

    def evaluate(self, source: Source) -> tuple[float, float]:
        """Return mean loss, without label smoothing, and score, in eval mode."""
        self.module.eval()
        totals = torch.zeros(3, device=self.config.device)
        logits: list[Tensor] = []
        for batch in source.draw(np.arange(len(source)), self.config.batch_size, None):
            with torch.no_grad():
                sums, outputs = self._run_in_parts(source, batch, learn=False)
            totals += sums
            logits.append(outputs)
        loss, accuracy = _means(totals)
        if self.config.score is None:
            return loss, accuracy
        return loss, self.config.score(torch.cat(logits).double().cpu().numpy(), loss)

    def diverged(self, what: str, number: int) -> ValueError:
        """Return an error that says which parameters to lower."""
        or_wider = " or precision='bfloat16'" * (self.config.precision == "float16")
        return ValueError(
            f"{what} in epoch {number}: lower learning_rate ({self.config.learning_rate:g}) or "
            f"backbone_learning_rate ({self.config.backbone_learning_rate:g}), or set "
            f"max_grad_norm=1.0{or_wider}."
        )

    def _step(self, source: Source, batch: Batch) -> Tensor:
        """Take one step of the optimizer; return the sums of the batch, as `_run` has them."""
        while True:
            sums, _ = self._run_in_parts(source, batch, learn=True)
            if self.config.max_grad_norm is not None:
                self._scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self._parameters, self.config.max_grad_norm)
            scale = self._scaler.get_scale()
            self._scaler.step(self.optimizer)
            self._scaler.update()
            if self._scaler.get_scale() >= scale:
                self._schedule.step()
                return sums
            # Gradients overflowed in half precision, and the scaler skipped the step.
            if not torch.isfinite(sums[0]) or scale < 1:
                return sums

    def _run_in_parts(self, source: Source, batch: Batch, *, learn: bool) -> tuple[Tensor, Tensor]:
        """Run a batch; when memory runs out, in parts whose gradients add up to the same."""
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                return self._run(source, batch, learn)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                device, size = self.config.device, min(self._part_size, len(batch))
                if size == 1:
                    raise MemoryError(
                        f"{device} does not have enough memory to train on a single image: {error}"
                    ) from error
            # Only here, past the except clause, are the tensors of the failed pass freed.
            empty_cache(device)
            self._part_size = size // 2
            warnings.warn(
                f"{device} ran out of memory; continuing with parts of {self._part_size} images, "
                f"whose gradients add up to those of a batch of {len(batch)}.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _run(self, source: Source, batch: Batch, learn: bool) -> tuple[Tensor, Tensor]:
        """Run a batch, backwards too if it is to `learn`.

        Return three sums over its images, of weighted losses, of the weights of those classified
        correctly, and of all weights; and their logits.
        """
        sums = torch.zeros(3, device=self.config.device)
        outputs: list[Tensor] = []
        objective = self.config.objective
        smoothing = self.config.label_smoothing if learn else 0.0
        for part in batch.split(self._part_size):
            with autocast(self.config.device, self.config.precision), ExitStack() as undo:
                if len(part) == 1:
                    _use_running_statistics(self.module, undo)
                output = source.forward(part.inputs)
            logits = first_tensor(output)
            auxiliary = self._auxiliary_logits(output) if learn else []
            loss = torch.zeros((), device=self.config.device)
            for targets, weights in part.targets:
                losses = objective.compute_losses(logits.float(), targets, smoothing)
                for others in auxiliary:
                    losses = losses + _AUXILIARY_WEIGHT * objective.compute_losses(
                        others.float(), targets, smoothing
                    )
                columns = weights.reshape(len(part), -1)  # one, or one per label
                totals = columns.mean(1)
                correct = objective.find_correct(logits, targets) * totals
                weighted = (losses * columns).mean(1).sum()
                loss = loss + weighted
                sums += torch.stack([weighted.detach(), correct.sum(), totals.sum()])
            if learn:
                self._scaler.scale(loss / len(batch)).backward()  # type: ignore[no-untyped-call]
            outputs.append(logits.detach())
        return sums, torch.cat(outputs)

    def _auxiliary_logits(self, output: Any) -> list[Tensor]:
        """Return the outputs of the auxiliary classifiers of GoogLeNet and Inception."""
        # The output of other networks may be a tuple that holds anything after the logits.
        if not self.trained.has_auxiliary:
            return []
        return [logits for logits in output[1:] if logits is not None]

    def _check_loss(self, loss: Tensor, number: int) -> float:
        value = loss.item()
        if not math.isfinite(value):
            raise self.diverged(f"The loss became {value}", number)
        return value


def _means(totals: Tensor) -> tuple[float, float]:
    """Return the weighted mean loss and accuracy of the sums over an epoch."""
    loss, correct, weight = totals.tolist()
    return loss / weight, correct / weight


def make_optimizer(
    config: TrainingConfig, head: list[nn.Parameter], backbone: list[nn.Parameter]
) -> torch.optim.Optimizer:
    """Make an optimizer with one group for the head and one for the rest of the trained part."""
    groups = [
        {"params": head, "lr": config.learning_rate},
        {"params": backbone, "lr": config.backbone_learning_rate},
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        groups, momentum=_MOMENTUM, nesterov=True, weight_decay=config.weight_decay
    )


def make_schedule(
    config: TrainingConfig, optimizer: torch.optim.Optimizer, batches: int
) -> LRScheduler:
    """Make the schedule of the learning rates, which takes one step per batch.

    After a linear warm-up, "cosine" falls to zero (Loshchilov and Hutter, 2017). "one-cycle"
    rises, during the warm-up if there is one, and falls (Smith and Topin, 2019).
    """
    steps = 1 if config.epochs is None else batches * config.epochs
    warmup = min(steps - 1, round(config.warmup_epochs * batches))
    if config.schedule == "one-cycle" and steps > 2:
        peaks = [group["lr"] for group in optimizer.param_groups]
        # torch divides by the lengths of rise and fall; the rise ends one step before this share.
        rise = max(2, warmup or _RISE * steps) / steps
        return OneCycleLR(optimizer, peaks, total_steps=steps, pct_start=rise, cycle_momentum=False)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if config.epochs is None or config.schedule != "cosine":
            return 1.0
        return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

    return LambdaLR(optimizer, factor)


def _seed_dropout(device: torch.device, seed: int) -> None:
    """Seed the generators that dropout draws from; `torch.manual_seed` would seed all devices."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _use_running_statistics(module: nn.Module, undo: ExitStack) -> None:
    """Let BatchNorm use its running statistics: a single image may not have any variance."""
    for child in module.modules():
        if isinstance(child, NORMS) and child.training:
            undo.callback(child.train)
            child.eval()
