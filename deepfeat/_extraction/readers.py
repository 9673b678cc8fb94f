"""Readers of networks: layers indexed, networks loaded, and run on batches of images."""

import functools
import weakref
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from .._backbones.find import Backbone
from .._backbones.preprocessing import Preprocessing
from .._engine.batches import Reader
from .._engine.devices import Outputs, Precision, autocast, run_in_parts
from .._layers.index import LayerIndex, ResolvedLayer
from .._layers.pooling import PooledLayer, lay_out
from .._layers.reading import ForwardPass, prefer_channels_last
from .._layers.trace import first_tensor

# How many images of a shape fit into memory at once, by network.
_fitting: weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, ...], int]] = (
    weakref.WeakKeyDictionary()
)


class TorchReader:
    """A network of torch, or a part of one, as a Reader.

    Parameters
    ----------
    network : torch.nn.Module
        The network, on the device.
    forward : callable
        Runs the network on a normalised batch; returns outputs of shape (n, d), by key.
    preprocessing : Preprocessing
        Prepares images, and normalises batches of them on the device.
    device : torch.device
        Where the network is.
    precision : {"float32", "bfloat16", "float16"}
        Type in which it computes (autocast).
    """

    def __init__(
        self,
        network: nn.Module,
        forward: Callable[[Tensor], Outputs],
        preprocessing: Preprocessing,
        device: torch.device,
        precision: Precision,
    ):
        self.device = device
        self.prepare = preprocessing.prepare
        self._normalize = preprocessing.normalize
        self._forward = forward
        self._precision = precision
        self._fitting = _fitting.setdefault(network, {})

    def read(self, batch: Tensor) -> Outputs:
        """Run a batch; one that does not fit into memory is halved, and the size remembered."""
        return run_in_parts(self._run, batch, self.device, self._fitting)

    def _run(self, batch: Tensor) -> Outputs:
        with torch.inference_mode(), autocast(self.device, self._precision):
            return self._forward(self._normalize(batch))


def make_layer_reader(
    network: nn.Module,
    outputs: Sequence[PooledLayer],
    preprocessing: Preprocessing,
    device: torch.device,
    precision: Precision,
    *,
    optional: Collection[str] = (),
) -> Reader:
    """Make a reader of pooled layers, by key; `optional` ones may be missing from a batch."""
    layers = {output.key: (output.layer, output.reduce) for output in outputs}
    forward = ForwardPass(network, layers, optional)
    return TorchReader(network, forward, preprocessing, device, precision)


def make_map_reader(
    network: nn.Module,
    layer: ResolvedLayer,
    preprocessing: Preprocessing,
    device: torch.device,
    precision: Precision,
) -> Reader:
    """Make a reader of the maps (n, C, H, W) of a layer, as "maps"."""
    read = ForwardPass(network, {"maps": (layer, functools.partial(lay_out, layer))})

    def forward(batch: Tensor) -> Outputs:
        if tuple(batch.shape[1:]) != preprocessing.input_shape:  # another grid of tokens, too
            raise ValueError(
                "preprocessing must give images of one shape if maps are read; got "
                f"{tuple(batch.shape[1:])} and {preprocessing.input_shape}."
            )
        return read(batch)

    return TorchReader(network, forward, preprocessing, device, precision)


def make_logit_reader(
    network: nn.Module, preprocessing: Preprocessing, device: torch.device, precision: Precision
) -> Reader:
    """Make a reader of what the network puts out, as "logits"."""

    def forward(batch: Tensor) -> Outputs:
        return {"logits": first_tensor(network(batch)).float()}

    return TorchReader(network, forward, preprocessing, device, precision)


def index_layers(backbone: Backbone) -> LayerIndex:
    """Index the layers of a backbone; those of a user's module anew each time."""
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
