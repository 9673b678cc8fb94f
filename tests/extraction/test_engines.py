"""OpenVINO as an engine: its rows are those of torch, and it converts as seldom as it can."""

import contextlib
import copy
import gc
import logging
import os
import re
import subprocess
import sys
import textwrap
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from torch import nn
from torchvision import models, transforms
from torchvision.models import ResNet

from deepfeat import DeepFeatureExtractor, FeatureCache, FineTuneClassifier
from deepfeat._extraction import openvino as engine

openvino = pytest.importorskip("openvino")

TO_8_PIXELS = transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()])
CONVERTS = "converting to OpenVINO"
HAS_BFLOAT16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """More threads do not make networks this small faster, and slow them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """Keep converted networks in no folder, and let OpenVINO tell nobody that it converts.

    What it tells is sent by threads, which takes twenty times as long as a small conversion.
    """
    monkeypatch.delenv("DEEPFEAT_OPENVINO_DIR", raising=False)
    monkeypatch.setenv("CI", "true")


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Forget the networks that this process has converted, as if it were another one."""

    def forget():
        monkeypatch.setattr(engine, "_compiled", OrderedDict())

    forget()
    return forget


@pytest.fixture
def conversions(monkeypatch, forget):
    """Count conversions, as a list of what was converted in this process."""
    converted = []
    convert = openvino.convert_model

    def counted(module, **options):
        converted.append(module)
        return convert(module, **options)

    monkeypatch.setattr(openvino, "convert_model", counted)
    return converted


@pytest.fixture
def compiled(monkeypatch, forget):
    """Gather the compiled networks."""
    networks = []
    compile_model = openvino.Core.compile_model

    def gather(core, *args, **options):
        networks.append(compile_model(core, *args, **options))
        return networks[-1]

    monkeypatch.setattr(openvino.Core, "compile_model", gather)
    return networks


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = make().eval()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.3, 0.3)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net


def make_net():
    """Make a network of one's own for images of any side."""
    return seeded(
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
            *(nn.Conv2d(8, 12, 3, stride=2), nn.BatchNorm2d(12), nn.ReLU(inplace=True)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)),
        )
    )


