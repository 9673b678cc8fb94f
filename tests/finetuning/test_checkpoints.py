"""Tests of checkpoints: a training that was interrupted ends as one that was not."""

import copy
import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sklearn.model_selection import GridSearchCV
from torch import nn

from deepfeat import FineTuneClassifier, ImageError
from deepfeat._finetuning import checkpoints, saving, sources
from deepfeat._finetuning import classifier as _classifier
from deepfeat._finetuning import fitting as _fitting
from deepfeat._finetuning.callbacks import callback
from deepfeat._finetuning.objectives import SingleLabel
from deepfeat._finetuning.training import Trainer
from deepfeat._images.records import Record

KILLED_TRAINING = Path(__file__).with_name("killed_training.py")


@pytest.fixture
def failing_in_second_epoch(monkeypatch):
    """Let a training fail in the second epoch from here."""

    @contextmanager
    def failing_in_second_epoch():
        count = itertools.count(1)
        run_epoch = Trainer.run_epoch

        def run(*args):
            if next(count) == 2:
                raise InterruptedError("The power is gone.")
            return run_epoch(*args)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "run_epoch", run)
            yield

    return failing_in_second_epoch


@pytest.fixture
def fit_in_pieces(failing_in_second_epoch):
    """Fit classifiers, each of which fails in its second epoch, until one is complete."""

    def fit_in_pieces(make, *args, **kwargs):
        for pieces in range(1, 20):
            with failing_in_second_epoch(), suppress(InterruptedError):
                return make().fit(*args, **kwargs), pieces
        raise AssertionError("It makes no progress.")

    return fit_in_pieces


@pytest.fixture
def epochs(monkeypatch):
    """Note the numbers of the epochs that are trained."""
    numbers = []
    run_epoch = Trainer.run_epoch

    def run(self, source, number, report):
        numbers.append(number)
        return run_epoch(self, source, number, report)

    monkeypatch.setattr(Trainer, "run_epoch", run)
    return numbers


def without_times(history):
    """Return a history as it is on any machine."""
    times = {"seconds", "images_per_second"}
    return [{key: epoch[key] for key in epoch.keys() - times} for epoch in history]


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


# State --------------------------------------------------------------------------------------------


def test_a_trainer_gets_back_all_of_its_state(prepare, make_plain, make_classifier):
    """Also the scale of gradients and the size of parts, which change only now and then."""
    module, _, trained = prepare(make_plain(), "all")
    classifier = make_classifier(precision="float16", schedule="one-cycle")
    config = classifier._make_config(
        SingleLabel(np.arange(3)), 3, torch.device("cpu"), seed=0, score=None
    )
    first, second = (Trainer(module, trained, config, batches=4) for _ in range(2))
    module(torch.rand(2, 3, 16, 16)).sum().backward()
    first.optimizer.step()
    first._schedule.step()
    first._scaler.scale(torch.ones(1))
    first._scaler.update(7.0)
    first._part_size = 1
    state = copy.deepcopy(first.state_dict())
    second.load_state_dict(state)
    for name in ("optimizer", "scaler", "part_size"):
        assert str(second.state_dict()[name]) == str(first.state_dict()[name])
    assert second.learning_rates() == first.learning_rates()
    assert second.state_dict()["scaler"]["scale"] == 7.0


