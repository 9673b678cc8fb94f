"""Preparation for inference: faster, with the outputs of the network, which does not change."""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.testing import assert_close
from torchvision import models
from torchvision.ops import FrozenBatchNorm2d

from deepfeat._layers.index import LayerIndex
from deepfeat._layers.inference import InferenceNetwork, plan_inference
from deepfeat._layers.reading import ForwardPass

exactly = functools.partial(assert_close, rtol=0, atol=0)


def prepare_for_inference(net: nn.Module, *args: Any) -> InferenceNetwork:
    return plan_inference(net, *args).apply(net)


in_bfloat16 = functools.partial(torch.autocast, "cpu", torch.bfloat16)

# Norms that follow a convolution, of all norms.
OF_TORCHVISION = {
    "densenet121": (59, 121),
    "efficientnet_b0": (49, 49),
    "googlenet": (57, 59),
    "mobilenet_v3_small": (34, 34),
    "resnet18": (20, 20),
    "shufflenet_v2_x0_5": (56, 56),
    "squeezenet1_1": (0, 0),
    "vgg11_bn": (8, 8),
}
OF_TIMM = {
    "test_byobnet": (14, 14),
    "test_efficientnet": (13, 13),
    "test_maxvit": (9, 13),
    "test_resnet": (15, 15),
    "test_vit": (0, 0),
}


def randomize_statistics(net: nn.Module) -> nn.Module:
    """Give norms statistics as if they had seen images; those of new ones hide what is wrong."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        for name in ("running_mean", "running_var", "weight", "bias"):
            tensor = getattr(module, name, None)
            if hasattr(module, "running_var") and isinstance(tensor, Tensor):
                low, high = (-0.3, 0.3) if name in ("running_mean", "bias") else (0.5, 1.5)
                with torch.no_grad():
                    tensor.uniform_(low, high, generator=generator)
    return net.eval()


def is_norm(module: nn.Module) -> bool:
    return isinstance(getattr(module, "running_var", None), Tensor)


def find_folded(prepared: InferenceNetwork) -> list[str]:
    """Return the paths of convolutions that a norm has become part of."""
    return [path for path, part in prepared.originals.items() if isinstance(part, _ConvNd)]


def run(module: nn.Module, batch: Tensor) -> Any:
    with torch.inference_mode():
        return module(batch)


def assert_near(found: Tensor, expected: Tensor, name: str = "") -> None:
    """Raise unless two outputs are equal to 1e-5 of the largest value."""
    scale = float(expected.abs().max())
    assert_close(found, expected, rtol=0, atol=1e-5 * scale, msg=lambda text: f"{name}: {text}")


index_once = functools.lru_cache(maxsize=1)(LayerIndex)


def read_modules(
    net: nn.Module, prepared: InferenceNetwork, paths: Sequence[str], batch: Tensor
) -> dict[str, Tensor]:
    """Read the first output of modules, by path, in one pass of a prepared network."""
    index = index_once(net, tuple(batch.shape[1:]))
    layers = {path: (index.resolve(path), lambda output: output) for path in paths}
    forward = ForwardPass(prepared.module, layers, originals=prepared.originals)
    with torch.inference_mode():
        return forward(batch)


@pytest.fixture
def assert_same_values(
    capture_by_hooks: Callable[..., dict[str, Tensor]],
) -> Callable[..., None]:
    """Raise unless all modules of a prepared network return what those of the network do."""

    def assert_same_values(net: nn.Module, prepared: InferenceNetwork, batch: Tensor) -> None:
        called: dict[str, bool] = {}

        def note(path: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
            called.setdefault(path, isinstance(output, Tensor) and len(output) == len(batch))

        watched = copy.deepcopy(net)
        for path, module in watched.named_modules():
            module.register_forward_hook(functools.partial(note, path))
        run(watched, batch)
        listed = index_once(net, tuple(batch.shape[1:])).calls
        paths = [path for path, is_read in called.items() if is_read and path in listed]
        expected = capture_by_hooks(net, paths, batch)
        found = read_modules(net, prepared, paths, batch)
        assert len(paths) >= 2
        for path in paths:
            assert_near(found[path], expected[path], path)
        outputs = zip(as_tuple(run(prepared.module, batch)), as_tuple(run(net, batch)), strict=True)
        for output, expected_output in outputs:
            assert_near(output, expected_output, "output")

    return assert_same_values


def as_tuple(output: Any) -> tuple[Any, ...]:
    return tuple(output) if isinstance(output, (tuple, list)) else (output,)


# Norms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OF_TORCHVISION)
def test_norms_after_convolutions_are_folded_into_them(
    name: str,
    build: Callable[..., nn.Module],
    images: Callable[..., Tensor],
    assert_same_values: Callable[..., None],
) -> None:
    """All of them are, and every module returns what it did, raw convolutions as well."""
    net = randomize_statistics(build(name))
    prepared = prepare_for_inference(net, (3, 32, 32))
    norms = [module for module in net.modules() if is_norm(module)]
    assert (len(find_folded(prepared)), len(norms)) == OF_TORCHVISION[name]
    assert_same_values(net, prepared, images(3))


@pytest.mark.parametrize("name", OF_TIMM)
def test_norms_with_an_activation_are_folded(
    name: str,
    build_timm: Callable[..., nn.Module],
    images: Callable[..., Tensor],
    assert_same_values: Callable[..., None],
) -> None:
    """timm's norms apply an activation, which stays, and its ViTs have nothing to fold."""
    side = 160  # of timm's test networks
    net = randomize_statistics(build_timm(name))
    prepared = prepare_for_inference(net, (3, side, side))
    norms = [module for module in net.modules() if is_norm(module)]
    assert (len(find_folded(prepared)), len(norms)) == OF_TIMM[name]
    assert_same_values(net, prepared, images(2, side))


