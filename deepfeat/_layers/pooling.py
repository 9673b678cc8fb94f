"""Pooling: the output of a layer becomes one row per image."""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from .index import ResolvedLayer, count_channels

Pooling: TypeAlias = Literal["avg", "max", "gem", "cls", "flatten"]
_GEM_POWER = 3.0


@dataclass(frozen=True)
class PooledLayer:
    """A layer and how its output becomes a row; `pooling` is None for vectors."""

    layer: ResolvedLayer
    pooling: Pooling | None

    @property
    def key(self) -> str:
        """A string that identifies the row."""
        return " ".join((self.layer.source, self.pooling or "", "relu" * self.layer.rectified))

    @property
    def n_features(self) -> int:
        """The length of the row."""
        return count_features(self.layer, self.pooling or "flatten")

    def reduce(self, output: Tensor) -> Tensor:
        """Turn the output of the layer into one float32 row per image."""
        return pool(self.layer, output, self.pooling or "flatten")


def pool_layer(layer: ResolvedLayer, pooling: Pooling) -> PooledLayer:
    """Pair a layer with a pooling; vectors, and maps of one position, are left as they are.

    Raises
    ------
    ValueError
        If the output of the layer does not allow this pooling.
    """
    if len(layer.output_shape) == 1:
        return PooledLayer(layer, None)
    if len(layer.output_shape) == 3 and math.prod(layer.output_shape[1:]) == 1:
        return PooledLayer(layer, "avg")
    count_features(layer, pooling)
    return PooledLayer(layer, pooling)


def pool(layer: ResolvedLayer, output: Tensor, pooling: Pooling) -> Tensor:
    """Turn the output of a layer into one float32 row per image.

    Maps (n, C, H, W) are pooled over H and W, tokens (n, N, D) over the patches, sequences
    (n, C, L) over L; vectors (n, D) are returned unchanged. "gem" is the generalised mean of
    Radenovic et al. (2019), "Fine-tuning CNN Image Retrieval with No Human Annotation", with power
    3; values below 1e-6 are raised to 1e-6.
    """
    output = output.float()
    if output.ndim == 4 and layer.channels_last:
        output = output.movedim(-1, 1)
    if pooling == "flatten" or output.ndim == 2:
        return output.reshape(output.shape[0], -1)
    if pooling == "cls":
        return output[:, 0]
    if output.ndim == 3 and layer.channels_last:
        output = output[:, layer.prefix_tokens :].movedim(-1, 1)
    axes = tuple(range(2, output.ndim))
    if pooling == "max":
        return output.amax(axes)
    if pooling == "gem":
        return output.clamp(min=1e-6).pow(_GEM_POWER).mean(axes).pow(1 / _GEM_POWER)
    return output.mean(axes)


def count_features(layer: ResolvedLayer, pooling: Pooling) -> int:
    """Return the number of features of a layer after pooling.

    Raises
    ------
    ValueError
        If the output of the layer does not allow this pooling.
    """
    shape = layer.output_shape
    if pooling == "flatten" or len(shape) == 1:
        return math.prod(shape)
    if pooling == "cls" and not layer.class_token:
        raise ValueError(
            f"pooling='cls' needs a class token, but layer {layer.name!r} (output shape {shape}) "
            "does not have one: use 'avg', 'max', 'gem' or 'flatten'."
        )
    if len(shape) not in (2, 3):
        raise ValueError(
            f"pooling must be 'flatten' for layer {layer.name!r} (output shape {shape}); "
            f"got {pooling!r}."
        )
    return count_channels(layer)


def lay_out(layer: ResolvedLayer, output: Tensor) -> Tensor:
    """Turn the output of a layer into float32 maps (n, C, H, W), tokens without their prefix."""
    output = output.float()
    if output.ndim == 4:
        maps = output.movedim(-1, 1) if layer.channels_last else output
        return maps.relu() if layer.rectified else maps
    patches = output[:, layer.prefix_tokens :]
    return patches.movedim(-1, 1).reshape(len(output), *map_shape(layer))


def map_shape(layer: ResolvedLayer) -> tuple[int, ...]:
    """Return the shape (C, H, W) of the maps of a layer.

    Raises
    ------
    ValueError
        If the layer has none.
    """
    if len(layer.output_shape) == 3:
        return layer.output_shape
    if layer.grid is not None and len(layer.grid) == 2:
        return (count_channels(layer), *layer.grid)
    raise ValueError(
        f"layer must return maps (C, H, W) or the tokens of patches that lie in a grid; got "
        f"{layer.name!r} with output shape {layer.output_shape}."
    )