class Odd(nn.Module):
    """A linear network with a buffer that it does not save, and a state dict of copies."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(768, 2)
        self.register_buffer("scale", torch.ones(()), persistent=False)
        self.register_state_dict_post_hook(self._copy)

    @staticmethod
    def _copy(module, state, prefix, metadata):
        for name, value in state.items():
            state[name] = value.clone()

    def forward(self, images):
        if self.training:
            self.scale *= 0.9
        return self.fc(images.flatten(1)) * self.scale


def test_all_tensors_of_a_network_are_kept(
    make_images, to_16_pixels, fit_in_pieces, seeded, tmp_path
):
    """Also those that a state dict does not hold, or holds copies of."""
    X, y = make_images()

    network = seeded(Odd)

    def make(**params):
        return FineTuneClassifier(
            network, preprocessing=to_16_pixels, unfreeze="all", max_epochs=4, random_state=0,
            head_epochs=0, device="cpu", batch_size=4, **params,
        )  # fmt: skip

    whole = make().fit(X, y)
    resumed, pieces = fit_in_pieces(lambda: make(checkpoint=tmp_path), X, y)
    again = make(checkpoint=tmp_path).fit(X, y)
    assert pieces == 4
    for classifier in (resumed, again):
        np.testing.assert_array_equal(classifier.predict_proba(X), whole.predict_proba(X))


def test_auxiliary_classifiers_outlive_the_epochs_of_the_head(
    make_classifier, make_images, fit_in_pieces, assert_same_state, tmp_path
):
    """They are trained after these, also if it resumes in between."""
    X, y = make_images(count=4, side=96)
    params = {"unfreeze": "inception4b", "head_epochs": 1, "max_epochs": 2, "image_size": 96}
    whole = make_classifier("googlenet", **params).fit(X, y)
    assert whole.module_.aux2 is not None
    resumed, pieces = fit_in_pieces(
        lambda: make_classifier("googlenet", checkpoint=tmp_path, **params), X, y
    )
    assert pieces == 3
    assert_same_state(resumed.module_.state_dict(), whole.module_.state_dict())


def test_a_recurrent_network_can_be_resumed(
    make_images, to_16_pixels, fit_in_pieces, seeded, assert_same_state, tmp_path
):
    """Although it refers weakly to its weights."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.fc = nn.LSTM(48, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, images):
            rows = images.permute(0, 2, 1, 3).flatten(2)
            return self.fc(self.lstm(rows)[0][:, -1])

    X, y = make_images()
    network = seeded(Recurrent)
    options = {"preprocessing": to_16_pixels, "unfreeze": "all", "device": "cpu"}
    options |= {"max_epochs": 2, "head_epochs": 0, "random_state": 0}
    whole = FineTuneClassifier(network, **options).fit(X, y)
    resumed, _ = fit_in_pieces(
        lambda: FineTuneClassifier(network, checkpoint=tmp_path, **options), X, y
    )
    assert_same_state(resumed.module_.state_dict(), whole.module_.state_dict())


