"""Tests of timm's networks: names, a hub on loopback, random weights, loading, preprocessing."""

import functools
import hashlib
import http.server
import json
import os
import pickle
import subprocess
import sys
import threading

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest
import timm
import timm.data
import torch
from numpy.testing import assert_array_equal
from PIL import Image
from safetensors.torch import save, save_file
from sklearn.datasets import load_sample_images
from torch.testing import assert_close

from deepfeat import list_backbones
from deepfeat._backbones import networks as building
from deepfeat._backbones import timm as timm_networks
from deepfeat._backbones.find import find_backbone
from deepfeat._backbones.preprocessing import preprocess_like_timm

exactly = functools.partial(assert_close, rtol=0, atol=0)
CPU = torch.device("cpu")
NAME = "timm/test_vit.r160_in1k"
REPOSITORY = "timm/test_vit.r160_in1k"


@pytest.fixture(scope="session")
def draw_network():
    """Build a network of timm with random weights, in eval mode."""

    def draw_network(name, seed=0, **options):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return timm.create_model(name.removeprefix("timm/"), **options).eval()

    return draw_network


@pytest.fixture(scope="session")
def timm_state(draw_network):
    """Weights of the network that the hub below serves."""
    return draw_network(NAME).state_dict()


@pytest.fixture(autouse=True)
def forget_downloads():
    """Start and leave without knowing where in the hub's cache files are."""
    timm_networks._find_file.cache_clear()
    yield
    timm_networks._find_file.cache_clear()


# The hub ----------------------------------------------------------------------------------------


class Hub:
    """Serve repositories as the Hugging Face hub does, and count what is asked of it."""

    def __init__(self):
        self.files: dict[str, bytes] = {}  # by "repository/file name"
        self.commit = "a" * 40
        self.failure = ""
        self.requests: list[tuple[str, str]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                outer.answer(self)

            def do_GET(self):
                outer.answer(self)

            def log_message(self, *_args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever)
        self.thread.start()

    def publish(self, state, filename="model.safetensors", repository=REPOSITORY):
        """Make a file the only one of a repository, in a new revision."""
        content = save({key: value.contiguous() for key, value in state.items()})
        self.files = {f"{repository}/{filename}": content}
        self.commit = hashlib.sha1(content).hexdigest()

    def answer(self, request):
        path = request.path.lstrip("/")
        repository, _, rest = path.partition("/resolve/")
        filename = rest.partition("/")[2]
        if filename:  # the client also asks the hub about itself, now and then
            self.requests.append((request.command, filename))
        content = self.files.get(f"{repository}/{filename}")
        if self.failure == "is down":
            request.send_error(500)
            return
        if content is None:
            request.send_response(404)
            request.send_header("X-Repo-Commit", self.commit)
            request.send_header("X-Error-Code", "EntryNotFound")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        digest = hashlib.sha256(content).hexdigest()
        sent = content
        if request.command == "GET" and self.failure == "sends less":
            sent = content[:-1000]
        if request.command == "GET" and self.failure == "sends something else":
            sent = content[:-1000] + bytes(1000)
        request.send_response(200)
        request.send_header("X-Repo-Commit", self.commit)
        request.send_header("ETag", f'"{digest}"')
        request.send_header("X-Linked-Etag", f'"{digest}"')
        request.send_header("X-Linked-Size", str(len(content)))
        request.send_header("Content-Length", str(len(sent)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(sent[:1000] if self.failure == "breaks off" else sent)

    def gets(self):
        return [filename for method, filename in self.requests if method == "GET"]

    def close(self):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def hub(timm_state):
    """A hub with one repository."""
    hub = Hub()
    hub.publish(timm_state)
    yield hub
    hub.close()


@pytest.fixture
def cache(hub, tmp_path, monkeypatch):
    """Let this process use that hub, with an empty cache."""
    download = functools.partial(
        huggingface_hub.hf_hub_download, endpoint=hub.url, cache_dir=tmp_path / "hub"
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    # Between its attempts the client waits.
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda _: None)
    huggingface_hub.close_session()
    yield tmp_path / "hub"
    huggingface_hub.close_session()


@pytest.fixture
def run_client(hub, tmp_path):
    """Run a script that uses the hub, in a process of its own, and parse what it prints last."""

    def run_client(script, **environment):
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), **environment}
        inherited = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("HF_", "HUGGING"))
        }
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**inherited, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run_client


