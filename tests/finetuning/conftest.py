"""Fixtures for fine-tuning: images, and networks whose trained part is known."""

import pytest
from small_networks import make_images

from deepfeat._finetuning.freezing import find_blocks, find_trained, freeze
from deepfeat._finetuning.heads import add_head
from deepfeat._layers.head import find_head
from deepfeat._layers.index import LayerIndex


@pytest.fixture
def images():
    """Eight images of noise, and their labels: dark and light in turn."""
    return make_images()


@pytest.fixture
def prepare():
    """Give a network a head of 3 outputs, find its trained part, and freeze the rest."""

    def prepare(module, unfreeze, side=16):
        shape = (3, side, side)
        blocks = find_blocks(LayerIndex(module, shape), module, unfreeze)
        head = add_head(module, find_head(module, shape), "replace", 3, 0)
        index = LayerIndex(module, shape)
        trained = find_trained(module, index, blocks, head)
        freeze(module, trained)
        return module, index, trained

    return prepare
