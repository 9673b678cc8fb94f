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
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from .._engine.devices import Precision, autocast, empty_cache, is_out_of_memory
from .._layers.trace import first_tensor
from .freezing import Trained, group_parameters, set_train_mode

OptimizerName: TypeAlias = Literal["adamw", "sgd"]
ScheduleName: TypeAlias = Literal["cosine", "one-cycle", "constant"]

_MOMENTUM = 0.9
_RISE = 0.3  # of a one-cycle schedule without a warm-up of its own, as in torch
_AUXILIARY_WEIGHT = 0.3  # Szegedy et al. (2015), "Going Deeper with Convolutions"
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: scikit-learn's parameters of the same names."""

    optimizer: OptimizerName
    learning_rate: float
    backbone_learning_rate: float
    weight_decay: float
    schedule: ScheduleName
    warmup_epochs: float
    label_smoothing: float
    max_grad_norm: float | None
    batch_size: int
    precision: Precision
    device: torch.device
    seed: int


@dataclass(frozen=True)
class Samples:
    """What is learned from, or checked on: labels, weights, and where the images come from.

    `draw` yields, for places, a batch size and an epoch or None, batches of what `forward` takes.
    """

    targets: Tensor  # (n,) int64, on the device
    weights: Tensor  # (n,) float32, on the device
    draw: Callable[[NDArray[np.intp], int, int | None], Iterator[Tensor]]
    forward: Callable[[Tensor], Any]


@dataclass(frozen=True)
class Epoch:
    """What came of one epoch; of validation nothing, where there are no samples for that."""

    epoch: int
    train_loss: float
    train_score: float
    validation_loss: float | None
    validation_score: float | None
    learning_rate: float  # at its beginning
    backbone_learning_rate: float
    seconds: float
    images_per_second: float


def train(
    learner: "Learner",
    samples: Samples,
    validation: Samples | None,
    *,
    start: int = 1,
    report: Callable[[float], None] = lambda loss: None,
) -> Iterator[Epoch]:
    """Train one epoch a step, and check it. The caller decides when to stop and what to keep.

    `report` is told the loss of each batch.
    """
    for number in itertools.count(start):
        begin = time.perf_counter()
        rates = learner.learning_rates()
        loss, score = learner.run_epoch(samples, number, report)
        seconds = time.perf_counter() - begin
        checks = (None, None) if validation is None else learner.evaluate(validation)
        if checks[0] is not None and not math.isfinite(checks[0]):
            raise learner.diverged(f"the validation loss became {checks[0]}", number)
        yield Epoch(
            epoch=number,
            train_loss=loss,
            train_score=score,
            validation_loss=checks[0],
            validation_score=checks[1],
            learning_rate=rates[0],
            backbone_learning_rate=rates[1],
            seconds=time.perf_counter() - begin,
            images_per_second=len(samples.targets) / seconds,
        )


