"""SaliencyDisplay: maps, compared with Grad-CAM computed by hand."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image
from sklearn.exceptions import NotFittedError
from sklearn.svm import LinearSVC
from torch import nn
from torchvision import models

from deepfeat import FineTuneClassifier, list_layers
from deepfeat.plotting import SaliencyDisplay


@pytest.fixture(scope="module")
def images():
    """Pictures with a bright square at one of four places, which is their class."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 100, (24, 64, 64, 3)).astype(np.uint8)
    for number, image in enumerate(images):
        y, x = divmod(number % 4, 2)
        image[y * 32 + 4 : y * 32 + 28, x * 32 + 4 : x * 32 + 28] = 255
    return images


@pytest.fixture(scope="module")
def classes():
    return np.array(["top left", "top right", "bottom left", "bottom right"] * 6)


@pytest.fixture(scope="module", params=["resnet18", "squeezenet1_1"])
def classifier(request, images, classes):
    """Networks with and without BatchNorm, and with ReLUs that work in place."""
    made = FineTuneClassifier(
        request.param,
        weights=None,
        unfreeze=None,
        image_size=64,
        max_epochs=20,
        head_epochs=0,
        random_state=0,
    )
    return made.fit(images, classes)


@pytest.fixture(scope="module")
def resnet(images, classes):
    params = {"weights": None, "image_size": 64, "max_epochs": 1, "head_epochs": 0}
    return FineTuneClassifier("resnet18", unfreeze=None, random_state=0, **params).fit(
        images, classes
    )


LAST = {"resnet18": "layer4", "squeezenet1_1": "classifier.2"}


def compute_by_hand(classifier, image, target, path):
    """Return Grad-CAM of one class, before it is scaled, with nothing but torch."""
    weights = models.get_model_weights(classifier.backbone)["DEFAULT"]
    # All of these weights were trained on crops of 224 pixels of images of 256.
    preprocess = weights.transforms(crop_size=64, resize_size=round(64 * 256 / 224))
    batch = preprocess(Image.fromarray(image))[None]
    net = classifier.module_.eval()
    kept = []

    def keep(module, inputs, output):
        # Of a copy, since the ReLU behind may work in place.
        output = output.clone().requires_grad_() if not output.requires_grad else output.clone()
        kept.append(output)
        return output.clone()

    handle = dict(net.named_modules())[path].register_forward_hook(keep)
    try:
        (gradient,) = torch.autograd.grad(net(batch)[0, target], kept)
    finally:
        handle.remove()
    cam = (gradient.mean(dim=(2, 3), keepdim=True) * kept[0]).sum(dim=1)[0]
    return cam.relu().detach().numpy()


def test_maps_are_those_of_grad_cam(classifier, images):
    """Of the last layer with positions, for the most probable class of each image."""
    display = SaliencyDisplay.from_estimator(classifier, images[:5])
    targets = classifier.predict_proba(images[:5]).argmax(axis=1)
    assert len(set(targets)) > 1
    for image, target, found in zip(images, targets, display.maps, strict=False):
        expected = compute_by_hand(classifier, image, target, LAST[classifier.backbone])
        assert_allclose(found, expected, atol=0.1 * expected.max())
    assert display.maps.max() > 0


def test_another_class_and_layer_can_be_asked_for(resnet, images):
    """The maps are those of that class and layer."""
    display = SaliencyDisplay.from_estimator(
        resnet, images[:2], target="bottom left", layer="stage3"
    )
    target = resnet.classes_.tolist().index("bottom left")
    for image, found in zip(images, display.maps, strict=False):
        expected = compute_by_hand(resnet, image, target, "layer2")
        assert_allclose(found, expected, atol=0.1 * expected.max())
    share = resnet.predict_proba(images[:1])[0, target]
    assert display.axes_[0, 0].get_title(loc="left") == f"bottom left  {share:.0%}"


def test_the_classifier_is_left_as_it_was(classifier, images):
    """Weights, statistics, gradients, hooks and predictions."""
    net = classifier.module_
    before = {key: value.clone() for key, value in net.state_dict().items()}
    expected = classifier.predict_proba(images)
    SaliencyDisplay.from_estimator(classifier, images[:2])
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(weight.grad is None for weight in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())
    np.testing.assert_array_equal(classifier.predict_proba(images), expected)