def make_vit():
    """Make a transformer as small as torchvision can build one."""
    sizes = {"hidden_dim": 16, "mlp_dim": 24, "num_classes": 5}
    vit = seeded(lambda: models.VisionTransformer(8, 4, 2, 2, **sizes))
    nn.init.normal_(vit.heads.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return vit


class Calls(nn.Module):
    """A convolution, and a function of the network and what it returned."""

    def __init__(self, function):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.extra = nn.Conv2d(4, 6, 1)
        self.end = nn.ReLU()
        self.function = function

    def forward(self, batch):
        return self.end(self.function(self, batch, self.conv(batch)))


def make(backbone=None, layer="5", **params):
    """Make an extractor that computes every row anew, with OpenVINO unless told otherwise."""
    fast = {"cache": None, "engine": "openvino", "num_workers": 0}
    if isinstance(backbone, str):
        fast |= {"weights": None, "image_size": 32}
    else:
        fast |= {"preprocessing": TO_8_PIXELS}
    backbone = make_net() if backbone is None else backbone
    return DeepFeatureExtractor(backbone, layer, **fast | params)


def make_named(layer="layer1", **params):
    """Make an extractor with a network that all extractors of a process share."""
    return make("resnet10_slim", layer, **{"weights": "DEFAULT"} | params)


def by_torch(estimator):
    return clone(estimator).set_params(engine="torch")


def assert_near(found, expected):
    """Raise unless rows are equal to 1e-5 of the largest value of each."""
    scale = np.abs(expected).reshape(len(expected), -1).max(axis=1)
    scale = scale.reshape(-1, *[1] * (expected.ndim - 1))
    assert_allclose(found / scale, expected / scale, rtol=0, atol=1e-5)


def assert_rows_of_torch(extractor, X):
    expected = by_torch(extractor).transform(X)
    assert_near(extractor.transform(X), expected)
    # Were all images alike to this network, rows of the wrong image would pass.
    assert np.ptp(expected / np.abs(expected).max(), axis=0).max() > 1e-3


# Against torch ------------------------------------------------------------------------------------

NETWORKS = {
    "own": (make_net, ["0", "3", "5", "7", "8"], {"pooling": ["avg", "max", "gem", "flatten"]}),
    "own ViT": (make_vit, ["encoder.ln", "penultimate"], {"pooling": ["cls", "avg"]}),
    "resnet10_slim": (
        lambda: "resnet10_slim",
        ["layer1.0.conv1", "layer1.0.bn1", "stage2", "penultimate"],
        {"weights": "DEFAULT", "pooling": ["avg", "max"]},
    ),
    "mobilenet_v3_small": (
        lambda: "mobilenet_v3_small",
        ["features.0.0", "stage3", "classifier.1", "classifier.2"],
        {},
    ),
    "timm/test_byobnet": (
        lambda: "timm/test_byobnet.r160_in1k",
        ["stem.conv", "stage2", "penultimate"],
        {},
    ),
}
# A side of images, and layers.
SLOW = {
    "alexnet": (64, ["conv5", "fc6", "fc8", "relu8"]),
    "convnext_tiny": (32, ["stage2", "penultimate"]),
    "densenet121": (32, ["features.conv0", "stage3", "features.norm5", "penultimate"]),
    "efficientnet_b0": (32, ["stage3", "penultimate"]),
    "googlenet": (32, ["inception3a.branch1.conv", "stage3", "penultimate"]),
    "inception_v3": (75, ["stage3", "penultimate"]),
    "maxvit_t": (224, ["stage2", "penultimate"]),
    "mnasnet0_5": (32, ["stage3", "penultimate"]),
    "regnet_y_400mf": (32, ["stage3", "penultimate"]),
    "resnet18": (32, ["conv1", "stage3", "penultimate", "fc"]),
    "shufflenet_v2_x0_5": (32, ["conv1.0", "stage3", "penultimate"]),
    "squeezenet1_1": (32, ["features.0", "stage3", "penultimate"]),
    "swin_v2_t": (64, ["stage2", "penultimate"]),
    "vgg11_bn": (32, ["conv5_2", "relu5_2", "fc6"]),
    "vit_b_32": (64, ["stage2", "penultimate"]),
    "timm/test_convnext.r160_in1k": (32, ["stage1", "penultimate"]),
    "timm/test_efficientnet.r160_in1k": (64, ["conv_stem", "stage2", "penultimate"]),
    "timm/test_resnet.r160_in1k": (64, ["stage2", "penultimate"]),
    "timm/test_vit.r160_in1k": (32, ["stage2", "penultimate"]),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_rows_are_those_of_torch(network, scene_paths):
    """For several layers at once, raw convolutions as well, under every pooling."""
    if network.startswith("timm/"):
        pytest.importorskip("timm")
    make_backbone, layers, params = NETWORKS[network]
    assert_rows_of_torch(make(make_backbone(), layers, norm="max", **params), scene_paths[:5])


@pytest.mark.slow
@pytest.mark.parametrize("network", SLOW)
def test_rows_of_every_family_are_those_of_torch(network, scene_paths):
    """A small network of each family of torchvision, and a few of timm."""
    side, layers = SLOW[network]
    params = {"image_size": side, "norm": "max", "batch_size": 2}
    assert_rows_of_torch(make(network, layers, **params), scene_paths[:3])


@pytest.mark.parametrize("batch_size", [1, 2, 4, 64])
def test_batches_of_any_size_give_the_same_rows(pictures, batch_size):
    """Also if the last one is not full, or if an image comes alone."""
    extractor = make(batch_size=batch_size)
    expected = by_torch(extractor).transform(pictures[:5])
    assert_near(extractor.transform(pictures[:5]), expected)
    assert_near(extractor.transform(pictures[3:4]), expected[3:4])


def test_more_images_than_a_processor_takes_at_once_are_split(pictures, compiled):
    """Batches of large images are run in parts, of which the last is padded."""
    net = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 16, stride=16), nn.ReLU()))
    to_224_pixels = transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor()])
    extractor = make(net, "1", preprocessing=to_224_pixels, batch_size=16)
    assert_near(extractor.transform(pictures[:11]), by_torch(extractor).transform(pictures[:11]))
    assert [tuple(port.shape) for port in compiled[-1].inputs] == [(8, 3, 224, 224)]


@pytest.mark.parametrize("convert", [torch.Tensor.double, torch.Tensor.half])
def test_preprocessing_may_give_any_floats(pictures, convert):
    """They are made float32, as torch does it."""
    extractor = make(preprocessing=transforms.Compose([TO_8_PIXELS, convert]))
    assert_rows_of_torch(extractor, pictures[:3])


def test_preprocessing_may_give_any_layout_in_memory(pictures):
    """Strides do not matter."""
    extractor = make(preprocessing=transforms.Compose([TO_8_PIXELS, lambda image: image.mT]))
    assert_rows_of_torch(extractor, pictures[:3])


@pytest.mark.parametrize(
    ("make_backbone", "layer"), [(make_net, "3"), (make_vit, "encoder.ln")], ids=["CNN", "ViT"]
)
def test_maps_are_those_of_torch(pictures, make_backbone, layer):
    """Raw, and tokens laid out on their grid."""
    extractor = make(make_backbone(), layer, batch_size=4)
    expected = by_torch(extractor).transform_maps(pictures[:5])
    found = extractor.transform_maps(pictures[:5])
    assert found.shape == expected.shape
    assert expected.ndim == 4
    assert_near(found, expected)


