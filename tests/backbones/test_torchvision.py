"""Tests of torchvision's networks: downloads, and files from before something was renamed."""

import collections
import functools
import hashlib
import http.server
import json
import re
import shutil
import threading
import urllib.parse
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision import models
from torchvision.models import SqueezeNet1_1_Weights
from torchvision.models._api import BUILTIN_MODELS

from deepfeat import list_backbones
from deepfeat._backbones import networks as building
from deepfeat._backbones import torchvision as torchvision_networks
from deepfeat._backbones.find import find_backbone

exactly = functools.partial(assert_close, rtol=0, atol=0)
CPU = torch.device("cpu")
NAME = "squeezenet1_1"
ALL_WEIGHTS = [
    (name, weights)
    for name in sorted(models.list_models(module=models))
    for weights in models.get_model_weights(name)
]

# Old files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("auxiliary", [True, False])
def test_googlenet_may_come_without_its_auxiliary_heads(
    auxiliary,
    tmp_path,
    random_state,
    load,
):
    """The heads that help in training alone are taken from a file that has them, else left out."""
    options = {"aux_logits": auxiliary, "init_weights": False}
    state = random_state("googlenet", **options)
    torch.save(state, tmp_path / "file.pth")
    module = load("googlenet", tmp_path / "file.pth")
    exactly(module.state_dict(), state)
    assert module.transform_input


def test_old_names_of_densenet_are_understood(tmp_path, random_state, load):
    """torchvision's files for DenseNet say `norm.1` for what is `norm1` today."""
    state = random_state("densenet121")
    old = {}
    for key, value in state.items():
        parts = key.split(".")
        if len(parts) > 3 and parts[-2][-1] in "12" and "denselayer" in key:
            parts[-2] = f"{parts[-2][:-1]}.{parts[-2][-1]}"
        old[".".join(parts)] = value
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "old.pth")
    exactly(load("densenet121", tmp_path / "old.pth").state_dict(), state)


def test_old_names_of_vit_are_understood(tmp_path, monkeypatch, load):
    """torchvision's files for ViT say `mlp.linear_1` for what is `mlp.0` today."""

    # torchvision reads of the annotation which weights there are.
    def small(*, weights: models.ViT_B_32_Weights | None = None, progress=True, **options):
        del weights, progress
        return models.VisionTransformer(
            patch_size=32, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, **options
        )

    small.__module__ = models.vision_transformer.__name__
    monkeypatch.setitem(BUILTIN_MODELS, "vit_b_32", small)
    building.make_skeleton.cache_clear()
    net = small(image_size=224)
    state = net.state_dict()
    old = {
        key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
        for key, value in state.items()
    }
    assert "encoder.layers.encoder_layer_1.mlp.linear_2.bias" in old
    net.load_state_dict(old)  # torchvision understands them as well
    torch.save(old, tmp_path / "old.pth")
    exactly(load("vit_b_32", tmp_path / "old.pth").state_dict(), state)
    building.make_skeleton.cache_clear()


# Downloads --------------------------------------------------------------------------------------


