"""Extraction with networks of timm by name: against a bare loop, in processes, by default."""

import json
import os
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import timm
import timm.data
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import normalize

from deepfeat import DeepFeatureExtractor, FeatureCache, list_backbones, list_layers
from deepfeat._backbones.find import find_backbone
from deepfeat._layers.index import LayerIndex

VIT = "timm/test_vit.r160_in1k"


def make(backbone=VIT, layer="penultimate", **params):
    """Make a fast extractor, which computes every row anew unless it is given a cache."""
    fast = {"weights": None, "num_workers": 0, "cache": None}
    return DeepFeatureExtractor(backbone, layer, **fast | params)


# Against a bare loop ------------------------------------------------------------------------------


@pytest.fixture
def rows_by_hand(write_timm, scene_paths):
    """Do with timm and torch what the extractor promises; return the file of weights, too."""

    def rows_by_hand(name, read, **options):
        net, path = write_timm(name)
        config = timm.data.resolve_data_config(model=net)
        if "img_size" in options:
            config["input_size"] = (3, options["img_size"], options["img_size"])
            overlay = {"file": str(path)}
            net = timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay=overlay, **options
            )
            net.eval()
        prepare = timm.data.create_transform(**config)
        rows = []
        for file in scene_paths[:4]:
            with Image.open(file) as image, torch.no_grad():
                batch = prepare(image.convert("RGB"))[None]
                rows.append(read(net, batch)[0].numpy())
        return np.array(rows), path

    return rows_by_hand


def pre_logits(net, batch):
    return net.forward_head(net.forward_features(batch), pre_logits=True)


def mean_of_last(net, batch):
    (maps,) = net.forward_intermediates(batch, indices=1, norm=False, intermediates_only=True)
    return maps.mean((2, 3))


def class_token(net, batch):
    return net.forward_features(batch)[:, 0]


