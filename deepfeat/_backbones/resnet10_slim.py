"""`resnet10_slim`: the backbone whose weights come with the package."""

import functools
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import Weights, WeightsEnum
from torchvision.models.resnet import BasicBlock
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from .descriptions import EnumDescription
from .networks import count_last_entry, load_strictly
from .state_files import State, WeightsFile

NAME = "resnet10_slim"
WIDTH = 32
SOURCES = (
    *("clouds", "formulas", "fractal", "gratings", "cells", "leaves", "strokes", "contours"),
    *("relief", "landscape", "blocks", "room", "collage"),
    *("astronaut", "brick", "camera", "cell", "chelsea", "clock", "coffee", "coins", "grass"),
    *("gravel", "hubble_deep_field", "immunohistochemistry", "retina", "rocket", "text"),
    *("china", "flower"),
)


class ResNet10Slim_Weights(WeightsEnum):
    """The weights in the package, described as torchvision does; see also `docs/model-card.md`.

    The categories are the kinds of pictures that it was trained on, and of little use themselves.
    """

    FORMULAS_V1 = Weights(
        url=str(Path(__file__).with_name(f"{NAME}.safetensors")),
        transforms=functools.partial(
            ImageClassification,
            crop_size=96,
            resize_size=96,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            interpolation=InterpolationMode.BILINEAR,
        ),
        meta={"categories": list(SOURCES), "num_params": 1_237_950, "_ops": 0.046},
    )
    DEFAULT = FORMULAS_V1


def list_names() -> list[str]:
    return [NAME]


def has_name(name: str) -> bool:
    return name == NAME


def known_weights(name: str) -> dict[str, WeightsFile]:
    known = ResNet10Slim_Weights.__members__
    return {
        word: WeightsFile.find(entry.url, EnumDescription(name, entry))
        for word, entry in known.items()
    }


def describe(name: str) -> EnumDescription:
    return EnumDescription(name, ResNet10Slim_Weights.DEFAULT)


def version() -> str:
    return f"torchvision {torchvision.__version__}"  # whose blocks it is made of


def is_sized(name: str) -> bool:
    return False


def build(name: str, size: tuple[int, int] | None, **options: Any) -> nn.Module:
    return SlimResNet(**options)


def load(name: str, size: tuple[int, int] | None, state: State) -> nn.Module:
    return load_strictly(name, SlimResNet, state)


def count_outputs(network: nn.Module) -> int:
    return count_last_entry(network)


class SlimResNet(nn.Module):
    """A residual network (He et al., 2016) with one block per stage and half ResNet-18's width.

    Its modules are named and connected like those of torchvision's `ResNet`.
    """

    def __init__(self, num_classes: int = 1000):
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTH)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _stage(WIDTH, WIDTH, stride=1)
        self.layer2 = _stage(WIDTH, 2 * WIDTH, stride=2)
        self.layer3 = _stage(2 * WIDTH, 4 * WIDTH, stride=2)
        self.layer4 = _stage(4 * WIDTH, 8 * WIDTH, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8 * WIDTH, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def _stage(before: int, after: int, stride: int) -> nn.Sequential:
    downsample = None
    if stride != 1:
        downsample = nn.Sequential(
            nn.Conv2d(before, after, kernel_size=1, stride=stride, bias=False),
            nn.BatchNorm2d(after),
        )
    return nn.Sequential(BasicBlock(before, after, stride, downsample))
