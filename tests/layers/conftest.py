"""Networks of torchvision, and how to read them."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from deepfeat import list_backbones
from deepfeat._backbones.find import find_backbone
from deepfeat._backbones.resnet10_slim import NAME, ResNet10Slim_Weights
from deepfeat._layers.index import LayerIndex
from deepfeat._layers.reading import ForwardPass

# One small member of each family of torchvision, and a side of input that it accepts.
FAMILIES = {
    "alexnet": 64,
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "efficientnet_v2_s": 32,
    "googlenet": 32,
    "inception_v3": 75,
    "maxvit_t": 224,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_x_400mf": 32,
    "regnet_y_400mf": 32,
    "resnet18": 32,
    "resnext50_32x4d": 32,
    "wide_resnet50_2": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 32,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vgg11": 32,
    "vgg11_bn": 32,
    "vit_b_32": 64,
}
IN_A_DEFAULT_RUN = (*FAMILIES, NAME)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """More threads do not make networks this small faster, and slow them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """One small network per family; a test with this fixture runs once for each."""
    return request.param


@pytest.fixture
def side(family: str) -> int:
    """A side of images that the network of a family accepts."""
    return FAMILIES[family]


@pytest.fixture(
    params=[
        *IN_A_DEFAULT_RUN,
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in list_backbones()
            if name not in IN_A_DEFAULT_RUN
        ),
    ]
)
def backbone(request: pytest.FixtureRequest) -> str:
    """Every network by name; a default run covers one per family."""
    return request.param


@pytest.fixture
def published(backbone: str) -> dict[str, Any]:
    """The metadata of the default weights of a network."""
    weights = ResNet10Slim_Weights if backbone == NAME else models.get_model_weights(backbone)
    return weights["DEFAULT"].meta


@pytest.fixture(scope="session")
def index_of() -> Callable[[str], LayerIndex]:
    """Index a backbone at the input size of its default weights, without loading them."""

    @functools.cache
    def index_of(name: str) -> LayerIndex:
        backbone = find_backbone(name)
        return LayerIndex(backbone.skeleton, backbone.preprocessing.input_shape)

    return index_of


@pytest.fixture(scope="session")
def build() -> Callable[..., nn.Module]:
    """Build a network of torchvision with random weights, for few classes."""

    def build(name: str, side: int = 32, **options: Any) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if name.startswith(("alexnet", "vgg")):
                return build_narrow(name)
            if name in ("googlenet", "inception_v3"):
                options["init_weights"] = False  # initialising them takes a minute
            if name.startswith("vit"):
                options["image_size"] = side
            return models.get_model(name, weights=None, **{"num_classes": 10, **options}).eval()

    return build


def build_narrow(name: str) -> nn.Module:
    """Build an AlexNet or VGG with 16 units instead of 4,096, which take seconds to initialise."""
    with torch.device("meta"):
        net = models.get_model(name, weights=None)
    for index, layer in enumerate(net.classifier):
        if isinstance(layer, nn.Linear):
            inputs = layer.in_features if layer.in_features > 4096 else 16
            net.classifier[index] = nn.Linear(inputs, 16)
    net.to_empty(device="cpu")
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return net.eval()


@pytest.fixture(scope="session")
def images() -> Callable[..., Tensor]:
    """Draw a batch of noise."""

    def images(count: int = 2, side: int = 32, seed: int = 0) -> Tensor:
        return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))

    return images


@pytest.fixture(scope="session")
def read() -> Callable[..., list[Tensor]]:
    """Read layers of a network by name."""

    def read(net: nn.Module, batch: Tensor, *names: str | int) -> list[Tensor]:
        index = LayerIndex(net, tuple(batch.shape[1:]))
        layers = [index.resolve(name) for name in names]
        with torch.inference_mode():
            wanted = {layer.name: (layer, lambda output: output) for layer in layers}
            outputs = ForwardPass(net, wanted)(batch)
        return [outputs[layer.name] for layer in layers]

    return read
