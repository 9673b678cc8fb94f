"""Knows what holds of backbones: their names, weights, files, downloads, and who shares them."""

import collections
import copy
import functools
import gc
import hashlib
import http.server
import json
import pickle
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision import models
from torchvision.models import SqueezeNet1_1_Weights, WeightsEnum
from torchvision.models._api import BUILTIN_MODELS
from torchvision.transforms import InterpolationMode

from deepfeat import list_backbones
from deepfeat._backbones import find
from deepfeat._backbones import torchvision as building
from deepfeat._backbones.find import Backbone, find_backbone
from deepfeat._extraction.readers import load_network

exactly = functools.partial(assert_close, rtol=0, atol=0)
CPU = torch.device("cpu")
NAME = "squeezenet1_1"
TORCHVISIONS = models.list_models(module=models)
ALL_WEIGHTS = [
    (name, weights) for name in sorted(TORCHVISIONS) for weights in models.get_model_weights(name)
]


@pytest.fixture(autouse=True)
def forget_networks() -> Iterator[None]:
    """Start and leave without networks in memory."""
    forget = building._load_cached.cache_clear
    forget()
    yield
    forget()


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Weights of a small network as a file would hold them."""
    return random_state(NAME)


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


# Names ------------------------------------------------------------------------------------------


def test_all_classification_models_of_torchvision_are_backbones() -> None:
    """Each of the 80 names of torchvision is one, none is from another task, and one is ours."""
    assert len(TORCHVISIONS) == 80
    assert list_backbones() == sorted([*TORCHVISIONS, "resnet10_slim"])
    assert "fcn_resnet50" in models.list_models()
    assert "fcn_resnet50" not in list_backbones()
    assert not [name for name in list_backbones() if name.startswith("quantized")]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: find_backbone("resnet5"),
            "there is no backbone 'resnet5'. Close matches: 'resnet50', 'resnet152', 'resnet34'.",
        ),
        (lambda: find_backbone("zzz"), "there is no backbone 'zzz'. list_backbones() lists them."),
        (
            lambda: find_backbone("fcn_resnet50"),
            "there is no backbone 'fcn_resnet50'. Close matches: 'resnet50', 'wide_resnet50_2', "
            "'resnet152'.",
        ),
        (
            lambda: find_backbone("vgg16", "IMAGENET1K_V2"),
            "vgg16 has no weights 'IMAGENET1K_V2'. It has 'IMAGENET1K_V1', "
            "'IMAGENET1K_FEATURES', 'DEFAULT'; the path of a file ends in .pth, .pt, .tar, "
            ".safetensors.",
        ),
        (
            lambda: find_backbone("vgg16", models.VGG19_Weights.DEFAULT),
            "VGG19_Weights.IMAGENET1K_V1 are no weights of vgg16.",
        ),
        (
            lambda: find_backbone("vgg16", preprocessing=as_tensor, image_size=64),
            "preprocessing= replaces the weights' own: resize= and image_size= do not apply.",
        ),
        (
            lambda: find_backbone(nn.Flatten(), None, preprocessing=as_tensor),
            "weights= does not apply to a module, which brings its own.",
        ),
        (
            lambda: find_backbone(nn.Flatten()),
            "a module needs preprocessing=, from an RGB PIL image to the tensor that it takes: "
            "for instance torchvision.models.ResNet50_Weights.DEFAULT.transforms().",
        ),
        (
            lambda: find_backbone(nn.Flatten(), preprocessing=np.asarray),
            "preprocessing must turn an RGB PIL image into a float tensor of shape (C, H, W); it "
            "gave a ndarray.",
        ),
        (
            lambda: find_backbone("vit_b_32", image_size=100),
            "vit_b_32 cannot be built for images of side 100: Input shape indivisible by patch "
            "size!",
        ),
    ],
)
def test_a_wrong_choice_has_a_clear_error(call: Callable[[], Backbone], words: str) -> None:
    """The error says what came, what was expected, and what there is."""
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == words


@pytest.mark.parametrize("backbone", [None, 16, models.vgg16, models.VGG, ["vgg16"]])
def test_what_is_no_name_and_no_module_is_refused(backbone: Any) -> None:
    """A builder or a class is not called for the user."""
    with pytest.raises(TypeError, match=r"a name or a torch\.nn\.Module is expected"):
        find_backbone(backbone)


def test_weights_have_names_and_members() -> None:
    """A name, a member of the enumeration and "DEFAULT" mean the same weights."""
    member = models.ResNet50_Weights.IMAGENET1K_V2
    found = [find_backbone("resnet50", weights) for weights in ("DEFAULT", member, member.name)]
    assert len({backbone.fingerprint() for backbone in found}) == 1
    assert len({backbone.skeleton for backbone in found}) == 1
    older = find_backbone("resnet50", "IMAGENET1K_V1")
    assert older.fingerprint() != found[0].fingerprint()


def test_finding_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backbone is found in no time, with a skeleton that takes no memory and no weights."""
    monkeypatch.setattr(building, "_load_cached", forbidden)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", forbidden)
    seconds = []
    for _ in range(3):
        building.make_skeleton.cache_clear()
        start = time.perf_counter()
        backbone = find_backbone("vgg16")
        seconds.append(time.perf_counter() - start)
    tensors = (*backbone.skeleton.parameters(), *backbone.skeleton.buffers())
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert sum(tensor.numel() for tensor in tensors) == 138_357_544
    assert min(seconds) < 0.3


