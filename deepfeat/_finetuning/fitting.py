"""Fitting a network: what is trained, from which source, from where and until when."""

import math
import time
import warnings
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .._backbones.preprocessing import Preprocessing
from .._engine.threads import attempt
from .._images.records import Record
from .._layers.index import LayerIndex
from .._progress import tqdm
from .augmentation import Augment, count_views
from .checkpoints import Checkpoint
from .cutting import Cut, find_cut
from .freezing import (
    Trained,
    drop_idle_auxiliary,
    drop_small_auxiliary,
    find_trained,
    freeze,
)
from .labels import Dataset
from .networks import Network
from .progress import Progress
from .saving import blame_file
from .sources import ImageSource, Source, cache_activations
from .training import NORMS, Trainer, TrainingConfig, train

_MOMENTUM = 0.3  # at most: the last batch may be small


@dataclass(frozen=True)
class Plan:
    """A network frozen but for its trained part, where it may be cut, and how it is trained."""

    module: nn.Module
    trained: Trained
    momenta: dict[Any, float]  # of trained norms, as they were
    cut: Cut | None
    preprocessing: Preprocessing
    config: TrainingConfig


@dataclass(frozen=True)
class FitResult:
    """The outcome of a training.

    The `history` has one dict per epoch, and `best_score` is None without validation images. It may
    have been `interrupted`, by Ctrl-C or a callback.
    """

    history: list[dict[str, Any]]
    best_score: float | None
    optimizer_state: dict[str, Any] | None
    interrupted: bool


def plan_training(
    network: Network,
    blocks: tuple[str, ...],
    preprocessing: Preprocessing,
    dataset: Dataset,
    config: TrainingConfig,
    *,
    keep_auxiliary: bool,
) -> Plan:
    """Freeze the network but for its head and the blocks, in place, and find where to cut it.

    Auxiliary classifiers that are not trained are dropped unless they are to be kept.

    Raises
    ------
    ImageError
        If the first image cannot be read.
    """
    module, shape = network.module.to(config.device), preprocessing.input_shape
    index = LayerIndex(module, shape)
    trained = find_trained(module, index, blocks, network.head)
    trained = drop_small_auxiliary(module, trained, shape)
    if not keep_auxiliary:
        drop_idle_auxiliary(module, trained)
    freeze(module, trained)
    # A single epoch caches nothing, and only a CPU runs the two parts apart for speed.
    is_cut = config.epochs is not None or config.device.type == "cpu"
    momenta = _raise_momenta(module, trained, config, len(dataset))  # before a cut copies norms
    cut = None
    if is_cut:
        samples = _make_samples(preprocessing, dataset.records[0]).to(config.device)
        cut = find_cut(module, index, trained, samples)
    return Plan(module, trained, momenta, cut, preprocessing, config)


def _raise_momenta(
    module: nn.Module, trained: Trained, config: TrainingConfig, n_images: int
) -> dict[Any, float]:
    """Let running statistics follow a short training; return the momenta as they were.

    With torch's momentum of 0.1 they average over ten steps or so. Of a training of twenty steps
    that is half: `predict` would normalise by what the activations were long before its end. Here
    they average over a fifth of the training, or three steps, and from 50 steps on as in torch.
    """
    momenta: dict[Any, float] = {}
    if config.epochs is None:
        return momenta
    steps = config.epochs * math.ceil(n_images / config.batch_size)
    for path, child in module.named_modules():
        if path in trained and isinstance(child, NORMS) and child.momentum is not None:
            momenta[child] = child.momentum
            child.momentum = max(child.momentum, min(_MOMENTUM, 5 / steps))
    return momenta


def _make_samples(preprocessing: Preprocessing, record: Record) -> Tensor:
    """Make the images on which a cut is tried: noise, zeros, black, white and that of a record.

    A network may compute masks from the values of its input, such as those of padding.
    """
    pixels = attempt(Record.open, record)
    if isinstance(pixels, Exception):
        raise record.error(pixels)
    plain = (np.full_like(pixels, value) for value in (0, 255))
    prepared = [attempt(preprocessing.prepare, image) for image in (*plain, pixels)]
    if isinstance(prepared[-1], Exception):
        raise record.error(prepared[-1])
    # That of a user may be made for images of one kind.
    tensors = [sample for sample in prepared if isinstance(sample, Tensor)]
    noise = torch.rand(preprocessing.input_shape, generator=torch.Generator().manual_seed(0))
    samples = [preprocessing.normalize(tensor[None])[0] for tensor in tensors]
    return torch.stack([noise, torch.zeros_like(noise), *samples])


class Watch(Protocol):
    """Who is told of epochs."""

    def begin_epoch(self) -> None:
        """Take note of the beginning of an epoch."""

    def end_epoch(self) -> bool:
        """Take note of the end of an epoch; return whether it is to be the last."""