CLIENT = """
import collections, hashlib, json
import torch
calls = collections.Counter()
digest_file = hashlib.file_digest
def counting(file, *args, **kwargs):
    calls[file.name.rpartition("/")[2]] += 1
    return digest_file(file, *args, **kwargs)
hashlib.file_digest = counting
from deepfeat._backbones.find import find_backbone
def load():
    backbone = find_backbone("timm/test_vit.r160_in1k")
    state = backbone.load(torch.device("cpu")).state_dict()
    content = b"".join(value.numpy().tobytes() for value in state.values())
    return [backbone.fingerprint().hex(), hashlib.sha256(content).hexdigest()]
def refuse():
    try:
        find_backbone("timm/test_vit2.r160_in1k").fingerprint()
    except OSError as error:
        return str(error)
print(json.dumps([load(), load(), refuse(), calls]))
"""


def digest_of(state):
    content = b"".join(value.numpy().tobytes() for value in state.values())
    return hashlib.sha256(content).hexdigest()


def test_weights_are_downloaded_once_and_then_used_offline(
    hub, timm_state, draw_network, run_client
):
    """Every process has the same weights and fingerprint, until the hub has another revision."""
    first, again, _, hashed = run_client(CLIENT)
    assert first == again
    assert first[1] == digest_of(timm_state)
    assert hub.gets() == ["model.safetensors"]
    assert hashed == {"model.safetensors": 1}

    newer = draw_network(NAME, seed=1).state_dict()
    hub.publish(newer)
    offline, _, refused, _ = run_client(CLIENT, HF_HUB_OFFLINE="1")
    assert offline == first
    assert hub.gets() == ["model.safetensors"]
    assert refused.startswith(
        "The weights timm/test_vit2.r160_in1k could not be downloaded from "
        "timm/test_vit2.r160_in1k on the Hugging Face hub: "
    )
    assert "HF_HUB_OFFLINE" in refused
    assert "`HF_HOME` is its folder" in refused

    updated, _, _, _ = run_client(CLIENT)
    assert updated[1] == digest_of(newer)
    assert updated[0] != first[0]
    assert hub.gets() == ["model.safetensors"] * 2


def test_finding_downloads_nothing(hub, cache):
    """Names of layers and sizes of images are known without the weights."""
    backbone = find_backbone(NAME)
    assert backbone.preprocessing.input_shape == (3, 160, 160)
    assert len(backbone.categories) == 1000
    assert backbone.categories[281].startswith("tabby")
    assert not hub.requests
    assert not cache.exists()


def test_one_process_keeps_to_one_revision(hub, cache, timm_state, draw_network):
    """What is published meanwhile is used by later processes, so that all rows here agree."""
    backbone = find_backbone(NAME)
    before = backbone.fingerprint()
    hub.publish(draw_network(NAME, seed=1).state_dict())
    exactly(backbone.load(CPU).state_dict(), timm_state)
    building._load_cached.cache_clear()
    other = find_backbone(NAME, "r160_in1k")
    exactly(other.load(CPU).state_dict(), timm_state)
    assert other.fingerprint() == before
    assert hub.gets() == ["model.safetensors"]
    timm_networks._find_file.cache_clear()
    assert find_backbone(NAME).fingerprint() != before


@pytest.mark.parametrize("failure", ["is down", "sends less", "breaks off"])
def test_a_failed_download_leaves_nothing(failure, hub, cache, timm_state):
    """Whatever happens on the way is an OSError that names a way out, and a retry works."""
    hub.failure = failure
    backbone = find_backbone(NAME)
    for use in (backbone.fingerprint, functools.partial(backbone.load, CPU)):
        with pytest.raises(OSError, match=f"The weights {NAME} could not be downloaded") as caught:
            use()
        assert "Give the path of a file as weights=" in str(caught.value)
        assert "'resnet10_slim' needs no network" in str(caught.value)
    assert not [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size > 1000]
    hub.failure = ""
    exactly(backbone.load(CPU).state_dict(), timm_state)


def damage(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1000] + bytes(1000))


def test_a_download_that_is_not_what_was_promised_is_refused(hub, cache):
    """The hub's client checks the length alone."""
    hub.failure = "sends something else"
    with pytest.raises(OSError, match="does not hold the weights"):
        find_backbone(NAME).load(CPU)