class Learner:
    """A network with its optimizer, its schedule, and what is known of the device's memory.

    Parameters
    ----------
    module : torch.nn.Module
        The network, on the recipe's device and frozen but for what is `trained`.
    trained : Trained
        What is trained of it.
    recipe : Recipe
        How.
    batches : int
        Batches an epoch.
    epochs : int or None
        Epochs that the schedule is laid out for; None keeps the learning rates as they are.
    """

    def __init__(
        self, module: nn.Module, trained: Trained, recipe: Recipe, batches: int, epochs: int | None
    ):
        self.module = module
        self.trained = trained
        self.recipe = recipe
        head, backbone = group_parameters(module, trained)
        self._parameters = head + backbone
        self.optimizer = make_optimizer(recipe, head, backbone)
        self._schedule = make_schedule(recipe, self.optimizer, batches, epochs)
        self._scaler = torch.amp.GradScaler(
            recipe.device.type, enabled=recipe.precision == "float16"
        )
        self._fitting = recipe.batch_size  # images that fit into memory at once

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state, and the names of what it trains."""
        names = [name for name, _ in self.module.named_parameters() if name in self.trained]
        return {
            "names": names,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the state of an optimizer, where it trained the same parameters likewise."""
        mine = self.state_dict()
        groups, mine_groups = state["optimizer"]["param_groups"], mine["optimizer"]["param_groups"]
        if state["names"] == mine["names"] and groups[0].keys() == mine_groups[0].keys():
            # A copy: an optimizer goes on in the very tensors that it is given.
            moments = copy.deepcopy(state["optimizer"]["state"])
            self.optimizer.load_state_dict({"state": moments, "param_groups": mine_groups})
            if self._scaler.is_enabled() and state["scaler"]:
                self._scaler.load_state_dict(state["scaler"])

    def learning_rates(self) -> tuple[float, float]:
        """Return the learning rates of now, of the head and of the backbone."""
        head, backbone = (float(group["lr"]) for group in self.optimizer.param_groups)
        return head, backbone

    def run_epoch(
        self, samples: Samples, number: int, report: Callable[[float], None]
    ) -> tuple[float, float]:
        """Learn from each sample once, in random order; return mean loss and accuracy."""
        set_train_mode(self.module, self.trained)
        rng = np.random.default_rng([self.recipe.seed, number])
        _seed_dropout(self.recipe.device, int(rng.integers(2**62)))
        places = rng.permutation(len(samples.targets))
        totals = _Totals()
        latest: Tensor | None = None
        for inputs, chosen in self._draw(samples, places, number):
            sums = self._learn(samples, inputs, chosen)
            totals.add(*sums)
            # Asked for a batch late, the loss is not waited for.
            if latest is not None:
                report(self._check(latest, number))
            latest = sums[0] / sums[2].clamp(min=1e-12)
        if latest is not None:
            report(self._check(latest, number))
        if not all(bool(torch.isfinite(value).all()) for value in self._parameters):
            raise self.diverged("the weights became infinite or NaN", number)
        return totals.means()

    def evaluate(self, samples: Samples) -> tuple[float, float]:
        """Return mean loss, without label smoothing, and accuracy, in eval mode."""
        self.module.eval()
        totals = _Totals()
        for inputs, chosen in self._draw(samples, np.arange(len(samples.targets)), None):
            with torch.no_grad():
                totals.add(*self._in_parts(samples, inputs, chosen, learn=False))
        return totals.means()

    def diverged(self, what: str, number: int) -> ValueError:
        """Return an error that tells what to lower."""
        or_wider = " or precision='bfloat16'" * (self.recipe.precision == "float16")
        return ValueError(
            f"{what} in epoch {number}: lower learning_rate ({self.recipe.learning_rate:g}) or "
            f"backbone_learning_rate ({self.recipe.backbone_learning_rate:g}), or set "
            f"max_grad_norm=1.0{or_wider}."
        )

    def _draw(
        self, samples: Samples, places: NDArray[np.intp], epoch: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches with the places of what they hold."""
        start = 0
        for inputs in samples.draw(places, self.recipe.batch_size, epoch):
            yield inputs, torch.from_numpy(places[start : start + len(inputs)])
            start += len(inputs)

    def _learn(self, samples: Samples, inputs: Tensor, chosen: Tensor) -> tuple[Tensor, ...]:
        """Take one step; return the sums of losses, of weights where right, and of weights."""
        while True:
            sums = self._in_parts(samples, inputs, chosen, learn=True)
            if self.recipe.max_grad_norm is not None:
                self._scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self._parameters, self.recipe.max_grad_norm)
            scale = self._scaler.get_scale()
            self._scaler.step(self.optimizer)
            self._scaler.update()
            if self._scaler.get_scale() >= scale:
                self._schedule.step()
                return sums
            # Gradients overflowed in half precision, and the step was left out.
            if not torch.isfinite(sums[0]) or scale < 1:
                return sums

    def _in_parts(
        self, samples: Samples, inputs: Tensor, chosen: Tensor, *, learn: bool
    ) -> tuple[Tensor, ...]:
        """Run a batch; where memory runs out, in parts whose gradients add up to the same."""
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                return self._run(samples, inputs, chosen, learn)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                device, size = self.recipe.device, min(self._fitting, len(inputs))
                if size == 1:
                    raise MemoryError(
                        f"{device} has no memory to train on a single image: {error}"
                    ) from error
            # Only here, past the except clause, are the tensors of the failed pass freed.
            empty_cache(device)
            self._fitting = size // 2
            warnings.warn(
                f"{device} ran out of memory; going on with parts of {self._fitting} images, whose "
                f"gradients add up to those of a batch of {len(inputs)}.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _run(
        self, samples: Samples, inputs: Tensor, chosen: Tensor, learn: bool
    ) -> tuple[Tensor, ...]:
        targets, weights = samples.targets[chosen], samples.weights[chosen]
        sums = torch.zeros(3, device=inputs.device)
        for start in range(0, len(inputs), self._fitting):
            here = slice(start, start + self._fitting)
            target, weight = targets[here], weights[here]
            with autocast(self.recipe.device, self.recipe.precision), ExitStack() as undo:
                if len(target) == 1:
                    _normalize_as_learned(self.module, undo)
                output = samples.forward(inputs[here])
            logits = first_tensor(output)
            # A tuple of others than GoogLeNet and Inception may hold anything after the logits.
            auxiliary = output[1:] if len(self.trained.head) > 1 else ()
            smoothing = self.recipe.label_smoothing if learn else 0.0
            losses = F.cross_entropy(
                logits.float(), target, reduction="none", label_smoothing=smoothing
            )
            if learn:
                for other in auxiliary:
                    if other is not None:
                        losses = losses + _AUXILIARY_WEIGHT * F.cross_entropy(
                            other.float(), target, reduction="none", label_smoothing=smoothing
                        )
                loss = self._scaler.scale((losses * weight).sum() / len(inputs))
                loss.backward()  # type: ignore[no-untyped-call]
            right = (logits.argmax(1) == target) * weight
            sums += torch.stack([(losses.detach() * weight).sum(), right.sum(), weight.sum()])
        return tuple(sums)

    def _check(self, loss: Tensor, number: int) -> float:
        value = loss.item()
        if not math.isfinite(value):
            raise self.diverged(f"the loss became {value}", number)
        return value


class _Totals:
    """Sums over an epoch, on the device."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, *sums: Tensor) -> None:
        stacked = torch.stack(sums)
        self._sums = stacked if self._sums is None else self._sums + stacked

    def means(self) -> tuple[float, float]:
        """Return the weighted means of loss and accuracy."""
        assert self._sums is not None  # there is at least one batch
        loss, right, weight = self._sums.tolist()
        return loss / weight, right / weight


def make_optimizer(
    recipe: Recipe, head: list[nn.Parameter], backbone: list[nn.Parameter]
) -> torch.optim.Optimizer:
    """Make an optimizer with a group for the head, and one for what is trained of the backbone."""
    groups = [
        {"params": head, "lr": recipe.learning_rate},
        {"params": backbone, "lr": recipe.backbone_learning_rate},
    ]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        groups, momentum=_MOMENTUM, nesterov=True, weight_decay=recipe.weight_decay
    )