def test_what_fails_fails_as_in_torch(pictures):
    """A broken image, and one for which the network gives NaN, leave the others' rows alone."""
    net = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), Relative()))
    X = [pictures[0], np.zeros_like(pictures[0]), b"no image", *pictures[1:4]]
    extractor = make(net, "2", on_error="nan", batch_size=2, norm=None)
    expected = by_torch(extractor)
    rows = expected.transform(X)
    found = extractor.transform(X)
    assert extractor.errors_ == expected.errors_
    assert list(extractor.errors_) == [1, 2]
    assert_array_equal(np.isnan(found), np.isnan(rows))
    good = [0, 3, 4, 5]
    assert_near(found[good], rows[good])


class Relative(nn.Module):
    """Divide each channel by the brightest value of all: NaN if all are zero."""

    def forward(self, batch):
        return batch / batch.amax((1, 2, 3), keepdim=True)


@pytest.mark.parametrize("batch_size", [4, 8])
def test_layers_that_a_network_does_not_call_are_not_kept(pictures, batch_size):
    """They are listed, since the black image of the index goes there; other layers are read."""

    def function(net, batch, maps):
        if not batch.any():
            net.extra(maps)
        return maps

    extractor = make(
        seeded(lambda: Calls(function)),
        "conv",
        cache=FeatureCache(),
        prefetch=["extra", "end"],
        batch_size=batch_size,
    )
    for engine_name in ("openvino", "torch"):  # the other serves the first from its cache
        expected = by_torch(extractor).set_params(cache=None).transform(pictures[:6])
        rows = extractor.set_params(engine=engine_name).transform(pictures[:6])
        assert_near(rows, expected)
    end = extractor.set_params(layer="end").transform(pictures[:6])
    assert_near(end, np.maximum(by_torch(extractor).transform(pictures[:6]), 0))
    for engine_name, message in (("openvino", "use 'torch'"), ("torch", "'extra' does not return")):
        with pytest.raises(ValueError, match=message):
            extractor.set_params(layer="extra", engine=engine_name).transform(pictures[:6])


@pytest.mark.parametrize(
    "context",
    [
        pytest.param(torch.inference_mode, id="inference mode"),
        pytest.param(torch.no_grad, id="no gradients"),
        pytest.param(lambda: torch.autocast("cpu", torch.bfloat16), id="autocast"),
    ],
)
def test_what_the_caller_has_set_in_torch_does_not_matter(pictures, context):
    """The precision is that which was asked for, as with torch."""
    extractor = make()
    expected = by_torch(extractor).transform(pictures[:3])
    with context():
        assert_near(by_torch(extractor).transform(pictures[:3]), expected)
        assert_near(extractor.transform(pictures[:3]), expected)


# Precision ----------------------------------------------------------------------------------------


def test_float32_is_what_is_computed_in(pictures, compiled):
    """Left to itself, OpenVINO takes bfloat16 on processors that have it."""
    make(layer=["2", "5"]).transform(pictures[:2])
    hints = [network.get_property("INFERENCE_PRECISION_HINT") for network in compiled]
    assert hints == [openvino.Type.f32] * len(compiled)
    assert compiled


@pytest.mark.skipif(not HAS_BFLOAT16, reason="this processor has no bfloat16")
def test_bfloat16_is_near_float32(scene_paths, compiled):
    """It is asked for, computed in, and not far from it."""
    exact = make_named("stage3").transform(scene_paths[:4])
    coarse = make_named("stage3", precision="bfloat16").transform(scene_paths[:4])
    assert compiled[-1].get_property("INFERENCE_PRECISION_HINT") == openvino.Type.bf16
    cosines = (exact * coarse).sum(axis=1)
    assert cosines.min() > 0.99
    assert np.abs(exact - coarse).max() > 1e-5


@pytest.mark.parametrize("threads", [1, 2])
def test_it_takes_as_many_threads_as_torch(pictures, compiled, threads):
    """`torch.set_num_threads` decides for both, also once a network has been converted."""
    extractor = make_named()
    extractor.transform(pictures[:2])
    torch.set_num_threads(threads)
    try:
        extractor.transform(pictures[:2])
    finally:
        torch.set_num_threads(1)
    assert compiled[-1].get_property("INFERENCE_NUM_THREADS") == threads


# Errors -------------------------------------------------------------------------------------------

NOT_CUDA = r"^engine='openvino' runs on the CPU: device must be 'auto' or 'cpu'; got 'cuda'\.$"
NOT_FLOAT16 = (
    r"^precision must be 'float32' or 'bfloat16' if engine is 'openvino'; got 'float16'\.$"
)
NO_BFLOAT16 = r"'bfloat16' is not possible with engine='openvino' on this processor.*'float32'"
NOT_INSTALLED = r"openvino is needed here.* `pip install 'openvino>=[\d.]+'`\.$"