@pytest.mark.parametrize("use", ["fingerprint", "load"])
def test_a_damaged_file_in_the_cache_is_named(use, hub, cache, timm_state):
    """The error says which file it is; once that is deleted, it is downloaded again."""
    find_backbone(NAME).fingerprint()
    (blob,) = (path for path in cache.rglob("blobs/*") if path.is_file())
    damage(blob)
    building._load_cached.cache_clear()
    timm_networks._find_file.cache_clear()
    backbone = find_backbone(NAME)
    with pytest.raises(OSError, match=f"does not hold the weights {NAME}") as caught:
        backbone.fingerprint() if use == "fingerprint" else backbone.load(CPU)
    assert f"Delete {blob.resolve()}: it is then downloaded again." in str(caught.value)
    assert str(cache) in str(caught.value)
    blob.unlink()
    timm_networks._find_file.cache_clear()
    exactly(backbone.load(CPU).state_dict(), timm_state)


def test_weights_that_could_run_code_are_not_downloaded(hub, cache, timm_state):
    """A repository that has only a pickle is refused, and the pickle is not even asked for."""
    hub.publish(timm_state, "pytorch_model.bin")
    with pytest.raises(OSError, match="does not have them in the safetensors format"):
        find_backbone(NAME).load(CPU)
    assert {filename for _, filename in hub.requests} == {"model.safetensors"}


def test_weights_that_are_not_on_the_hub_are_refused(hub, cache):
    """timm would fetch a pickle from another site."""
    names = [
        name
        for name in list_backbones("timm/*")
        if timm_networks._config_of(name).hf_hub_id is None
    ]
    assert names
    for name in names:
        source = timm_networks.known_weights(name)["DEFAULT"]
        with pytest.raises(OSError, match=f"The weights {name} are not on the Hugging Face hub"):
            source.state()
    assert not hub.requests


def test_a_file_is_hashed_once(hub, cache, monkeypatch):
    """However often backbones are found, looked up and loaded."""
    opened = []
    digest_file = hashlib.file_digest
    monkeypatch.setattr(
        hashlib,
        "file_digest",
        lambda file, *how: opened.append(file.name) or digest_file(file, *how),
    )
    for _ in range(3):
        backbone = find_backbone(NAME)
        backbone.fingerprint()
        backbone.load(CPU)
        building._load_cached.cache_clear()
    assert len(opened) == 1


# Names ------------------------------------------------------------------------------------------


def test_names_of_timm_are_listed_on_request():
    """A pattern that may match them asks for them; by default they would bury all others."""
    found = list_backbones("timm/*dinov2*")
    assert "timm/vit_small_patch14_dinov2.lvd142m" in found
    assert found == sorted(found) == list_backbones("*dinov2*")
    assert all(name.startswith("timm/") and "dinov2" in name for name in found)
    assert not [name for name in list_backbones() if name.startswith("timm")]
    assert list_backbones("resnet5*") == ["resnet50"]
    assert {"resnet50", "timm/resnet50.a1_in1k"} <= set(list_backbones("*resnet50*"))
    assert len(list_backbones("timm/*")) == len(timm.list_pretrained())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: find_backbone("timm/resnet50.a1_in"),
            "There is no backbone 'timm/resnet50.a1_in'. Close matches: 'timm/resnet50.a1_in1k', ",
        ),
        (
            lambda: find_backbone("timm/test_vitt"),
            "There is no backbone 'timm/test_vitt'. Close matches: 'timm/test_vit",
        ),
        (
            lambda: find_backbone("test_vit"),
            "There is no backbone 'test_vit'. ",
        ),
        (
            lambda: find_backbone(NAME, "IMAGENET1K_V1"),
            f"{NAME} has no weights 'IMAGENET1K_V1'. It has 'DEFAULT', 'r160_in1k'; the path of a "
            "file ends in .pth, .pt, .tar, .safetensors.",
        ),
        (
            lambda: find_backbone("timm/test_vit4"),
            "timm/test_vit4 has no weights 'DEFAULT'. None are published; the path of a "
            "file ends in .pth, .pt, .tar, .safetensors.",
        ),
        (
            lambda: find_backbone("timm/nest_tiny", None, image_size=225),
            "timm/nest_tiny cannot be built for images of 225 x 225 pixels: `patch_size` must ",
        ),
    ],
)
def test_a_wrong_choice_has_a_clear_error(call, words):
    """The error says what came, what was expected, and what there is."""
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value).startswith(words)


def test_a_name_without_timm_in_it_says_how_those_begin():
    """Who knows timm's names may not know the prefix."""
    with pytest.raises(ValueError, match=r"Names of timm begin with 'timm/'\.$"):
        find_backbone("test_vit.r160_in1k")


