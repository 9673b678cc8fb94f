"""Tests of fine-tuning end to end: how it resumes, what it accepts, and every way to fail."""

import copy
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from deepfeat import DeepFeatureExtractor, FeatureCache, FineTuneClassifier
from deepfeat._finetuning import classifier as _classifier

RATES = {"learning_rate": 0.02, "backbone_learning_rate": 0.01}


def copy_of(state):
    return {name: value.clone() for name, value in state.items()}


# Resuming ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("pickled", [False, True])
def test_partial_fits_are_a_bare_loop(
    images, optimizer, pickled, to_16_pixels, make_classifier, make_plain, state_of
):
    """At constant learning rates, with moments that persist, also through a pickle."""
    X, y = images
    batch = torch.stack([to_16_pixels(Image.fromarray(image)) for image in X])
    targets = torch.tensor([0, 1] * 4)
    params = {"batch_size": 8, "augment": None, "optimizer": optimizer, "warmup_epochs": 3, **RATES}
    classifier = make_classifier(**params).partial_fit(X, y, classes=["dark", "light"])
    net = make_plain()
    head = make_classifier(**params | {"learning_rate": 1e-30, "backbone_learning_rate": 1e-30})
    head = head.set_params(weight_decay=0, max_epochs=1, warmup_epochs=0).fit(X, y)
    net.fc = torch.nn.Linear(16, 2)
    net.load_state_dict(state_of(head))
    groups = [
        {"params": list(net.fc.parameters()), "lr": 0.02},
        {"params": [p for n, p in net.named_parameters() if n[:3] != "fc."], "lr": 0.01},
    ]
    make = {
        "adamw": lambda: torch.optim.AdamW(groups, weight_decay=1e-4),
        "sgd": lambda: torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=1e-4),
    }
    by_hand = make[optimizer]()
    for number in range(6):
        by_hand.zero_grad()
        F.cross_entropy(net(batch), targets).backward()
        by_hand.step()
        if number:
            if pickled:
                classifier = pickle.loads(pickle.dumps(classifier))
            classifier.partial_fit(X, y)
    for (path, value), expected in zip(
        state_of(classifier).items(), net.state_dict().values(), strict=True
    ):
        assert_allclose(value, expected, rtol=1e-3, atol=1e-4, err_msg=path)
    assert [epoch["epoch"] for epoch in classifier.history_] == [1, 2, 3, 4, 5, 6]
    assert {epoch["learning_rate"] for epoch in classifier.history_} == {0.02}


def test_partial_fit_needs_to_know_the_classes(images, make_classifier):
    """From the first call on; later calls may have images of some only."""
    X, y = images
    with pytest.raises(ValueError, match="classes must be passed on the first call"):
        make_classifier().partial_fit(X, y)
    classifier = make_classifier().partial_fit(X[:1], y[:1], classes=["light", "dark"])
    assert_array_equal(classifier.classes_, ["dark", "light"])
    classifier.partial_fit(X, y, classes=["dark", "light"])
    with pytest.raises(ValueError, match=r"classes must be the same as in the first call, .*; got"):
        classifier.partial_fit(X, y, classes=["dark", "bright"])
    with pytest.raises(
        ValueError, match=r"y must not have labels outside the classes .*; got \['bright'\]"
    ):
        classifier.partial_fit(X[:1], ["bright"])
    with pytest.raises(ValueError, match="one class"):
        make_classifier().partial_fit(X[:1], y[:1], classes=["dark"])


def test_partial_fit_resumes_after_fit_and_anew_with_other_blocks(
    images, make_classifier, state_of
):
    """Moments of other parameters are ignored."""
    X, y = images
    classifier = make_classifier().fit(X, y)
    before = copy_of(state_of(classifier))
    classifier.partial_fit(X, y).set_params(unfreeze=None).partial_fit(X, y)
    classifier.set_params(unfreeze="all", optimizer="sgd").partial_fit(X, y)
    assert classifier.n_iter_ == 5
    assert not torch.equal(before["fc.weight"], state_of(classifier)["fc.weight"])