@pytest.fixture
def break_engine(monkeypatch):
    """Make a parameter invalid on this machine."""

    def lacks_bfloat16(core, device, name):
        return ["FP32", "INT8"]

    def break_engine(problem):
        if problem == "not installed":
            monkeypatch.setitem(sys.modules, "openvino", None)
        if problem == "no bfloat16":
            monkeypatch.setattr(openvino.Core, "get_property", lacks_bfloat16)

    return break_engine


PROBLEMS = {
    "cuda": ({"device": "cuda"}, ValueError, NOT_CUDA),
    "device of torch": (
        {"device": torch.device("cuda", 1)},
        ValueError,
        "must be 'auto' or 'cpu'.*cuda",
    ),
    "float16": ({"precision": "float16"}, ValueError, NOT_FLOAT16),
    "no bfloat16": ({"precision": "bfloat16"}, ValueError, NO_BFLOAT16),
    "unknown": (
        {"engine": "tvm"},
        ValueError,
        r"^engine must be 'torch' or 'openvino'; got 'tvm'\.$",
    ),
    "not installed": ({}, ModuleNotFoundError, NOT_INSTALLED),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("method", ["fit", "transform", "transform_maps", "precompute"])
def test_what_the_engine_cannot_do_is_refused(pictures, break_engine, problem, method):
    """Already `fit` does so, before a network is loaded, and says what to do."""
    params, error, message = PROBLEMS[problem]
    extractor = make(cache="memory", **params)
    break_engine(problem)
    with pytest.raises(error, match=message):
        getattr(extractor, method)(pictures[:2])


@pytest.mark.parametrize("device", ["auto", "cpu", torch.device("cpu")], ids=str)
def test_auto_is_the_processor(pictures, monkeypatch, device):
    """Whatever devices torch finds."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    expected = make(engine="torch", device="cpu").transform(pictures[:2])
    assert_near(make(device=device).transform(pictures[:2]), expected)


def by_svd(_net, _batch, maps):
    return torch.linalg.svd(maps)[1]


def by_brightness(_net, batch, maps):
    return 2 * maps if batch.mean() > 0.7 else maps


def by_darkness(_net, batch, maps):
    return 2 * maps if batch.mean() < 0.3 else maps


def by_chance(_net, _batch, maps):
    return nn.functional.dropout(maps, training=True)


CANNOT = r"^engine='openvino' is not possible for Calls, which {}: use 'torch'\.$"


DIFFERS = "gives other values there than in torch"


@pytest.mark.parametrize(
    ("function", "method", "problem"),
    [
        (by_svd, "transform", r"cannot be converted \(.*linalg_svd.*\)"),
        (by_brightness, "transform", DIFFERS),
        (by_darkness, "transform_maps", DIFFERS),
        (by_chance, "transform_maps", DIFFERS),
    ],
)
def test_a_network_that_cannot_be_converted_is_refused(pictures, function, method, problem):
    """The error names network and engine and the way out; `fit` does not try."""
    layer = "penultimate" if function is by_svd else "end"
    extractor = make(seeded(lambda: Calls(function)), layer).fit(pictures)
    with pytest.raises(ValueError, match=CANNOT.format(problem)):
        getattr(extractor, method)(pictures[:2])


def test_the_root_logger_stays_as_it_was(pictures):
    """OpenVINO itself would leave it silenced, with a filter and a handler more."""
    root = logging.getLogger()
    before = root.level, list(root.filters), list(root.handlers)
    with pytest.raises(ValueError, match="cannot be converted"):
        make(seeded(lambda: Calls(by_svd)), "penultimate").transform(pictures[:2])
    assert (root.level, root.filters, root.handlers) == before


def test_what_comes_after_the_layer_need_not_be_converted(pictures):
    """Only the part of the network that is read is."""
    assert_rows_of_torch(make(seeded(lambda: Calls(by_svd)), "conv"), pictures[:3])


# How often ----------------------------------------------------------------------------------------


def test_a_network_is_converted_once(pictures, conversions):
    """However many extractors of a process read the same of it."""
    extractor = make_named(batch_size=4)
    for other in (extractor, extractor, clone(extractor), make_named(batch_size=4)):
        other.transform(pictures[:5])
        other.transform(pictures[:1])
        other.set_params(norm="l1", num_workers=1).transform(pictures[:2])
    assert len(conversions) == 1


def test_a_network_is_converted_for_each_reading(pictures, conversions):
    """Other layers, poolings, sizes, batches, weights and precisions need another one each."""
    base = {"layer": "layer1", "weights": None, "batch_size": 4}
    others = [
        *({"layer": "conv1"}, {"pooling": "max"}, {"layer": ["layer1", "conv1"]}),
        *({"batch_size": 5}, {"image_size": 40}, {"random_state": 1}),
        *([{"precision": "bfloat16"}] if HAS_BFLOAT16 else []),
    ]
    for number, other in enumerate([{}, *others], start=1):
        extractor = make_named(**base | other)
        rows = extractor.transform(pictures[:5])
        assert len(conversions) == number
        if "precision" not in other:
            assert_near(rows, by_torch(extractor).transform(pictures[:5]))


def test_maps_and_rows_are_converted_apart(pictures, conversions):
    """Reading one does not give the other, nor the maps of another layer."""
    for number, layer in enumerate(("bn1", "relu"), start=1):  # of one shape
        extractor = make_named(layer, pooling="flatten", norm=None)
        maps = extractor.transform_maps(pictures[:2])
        rows = extractor.transform(pictures[:2])
        assert len(conversions) == 2 * number
        assert_near(maps.reshape(2, -1), rows)
        assert_near(maps, by_torch(extractor).transform_maps(pictures[:2]))


def test_only_the_last_conversions_are_kept(pictures, conversions, monkeypatch):
    """Each has a copy of the weights: what has not been used for long is let go."""
    monkeypatch.setattr(engine, "_KEPT", 2)

    def count(layer):
        conversions.clear()
        make_named(layer).transform(pictures[:2])
        return len(conversions)

    layers = ["conv1", "bn1", "conv1", "relu", "conv1", "bn1", "relu"]
    assert [count(layer) for layer in layers] == [1, 1, 0, 1, 0, 1, 1]


def test_a_module_of_ones_own_is_converted_once(pictures, conversions):
    """As long as its weights stay as they are."""
    net = make_net()
    extractor = make(net)
    for other in (extractor, extractor, clone(extractor)):
        other.transform(pictures[:5])
    assert len(conversions) == 1


def test_a_module_of_ones_own_may_change(pictures):
    """The rows are of the weights that it has at the time, and of the modules."""
    net = make_net()
    extractor = make(net)
    changes = [
        lambda: net[0].weight.detach().mul_(1.5),
        lambda: net[0].weight.data.mul_(1.5),
        lambda: net[1].running_mean.add_(0.1),
        lambda: setattr(net[0].bias, "data", net[0].bias.data - 0.1),
        lambda: net.__setitem__(2, nn.Tanh()),
    ]
    extractor.transform(pictures[:3])
    for change in changes:
        change()
        assert_rows_of_torch(clone(extractor), pictures[:3])


def test_it_says_that_it_converts_only_if_asked(pictures, forget, capfd):
    """With verbose=1 once for each conversion; with verbose=0 nothing is printed at all."""
    for verbose, expected in ((0, 0), (1, 1)):
        forget()
        for _ in range(2):
            make_named(verbose=verbose).transform(pictures[:2])
        out, err = capfd.readouterr()
        assert out.count(f"resnet10_slim: {CONVERTS}\n") == expected
        if not verbose:
            assert (out, err) == ("", "")


@pytest.mark.parametrize("engine_name", ["openvino", "torch"])
@pytest.mark.parametrize(
    "make_backbone",
    [
        pytest.param(make_net, id="with norms"),
        pytest.param(make_vit, id="without"),
    ],
)
def test_no_copy_of_a_module_stays_behind(pictures, engine_name, make_backbone):
    """Nothing that runs a network keeps it, or its copies, alive."""
    layer = "5" if make_backbone is make_net else "encoder.ln"
    extractor = make(make_backbone(), layer, engine=engine_name)

    extractor.backbone.__class__ = type("Ours", (type(extractor.backbone),), {})
    for _ in range(3):
        extractor.transform(pictures[:2])
    gc.collect()
    alive = [thing for thing in gc.get_objects() if type(thing) is type(extractor.backbone)]
    assert len(alive) == 1


def test_threads_share_a_conversion(pictures, conversions):
    """Two that start at once get their own rows, from one converted network."""
    extractor = make_named(batch_size=2)
    parts = np.array_split(pictures, 2)
    expected = [by_torch(extractor).transform(part) for part in parts]
    start = threading.Barrier(2)

    def work(part):
        start.wait(20)
        return [extractor.transform(part) for _ in range(5)]

    with ThreadPoolExecutor(2) as threads:
        for repeated, rows in zip(threads.map(work, parts), expected, strict=True):
            for found in repeated:
                assert_near(found, rows)
    assert len(conversions) == 1


def test_a_grid_search_runs_in_processes(pictures):
    """joblib's workers convert for themselves, and the scores are those of torch."""
    labels = ["dark", "light"] * (len(pictures) // 2)
    pipeline = make_pipeline(make_named(num_workers=0), LogisticRegression())
    grid = {"logisticregression__C": [0.01, 10.0]}
    search = GridSearchCV(pipeline, grid, cv=2, n_jobs=2).fit(pictures, labels)
    expected = GridSearchCV(
        pipeline.set_params(deepfeatureextractor__engine="torch"), grid, cv=2
    ).fit(pictures, labels)
    assert_allclose(search.cv_results_["mean_test_score"], expected.cv_results_["mean_test_score"])
    assert search.best_score_ > 0.8


# The cache ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [("torch", "openvino"), ("openvino", "torch")])
def test_engines_share_rows_in_float32(pictures, conversions, count_images, first, second):
    """What one has computed is there for the other, to the bit."""
    extractor = make_named(cache=FeatureCache(), engine=first)
    rows = extractor.transform(pictures)
    before, images = len(conversions), count_images(ResNet)
    assert_array_equal(extractor.set_params(engine=second).transform(pictures), rows)
    assert (len(conversions), images) == (before, [])


@pytest.mark.skipif(not HAS_BFLOAT16, reason="this processor has no bfloat16")
@pytest.mark.parametrize(("first", "second"), [("torch", "openvino"), ("openvino", "torch")])
def test_engines_do_not_share_rows_in_bfloat16(pictures, first, second):
    """There they differ by more than rounding: each has the rows that it has without a cache."""
    params = {"precision": "bfloat16", "cache": FeatureCache(), "batch_size": 16}
    rows = make_named(engine=first, **params).transform(pictures)
    found = make_named(engine=second, **params).transform(pictures)
    assert np.abs(found - rows).max() > 1e-5
    again = make_named(engine=first, **params).transform(pictures)
    assert_array_equal(again, rows)
    assert_near(
        make_named(engine="torch", precision="float32", cache=params["cache"]).transform(pictures),
        make_named(engine="torch").transform(pictures),
    )


# A folder of converted networks -------------------------------------------------------------------


def count_kept(folder):
    """Count the converted networks in a folder, in which there is nothing else."""
    paths = list(folder.iterdir())
    assert all(path.is_file() for path in paths)
    networks = {path.stem for path in paths}
    assert {f"{name}.xml" for name in networks} <= {path.name for path in paths}
    return len(networks)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Name a folder, which is not there yet, in which converted networks are kept."""
    monkeypatch.setenv("DEEPFEAT_OPENVINO_DIR", str(tmp_path / "new" / "converted"))
    return tmp_path / "new" / "converted"


CLIENT = """
import sys
import numpy as np
import torch
from torchvision import transforms
from deepfeat import DeepFeatureExtractor

torch.set_num_threads(1)
pictures, module, out = sys.argv[1:]
X = np.load(pictures)
fast = {"cache": None, "engine": "openvino", "verbose": 1, "num_workers": 0}
named = DeepFeatureExtractor("resnet10_slim", "layer1", image_size=32, **fast)
to_8_pixels = transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()])
net = torch.load(module, weights_only=False)
own = DeepFeatureExtractor(net, "5", preprocessing=to_8_pixels, **fast)
np.savez(out, named.transform(X), own.transform(X))
print("done")
"""


def test_other_processes_do_not_convert_again(pictures, folder, forget, tmp_path):
    """They find networks by name and of one's own in the folder; the rows are equal to the bit."""
    net = make_net()
    expected = [make_named().transform(pictures), make(net).transform(pictures)]
    assert count_kept(folder) == 2
    files = [str(tmp_path / name) for name in ("X.npy", "net.pt", "rows.npz")]
    np.save(files[0], pictures)
    torch.save(net, files[1])
    command = [sys.executable, "-c", textwrap.dedent(CLIENT), *files]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, env={**os.environ}, text=True
    )
    assert done.stdout.splitlines() == ["done"]  # not "converting ..."
    for found, ours in zip(np.load(files[2]).values(), expected, strict=True):
        assert_array_equal(found, ours)
    assert count_kept(folder) == 2