@pytest.mark.slow
def test_every_family_keeps_its_values(
    family: str,
    side: int,
    build: Callable[..., nn.Module],
    images: Callable[..., Tensor],
    assert_same_values: Callable[..., None],
) -> None:
    """Every module of every family of torchvision returns what it did."""
    net = randomize_statistics(build(family, side))
    prepared = prepare_for_inference(net, (3, side, side))
    assert bool(find_folded(prepared)) == any(is_norm(module) for module in net.modules())
    assert_same_values(net, prepared, images(2, side))


@pytest.mark.slow
def test_every_network_of_timm_keeps_its_values(
    name_in_timm: str,
    build_timm: Callable[..., nn.Module],
    images: Callable[..., Tensor],
    assert_same_values: Callable[..., None],
) -> None:
    """So does the smallest network of each module of timm, in which rounding does not add up."""
    net = randomize_statistics(build_timm(name_in_timm)).double()
    shape = tuple(net.default_cfg["input_size"])
    prepared = prepare_for_inference(net, shape)
    assert_same_values(net, prepared, images(1, shape[-1]).double())


PAIRS = {
    "1d": (nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)),
    "2d": (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)),
    "3d": (nn.Conv3d(3, 6, 3), nn.BatchNorm3d(6)),
    "without bias": (nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)),
    "grouped": (nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)),
    "strided": (nn.Conv2d(3, 6, 3, stride=2, padding=1, dilation=2), nn.BatchNorm2d(6)),
    "reflecting": (nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6)),
    "without weights": (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False)),
    "large eps": (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=0.5)),
    "frozen": (nn.Conv2d(3, 6, 3), FrozenBatchNorm2d(6)),
    "synchronized": (nn.Conv2d(3, 6, 3), nn.SyncBatchNorm(6)),
    "per image": (nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, track_running_stats=True)),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_every_kind_of_norm_is_folded(kind: str) -> None:
    """Of any dimension and with any options; a folded convolution replaces both."""
    net = randomize_statistics(nn.Sequential(*copy.deepcopy(PAIRS[kind])))
    axes = int(kind[0]) if kind[0].isdigit() else 2
    shape = (3, *(9,) * axes)
    batch = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    prepared = prepare_for_inference(net, shape)
    assert find_folded(prepared) == ["0"]
    assert not any(is_norm(module) for module in prepared.module.modules())
    assert_near(run(prepared.module, batch), run(net, batch))
    if kind in ("2d", "grouped"):
        fused = fuse_conv_bn_eval(*net)  # in float32
        assert_close(prepared.module[0].weight, fused.weight)
        assert_close(prepared.module[0].bias, fused.bias)


def test_weights_are_folded_in_float64() -> None:
    """A small variance and a large mean cost no more than the rounding of the result."""
    net = randomize_statistics(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)))
    net[1].running_var.fill_(1e-4)
    net[1].running_mean.mul_(1e3)
    fused = fuse_conv_bn_eval(*copy.deepcopy(net).double())
    folded = prepare_for_inference(net, (3, 8, 8)).module[0]
    exactly(folded.weight, fused.weight.float(), check_stride=False)
    exactly(folded.bias, fused.bias.float())


# What must not be folded --------------------------------------------------------------------------


class Net(nn.Module):
    """Modules, and a function that runs them on a batch."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **modules: nn.Module):
        super().__init__()
        self.function = function
        modules = {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4)} | modules
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, batch: Tensor) -> Any:
        return self.function(self, batch)


class Clamped(nn.BatchNorm2d):
    """A norm with a clamp, which dark and light images notice."""

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps).clamp(-0.5, 0.5)


class Centered(nn.BatchNorm2d):
    """Not quite a norm, though it has all that one has."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps - self.running_mean[:, None, None]