@pytest.mark.usefixtures("pillow_resizes")
@pytest.mark.parametrize(
    ("name", "layer", "pooling", "read", "options"),
    [
        ("test_vit", "penultimate", "avg", pre_logits, {}),
        ("test_vit", "blocks.5", "avg", mean_of_last, {}),
        ("test_vit", "norm", "cls", class_token, {}),
        ("test_vit", "norm", "cls", class_token, {"img_size": 96}),
        ("test_vit3", "penultimate", "avg", pre_logits, {"img_size": 64}),
        ("test_convnext", "stage4", "avg", mean_of_last, {}),
        ("test_convnext", "penultimate", "avg", pre_logits, {}),
        ("test_resnet", "layer4", "avg", mean_of_last, {}),
        ("test_efficientnet", "penultimate", "avg", pre_logits, {}),
        ("test_nfnet", "penultimate", "avg", pre_logits, {}),
        ("test_vit", -1, "avg", lambda net, batch: net(batch), {}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_rows_are_those_of_a_bare_loop(
    name, layer, pooling, read, options, rows_by_hand, scene_paths
):
    """The same pixels, network and pooling: timm's transform, model and forward."""
    expected, path = rows_by_hand(name, read, **options)
    params = {"weights": path, "pooling": pooling, "image_size": options.get("img_size")}
    rows = make(f"timm/{name}", layer, norm=None, **params).transform(scene_paths[:4])
    assert_allclose(rows, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    unit = make(f"timm/{name}", layer, **params).transform(scene_paths[:4])
    assert_allclose(unit, normalize(expected), rtol=1e-4, atol=1e-5)


# Defaults -----------------------------------------------------------------------------------------


def test_a_search_over_backbones_works_by_default(pictures, count_images):
    """The default layer fits each: one line of a grid compares networks of two libraries."""
    y = np.arange(len(pictures)) % 2
    pipe = make_pipeline(
        DeepFeatureExtractor(weights=None), LogisticRegression(C=100, max_iter=1000)
    )
    grid = {"deepfeatureextractor__backbone": ["resnet10_slim", VIT, "timm/test_convnext"]}
    seen = count_images(timm.models.VisionTransformer)
    search = GridSearchCV(pipe, grid, cv=2, error_score="raise").fit(pictures, y)
    assert len(search.cv_results_["mean_test_score"]) == 3
    assert search.best_score_ > 0.9
    assert search.predict(pictures).shape == (16,)
    assert sum(seen) <= len(pictures)  # an earlier test may have filled the cache of the process


def check_default_layer(name):
    backbone = find_backbone(name, None)
    index = LayerIndex(backbone.skeleton, backbone.preprocessing.input_shape)
    layer = index.resolve("penultimate")
    assert layer.output_shape
    extractor = DeepFeatureExtractor(name, weights=None)
    names = extractor.get_feature_names_out()
    assert names[0].startswith("penultimate_0")
    assert len(names) > 1


def test_the_default_layer_is_listed():
    """Under its name, or as another name of a layer."""
    for name in ("vgg16", "resnet10_slim", VIT, "timm/test_convnext"):
        entries = list_layers(name)
        named = [entry for entry in entries if "penultimate" in (entry.name, *entry.aliases)]
        assert len(named) == 1


@pytest.mark.parametrize("name", ["alexnet", "densenet121", "squeezenet1_0", "vit_b_32", VIT])
def test_the_default_layer_of_a_backbone_is_found(name):
    """Without any weights."""
    check_default_layer(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", list_backbones())
def test_the_default_layer_of_every_backbone_is_found(name):
    """Of each name that is listed."""
    check_default_layer(name)


# Processes ----------------------------------------------------------------------------------------


def test_a_pickle_holds_no_weights(pictures):
    """The name is enough, also after rows were computed; another process draws the same."""
    extractor = make().fit(pictures)
    rows = extractor.transform(pictures)
    pickled = pickle.dumps(extractor)
    assert len(pickled) < 10_000
    assert_array_equal(pickle.loads(pickled).transform(pictures), rows)
    assert_array_equal(clone(extractor).transform(pictures), rows)


@pytest.mark.slow
def test_jobs_do_not_change_scores(pictures, tmp_path):
    """Folds in two processes, with a cache on disk and without one."""
    y = np.arange(len(pictures)) % 2
    scores = {}
    for n_jobs in (1, 2):
        for cache in (None, str(tmp_path / "cache")):
            pipe = make_pipeline(make(image_size=32, cache=cache), LogisticRegression(C=10))
            scores[n_jobs, cache] = cross_val_score(
                pipe, pictures, y, cv=3, n_jobs=n_jobs, error_score="raise"
            )
    first, *others = scores.values()
    assert first.max() > 0.5
    for other in others:
        assert_allclose(other, first)


CLIENT = """
    import json, sys
    import numpy as np
    import timm
    from deepfeat import DeepFeatureExtractor

    seen = []
    forward = timm.models.VisionTransformer.forward

    def counted(self, x, *args, **options):
        if x.device.type != "meta":
            seen.append(len(x))
        return forward(self, x, *args, **options)

    timm.models.VisionTransformer.forward = counted
    params = json.loads(sys.argv[1])
    extractor = DeepFeatureExtractor(**params, weights=None, image_size=32, num_workers=0)
    rows = extractor.fit_transform(np.load(sys.argv[2]))
    np.save(sys.argv[3], rows)
    print(json.dumps(sum(seen)))
"""


def test_processes_share_a_cache_on_disk(pictures, tmp_path):
    """The second runs no network: not for the same layer, nor for one that came along."""
    np.save(tmp_path / "X.npy", pictures)

    def run(**params):
        params |= {"backbone": VIT, "cache": str(tmp_path / "cache")}
        files = [str(tmp_path / "X.npy"), str(tmp_path / "rows.npy")]
        command = [sys.executable, "-c", textwrap.dedent(CLIENT), json.dumps(params), *files]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ})
        return json.loads(done.stdout), np.load(files[1])

    count, rows = run(layer=["stage5", "penultimate"], pooling=["cls", "avg"])
    assert count == len(pictures)
    again, same = run(layer=["penultimate", "stage5"], pooling=["avg", "cls"])
    assert again == 0
    # stage5 is cls, avg and then the vector; the other way round it is vector, avg, cls.
    assert_array_equal(same, np.hstack([rows[:, 128:], rows[:, 64:128], rows[:, :64]]))


def test_networks_of_two_libraries_share_one_cache(pictures):
    """Their rows are not mixed up, although both have a `layer3`."""
    cache = FeatureCache()
    for name in ("resnet18", "timm/resnet18", "timm/test_resnet"):
        for _ in range(2):
            found = make(name, "layer3", image_size=32, cache=cache).transform(pictures[:4])
            expected = make(name, "layer3", image_size=32).transform(pictures[:4])
            assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_another_seed_gives_other_rows(pictures):
    """Random weights are drawn from `random_state` alone."""
    rows = {seed: make(image_size=32, random_state=seed).transform(pictures) for seed in (0, 1)}
    assert np.abs(rows[0] - rows[1]).max() > 1e-3
    torch.manual_seed(7)
    assert_array_equal(make(image_size=32, random_state=1).transform(pictures), rows[1])