def test_what_is_converted_in_this_process_is_not_read_from_the_folder(
    pictures, folder, conversions
):
    """It is there for others; and without the variable nothing is written."""
    extractor = make_named()
    rows = extractor.transform(pictures[:2])
    for path in folder.iterdir():
        path.unlink()
    assert_array_equal(extractor.transform(pictures[:2]), rows)
    assert list(folder.iterdir()) == []
    assert len(conversions) == 1


def test_each_reading_has_a_file(pictures, folder, conversions, forget):
    """Other weights, layers and sizes are kept apart; both precisions are made of one file."""
    readings = [
        *({"random_state": 0}, {"random_state": 1}, {"layer": "conv1"}, {"image_size": 40}),
        *({"batch_size": 3}, {"resize": "squash"}),
    ]
    readings = [{"weights": None} | reading for reading in readings]
    for _ in range(2):
        forget()
        for reading in readings:
            extractor = make_named(**reading)
            assert_near(
                extractor.transform(pictures[:4]), by_torch(extractor).transform(pictures[:4])
            )
    assert len(conversions) == len(readings) == count_kept(folder)
    if HAS_BFLOAT16:
        make_named(**readings[0], precision="bfloat16").transform(pictures[:4])
        assert len(conversions) == len(readings)


def test_a_module_that_has_changed_has_another_file(pictures, folder, conversions, forget):
    """And if it changes back, its file is there."""
    net = make_net()
    for count, factor in ((1, 1), (2, 2), (2, 0.5), (2, 2)):
        forget()
        net[0].weight.detach().mul_(factor)
        assert_rows_of_torch(make(net), pictures[:3])
        assert len(conversions) == count_kept(folder) == count