class Standardized(nn.Conv2d):
    """A convolution that standardizes its weights in each pass, as those of BiT do."""

    def forward(self, maps: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.flatten(1)[None], None, None, training=True)
        return F.conv2d(maps, weight.view_as(self.weight), self.bias)


def plainly(net: Any, batch: Tensor) -> Tensor:
    return net.norm(net.conv(batch))


def add(net: Any, batch: Tensor) -> Tensor:
    maps = net.conv(batch)
    return net.norm(maps) + maps


def return_both(net: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
    maps = net.conv(batch)
    return net.norm(maps), maps


def change_by(change: Callable[[Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    def function(net: Any, batch: Tensor) -> Tensor:
        maps = net.conv(batch)
        change(maps)
        return net.norm(maps)

    return function


def set_channel(maps: Tensor) -> None:
    maps[:, 0] = 1


class AlwaysTrained(nn.BatchNorm2d):
    """A norm that stays in train mode, and uses the statistics of the batch."""

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(True)


def make_hooked() -> nn.Module:
    net = Net(plainly)
    net.conv.register_forward_hook(lambda _module, _inputs, maps: maps + 1)
    return net


def make_hooked_norm() -> nn.Module:
    net = Net(plainly)
    net.norm.register_forward_hook(lambda _module, _inputs, maps: 2 * maps)
    return net


def make_pruned() -> nn.Module:
    net = Net(plainly).requires_grad_(False)  # whose product with the mask could not be copied
    prune.random_unstructured(net.conv, "weight", 0.5)
    return net


UNFOLDED: dict[str, Callable[[], nn.Module]] = {
    "convolution added": lambda: Net(add),
    "convolution returned": lambda: Net(return_both),
    "convolution called twice": lambda: Net(
        lambda net, batch: net.norm(net.conv(batch)) + net.other(net.conv(batch)),
        other=nn.BatchNorm2d(4),
    ),
    "convolution of two norms": lambda: Net(
        lambda net, batch: (lambda maps: net.norm(maps) + net.other(maps))(net.conv(batch)),
        other=nn.BatchNorm2d(4),
    ),
    "convolution called again without a norm": lambda: Net(
        lambda net, batch: net.norm(net.conv(batch)) + net.conv(2 * batch)
    ),
    "norm of two convolutions": lambda: Net(
        lambda net, batch: net.norm(net.conv(batch)) + net.norm(net.other(batch)),
        other=nn.Conv2d(3, 4, 3),
    ),
    "norm called twice": lambda: Net(lambda net, batch: net.norm(net.norm(net.conv(batch)))),
    "norm of both": lambda: Net(
        lambda net, batch: net.norm(net.conv(batch) + net.other(batch)), other=nn.Conv2d(3, 4, 3)
    ),
    "ReLU between": lambda: Net(lambda net, batch: net.norm(net.conv(batch).relu())),
    "view between": lambda: Net(lambda net, batch: net.norm(net.conv(batch).mT)),
    "reshaped between": lambda: Net(
        lambda net, batch: net.norm(net.conv(batch).flatten(2)), norm=nn.BatchNorm1d(4)
    ),
    "changed in place": lambda: Net(change_by(lambda maps: maps.add_(1))),
    "ReLU in place": lambda: Net(change_by(lambda maps: F.relu(maps, inplace=True))),
    "assigned in place": lambda: Net(change_by(set_channel)),
    "weight used elsewhere": lambda: Net(
        lambda net, batch: net.norm(net.conv(batch)) + net.conv.weight.sum()
    ),
    "weight of the norm used elsewhere": lambda: Net(
        lambda net, batch: net.norm(net.conv(batch)) + net.norm.weight.sum()
    ),
    "hook that changes the convolution": make_hooked,
    "hook that changes the norm": make_hooked_norm,
    "train mode": lambda: Net(plainly, norm=AlwaysTrained(4)),
    "no statistics": lambda: Net(plainly, norm=nn.BatchNorm2d(4, track_running_stats=False)),
    "groups": lambda: Net(plainly, norm=nn.GroupNorm(2, 4)),
    "not a norm": lambda: Net(plainly, norm=Centered(4)),
    "transposed": lambda: Net(plainly, conv=nn.ConvTranspose2d(3, 4, 3)),
    "linear": lambda: Net(
        lambda net, batch: net.norm(net.conv(batch.flatten(2)).mT),
        conv=nn.Linear(64, 4),
        norm=nn.BatchNorm1d(4),
    ),
    "standardized weights": lambda: Net(plainly, conv=Standardized(3, 4, 3)),
    "normed weights": lambda: Net(
        plainly, conv=parametrizations.weight_norm(nn.Conv2d(3, 4, 3), dim=None)
    ),
    "spectral weights": lambda: Net(
        plainly, conv=parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)).eval()
    ),
    "pruned weights": make_pruned,
    "under two names, of which one is called": lambda: (
        lambda norm: Net(lambda net, batch: net.again(net.conv(batch)), norm=norm, again=norm)
    )(nn.BatchNorm2d(4)),
}


@pytest.fixture
def extremes(images: Callable[..., Tensor]) -> Iterator[Tensor]:
    """Batches of which no two are alike: noise, dark and light, large and small."""
    noise = images(3, 8)
    return iter((noise, noise - 3, noise + 3, 100 * noise, noise / 100, noise[:1]))


def seed_weights(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = make()
    return randomize_statistics(net)


@pytest.mark.parametrize("reason", UNFOLDED)
def test_what_a_convolution_cannot_compute_is_not_folded(
    reason: str, extremes: Iterator[Tensor]
) -> None:
    """The outputs are those of the network, bit for bit."""
    net = seed_weights(UNFOLDED[reason])
    prepared = prepare_for_inference(net, (3, 8, 8))
    assert prepared.originals == {}
    for batch in extremes:
        exactly(run(prepared.module, batch), run(net, batch))


# Seen only when all is folded, which is then undone, or before anything is.
SEEN_LATE = {
    *("weight of the norm used elsewhere", "train mode"),
}


@pytest.mark.parametrize("reason", [reason for reason in UNFOLDED if reason not in SEEN_LATE])
def test_what_is_not_folded_does_not_keep_the_rest_from_it(
    reason: str, extremes: Iterator[Tensor]
) -> None:
    """A norm before it is folded, whatever becomes of this one."""
    net = seed_weights(
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), UNFOLDED[reason]())
    )
    prepared = prepare_for_inference(net, (3, 8, 8))
    assert find_folded(prepared) == ["0"]
    for batch in extremes:
        outputs = as_tuple(run(prepared.module, batch)), as_tuple(run(net, batch))
        for output, expected in zip(*outputs, strict=True):
            assert_near(output, expected)


def decide(net: Any, batch: Tensor) -> Tensor:
    maps = net.conv(batch)
    return net.norm(maps) if batch.mean() > 0 else maps


def decide_later(net: Any, batch: Tensor) -> Tensor:
    maps = net.conv(batch)
    normed = net.norm(maps)
    return normed if batch.mean() > 0 else normed + maps


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: Net(decide), id="which decides"),
        pytest.param(lambda: Net(decide_later), id="which decides later"),
        pytest.param(lambda: Net(plainly, norm=Clamped(4)), id="which clamps"),
    ],
)
def test_a_network_may_compute_something_else_for_other_images(
    make: Callable[[], nn.Module], extremes: Iterator[Tensor]
) -> None:
    """What is folded is right for every image, and not only for noise from 0 to 1."""
    net = seed_weights(make)
    prepared = prepare_for_inference(net, (3, 8, 8))
    for batch in extremes:
        assert_near(run(prepared.module, batch), run(net, batch))


