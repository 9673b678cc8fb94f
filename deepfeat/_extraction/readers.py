"""Readers of networks: layers indexed, networks loaded, and run on batches of images."""

import functools
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from .._backbones.find import Backbone
from .._backbones.fingerprint import UnknownContentError, fingerprint
from .._backbones.preprocessing import Preprocessing
from .._engine.batches import Reader
from .._engine.devices import Outputs, Precision, autocast, find_device, run_in_parts
from .._layers.index import LayerIndex, ResolvedLayer
from .._layers.inference import (
    InferenceNetwork,
    InferencePlan,
    plan_inference,
    prefer_channels_last,
)
from .._layers.pooling import PooledLayer, lay_out
from .._layers.reading import ForwardPass, Reduce
from .._layers.trace import first_tensor
from .openvino import OpenVinoReader, Source, check_openvino

EngineName: TypeAlias = Literal["torch", "openvino"]

# How many images of a shape fit into memory at once, by network.
_fitting: weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, ...], int]] = (
    weakref.WeakKeyDictionary()
)
# Networks made ready for inference, by network; None if a network stays as it is.
_ready: weakref.WeakKeyDictionary[nn.Module, dict[Precision, InferenceNetwork | None]] = (
    weakref.WeakKeyDictionary()
)
# Plans for modules of the user, by module, each with the digest of what it was made for.
_plans: weakref.WeakKeyDictionary[
    nn.Module, dict[tuple[str, Precision], tuple[bytes, InferencePlan]]
] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Engine:
    """What runs networks, where and how; found by `find_engine`."""

    name: EngineName
    device: torch.device
    precision: Precision
    batch_size: int = 32
    verbose: int = 0


def find_engine(
    name: EngineName,
    device: str | torch.device,
    precision: Precision,
    batch_size: int = 32,
    verbose: int = 0,
) -> Engine:
    """Find the device on which an engine runs.

    Raises
    ------
    ValueError
        If the device cannot be used.
    """
    found = torch.device("cpu") if name == "openvino" else find_device(device)
    return Engine(name, found, precision, batch_size, verbose)


def check_engine(name: EngineName, device: str | torch.device, precision: Precision) -> None:
    """Raise unless an engine is installed, and allows this device and precision."""
    if name == "openvino":
        check_openvino(device, precision)


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
    backbone: Backbone,
    network: nn.Module,
    outputs: Sequence[PooledLayer],
    engine: Engine,
    *,
    optional: Collection[str] = (),
) -> Reader:
    """Make a reader of pooled layers, by key; `optional` ones may be missing from a batch."""
    layers = {output.key: (output.layer, output.reduce) for output in outputs}
    forward = _make_pass(backbone, network, layers, engine, optional)
    return _make_reader(backbone, network, forward, forward.module, tuple(layers), engine)


def make_map_reader(
    backbone: Backbone, network: nn.Module, layer: ResolvedLayer, engine: Engine
) -> Reader:
    """Make a reader of the maps (n, C, H, W) of a layer, as "maps"."""
    layers = {"maps": (layer, functools.partial(lay_out, layer))}
    read = _make_pass(backbone, network, layers, engine)
    input_shape = backbone.preprocessing.input_shape

    def forward(batch: Tensor) -> Outputs:
        if tuple(batch.shape[1:]) != input_shape:  # another grid of tokens, too
            raise ValueError(
                "preprocessing must give images of one shape if maps are read; got "
                f"{tuple(batch.shape[1:])} and {input_shape}."
            )
        return read(batch)

    return _make_reader(backbone, network, forward, read.module, ("maps", layer.name), engine)


def make_logit_reader(
    name: str, network: nn.Module, preprocessing: Preprocessing, engine: Engine
) -> Reader:
    """Make a reader of what a network puts out, as "logits".

    With torch, the network is not prepared for inference: the user may train it further.
    """

    def forward(batch: Tensor) -> Outputs:
        return {"logits": first_tensor(network(batch)).float()}

    if engine.name == "torch":
        return TorchReader(network, forward, preprocessing, engine.device, engine.precision)
    digest = functools.partial(fingerprint, network)
    source = Source(name, network, network, forward, ("logits",), preprocessing, digest)
    return OpenVinoReader(source, engine.precision, engine.batch_size, engine.verbose)


def _make_pass(
    backbone: Backbone,
    network: nn.Module,
    layers: Mapping[str, tuple[ResolvedLayer, Reduce]],
    engine: Engine,
    optional: Collection[str] = (),
) -> ForwardPass:
    if engine.name == "openvino":  # which prepares the network itself
        return ForwardPass(network, layers, optional)
    ready = _prepare_once(backbone, network, engine)
    return ForwardPass(ready.module, layers, optional, originals=ready.originals)


def _make_reader(
    backbone: Backbone,
    network: nn.Module,
    forward: Callable[[Tensor], Outputs],
    module: nn.Module,
    reads: tuple[str, ...],
    engine: Engine,
) -> Reader:
    """Make a reader of what `forward` returns, which runs `module`, made of the network."""
    steps = backbone.preprocessing
    if engine.name == "torch":
        return TorchReader(network, forward, steps, engine.device, engine.precision)
    source = Source(backbone.name, network, module, forward, reads, steps, backbone.fingerprint)
    return OpenVinoReader(source, engine.precision, engine.batch_size, engine.verbose)


def _prepare_once(backbone: Backbone, network: nn.Module, engine: Engine) -> InferenceNetwork:
    """Prepare a network that nobody else trains or changes."""
    found = _ready.setdefault(network, {})
    if engine.precision not in found:
        ready = _find_plan(backbone, network, engine).apply(network)
        # A reference to the network would keep it alive.
        found[engine.precision] = None if ready.module is network else ready
    return found[engine.precision] or InferenceNetwork(network)


def _find_plan(backbone: Backbone, network: nn.Module, engine: Engine) -> InferencePlan:
    """Plan inference; for a user's module, whose copies live for a call, only if it has changed."""
    plan = functools.partial(
        plan_inference,
        network,
        backbone.preprocessing.input_shape,
        functools.partial(autocast, engine.device, engine.precision),
        getattr(torch, engine.precision),
    )
    if backbone.shared:
        return plan()
    try:
        digest = backbone.fingerprint()
    except UnknownContentError:
        return plan()
    plans = _plans.setdefault(backbone.skeleton, {})
    key = engine.device.type, engine.precision
    known, found = plans.get(key, (b"", InferencePlan()))
    if known != digest:
        found = plan()
        plans[key] = digest, found
    return found


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
