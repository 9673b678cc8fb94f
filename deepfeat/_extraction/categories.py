"""`predict_categories`: the most probable categories of the classes a network was trained on."""

from typing import Any

import numpy as np
import torch

from .._backbones.find import Backbone, find_backbone
from .._backbones.preprocessing import Resize
from .._backbones.state_files import Weights
from .._engine.batches import run_in_batches
from .._engine.devices import Precision
from .._engine.threads import Workers
from .._images.records import ImageError, Record, as_records
from .._parameters import check_parameters
from .readers import find_engine, make_logit_reader


def predict_categories(
    backbone: str,
    images: Any,
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
    """Classify images with the head of a pretrained network: its most probable categories.

    The categories are those that the weights were trained on: 1,000 of ImageNet for the weights
    that torchvision publishes.

    Parameters
    ----------
    backbone : str
        One of `list_backbones()`.
    images : sequence or array of n images
        Whatever `DeepFeatureExtractor` takes as X.
    weights : str, path or torchvision weights, default="DEFAULT"
        As for `DeepFeatureExtractor`, but not None: random weights have no categories. The outputs
        of a weights file are named like those of "DEFAULT" if there are as many.
    top : int, default=5
        Number of categories per image.
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
        For each image, names of categories with their probabilities, the most probable first.
        `dict(categories[i])` looks up a probability by name, and `pandas.DataFrame(categories[i])`
        makes a table. The probabilities of all categories, of which these are the largest, sum to
        1.

    Raises
    ------
    ValueError
        If an image cannot be read, the outputs have no names, there are fewer than `top`, or an
        argument is invalid.
    OSError
        If the weights cannot be downloaded.

    Examples
    --------
    >>> from deepfeat import predict_categories
    >>> from sklearn.datasets import load_sample_images
    >>> photographs = load_sample_images().images
    >>> for categories in predict_categories("resnet50", photographs, top=1):  # doctest: +SKIP
    ...     print(categories)

    The backbone that comes with deepfeat needs no download, but does not know such categories:

    >>> predictions = predict_categories("resnet10_slim", photographs, top=3)
    >>> [len(pairs) for pairs in predictions]
    [3, 3]
    """
    if not isinstance(backbone, str):
        raise TypeError(
            f"backbone, the first argument, must be a name; got a {type(backbone).__name__}. (The "
            "categories of a module of your own are not known.)"
        )
    params = {"top": top, "resize": resize, "batch_size": batch_size}
    check_parameters(
        predict_categories, params | {"precision": precision, "num_workers": num_workers}
    )
    found = find_backbone(backbone, weights, resize=resize, image_size=image_size)
    names = _name_outputs(found, weights)
    if top > len(names):
        raise ValueError(
            f"top must be at most {len(names)}, the number of {found.name}'s categories; got {top}."
        )
    records = as_records(images, image_shape)
    engine = find_engine("torch", device, precision)
    network = found.load(engine.device)
    reader = make_logit_reader(found.name, network, found.preprocessing, engine)
    predictions: list[list[tuple[str, float]]] = []
    for batch in run_in_batches(
        reader, records, Record.open, batch_size=batch_size, num_workers=num_workers
    ):
        for record, error in batch.failures:
            raise record.error(error)
        probabilities = torch.from_numpy(batch.rows["logits"]).softmax(dim=1).numpy()
        for record, row in zip(batch.samples, probabilities, strict=True):
            if not np.isfinite(row).all():
                raise ImageError(str(record), "the network gave NaN or infinity for it")
            order = np.argsort(-row, kind="stable")[:top]
            predictions.append([(names[index], float(row[index])) for index in order])
    return predictions


def _name_outputs(backbone: Backbone, weights: Weights) -> tuple[str, ...]:
    if backbone.categories is None:
        raise ValueError(
            f"The outputs of {backbone.name} with weights={weights!r} have no category names: they "
            "come with published weights, such as 'DEFAULT', and are used for a file with as many "
            "outputs."
        )
    return backbone.categories
