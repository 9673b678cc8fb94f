"""Knows small networks to fine-tune, and how long it takes to do so: hardly any time."""

import itertools

import numpy as np
import torch
from torch import nn
from torchvision import models, transforms

from deepfeat import FineTuneClassifier

SIDE = 16
to_16_pixels = transforms.Compose([transforms.Resize((SIDE, SIDE)), transforms.ToTensor()])


def seeded(make, *args, **kwargs):
    """Make a network from one seed, and leave torch's own generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*args, **kwargs)


class PlainNet(nn.Module):
    """Three convolutions and two linear layers; dropout and BatchNorm where they are asked for."""

    def __init__(self, dropout=0.0, norm=False, n_outputs=7):
        super().__init__()
        channels = itertools.pairwise((3, 6, 8, 8))
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(before, after, 3, stride=2, padding=1),
                    nn.BatchNorm2d(after) if norm else nn.Identity(),
                    nn.ReLU(inplace=True),
                )
                for before, after in channels
            )
        )
        self.hidden = nn.Linear(8 * 2 * 2, 16)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(16, n_outputs)

    def forward(self, images):
        return self.fc(self.drop(self.hidden(self.blocks(images).flatten(1)).relu()))


class LineNet(nn.Module):
    """A network for images of one line, into which the tables of scikit-learn's checks turn."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, (1, 3), padding=(0, 1)), nn.ReLU(), nn.Flatten())
        self.fc = nn.Linear(16 * 16, 10)

    def forward(self, images):
        return self.fc(self.body(images))


class ToALine:
    """Preprocessing that is named alike in all processes, as the ids of tests must be."""

    def __call__(self, image):
        return transforms.functional.to_tensor(image.resize((16, 1), 0))

    def __repr__(self):
        return "to_a_line"


to_a_line = ToALine()


def make_plain(**options):
    return seeded(PlainNet, **options)


def make_vit(**options):
    """Make a transformer as small as torchvision can build one."""
    sizes = {"image_size": SIDE, "patch_size": 4, "num_layers": 3, "num_heads": 2}
    sizes |= {"hidden_dim": 16, "mlp_dim": 24, "num_classes": 7}
    vit = seeded(models.VisionTransformer, **sizes | options)
    # torchvision leaves the head at zero, through which nothing would learn in the first step.
    return seeded(_fill_head, vit)


def _fill_head(vit):
    nn.init.normal_(vit.heads.head.weight, std=0.1)
    return vit


def make_classifier(backbone=None, **params):
    """Make a classifier that learns in a moment: a network of one's own, or a named one."""
    fast = {"max_epochs": 2, "batch_size": 4, "num_workers": 0, "random_state": 0, "device": "cpu"}
    if isinstance(backbone, str):
        fast |= {"weights": None, "image_size": 32}
    else:
        fast |= {"preprocessing": to_16_pixels, "unfreeze": "all"}
        backbone = make_plain() if backbone is None else backbone
    return FineTuneClassifier(backbone, **fast | params)


def make_images(count=8, side=SIDE, seed=0):
    """Make noise with labels: two classes that differ in brightness."""
    rng = np.random.default_rng(seed)
    labels = np.array(["dark", "light"] * count)[:count]
    images = (
        rng.integers(0, 128, (count, side, side, 3))
        + 100 * (labels == "light")[:, None, None, None]
    )
    return list(images.astype(np.uint8)), labels


def state_of(classifier):
    return classifier.module_.state_dict()


def assert_same_state(state, other):
    """Raise unless two networks are equal to the bit."""
    torch.testing.assert_close(dict(state), dict(other), rtol=0, atol=0, equal_nan=True)