def forbidden(*_args: Any, **_kwargs: Any) -> Any:
    raise AssertionError("called")


def test_finding_leaves_random_numbers_alone() -> None:
    """The skeleton of no family draws from the global generators."""
    names = {name.partition("_")[0].rstrip("0123456789"): name for name in list_backbones()}
    names |= {name: name for name in ("swin_v2_t", "vit_b_16", "regnet_x_400mf", "inception_v3")}
    building.make_skeleton.cache_clear()
    with untouched_generators():
        for name in names.values():
            find_backbone(name)


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


# Preprocessing ----------------------------------------------------------------------------------


def presets() -> dict[str, list[tuple[str, WeightsEnum]]]:
    """Group all weights by what they do to an image."""
    groups = collections.defaultdict(list)
    for name, weights in ALL_WEIGHTS:
        groups[repr(weights.transforms())].append((name, weights))
    return groups


@pytest.fixture
def no_skeletons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the skeletons, which take most of the time that finding takes."""
    monkeypatch.setattr(find, "make_skeleton", lambda *_: nn.Flatten())


def test_there_are_115_weights_with_28_presets() -> None:
    """The law below goes through all classification weights of torchvision."""
    assert len(ALL_WEIGHTS) == 115
    assert len(presets()) == 28
    assert sum(map(len, presets().values())) == 115


@pytest.mark.usefixtures("no_skeletons")
@pytest.mark.parametrize("group", presets().values(), ids=lambda group: group[0][1])
def test_images_are_prepared_as_the_weights_demand(group: list[tuple[str, WeightsEnum]]) -> None:
    """Every pixel is bit for bit what the weights' own transforms give, for all 115 weights."""
    transforms = group[0][1].transforms()
    expected = {key: transforms(image) for key, image in PICTURES.items()}
    for name, weights in group:
        steps = find_backbone(name, weights).preprocessing
        for key, image in PICTURES.items():
            batch = steps.normalize(steps.prepare(image)[None])
            exactly(batch[0], expected[key])
            assert batch.shape[1:] == steps.input_shape
            assert batch.is_contiguous(memory_format=torch.channels_last)


def test_the_network_takes_what_is_prepared() -> None:
    """A vision transformer is built for the size of its weights' images."""
    for weights in models.ViT_B_16_Weights:
        backbone = find_backbone("vit_b_16", weights)
        side = weights.transforms().crop_size[0]
        assert backbone.preprocessing.input_shape == (3, side, side)
        assert backbone.skeleton.image_size == side