WAYS = {
    "another name": lambda net, batch: net.again(net.conv(batch)),
    "weight used": lambda net, batch: net.norm(net.conv(batch)) + net.conv.weight.sum(),
    "bias used": lambda net, batch: net.norm(net.conv(batch)) + net.conv.bias.sum(),
}


@pytest.mark.parametrize("name", WAYS)
def test_a_head_of_zeros_does_not_hide_what_is_wrong_before_it(
    name: str,
    images: Callable[..., Tensor],
    assert_same_values: Callable[..., None],
) -> None:
    """New heads are zero in some networks, and let every comparison of outputs pass."""

    def forward(net: Any, batch: Tensor) -> Tensor:
        return net.head(net.relu(WAYS[name](net, batch)).mean((2, 3)))

    norm, head = nn.BatchNorm2d(4), nn.Linear(4, 2)
    nn.init.zeros_(head.weight)
    parts = {"norm": norm, "relu": nn.ReLU(), "head": head}
    if name == "another name":
        parts["again"] = norm
    net = seed_weights(lambda: Net(forward, **parts))
    assert_same_values(net, prepare_for_inference(net, (3, 8, 8)), images(2, 8))


class Fails(nn.Module):
    """A network that refuses every batch of one image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, batch: Tensor) -> Tensor:
        if len(batch) == 1:
            raise ZeroDivisionError("a single image")
        return self.norm(self.conv(batch))


def test_a_network_that_fails_on_the_trial_is_left_alone(images: Callable[..., Tensor]) -> None:
    """It raises its own error where the caller runs it, and works where it works."""
    net = randomize_statistics(Fails())
    for dtype in (torch.float32, torch.bfloat16):
        prepared = prepare_for_inference(net, (3, 8, 8), in_bfloat16, dtype)
        exactly(run(prepared.module, images(2, 8)), run(net, images(2, 8)))
        with pytest.raises(ZeroDivisionError, match="a single image"):
            prepared.module(images(1, 8))


class Wrapped(nn.Module):
    """A module that returns what a convolution returned."""

    def __init__(self, norm: nn.Module | None = None):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.norm = nn.Identity() if norm is None else norm
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, batch: Tensor) -> Tensor:
        return self.conv(self.norm(self.first(batch)))


class PreNorm(nn.Module):
    """A module that begins with a norm and ends with a convolution, as in Xception and DPN."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, batch: Tensor) -> Tensor:
        return self.conv(self.norm(batch).relu())