def spoil_text(xml):
    xml.write_bytes(xml.read_bytes()[:1000])


def spoil_weights(xml):
    weights = xml.with_suffix(".bin")
    weights.write_bytes(weights.read_bytes()[:-1])


def flip_bits(xml):
    weights = xml.with_suffix(".bin")
    content = bytearray(weights.read_bytes())
    middle = slice(len(content) // 2, len(content) // 2 + 400)  # of the weights of a convolution
    content[middle] = bytes(byte ^ 0x08 for byte in content[middle])
    weights.write_bytes(content)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(spoil_text, id="half of it"),
        pytest.param(lambda xml: xml.write_bytes(b""), id="empty"),
        pytest.param(lambda xml: xml.with_suffix(".bin").unlink(), id="without weights"),
        pytest.param(spoil_weights, id="a byte short"),
        pytest.param(flip_bits, id="bits flipped"),
        pytest.param(lambda xml: xml.with_suffix(".digest").unlink(), id="without a digest"),
        pytest.param(
            lambda xml: xml.write_bytes(xml.read_bytes().replace(b"deepfeat", b"sheepfat")),
            id="of another program",
        ),
    ],
)
def test_a_spoilt_file_is_replaced(pictures, folder, conversions, forget, spoil):
    """With a warning that names it; the next process finds a good one."""
    extractor = make_named()
    expected = extractor.transform(pictures[:3])
    (xml,) = folder.glob("*.xml")
    spoil(xml)
    forget()
    with pytest.warns(UserWarning, match=f"^{re.escape(str(xml))} cannot be read, and is replaced"):
        assert_array_equal(extractor.transform(pictures[:3]), expected)
    assert len(conversions) == 2
    forget()
    assert_array_equal(extractor.transform(pictures[:3]), expected)
    assert len(conversions) == 2
    assert count_kept(folder) == 1


