"""Networks of torchvision and of timm, and how to read them."""

import copy
import functools
from collections.abc import Callable, Collection, Iterator
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

# The smallest member of each module of timm, unless that has more than 60 million parameters.
QUICK_OF_TIMM = ("test_byobnet", "test_convnext", "test_maxvit", "test_resnet", "test_vit")
SMALLEST_OF_TIMM = (
    *("halonet_h1", "cait_xxs24_224", "coat_tiny", "convit_tiny", "convmixer_768_32"),
    *("cpubone_nano", "crossvit_tiny_240", "csatv2", "cs3darknet_focus_s", "cspnext_tiny"),
    *("davit_tiny", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "densenet121"),
    *("dla46x_c", "dpn48b", "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0"),
    *("test_efficientnet", "efficientvim_m1", "efficientvit_b0", "efficientvit_m0"),
    *("vit_tiny_patch16_dinov3_qkvb", "fasternet_t0", "fastvit_t8", "focalnet_tiny_srf"),
    *("gcvit_xxtiny", "ghostnet_050", "hardcorenas_b", "hgnetv2_b0", "hiera_tiny_224"),
    *("sam2_hiera_tiny", "hrnet_w18_small", "iformer_t", "inception_next_atto"),
    *("inception_resnet_v2", "inception_v3", "inception_v4", "lcnetv2_small", "levit_128s"),
    *("levit_conv_128s", "lowformer_b0", "test_mambaout", "test_coatnet", "poolformerv2_s12"),
    *("gmlp_ti16_224", "mobilenetv3_small_050", "mobilevit_xxs", "mvitv2_tiny", "nest_tiny"),
    *("nextvit_small", "test_nfnet", "pit_ti_224", "pvt_v2_b0", "rdnet_tiny", "regnetx_002"),
    *("repghostnet_050", "repvit_m1", "res2next50", "resnest14d", "resnetv2_18", "rexnet_100"),
    *("selecsls42", "legacy_seresnet18", "sequencer2d_s", "shvit_s1", "skresnet18"),
    *("starnet_s050", "swiftformer_xs", "swin_tiny_patch4_window7_224"),
    *("swinv2_tiny_window8_256", "swinv2_cr_tiny_224", "tiny_vit_5m_224"),
    *("tnt_s_legacy_patch16_224", "tresnet_m", "twins_svt_small", "visformer_tiny"),
    *("vit_tiny_r_s16_p8_224", "test_vit_relpos", "vitamin_small_224", "volo_d1_224"),
    *("ese_vovnet19b_slim_dw", "legacy_xception", "xception41p", "xcit_nano_12_p8_224"),
)


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


@pytest.fixture(
    params=[*QUICK_OF_TIMM, *(pytest.param(n, marks=pytest.mark.slow) for n in SMALLEST_OF_TIMM)]
)
def name_in_timm(request: pytest.FixtureRequest) -> str:
    """One small network of each module of timm; a default run covers a few."""
    return request.param


@pytest.fixture(scope="session")
def build_timm() -> Callable[..., nn.Module]:
    """Build a network of timm with random weights."""
    timm = pytest.importorskip("timm")

    def build_timm(name: str, **options: Any) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return timm.create_model(name, **options).eval()

    return build_timm


@pytest.fixture(scope="session")
def images() -> Callable[..., Tensor]:
    """Draw a batch of noise."""

    def images(count: int = 2, side: int = 32, seed: int = 0) -> Tensor:
        return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))

    return images


@pytest.fixture(scope="session")
def capture_by_hooks() -> Callable[..., dict[str, Tensor]]:
    """Run a whole network and keep a clone of the first output of modules."""

    def capture_by_hooks(
        net: nn.Module, paths: Collection[str], batch: Tensor
    ) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}

        def keep(path: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
            kept.setdefault(path, (output if isinstance(output, Tensor) else output[0]).clone())

        hooked = copy.deepcopy(net)
        for path in paths:
            hooked.get_submodule(path).register_forward_hook(functools.partial(keep, path))
        with torch.inference_mode():
            hooked(batch)
        return kept

    return capture_by_hooks


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