class Doubles(Wrapped):
    """And that changes what it is given, which can be done once."""

    def forward(self, batch: Tensor) -> Tensor:
        return super().forward(batch.mul_(2))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: [nn.Sequential(nn.Conv2d(3, 3, 3))], id="container"),
        pytest.param(lambda: [Wrapped()], id="module"),
        pytest.param(lambda: [nn.Conv2d(3, 3, 3), nn.Identity()], id="Identity"),
        pytest.param(lambda: [Wrapped(), nn.Sequential()], id="two"),
        pytest.param(lambda: [nn.Sequential(nn.Sequential(Wrapped()))], id="nested"),
        pytest.param(lambda: [Doubles()], id="change of its input"),
        pytest.param(
            lambda: [PreNorm(), PreNorm()],
            id="norm first",
        ),
        pytest.param(lambda: [nn.Sequential(nn.ReLU(inplace=True), Wrapped())], id="ReLU"),
        pytest.param(lambda: [Wrapped(norm=nn.BatchNorm2d(3))], id="norm inside"),
        pytest.param(lambda: [Wrapped(), nn.Dropout()], id="dropout"),
    ],
)
def test_modules_that_return_a_convolution_are_read_before_its_norm(
    make: Callable[[], list[nn.Module]],
    images: Callable[..., Tensor],
    assert_same_values: Callable[..., None],
) -> None:
    """They are as raw as the convolution: so are stages of Xception in timm."""
    net = seed_weights(lambda: nn.Sequential(nn.Hardswish(), *make(), nn.BatchNorm2d(3), nn.ReLU()))
    assert_same_values(net, prepare_for_inference(net, (3, 8, 8)), images(2, 8))


# Programs -----------------------------------------------------------------------------------------


class Program(nn.Module):
    """A network that computes values one by one from earlier ones; `steps` name module and values.

    All values have the same shape, so that any module can take any of them.
    """

    def __init__(self, steps: Sequence[tuple[str, int, int]], returned: Sequence[int]):
        super().__init__()
        self.steps, self.returned = steps, returned
        for name in "ab":
            self.add_module(f"conv_{name}", nn.Conv2d(3, 3, 3, padding=1))
            self.add_module(f"norm_{name}", nn.BatchNorm2d(3))
            self.add_module(f"relu_{name}", nn.ReLU(inplace=name == "b"))
            self.add_module(f"identity_{name}", nn.Identity())
            self.add_module(f"block_{name}", PreNorm() if name == "a" else Wrapped())

    def forward(self, batch: Tensor) -> Tensor:
        values = [batch.clone()]
        for name, first, second in self.steps:
            one, other = values[first % len(values)], values[second % len(values)]
            if name == "add":
                values.append(one + other)
            elif name == "add in place":
                values.append(one.mul_(0.5).add_(0.25))
            elif name == "skip":
                values.append(one)
            else:
                values.append(self.get_submodule(name)(one))
        return torch.cat([values[-1], *(values[index % len(values)] for index in self.returned)], 1)


# Mostly what comes last, as in most networks.
recent = st.sampled_from([-1, -1, -1, -2, -3])
steps = st.tuples(
    st.sampled_from(
        [
            *("conv_a", "conv_b", "conv_a", "conv_b", "norm_a", "norm_b", "norm_a", "norm_b"),
            *("block_a", "block_b", "block_a", "block_b", "block_a.conv", "block_b.conv"),
            *("identity_a", "identity_b", "relu_a", "relu_b", "add", "add in place", "skip"),
        ]
    ),
    recent,
    recent,
)