def test_partial_fit_takes_the_learning_rates_of_now(images, make_classifier):
    """Not those that the optimizer had when it was saved."""
    X, y = images
    classifier = make_classifier().partial_fit(X, y, classes=["dark", "light"])
    classifier.set_params(learning_rate=0.5, backbone_learning_rate=0.25).partial_fit(X, y)
    rates = [(e["learning_rate"], e["backbone_learning_rate"]) for e in classifier.history_]
    assert rates == [(1e-3, 1e-4), (0.5, 0.25)]


def test_fit_begins_anew_without_a_warm_start(images, make_classifier, state_of, assert_same_state):
    """Even with other classes."""
    X, y = images
    classifier = make_classifier().fit(X, y)
    first = copy_of(state_of(classifier))
    assert_same_state(state_of(classifier.fit(X, y)), first)
    classifier.fit(X, [0, 1, 2, 3] * 2)
    assert_array_equal(classifier.classes_, [0, 1, 2, 3])
    assert classifier.predict_proba(X).shape == (8, 4)
    assert classifier.n_iter_ == 2


def test_a_warm_start_resumes(images, make_classifier, state_of):
    """From the current weights, with epochs that keep counting."""
    X, y = images
    classifier = make_classifier(warm_start=True, optimizer="sgd").fit(X, y)
    old, state = classifier.module_, copy_of(state_of(classifier))
    classifier.set_params(learning_rate=1e-30, backbone_learning_rate=1e-30, weight_decay=0)
    classifier.fit(X, y)
    assert classifier.module_ is not old
    torch.testing.assert_close(dict(state_of(classifier)), state)
    assert [epoch["epoch"] for epoch in classifier.history_] == [1, 2, 3, 4]
    assert classifier.n_iter_ == 4


def test_blocks_are_unfrozen_one_after_the_other(images, make_classifier, make_plain, state_of):
    """By warm starts: frozen blocks stay as the previous fit left them."""
    X, y = images
    classifier = make_classifier(make_plain(norm=True), warm_start=True, unfreeze=None)
    before = copy_of(state_of(classifier.fit(X, y)))
    for unfreeze, trained in [
        ("hidden", ("hidden.", "fc.")),
        (["blocks.1"], ("blocks.1.", "fc.")),
        (None, ("fc.",)),
    ]:
        classifier.set_params(unfreeze=unfreeze).fit(X, y)
        for name, value in state_of(classifier).items():
            assert torch.equal(value, before[name]) is not name.startswith(trained), name
        before = copy_of(state_of(classifier))
    assert classifier.n_iter_ == 8


