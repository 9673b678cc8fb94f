"""Backbones made ready to be read: their layers indexed, their networks loaded."""

import functools

import torch
from torch import nn

from .._backbones.find import Backbone
from .._layers.index import LayerIndex
from .._layers.reading import prefer_channels_last


def index_layers(backbone: Backbone) -> LayerIndex:
    """Index the layers of a backbone; those of a module of the user anew each time."""
    make = _index_shared if backbone.shared else LayerIndex
    return make(backbone.skeleton, backbone.preprocessing.input_shape)


def load_network(backbone: Backbone, device: torch.device) -> nn.Module:
    """Load the network of a backbone, laid out in memory as it runs fastest."""
    network = backbone.load(device)
    if backbone.shared:
        return network
    return prefer_channels_last(network, backbone.preprocessing.input_shape)


@functools.lru_cache(maxsize=16)
def _index_shared(skeleton: nn.Module, input_shape: tuple[int, ...]) -> LayerIndex:
    return LayerIndex(skeleton, input_shape)
