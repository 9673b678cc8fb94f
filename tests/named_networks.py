"""Named networks and pictures that the tests of backbones share."""

import functools
import pickle
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision import models

from deepfeat._backbones.find import find_backbone

exactly = functools.partial(assert_close, rtol=0, atol=0)
CPU = torch.device("cpu")
NAME = "squeezenet1_1"
TORCHVISIONS = models.list_models(module=models)
ALL_WEIGHTS = [
    (name, weights) for name in sorted(TORCHVISIONS) for weights in models.get_model_weights(name)
]


def random_state(name: str, seed: int = 0, **options: Any) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return models.get_model(name, weights=None, **options).state_dict()


def load(*args: Any, **kwargs: Any) -> nn.Module:
    return find_backbone(*args, **kwargs).load(CPU)


def picture(width: int, height: int) -> Image.Image:
    """Draw an image whose pixels are all different from their neighbours."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


PICTURES = {"portrait": picture(97, 151), "landscape": picture(330, 201), "tiny": picture(5, 3)}


def as_tensor(image: Image.Image) -> Tensor:
    """Turn an image into a small tensor, in double precision."""
    return torch.from_numpy(np.asarray(image.resize((48, 32)), dtype=np.float64)).permute(2, 0, 1)


def forbidden(*_args: Any, **_kwargs: Any) -> Any:
    raise AssertionError("called")


class untouched_generators:
    """Check that the state of no global generator changes inside."""

    def __enter__(self) -> None:
        self.before = self.states()

    def __exit__(self, *_error: object) -> None:
        assert self.states() == self.before

    def states(self) -> list[bytes]:
        states = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
        others = (random.getstate(), np.random.get_state())  # noqa: NPY002
        return [*(state.numpy().tobytes() for state in states), *map(pickle.dumps, others)]


def run_in_threads(*works: Callable[[], None]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
