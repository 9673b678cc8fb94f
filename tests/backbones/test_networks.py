"""Tests of named networks: random weights, state dicts that fit or not, and sharing."""

import copy
import functools
import gc
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision import models

from deepfeat._backbones import find
from deepfeat._backbones import networks as building
from deepfeat._backbones.find import find_backbone

exactly = functools.partial(assert_close, rtol=0, atol=0)
CPU = torch.device("cpu")
NAME = "squeezenet1_1"


def forbidden(*_args, **_kwargs):
    raise AssertionError("called")


# Random weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [NAME, "vit_b_32", "swin_t", "regnet_y_400mf", "shufflenet_v2_x0_5"]
)
def test_random_weights_are_torchvisions_of_that_seed(
    name,
    untouched_generators,
    load,
    random_state,
):
    """They are those that torchvision draws after `manual_seed`, and no global generator moves."""
    with untouched_generators():
        module = load(name, None, seed=7)
    exactly(module.state_dict(), random_state(name, 7))


def test_random_weights_depend_on_the_seed_alone(load):
    """Another seed gives other weights, and the same one the same, whatever was drawn before."""
    first = copy.deepcopy(load(NAME, None, seed=1).state_dict())
    torch.rand(5)
    building._load_cached.cache_clear()
    exactly(load(NAME, None, seed=1).state_dict(), first)
    with pytest.raises(AssertionError):
        exactly(load(NAME, None, seed=2).state_dict(), first)


def test_random_weights_are_the_same_in_another_process(load):
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


def test_random_weights_do_not_depend_on_other_threads(random_state, load):
    """A thread that draws random numbers meanwhile changes no weight, nor gets numbers twice."""
    expected = random_state(NAME, 5)
    stop = threading.Event()
    drawn: list[float] = []

    def draw():
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


def test_the_seed_of_other_devices_is_left_alone(monkeypatch, load):
    """No generator of a CUDA device is seeded, not even one that is used only later."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", forbidden)
    monkeypatch.setattr(torch, "manual_seed", forbidden)
    load(NAME, None, seed=6)


@pytest.mark.gpu
def test_random_weights_on_cuda_are_those_of_the_cpu(
    untouched_generators,
    random_state,
):
    """A seed gives the same weights on every device, and leaves its generator alone."""
    with untouched_generators():
        module = find_backbone(NAME, None, seed=6).load(torch.device("cuda", 0))
    assert {weight.device.type for weight in module.parameters()} == {"cuda"}
    state = {key: value.cpu() for key, value in module.state_dict().items()}
    exactly(state, random_state(NAME, 6))


# State dicts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *(NAME, "resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5"),
        *("regnet_x_400mf", "googlenet"),
    ],
)
def test_a_file_decides_on_the_number_of_classes(name, tmp_path, random_state, pictures):
    """Weights for the 365 places of Places365, say, give a network and a skeleton with 365."""
    options = {"init_weights": False} if name == "googlenet" else {}
    state = random_state(name, num_classes=365, **options)
    torch.save(state, tmp_path / "places.pth")
    backbone = find_backbone(name, tmp_path / "places.pth")
    module = backbone.load(CPU)
    exactly(module.state_dict(), state)
    batch = backbone.preprocessing(pictures["tiny"])[None]
    assert module(batch).shape == (1, 365)
    assert copy.deepcopy(backbone.skeleton).eval()(batch.to("meta")).shape == (1, 365)
    shapes = {key: value.shape for key, value in backbone.skeleton.state_dict().items()}
    assert shapes == {key: value.shape for key, value in state.items()}
    assert {value.device.type for value in backbone.skeleton.state_dict().values()} == {"meta"}


def test_batch_norms_may_lack_their_count(tmp_path, random_state, load):
    """Files from before BatchNorm counted its batches are complete without the count."""
    state = random_state("resnet18")
    old = {key: value for key, value in state.items() if "num_batches" not in key}
    torch.save(old, tmp_path / "old.pth")
    exactly(load("resnet18", tmp_path / "old.pth").state_dict(), state)


def test_an_error_names_the_keys_that_differ(state, tmp_path, random_state):
    """Missing and unexpected keys and other shapes are listed, some of each, and counted."""
    state = dict(state)
    del state["features.0.weight"]
    state["extra.weight"] = torch.zeros(1)
    state["features.0.bias"] = torch.zeros(5)
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match="does not fit") as caught:
        find_backbone(NAME, tmp_path / "wrong.pth")
    assert str(caught.value) == (
        "The weights file does not fit squeezenet1_1: 1 missing: features.0.weight; 1 "
        "unexpected: extra.weight; 1 of another shape: features.0.bias of shape (5,), not (64,)."
    )
    torch.save(random_state("alexnet", num_classes=2), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"48 missing: features\.3\.squeeze\.weight, .*, \.\.\.; "):
        find_backbone(NAME, tmp_path / "other.pth")


def test_a_file_without_the_head_is_refused(state, tmp_path):
    """A network is loaded whole, with its last layer, or not at all."""
    state = {key: value for key, value in state.items() if not key.startswith("classifier")}
    torch.save(state, tmp_path / "headless.pth")
    with pytest.raises(ValueError, match=r"2 missing: classifier\.1\.weight, classifier\.1\.bias"):
        find_backbone(NAME, tmp_path / "headless.pth")


# Sharing ----------------------------------------------------------------------------------------


def test_equal_backbones_share_one_network(state, tmp_path, load):
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


def test_networks_built_for_a_size_are_shared_for_that_size(load):
    """A vision transformer for other images is another network."""
    assert load("vit_b_32", None) is load("vit_b_32", None, resize="pad")
    assert load("vit_b_32", None, image_size=64).image_size == 64
    assert load("vit_b_32", None, image_size=64) is not load("vit_b_32", None)


def test_few_networks_are_held(load, random_state):
    """The network that was not used for longest is let go, and loaded anew when asked for."""
    nets = [weakref.ref(load(NAME, None, seed=seed)) for seed in range(4)]
    assert load(NAME, None, seed=0) is nets[0]()
    load(NAME, None, seed=4)
    gc.collect()
    assert [net() is None for net in nets] == [False, True, False, False]
    exactly(load(NAME, None, seed=1).state_dict(), random_state(NAME, 1))


def test_threads_that_ask_at_once_share_one_network(monkeypatch, run_in_threads):
    """A network is loaded once, also when many threads ask for it before it is there."""
    built: list[str] = []
    build = models.get_model

    def count(name, **options):
        built.append(name)
        time.sleep(0.05)
        return build(name, **options)

    backbone = find_backbone(NAME, None, seed=8)
    monkeypatch.setattr(models, "get_model", count)
    start = threading.Barrier(6)
    nets: list[nn.Module] = []

    def work():
        start.wait()
        nets.append(backbone.load(CPU))

    run_in_threads(*[work] * 6)
    assert built == [NAME]
    assert len(nets) == 6
    assert len(set(nets)) == 1


def test_threads_may_look_for_backbones_at_once(run_in_threads):
    """Skeletons built at the same time, beside a network of the user, do not mix."""
    names = ["resnet18", "squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small"]
    expected = {name: list(find_backbone(name).skeleton.state_dict()) for name in names}
    start = threading.Barrier(5)
    faults: list[str] = []

    def find(name):
        start.wait()
        for _ in range(5):
            building.make_skeleton.cache_clear()
            try:
                skeleton = find_backbone(name).skeleton
                assert list(skeleton.state_dict()) == expected[name]
                assert {tensor.device.type for tensor in skeleton.parameters()} == {"meta"}
            except Exception as error:
                faults.append(f"{name}: {error!r}")

    def build():
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
