"""Fine-tuning of timm's networks: the last stage, heads of timm, files, features."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import timm
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from deepfeat import (
    DeepFeatureExtractor,
    FineTuneClassifier,
    LayerNotFoundError,
    list_backbones,
)
from deepfeat._backbones.find import find_backbone
from deepfeat._backbones.timm import HubWeights
from deepfeat._finetuning.freezing import find_blocks
from deepfeat._layers.index import LayerIndex


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """Nothing here needs published weights."""
    monkeypatch.setattr(HubWeights, "state", pytest.fail)


@pytest.fixture(scope="module")
def tune(make_images):
    """Fine-tune a network of timm with random weights, with the default `unfreeze`."""

    def tune(name, side, count=8, **params):
        X, y = make_images(count, side)
        fast = {"weights": None, "image_size": side, "max_epochs": 2, "batch_size": 4}
        fast |= {"num_workers": 0, "random_state": 0, "device": "cpu"}
        fast |= {"learning_rate": 0.05, "backbone_learning_rate": 0.05, "optimizer": "sgd"}
        return FineTuneClassifier(f"timm/{name}", **fast | params).fit(X, y), X, y

    return tune


def start_of(name, side):
    """Return the state of the network before training."""
    return (
        find_backbone(f"timm/{name}", None, image_size=side).load(torch.device("cpu")).state_dict()
    )


# What is trained ----------------------------------------------------------------------------------

# Side of images, and what is trained: the last stage, what follows it, and the head.
TRAINED = {
    "test_vit.r160_in1k": (32, ("blocks.5.", "norm.", "head.")),
    "test_vit3.r160_in1k": (32, ("blocks.8.", "norm.", "fc_norm.", "attn_pool.", "head.")),
    "test_convnext.r160_in1k": (32, ("stages.3.", "norm_pre.", "head.")),
    "test_resnet.r160_in1k": (32, ("layer4.", "fc.")),
    "test_efficientnet.r160_in1k": (32, ("blocks.4.", "conv_head.", "bn2.", "classifier.")),
    "test_byobnet.r160_in1k": (32, ("stages.3.", "final_conv.", "head.")),
}
SLOW_TRAINED = {
    "deit_tiny_distilled_patch16_224": (32, ("blocks.11.", "norm.", "head.", "head_dist.")),
    "vit_small_patch14_dinov2": (28, ("blocks.11.", "norm.", "head.")),
    "vit_tiny_patch16_dinov3_qkvb": (32, ("blocks.11.", "norm.", "head.")),
    "swin_tiny_patch4_window7_224": (64, ("layers.3.", "norm.", "head.")),
    "regnetx_002": (32, ("s4.", "head.")),
    "mobilenetv3_small_050": (32, ("blocks.4.", "blocks.5.", "conv_head.", "classifier.")),
}


@pytest.mark.parametrize("augment", [None, "crop"])
@pytest.mark.parametrize(
    "name", [*TRAINED, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_TRAINED)]
)
def test_the_last_stage_is_trained_by_default(name, augment, tune, state_of):
    """And nothing else: the rest is the same to the bit, statistics of BatchNorm included."""
    side, trained = (TRAINED | SLOW_TRAINED)[name]
    before = start_of(name, side)
    classifier, _, _ = tune(name, side, augment=augment)
    after = state_of(classifier)
    changed = set()
    for key, value in after.items():
        if key not in before or value.shape != before[key].shape:
            assert key.startswith(trained), f"{key} is of another shape"
        elif torch.equal(value, before[key]):
            continue
        assert key.startswith(trained), f"{key} is not frozen"
        changed.add(key)
    kinds = dict(classifier.module_.named_parameters())
    still = {key for key in kinds if key.startswith(trained)} - changed
    assert not {key for key in still if kinds[key].ndim > 1}, "weights were not trained"
    assert before.keys() <= after.keys()


@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "test_resnet.r160_in1k"])
def test_the_default_is_the_last_stage_by_name(name, tune, state_of, assert_same_state):
    """ "last_stage" is what the default is, and what `list_layers` calls it."""
    side, _ = TRAINED[name]
    default, _, _ = tune(name, side)
    named, _, _ = tune(name, side, unfreeze="last_stage")
    stage = "stage6" if name == "test_vit.r160_in1k" else "stage5"
    listed, _, _ = tune(name, side, unfreeze=stage)
    assert_same_state(state_of(named), state_of(default))
    assert_same_state(state_of(listed), state_of(default))


def find_blocks_of(name):
    backbone = find_backbone(name, None)
    index = LayerIndex(backbone.skeleton, backbone.preprocessing.input_shape)
    return index, find_blocks(index, backbone.skeleton, "last_stage")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet50", {"layer4", "fc"}),
        ("resnet10_slim", {"layer4", "fc"}),
        ("vit_b_16", {"encoder.layers.encoder_layer_11", "encoder.ln", "heads"}),
        ("vgg16", {"features.24", "features.26", "features.28", "classifier"}),
        ("convnext_tiny", {"features.6", "features.7", "classifier"}),
        ("swin_t", {"features.6", "features.7", "norm", "head"}),
        (
            "densenet121",
            {"features.transition3", "features.denseblock4", "features.norm5", "classifier"},
        ),
        ("timm/test_vit", {"blocks.5", "norm", "head"}),
    ],
)
def test_the_last_stage_and_what_follows_are_found(name, expected):
    """It begins after the stage before, with the down-sampling between the two."""
    index, blocks = find_blocks_of(name)
    skeleton = find_backbone(name, None).skeleton
    with_weights = {
        path for path in blocks if any(True for _ in skeleton.get_submodule(path).parameters())
    }
    assert with_weights == expected
    assert index.last_stage is not None


def check_last_stage(name):
    _, blocks = find_blocks_of(name)
    skeleton = find_backbone(name, None).skeleton
    total = sum(value.numel() for value in skeleton.parameters())
    trained = sum(
        value.numel()
        for key, value in skeleton.named_parameters()
        if any(key.startswith(f"{path}." if path else "") for path in blocks)
    )
    assert 0 < trained < total


@pytest.mark.parametrize(
    "name", ["alexnet", "googlenet", "mnasnet0_5", "mobilenet_v3_small", "shufflenet_v2_x0_5"]
)
def test_a_backbone_has_a_last_stage(name):
    """It has weights, and is not the whole network."""
    check_last_stage(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", list_backbones())
def test_every_backbone_has_a_last_stage(name):
    """So that the defaults work with any name."""
    check_last_stage(name)


# Heads --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "heads"),
    [
        ("deit_tiny_distilled_patch16_224", 32, ("head", "head_dist")),
        ("vit_small_patch14_dinov2", 28, ("head",)),
        ("vit_tiny_patch16_dinov3_qkvb", 32, ("head",)),
        ("crossvit_tiny_240", 240, ("head.0", "head.1")),
    ],
)
def test_networks_with_two_heads_or_none_are_trained(name, side, heads, tune):
    """Each gets as many outputs as there are classes, and they learn to tell light from dark."""
    classifier, X, y = tune(name, side, max_epochs=8, optimizer="adamw", learning_rate=0.003)
    net = classifier.module_
    assert all(net.get_submodule(head).out_features == 2 for head in heads)
    assert classifier.predict_proba(X).shape == (8, 2)
    assert classifier.score(X, y) > 0.8
    assert classifier.history_[-1]["train_loss"] < classifier.history_[0]["train_loss"]


@pytest.mark.usefixtures("pillow_resizes")
@pytest.mark.parametrize("head", ["replace", "append"])
@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "test_convnext.r160_in1k"])
def test_logits_are_those_of_the_network_itself(name, head, tune):
    """Outside of the classifier it computes what it computed inside."""
    classifier, X, _ = tune(name, 32, head=head)
    prepare = timm.data.create_transform(
        **timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        | {"input_size": (3, 32, 32)}
    )
    batch = torch.stack([prepare(Image.fromarray(pixels)) for pixels in X])
    with torch.no_grad():
        logits = classifier.module_(batch)
    difference = (logits[:, 1] - logits[:, 0]).numpy()
    assert_allclose(classifier.decision_function(X), difference, rtol=1e-4, atol=1e-5)


# Files and features -------------------------------------------------------------------------------

QUICK_FILES = [
    ("test_vit.r160_in1k", 32),
    ("test_resnet.r160_in1k", 32),
    ("test_vit_relpos", 160),
    ("test_coatnet", 160),
]
SLOW_FILES = [
    ("deit_tiny_distilled_patch16_224", 32),
    ("vit_small_patch14_dinov2", 28),
    ("vit_tiny_patch16_dinov3_qkvb", 32),
    ("swin_tiny_patch4_window7_224", 64),
    ("levit_128s", 224),
]
ELSEWHERE = """
    import sys
    import numpy as np
    from deepfeat import FineTuneClassifier
    from deepfeat._backbones.timm import HubWeights

    def fail(self):
        raise AssertionError("the hub was asked")

    HubWeights.state = HubWeights.digest = fail
    loaded = FineTuneClassifier.load(sys.argv[1])
    np.save(sys.argv[3], loaded.predict_proba(list(np.load(sys.argv[2]))))