def test_the_map_lies_over_the_image(resnet, images):
    """Both have the extent of the image, and the map is half transparent."""
    display = SaliencyDisplay.from_estimator(resnet, images[:3], n_cols=3)
    assert display.axes_.shape == (3, 2)
    for (left, right), values in zip(display.axes_, display.maps, strict=True):
        (image,), (below, above) = left.images, right.images
        assert image.get_extent() == below.get_extent() == above.get_extent()
        assert_allclose(above.get_array(), values)
        assert above.get_alpha() == 0.5


@pytest.mark.parametrize("backbone", ["timm/test_vit", "swin_t"])
def test_networks_without_maps_are_refused(backbone, images, classes):
    """Tokens have no channels to weight, and maps with their channels last would be misread."""
    made = FineTuneClassifier(
        backbone, weights=None, unfreeze=None, image_size=64, max_epochs=1, head_epochs=0
    )
    made.fit(images[:4], classes[:4])
    with pytest.raises(ValueError, match=r"^layer must return maps"):
        SaliencyDisplay.from_estimator(made, images[:1])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"target": "middle"}, r"^target must be one of \['bottom left', .*\]; got 'middle'\.$"),
        ({"layer": "layer9"}, r"^layer must be one of .*; got 'layer9'\.$"),
        ({"layer": "penultimate"}, r"^layer must "),
    ],
)
def test_bad_arguments_are_refused(resnet, images, params, message):
    """The error names what is allowed."""
    with pytest.raises(ValueError, match=message):
        SaliencyDisplay.from_estimator(resnet, images[:1], **params)


def test_other_estimators_are_refused(images):
    """Only a network has maps, and only after training a class."""
    with pytest.raises(TypeError, match=r"^estimator must be a FineTuneClassifier; got LinearSVC"):
        SaliencyDisplay.from_estimator(LinearSVC(), images)
    with pytest.raises(NotFittedError):
        SaliencyDisplay.from_estimator(FineTuneClassifier(), images)


def test_a_layer_may_be_an_index(resnet, images):
    """Into the table of layers, as for an extractor."""
    table = [row.name for row in list_layers("resnet18", image_size=64)]
    by_index = SaliencyDisplay.from_estimator(resnet, images[:2], layer=table.index("layer2.1"))
    by_name = SaliencyDisplay.from_estimator(resnet, images[:2], layer="layer2.1")
    assert_allclose(by_index.maps, by_name.maps)


def test_a_module_that_is_called_twice_is_refused(images, classes):
    """Which of its outputs is meant is unclear, and Captum would take the last."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.relu, self.fc = nn.ReLU(), nn.Linear(4, 2)

        def forward(self, x):
            maps = self.relu(self.second(self.relu(self.first(x))))
            return self.fc(maps.mean((2, 3)))

    made = FineTuneClassifier(
        Twice(), preprocessing=preprocess, unfreeze="all", max_epochs=1, head_epochs=0
    )
    made.fit(images, classes)
    with pytest.raises(ValueError, match=r"^layer must be a module that is called once; 'relu'"):
        SaliencyDisplay.from_estimator(made, images[:1], layer="relu")
    assert SaliencyDisplay.from_estimator(made, images[:1], layer="second").maps.shape[0] == 1


def preprocess(image):
    return torch.from_numpy(np.array(image.resize((64, 64)))).permute(2, 0, 1) / 255


def test_rows_of_a_table_are_images_too(images, classes):
    """As for the classifier, if it has an `image_shape`."""
    params = {"weights": None, "image_size": 64, "max_epochs": 1, "head_epochs": 0}
    made = FineTuneClassifier(
        "resnet18", unfreeze=None, random_state=0, image_shape=(64, 64, 3), **params
    )
    rows = images.reshape(len(images), -1)
    made.fit(rows, classes)
    display = SaliencyDisplay.from_estimator(made, rows[:2])
    assert_allclose(np.asarray(display.images[0]).shape, (64, 64, 3))
