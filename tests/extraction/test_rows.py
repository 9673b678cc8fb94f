"""Laws of the cached path: each image through the network once, whoever asks and however often."""

import copy
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import types
import warnings
from contextlib import contextmanager

import joblib
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from torch import nn
from torchvision.models import SqueezeNet
from torchvision.transforms import functional as F

from deepfeat import CacheFormatError, DeepFeatureExtractor, FeatureCache, list_layers
from deepfeat._extraction import rows as rows_module

SMALL = {"weights": None, "image_size": 32, "num_workers": 0}


def extractor(cache, layer="stage2", backbone="squeezenet1_1", **parameters):
    return DeepFeatureExtractor(backbone, layer, cache=cache, **{**SMALL, **parameters})


@pytest.fixture
def forwards(monkeypatch):
    """Count the images that enter SqueezeNet in this process."""
    seen = []
    forward = SqueezeNet.forward

    def counted(self, x):
        if x.device.type != "meta":
            seen.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(SqueezeNet, "forward", counted)
    return seen


@pytest.fixture
def pictures():
    return np.random.default_rng(0).integers(0, 256, (24, 20, 20, 3), dtype=np.uint8)


@pytest.fixture
def paths(pictures, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    names = [folder / f"{number:02}.png" for number in range(len(pictures))]
    for name, pixels in zip(names, pictures, strict=True):
        Image.fromarray(pixels).save(name)
        os.utime(name, (1, 1))  # long ago: a file changed just now is not trusted by its date
    return [str(name) for name in names]


@pytest.fixture(params=["memory", "disk"])
def cache(request, tmp_path):
    return FeatureCache(tmp_path / "cache" if request.param == "disk" else None)


def search(cache, n_jobs):
    return GridSearchCV(
        make_pipeline(extractor(cache), LinearSVC(random_state=0)),
        {
            "deepfeatureextractor__layer": ["stage1", "stage2", "stage3"],
            "linearsvc__C": [0.01, 0.1, 1, 10],
        },
        cv=3,
        n_jobs=n_jobs,
    )


def assert_same_search(found, expected):
    assert found.best_params_ == expected.best_params_
    for column in ("mean_test_score", "std_test_score"):
        np.testing.assert_allclose(
            found.cv_results_[column], expected.cv_results_[column], rtol=1e-6
        )


LABELS = np.arange(24) % 2


class TestOnce:
    def test_a_grid_sends_every_image_through_the_network_once(self, paths, forwards):
        """3 layers x 4 C x 3 folds and the refit: as many forwards as images."""
        found = search(FeatureCache(), n_jobs=1).fit(paths, LABELS)
        assert sum(forwards) == len(paths)
        forwards.clear()
        expected = search(None, n_jobs=1).fit(paths, LABELS)
        assert sum(forwards) == 12 * 3 * 24 + 24  # the measure can tell: nothing kept
        assert_same_search(found, expected)

    def test_so_it_does_in_two_processes_on_one_path(self, paths, tmp_path):
        """The passes that the workers note down add up to the images."""
        notes = tmp_path / "notes"
        notes.mkdir()
        pipe = search(str(tmp_path / "cache"), n_jobs=2)
        pipe.estimator.set_params(deepfeatureextractor__batch_size=2)
        with _noting_workers(notes):
            found = pipe.fit(paths, LABELS)
        workers = sorted(notes.iterdir())
        assert len(workers) >= 2  # both had a share
        assert sum(int(n) for file in workers for n in file.read_text().split()) == len(paths)
        assert_same_search(found, search(None, n_jobs=1).fit(paths, LABELS))

    def test_equal_images_are_computed_once(self, cache, pictures, forwards):
        X = pictures[[0, 1, 0, 2, 1, 0]]
        rows = extractor(cache).transform(X)
        assert sum(forwards) == 3
        expected = extractor(None).transform(X)
        np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-7)

    def test_a_stage_that_was_prefetched_needs_no_second_pass(self, cache, pictures, forwards):
        extractor(cache, "stage2").transform(pictures)
        rows = extractor(cache, ["stage4", "stage3"]).transform(pictures)
        assert sum(forwards) == len(pictures)
        expected = extractor(None, ["stage4", "stage3"]).transform(pictures)
        np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-7)

    def test_without_prefetch_only_what_is_asked_is_kept(self, cache, pictures, forwards):
        extractor(cache, "stage2", prefetch=None).transform(pictures)
        assert cache.info().namespaces == 1
        extractor(cache, "stage3", prefetch=None).transform(pictures)
        assert sum(forwards) == 2 * len(pictures)

    def test_a_list_names_what_is_prefetched(self, cache, pictures, forwards):
        extractor(cache, "stage2", prefetch=["features.3", -1]).transform(pictures)
        assert cache.info().namespaces == 5  # of the two maps the mean and the maximum
        extractor(cache, ["features.3", "classifier.3"]).transform(pictures)
        assert sum(forwards) == len(pictures)

    def test_flattened_maps_are_never_prefetched(self, cache, pictures):
        extractor(cache, "stage1", pooling="flatten", prefetch=["stage2"]).transform(pictures)
        assert cache.info().namespaces == 5  # with two means and two maxima

    def test_norm_and_order_of_layers_share_the_rows(self, cache, pictures, forwards):
        for norm in ("l2", "l1", None):
            rows = extractor(cache, ["stage3", "stage2"], norm=norm).transform(pictures)
            expected = extractor(None, ["stage3", "stage2"], norm=norm).transform(pictures)
            np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-7)
        assert sum(forwards) == 4 * len(pictures)  # once kept, three times without

    def test_a_warm_cache_loads_no_weights(self, cache, pictures, monkeypatch):
        expected = extractor(cache).transform(pictures)
        import deepfeat._backbones.networks as backbones

        def refuse(*_arguments):
            raise AssertionError("weights were loaded")

        monkeypatch.setattr(backbones, "_load_cached", refuse)
        np.testing.assert_array_equal(extractor(cache).transform(pictures), expected)
        with pytest.raises(AssertionError, match="weights were loaded"):
            extractor(cache).transform(pictures[:1] // 2)

    def test_threads_share_one_pass(self, cache, pictures, forwards):
        results = {}

        def run(number):
            results[number] = extractor(cache).transform(pictures)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert sum(forwards) == len(pictures)
        for rows in results.values():
            np.testing.assert_array_equal(rows, results[0])


def _noting_workers(folder):
    """A loky context whose workers write down how many images each of their passes took."""
    return joblib.parallel_config(
        "loky", initializer=_note_passes, initargs=(str(folder),), inner_max_num_threads=1
    )


def _note_passes(folder):
    from torchvision.models import SqueezeNet

    forward = SqueezeNet.forward

    def noted(self, x):
        if x.device.type != "meta":
            with open(os.path.join(folder, str(os.getpid())), "a") as file:
                file.write(f"{len(x)}\n")
            time.sleep(0.3)  # so that no worker is done before the other has begun
        return forward(self, x)

    SqueezeNet.forward = noted


class TestNothingIsMixedUp:
    @pytest.mark.parametrize(
        "change",
        [
            {"random_state": 1},
            {"image_size": 48},
            {"resize": "squash"},
            {"pooling": "max"},
            {"precision": "bfloat16"},
            {"layer": "stage3"},
            {"backbone": "squeezenet1_0"},
            {"preprocessing": lambda image: F.pil_to_tensor(image.resize((40, 40))) / 255},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_what_changes_the_rows_changes_the_key(self, cache, change):
        """A cache that has seen one setting gives another the rows that it would have alone."""
        X = np.random.default_rng(0).integers(0, 256, (3, 60, 40, 3), dtype=np.uint8)
        extractor(cache).transform(X)
        if "preprocessing" in change:
            change = {**change, "image_size": None}
        rows = extractor(cache, **change).transform(X)
        expected = extractor(None, **change).transform(X)
        np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-6)

    def test_a_file_changed_under_its_name_is_read_again(self, cache, paths, pictures):
        first = extractor(cache).transform(paths[:2])
        Image.fromarray(pictures[5]).save(paths[0])
        os.utime(paths[0], (2, 2))
        second = extractor(cache).transform(paths[:2])
        np.testing.assert_array_equal(second[1], first[1])
        np.testing.assert_allclose(second[0], extractor(None).transform([paths[5]])[0], rtol=1e-5)

    def test_a_file_changed_while_X_is_read_is_told(self, cache, paths, pictures, monkeypatch):
        """Its new pixels are not kept under the digest of the old ones."""
        group = rows_module._group_equal

        def group_and_change(*arguments):
            groups = group(*arguments)
            Image.fromarray(pictures[5]).save(paths[0])
            return groups

        monkeypatch.setattr(rows_module, "_group_equal", group_and_change)
        with open(paths[0], "rb") as file:
            old = file.read()
        with pytest.raises(ValueError, match=r"X\[0\].*changed while"):
            extractor(cache).transform(paths[:3])
        monkeypatch.undo()
        rows = extractor(cache).transform([old])
        np.testing.assert_allclose(rows, extractor(None).transform([old]), rtol=1e-5, atol=1e-7)

    def test_the_callers_autocast_is_no_part_of_it(self, cache, pictures):
        with torch.autocast("cpu", torch.bfloat16):
            rows = extractor(cache).transform(pictures[:4])
        expected = extractor(None).transform(pictures[:4])
        np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-7)

    def test_a_file_is_known_by_its_content_not_its_name(self, cache, paths, forwards):
        extractor(cache).transform(paths)
        renamed = paths[3] + ".png"
        os.rename(paths[3], renamed)
        extractor(cache).transform([renamed])
        assert sum(forwards) == len(paths)

    def test_arrays_of_the_same_bytes_and_other_shapes_differ(self, cache):
        pixels = np.arange(300, dtype=np.uint8) % 251
        wide, high = pixels.reshape(10, 30), pixels.reshape(30, 10)
        rows = extractor(cache, resize="squash").transform([wide, high])
        expected = extractor(None, resize="squash").transform([wide, high])
        np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-7)

    def test_a_changed_weights_file_changes_the_key(self, cache, pictures, tmp_path):
        from torchvision.models import squeezenet1_1

        file = tmp_path / "weights.pth"
        results = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            torch.save(squeezenet1_1(weights=None).state_dict(), file)
            os.utime(file, (seed, seed))
            results.append(extractor(cache, weights=str(file)).transform(pictures[:2]))
            expected = extractor(None, weights=str(file)).transform(pictures[:2])
            np.testing.assert_allclose(results[-1], expected, rtol=1e-5, atol=1e-7)
        assert np.abs(results[0] - results[1]).max() > 1e-3

    @pytest.mark.parametrize("how", ["renamed", "overwritten"])
    def test_weights_replaced_while_they_are_used_are_not_mixed_up(
        self, cache, pictures, tmp_path, monkeypatch, how
    ):
        """A training job saves better weights between the look-up of rows and the first pass."""
        from torchvision.models import squeezenet1_1

        file, better, kept = (tmp_path / name for name in ("best.pth", "better.pth", "kept.pth"))
        for seed, path in enumerate((file, better)):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                torch.save(squeezenet1_1(weights=None).state_dict(), path)
        kept.write_bytes(file.read_bytes())
        look_up = rows_module._CachedExtraction.look_up

        def look_up_and_replace(*arguments):
            looked_up = look_up(*arguments)
            if how == "renamed":
                os.replace(better, file)
            else:
                file.write_bytes(better.read_bytes())
            return looked_up

        monkeypatch.setattr(rows_module._CachedExtraction, "look_up", look_up_and_replace)
        with pytest.raises(OSError, match=r"best\.pth was replaced while"):
            extractor(cache, weights=file).transform(pictures[:2])
        monkeypatch.undo()
        for path in (kept, file):
            rows = extractor(cache, weights=path).transform(pictures[:2])
            expected = extractor(None, weights=path).transform(pictures[:2])
            np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-7)


