"""Descriptions of weights: the network, the preprocessing of images and the names of outputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torchvision.models import WeightsEnum

from .preprocessing import Preprocessing, Resize, preprocess_like


class Description(Protocol):
    """What is known of weights without loading them; hashable."""

    @property
    def network(self) -> str:
        """The name of the network that they belong to."""

    @property
    def categories(self) -> Sequence[str] | None:
        """The names of the outputs; None if they have no names."""

    def preprocess(self, resize: Resize, image_size: int | None) -> Preprocessing:
        """Return the preprocessing that the weights were trained for."""


@dataclass(frozen=True)
class EnumDescription:
    """A description by an entry of torchvision's enumerations."""

    network: str
    entry: WeightsEnum

    @property
    def categories(self) -> Sequence[str] | None:
        """Names of the outputs; None of VGG16's features, which come without a classifier."""
        categories: Sequence[str] | None = self.entry.meta["categories"]
        return categories

    def preprocess(self, resize: Resize, image_size: int | None) -> Preprocessing:
        return preprocess_like(self.entry.transforms(), resize, image_size)