"""


def buffers_outside_state(net):
    state = net.state_dict()
    return {key: value for key, value in net.named_buffers() if key not in state}


@pytest.mark.parametrize(
    ("name", "side"),
    [*QUICK_FILES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_FILES)],
)
def test_a_file_holds_all_that_is_needed(name, side, tune, tmp_path, state_of, assert_same_state):
    """Probabilities are equal, as are the buffers that no state dict has."""
    classifier, X, _ = tune(name, side, 4, max_epochs=1)
    classifier.save(tmp_path / "classifier.safetensors")
    again = FineTuneClassifier.load(tmp_path / "classifier.safetensors")
    assert_same_state(state_of(again), state_of(classifier))
    assert_same_state(
        buffers_outside_state(again.module_), buffers_outside_state(classifier.module_)
    )
    assert_array_equal(again.predict_proba(X), classifier.predict_proba(X))


def test_some_networks_have_buffers_outside_their_state(tune):
    """Of which the law above says something."""
    classifier, _, _ = tune("test_vit_relpos", 160, 4, max_epochs=1)
    assert buffers_outside_state(classifier.module_)


def test_a_file_is_read_in_another_process(tune, tmp_path):
    """Without a network, with the same probabilities."""
    classifier, X, _ = tune("test_vit.r160_in1k", 32, 4)
    classifier.save(tmp_path / "classifier.safetensors")
    np.save(tmp_path / "X.npy", np.stack(X))
    names = [str(tmp_path / name) for name in ("classifier.safetensors", "X.npy", "found.npy")]
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ELSEWHERE), *names],
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
    )
    assert_array_equal(np.load(names[2]), classifier.predict_proba(X))


def test_a_file_of_published_weights_needs_no_download(tune, tmp_path, monkeypatch):
    """What was trained from "DEFAULT" is whole."""
    random, X, _ = tune("test_vit.r160_in1k", 32, 4)
    state = start_of("test_vit.r160_in1k", 32)
    sized = timm.create_model("test_vit", img_size=160).state_dict()
    for key, value in state.items():
        if value.shape != sized[key].shape:  # position embeddings
            state[key] = sized[key]
    monkeypatch.setattr(HubWeights, "state", lambda self: state)
    monkeypatch.setattr(HubWeights, "digest", property(lambda self: "digest"))
    classifier, X, _ = tune("test_vit.r160_in1k", 32, 4, weights="DEFAULT")
    classifier.save(tmp_path / "classifier.safetensors")
    monkeypatch.setattr(HubWeights, "state", pytest.fail)
    monkeypatch.setattr(HubWeights, "digest", property(pytest.fail))
    again = FineTuneClassifier.load(tmp_path / "classifier.safetensors")
    assert_array_equal(again.predict_proba(X), classifier.predict_proba(X))
    assert np.abs(again.predict_proba(X) - random.predict_proba(X)).max() > 0


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("test_vit.r160_in1k", 32),
        ("test_convnext.r160_in1k", 32),
        pytest.param("deit_tiny_distilled_patch16_224", 32, marks=pytest.mark.slow),
        pytest.param("vit_small_patch14_dinov2", 28, marks=pytest.mark.slow),
    ],
)
def test_the_features_of_a_classifier_are_what_its_head_takes(name, side, tune):
    """`to_extractor()` reads the penultimate layer of the trained network."""
    classifier, X, _ = tune(name, side)
    extractor = classifier.to_extractor().set_params(norm=None, cache=None)
    assert isinstance(extractor, DeepFeatureExtractor)
    rows = extractor.transform(X)
    net = classifier.module_
    heads = net.get_classifier()
    if isinstance(heads, tuple):
        assert rows.shape == (8, net.num_features)
        return
    with torch.no_grad():
        logits = heads(torch.from_numpy(rows)).numpy()
    expected = classifier.decision_function(X)
    assert_allclose(logits[:, 1] - logits[:, 0], expected, rtol=1e-4, atol=1e-5)


# What a review found ------------------------------------------------------------------------------


def test_all_of_a_new_head_is_trained(tune):
    """Also the norm that timm makes anew with the classifier."""
    classifier, _, _ = tune("efficientvit_m0", 224)
    state = classifier.module_.state_dict()
    assert classifier.module_.head.bn.weight.requires_grad
    assert (state["head.bn.running_mean"] != 0).any()
    assert (state["head.bn.weight"] != 1).any()


def test_a_head_is_appended_to_a_file_with_other_classes(tune, tmp_path):
    """Even if the published weights do not have a classifier; `load` finds the same layers."""
    name, file = "vit_small_patch14_dinov2.lvd142m", tmp_path / "classes.pth"
    network = timm.create_model("vit_small_patch14_dinov2", num_classes=7, img_size=28)
    torch.save(network.state_dict(), file)
    classifier, X, _ = tune(name, 28, weights=str(file), head="append", unfreeze=None)
    classifier.save(tmp_path / "classifier.safetensors")
    loaded = FineTuneClassifier.load(tmp_path / "classifier.safetensors")
    assert_array_equal(loaded.predict_proba(X), classifier.predict_proba(X))


def test_what_several_classifiers_take_is_not_a_block(tune):
    """It would be the whole network."""
    with pytest.raises(LayerNotFoundError, match=r"'penultimate' of .* is not a module"):
        tune("deit_tiny_distilled_patch16_224", 32, unfreeze="penultimate")