def test_the_tag_is_a_default_and_weights_may_be_of_another():
    """Each tag of an architecture names weights, whichever of them is in the name."""
    known = timm_networks.known_weights("timm/resnet50.a1_in1k")
    assert known["DEFAULT"] == known["a1_in1k"]
    untagged = timm_networks.known_weights("timm/resnet50")
    first = timm.models.get_pretrained_cfg("resnet50").tag
    assert untagged["DEFAULT"] == untagged[first] == known[first]
    assert known.keys() == untagged.keys()
    assert known["tv2_in1k"].description.network == "timm/resnet50.tv2_in1k"
    backbone = find_backbone("timm/resnet50.a1_in1k", "tv2_in1k")
    other = find_backbone("timm/resnet50.tv2_in1k")
    assert backbone.preprocessing.settings == other.preprocessing.settings
    assert (
        backbone.preprocessing.settings
        != find_backbone("timm/resnet50.a1_in1k").preprocessing.settings
    )


def test_every_name_has_weights():
    """All names that are listed can be used, and without a tag they mean the first."""
    for name in list_backbones("timm/*"):
        assert timm_networks.has_name(name)
        known = timm_networks.known_weights(name)
        assert known["DEFAULT"].description.network == name
        assert timm_networks.describe(name) == known["DEFAULT"].description


@pytest.fixture
def without_timm(monkeypatch):
    """Make timm impossible to import."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)


@pytest.mark.usefixtures("without_timm")
@pytest.mark.parametrize(
    "use", [lambda: find_backbone(NAME), lambda: list_backbones("timm/*")], ids=["find", "list"]
)
def test_without_timm_its_names_say_what_to_install(use):
    """The error has the command."""
    with pytest.raises(ModuleNotFoundError, match=r"`pip install 'timm>=[\d.]+'`\.$"):
        use()


@pytest.mark.usefixtures("without_timm")
def test_without_timm_there_are_the_other_names():
    """Only what begins as timm's names do needs timm."""
    assert "resnet50" in list_backbones()
    assert "resnet50" in list_backbones("*")
    assert list_backbones("t*") == []
    assert find_backbone("resnet10_slim").name == "resnet10_slim"
    with pytest.raises(ValueError, match="There is no backbone 'resnet5'"):
        find_backbone("resnet5")


def test_timm_is_imported_for_its_names_alone(run_client):
    """It takes seconds, and is not needed by those who do not use it."""
    script = """
import json, sys
import numpy as np
import deepfeat
from deepfeat._backbones.find import find_backbone
find_backbone("vgg16")
images = [np.zeros((32, 32, 3), dtype=np.uint8)]
deepfeat.DeepFeatureExtractor("resnet10_slim").fit_transform(images)
deepfeat.list_backbones("resnet*")
try:
    find_backbone("vgg")
except ValueError:
    pass
before = "timm" in sys.modules or "huggingface_hub" in sys.modules
deepfeat.list_backbones("timm/test_vit*")
print(json.dumps([before, "timm" in sys.modules]))
"""
    assert run_client(script) == [False, True]


# Random weights ---------------------------------------------------------------------------------

FAMILIES = [
    *("test_byobnet", "test_coatnet", "test_convnext2", "test_efficientnet_evos", "test_mambaout"),
    *("test_maxvit", "test_nfnet", "test_resnet", "test_vit3", "test_vit_relpos"),
]


@pytest.fixture
def check_drawing(untouched_generators):
    """Check that the weights of a network depend on the seed and on nothing else."""

    def draw(name, seed):
        building._load_cached.cache_clear()
        return find_backbone(f"timm/{name}", None, seed=seed).load(CPU).state_dict()

    def check_drawing(name):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            with untouched_generators():
                first = draw(name, 3)
            torch.manual_seed(1)
            np.random.default_rng(1)
            exactly(draw(name, 3), first)
        assert not any(value.isnan().any() for value in first.values())
        other = draw(name, 4)
        assert any(not torch.equal(value, other[key]) for key, value in first.items())

    yield check_drawing
    building._load_cached.cache_clear()


@pytest.mark.parametrize("name", FAMILIES)
def test_random_weights_depend_on_the_seed_alone(name, check_drawing):
    """Not on global generators, which stay as they are."""
    check_drawing(name)


