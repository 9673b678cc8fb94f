"""CutMix: images of a batch with a part of another one, and the targets of both."""

import torch
from torchvision.transforms.v2 import CutMix

from .sources import Batch, Targets


def mix(batch: Batch, alpha: float) -> Batch:
    """Replace a rectangle of each image by that of another one (Yun et al., 2019).

    Its share of the area is drawn from Beta(alpha, alpha), by torch's global generator. Each image
    has the targets of both, with weights in proportion to their shares.
    """
    count = len(batch)
    numbers = torch.arange(count, device=batch.inputs.device)
    inputs, shares = CutMix(alpha=float(alpha), num_classes=count)(batch.inputs, numbers)
    own = shares.diagonal().clone()
    partners = shares.fill_diagonal_(0).argmax(1)
    targets = [
        mixed
        for values, weights in batch.targets
        for mixed in (
            Targets(values, _scale(weights, own)),
            Targets(values[partners], _scale(weights[partners], 1 - own)),
        )
    ]
    return Batch(inputs, tuple(targets))


def _scale(weights: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    return weights * shares.reshape(-1, *(1,) * (weights.ndim - 1))