@settings(max_examples=100)
@given(steps=st.lists(steps, min_size=2, max_size=7), returned=st.lists(recent, max_size=1))
def test_whatever_a_network_computes_it_still_does(
    capture_by_hooks: Callable[..., dict[str, Tensor]],
    images: Callable[..., Tensor],
    steps: list[tuple[str, int, int]],
    returned: list[int],
) -> None:
    """Modules are called in any order, often or never, and their outputs used and overwritten."""
    net = seed_weights(lambda: Program(steps, returned))
    prepared = prepare_for_inference(net, (3, 6, 6))
    for batch in (images(2, 6), 10 * images(2, 6) - 5):
        assert_near(run(prepared.module, batch), run(net, batch))
        called = [name for name in dict.fromkeys(name for name, _, _ in steps) if "_" in name]
        called += [f"{name}.conv" for name in called if name in ("block_a", "block_b")]
        called = list(dict.fromkeys(called))
        if called:
            expected = capture_by_hooks(net, called, batch)
            found = read_modules(net, prepared, called, batch)
            for path in called:
                assert_near(found[path], expected[path], path)


def test_most_of_these_programs_have_something_to_fold() -> None:
    """A plain chain does, and calling a module again undoes it."""
    chain = [("conv_a", -1, -1), ("norm_a", -1, -1), ("relu_b", -1, -1), ("conv_b", -1, -1)]
    for steps, folded in (
        (chain, ["conv_a"]),
        ([*chain, ("skip", -1, -1), ("norm_b", -1, -1)], ["conv_a", "conv_b"]),
        ([*chain, ("norm_a", -1, -1)], []),
        ([*chain, ("conv_a", -1, -1)], []),
    ):
        net = seed_weights(lambda steps=steps: Program(steps, []))
        assert find_folded(prepare_for_inference(net, (3, 6, 6))) == folded


# The network itself -------------------------------------------------------------------------------


def describe(net: nn.Module) -> dict[str, Any]:
    """Describe everything that a preparation might change, but for the values of weights."""
    return {
        path: (
            id(module),
            module.training,
            {
                name: dict(value) if isinstance(value, dict) else value
                for name, value in vars(module).items()
            },
            [(name, weight.requires_grad) for name, weight in module.named_parameters()],
        )
        for path, module in net.named_modules()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["torchvision", "timm", "fails", "cannot be folded"])
