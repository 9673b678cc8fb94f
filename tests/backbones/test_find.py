"""Tests of finding backbones: names, choices that are refused, modules of the user."""

import copy
import functools
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision import models
from torchvision.models import SqueezeNet1_1_Weights

from deepfeat import list_backbones
from deepfeat._backbones import networks as building
from deepfeat._backbones.find import find_backbone
from deepfeat._extraction.readers import load_network

exactly = functools.partial(assert_close, rtol=0, atol=0)
CPU = torch.device("cpu")
NAME = "squeezenet1_1"
TORCHVISIONS = models.list_models(module=models)


def as_tensor(image):
    """Turn an image into a small tensor, in double precision."""
    return torch.from_numpy(np.asarray(image.resize((48, 32)), dtype=np.float64)).permute(2, 0, 1)


def forbidden(*_args, **_kwargs):
    raise AssertionError("called")


# Names ------------------------------------------------------------------------------------------


def test_all_classification_models_of_torchvision_are_backbones():
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
            "There is no backbone 'resnet5'. Close matches: 'resnet50', 'resnet152', 'resnet34'. "
            "Names of timm begin with 'timm/'.",
        ),
        (
            lambda: find_backbone("zzz"),
            "There is no backbone 'zzz'. list_backbones() lists them. Names of timm begin with "
            "'timm/'.",
        ),
        (
            lambda: find_backbone("fcn_resnet50"),
            "There is no backbone 'fcn_resnet50'. Close matches: 'resnet50', 'wide_resnet50_2', "
            "'resnet152'. Names of timm begin with 'timm/'.",
        ),
        (
            lambda: find_backbone("vgg16", "IMAGENET1K_V2"),
            "vgg16 has no weights 'IMAGENET1K_V2'. It has 'IMAGENET1K_V1', "
            "'IMAGENET1K_FEATURES', 'DEFAULT'; the path of a file ends in .pth, .pt, .tar, "
            ".safetensors.",
        ),
        (
            lambda: find_backbone("vgg16", models.VGG19_Weights.DEFAULT),
            "VGG19_Weights.IMAGENET1K_V1 are not weights of vgg16.",
        ),
        (
            lambda: find_backbone("vgg16", preprocessing=as_tensor, image_size=64),
            "preprocessing= replaces the weights' own: resize= and image_size= do not apply.",
        ),
        (
            lambda: find_backbone(nn.Flatten(), None, preprocessing=as_tensor),
            "weights= does not apply to a module, which has its own.",
        ),
        (
            lambda: find_backbone(nn.Flatten()),
            "A module needs preprocessing=, from an RGB PIL image to the tensor that it takes: "
            "for instance torchvision.models.ResNet50_Weights.DEFAULT.transforms().",
        ),
        (
            lambda: find_backbone(nn.Flatten(), preprocessing=np.asarray),
            "preprocessing must turn an RGB PIL image into a float tensor of shape (C, H, W); got "
            "a ndarray.",
        ),
        (
            lambda: find_backbone("vit_b_32", image_size=100),
            "vit_b_32 cannot be built for images of side 100: Input shape indivisible by patch "
            "size!",
        ),
    ],
)
def test_a_wrong_choice_has_a_clear_error(call, words):
    """The error says what came, what was expected, and what there is."""
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == words


@pytest.mark.parametrize("backbone", [None, 16, models.vgg16, models.VGG, ["vgg16"]])
def test_what_is_no_name_and_no_module_is_refused(backbone):
    """A builder or a class is not called for the user."""
    with pytest.raises(TypeError, match=r"^backbone must be a name or a torch\.nn\.Module; got a "):
        find_backbone(backbone)


def test_weights_have_names_and_members():
    """A name, a member of the enumeration and "DEFAULT" mean the same weights."""
    member = models.ResNet50_Weights.IMAGENET1K_V2
    found = [find_backbone("resnet50", weights) for weights in ("DEFAULT", member, member.name)]
    assert len({backbone.fingerprint() for backbone in found}) == 1
    assert len({backbone.skeleton for backbone in found}) == 1
    older = find_backbone("resnet50", "IMAGENET1K_V1")
    assert older.fingerprint() != found[0].fingerprint()