def make_schedule(
    recipe: Recipe, optimizer: torch.optim.Optimizer, batches: int, epochs: int | None
) -> LRScheduler:
    """Make the schedule of the learning rates, which takes a step a batch.

    After a linear warm-up, "cosine" falls to zero (Loshchilov and Hutter, 2017). "one-cycle"
    rises and falls (Smith and Topin, 2019), the former during the warm-up if there is one.
    """
    steps = 1 if epochs is None else batches * epochs
    warmup = min(steps - 1, round(recipe.warmup_epochs * batches))
    if recipe.schedule == "one-cycle" and steps > 2:
        peaks = [group["lr"] for group in optimizer.param_groups]
        # torch divides by the lengths of rise and fall; the rise ends a step before this share.
        rise = max(2, warmup or _RISE * steps) / steps
        return OneCycleLR(optimizer, peaks, total_steps=steps, pct_start=rise, cycle_momentum=False)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if epochs is None or recipe.schedule != "cosine":
            return 1.0
        return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

    return LambdaLR(optimizer, factor)


def _seed_dropout(device: torch.device, seed: int) -> None:
    """Seed the generators that dropout draws from; `torch.manual_seed` seeds all devices'."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _normalize_as_learned(module: nn.Module, undo: ExitStack) -> None:
    """Let BatchNorm use its running statistics: of a single image it might have none."""
    for child in module.modules():
        if isinstance(child, _NORMS) and child.training:
            undo.callback(child.train)
            child.eval()