class Server:
    """A server of weights on the loopback address, which counts what is asked of it."""

    def __init__(self, content):
        self.content = content
        self.failure = ""
        self.paths: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer.answer(self)

            def log_message(self, *_args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever)
        self.thread.start()

    def answer(self, request):
        self.paths.append(request.path)
        request.close_connection = True
        if self.failure == "missing":
            request.send_error(404)
            return
        body = self.content
        request.send_response(200)
        if self.failure == "breaks off in a chunk":
            request.send_header("Transfer-Encoding", "chunked")
            request.end_headers()
            request.wfile.write(b"ffffff\r\n" + body[:1000])
            return
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[:1000] if self.failure == "breaks off" else body)

    def close(self):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server(state, tmp_path, monkeypatch):
    """Serve weights for a backbone under a name with their hash, as torchvision's are."""
    torch.save(state, tmp_path / "served.pth")
    server = Server((tmp_path / "served.pth").read_bytes())
    digest = hashlib.sha256(server.content).hexdigest()
    entry = SqueezeNet1_1_Weights.IMAGENET1K_V1.value
    monkeypatch.setattr(entry, "url", f"{server.url}/models/{NAME}-{digest[:8]}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    yield server
    server.close()


@pytest.fixture
def checkpoints(tmp_path):
    return tmp_path / "torch" / "hub" / "checkpoints"


def test_weights_are_downloaded_once(server, checkpoints, state, load):
    """The first use fetches the file, with a progress bar; later ones take it from the cache."""
    backbone = find_backbone(NAME)
    assert not server.paths
    exactly(backbone.load(CPU).state_dict(), state)
    backbone.load(CPU)
    building._load_cached.cache_clear()
    exactly(load(NAME).state_dict(), state)
    exactly(load(NAME, SqueezeNet1_1_Weights.IMAGENET1K_V1).state_dict(), state)
    name = Path(urllib.parse.urlsplit(SqueezeNet1_1_Weights.DEFAULT.url).path).name
    assert server.paths == [f"/models/{name}"]
    assert [path.name for path in checkpoints.iterdir()] == [name]


def test_threads_download_once(server, run_in_threads):
    """Threads that ask for the same weights at once wait for one download."""
    backbone = find_backbone(NAME)
    nets: list[nn.Module] = []
    run_in_threads(*[lambda: nets.append(backbone.load(CPU))] * 4)
    assert len(nets) == 4
    assert len(server.paths) == 1


def test_a_download_with_a_wrong_hash_is_refused(server, checkpoints, load):
    """What is not what the file's name promises is neither loaded nor kept."""
    server.content = server.content[:-100] + bytes(100)
    with pytest.raises(OSError, match=r"could not be downloaded \(invalid hash value") as caught:
        load(NAME)
    assert "SqueezeNet1_1_Weights.IMAGENET1K_V1 of squeezenet1_1" in str(caught.value)
    assert not list(checkpoints.iterdir())


@pytest.mark.parametrize("failure", ["missing", "breaks off", "breaks off in a chunk"])
def test_a_failed_download_leaves_nothing(
    failure,
    server,
    checkpoints,
    state,
    load,
):
    """Whatever happens on the way is an OSError; nothing half-written stays, and a retry works."""
    server.failure = failure
    with pytest.raises(OSError, match="could not be downloaded") as caught:
        load(NAME)
    assert f"Put {SqueezeNet1_1_Weights.DEFAULT.url} at " in str(caught.value)
    assert not list(checkpoints.iterdir())
    server.failure = ""
    exactly(load(NAME).state_dict(), state)


def test_the_advice_without_a_network_works(server, tmp_path, state, load):
    """The error says which file to put where; doing just that makes the next load work."""
    server.close()
    with pytest.raises(OSError, match="could not be downloaded") as caught:
        load(NAME)
    words = str(caught.value)
    url, place = words.partition("Put ")[2].partition(", or give ")[0].split(" at ")
    assert url == SqueezeNet1_1_Weights.DEFAULT.url
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(tmp_path / "served.pth", place)
    exactly(load(NAME).state_dict(), state)
    # The other way out that it names:
    exactly(load(NAME, tmp_path / "served.pth").state_dict(), state)
    # And the backbone that needs no network:
    (offered,) = set(re.findall(r"'(\w+)'", words)) & set(list_backbones())
    load(offered)
    assert not server.paths


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>", None])
def test_a_damaged_file_in_the_cache_is_named(content, server, checkpoints, load):
    """A file that was put there by hand, and broke, has an error that says which one it is."""
    checkpoints.mkdir(parents=True)
    file = checkpoints / SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2]
    file.write_bytes(server.content[:5000] if content is None else content)
    with pytest.raises(OSError, match="does not hold the weights") as caught:
        load(NAME)
    assert f"{file} does not hold" in str(caught.value)
    assert f"Put {SqueezeNet1_1_Weights.DEFAULT.url} at {file}" in str(caught.value)
    assert not server.paths


def test_a_folder_that_cannot_be_written_is_named(
    server,
    tmp_path,
    monkeypatch,
    state,
    load,
):
    """Where torchvision's cache cannot be made, the error says so and names a way out."""
    blocked = tmp_path / "blocked"
    blocked.write_bytes(b"")  # a file where the folder should be stops even an administrator
    monkeypatch.setenv("TORCH_HOME", str(blocked))
    with pytest.raises(OSError, match="could not be downloaded") as caught:
        load(NAME)
    assert "blocked" in str(caught.value)
    assert "give the path of such a file as weights=" in str(caught.value)
    exactly(load(NAME, tmp_path / "served.pth").state_dict(), state)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_that_were_trained_on_other_inputs_rescale_them(name):
    """These two were published elsewhere first, for images scaled to [-1, 1]."""
    with building.Building(None, meta=True):
        state = torchvision_networks.build(name, None).state_dict()
    assert torchvision_networks.load(name, None, state).transform_input is True


def test_every_weights_file_has_its_hash_in_its_name():
    """torchvision checks a download against its name, so each of the 115 names has a hash."""
    for name, weights in ALL_WEIGHTS:
        file = weights.url.rpartition("/")[2]
        assert torch.hub.HASH_REGEX.search(file), (name, file)
        assert len(torch.hub.HASH_REGEX.search(file).group(1)) >= 8, (name, file)


def test_the_published_weights_of_every_model_are_its_own():
    """No two weights share a file, so the address of one tells it from all others."""
    urls = collections.Counter(weights.url for _, weights in ALL_WEIGHTS)
    assert json.dumps([url for url, count in urls.items() if count > 1]) == "[]"
