"""The samples of a training: images, augmented, or activations kept of them."""

import functools
import itertools
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn

from .._backbones.preprocessing import Preprocessing
from .._engine.batches import run_in_batches, stack
from .._engine.devices import Outputs, Precision, to_device
from .._engine.threads import Workers, attempt, map_in_threads
from .._extraction.readers import TorchReader
from .._images.records import Record
from .cutting import Cut

Augment: TypeAlias = Literal["flip", "crop"] | Callable[[Image.Image], Image.Image] | None
Places: TypeAlias = NDArray[np.intp]

_CROP_AREA = 0.08, 1.0  # of the image's
_CROP_RATIO = 3 / 4, 4 / 3  # of width to height
_CROP_TRIES = 10
MEMORY_LIMIT = 2 * 2**30  # bytes of kept activations; more of them lie in a file


@dataclass(frozen=True)
class ImageSamples:
    """Images that are opened, augmented and prepared anew each time they are drawn.

    `squash` prepares an image without cropping it; "crop" needs it. Draws of one `seed` and epoch
    are equal.
    """

    records: Sequence[Record]
    preprocessing: Preprocessing
    squash: Callable[[Image.Image], Tensor] | None
    augment: Augment
    device: torch.device
    num_workers: Workers
    seed: int

    def draw(self, places: Places, batch_size: int, epoch: int | None) -> Iterator[Tensor]:
        """Yield batches of what the network takes, on the device; of no epoch, unaugmented.

        Raises
        ------
        ImageError
            If an image cannot be read.
        """
        flips = draw_flips(self.augment, self.seed, epoch, len(self.records))
        records = [self.records[place] for place in places]

        def prepare(place: int, image: Image.Image) -> Tensor:
            image = ImageOps.mirror(image) if flips[place] else image
            return self._augment(image, place, epoch)

        def open_image(place: int) -> Image.Image:
            return self.records[place].open()

        def open_and_prepare(place: int) -> Tensor:
            return prepare(place, open_image(place))

        # What the user's function draws at random comes in one order in one thread alone.
        in_turn = callable(self.augment) and epoch is not None
        work: Callable[[int], Any] = open_image if in_turn else open_and_prepare
        results = map_in_threads(work, places.tolist(), self.num_workers, ahead=2 * batch_size)
        tensors: list[Tensor] = []
        for number, (place, result) in enumerate(results, start=1):
            if in_turn and not isinstance(result, Exception):
                result = attempt(functools.partial(prepare, place), result)
            if isinstance(result, Exception):
                raise self.records[place].error(result)
            tensors.append(result)
            if len(tensors) == batch_size or number == len(places):
                batch = stack(records[number - len(tensors) : number], tensors)
                yield self.preprocessing.normalize(to_device(batch, self.device))
                tensors = []

    def _augment(self, image: Image.Image, place: int, epoch: int | None) -> Tensor:
        if epoch is None or self.augment in (None, "flip"):
            return self.preprocessing.prepare(image)
        if callable(self.augment):
            image = self.augment(image)
            if not isinstance(image, Image.Image):
                raise TypeError(
                    f"augment gave a {type(image).__name__}, and a PIL image is expected: "
                    "normalising and turning into a tensor is done by the preprocessing."
                )
            return self.preprocessing.prepare(image.convert("RGB"))
        assert self.squash is not None
        rng = np.random.default_rng([self.seed, epoch, place])
        return self.squash(crop_at_random(image, rng))


@dataclass(frozen=True)
class KeptSamples:
    """Activations at the boundary of the trained part, of each image and view, kept as float32.

    `activations` has the shape (views, n, d): of the images as they are, then of them mirrored.
    """

    activations: NDArray[np.float32]
    shape: tuple[int, ...]  # of one image's
    augment: Augment
    device: torch.device
    seed: int

    def draw(self, places: Places, batch_size: int, epoch: int | None) -> Iterator[Tensor]:
        """Yield batches of what the boundary takes, on the device; of no epoch, unaugmented."""
        views = draw_flips(self.augment, self.seed, epoch, self.activations.shape[1]).astype(int)
        for start in range(0, len(places), batch_size):
            chosen = places[start : start + batch_size]
            rows = torch.from_numpy(self.activations[views[chosen], chosen])
            yield to_device(rows.reshape(len(chosen), *self.shape), self.device)


def count_views(augment: Augment) -> int | None:
    """Count the views of an image that training can see; None where there is no end of them."""
    return {None: 1, "flip": 2}.get(augment) if not callable(augment) else None


def keep_activations(
    samples: ImageSamples,
    module: nn.Module,
    cut: Cut,
    *,
    views: int,
    precision: Precision,
    batch_size: int,
    report: Callable[[int], None],
) -> KeptSamples | None:
    """Run the frozen beginning of a network once over every view of every image.

    What it gives is kept in memory up to `MEMORY_LIMIT`, else in a temporary file; None where
    the disk has no room for that. `report` is told how many images are done.
    """
    shape: tuple[int, ...] = ()

    def forward(batch: Tensor) -> Outputs:
        nonlocal shape
        activations = cut.run_prefix(batch)
        shape = tuple(activations.shape[1:])
        return {"": activations.float().flatten(1)}

    def open_view(sample: tuple[int, int]) -> Image.Image:
        view, place = sample
        image = samples.records[place].open()
        return ImageOps.mirror(image) if view else image

    count = len(samples.records)
    kept: NDArray[np.float32] | None = None
    reader = TorchReader(module, forward, samples.preprocessing, samples.device, precision)
    for batch in run_in_batches(
        reader,
        itertools.product(range(views), range(count)),
        open_view,
        batch_size=batch_size,
        num_workers=samples.num_workers,
    ):
        for (_, place), error in batch.failures:
            raise samples.records[place].error(error)
        rows = batch.rows[""]
        if kept is None and (kept := _allocate((views, count, rows.shape[1]))) is None:
            return None
        for sample, row in zip(batch.samples, rows, strict=True):
            kept[sample] = row
        report(len(rows))
    assert kept is not None  # there is at least one image
    return KeptSamples(kept, shape, samples.augment, samples.device, samples.seed)


def draw_flips(augment: Augment, seed: int, epoch: int | None, count: int) -> NDArray[np.bool_]:
    """Draw which images are mirrored in an epoch."""
    if epoch is None or augment not in ("flip", "crop"):
        return np.zeros(count, dtype=bool)
    return np.random.default_rng([seed, epoch]).random(count) < 0.5


def crop_at_random(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Crop an image to a random part of 8 to 100 % of its area, between 3:4 and 4:3.

    Szegedy et al. (2015), "Going Deeper with Convolutions", draw the area and the ratio of the
    sides so. Where no such part lies inside the image after some tries, it is left whole.
    """
    width, height = image.size
    for _ in range(_CROP_TRIES):
        area = width * height * rng.uniform(*_CROP_AREA)
        ratio = math.exp(rng.uniform(math.log(_CROP_RATIO[0]), math.log(_CROP_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(width - w, endpoint=True))
            top = int(rng.integers(height - h, endpoint=True))
            return image.crop((left, top, left + w, top + h))
    return image


def _allocate(shape: tuple[int, ...]) -> NDArray[np.float32] | None:
    """Make room for activations; a file for it is gone with the array."""
    size = 4 * math.prod(shape)
    if size <= MEMORY_LIMIT:
        return np.empty(shape, dtype=np.float32)
    if size > shutil.disk_usage(tempfile.gettempdir()).free // 2:
        return None
    with tempfile.TemporaryFile(prefix="deepfeat-") as file:
        return np.memmap(file, dtype=np.float32, mode="w+", shape=shape)