def run_training(
    plan: Plan,
    dataset: Dataset,
    validation: Dataset | None,
    *,
    history: list[dict[str, Any]],
    optimizer_state: dict[str, Any] | None,
    watch: Watch | None,
    checkpoint: Checkpoint | None,
) -> FitResult:
    """Train the network of a plan, in place, from where the checkpoint is if there is one.

    `history` has the epochs before; an optimizer takes over from its state, if there is one.
    torch's global generators are left as they were.

    Raises
    ------
    OSError
        If the checkpoint cannot be written before the first epoch.
    """
    config = plan.config
    batches = math.ceil(len(dataset) / config.batch_size)
    trainer = Trainer(plan.module, plan.trained, config, batches)
    if optimizer_state is not None:
        trainer.load_moments(optimizer_state)
    progress = Progress(trainer, history)
    if checkpoint is not None:
        _resume(progress, checkpoint)
    interrupted = False
    if not progress.is_over:
        with torch.random.fork_rng([config.device] if config.device.type == "cuda" else []):
            interrupted = _run_epochs(progress, plan, dataset, validation, watch, checkpoint)
    if not progress.is_complete:
        progress.complete()
        if checkpoint is not None and not interrupted:
            _write(checkpoint, progress, stacklevel=6)
    if checkpoint is not None and not interrupted:
        checkpoint.remove_activations()
    for norm, momentum in plan.momenta.items():
        norm.momentum = momentum
    plan.module.zero_grad()  # gradients take as much memory as the trained part
    interrupted = interrupted or progress.was_stopped
    return FitResult(progress.history, progress.best.score, trainer.state_dict(), interrupted)


def _run_epochs(
    progress: Progress,
    plan: Plan,
    dataset: Dataset,
    validation: Dataset | None,
    watch: Watch | None,
    checkpoint: Checkpoint | None,
) -> bool:
    """Train until the last epoch or a stop; return whether Ctrl-C came before."""
    config, start = plan.config, len(progress.history) + 1
    begin = time.perf_counter()
    source = make_source(plan, dataset, config.augment, checkpoint, mixes=config.cutmix > 0)
    validation_source = None
    if validation is not None:
        validation_source = make_source(plan, validation, None, checkpoint, mixes=False)
    preparation = time.perf_counter() - begin
    steps = progress.epochs_left * math.ceil(len(source) / config.batch_size)
    with tqdm(total=steps, unit="batch", disable=not config.verbose) as bar:

        def report(loss: float) -> None:
            bar.set_postfix(epoch=len(progress.history) + 1, loss=f"{loss:.3f}", refresh=False)
            bar.update()

        epochs = train(progress.trainer, source, validation_source, start=start, report=report)
        try:
            while not progress.is_over:
                if watch is not None:
                    watch.begin_epoch()
                epoch = next(epochs)
                progress.add(replace(epoch, seconds=epoch.seconds + preparation))
                preparation = 0.0
                if watch is not None:
                    progress.was_stopped = watch.end_epoch()
                if checkpoint is not None:
                    _write(checkpoint, progress, stacklevel=7)
        except KeyboardInterrupt:
            warnings.warn(
                f"Training was interrupted in epoch {len(progress.history) + 1}; what has been "
                "learned so far is kept.",
                UserWarning,
                stacklevel=6,  # past the decorator of fit
            )
            return True
    return False


def _resume(progress: Progress, checkpoint: Checkpoint) -> None:
    """Go on from a checkpoint; one that does not exist yet is written."""
    state = checkpoint.take_state()
    if state is not None:
        with blame_file(checkpoint.path):
            progress.load_state_dict(state)
        if progress.trainer.config.verbose:
            epoch = len(progress.history)
            what = "is complete" if progress.is_complete else f"resumes after epoch {epoch}"
            tqdm.write(f"Training {what}: {checkpoint.path}")
    elif checkpoint.stage == 0:
        checkpoint.write(progress.state_dict())  # so that it fails now rather than after an epoch
    else:
        _write(checkpoint, progress, stacklevel=7)


def _write(checkpoint: Checkpoint, progress: Progress, *, stacklevel: int) -> None:
    """Write a checkpoint; a disk that has filled up does not end the training."""
    try:
        checkpoint.write(progress.state_dict())
    except OSError as error:
        warnings.warn(
            f"The checkpoint of epoch {len(progress.history)} could not be written: {error}",
            UserWarning,
            stacklevel=stacklevel,
        )


def make_source(
    plan: Plan,
    dataset: Dataset,
    augment: Augment,
    checkpoint: Checkpoint | None,
    *,
    mixes: bool,
) -> Source:
    """Make a source of images, or of their activations if caching these saves time.

    Of images that are mixed with others, nothing can be cached.
    """
    config = plan.config
    images = ImageSource(
        dataset=dataset,
        objective=config.objective,
        augment=augment,
        device=config.device,
        seed=config.seed,
        preprocessing=plan.preprocessing,
        num_workers=config.num_workers,
        module=plan.module,
        cut=plan.cut,
    )
    views = None if mixes else count_views(augment)
    if plan.cut is None or views is None or config.epochs is None or config.epochs <= views:
        return images
    total = views * len(dataset)
    with tqdm(total=total, desc="frozen part", unit="image", disable=not config.verbose) as bar:
        activations = cache_activations(
            images,
            plan.cut,
            views=views,
            precision=config.precision,
            batch_size=config.batch_size,
            report=bar.update,
            file=None if checkpoint is None else checkpoint.name_activations(dataset),
        )
    return images if activations is None else activations