def test_random_weights_are_those_of_timm():
    """They are distributed as timm draws them: zeros, ones and deviations are the same."""
    found = find_backbone("timm/test_vit", None).load(CPU).state_dict()
    with torch.random.fork_rng(devices=[]):  # a rare draw of timm's is a hundred deviations away
        torch.manual_seed(0)
        expected = timm.create_model("test_vit").state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if value.numel() > 1000:
            assert_close(found[key].std(), value.std(), rtol=0.1, atol=1e-6)
        elif value.unique().numel() == 1:
            exactly(found[key], value)


# Words in the names of small networks, the smallest first.
SMALL = (
    *("test_", "atto", "femto", "pico", "nano", "xxs", "xx_small", "xtiny", "tiny", "mini", "_xs"),
    *("_t", "small", "_s", "050", "18", "b0", "m0", "s0", "t0"),
)


def choose_small(module):
    def rank(name):
        words = [place for place, word in enumerate(SMALL) if word in name]
        return min(words, default=len(SMALL)), len(name), name

    return min(timm.list_models(module=module), key=rank)


@pytest.mark.slow
@pytest.mark.parametrize("module", timm.list_modules())
def test_random_weights_of_all_families_depend_on_the_seed_alone(module, check_drawing):
    """One network of each module of timm."""
    check_drawing(choose_small(module))


def test_a_network_that_runs_itself_while_it_is_built_has_a_skeleton():
    """Hybrids measure the maps of their stem with a trial run."""
    skeleton = find_backbone("timm/vit_tiny_r_s16_p8_224", None).skeleton
    assert {value.device.type for value in skeleton.state_dict().values()} == {"meta"}


# Loading ----------------------------------------------------------------------------------------


def write(state, path):
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


@pytest.fixture
def check_loading():
    """Check that a file gives exactly the network that timm makes of it."""

    def check_loading(name, path, image_size=None, **options):
        backbone = find_backbone(name, path, image_size=image_size)
        found = backbone.load(CPU)
        expected = timm.create_model(
            name.removeprefix("timm/"),
            pretrained=True,
            pretrained_cfg_overlay={
                "file": str(path),
                "num_classes": options.get("num_classes", 1000),
            },
            **options,
        ).eval()
        assert not found.training
        exactly(found.state_dict(), expected.state_dict())
        buffers = dict(expected.named_buffers())
        for key, value in found.named_buffers():  # also those that are in no file
            exactly(value, buffers[key])
        batch = torch.randn(
            2, *backbone.preprocessing.input_shape, generator=torch.Generator().manual_seed(0)
        )
        batch = batch.to(memory_format=torch.channels_last)
        expected.to(memory_format=torch.channels_last)
        with torch.no_grad():
            exactly(found(batch), expected(batch))
        shapes = {key: value.shape for key, value in found.state_dict().items()}
        assert shapes == {k: value.shape for k, value in backbone.skeleton.state_dict().items()}
        return backbone

    return check_loading


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_gives_the_network_of_timm(name, suffix, tmp_path, draw_network, check_loading):
    """Weights, buffers and outputs are bit for bit the same."""
    path = write(draw_network(name).state_dict(), tmp_path / f"weights{suffix}")
    check_loading(f"timm/{name}", path)


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3", "test_vit_relpos"])
@pytest.mark.parametrize("side", [96, 224])
def test_positions_are_resampled_to_the_size_of_images(
    name, side, tmp_path, draw_network, check_loading
):
    """As timm does it when it builds the network for another size."""
    path = write(draw_network(name).state_dict(), tmp_path / "weights.safetensors")
    backbone = check_loading(f"timm/{name}", path, side, img_size=(side, side))
    assert backbone.preprocessing.input_shape == (3, side, side)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext"])
def test_a_file_determines_the_number_of_classes(name, tmp_path, draw_network, check_loading):
    """A network that was fine-tuned elsewhere keeps its head, whose outputs have no names."""
    path = write(draw_network(name, num_classes=7).state_dict(), tmp_path / "weights.pth")
    backbone = check_loading(f"timm/{name}", path, num_classes=7)
    assert timm_networks.count_outputs(backbone.skeleton) == 7
    assert backbone.categories is None


def test_files_from_training_have_wrappers(tmp_path, draw_network, load):
    """What DataParallel, torch.compile and a checkpoint put around the weights is taken off."""
    state = draw_network("test_vit").state_dict()
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        wrapped = {f"{prefix}{key}": value for key, value in state.items()}
        torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "checkpoint.pth.tar")
        exactly(load(NAME, tmp_path / "checkpoint.pth.tar").state_dict(), state)


