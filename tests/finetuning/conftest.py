"""Small networks to fine-tune in a moment, images for them, and their trained part."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models, transforms

from deepfeat import FineTuneClassifier
from deepfeat._finetuning.freezing import find_blocks, find_trained, freeze
from deepfeat._finetuning.heads import add_head
from deepfeat._layers.head import find_head
from deepfeat._layers.index import LayerIndex

SIDE = 16


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


@pytest.fixture(scope="session")
def to_16_pixels():
    """Preprocessing for the small networks."""
    return transforms.Compose([transforms.Resize((SIDE, SIDE)), transforms.ToTensor()])


@pytest.fixture(scope="session")
def seeded():
    """Make a network from one seed, and leave torch's own generator as it was."""

    def seeded(make, *args, **kwargs):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make(*args, **kwargs)

    return seeded


@pytest.fixture(scope="session")
def make_plain(seeded):
    """Make a network of convolutions and linear layers."""
    return lambda **options: seeded(PlainNet, **options)


@pytest.fixture(scope="session")
def make_vit(seeded):
    """Make a transformer as small as torchvision can build one."""

    def make_vit(**options):
        sizes = {"image_size": SIDE, "patch_size": 4, "num_layers": 3, "num_heads": 2}
        sizes |= {"hidden_dim": 16, "mlp_dim": 24, "num_classes": 7}
        vit = seeded(models.VisionTransformer, **sizes | options)
        # torchvision leaves the head at zero, through which nothing would learn in the first step.
        seeded(nn.init.normal_, vit.heads.head.weight, std=0.1)
        return vit

    return make_vit


@pytest.fixture(scope="session")
def make_classifier(make_plain, to_16_pixels):
    """Make a classifier that learns in a moment: a network of one's own, or a named one."""

    def make_classifier(backbone=None, **params):
        fast = {"max_epochs": 2, "batch_size": 4, "num_workers": 0, "random_state": 0}
        fast |= {"device": "cpu", "head_epochs": 0, "backbone_learning_rate": 1e-4}
        if isinstance(backbone, str):
            fast |= {"weights": None, "image_size": 32}
        else:
            fast |= {"preprocessing": to_16_pixels, "unfreeze": "all"}
            backbone = make_plain() if backbone is None else backbone
        return FineTuneClassifier(backbone, **fast | params)

    return make_classifier


@pytest.fixture(scope="session")
def make_images():
    """Make noise with labels: two classes that differ in brightness."""

    def make_images(count=8, side=SIDE, seed=0):
        rng = np.random.default_rng(seed)
        labels = np.array(["dark", "light"] * count)[:count]
        images = (
            rng.integers(0, 128, (count, side, side, 3))
            + 100 * (labels == "light")[:, None, None, None]
        )
        return list(images.astype(np.uint8)), labels

    return make_images


@pytest.fixture
def start_of(make_classifier, make_images):
    """Return the network as it is before training, up to a step at a learning rate near zero."""

    def start_of(y=None, **params):
        classifier = make_classifier(learning_rate=1e-30, backbone_learning_rate=1e-30, **params)
        classifier.set_params(weight_decay=0.0, max_epochs=1, batch_size=8, optimizer="sgd")
        X, labels = make_images()
        return classifier.fit(X, labels if y is None else y).module_

    return start_of


@pytest.fixture
def images(make_images):
    """Eight images of noise, and their labels: dark and light in turn."""
    return make_images()


@pytest.fixture(scope="session")
def state_of():
    """Read the state of the network that a classifier trained."""
    return lambda classifier: classifier.module_.state_dict()


@pytest.fixture(scope="session")
def assert_same_state():
    """Raise unless two networks are equal to the bit."""

    def assert_same_state(state, other):
        torch.testing.assert_close(dict(state), dict(other), rtol=0, atol=0, equal_nan=True)

    return assert_same_state


@pytest.fixture
def prepare():
    """Give a network a head of 3 outputs, find its trained part, and freeze the rest."""

    def prepare(module, unfreeze, side=16):
        shape = (3, side, side)
        blocks = find_blocks(LayerIndex(module, shape), module, unfreeze)
        head = add_head(module, find_head(module, shape), "replace", 3, 0)
        index = LayerIndex(module, shape)
        trained = find_trained(module, index, blocks, (head,))
        freeze(module, trained)
        return module, index, trained

    return prepare