def test_a_missing_file_is_reported_at_once(tmp_path):
    """A path to nothing, or to a folder, has an error that names it."""
    for path in (tmp_path / "missing.pth", str(tmp_path / "missing.safetensors"), tmp_path):
        with pytest.raises(FileNotFoundError, match="There is no weights file"):
            find_backbone(NAME, path)


def test_a_path_may_begin_at_home(
    state,
    tmp_path,
    monkeypatch,
    load,
):
    """A tilde stands for the home directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    torch.save(state, tmp_path / "weights.pth")
    exactly(load(NAME, "~/weights.pth").state_dict(), state)


def test_finding_loads_nothing(monkeypatch):
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


def test_finding_leaves_random_numbers_alone(
    untouched_generators,
):
    """The skeleton of no family draws from the global generators."""
    names = {name.partition("_")[0].rstrip("0123456789"): name for name in list_backbones()}
    names |= {name: name for name in ("swin_v2_t", "vit_b_16", "regnet_x_400mf", "inception_v3")}
    building.make_skeleton.cache_clear()
    with untouched_generators():
        for name in names.values():
            find_backbone(name)


# Modules of the user ----------------------------------------------------------------------------


def user_module():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    return module.train()


def test_a_module_of_the_user_is_never_changed():
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

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4 * 8 * 8, 2)

    def forward(self, batch):
        batch = self.conv(batch)
        return self.fc(batch.view(batch.size(0), -1))


class ReadingMemory(Viewing):
    """Take values in the order of memory: no error, but others if that changes."""

    def forward(self, batch):
        batch = self.conv(batch)
        return self.fc(batch.as_strided((len(batch), 256), (256, 1)))


class ViewingInput(Viewing):
    def forward(self, batch):
        return self.conv(batch.view(-1).view(batch.shape))


@pytest.mark.parametrize("kind", [Viewing, ReadingMemory, ViewingInput])
def test_a_module_of_the_user_runs_as_it_was_written(kind, pictures):
    """However its code needs maps to lie in memory."""
    module = kind().eval()
    backbone = find_backbone(module, preprocessing=as_tensor_of_8)
    batch = torch.stack([as_tensor_of_8(pictures[key]) for key in pictures])
    with torch.no_grad():
        expected = module(batch.contiguous())
        found = load_network(backbone, CPU)(backbone.preprocessing.normalize(batch))
    torch.testing.assert_close(found, expected)


def as_tensor_of_8(image):
    pixels = np.asarray(image.convert("RGB").resize((8, 8)), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)


def test_channels_come_last_where_a_module_allows_for_it():
    """That is faster, and the same to rounding."""
    module = user_module()
    loaded = load_network(find_backbone(module, preprocessing=as_tensor_of_8), CPU)
    assert loaded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not module[0].weight.is_contiguous(memory_format=torch.channels_last)


def describe(module):
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
def test_a_module_of_the_user_computes_in_float32(dtype, pictures):
    """Images come as float32, so a copy takes them, and the original keeps its type."""
    module = user_module().to(dtype)
    backbone = find_backbone(module, preprocessing=as_tensor)
    batch = backbone.preprocessing.normalize(as_tensor(pictures["tiny"])[None])
    assert backbone.load(CPU)(batch).dtype == torch.float32
    assert module[0].weight.dtype == dtype


def test_a_module_without_weights_is_refused_by_name():
    """On the meta device layers can be listed, and nothing be computed."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).to("meta")
    backbone = find_backbone(module, preprocessing=SqueezeNet1_1_Weights.DEFAULT.transforms())
    with pytest.raises(ValueError, match="Sequential is on the meta device"):
        backbone.load(torch.device("cpu"))