@pytest.mark.parametrize(
    "change",
    [
        {"backbone": "resnet18"},
        {"weights": "IMAGENET1K_V1"},
        {"head": "append"},
        {"image_size": 64},
        {"resize": "pad"},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_training_does_not_resume_with_another_network(
    change, method, make_images, make_classifier
):
    """Where the network comes from is fixed when training begins."""
    X, y = make_images(4, 32)
    classifier = make_classifier("squeezenet1_1", unfreeze=None, warm_start=True).fit(X, y)
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} must not change .*; it was .* when training"):
        getattr(classifier.set_params(**change), method)(X, y)


def test_a_warm_start_has_no_new_classes(images, make_classifier):
    """Fewer are allowed."""
    X, y = images
    classifier = make_classifier(warm_start=True).fit(X, y)
    classifier.fit(X[:1], y[:1])
    assert len(classifier.classes_) == 2
    with pytest.raises(
        ValueError, match=r"y must not have labels outside the classes .*; got \['new'\]"
    ):
        classifier.fit(X, ["new"] * 8)


# Labels and predictions -------------------------------------------------------------------------

LABELS = {
    "str": np.array(["b", "a"] * 4),
    "list of str": ["b", "a"] * 4,
    "int": np.array([7, -3] * 4),
    "uint8": np.array([7, 3] * 4, dtype=np.uint8),
    "bool": np.array([True, False] * 4),
    "object": np.array(["b", "a"] * 4, dtype=object),
    "float": np.array([1.0, 0.0] * 4),
    "Series": pd.Series(["b", "a"] * 4, index=range(10, 18)),
    "Categorical": pd.Series(["b", "a"] * 4, dtype="category"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_come_back_as_they_came(kind, make_images, make_classifier, make_plain):
    """In their own type; `classes_` is sorted."""
    X, _ = make_images()
    y = LABELS[kind]
    classifier = make_classifier(make_plain(norm=True), max_epochs=15, **RATES).fit(X, y)
    predicted = classifier.predict(X)
    assert_array_equal(predicted, np.asarray(y))
    assert predicted.dtype == np.asarray(y).dtype
    assert_array_equal(classifier.classes_, sorted(set(y)))
    assert classifier.score(X, y) == 1


@pytest.mark.parametrize("n_classes", [2, 3])
def test_probabilities_are_those_of_the_network_run_by_hand(
    scene_paths, n_classes, make_classifier
):
    """Through the preprocessing of the weights, as torchvision has it."""
    y = np.arange(12) % n_classes
    classifier = make_classifier("squeezenet1_1", image_size=None, unfreeze=None, max_epochs=1)
    classifier.fit(scene_paths, y)
    transform = models.SqueezeNet1_1_Weights.DEFAULT.transforms()
    logits = []
    for path in scene_paths:
        with Image.open(path) as image, torch.no_grad():
            logits.append(classifier.module_(transform(image.convert("RGB"))[None])[0])
    logits = torch.stack(logits).double()
    probabilities = classifier.predict_proba(scene_paths)
    assert probabilities.dtype == np.float64
    assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-12)
    assert_allclose(probabilities, logits.softmax(1), rtol=1e-4)
    decision = classifier.decision_function(scene_paths)
    expected = logits if n_classes == 3 else logits[:, 1] - logits[:, 0]
    assert_allclose(decision, expected, rtol=1e-3, atol=1e-5)
    assert_array_equal(classifier.predict(scene_paths), logits.argmax(1))


# Input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [None, "flip", "crop"])
def test_every_kind_of_input_learns_the_same(
    tmp_path, augment, make_images, make_classifier, assert_same_state, state_of
):
    """Paths, pictures, arrays, columns: only the pixels matter."""
    X, y = make_images()
    paths = [tmp_path / f"{number}.png" for number in range(8)]
    for path, pixels in zip(paths, X, strict=True):
        Image.fromarray(pixels).save(path)
    kinds = {
        "paths": paths,
        "pictures": [Image.fromarray(pixels) for pixels in X],
        "one array": np.stack(X),
        "channels first": np.moveaxis(np.stack(X), -1, 1),
        "tensor": torch.from_numpy(np.stack(X)),
        "Series": pd.Series(map(str, paths)),
        "DataFrame": pd.DataFrame({"path": map(str, paths)}),
        "bytes": [path.read_bytes() for path in paths],
    }
    expected = make_classifier(augment=augment).fit(X, y)
    for kind, images in kinds.items():
        classifier = make_classifier(augment=augment).fit(images, y)
        assert_same_state(state_of(classifier), state_of(expected))
        assert_array_equal(classifier.predict_proba(images), expected.predict_proba(X), kind)


def test_rows_of_a_table_are_images_of_a_shape(make_classifier, make_plain):
    """The digits of scikit-learn; column names are remembered."""
    X, y = load_digits(n_class=2, return_X_y=True, as_frame=True)
    X, y = X[:60] / 16, y[:60]
    params = {"image_shape": (8, 8), "max_epochs": 8, "batch_size": 16, **RATES}
    classifier = make_classifier(make_plain(norm=True), **params).fit(X, y)
    assert classifier.score(X, y) > 0.9
    assert classifier.n_features_in_ == 64
    assert_array_equal(classifier.feature_names_in_, X.columns)
    with pytest.raises(ValueError, match="feature names"):
        classifier.predict(X[X.columns[::-1]])
    with pytest.raises(ValueError, match="X has 32 features, but FineTuneClassifier is expecting"):
        classifier.fit(X.to_numpy(), y).predict(X.to_numpy()[:, :32])
    classifier.fit(X, y)
    with pytest.raises(ValueError, match="feature names"):
        classifier.fit(X, y, X_val=X[X.columns[::-1]], y_val=y)


# Errors -----------------------------------------------------------------------------------------

X8 = list(np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8))
Y8 = np.array(["dark", "light"] * 4)
ERRORS = {
    "no labels": ({"y": None}, "requires y to be passed"),
    "one class": ({"y": ["a"] * 8}, "y must have at least 2 classes; got one class, .*'a'"),
    "too few labels": ({"y": ["a", "b"]}, r"inconsistent numbers of samples: \[8, 2\]"),
    "labels that are measures": ({"y": np.linspace(0, 1, 8)}, "Unknown label type"),
    "labels that are no numbers": ({"y": [0, 1, np.nan, 1] * 2}, "y contains NaN"),
    "labels in two columns": ({"y": np.arange(16).reshape(8, 2)}, "y should be a 1d array"),
    "no images": ({"X": [], "y": []}, "X is empty|0 sample|no image|at least one"),
    "one image": ({"X": X8[0]}, "X of shape .* looks like one colour image"),
    "weights of NaN": ({"sample_weight": [1.0] * 7 + [np.nan]}, "sample_weight contains NaN"),
    "infinite weights": ({"sample_weight": [1.0] * 7 + [np.inf]}, "sample_weight contains infi"),
    "negative weights": ({"sample_weight": [1.0] * 7 + [-1]}, "Negative values in data.*sample_w"),
    "no weights": (
        {"sample_weight": [0.0] * 8},
        "sample_weight must be positive for at least one image; got zero for every image",
    ),
    "too few weights": (
        {"sample_weight": [1.0]},
        r"sample_weight must have shape \(8,\), one weight per image; got shape \(1,\)",
    ),
    "a matrix of weights": (
        {"sample_weight": np.ones((8, 1))},
        r"sample_weight must have shape \(8,\), one weight per image; got shape \(8, 1\)",
    ),
    "X_val alone": ({"X_val": X8}, "X_val and y_val must be passed together; got only X_val"),
    "y_val alone": ({"y_val": Y8}, "X_val and y_val must be passed together; got only y_val"),
    "too few labels to check": ({"X_val": X8, "y_val": Y8[:3]}, "inconsistent numbers of sam"),
    "new labels to check": (
        {"X_val": X8[:2], "y_val": ["dark", "grey"]},
        r"y_val must not have labels outside the classes \['dark', 'light'\]; got \['grey'\]",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_data_that_does_not_go_together_is_refused(case, make_classifier):
    """With what is allowed and what came; no network is trained."""
    changes, words = ERRORS[case]
    classifier = make_classifier()
    with pytest.raises(ValueError, match=words):
        classifier.fit(**{"X": X8, "y": Y8} | changes)
    assert not hasattr(classifier, "module_")


@pytest.mark.parametrize("augment", [None, "flip", "crop", lambda image: image])
@pytest.mark.parametrize("where", ["X", "X_val"])
def test_an_image_that_cannot_be_read_is_named(
    scene_paths, scene_labels, tmp_path, augment, where, make_classifier
):
    """Whether activations are cached or not."""
    bad = tmp_path / "bad.jpg"
    bad.write_text("no image")
    data = {"X": scene_paths, "y": scene_labels, "X_val": scene_paths, "y_val": scene_labels}
    data[where] = [*scene_paths[:11], str(bad)]
    classifier = make_classifier(augment=augment, unfreeze="hidden", max_epochs=3)
    with pytest.raises(ValueError, match=r"bad\.jpg"):
        classifier.fit(**data)
    classifier.fit(scene_paths, scene_labels)
    with pytest.raises(ValueError, match=r"bad\.jpg"):
        classifier.predict([str(bad)])


def test_a_device_that_is_not_there_is_refused(images, make_classifier):
    """Before anything is loaded."""
    with pytest.raises(ValueError, match="device 'cuda:99' cannot be used here"):
        make_classifier(device="cuda:99").fit(*images)


# Back to features -------------------------------------------------------------------------------


@pytest.mark.usefixtures("pillow_resizes")
@pytest.mark.parametrize("layer", ["stage2", "features.12", ["stage1", "stage3"]])
def test_features_are_those_of_the_tuned_network(scene_paths, scene_labels, layer, make_classifier):
    """Through the preprocessing of the weights, read by torchvision's own extractor."""
    classifier = make_classifier("squeezenet1_1", image_size=None, unfreeze="stage2", max_epochs=1)
    classifier.fit(scene_paths, scene_labels)
    rows = classifier.to_extractor(layer).set_params(norm=None).fit_transform(scene_paths)
    nodes = {"stage2": "features.4", "stage1": "features.1", "stage3": "features.7"}
    names = [nodes.get(name, name) for name in ([layer] if isinstance(layer, str) else layer)]
    read = create_feature_extractor(classifier.module_, names)
    transform = models.SqueezeNet1_1_Weights.DEFAULT.transforms()
    expected = []
    for path in scene_paths:
        with Image.open(path) as image, torch.no_grad():
            maps = read(transform(image.convert("RGB"))[None])
        expected.append(np.concatenate([maps[name][0].mean((1, 2)).numpy() for name in names]))
    assert_allclose(rows, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("cache", ["memory", FeatureCache])
def test_rows_of_different_weights_are_never_mixed_up(
    scene_paths, scene_labels, cache, make_classifier
):
    """Of the stock weights, the fine-tuned ones, and the same fine-tuned further."""
    cache = cache if cache == "memory" else cache()
    stock = DeepFeatureExtractor(
        "squeezenet1_1", "stage4", weights=None, image_size=32, cache=cache, random_state=0
    )
    slow = {"learning_rate": 1e-3, "backbone_learning_rate": 1e-3}  # no ReLU may die of it
    classifier = make_classifier("squeezenet1_1", unfreeze="stage3", warm_start=True, **slow)

    def read(extractor):
        return extractor.set_params(cache=cache).fit_transform(scene_paths)

    def read_anew(extractor):
        return extractor.set_params(cache=None).fit_transform(scene_paths)

    extractors = [stock]
    rows = [read(stock)]
    for _ in range(2):
        extractors.append(classifier.fit(scene_paths, scene_labels).to_extractor("stage4"))
        rows.append(read(extractors[-1]))
    for index, extractor in enumerate(extractors):
        assert_allclose(rows[index], read_anew(extractor), rtol=1e-5, atol=1e-6)
        assert_array_equal(rows[index], read(extractor))
        for other in rows[:index]:
            assert np.abs(rows[index] - other).max() > 1e-4


def test_an_extractor_stays_as_it_is_when_the_classifier_learns_on(images, make_classifier):
    """It holds a copy of the network."""
    X, y = images
    classifier = make_classifier(warm_start=True, **RATES).fit(X, y)
    extractor = classifier.to_extractor("hidden").set_params(cache=None)
    rows = extractor.fit_transform(X)
    classifier.fit(X, y)
    with torch.no_grad():
        classifier.module_.hidden.weight.zero_()
    assert_array_equal(extractor.fit_transform(X), rows)
    assert np.abs(rows).max() > 0


def test_an_extractor_works_like_its_classifier(make_classifier):
    """With its batch size, precision, engine, shape of rows and threads."""
    X, y = load_digits(n_class=2, return_X_y=True)
    params = {"image_shape": (8, 8), "batch_size": 16, "precision": "bfloat16", "num_workers": 2}
    classifier = make_classifier(**params, max_epochs=1).fit(X[:20] / 16, y[:20])
    extractor = classifier.to_extractor(["hidden", "fc"])
    assert {name: extractor.get_params()[name] for name in params} == params
    assert extractor.fit_transform(X[:5] / 16).shape == (5, 18)
    assert classifier.set_params(engine="openvino").to_extractor("fc").engine == "openvino"


# Data of the user -------------------------------------------------------------------------------


def test_the_data_of_the_user_stays_as_it_was(images, make_classifier):
    """Images, labels and weights."""
    X, y = images
    weights = np.linspace(1, 2, 8)
    copies = [image.copy() for image in X], y.copy(), weights.copy()
    make_classifier(class_weight="balanced").fit(X, y, sample_weight=weights)
    assert_array_equal(np.stack(X), np.stack(copies[0]))
    assert_array_equal(y, copies[1])
    assert_array_equal(weights, copies[2])


# Failures ----------------------------------------------------------------------------------------


def test_a_call_that_fails_leaves_the_optimizer_as_it_was(
    images, make_classifier, assert_same_state, state_of
):
    """After a failed call, doing what the error says helps: its moments are discarded."""
    X, y = images
    params = {"augment": None, **RATES}
    classifier = make_classifier(**params).partial_fit(X, y, classes=["dark", "light"])
    undisturbed = pickle.loads(pickle.dumps(classifier)).partial_fit(X, y)
    classifier.set_params(learning_rate=1e20, backbone_learning_rate=1e20)
    with pytest.raises(ValueError, match="lower learning_rate"):
        classifier.partial_fit(X, y).partial_fit(X, y)
    classifier = make_classifier(**params).partial_fit(X, y, classes=["dark", "light"])
    with pytest.raises(ValueError, match=r"nowhere\.png"):
        classifier.partial_fit([*X[:7], "nowhere.png"], y)
    assert_same_state(state_of(classifier.partial_fit(X, y)), state_of(undisturbed))


def test_columns_are_those_of_the_last_training_that_went_well(make_classifier):
    """A table of another width fails and leaves no trace."""
    X, y = load_digits(n_class=2, return_X_y=True)
    X, y = X[:12] / 16, y[:12]
    classifier = make_classifier(image_shape=(8, -1), warm_start=True).fit(X, y)
    with pytest.raises(ValueError, match="X has 56 features, but FineTuneClassifier is expecting"):
        classifier.fit(X[:, :56], y)
    new = make_classifier(image_shape=(8, -1)).fit(X, y)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        new.fit(X[:, :56], y[:5])
    for fitted in (classifier, new):
        assert fitted.n_features_in_ == 64
        assert len(fitted.predict(X)) == 12


def test_gradients_are_on_whatever_the_caller_has_set(
    images, make_classifier, assert_same_state, state_of
):
    """Even in inference mode, and a network loaded there can be trained elsewhere."""
    X, y = images
    with torch.inference_mode():
        inside = make_classifier("squeezenet1_0", unfreeze="features.12").fit(X, y)
    outside = make_classifier("squeezenet1_0", unfreeze="features.12").fit(X, y)
    assert_same_state(state_of(inside), state_of(outside))
    with torch.no_grad():
        assert_same_state(
            state_of(make_classifier().fit(X, y)), state_of(make_classifier().fit(X, y))
        )


# Splits ------------------------------------------------------------------------------------------


def test_a_warm_start_holds_out_the_same_images(monkeypatch, make_images, make_classifier):
    """Also without a `random_state`: else images that were trained on would be used to validate."""
    splits = []
    apply_class_weight = _classifier.apply_class_weight

    def note(dataset, classes, class_weight):
        splits.append([record.index for record in dataset.records])
        return apply_class_weight(dataset, classes, class_weight)

    monkeypatch.setattr(_classifier, "apply_class_weight", note)
    X, y = make_images(20)
    params = {"random_state": None, "early_stopping": True, "validation_fraction": 0.3}
    classifier = make_classifier(warm_start=True, **params).fit(X, y).fit(X, y)
    assert splits[0] == splits[1]
    classifier.set_params(warm_start=False).fit(X, y)
    assert splits[2] != splits[0]


# Validation -------------------------------------------------------------------------------------


def test_what_is_wrong_with_validation_images_is_said_of_them(images, make_classifier):
    """Rather than blamed on X and y."""
    X, y = images
    for params, words in (
        ({"X_val": [], "y_val": []}, "X_val and y_val: X is empty"),
        ({"X_val": X, "y_val": y[:3]}, "X_val and y_val: .*inconsistent numbers"),
        ({"X_val": X[:2], "y_val": [0.0, np.nan]}, "Input y_val contains NaN"),
        ({"X_val": X[:2], "y_val": [0.5, 1.5]}, "y_val: Unknown label type"),
        ({"X_val": ["nowhere.png"], "y_val": y[:1]}, r"X_val\[0\] \('nowhere.png'\)"),
    ):
        with pytest.raises(ValueError, match=words):
            make_classifier().fit(X, y, **params)


# Epochs of the head -----------------------------------------------------------------------------

HEAD_EPOCHS = {
    "flip": ({"augment": "flip"}, 3),
    "none": ({"augment": None}, 3),
    "crop": ({"augment": "crop"}, 0),
    "a function": ({"augment": lambda image: image}, 0),
    "only the head": ({"unfreeze": None}, 0),
    "a number": ({"head_epochs": 1, "augment": "crop"}, 1),
    "of numpy": ({"head_epochs": np.int64(2)}, 2),
}


@pytest.mark.parametrize("case", HEAD_EPOCHS)
def test_the_head_is_trained_alone_where_that_costs_little(
    case, images, make_classifier, make_plain, state_of
):
    """For as many epochs as follow; then the backbone has not been touched."""
    params, count = HEAD_EPOCHS[case]
    classifier = make_classifier(make_plain(), **{"head_epochs": "auto", "max_epochs": 3} | params)
    classifier.fit(*images)
    assert classifier.n_iter_ == count + 3
    rates = [epoch["learning_rate"] for epoch in classifier.history_]
    assert [number for number, rate in enumerate(rates) if rate == rates[0]] == sorted({0, count})


def test_only_a_new_network_begins_with_its_head(images, make_classifier):
    """Not one that resumes, and `partial_fit` has one epoch."""
    classifier = make_classifier(head_epochs="auto", warm_start=True)
    assert classifier.fit(*images).n_iter_ == 4
    assert classifier.fit(*images).n_iter_ == 6
    assert classifier.partial_fit(*images).n_iter_ == 7


class Smaller(FineTuneClassifier):
    """A classifier with few parameters of its own."""

    def __init__(self, max_epochs=2):
        super().__init__(
            "resnet10_slim", image_size=32, max_epochs=max_epochs, device="cpu", random_state=0
        )


def test_a_subclass_may_have_fewer_parameters(images, make_classifier):
    """It is trained, copied and pickled like any other."""
    X, y = images
    classifier = Smaller(max_epochs=1).fit(X, y)
    expected = FineTuneClassifier("resnet10_slim", max_epochs=1, image_size=32, random_state=0)
    expected.set_params(device="cpu").fit(X, y)
    for one in (classifier, copy.copy(classifier), pickle.loads(pickle.dumps(classifier))):
        assert_allclose(one.predict_proba(X), expected.predict_proba(X))