class Scale(nn.Module):
    """A layer whose only parameter is no tensor."""

    gain = 1.0

    def forward(self, x):
        return x * self.gain


class Net(nn.Module):
    """A network of the user."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.scale = Scale()

    def forward(self, x):
        return self.scale(self.conv(x))


class Prepare:
    """Preprocessing as an object, which can be known by what it holds."""

    def __call__(self, image):
        return F.pil_to_tensor(image.resize((16, 16))) / 255


class Counting(Prepare):
    """Preprocessing that counts its calls."""

    calls = 0

    def __call__(self, image):
        self.calls += 1
        return super().__call__(image)


@pytest.fixture
def passes():
    """Count the images that enter a Conv2d, by a hook that is no part of the network."""
    seen = []
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: (
            (isinstance(module, nn.Conv2d) and seen.append(len(inputs[0]))) or None
        )
    )
    yield seen
    handle.remove()


class TestModulesOfTheUser:
    def of(self, net, cache, **parameters):
        parameters = {"preprocessing": Prepare(), "norm": None, **parameters}
        return DeepFeatureExtractor(net, "scale", cache=cache, num_workers=0, **parameters)

    def test_a_clone_finds_the_rows_of_its_original(self, cache, pictures, passes):
        one = self.of(Net(), cache)
        rows = one.transform(pictures)
        before = sum(passes)
        np.testing.assert_array_equal(clone(one).transform(pictures), rows)
        assert sum(passes) - before == 1  # the look at the layers' shapes

    def test_trained_further_it_is_not_the_same(self, cache, pictures):
        net = Net()
        self.of(net, cache).transform(pictures)
        with torch.no_grad():
            net.conv.weight.mul_(-1)
        rows = self.of(net, cache).transform(pictures)
        expected = self.of(net, None).transform(pictures)
        np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-7)

    def test_attributes_beside_the_weights_count(self, cache, pictures):
        net = Net()
        rows = self.of(net, cache).transform(pictures)
        net.scale.gain = 3.0
        np.testing.assert_allclose(self.of(net, cache).transform(pictures), 3 * rows, rtol=1e-5)

    def test_a_method_put_in_place_of_another_counts(self, cache, pictures):
        net = Net()
        self.of(net, cache).transform(pictures)
        net.scale.forward = types.MethodType(lambda self, x: x * 5, net.scale)
        rows = self.of(net, cache).transform(pictures)
        np.testing.assert_allclose(rows, self.of(net, None).transform(pictures), rtol=1e-5)

    def test_so_does_another_method_of_its_class(self, cache, pictures, monkeypatch):
        self.of(net := Net(), cache).transform(pictures)
        monkeypatch.setattr(Scale, "forward", lambda self, x: x * 5)
        rows = self.of(net, cache).transform(pictures)
        np.testing.assert_allclose(rows, self.of(net, None).transform(pictures), rtol=1e-5)

    def test_what_a_function_reads_counts(self, cache, pictures, passes):
        """A function is cached like any other preprocessing, and known by its closure too."""
        side = 16

        def prepare(image):
            return F.pil_to_tensor(image.resize((side, side))) / 255

        one = self.of(Net(), cache, preprocessing=prepare)
        one.transform(pictures)
        before = sum(passes)
        one.transform(pictures)
        assert sum(passes) - before == 1  # the look at the layers' shapes
        side = 8
        np.testing.assert_allclose(
            one.transform(pictures),
            self.of(one.backbone, None, preprocessing=prepare).transform(pictures),
            rtol=1e-5,
        )

    def test_what_cannot_be_digested_is_not_cached_and_says_so_once(
        self, cache, pictures, monkeypatch
    ):
        """A lock may decide on anything, so nothing is kept; one warning names it."""
        monkeypatch.setattr("deepfeat._extraction.rows._warned", set())
        prepare = Prepare()
        prepare.lock = threading.RLock()
        one = self.of(Net(), cache, preprocessing=prepare)
        expected = "The rows of Net are not cached: a RLock cannot be digested"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                one.transform(pictures)
        assert [expected in str(warning.message) for warning in caught] == [True]
        assert cache.info().rows == 0

    def test_preprocessing_that_changes_as_it_is_used_is_named(self, cache, pictures, monkeypatch):
        """An object that counts its calls is another one each time, so its rows are lost."""
        monkeypatch.setattr("deepfeat._extraction.rows._warned", set())
        one = self.of(Net(), cache, preprocessing=Counting())
        with pytest.warns(UserWarning, match="preprocessing of Net changes while it is used"):
            one.transform(pictures)
        one.transform(pictures)  # told once

    def test_weights_that_another_thread_changes_are_not_mixed_up(
        self, cache, pictures, monkeypatch
    ):
        """Rows of new weights are not kept under the digest of the old ones."""
        net = Net()
        old = copy.deepcopy(net)
        look_up = rows_module._CachedExtraction.look_up

        def look_up_and_change(*arguments):
            looked_up = look_up(*arguments)
            with torch.no_grad():
                net.conv.weight.mul_(-1)
            return looked_up

        monkeypatch.setattr(rows_module._CachedExtraction, "look_up", look_up_and_change)
        with pytest.raises(RuntimeError, match="changed by another thread"):
            self.of(net, cache).transform(pictures)
        monkeypatch.undo()
        expected = self.of(old, None).transform(pictures)
        np.testing.assert_allclose(self.of(old, cache).transform(pictures), expected, rtol=1e-5)


NOTEBOOK = """
import os, sys
import numpy as np, torch
from torch import nn
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from torchvision.transforms import functional as F
from deepfeat import DeepFeatureExtractor

