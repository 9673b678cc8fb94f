"""`predict_categories`: images classified by a network's own head, in the words of its weights."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._backbones.find import Backbone, find_backbone
from .._backbones.networks import count_outputs
from .._backbones.preprocessing import Resize
from .._backbones.state_files import Weights
from .._engine.batches import run_in_batches
from .._engine.devices import Precision, find_device
from .._engine.threads import Workers
from .._images.decoding import unwrap_tensor
from .._images.records import ImageError, Record, as_records, is_tabular
from .._parameters import check_parameters


def predict_categories(
    images: Any,
    backbone: str = "vgg16",
    *,
    weights: Weights = "DEFAULT",
    top: int = 5,
    resize: Resize = "weights",
    image_size: int | None = None,
    image_shape: tuple[int, ...] | None = None,
    batch_size: int = 32,
    device: str | torch.device = "auto",
    precision: Precision = "float32",
    num_workers: Workers = "auto",
) -> list[list[tuple[str, float]]]:
    """Tell what a pretrained network sees in images: its most probable categories.

    The categories are those that the weights were trained to tell apart, 1,000 of ImageNet for
    the weights that torchvision publishes.

    Parameters
    ----------
    images : sequence or array of n images
        Whatever `DeepFeatureExtractor` takes as X.
    backbone : str, default="vgg16"
        One of `list_backbones()`.
    weights : str, path or torchvision weights, default="DEFAULT"
        As for `DeepFeatureExtractor`, but not None: random weights know no categories. Outputs of
        a file are named as those of "DEFAULT", if there are as many.
    top : int, default=5
        Number of categories an image.
    resize : {"weights", "squash", "pad"}, default="weights"
        As for `DeepFeatureExtractor`.
    image_size : int, optional
        As for `DeepFeatureExtractor`.
    image_shape : tuple of int, optional
        As for `DeepFeatureExtractor`.
    batch_size : int, default=32
        As for `DeepFeatureExtractor`.
    device : str or torch.device, default="auto"
        As for `DeepFeatureExtractor`.
    precision : {"float32", "bfloat16", "float16"}, default="float32"
        As for `DeepFeatureExtractor`.
    num_workers : int or "auto", default="auto"
        As for `DeepFeatureExtractor`.

    Returns
    -------
    categories : list of n lists of `top` pairs (str, float)
        For each image the names of categories with their probabilities, the most probable first.
        Pairs, since a name is read together with its probability: `dict(categories[i])` looks one
        up, and `pandas.DataFrame(categories[i])` makes a table. The probabilities of all
        categories, of which these are the largest, sum to 1.

    Raises
    ------
    ValueError
        If an image cannot be read, the outputs have no names, there are fewer than `top`, or an
        argument is out of its range.
    OSError
        If the weights cannot be downloaded.

    Examples
    --------
    >>> from deepfeat import predict_categories
    >>> from sklearn.datasets import load_sample_images
    >>> photographs = load_sample_images().images
    >>> for categories in predict_categories(photographs, top=1):  # doctest: +SKIP
    ...     print(categories)

    The backbone that comes with deepfeat needs no download, but knows no such categories:

    >>> predictions = predict_categories(photographs, "resnet10_slim", top=3)
    >>> [len(pairs) for pairs in predictions]
    [3, 3]
    """
    if not isinstance(backbone, str):
        raise TypeError(
            f"backbone must be a name; got a {type(backbone).__name__}, whose categories are not "
            "known."
        )
    params = {"top": top, "resize": resize, "batch_size": batch_size}
    check_parameters(
        predict_categories, params | {"precision": precision, "num_workers": num_workers}
    )
    found = find_backbone(backbone, weights, resize=resize, image_size=image_size)
    names = _name_outputs(found, weights)
    if top > len(names):
        raise ValueError(
            f"top must be at most {len(names)}, as {found.name} has no more categories; got {top}."
        )
    records = _find_records(images, image_shape)
    target = find_device(device)
    module = found.load(target)
    steps = found.preprocessing

    def classify(batch: Tensor) -> dict[str, Tensor]:
        return {"probabilities": module(steps.normalize(batch)).float().softmax(dim=1)}

    predictions: list[list[tuple[str, float]]] = []
    for batch in run_in_batches(
        module,
        classify,
        records,
        lambda record: steps.prepare(record.open()),
        device=target,
        precision=precision,
        batch_size=batch_size,
        num_workers=num_workers,
    ):
        for record, error in batch.failures:
            raise record.error(error)
        for record, row in zip(batch.samples, batch.rows["probabilities"], strict=True):
            if not np.isfinite(row).all():
                raise ImageError(str(record), "the network gave NaN or infinity for it")
            order = np.argsort(-row, kind="stable")[:top]
            predictions.append([(names[place], float(row[place])) for place in order])
    return predictions


def _name_outputs(backbone: Backbone, weights: Weights) -> tuple[str, ...]:
    if backbone.categories is None:
        raise ValueError(
            f"The {count_outputs(backbone.skeleton)} outputs of {backbone.name} with "
            f"weights={weights!r} have no names: names come with published weights, such as "
            "'DEFAULT', and are taken from there for a file with as many outputs."
        )
    return backbone.categories


def _find_records(images: Any, image_shape: tuple[int, ...] | None) -> list[Record]:
    images = unwrap_tensor(images)
    if is_tabular(images):
        images = np.asarray(images)
    return as_records(images, image_shape)