def test_the_network_is_left_as_it_was(
    kind: str,
    dtype: torch.dtype,
    build: Callable[..., nn.Module],
    build_timm: Callable[..., nn.Module],
    images: Callable[..., Tensor],
) -> None:
    """Weights, buffers, modules, hooks, modes and gradients are the same, and so are its bits."""
    make = {
        "torchvision": lambda: build("mobilenet_v3_small"),
        "timm": lambda: build_timm("test_resnet"),
        "fails": Fails,
        "cannot be folded": UNFOLDED["convolution added"],
    }
    net = randomize_statistics(make[kind]())
    calls: list[int] = []
    last = list(net.modules())[-1]
    last.register_forward_hook(lambda *_: calls.append(1))
    last.register_forward_pre_hook(lambda *_: calls.append(1))
    next(net.parameters()).requires_grad_(False)
    state, before = copy.deepcopy(net.state_dict()), describe(net)
    output = run(net, images(2, 32))
    prepared = prepare_for_inference(net, (3, 32, 32), in_bfloat16, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        run(prepared.module, images(2, 32))
    exactly(net.state_dict(), state)
    assert describe(net) == before
    exactly(run(net, images(2, 32)), output)


def test_a_norm_in_train_mode_does_not_see_the_trial() -> None:
    """Its statistics stay those of the images that the user gave it."""
    net = seed_weights(lambda: Net(plainly, norm=AlwaysTrained(4)))
    state = copy.deepcopy(net.state_dict())
    prepare_for_inference(net, (3, 8, 8))
    exactly(net.state_dict(), state)


def test_weights_that_stay_as_they_are_are_shared(build: Callable[..., nn.Module]) -> None:
    """Only folded convolutions take more memory, and only cast weights do."""
    net = randomize_statistics(build("densenet121"))
    ours = {tensor.data_ptr() for tensor in net.state_dict().values()}

    def count_new(dtype: torch.dtype) -> int:
        prepared = prepare_for_inference(net, (3, 32, 32), in_bfloat16, dtype).module
        return sum(
            weight.nbytes for weight in prepared.parameters() if weight.data_ptr() not in ours
        )

    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    folded = prepare_for_inference(net, (3, 32, 32)).originals.values()
    assert {id(conv.weight) for conv in folded} < {id(conv.weight) for conv in convolutions}
    assert count_new(torch.float32) == sum(
        conv.weight.nbytes + 4 * conv.out_channels for conv in folded
    )
    biases = 2 * sum(conv.out_channels for conv in folded)
    cast = [*(conv.weight for conv in convolutions), *net.classifier.parameters()]
    assert count_new(torch.bfloat16) == biases + sum(weight.nbytes for weight in cast) // 2


def test_neither_keeps_the_other_alive(build: Callable[..., nn.Module]) -> None:
    """A prepared network is not referred to by the network, nor does its gradient flow there."""
    net = randomize_statistics(build("resnet18"))
    prepared = prepare_for_inference(net, (3, 32, 32)).module
    ours = {id(module) for module in net.modules()}
    assert not ours & {id(module) for module in prepared.modules()}
    assert not [weight for weight in prepared.conv1.parameters() if weight.requires_grad]


# Weights ------------------------------------------------------------------------------------------


def cast_and_plain(net: nn.Module, side: int) -> tuple[nn.Module, nn.Module]:
    """Prepare a network with its weights cast once, and without."""
    shape = (3, side, side)
    cast = prepare_for_inference(net, shape, in_bfloat16, torch.bfloat16)
    return cast.module, prepare_for_inference(net, shape).module


def run_in_bfloat16(module: nn.Module, batch: Tensor) -> Any:
    with in_bfloat16():
        return run(module, batch)


@pytest.mark.parametrize("name", ["densenet121", "mobilenet_v3_small", "resnet18", "tiny ViT"])
def test_weights_that_are_cast_once_give_the_bits_of_autocast(
    name: str, build: Callable[..., nn.Module], images: Callable[..., Tensor]
) -> None:
    """All weights of convolutions and linear layers are, and no bit of a row tells."""
    if name == "tiny ViT":
        net = models.VisionTransformer(32, 8, 2, 2, hidden_dim=16, mlp_dim=32, num_classes=10)
        nn.init.normal_(net.heads.head.weight)
    else:
        net = build(name)
    cast, plain = cast_and_plain(randomize_statistics(net), 32)
    assert {
        weight.dtype
        for module in cast.modules()
        if type(module) in (nn.Conv2d, nn.Linear)
        for weight in module.parameters()
    } == {torch.bfloat16}
    for batch in (images(1), images(3), 100 * images(2)):
        output, expected = run_in_bfloat16(cast, batch), run_in_bfloat16(plain, batch)
        exactly(output, expected)
        assert output.isfinite().all()
        with pytest.raises(AssertionError):  # it is not float32 that was computed
            exactly(output.float(), run(plain, batch))


def test_weights_of_timm_give_the_bits_of_autocast(
    build_timm: Callable[..., nn.Module], images: Callable[..., Tensor]
) -> None:
    """Its convolutions and norms are subclasses of torch's."""
    for name, side in (("test_resnet", 64), ("test_efficientnet", 64), ("test_byobnet", 64)):
        cast, plain = cast_and_plain(randomize_statistics(build_timm(name)), side)
        batch = images(2, side)
        exactly(run_in_bfloat16(cast, batch), run_in_bfloat16(plain, batch))


class Tied(nn.Module):
    """A network whose output layer shares its weight with the embedding of its input.

    `use` takes the weight of the output layer for something else.
    """

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.use = use
        self.embedding = nn.Embedding(10, 6)
        self.mix = nn.Linear(6, 6)
        self.fc = nn.Linear(6, 10, bias=False)
        self.fc.weight = self.embedding.weight

    def forward(self, batch: Tensor) -> Tensor:
        tokens = self.embedding((10 * batch.flatten(1).abs()).long().clamp(0, 9)).mean(1)
        return self.fc(self.use(self.mix(tokens), self.fc.weight))


USES = {
    "not used": lambda tokens, _weight: tokens,
    "in a product": lambda tokens, weight: tokens @ weight.mT @ weight,
    "in a norm": lambda tokens, weight: tokens / weight.norm(),
    "in a sum": lambda tokens, weight: tokens + weight.sum(0),
    "in a softmax": lambda tokens, weight: tokens * weight.softmax(1).mean(0),
    "as a table": lambda tokens, weight: tokens + F.embedding(tokens.argmax(1), weight),
    "by its type": lambda tokens, weight: tokens.to(weight.dtype) * 1.001,
}


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(
            use,
            marks=[pytest.mark.xfail(reason="three images look the same")] * (use == "as a table"),
        )
        for use in USES
    ],
)
def test_weights_in_other_use_give_the_bits_of_autocast(
    use: str, images: Callable[..., Tensor]
) -> None:
    """Tied weights are cast for one use alone, or not at all if that would be seen."""
    net = seed_weights(lambda: Tied(USES[use]))
    cast, plain = cast_and_plain(net, 8)
    assert cast.embedding.weight is net.embedding.weight
    for batch in (images(3, 8), images(3, 8, seed=1) / 10):
        exactly(run_in_bfloat16(cast, batch), run_in_bfloat16(plain, batch))