def test_weights_may_have_half_the_bits(tmp_path, draw_network, load):
    """They are computed with in single precision."""
    state = {key: value.half() for key, value in draw_network("test_vit").state_dict().items()}
    path = write(state, tmp_path / "half.safetensors")
    exactly(load(NAME, path).state_dict(), {key: value.float() for key, value in state.items()})


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "dla46x_c"])
@pytest.mark.parametrize("fault", ["missing", "renamed", "of another network"])
def test_a_file_that_does_not_fit_is_refused(name, fault, tmp_path, draw_network):
    """No weight is left as it was in memory, however lenient timm is."""
    state = draw_network(name).state_dict()
    key = next(key for key, value in state.items() if value.ndim == 4)
    value = state.pop(key)
    if fault == "renamed":
        state[f"other.{key}"] = value
    if fault == "of another network":
        state = draw_network("test_nfnet").state_dict()
    path = write(state, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=f"The weights file does not fit timm/{name}"):
        find_backbone(f"timm/{name}", path).load(CPU)


def test_a_file_in_the_cache_of_the_hub_is_a_file(cache, timm_state):
    """There it is a link to one without a suffix."""
    path = huggingface_hub.hf_hub_download(REPOSITORY, "model.safetensors")
    assert os.path.islink(path)
    backbone = find_backbone(NAME, path)
    exactly(backbone.load(CPU).state_dict(), timm_state)
    assert backbone.fingerprint() == find_backbone(NAME).fingerprint()


# Preprocessing ----------------------------------------------------------------------------------

# How the weights want images: crop mode, part that is left, interpolation and size.
PREPARED = {
    "vit_base_patch16_224.augreg2_in21k_ft_in1k": ("center", 0.9, "bicubic", (224, 224)),
    "resnet50.tv_in1k": ("center", 0.875, "bilinear", (224, 224)),
    "test_resnet.r160_in1k": ("center", 0.95, "bilinear", (160, 160)),
    "tinynet_e.in1k": ("center", 0.875, "bicubic", (106, 106)),
    "convnext_base.clip_laion2b": ("center", 1.0, "bicubic", (256, 256)),
    "volo_d4_448.sail_in1k": ("center", 1.15, "bicubic", (448, 448)),
    "convnext_tiny.fb_in22k_ft_in1k_384": ("squash", 1.0, "bicubic", (384, 384)),
    "dm_nfnet_f0.dm_in1k": ("squash", 0.9, "bicubic", (192, 192)),
    "vit_base_patch16_sapiens2.fb": ("squash", 1.0, "bilinear", (1024, 768)),
    "deepseek_vit_412m.deepseek_v4_flash_vision_exp": ("border", 1.0, "bicubic", (392, 392)),
}
LINES = [(4_000_000, 1), (1, 4_000_000)]


@pytest.fixture(scope="module")
def photographs(pictures):
    """Two photographs, one of them also upright and small, and pictures of noise."""
    china, flower = map(Image.fromarray, load_sample_images().images)
    upright = china.crop((100, 50, 400, 250)).transpose(Image.Transpose.ROTATE_90)
    return {"china": china, "flower": flower, "upright": upright, **pictures}


def prepare_by_timm(name, image, **changes):
    """Return what timm's own transform makes of an image, in levels of grey."""
    config = timm.data.resolve_data_config(
        changes, pretrained_cfg=timm.models.get_pretrained_cfg(name).to_dict()
    )
    return undo(config, timm.data.create_transform(**config)(image))


def assert_about(found, expected, resizer):
    """Compare levels of grey: the same where Pillow resizes, and else nearly all, or the next."""
    assert_close(found, expected, rtol=0, atol={"Pillow": 1e-3, "torch": 2.001}[resizer])
    assert ((found - expected).abs() > 0.5).float().mean() <= 0.05
    assert ((found - expected).abs() > 1.5).float().mean() <= 0.001


def undo(config, normalized):
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    return 255 * (normalized * std + mean)


def prepare(name, image, resize="weights", image_size=None):
    description = timm_networks.TimmDescription(name)
    steps = description.preprocess(resize, image_size)
    config = timm.data.resolve_data_config(pretrained_cfg=description.config.to_dict())
    prepared = steps(image)
    assert prepared.shape == steps.input_shape
    return undo(config, prepared)