@pytest.mark.parametrize("image", PICTURES.values(), ids=PICTURES)
def test_squash_brings_both_sides_to_the_input(image: Image.Image) -> None:
    """The whole image is resized as PIL does it, whatever its proportions."""
    steps = find_backbone("resnet50", resize="squash").preprocessing
    expected = image.resize((224, 224), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(steps.prepare(image), np.asarray(expected))


@pytest.mark.parametrize("image", PICTURES.values(), ids=PICTURES)
def test_pad_keeps_the_proportions(image: Image.Image) -> None:
    """The whole image lies in the middle, and what is added is next to zero once normalised."""
    steps = find_backbone("resnet50", resize="pad").preprocessing
    # To the nearest pixel, as PIL's own function for this does it.
    inside = ImageOps.contain(image, (224, 224), Image.Resampling.BILINEAR)
    left, top = (224 - inside.width) // 2, (224 - inside.height) // 2
    prepared = steps.prepare(image)
    middle = slice(top, top + inside.height), slice(left, left + inside.width)
    np.testing.assert_array_equal(prepared[middle], np.asarray(inside))

    normalized = steps.normalize(prepared[None])[0]
    outside = torch.ones(224, 224, dtype=torch.bool)
    outside[middle] = False
    assert outside.any()
    # The mean colour is rounded to whole steps of 1/255; the deviations are 0.22 and more.
    assert normalized[:, outside].abs().max() < 0.5 / 255 / 0.22


def test_an_extreme_image_keeps_a_pixel() -> None:
    """A line a thousand times as long as wide is still one pixel wide."""
    prepared = find_backbone("resnet50", resize="pad").preprocessing.prepare(picture(2000, 2))
    mean = torch.tensor([round(255 * mean) for mean in (0.485, 0.456, 0.406)])
    assert (prepared != mean).any(-1).any(1).sum() == 1


@pytest.mark.parametrize("resize", ["weights", "squash", "pad"])
def test_image_size_replaces_the_size_of_the_weights(resize: Any) -> None:
    """Images come at the size asked for; the crop takes the same part of the image."""
    steps = find_backbone("resnet50", resize=resize, image_size=112).preprocessing
    assert steps.input_shape == (3, 112, 112)
    image = PICTURES["landscape"]
    prepared = steps.prepare(image)
    assert prepared.shape == (112, 112, 3)
    if resize == "weights":
        transforms = models.ResNet50_Weights.DEFAULT.transforms(crop_size=112, resize_size=116)
        exactly(steps.normalize(prepared[None])[0], transforms(image))


def test_the_weights_decide_how_to_interpolate() -> None:
    """Where weights ask for bicubic or bilinear interpolation, squashing and padding follow."""
    asked = {weights.transforms().interpolation for _, weights in ALL_WEIGHTS}
    assert asked == {InterpolationMode.BILINEAR, InterpolationMode.BICUBIC}
    weights = models.EfficientNet_B0_Weights.DEFAULT
    assert weights.transforms().interpolation == InterpolationMode.BICUBIC
    steps = find_backbone("efficientnet_b0", weights, resize="squash").preprocessing
    image = PICTURES["portrait"]
    expected = image.resize((224, 224), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(steps.prepare(image), np.asarray(expected))


def as_tensor(image: Image.Image) -> Tensor:
    """Turn an image into a small tensor, in double precision."""
    return torch.from_numpy(np.asarray(image.resize((48, 32)), dtype=np.float64)).permute(2, 0, 1)


def test_preprocessing_of_the_user_replaces_the_weights_own() -> None:
    """A function of the user decides on size and scale; the network gets float32 of it."""
    steps = find_backbone(NAME, None, preprocessing=as_tensor).preprocessing
    assert steps.input_shape == (3, 32, 48)
    batch = steps.normalize(steps.prepare(PICTURES["tiny"])[None])
    exactly(batch, as_tensor(PICTURES["tiny"])[None].float())


# Random weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [NAME, "vit_b_32", "swin_t", "regnet_y_400mf", "shufflenet_v2_x0_5"]
)
def test_random_weights_are_torchvisions_of_that_seed(name: str) -> None:
    """They are those that torchvision draws after `manual_seed`, and no global generator moves."""
    with untouched_generators():
        module = load(name, None, seed=7)
    exactly(module.state_dict(), random_state(name, 7))


def test_random_weights_depend_on_the_seed_alone() -> None:
    """Another seed gives other weights, and the same one the same, whatever was drawn before."""
    first = copy.deepcopy(load(NAME, None, seed=1).state_dict())
    torch.rand(5)
    building._load_cached.cache_clear()
    exactly(load(NAME, None, seed=1).state_dict(), first)
    with pytest.raises(AssertionError):
        exactly(load(NAME, None, seed=2).state_dict(), first)


def test_random_weights_are_the_same_in_another_process() -> None:
    """A seed means the same weights for every worker."""
    code = (
        "import sys, torch\n"
        "from deepfeat._backbones.find import find_backbone\n"
        "torch.rand(3)\n"
        f"net = find_backbone({NAME!r}, None, seed=3).load(torch.device('cpu'))\n"
        "state = torch.cat([value.reshape(-1) for value in net.state_dict().values()])\n"
        "sys.stdout.buffer.write(state.numpy().tobytes())\n"
    )
    root = Path(find.__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, stdout=subprocess.PIPE)
    state = load(NAME, None, seed=3).state_dict()
    expected = torch.cat([value.reshape(-1) for value in state.values()])
    np.testing.assert_array_equal(np.frombuffer(run.stdout, dtype=np.float32), expected)


def test_random_weights_do_not_depend_on_other_threads() -> None:
    """A thread that draws random numbers meanwhile changes no weight, nor gets numbers twice."""
    expected = random_state(NAME, 5)
    stop = threading.Event()
    drawn: list[float] = []

    def draw() -> None:
        while not stop.is_set():
            drawn.append(float(torch.rand((), dtype=torch.float64)))

    other = threading.Thread(target=draw)
    other.start()
    try:
        states = []
        for _ in range(3):
            building._load_cached.cache_clear()
            states.append(load(NAME, None, seed=5).state_dict())
    finally:
        stop.set()
        other.join()
    for state in states:
        exactly(state, expected)
    assert len(set(drawn)) == len(drawn)


def test_the_seed_of_other_devices_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No generator of a CUDA device is seeded, not even one that is used only later."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", forbidden)
    monkeypatch.setattr(torch, "manual_seed", forbidden)
    load(NAME, None, seed=6)


@pytest.mark.gpu
def test_random_weights_on_cuda_are_those_of_the_cpu() -> None:
    """A seed gives the same weights on every device, and leaves its generator alone."""
    with untouched_generators():
        module = find_backbone(NAME, None, seed=6).load(torch.device("cuda", 0))
    assert {weight.device.type for weight in module.parameters()} == {"cuda"}
    state = {key: value.cpu() for key, value in module.state_dict().items()}
    exactly(state, random_state(NAME, 6))


# Files ------------------------------------------------------------------------------------------