@contextlib.contextmanager
def limited_file_size(limit):
    """Let no file of this process grow beyond a number of bytes, as if the disk were full."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing_behind(pictures, folder, conversions, forget):
    """A warning says so, the rows are right, and no part of a file is left."""
    extractor = make_named("layer2")  # of 400 kB
    expected = by_torch(extractor).transform(pictures[:3])
    with (
        pytest.warns(UserWarning, match=f"^The converted network was not saved as {folder}"),
        limited_file_size(200_000),
    ):
        assert_near(extractor.transform(pictures[:3]), expected)
    assert list(folder.iterdir()) == []
    forget()
    assert_near(extractor.transform(pictures[:3]), expected)
    assert (count_kept(folder), len(conversions)) == (1, 2)


def test_what_cannot_be_read_again_is_not_lost(pictures, folder, monkeypatch, conversions):
    """The network that was just converted is there, whatever the disk made of it."""

    def save_badly(_converted, path, **_options):
        path.write_text("garbage")
        path.with_suffix(".bin").write_text("garbage")

    monkeypatch.setattr(openvino, "save_model", save_badly)
    extractor = make_named()
    with pytest.warns(UserWarning, match="cannot be read"):
        rows = extractor.transform(pictures[:3])
    assert_near(rows, by_torch(extractor).transform(pictures[:3]))


def test_a_folder_that_cannot_be_made_costs_a_warning(pictures, tmp_path, monkeypatch, forget):
    """The rows are right all the same."""
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("DEEPFEAT_OPENVINO_DIR", str(tmp_path / "file"))
    extractor = make_named()
    with pytest.warns(UserWarning, match=r"^The converted network was not saved as .*file"):
        rows = extractor.transform(pictures[:3])
    assert_near(rows, by_torch(extractor).transform(pictures[:3]))
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.parametrize("error", [RuntimeError("planted"), OSError("planted"), KeyboardInterrupt])
def test_a_file_that_is_not_finished_is_not_there(pictures, folder, monkeypatch, forget, error):
    """Whatever ends the saving of a network, nothing stays that another process might read."""

    def save_part(converted, path, **options):
        path.write_text("part of it")
        raise error

    monkeypatch.setattr(openvino, "save_model", save_part)
    is_told = error is not KeyboardInterrupt
    with (
        pytest.warns(UserWarning, match="planted") if is_told else pytest.raises(error),
    ):
        make_named().transform(pictures[:2])
    assert list(folder.iterdir()) == []


def test_the_folder_of_home_is_found(pictures, tmp_path, monkeypatch, conversions):
    """As in a shell."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("DEEPFEAT_OPENVINO_DIR", "~/converted")
    make_named().transform(pictures[:2])
    assert count_kept(tmp_path / "converted") == 1


# Fine-tuned networks ------------------------------------------------------------------------------