@pytest.mark.parametrize("name", PREPARED)
def test_images_are_prepared_as_by_timm(name, photographs, resizer):
    """Pixel by pixel, whatever part of an image the weights want, and in what size."""
    config = timm.data.resolve_data_config(
        pretrained_cfg=timm.models.get_pretrained_cfg(name).to_dict()
    )
    mode, part, interpolation, size = PREPARED[name]
    assert (config["crop_mode"], config["crop_pct"]) == (mode, part)
    assert (config["interpolation"], config["input_size"]) == (interpolation, (3, *size))
    for image in photographs.values():
        assert_about(prepare(name, image), prepare_by_timm(name, image), resizer)


@pytest.mark.slow
def test_images_are_prepared_as_by_timm_for_all_weights(photographs, resizer):
    """Each of the combinations of crop mode, part, interpolation and size."""
    groups = {
        tuple(
            map(str, timm.data.resolve_data_config(pretrained_cfg=config.to_dict()).values())
        ): name
        for name in timm.list_pretrained()
        if (config := timm.models.get_pretrained_cfg(name))
    }
    assert len(groups) > 100
    for name in groups.values():
        for image in photographs.values():
            assert_about(prepare(name, image), prepare_by_timm(name, image), resizer)


@pytest.mark.parametrize("side", [96, 260])
@pytest.mark.parametrize("name", PREPARED)
def test_image_size_replaces_the_size_of_the_weights(name, side, photographs, resizer):
    """The same part of an image comes in another size, as timm prepares it."""
    for image in photographs.values():
        expected = prepare_by_timm(name, image, input_size=(3, side, side))
        assert expected.shape == (3, side, side)
        assert_about(prepare(name, image, image_size=side), expected, resizer)


@pytest.mark.usefixtures("pillow_resizes")  # which resizes these in another order, to other levels
@pytest.mark.parametrize("name", PREPARED)
@pytest.mark.parametrize("size", [(7, 500), (500, 7), (3, 30), (901, 100)], ids=str)
def test_thin_images_are_prepared_as_by_timm(name, size):
    """To two levels of grey, where what will be cut off is not enlarged before."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    assert_close(prepare(name, image), prepare_by_timm(name, image), rtol=0, atol=2.001)


@pytest.mark.parametrize("resize", ["weights", "squash", "pad"])
@pytest.mark.parametrize("size", LINES, ids=str)
@pytest.mark.parametrize("name", PREPARED)
def test_a_thin_image_takes_no_more_memory_than_its_pixels(name, size, resize):
    """As high as the input, this line would be a billion pixels wide."""
    found = prepare(name, Image.new("RGB", size, "red"), resize)
    middle = found[:, (found.shape[1] - 1) // 2, (found.shape[2] - 1) // 2]
    assert_close(middle, torch.tensor([255.0, 0, 0]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", PREPARED)
def test_the_whole_image_can_be_kept(name, photographs, resizer):
    """Squashed it fills the input; padded it keeps its proportions, in the middle."""
    *_, interpolation, (height, width) = PREPARED[name]
    resample = Image.Resampling[interpolation.upper()]
    for image in photographs.values():
        if resizer == "torch":  # always first along the rows; Pillow as it is faster
            squashed = image.resize((width, image.height), resample)
            squashed = squashed.resize((width, height), resample)
        else:
            squashed = image.resize((width, height), resample)
        expected = torch.from_numpy(np.array(squashed)).permute(2, 0, 1).float()
        assert_about(prepare(name, image, "squash"), expected, resizer)

        scale = min(width / image.width, height / image.height)
        across, down = round(image.width * scale), round(image.height * scale)
        inside = image.resize((across, down), resample)
        expected = torch.from_numpy(np.array(inside)).permute(2, 0, 1).float()
        left, top = (width - across) // 2, (height - down) // 2
        padded = prepare(name, image, "pad")
        middle = padded[:, top : top + down, left : left + across]
        assert_about(middle, expected, resizer)


@pytest.mark.usefixtures("pillow_resizes")
@pytest.mark.parametrize("image_size", [None, 96])
@pytest.mark.parametrize("resize", ["weights", "squash", "pad"])
@pytest.mark.parametrize("name", PREPARED)
def test_a_description_is_enough_to_prepare_images(
    name, resize, image_size, photographs, prepare_as_described
):
    """A program with Pillow and NumPy that reads it comes to the same pixels and numbers."""
    steps = timm_networks.TimmDescription(name).preprocess(resize, image_size)
    described = json.loads(json.dumps(steps.description))
    for image in (photographs["upright"], photographs["landscape"]):
        pixels = prepare_as_described(image, described)
        assert_array_equal(pixels, steps.prepare(np.array(image)))
    mean, std = (np.array(described[key], dtype=np.float32) for key in ("mean", "std"))
    normalized = torch.from_numpy((pixels.astype(np.float32) / 255 - mean) / std)
    assert_close(steps(image).permute(1, 2, 0), normalized, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "resize", "resize_size"),
    [
        ({"crop_mode": "center"}, "short side", 106),
        ({"crop_mode": "center", "input_size": (3, 96, 64)}, "timm's center", [106, 71]),
        ({"crop_mode": "squash", "input_size": (3, 96, 64)}, "stretch", [106, 71]),
        ({"crop_mode": "border", "crop_pct": 1.0}, "pad", [96, 96]),
        ({"crop_mode": "border"}, "timm's border", [106, 106]),
    ],
)
def test_a_description_names_how_timm_crops(changes, resize, resize_size):
    """In the words of all networks, or as timm's, where only that does it."""
    config = timm.data.resolve_data_config({"input_size": (3, 96, 96), "crop_pct": 0.9})
    steps = preprocess_like_timm(config | changes, timm.data.create_transform, "weights")
    assert steps.description["resize"] == resize
    assert steps.description["resize_size"] == resize_size
    assert ("fill" in steps.description) == (resize == "pad")