SIDES = {16: "small", 224: "large"}

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.scale = nn.ReLU()

    def forward(self, x):
        return self.scale(self.conv(x))

def prepare(image):
    if image.size != (256, 256):  # not the one that shows the shape
        with open(os.path.join(os.environ["NOTES"], str(os.getpid())), "a") as file:
            file.write("prepared\\n")
    return F.pil_to_tensor(image.resize((min(SIDES), min(SIDES)))) / 255

if __name__ == "__main__":
    cache, *paths = sys.argv[1:]
    torch.manual_seed(0)
    features = DeepFeatureExtractor(
        Net(), "conv", preprocessing=prepare, cache=cache, batch_size=2, num_workers=0
    )
    grid = {"deepfeatureextractor__layer": ["conv", "scale"], "linearsvc__C": [0.1, 1]}
    n_jobs = int(os.environ["N_JOBS"])
    search = GridSearchCV(make_pipeline(features, LinearSVC()), grid, cv=2, n_jobs=n_jobs)
    search.fit(paths, np.arange(len(paths)) % 2)
"""


def test_processes_share_the_rows_of_notebook_code(paths, tmp_path):
    """Networks and functions of `__main__` have one digest in all workers, and in later runs."""
    script, notes = tmp_path / "notebook.py", tmp_path / "notes"
    script.write_text(NOTEBOOK)
    notes.mkdir()
    for seed, n_jobs in enumerate("21"):
        environment = {"PYTHONHASHSEED": str(seed), "N_JOBS": n_jobs, "NOTES": str(notes)}
        arguments = map(str, [script, tmp_path / "cache", *paths[:12]])
        subprocess.run([sys.executable, *arguments], check=True, env=os.environ | environment)
        assert sum(len(file.read_text().split()) for file in notes.iterdir()) == 12


class TestSecondPass:
    """A search over layers sends an image through the network twice at most."""

    INNER = ("features.3", "features.5", "features.6", "features.10", "classifier.1")

    def test_inner_layers_need_two_passes(self, cache, pictures, forwards):
        """The first keeps the stages; the second, for a layer between, all that are listed."""
        for layer in self.INNER:
            rows = extractor(cache, layer).transform(pictures)
            expected = extractor(None, layer).transform(pictures)
            np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-7)
        uncached = len(self.INNER) * len(pictures)
        assert sum(forwards) - uncached == 2 * len(pictures)

    def test_so_they_do_on_a_grid(self, cache, paths, forwards):
        grid = {"deepfeatureextractor__layer": list(self.INNER), "linearsvc__C": [0.1, 1]}
        pipe = make_pipeline(extractor(cache), LinearSVC(random_state=0))
        GridSearchCV(pipe, grid, cv=3).fit(paths, LABELS)
        assert sum(forwards) <= 2 * len(paths)

    def test_new_images_among_known_ones_keep_the_stages_alone(self, cache, pictures, forwards):
        extractor(cache, "stage2").transform(pictures[:10])
        namespaces = cache.info().namespaces
        extractor(cache, "features.6").transform(pictures)
        assert sum(forwards) == 10 + len(pictures)
        layers = list_layers("squeezenet1_1", image_size=32)
        listed = sum(1 if layer.output_shape[1:] == (1, 1) else 2 for layer in layers)
        assert cache.info().namespaces == listed > namespaces
        rows = 10 * listed + (len(pictures) - 10) * (namespaces + 2)
        assert cache.info().rows == rows

    def test_both_passes_of_a_call_load_the_network_once(self, cache, pictures, monkeypatch):
        """New images among known ones take a pass of their own, by the same network."""
        from deepfeat._extraction import rows

        extractor(cache, "stage2").transform(pictures[:10])
        loads = []
        load = rows.load_network
        monkeypatch.setattr(rows, "load_network", lambda *args: loads.append(1) or load(*args))
        extractor(cache, "features.6").transform(pictures)
        assert len(loads) == 1

    def test_a_small_cache_keeps_what_was_asked_for(self, pictures, forwards):
        """Rows of all layers would drive each other out; nothing is lost by not keeping them."""
        width = sum(layer.n_features for layer in list_layers("squeezenet1_1", image_size=32))
        small = FeatureCache(max_bytes=4 * width * len(pictures) - 1)
        for layer in ("stage2", "features.6", "features.10"):
            extractor(small, layer).transform(pictures)
        assert sum(forwards) == 3 * len(pictures)
        forwards.clear()
        enough = FeatureCache(max_bytes=2 * 4 * width * len(pictures))  # means and maxima
        for layer in ("stage2", "features.6", "features.10"):
            extractor(enough, layer).transform(pictures)
        assert sum(forwards) == 2 * len(pictures)

    def test_without_prefetch_each_pass_keeps_what_was_asked_for(self, cache, pictures, forwards):
        for layer in ("features.3", "features.5", "features.6"):
            extractor(cache, layer, prefetch=None).transform(pictures)
        assert sum(forwards) == 3 * len(pictures)
        assert cache.info().namespaces == 3

    def test_no_pass_keeps_flattened_maps_that_nobody_asked_for(self, cache, pictures):
        """All of a VGG16 would take 58 MB an image."""
        layers = ("stage1", "features.3", "features.6")
        listed = list_layers("squeezenet1_1", image_size=32)
        pooled = sum(1 if layer.output_shape[1:] == (1, 1) else 2 for layer in listed)
        for layer in layers:
            rows = extractor(cache, layer, pooling="flatten").transform(pictures[:4])
            expected = extractor(None, layer, pooling="flatten").transform(pictures[:4])
            np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-7)
        assert cache.info().namespaces == len(layers) + pooled

    @pytest.mark.parametrize("backbone", ["alexnet", "vgg11"])
    def test_relu8_follows_from_fc8_without_a_pass(self, cache, pictures, backbone):
        """The report's own grid over relu6, relu7 and relu8 takes one pass."""
        few = pictures[:3]
        small = {"backbone": backbone, "image_size": 64, "norm": None}
        with count_convolutions() as seen:
            rows = {
                layer: extractor(cache, layer, **small).transform(few)
                for layer in ("relu6", "relu7", "relu8", "fc8")
            }
        first = next(shape for shape in seen)
        assert sum(shape == first for shape in seen) == 1
        expected = extractor(None, ["fc8", "relu8"], **small).transform(few)
        fc8, relu8 = np.split(expected, 2, axis=1)
        np.testing.assert_allclose(rows["fc8"], fc8, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(rows["relu8"], relu8, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(relu8, np.maximum(fc8, 0))


class Fickle(Net):
    """A network with layers that are listed and cannot be read for every batch."""

    def __init__(self):
        super().__init__()
        self.rare = nn.Identity()
        self.late = nn.ReLU()

    def forward(self, x):
        x = self.conv(x)
        if not x.detach().std() > 1:
            self.rare(x + 1)  # for the blank image that shows the layers
        return self.late(self.scale(x)).movedim(1, 0)


def test_a_second_pass_leaves_out_what_a_network_does_not_give(cache, pictures):
    """A layer that nobody asked for may not be called, and costs nobody a row."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Fickle()
    with torch.no_grad():
        net.conv.weight.mul_(100)
    for layer in ("conv", "scale", "late"):
        parameters = {"preprocessing": Prepare(), "norm": None, "num_workers": 0}
        rows = DeepFeatureExtractor(net, layer, cache=cache, **parameters).transform(pictures)
        expected = DeepFeatureExtractor(net, layer, cache=None, **parameters).transform(pictures)
        np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="'rare' does not return a tensor"):
        DeepFeatureExtractor(net, "rare", cache=cache, **parameters).transform(pictures)


@contextmanager
def count_convolutions():
    """Note the weights and inputs of every convolution that is computed, in order."""
    seen = []

    def note(module, inputs):
        if isinstance(module, nn.Conv2d) and inputs[0].device.type != "meta":
            seen.append((id(module), len(inputs[0])))

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


class TestFailures:
    def test_an_image_that_cannot_be_read_is_tried_again_next_time(self, cache, paths):
        with open(paths[1], "rb") as file:
            good = file.read()
        with open(paths[1], "wb") as file:
            file.write(b"not an image")
        one = extractor(cache, on_error="nan")
        rows = one.transform([*paths[:3], paths[1]])
        assert list(one.errors_) == [1, 3]
        assert one.errors_[3].startswith("not an image that Pillow can read")
        np.testing.assert_array_equal(np.isnan(rows).all(axis=1), [False, True, False, True])
        with open(paths[1], "wb") as file:
            file.write(good)
        assert np.isfinite(one.transform(paths[:3])).all()

    def test_an_error_gives_back_what_was_claimed(self, cache, paths):
        """After an error, another thread can compute the rest without waiting for a lease."""
        with pytest.raises(ValueError, match=r"X\[2\]"):
            extractor(cache).transform([paths[0], paths[1], b"nothing", *paths[2:]])
        results = []
        thread = threading.Thread(
            target=lambda: results.append(extractor(cache).transform(paths)), daemon=True
        )
        thread.start()
        thread.join(timeout=20)
        assert len(results) == 1

    def test_rows_that_a_killed_process_wrote_are_used(self, paths, tmp_path, forwards):
        """kill -9 in the middle: what was committed counts, and only the rest is computed."""
        script = textwrap.dedent(
            """
            import os, signal, sys
            from deepfeat import DeepFeatureExtractor
            import deepfeat._extraction.rows as features
            put, times = features.FeatureCache.put_many, []
            def put_and_die(self, *arguments):
                put(self, *arguments)
                times.append(1)
                if len(times) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
            features.FeatureCache.put_many = put_and_die
            extractor = DeepFeatureExtractor(
                "squeezenet1_1", "stage2", weights=None, image_size=32, num_workers=0,
                batch_size=5, cache=sys.argv[1])
            extractor.transform(sys.argv[2:])
            """
        )
        folder = str(tmp_path / "cache")
        done = subprocess.run([sys.executable, "-c", script, folder, *paths], check=False)
        assert done.returncode == -9
        rows = extractor(folder).transform(paths)
        assert sum(forwards) == len(paths) - 10
        np.testing.assert_allclose(rows, extractor(None).transform(paths), rtol=1e-5, atol=1e-7)


class TestWaiting:
    def test_who_waits_says_so_and_for_whom(self, cache, paths, monkeypatch, caplog):
        """Once, after some seconds, in the log of the package."""
        begun, go_on = threading.Event(), threading.Event()
        forward = SqueezeNet.forward
        pauses = []

        def wait_for_the_other(self, x):
            if x.device.type != "meta":
                begun.set()
                go_on.wait(20)
            return forward(self, x)

        def sleep(seconds):
            pauses.append(seconds)
            if len(caplog.records) == 1 and len(pauses) >= 20:
                go_on.set()
            elif len(pauses) > 20:
                threading.Event().wait(0.01)

        monkeypatch.setattr(SqueezeNet, "forward", wait_for_the_other)
        monkeypatch.setattr(rows_module.time, "sleep", sleep)
        other = threading.Thread(target=extractor(cache).transform, args=(paths,), name="other")
        other.start()
        begun.wait(20)
        extractor(cache).transform(paths)
        other.join()
        (record,) = caplog.records
        assert (record.name, record.levelname) == ("deepfeat", "WARNING")
        assert "Waiting for 24 images that thread 'other' of this process is comp" in record.message
        assert repr(cache) in record.message


class TestStamps:
    def test_files_that_took_the_place_of_others_are_read(self, cache, tmp_path, monkeypatch):
        """Also where path, size, inode and modification time are the same, as from an archive."""
        later = time.time_ns() + 10**10  # or they would be read for being new
        monkeypatch.setattr(rows_module.time, "time_ns", lambda: later)
        names = [tmp_path / f"{number}.bmp" for number in range(3)]
        rows = []
        for seed in 0, 1:
            pixels = np.random.default_rng(seed).integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)
            for name, image in zip(names, pixels, strict=True):
                with name.open("r+b" if name.exists() else "w+b") as file:
                    Image.fromarray(image).save(file, "bmp")
                os.utime(name, (1, 1))
            rows.append(extractor(cache).transform(names))
            np.testing.assert_allclose(
                rows[-1], extractor(None).transform(names), rtol=1e-5, atol=1e-7
            )
        assert not np.allclose(*rows)


class TestTampering:
    def test_rows_that_the_layer_cannot_have_given_are_refused(self, paths, tmp_path):
        """Rows of another width, with the right checksums, are no rows of this layer."""
        one = extractor(tmp_path / "cache", "stage2", prefetch=None)
        one.transform(paths)
        other = FeatureCache(tmp_path / "other")
        for namespace, images in FeatureCache(tmp_path / "cache")._store.list_images().items():
            other.put_many(images, {namespace: np.ones((len(images), 7), np.float32)})
        with pytest.raises(CacheFormatError, match="rows of 7 values for layer"):
            one.set_params(cache=other).transform(paths)


def mount(folder, *options):
    """Mount a file system in memory if that can be done here."""
    command = ["mount", *options, *(["none"] if "-t" in options else []), str(folder)]
    found = shutil.which("mount") is not None
    return found and subprocess.run(command, check=False, capture_output=True).returncode == 0


@pytest.fixture(params=["limit", "file system"])
def full_disk(request, tmp_path):
    """A folder that has room for a few rows, and a function that makes more."""
    folder = tmp_path / "full"
    folder.mkdir()
    if request.param == "limit":
        resource = pytest.importorskip("resource")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
        yield folder, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    elif mount(folder, "-t", "tmpfs", "-o", "size=400k"):
        yield folder, lambda: mount(folder, "-o", "remount,size=9m")
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    else:
        pytest.skip("a file system cannot be mounted here")


class TestPrecompute:
    def test_shards_together_fill_the_cache(self, cache, paths, forwards):
        for shard in ((0, 3), (1, 3), (2, 3)):
            extractor(cache).precompute(paths, shard=shard)
        assert sum(forwards) == len(paths)
        extractor(cache, ["stage2", "stage3", "stage4"]).transform(paths)
        assert sum(forwards) == len(paths)

    def test_it_goes_on_where_it_stopped(self, cache, paths, forwards):
        extractor(cache).precompute(paths[:9])
        forwards.clear()
        extractor(cache).precompute(paths)
        assert sum(forwards) == len(paths) - 9

    def test_it_fills_the_stages_also_where_the_layer_is_there(self, cache, paths, forwards):
        extractor(cache, "stage2", prefetch=None).transform(paths)
        extractor(cache, "stage2").precompute(paths)
        forwards.clear()
        extractor(cache, "stage3").transform(paths)
        assert sum(forwards) == 0

    def test_layers_can_be_named(self, cache, paths):
        extractor(cache, prefetch=None).precompute(paths, layers=["stage3"])
        assert cache.info().namespaces == 1

    def test_caches_of_several_machines_become_one(self, cache, paths, tmp_path, forwards):
        other = FeatureCache(tmp_path / "of another machine")
        extractor(cache).precompute(paths, shard=(0, 2))
        extractor(other).precompute(paths, shard=(1, 2))
        cache.update(other)
        assert cache.info().rows == 2 * other.info().rows
        forwards.clear()
        rows = extractor(cache).transform(paths)
        assert sum(forwards) == 0
        np.testing.assert_allclose(rows, extractor(None).transform(paths), rtol=1e-5, atol=1e-7)

    def test_rows_that_would_be_lost_are_refused(self, paths):
        prepare = Prepare()
        prepare.lock = threading.RLock()
        unknown = DeepFeatureExtractor(Net(), "scale", preprocessing=prepare)
        with pytest.raises(ValueError, match="nothing to precompute: a RLock"):
            unknown.precompute(paths)

    @pytest.mark.parametrize(
        ("parameters", "layers"), [({"pooling": "cls"}, None), ({}, []), ({}, "stage9")]
    )
    def test_layers_that_cannot_be_read_are_refused(
        self, cache, paths, forwards, parameters, layers
    ):
        with pytest.raises(ValueError, match="layer"):
            extractor(cache, **parameters).precompute(paths, layers)
        assert sum(forwards) == 0

    def test_it_tells_which_images_failed(self, cache, paths):
        one = extractor(cache, on_error="nan").precompute([*paths, b"nothing"])
        assert list(one.errors_) == [len(paths)]

    @pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0)])
    def test_a_shard_that_is_none_is_refused(self, cache, paths, shard):
        with pytest.raises(ValueError, match="shard"):
            extractor(cache).precompute(paths, shard=shard)

    def test_a_full_disk_is_an_error_that_says_what_is_kept(self, full_disk, paths, forwards):
        """With more room the next call computes the rest; `transform` warns and gives its rows."""
        folder, make_room = full_disk
        one = extractor(folder, batch_size=2)
        with (
            pytest.raises(
                OSError, match=r"cannot be written .* of 24 images have been kept"
            ) as error,
            pytest.warns(RuntimeWarning, match="nothing more is stored"),
        ):
            one.precompute(paths)
        kept = int(re.search(r"(\d+) of 24", str(error.value))[1])
        assert 0 < kept < 24
        assert np.isfinite(one.transform(paths)).all()
        make_room()
        forwards.clear()
        one.precompute(paths)
        assert sum(forwards) == 24 - kept
        one.precompute(paths)
        assert sum(forwards) == 24 - kept

    def test_a_directory_that_cannot_be_made_is_an_error(self, paths, tmp_path, forwards):
        """Before any image is computed; nobody, not even root, makes a folder below a file."""
        (tmp_path / "file").write_text("Dear diary", encoding="utf-8")
        with (
            pytest.raises(OSError, match=r"cannot be written .* 0 of 24 images have been kept"),
            pytest.warns(RuntimeWarning, match="nothing more is stored"),
        ):
            extractor(tmp_path / "file" / "cache").precompute(paths)
        assert sum(forwards) == 0

    def test_it_needs_a_cache(self, paths):
        with pytest.raises(ValueError, match="cache"):
            extractor(None).precompute(paths)

    def test_progress_is_shown(self, cache, paths, capsys):
        extractor(cache, verbose=1).precompute(paths)
        assert f"{len(paths)}/{len(paths)}" in capsys.readouterr().err