@pytest.fixture
def classifier(pictures):
    """A classifier that was trained for a moment, and predicts with OpenVINO."""
    return FineTuneClassifier(
        make_net(),
        preprocessing=TO_8_PIXELS,
        unfreeze="all",
        max_epochs=1,
        batch_size=6,
        device="cpu",
        random_state=0,
        num_workers=0,
        engine="openvino",
    ).fit(pictures, LABELS)


LABELS = ["dark", "light"] * 8


def predict_by_torch(classifier, X):
    try:
        return classifier.set_params(engine="torch").predict_proba(X)
    finally:
        classifier.set_params(engine="openvino")


def assert_probabilities_of_torch(classifier, X):
    expected = predict_by_torch(classifier, X)
    assert_allclose(classifier.predict_proba(X), expected, rtol=0, atol=1e-5)
    assert np.ptp(expected[:, 0]) > 1e-4


def test_a_classifier_predicts_as_with_torch(classifier, pictures, conversions):
    """Logits, probabilities and classes, of which the network is converted once."""
    X = pictures[:9]
    assert_probabilities_of_torch(classifier, X)
    logits, classes = classifier.decision_function(X), classifier.predict(X)
    assert len(conversions) == 1
    classifier.set_params(engine="torch")
    assert_allclose(logits, classifier.decision_function(X), rtol=0, atol=1e-5)
    assert_array_equal(classes, classifier.predict(X))


def double(net):
    with torch.no_grad():
        net[0].weight.mul_(2)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(double, id="without gradients"),
        pytest.param(lambda net: net[0].weight.detach()[1:].mul_(2), id="detached"),
        pytest.param(lambda net: net[0].weight.data.mul_(2), id="data"),
        pytest.param(
            lambda net: setattr(net[0].weight, "data", 2 * net[0].weight.data), id="new data"
        ),
        pytest.param(
            lambda net: setattr(net[0], "weight", nn.Parameter(2 * net[0].weight)), id="weight"
        ),
        pytest.param(lambda net: net[1].running_mean.add_(0.02), id="buffer"),
        pytest.param(
            lambda net: net.load_state_dict({k: 2 * v for k, v in net.state_dict().items()}),
            id="state dict",
        ),
        pytest.param(lambda net: net.__setitem__(2, nn.Tanh()), id="module"),
    ],
)
def test_a_classifier_predicts_with_its_present_weights(classifier, pictures, change):
    """However they were changed since the last prediction."""
    before = classifier.predict_proba(pictures)
    change(classifier.module_)
    assert np.abs(predict_by_torch(classifier, pictures) - before).max() > 1e-3
    assert_probabilities_of_torch(classifier, pictures)


def test_a_classifier_that_is_trained_again_predicts_anew(classifier, pictures):
    """By `partial_fit`, which trains the same module, and by `fit`, which trains another."""
    assert_probabilities_of_torch(classifier, pictures)
    classifier.set_params(max_epochs=3).partial_fit(pictures, LABELS)
    assert_probabilities_of_torch(classifier, pictures)
    old = weakref.ref(classifier.module_)
    classifier.fit(pictures, LABELS[::-1])
    assert_probabilities_of_torch(classifier, pictures)
    gc.collect()
    assert old() is None


def test_a_conversion_leaves_the_trained_network_as_it_was(classifier, pictures):
    """Weights, modes, hooks and the modules themselves are those of before."""

    def describe(net):
        return {path: (id(part), dict(vars(part))) for path, part in net.named_modules()}

    state = copy.deepcopy(classifier.module_.state_dict())
    before = describe(classifier.module_)
    classifier.predict(pictures[:2])
    assert describe(classifier.module_) == before
    torch.testing.assert_close(classifier.module_.state_dict(), state, rtol=0, atol=0)


def test_a_classifier_has_a_file_for_each_state_of_its_weights(classifier, pictures, folder):
    """In which it has predicted."""
    for count in (1, 2):
        for _ in range(2):
            assert_probabilities_of_torch(classifier, pictures)
        assert len(list(folder.glob("*.xml"))) == count
        double(classifier.module_)


@pytest.mark.parametrize("problem", ["float16", "not installed"])
def test_a_classifier_is_refused_before_it_is_trained(pictures, break_engine, problem):
    """Training may take hours, and would be in vain."""
    params, error, message = PROBLEMS[problem]
    classifier = FineTuneClassifier(
        make_net(), preprocessing=TO_8_PIXELS, max_epochs=1, engine="openvino", **params
    )
    break_engine(problem)
    with pytest.raises(error, match=message):
        classifier.fit(pictures, LABELS)


@pytest.mark.parametrize("problem", ["cuda", "float16", "no bfloat16", "unknown", "not installed"])
def test_a_classifier_says_what_the_engine_cannot_do(classifier, pictures, break_engine, problem):
    """As an extractor does."""
    params, error, message = PROBLEMS[problem]
    classifier.set_params(**params)
    break_engine(problem)
    with pytest.raises(error, match=message):
        classifier.predict(pictures)