@pytest.mark.parametrize("resize", ["weights", "squash", "pad"])
@pytest.mark.parametrize("name", PREPARED)
def test_the_preprocessing_can_be_pickled(name, resize, photographs):
    """A trained classifier holds it, and may be loaded by another process."""
    steps = timm_networks.TimmDescription(name).preprocess(resize, 64)
    copy = pickle.loads(pickle.dumps(steps))
    exactly(copy(photographs["upright"]), steps(photographs["upright"]))
    assert copy.settings == steps.settings


def test_settings_tell_preprocessings_apart():
    """Rows in a cache are found by them."""
    settings = {
        timm_networks.TimmDescription(name).preprocess(resize, size).settings
        for name in PREPARED
        for resize in ("weights", "squash", "pad")
        for size in (None, 64, 96)
    }
    assert len(settings) == len(PREPARED) * 9


def test_the_network_takes_what_is_prepared():
    """One that is built for a size is built for the size that was asked for."""
    backbone = find_backbone("timm/test_vit", None, image_size=224)
    assert backbone.preprocessing.input_shape == (3, 224, 224)
    assert backbone.skeleton.patch_embed.img_size == (224, 224)
    assert find_backbone("timm/test_vit", None).skeleton.patch_embed.img_size == (160, 160)
    wide = timm_networks.TimmDescription("vit_base_patch16_sapiens2.fb").preprocess("weights", None)
    assert wide.input_shape == (3, 1024, 768)


# Files and names that only look right -----------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["base_layer.1.weight", "base_layer.1.bias", "base_layer.1.running_mean", "fc.weight"]
)
def test_a_file_must_have_every_entry(key, tmp_path):
    """Those that a new network has as zeros or ones, too, and where timm does not ask for them."""
    state = timm.create_model("dla46x_c").state_dict()
    del state[key]
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=f"does not fit timm/dla46x_c.in1k: 1 missing: {key}"):
        find_backbone("timm/dla46x_c", tmp_path / "file.pth")


def test_a_network_does_not_keep_its_file(tmp_path):
    """A pickle of it is as large as its weights."""
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "file.pth")
    backbone = find_backbone("timm/test_vit", tmp_path / "file.pth")
    network = backbone.load(CPU)
    size = sum(value.nbytes for value in network.state_dict().values())
    assert size < len(pickle.dumps(network)) < 1.2 * size
    assert len(pickle.dumps(backbone.skeleton)) < 0.2 * size


def test_a_tag_without_weights_does_not_have_those_of_another():
    """Its default weights are none."""
    with pytest.raises(ValueError, match="has no weights 'DEFAULT'"):
        find_backbone("timm/vit_huge_patch14_224.untrained")
    assert find_backbone("timm/vit_huge_patch14_224.untrained", None).name.endswith("untrained")


def test_a_name_that_timm_has_replaced_is_refused():
    """It does not have the configuration of the new one."""
    with pytest.raises(ValueError, match="There is no backbone 'timm/vit_tiny_patch16_224_in21k'"):
        find_backbone("timm/vit_tiny_patch16_224_in21k")