# Resuming ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["step", "write", "activations"])
def test_a_training_that_is_killed_in_each_epoch_ends_as_one_that_is_not(
    moment, assert_same_state, tmp_path
):
    """`kill -9` in the middle of each epoch, of each writing, and before activations are kept."""
    params = json.dumps({"max_epochs": 4, "head_epochs": 2, "unfreeze": "layer4"})
    states, processes = [], []
    for when in (moment, "never"):
        folder, result = tmp_path / when, tmp_path / f"{when}.pt"
        done = subprocess.run(
            [sys.executable, KILLED_TRAINING, when, folder, result, params],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        processes.append(int(done.stdout))
        states.append(torch.load(result))
        assert len(files_in(folder)) == 1  # no draft is left
    assert processes == [6, 1]
    assert_same_state(*states)


CASES = {
    "cached": {"unfreeze": "hidden"},
    "all": {"unfreeze": "all", "augment": "crop"},
    "sgd, one-cycle": {"optimizer": "sgd", "schedule": "one-cycle"},
    "constant, warm-up, clipping": {
        "schedule": "constant",
        "warmup_epochs": 1,
        "max_grad_norm": 0.1,
    },
    "early stopping": {"early_stopping": True, "validation_fraction": 0.25, "n_iter_no_change": 2},
    "stopped early": {
        "early_stopping": True,
        "validation_fraction": 0.25,
        "n_iter_no_change": 2,
        "tol": 2.0,  # which no score rises by
    },
    "cutmix": {"cutmix": 1.0, "unfreeze": "hidden"},
    "head first": {"head_epochs": 2, "unfreeze": "hidden"},
    "weights": {"class_weight": {"dark": 2.0, "light": 0.5}, "label_smoothing": 0.1},
    "bfloat16": {"precision": "bfloat16"},
    "float16": {"precision": "float16"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_training_goes_on_where_it_was_interrupted(
    case, make_classifier, make_plain, make_images, fit_in_pieces, assert_same_state, tmp_path
):
    """With dropout and BatchNorm, and the same history."""
    X, y = make_images(16)
    params = {"max_epochs": 4, "learning_rate": 0.01, "backbone_learning_rate": 0.01}
    params |= CASES[case]
    network = make_plain(dropout=0.5, norm=True)
    whole = make_classifier(network, **params).fit(X, y)
    resumed, pieces = fit_in_pieces(
        lambda: make_classifier(network, checkpoint=tmp_path, **params), X, y
    )
    assert pieces == len(whole.history_)
    assert_same_state(resumed.module_.state_dict(), whole.module_.state_dict())
    assert without_times(resumed.history_) == without_times(whole.history_)
    assert resumed.best_validation_score_ == whole.best_validation_score_
    assert resumed.n_iter_ == whole.n_iter_


def test_weights_lie_in_memory_as_before(make_classifier, make_images, fit_in_pieces, tmp_path):
    """And so do their moments, which channels last may add up in another order."""
    X, y = make_images()
    formats = []
    load = Trainer.load_state_dict

    def note(self, state):
        load(self, state)
        for parameter, moments in self.optimizer.state.items():
            formats.append(moments["exp_avg"].stride() == parameter.stride())

    params = {"image_size": 32, "max_epochs": 2, "unfreeze": "layer4", "checkpoint": tmp_path}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "load_state_dict", note)
        fit_in_pieces(lambda: make_classifier("resnet10_slim", **params), X, y)
    assert formats
    assert all(formats)


def test_tied_weights_stay_tied(
    make_images, to_16_pixels, fit_in_pieces, assert_same_state, tmp_path
):
    """A file does not hold tensors that share memory."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(768, 768), nn.Linear(768, 768)
            self.second.weight = self.first.weight
            self.fc = nn.Linear(768, 2)

        def forward(self, images):
            return self.fc(self.second(self.first(images.flatten(1)).relu()))

    X, y = make_images()
    params = {"unfreeze": "all", "max_epochs": 3, "random_state": 0, "device": "cpu"}
    network = Tied()

    def make(**others):
        return FineTuneClassifier(network, preprocessing=to_16_pixels, **params, **others)

    resumed, _ = fit_in_pieces(lambda: make(checkpoint=tmp_path), X, y)
    assert_same_state(resumed.module_.state_dict(), make().fit(X, y).module_.state_dict())
    assert resumed.module_.first.weight is resumed.module_.second.weight


def test_without_a_seed_a_training_resumes_with_that_of_its_file(
    make_classifier, make_images, fit_in_pieces, assert_same_state, tmp_path
):
    """Head, split and order of images are those of the first attempt."""
    X, y = make_images(16)
    params = {"random_state": None, "max_epochs": 4, "early_stopping": True}
    params |= {"validation_fraction": 0.25, "n_iter_no_change": 4}
    resumed, _ = fit_in_pieces(lambda: make_classifier(checkpoint=tmp_path, **params), X, y)
    whole = make_classifier(**params | {"random_state": resumed._seed}).fit(X, y)
    assert_same_state(resumed.module_.state_dict(), whole.module_.state_dict())
    assert len(files_in(tmp_path)) == 1


def test_ctrl_c_can_be_taken_back(make_classifier, make_images, assert_same_state, tmp_path):
    """The next `fit` goes on after the last complete epoch."""
    X, y = make_images()
    params = {"max_epochs": 3}

    class Interrupting:
        calls = 0

        def __call__(self, image):
            Interrupting.calls += 1
            if Interrupting.calls == 12:
                raise KeyboardInterrupt
            return image

    params["augment"] = Interrupting()
    with pytest.warns(UserWarning, match="interrupted in epoch 2"):
        stopped = make_classifier(checkpoint=tmp_path, **params).fit(X, y)
    assert stopped.n_iter_ == 1
    resumed = make_classifier(checkpoint=tmp_path, **params).fit(X, y)
    assert resumed.n_iter_ == 3
    whole = make_classifier(**params).fit(X, y)
    assert_same_state(resumed.module_.state_dict(), whole.module_.state_dict())


def test_a_warm_start_has_a_checkpoint_of_its_own(
    make_classifier, make_images, epochs, assert_same_state, tmp_path
):
    """Named by the network that it begins with: a script that runs again trains nothing."""
    X, y = make_images()

    def run(folder):
        classifier = make_classifier(warm_start=True, checkpoint=folder)
        return classifier.fit(X, y).fit(X, y)

    whole = run(None)
    first = run(tmp_path)
    assert epochs == [1, 2, 3, 4] * 2
    second = run(tmp_path)
    assert epochs == [1, 2, 3, 4] * 2
    for classifier in (first, second):
        assert_same_state(classifier.module_.state_dict(), whole.module_.state_dict())
        assert without_times(classifier.history_) == without_times(whole.history_)


@pytest.mark.skipif(callback is None, reason="needs scikit-learn 1.9")
def test_a_callback_ends_a_training_for_good(make_classifier, make_images, epochs, tmp_path):
    """Among those of the head, too: a script that runs again gets the same."""
    X, y = make_images()

    class Stop:
        def setup(self, estimator, context):
            self.count = 0

        def teardown(self, estimator, context):
            pass

        def on_fit_task_begin(self, estimator, context):
            pass

        def on_fit_task_end(self, estimator, context):
            self.count += context.task_name == "epoch"
            return self.count == 2

    for head_epochs in (0, 3):
        epochs.clear()
        for _ in range(2):
            classifier = make_classifier(checkpoint=tmp_path, max_epochs=4, head_epochs=head_epochs)
            classifier.set_callbacks(Stop()).fit(X, y)
            assert classifier.n_iter_ == 2
        assert epochs == [1, 2]
    assert len(files_in(tmp_path)) == 2


# Which training it is ---------------------------------------------------------------------------


def test_a_complete_training_is_not_repeated(
    make_classifier, make_images, epochs, assert_same_state, capsys, tmp_path
):
    """`verbose=1` says so, and when one is resumed."""
    X, y = make_images()
    first = make_classifier(checkpoint=tmp_path).fit(X, y)
    second = make_classifier(checkpoint=tmp_path, verbose=1).fit(X, y)
    assert epochs == [1, 2]
    assert_same_state(first.module_.state_dict(), second.module_.state_dict())
    assert first.history_ == second.history_
    output = capsys.readouterr().out
    assert output == f"Training is complete: {next(tmp_path.iterdir())}\n"
    second.partial_fit(X, y)  # it can be trained further


def test_verbose_says_that_a_training_resumes(
    make_classifier, make_images, fit_in_pieces, capsys, tmp_path
):
    """And after which epoch."""
    fit_in_pieces(lambda: make_classifier(checkpoint=tmp_path, verbose=1), *make_images())
    assert capsys.readouterr().out == (
        f"Training resumes after epoch 1: {next(tmp_path.iterdir())}\n"
    )


def test_candidates_and_folds_of_a_search_resume_side_by_side(
    make_classifier, make_images, epochs, tmp_path
):
    """Each has a file; a second search trains none of them."""
    X, y = make_images(16)
    grid = {"learning_rate": [0.001, 0.01], "unfreeze": [None, "hidden"]}

    def search():
        classifier = make_classifier(checkpoint=str(tmp_path))
        return GridSearchCV(classifier, grid, cv=2).fit(np.stack(X), y)

    first = search()
    assert len(files_in(tmp_path)) == 4 * 2 + 1
    count = len(epochs)
    second = search()
    assert len(epochs) == count == 2 * (4 * 2 + 1)
    np.testing.assert_array_equal(
        first.cv_results_["mean_test_score"], second.cv_results_["mean_test_score"]
    )


OTHERS = {
    "unfreeze": "hidden",
    "head": "append",
    "max_epochs": 3,
    "head_epochs": 1,
    "batch_size": 3,
    "optimizer": "sgd",
    "learning_rate": 0.5,
    "backbone_learning_rate": 0.5,
    "weight_decay": 0.1,
    "schedule": "constant",
    "warmup_epochs": 0.5,
    "augment": None,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
    "max_grad_norm": 1.0,
    "class_weight": "balanced",
    "early_stopping": True,
    "scoring": "loss",
    "validation_fraction": 0.5,
    "n_iter_no_change": 1,
    "tol": 0.1,
    "resize": "squash",
    "image_size": 48,
    "precision": "bfloat16",
    "random_state": 1,
    "backbone": "resnet18",
}
SAME = {
    "checkpoint": "~",
    "device": torch.device("cpu"),
    "engine": "openvino",
    "num_workers": 2,
    "verbose": 1,
    "warm_start": True,
}
ONLY_FOR_SOME = {"weights", "preprocessing", "image_shape"}  # see the tests of data and networks


@pytest.fixture
def name_file(make_classifier, make_images, monkeypatch):
    """Return the name of the file in which a training would keep how far it has come."""

    def name_file(*args, backbone="resnet10_slim", **params):
        keys = []

        class Named(Exception):
            pass

        def note(folder, key, seed):
            keys.append(key)
            raise Named

        with monkeypatch.context() as patch:
            patch.setattr(_classifier, "Checkpoint", note)
            classifier = make_classifier(backbone, **{"checkpoint": "."} | params)
            with pytest.raises(Named):
                classifier.fit(*args or make_images())
        return keys[0]

    return name_file


def test_every_parameter_is_part_of_the_name_or_has_no_effect(make_classifier):
    """A new one needs a line above."""
    assert OTHERS.keys() | SAME.keys() | ONLY_FOR_SOME == make_classifier().get_params().keys()


@pytest.mark.parametrize("name", OTHERS)
def test_other_parameters_are_another_training(name, name_file):
    """With a file of its own."""
    assert name_file(**{name: OTHERS[name]}) != name_file()


@pytest.mark.parametrize("name", SAME)
def test_parameters_without_effect_are_the_same_training(name, name_file):
    """They may change between two attempts, and a folder may move."""
    if name == "engine":
        pytest.importorskip("openvino")
    assert name_file(**{name: SAME[name]}) == name_file()


def test_a_number_of_numpy_is_the_same_as_that_of_python(
    make_classifier, make_images, name_file, tmp_path
):
    """A grid of parameters is often an array."""
    params = {"batch_size": np.int64(4), "max_epochs": np.int64(2)}
    params |= {"learning_rate": np.float64(0.5), "head_epochs": np.int64(1)}
    assert name_file(**params) == name_file(
        **{name: value.item() for name, value in params.items()}
    )
    params["weight_decay"] = np.float32(0.1)
    make_classifier(checkpoint=tmp_path, **params).fit(*make_images())


def test_other_data_are_another_training(make_classifier, make_images, epochs, tmp_path):
    """A pixel, a label, a weight, their order, several labels, and validation images."""
    X, y = make_images()
    changed = [image.copy() for image in X]
    changed[3][0, 0, 0] ^= 1
    swapped = y.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    weights = np.linspace(1, 2, len(X))
    several = np.eye(8, 2, dtype=int)
    cases = [
        ((X, y), {}),
        ((changed, y), {}),
        ((X, swapped), {}),
        ((X, y, weights), {}),
        ((X, y, weights[::-1]), {}),
        ((X[::-1], y[::-1]), {}),
        ((X, several), {}),
        ((X, several[::-1]), {}),
        ((X, y), {"X_val": X, "y_val": y}),
        ((X, y), {"X_val": changed, "y_val": y}),
        ((X, y), {"X_val": X, "y_val": swapped}),
    ]
    for args, options in cases * 2:
        make_classifier(checkpoint=tmp_path).fit(*args, **options)
    assert len(files_in(tmp_path)) == len(cases)
    assert len(epochs) == 2 * len(cases)


def test_another_network_is_another_training(make_classifier, make_images, make_plain, tmp_path):
    """Also one that differs in a single weight."""
    X, y = make_images()
    network = make_plain()
    make_classifier(network, checkpoint=tmp_path).fit(X, y)
    with torch.no_grad():
        network.hidden.bias[0] += 1
    make_classifier(network, checkpoint=tmp_path).fit(X, y)
    assert len(files_in(tmp_path)) == 2


def test_a_warm_start_knows_how_its_network_came_about(
    make_classifier, make_images, make_plain, name_file
):
    """By its modules, its classes, and the epochs before, by which images are shuffled."""
    X, y = make_images()
    before = make_classifier(make_plain(dropout=0.5), warm_start=True).fit(X, y)

    def name(**changes):
        classifier = copy.deepcopy(before).set_params(checkpoint=".")
        vars(classifier).update(changes)
        return name_file_of(classifier, X, y)

    def name_file_of(classifier, *args):
        keys = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_classifier, "Checkpoint", lambda folder, key, seed: keys.append(key))
            with pytest.raises(AttributeError):  # the checkpoint is None
                classifier.fit(*args)
        return keys[0]

    other = copy.deepcopy(before.module_)
    other.drop.p = 0.1
    assert name() == name()
    assert name() != name(module_=other)
    assert name() != name(history_=before.history_[:1])
    assert name() != name(classes_=np.array(["dark", "light", "none"]))


# Files ------------------------------------------------------------------------------------------


def test_a_file_is_safetensors_and_json(make_classifier, make_images, tmp_path):
    """Nothing that would have to be unpickled."""
    make_classifier(checkpoint=tmp_path / "new" / "folder").fit(*make_images())
    (path,) = (tmp_path / "new" / "folder").iterdir()
    assert path.suffix == ".safetensors"
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["deepfeat"])
        names = list(file.keys())
    assert len(names) == len(description["tensors"]) > 0


def test_a_damaged_file_is_named(make_classifier, make_images, tmp_path):
    """The training does not silently start over."""
    X, y = make_images()
    make_classifier(checkpoint=tmp_path).fit(X, y)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path.name} is damaged.*Delete it to start"):
        make_classifier(checkpoint=tmp_path).fit(X, y)


@pytest.mark.parametrize("value", [1, True, ["folder"], b"folder"])
def test_a_checkpoint_must_be_a_folder(value, make_classifier, make_images):
    """A path or None."""
    with pytest.raises(ValueError, match=r"^checkpoint must be the path of a folder or None; got"):
        make_classifier(checkpoint=value).fit(*make_images())


def test_a_folder_that_cannot_be_written_is_found_before_training(
    make_classifier, make_images, epochs, monkeypatch, tmp_path
):
    """Whether it is not a folder or has no room."""
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OSError, match="file"):
        make_classifier(checkpoint=file).fit(*make_images())

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        make_classifier(checkpoint=tmp_path / "full").fit(*make_images())
    assert not epochs
    assert files_in(tmp_path / "full") == []


def test_a_disk_that_fills_up_later_does_not_end_the_training(
    make_classifier, make_images, assert_same_state, monkeypatch, tmp_path
):
    """A warning tells which epoch is not kept, and the file is that of the one before."""
    X, y = make_images()
    whole = make_classifier(max_epochs=3).fit(X, y)
    save, count = saving.save_file, itertools.count(1)

    def fail(*args, **kwargs):
        if next(count) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_file", fail)
        with pytest.warns(
            UserWarning, match="checkpoint of epoch [23] could not be written.*No space"
        ):
            full = make_classifier(max_epochs=3, checkpoint=tmp_path).fit(X, y)
    assert_same_state(full.module_.state_dict(), whole.module_.state_dict())
    resumed = make_classifier(max_epochs=3, checkpoint=tmp_path).fit(X, y)
    assert_same_state(resumed.module_.state_dict(), whole.module_.state_dict())
    assert without_times(resumed.history_) == without_times(whole.history_)


@pytest.mark.parametrize("name", ["augment", "preprocessing"])
def test_a_parameter_without_a_digest_is_named(
    name, make_classifier, make_images, to_16_pixels, tmp_path
):
    """Its training could not be found again."""
    with open(__file__) as file:

        def function(image):
            assert file
            return to_16_pixels(image) if name == "preprocessing" else image

        with pytest.raises(ValueError, match=r"^checkpoint must be None for this network"):
            make_classifier(**{name: function}, checkpoint=tmp_path).fit(*make_images())


def test_an_image_that_cannot_be_read_is_named(make_classifier, make_images, tmp_path):
    """By its index in X."""
    X, y = make_images()
    with pytest.raises(ImageError, match=r"X\[2\]"):
        make_classifier(checkpoint=tmp_path).fit([*X[:2], "missing.png", *X[3:]], y)


def describe(path, change):
    """Change the description in a file, whose digest is right."""
    tensors, description = saving.read_network(path)
    change(description, tensors)
    saving.write_network(path, tensors, description)


HOSTILE = {
    "no stage": lambda description, tensors: description.pop("stage"),
    "no values": lambda description, tensors: description.pop("values"),
    "no tensors": lambda description, tensors: description.update(tensors=[]),
    "another tensor": lambda description, tensors: tensors.update({"0": torch.zeros(1)}),
    "another type": lambda description, tensors: tensors.update({"0": tensors["0"].int()}),
    "another stage": lambda description, tensors: description.update(stage="second"),
    "a list": lambda description, tensors: description.update(values=[[1, 2]]),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_holds_something_else_is_named(case, make_classifier, make_images, tmp_path):
    """Whatever was written to it."""
    X, y = make_images()
    make_classifier(checkpoint=tmp_path).fit(X, y)
    (path,) = tmp_path.iterdir()
    describe(path, HOSTILE[case])
    with pytest.raises(ValueError, match=path.name):
        make_classifier(checkpoint=tmp_path).fit(X, y)


def test_a_file_may_be_replaced_while_it_is_read(tmp_path):
    """It is then read again: safetensors opens it twice."""
    path = tmp_path / "file.safetensors"
    read, replaced = saving._read, []

    def replace_while_reading(source):
        if not replaced:
            replaced.append(True)
            saving.write_network(path, {"a": torch.ones(3)}, {"new": True})
            raise ValueError("It is damaged: half of it is new.")
        return read(source)

    saving.write_network(path, {"a": torch.zeros(2)}, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "_read", replace_while_reading)
        state, description = saving.read_network(path)
    assert description == {"new": True}
    assert len(state["a"]) == 3


def test_a_folder_that_disappears_is_no_reason_to_stop(
    make_classifier, make_images, assert_same_state, tmp_path
):
    """Not even between the epochs of the head and the others."""
    X, y = make_images()
    params = {"max_epochs": 3, "head_epochs": 1, "unfreeze": "hidden", "augment": None}
    whole = make_classifier(**params).fit(X, y)
    folder = tmp_path / "folder"
    run_epoch = Trainer.run_epoch

    def remove_folder(*args):
        shutil.rmtree(folder, ignore_errors=True)
        return run_epoch(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run_epoch", remove_folder)
        with pytest.warns(UserWarning, match="could not be written"):
            classifier = make_classifier(checkpoint=folder, **params).fit(X, y)
    assert_same_state(classifier.module_.state_dict(), whole.module_.state_dict())


def test_a_relative_folder_stays_the_same(make_classifier, make_images, monkeypatch, tmp_path):
    """Also if a function of the user changes the current folder."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "first")

    def move(image):
        monkeypatch.chdir(tmp_path / "second")
        return image

    make_classifier(checkpoint="folder", augment=move).fit(*make_images())
    assert len(files_in(tmp_path / "first" / "folder")) == 1
    assert files_in(tmp_path / "second") == []


def test_the_same_training_may_run_twice_at_once(
    make_classifier, make_plain, make_images, assert_same_state, tmp_path
):
    """Each removes the other's activations and drafts when it ends, in any moment."""
    X, y = make_images()
    params = {"unfreeze": "hidden", "max_epochs": 3, "augment": None}
    network = make_plain()
    whole = make_classifier(network, **params).fit(X, y)
    step, write, keep = Trainer._step, saving.save_file, sources._keep

    def remove():
        for path in tmp_path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.suffix != ".safetensors":
                path.unlink()

    def remove_and(call):
        def call_after(*args, **kwargs):
            remove()
            return call(*args, **kwargs)

        return call_after

    attempts = itertools.count()

    def write_once_in_vain(tensors, path, metadata):
        write(tensors, path, metadata=metadata)
        if next(attempts) % 2 == 0:
            remove()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", remove_and(step))
        patch.setattr(sources, "_keep", remove_and(keep))
        patch.setattr(saving, "save_file", write_once_in_vain)
        classifier = make_classifier(network, checkpoint=tmp_path, **params).fit(X, y)
    assert_same_state(classifier.module_.state_dict(), whole.module_.state_dict())


def test_other_files_in_the_folder_stay(make_classifier, make_images, tmp_path):
    """A copy of a checkpoint, for instance."""
    X, y = make_images()
    make_classifier(checkpoint=tmp_path).fit(X, y)
    (path,) = tmp_path.iterdir()
    shutil.copy(path, tmp_path / f"{path.stem}-copy.safetensors")
    path.unlink()
    make_classifier(checkpoint=tmp_path).fit(X, y)
    assert files_in(tmp_path) == [f"{path.stem}-copy.safetensors", path.name]


# Activations ------------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch):
    """Note how many images the frozen part is computed of, for each source that is made."""
    counts = []
    cache = sources.cache_activations

    def note(source, cut, *, report, **options):
        counts.append(0)
        prefix = cut.run_prefix

        def count(batch):
            counts[-1] += len(batch)
            return prefix(batch)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cut, "run_prefix", count)
            return cache(source, cut, report=report, **options)

    monkeypatch.setattr(_fitting, "cache_activations", note)
    return counts


def test_kept_activations_are_reused(
    make_classifier, make_plain, make_images, fit_in_pieces, computed, tmp_path
):
    """After the first and the last image, which tell whether they fit; in the end all are gone."""
    X, y = make_images()
    params = {"unfreeze": "hidden", "max_epochs": 3, "augment": None, "checkpoint": tmp_path}
    network = make_plain()
    options = {"X_val": X[:3], "y_val": y[:3]}
    _, pieces = fit_in_pieces(lambda: make_classifier(network, **params), X, y, **options)
    assert computed == [8, 3, *[2, 2] * (pieces - 1)]
    assert len(files_in(tmp_path)) == 1


@pytest.mark.parametrize("damage", ["short", "long", "zeros", "NaN at the end", "a folder"])
def test_activations_that_are_not_whole_are_computed_again(
    damage,
    make_classifier,
    make_plain,
    make_images,
    failing_in_second_epoch,
    computed,
    assert_same_state,
    tmp_path,
):
    """A file that is too short, or does not hold what the network gives, is not used."""
    X, y = make_images()
    params = {"unfreeze": "hidden", "max_epochs": 3, "augment": None}
    network = make_plain()
    with failing_in_second_epoch(), pytest.raises(InterruptedError):
        make_classifier(network, checkpoint=tmp_path, **params).fit(X, y)
    (kept,) = (path for path in tmp_path.iterdir() if path.suffix != ".safetensors")
    size = kept.stat().st_size
    values = np.fromfile(kept, dtype=np.float32)
    if damage == "a folder":
        kept.unlink()
        kept.mkdir()
    elif damage in ("short", "long"):
        os.truncate(kept, size + (4 if damage == "long" else -4))
    else:
        values[-10 if damage.startswith("NaN") else 0 :] = np.nan if "NaN" in damage else 0
        values.tofile(kept)
    make_classifier(network, checkpoint=tmp_path, **params).fit(X, y)
    assert computed == [8, 2 + 8]


def test_activations_without_room_in_the_folder_stay_in_memory(
    make_classifier, make_plain, make_images, computed, monkeypatch, assert_same_state, tmp_path
):
    """They are then computed again when the training resumes."""
    X, y = make_images()
    params = {"unfreeze": "hidden", "max_epochs": 3, "augment": None}
    network = make_plain()
    whole = make_classifier(network, **params).fit(X, y)

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    kept = make_classifier(network, checkpoint=tmp_path, **params).fit(X, y)
    assert computed == [8, 8]
    assert len(files_in(tmp_path)) == 1
    assert_same_state(kept.module_.state_dict(), whole.module_.state_dict())


def test_no_draft_of_activations_is_left_by_an_error(
    make_classifier, make_plain, make_images, monkeypatch, tmp_path
):
    """Nor do they stay if the process ends just before it removes them."""
    X, y = make_images()
    params = {"unfreeze": "hidden", "max_epochs": 3, "augment": None, "checkpoint": tmp_path}
    network = make_plain()
    open_image = Record.open

    def fail_on_last(self):
        if self.index == 7:
            raise KeyboardInterrupt
        return open_image(self)

    with monkeypatch.context() as patch:
        patch.setattr(Record, "open", fail_on_last)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                make_classifier(network, batch_size=2, **params).fit(X, y)
    assert len(files_in(tmp_path)) == 1
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Checkpoint, "remove_activations", lambda self: None)
        make_classifier(network, batch_size=2, **params).fit(X, y)
    assert len(files_in(tmp_path)) == 2
    make_classifier(network, batch_size=2, **params).fit(X, y)
    assert len(files_in(tmp_path)) == 1