def wrap(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


FORMATS: dict[str, Callable[[dict[str, Tensor], Path], Path]] = {}


def file_format(write: Callable[[dict[str, Tensor], Path], Any]) -> None:
    """Add a way to write a state dict to a file in a folder, which returns nothing."""
    suffix = "safetensors" if "safetensors" in write.__name__ else "pth"

    def write_file(state: dict[str, Tensor], folder: Path) -> Path:
        path = folder / f"weights.{suffix}"
        write(state, path)
        return path

    FORMATS[write.__name__] = write_file


@file_format
def plain(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path)


@file_format
def legacy(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


@file_format
def safetensors(state: dict[str, Tensor], path: Path) -> None:
    save_file(state, path)


@file_format
def safetensors_with_prefix(state: dict[str, Tensor], path: Path) -> None:
    save_file(wrap(state, "module."), path)


@file_format
def prefix_of_data_parallel(state: dict[str, Tensor], path: Path) -> None:
    torch.save(wrap(state, "module."), path)


@file_format
def prefix_inside(state: dict[str, Tensor], path: Path) -> None:
    """The features alone were parallel, as in torch's example for AlexNet and VGG."""
    torch.save(
        {key.replace("features.", "features.module."): value for key, value in state.items()}, path
    )


@file_format
def prefix_of_compile(state: dict[str, Tensor], path: Path) -> None:
    torch.save(wrap(state, "module._orig_mod."), path)


@file_format
def checkpoint(state: dict[str, Tensor], path: Path) -> None:
    content = {"epoch": 90, "arch": "x", "best": 0.5, "state_dict": wrap(state, "module.")}
    torch.save(content, path)


@file_format
def checkpoint_of_torchvision(state: dict[str, Tensor], path: Path) -> None:
    torch.save({"model": state, "optimizer": {"param_groups": []}}, path)


@file_format
def parameters(state: dict[str, Tensor], path: Path) -> None:
    torch.save({key: nn.Parameter(value) for key, value in state.items()}, path)


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_a_file_is_loaded_bit_for_bit(
    write: Callable[..., Path], state: dict[str, Tensor], tmp_path: Path
) -> None:
    """Whatever the format of a state dict, the network has its weights and is ready to read."""
    path = write(state, tmp_path)
    for weights in (path, str(path)):
        module = load(NAME, weights)
        exactly(module.state_dict(), state)
        assert not module.training
        assert not [key for key, weight in module.named_parameters() if weight.requires_grad]
        assert module.features[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_path_may_have_any_suffix(state: dict[str, Tensor], tmp_path: Path) -> None:
    """A path object is a path, however it ends; of strings the suffix tells."""
    path = tmp_path / "weights.bin"
    torch.save(state, path)
    exactly(load(NAME, path).state_dict(), state)
    with pytest.raises(ValueError, match=r"no weights '.*weights\.bin'"):
        load(NAME, str(path))


def test_a_float16_file_is_computed_in_float32(state: dict[str, Tensor], tmp_path: Path) -> None:
    """Weights kept in half precision are widened, not the images narrowed."""
    half = {key: value.half() for key, value in state.items()}
    torch.save(half, tmp_path / "half.pth")
    module = load(NAME, tmp_path / "half.pth")
    assert {value.dtype for value in module.state_dict().values()} == {torch.float32}
    exactly(module.state_dict(), {key: value.float() for key, value in half.items()})


@pytest.mark.parametrize(
    ("name", "head"),
    [
        (NAME, "classifier.1"),
        ("resnet18", "fc"),
        ("mobilenet_v3_small", "classifier"),
        ("shufflenet_v2_x0_5", "fc"),
        ("mnasnet0_5", "classifier"),
        ("regnet_x_400mf", "fc"),
        ("googlenet", "fc"),
    ],
)
def test_a_file_decides_on_the_number_of_classes(name: str, head: str, tmp_path: Path) -> None:
    """Weights for the 365 places of Places365, say, give a network and a skeleton with 365."""
    options = {"init_weights": False} if name == "googlenet" else {}
    state = random_state(name, num_classes=365, **options)
    torch.save(state, tmp_path / "places.pth")
    backbone = find_backbone(name, tmp_path / "places.pth")
    module = backbone.load(CPU)
    exactly(module.state_dict(), state)
    batch = backbone.preprocessing.normalize(backbone.preprocessing.prepare(PICTURES["tiny"])[None])
    assert module(batch).shape == (1, 365)
    assert copy.deepcopy(backbone.skeleton).eval()(batch.to("meta")).shape == (1, 365)
    shapes = {key: value.shape for key, value in backbone.skeleton.state_dict().items()}
    assert shapes == {key: value.shape for key, value in state.items()}
    assert {value.device.type for value in backbone.skeleton.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("auxiliary", [True, False])
def test_googlenet_may_come_without_its_auxiliary_heads(auxiliary: bool, tmp_path: Path) -> None:
    """The heads that help in training alone are taken from a file that has them, else left out."""
    options = {"aux_logits": auxiliary, "init_weights": False}
    state = random_state("googlenet", **options)
    torch.save(state, tmp_path / "file.pth")
    module = load("googlenet", tmp_path / "file.pth")
    exactly(module.state_dict(), state)
    assert module.transform_input


def test_old_names_of_densenet_are_understood(tmp_path: Path) -> None:
    """torchvision's files for DenseNet say `norm.1` for what is `norm1` today."""
    state = random_state("densenet121")
    old = {}
    for key, value in state.items():
        parts = key.split(".")
        if len(parts) > 3 and parts[-2][-1] in "12" and "denselayer" in key:
            parts[-2] = f"{parts[-2][:-1]}.{parts[-2][-1]}"
        old[".".join(parts)] = value
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "old.pth")
    exactly(load("densenet121", tmp_path / "old.pth").state_dict(), state)


def test_old_names_of_vit_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's files for ViT say `mlp.linear_1` for what is `mlp.0` today."""

    def small(
        *, weights: models.ViT_B_32_Weights | None = None, progress: bool = True, **options: Any
    ) -> nn.Module:
        del weights, progress
        return models.VisionTransformer(
            patch_size=32, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, **options
        )

    small.__module__ = models.vision_transformer.__name__
    monkeypatch.setitem(BUILTIN_MODELS, "vit_b_32", small)
    building.make_skeleton.cache_clear()
    net = small(image_size=224)
    state = net.state_dict()
    old = {
        key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
        for key, value in state.items()
    }
    assert "encoder.layers.encoder_layer_1.mlp.linear_2.bias" in old
    net.load_state_dict(old)  # torchvision understands them as well
    torch.save(old, tmp_path / "old.pth")
    exactly(load("vit_b_32", tmp_path / "old.pth").state_dict(), state)
    building.make_skeleton.cache_clear()


def test_mnasnet_loads_from_every_format(tmp_path: Path) -> None:
    """MNASNet insists on a version, which a safetensors file does not have."""
    state = random_state("mnasnet0_5")
    for write in (FORMATS["plain"], FORMATS["safetensors"], FORMATS["prefix_of_data_parallel"]):
        exactly(load("mnasnet0_5", write(state, tmp_path)).state_dict(), state)


def test_batch_norms_may_lack_their_count(tmp_path: Path) -> None:
    """Files from before BatchNorm counted its batches are complete without the count."""
    state = random_state("resnet18")
    old = {key: value for key, value in state.items() if "num_batches" not in key}
    torch.save(old, tmp_path / "old.pth")
    exactly(load("resnet18", tmp_path / "old.pth").state_dict(), state)


def test_an_error_names_the_keys_that_differ(state: dict[str, Tensor], tmp_path: Path) -> None:
    """Missing and unexpected keys and other shapes are listed, some of each, and counted."""
    state = dict(state)
    del state["features.0.weight"]
    state["extra.weight"] = torch.zeros(1)
    state["features.0.bias"] = torch.zeros(5)
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match="does not fit") as caught:
        find_backbone(NAME, tmp_path / "wrong.pth")
    assert str(caught.value) == (
        "the weights file does not fit squeezenet1_1: 1 missing: features.0.weight; 1 "
        "unexpected: extra.weight; 1 of another shape: features.0.bias of shape (5,), not (64,)."
    )
    torch.save(random_state("alexnet", num_classes=2), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"48 missing: features\.3\.squeeze\.weight, .*, \.\.\.; "):
        find_backbone(NAME, tmp_path / "other.pth")


def test_a_file_without_the_head_is_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    """A network is loaded whole, with its last layer, or not at all."""
    state = {key: value for key, value in state.items() if not key.startswith("classifier")}
    torch.save(state, tmp_path / "headless.pth")
    with pytest.raises(ValueError, match=r"2 missing: classifier\.1\.weight, classifier\.1\.bias"):
        find_backbone(NAME, tmp_path / "headless.pth")


class Bomb:
    """Leaves a trace of itself when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_file_with_code_is_refused(
    legacy: bool, state: dict[str, Tensor], tmp_path: Path
) -> None:
    """Code in a pickle is not run; the error says why the file is not loaded."""
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    content = {"state_dict": state, "extra": Bomb(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"evil\.pth is damaged or holds more than tensors"):
        load(NAME, path)
    assert not trace.exists()
    torch.load(path, weights_only=False)  # the file is not harmless
    assert trace.exists()


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    """A pickled module is code, and no state dict."""
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"save module\.state_dict\(\) with torch\.save"):
        find_backbone(NAME, tmp_path / "module.pth")


@pytest.mark.parametrize("name", ["plain", "legacy", "safetensors"])
@pytest.mark.parametrize("part", [0, 1, 10, 100, 5000, -5000, -10])
def test_a_damaged_file_is_refused(
    name: str, part: int, state: dict[str, Tensor], tmp_path: Path
) -> None:
    """A file that was cut off anywhere has an error that names it."""
    path = FORMATS[name](state, tmp_path)
    path.write_bytes(path.read_bytes()[:part])
    with pytest.raises(ValueError, match=rf"{path.name} is (damaged|no safetensors file)"):
        load(NAME, path)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html>", b"weights\n" * 999, bytes(999), b"\x80\x02}q\x00."]
)
def test_another_file_is_refused(content: bytes, suffix: str, tmp_path: Path) -> None:
    """A file of another kind under the name of weights has an error that names it."""
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"weights\.{suffix} "):
        load(NAME, path)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        torch.zeros(3),
        {"weights": [torch.zeros(3)]},
        {0: torch.zeros(3)},
        {"state_dict": {"model": 1}},
    ],
)
def test_what_is_no_state_dict_is_refused(content: Any, tmp_path: Path) -> None:
    """Tensors must come under the names of parameters."""
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth holds no state dict"):
        find_backbone(NAME, tmp_path / "other.pth")


def test_a_missing_file_is_reported_at_once(tmp_path: Path) -> None:
    """A path to nothing, or to a folder, has an error that names it."""
    for path in (tmp_path / "missing.pth", str(tmp_path / "missing.safetensors"), tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no weights file"):
            find_backbone(NAME, path)


def test_a_path_may_begin_at_home(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tilde stands for the home directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    torch.save(state, tmp_path / "weights.pth")
    exactly(load(NAME, "~/weights.pth").state_dict(), state)


# Sharing ----------------------------------------------------------------------------------------


def test_equal_backbones_share_one_network(state: dict[str, Tensor], tmp_path: Path) -> None:
    """Two searches for the same weights end in the same object; another choice in another."""
    torch.save(state, tmp_path / "weights.pth")
    path = tmp_path / "weights.pth"
    assert load(NAME, None) is load(NAME, None)
    assert load(NAME, None) is not load(NAME, None, seed=1)
    assert load(NAME, None) is not load(NAME, path)
    assert load(NAME, path) is load(NAME, str(path))
    # Neither the preprocessing nor the seed makes a difference to weights from a file.
    assert load(NAME, path) is load(NAME, path, seed=5, resize="pad", image_size=64)
    assert find_backbone(NAME, path).shared


def test_networks_built_for_a_size_are_shared_for_that_size() -> None:
    """A vision transformer for other images is another network."""
    assert load("vit_b_32", None) is load("vit_b_32", None, resize="pad")
    assert load("vit_b_32", None, image_size=64).image_size == 64
    assert load("vit_b_32", None, image_size=64) is not load("vit_b_32", None)


def test_few_networks_are_held() -> None:
    """The network that was not used for longest is let go, and loaded anew when asked for."""
    nets = [weakref.ref(load(NAME, None, seed=seed)) for seed in range(4)]
    assert load(NAME, None, seed=0) is nets[0]()
    load(NAME, None, seed=4)
    gc.collect()
    assert [net() is None for net in nets] == [False, True, False, False]
    exactly(load(NAME, None, seed=1).state_dict(), random_state(NAME, 1))


def test_threads_that_ask_at_once_share_one_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network is loaded once, also when many threads ask for it before it is there."""
    built: list[str] = []
    build = models.get_model

    def count(name: str, **options: Any) -> nn.Module:
        built.append(name)
        time.sleep(0.05)
        return build(name, **options)

    backbone = find_backbone(NAME, None, seed=8)
    monkeypatch.setattr(models, "get_model", count)
    start = threading.Barrier(6)
    nets: list[nn.Module] = []

    def work() -> None:
        start.wait()
        nets.append(backbone.load(CPU))

    run_in_threads(*[work] * 6)
    assert built == [NAME]
    assert len(nets) == 6
    assert len(set(nets)) == 1


def test_threads_may_look_for_backbones_at_once() -> None:
    """Skeletons built at the same time, beside a network of the user, do not mix."""
    names = ["resnet18", "squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small"]
    expected = {name: list(find_backbone(name).skeleton.state_dict()) for name in names}
    start = threading.Barrier(5)
    faults: list[str] = []

    def find(name: str) -> None:
        start.wait()
        for _ in range(5):
            building.make_skeleton.cache_clear()
            try:
                skeleton = find_backbone(name).skeleton
                assert list(skeleton.state_dict()) == expected[name]
                assert {tensor.device.type for tensor in skeleton.parameters()} == {"meta"}
            except Exception as error:
                faults.append(f"{name}: {error!r}")

    def build() -> None:
        start.wait()
        for _ in range(10):
            try:
                net = models.resnet18()
                assert {weight.device.type for weight in net.parameters()} == {"cpu"}
                assert net.fc.weight.std() > 0
            except Exception as error:
                faults.append(f"the user's: {error!r}")

    run_in_threads(*(functools.partial(find, name) for name in names), build)
    assert not faults


def run_in_threads(*works: Callable[[], None]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_file_that_changed_is_loaded_anew(state: dict[str, Tensor], tmp_path: Path) -> None:
    """New content under an old name is noticed; the fingerprint changes with it."""
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    old, old_print = load(NAME, path), find_backbone(NAME, path).fingerprint()
    changed = {key: value + 1 for key, value in state.items()}
    time.sleep(0.02)  # past the clock tick of file systems
    torch.save(changed, path)
    exactly(load(NAME, path).state_dict(), changed)
    exactly(old.state_dict(), state)
    assert find_backbone(NAME, path).fingerprint() != old_print


# Modules of the user ----------------------------------------------------------------------------


def user_module() -> nn.Sequential:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    return module.train()


def test_a_module_of_the_user_is_never_changed() -> None:
    """The network is a copy without gradients in eval mode; nothing of it is the original's."""
    module = user_module()
    module[1].eval()
    module[0].weight.requires_grad_(False)
    module.register_forward_hook(lambda *_: None)
    state = copy.deepcopy(module.state_dict())
    facts = describe(module)
    backbone = find_backbone(module, preprocessing=as_tensor)
    net = backbone.load(CPU)
    assert not backbone.shared
    assert backbone.name == "Sequential"
    assert not net.training
    assert not any(weight.requires_grad for weight in net.parameters())
    for value in net.state_dict().values():
        value.fill_(7)
    net(torch.ones(1, 3, 8, 8))
    exactly(module.state_dict(), state)
    assert describe(module) == facts


class Viewing(nn.Module):
    """The idiom of torch's own tutorials, which takes maps to lie channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4 * 8 * 8, 2)

    def forward(self, batch: Tensor) -> Tensor:
        batch = self.conv(batch)
        return self.fc(batch.view(batch.size(0), -1))


class ReadingMemory(Viewing):
    """Take values in the order of memory: no error, but others if that changes."""

    def forward(self, batch: Tensor) -> Tensor:
        batch = self.conv(batch)
        return self.fc(batch.as_strided((len(batch), 256), (256, 1)))


class ViewingInput(Viewing):
    def forward(self, batch: Tensor) -> Tensor:
        return self.conv(batch.view(-1).view(batch.shape))


@pytest.mark.parametrize("kind", [Viewing, ReadingMemory, ViewingInput])
def test_a_module_of_the_user_runs_as_it_was_written(kind: type[nn.Module]) -> None:
    """However its code needs maps to lie in memory."""
    module = kind().eval()
    backbone = find_backbone(module, preprocessing=as_tensor_of_8)
    batch = torch.stack([as_tensor_of_8(PICTURES[key]) for key in PICTURES])
    with torch.no_grad():
        expected = module(batch.contiguous())
        found = load_network(backbone, CPU)(backbone.preprocessing.normalize(batch))
    torch.testing.assert_close(found, expected)


def as_tensor_of_8(image: Image.Image) -> Tensor:
    pixels = np.asarray(image.convert("RGB").resize((8, 8)), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)


def test_channels_come_last_where_a_module_allows_for_it() -> None:
    """That is faster, and the same to rounding."""
    module = user_module()
    loaded = load_network(find_backbone(module, preprocessing=as_tensor_of_8), CPU)
    assert loaded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not module[0].weight.is_contiguous(memory_format=torch.channels_last)


def describe(module: nn.Module) -> list[Any]:
    return [
        *(
            (path, part.training, list(part._forward_hooks), list(part._forward_pre_hooks))
            for path, part in module.named_modules()
        ),
        *(
            (key, value.requires_grad, value.device, value.dtype, value.stride(), value.data_ptr())
            for key, value in module.state_dict(keep_vars=True).items()
        ),
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_module_of_the_user_computes_in_float32(dtype: torch.dtype) -> None:
    """Images come as float32, so a copy takes them, and the original keeps its type."""
    module = user_module().to(dtype)
    backbone = find_backbone(module, preprocessing=as_tensor)
    batch = backbone.preprocessing.normalize(as_tensor(PICTURES["tiny"])[None])
    assert backbone.load(CPU)(batch).dtype == torch.float32
    assert module[0].weight.dtype == dtype


# Downloads --------------------------------------------------------------------------------------


class Server:
    """A server of weights on the loopback address, which counts what is asked of it."""

    def __init__(self, content: bytes):
        self.content = content
        self.failure = ""
        self.paths: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever)
        self.thread.start()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        self.paths.append(request.path)
        request.close_connection = True
        if self.failure == "missing":
            request.send_error(404)
            return
        body = self.content
        request.send_response(200)
        if self.failure == "breaks off in a chunk":
            request.send_header("Transfer-Encoding", "chunked")
            request.end_headers()
            request.wfile.write(b"ffffff\r\n" + body[:1000])
            return
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[:1000] if self.failure == "breaks off" else body)

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    """Serve weights for a backbone under a name with their hash, as torchvision's are."""
    torch.save(state, tmp_path / "served.pth")
    server = Server((tmp_path / "served.pth").read_bytes())
    digest = hashlib.sha256(server.content).hexdigest()
    entry = SqueezeNet1_1_Weights.IMAGENET1K_V1.value
    monkeypatch.setattr(entry, "url", f"{server.url}/models/{NAME}-{digest[:8]}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    yield server
    server.close()


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    return tmp_path / "torch" / "hub" / "checkpoints"


def test_weights_are_downloaded_once(
    server: Server, checkpoints: Path, state: dict[str, Tensor]
) -> None:
    """The first use fetches the file, with a progress bar; later ones take it from the cache."""
    backbone = find_backbone(NAME)
    assert not server.paths
    exactly(backbone.load(CPU).state_dict(), state)
    backbone.load(CPU)
    building._load_cached.cache_clear()
    exactly(load(NAME).state_dict(), state)
    exactly(load(NAME, SqueezeNet1_1_Weights.IMAGENET1K_V1).state_dict(), state)
    name = Path(urllib.parse.urlsplit(SqueezeNet1_1_Weights.DEFAULT.url).path).name
    assert server.paths == [f"/models/{name}"]
    assert [path.name for path in checkpoints.iterdir()] == [name]


def test_threads_download_once(server: Server) -> None:
    """Threads that ask for the same weights at once wait for one download."""
    backbone = find_backbone(NAME)
    nets: list[nn.Module] = []
    run_in_threads(*[lambda: nets.append(backbone.load(CPU))] * 4)
    assert len(nets) == 4
    assert len(server.paths) == 1


def test_a_download_with_a_wrong_hash_is_refused(server: Server, checkpoints: Path) -> None:
    """What is not what the file's name promises is neither loaded nor kept."""
    server.content = server.content[:-100] + bytes(100)
    with pytest.raises(OSError, match=r"could not be downloaded \(invalid hash value") as caught:
        load(NAME)
    assert "SqueezeNet1_1_Weights.IMAGENET1K_V1 of squeezenet1_1" in str(caught.value)
    assert not list(checkpoints.iterdir())


@pytest.mark.parametrize("failure", ["missing", "breaks off", "breaks off in a chunk"])
def test_a_failed_download_leaves_nothing(
    failure: str, server: Server, checkpoints: Path, state: dict[str, Tensor]
) -> None:
    """Whatever happens on the way is an OSError; nothing half-written stays, and a retry works."""
    server.failure = failure
    with pytest.raises(OSError, match="could not be downloaded") as caught:
        load(NAME)
    assert f"Put {SqueezeNet1_1_Weights.DEFAULT.url} at " in str(caught.value)
    assert not list(checkpoints.iterdir())
    server.failure = ""
    exactly(load(NAME).state_dict(), state)


def test_the_advice_without_a_network_works(
    server: Server, tmp_path: Path, state: dict[str, Tensor]
) -> None:
    """The error says which file to put where; doing just that makes the next load work."""
    server.close()
    with pytest.raises(OSError, match="could not be downloaded") as caught:
        load(NAME)
    words = str(caught.value)
    url, place = words.partition("Put ")[2].partition(", or give ")[0].split(" at ")
    assert url == SqueezeNet1_1_Weights.DEFAULT.url
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(tmp_path / "served.pth", place)
    exactly(load(NAME).state_dict(), state)
    # The other way out that it names:
    exactly(load(NAME, tmp_path / "served.pth").state_dict(), state)
    # And the backbone that needs no network:
    (offered,) = set(re.findall(r"'(\w+)'", words)) & set(list_backbones())
    load(offered)
    assert not server.paths


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>", None])
def test_a_damaged_file_in_the_cache_is_named(
    content: bytes | None, server: Server, checkpoints: Path
) -> None:
    """A file that was put there by hand, and broke, has an error that says which one it is."""
    checkpoints.mkdir(parents=True)
    file = checkpoints / SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2]
    file.write_bytes(server.content[:5000] if content is None else content)
    with pytest.raises(OSError, match="does not hold the weights") as caught:
        load(NAME)
    assert f"{file} does not hold" in str(caught.value)
    assert f"Put {SqueezeNet1_1_Weights.DEFAULT.url} at {file}" in str(caught.value)
    assert not server.paths


def test_a_folder_that_cannot_be_written_is_named(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, Tensor]
) -> None:
    """Where torchvision's cache cannot be made, the error says so and names a way out."""
    blocked = tmp_path / "blocked"
    blocked.write_bytes(b"")  # a file where the folder should be stops even an administrator
    monkeypatch.setenv("TORCH_HOME", str(blocked))
    with pytest.raises(OSError, match="could not be downloaded") as caught:
        load(NAME)
    assert "blocked" in str(caught.value)
    assert "give the path of such a file as weights=" in str(caught.value)
    exactly(load(NAME, tmp_path / "served.pth").state_dict(), state)


def test_every_weights_file_has_its_hash_in_its_name() -> None:
    """torchvision checks a download against its name, so each of the 115 names has a hash."""
    for name, weights in ALL_WEIGHTS:
        file = weights.url.rpartition("/")[2]
        assert torch.hub.HASH_REGEX.search(file), (name, file)
        assert len(torch.hub.HASH_REGEX.search(file).group(1)) >= 8, (name, file)


def test_the_published_weights_of_every_model_are_its_own() -> None:
    """No two weights share a file, so the address of one tells it from all others."""
    urls = collections.Counter(weights.url for _, weights in ALL_WEIGHTS)
    assert json.dumps([url for url, count in urls.items() if count > 1]) == "[]"


def test_a_module_without_weights_is_refused_by_name():
    """On the meta device layers can be listed, and nothing be computed."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).to("meta")
    backbone = find_backbone(module, preprocessing=SqueezeNet1_1_Weights.DEFAULT.transforms())
    with pytest.raises(ValueError, match="Sequential is on the meta device"):
        backbone.load(torch.device("cpu"))