class Subclass(nn.Linear):
    """A layer that computes in its own way with its weight."""

    def forward(self, batch: Tensor) -> Tensor:
        return batch + 1e-3 * self.weight.sum()


def test_weights_of_subclasses_are_not_cast(images: Callable[..., Tensor]) -> None:
    """What they do with them is unknown; norms and embeddings compute in float32 as well."""
    parts = (nn.Conv2d(3, 4, 8), nn.Flatten(), Subclass(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    cast, plain = cast_and_plain(seed_weights(lambda: nn.Sequential(*parts)), 8)
    assert [weight.dtype for weight in cast.parameters()] == [
        *(torch.bfloat16, torch.bfloat16),
        *(torch.float32, torch.float32, torch.float32, torch.float32),
        *(torch.bfloat16, torch.bfloat16),
    ]
    exactly(run_in_bfloat16(cast, images(2, 8)), run_in_bfloat16(plain, images(2, 8)))


def test_weights_of_another_type_are_left_as_they_are(images: Callable[..., Tensor]) -> None:
    """A network in float64 stays there, folded or not."""
    net = seed_weights(lambda: Net(plainly)).double()
    for dtype in (torch.float32, torch.bfloat16):
        prepared = prepare_for_inference(net, (3, 8, 8), in_bfloat16, dtype)
        assert find_folded(prepared) == ["conv"]
        assert {weight.dtype for weight in prepared.module.parameters()} == {torch.float64}
        batch = images(2, 8).double()
        assert_close(run(prepared.module, batch), run(net, batch), rtol=1e-12, atol=1e-12)


# Reading ------------------------------------------------------------------------------------------

SMALL = {
    "mobilenet": lambda: models.MobileNetV2(
        num_classes=4, width_mult=0.25, inverted_residual_setting=[[1, 8, 1, 1], [6, 8, 2, 2]]
    ),
    "densenet": lambda: models.DenseNet(
        growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, num_classes=4
    ),
    "resnet": lambda: models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["densenet", "mobilenet"])
def test_a_layer_does_not_depend_on_what_else_is_read(
    name: str, dtype: torch.dtype, images: Callable[..., Tensor]
) -> None:
    """All pairs of layers, raw convolutions among them, have the bits that each has alone."""
    net, batch = seed_weights(SMALL[name]), images(2)
    precise = dtype == torch.float32
    prepared = prepare_for_inference(net, (3, 32, 32), in_bfloat16, dtype)
    leaves = [path for path, module in net.named_modules() if not any(module.children())]
    assert len(prepared.originals) >= 4
    with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
        alone = {path: read_modules(net, prepared, [path], batch)[path] for path in leaves}
        exactly(read_modules(net, prepared, leaves, batch), alone)
        for pair in itertools.combinations(leaves, 2):
            for path, found in read_modules(net, prepared, pair, batch).items():
                exactly(found, alone[path])


def test_a_raw_convolution_is_that_of_the_network(
    images: Callable[..., Tensor], capture_by_hooks: Callable[..., dict[str, Tensor]]
) -> None:
    """It is read without its norm, alone as well as with deeper layers and with its norm."""
    net, batch = seed_weights(SMALL["resnet"]), images(2)
    prepared = prepare_for_inference(net, (3, 32, 32))
    convolutions = [path for path, part in net.named_modules() if isinstance(part, nn.Conv2d)]
    expected = capture_by_hooks(net, [*convolutions, "bn1", "layer4", "fc"], batch)
    assert set(convolutions) == prepared.originals.keys()
    for others in ((), ("bn1",), ("layer4", "fc"), ("bn1", *convolutions)):
        for path in convolutions:
            found = read_modules(net, prepared, list(dict.fromkeys([path, *others])), batch)
            for name, output in found.items():
                assert_near(output, expected[name], name)


def test_reading_ends_with_a_raw_convolution(images: Callable[..., Tensor]) -> None:
    """If it is the deepest layer, nothing is run after it, and its folded copy is not either."""
    net = seed_weights(SMALL["resnet"])
    prepared = prepare_for_inference(net, (3, 32, 32))
    calls: list[str] = []
    for path, module in prepared.module.named_modules():
        module.register_forward_hook(lambda _m, _i, _o, path=path: calls.append(path))
    read_modules(net, prepared, ["layer1.0.conv2"], images(2))
    assert calls[-1] in ("layer1.0.relu", "layer1.0.bn1")
    assert "layer1.0.conv2" not in calls
