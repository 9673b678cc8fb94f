"""Tests of checkpoints: a training that was interrupted ends as one that was not."""

import errno
import itertools
import json
import os
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
from deepfeat._finetuning import fitting as _fitting
from deepfeat._finetuning import saving, sources
from deepfeat._finetuning.training import Trainer

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
    assert output == f"The training is complete: {next(tmp_path.iterdir())}\n"
    second.partial_fit(X, y)  # it can be trained further


def test_verbose_says_that_a_training_resumes(
    make_classifier, make_images, fit_in_pieces, capsys, tmp_path
):
    """And after which epoch."""
    fit_in_pieces(lambda: make_classifier(checkpoint=tmp_path, verbose=1), *make_images())
    assert capsys.readouterr().out == (
        f"The training is resumed after epoch 1: {next(tmp_path.iterdir())}\n"
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


OTHER_TRAININGS = {
    "learning_rate": {"learning_rate": 0.5},
    "max_epochs": {"max_epochs": 3},
    "seed": {"random_state": 1},
    "augment": {"augment": None},
    "scoring": {"scoring": "loss"},
    "unfreeze": {"unfreeze": "hidden"},
    "batch_size": {"batch_size": 3},
}
SAME_TRAININGS = {
    "num_workers": {"num_workers": 2},
    "engine": {"engine": "torch", "device": torch.device("cpu")},
    "folder": {"checkpoint": "~"},
    "warm_start": {"warm_start": True},
}


@pytest.mark.parametrize("case", OTHER_TRAININGS)
def test_other_parameters_are_another_training(
    case, make_classifier, make_images, epochs, tmp_path
):
    """With a file of its own."""
    X, y = make_images()
    make_classifier(checkpoint=tmp_path).fit(X, y)
    make_classifier(checkpoint=tmp_path, **OTHER_TRAININGS[case]).fit(X, y)
    assert len(files_in(tmp_path)) == 2
    assert epochs[2] == 1


@pytest.mark.parametrize("case", SAME_TRAININGS)
def test_parameters_without_effect_are_the_same_training(
    case, make_classifier, make_images, epochs, monkeypatch, tmp_path
):
    """They may change between two attempts, and a folder may move."""
    monkeypatch.setenv("HOME", str(tmp_path))
    X, y = make_images()
    make_classifier(checkpoint=tmp_path).fit(X, y)
    make_classifier(**{"checkpoint": tmp_path} | SAME_TRAININGS[case]).fit(X, y)
    assert epochs == [1, 2]


def test_other_data_are_another_training(make_classifier, make_images, epochs, tmp_path):
    """A pixel, a label, a weight, their order, and validation images."""
    X, y = make_images()
    changed = [image.copy() for image in X]
    changed[3][0, 0, 0] ^= 1
    swapped = y.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    weights = np.linspace(1, 2, len(X))
    cases = [
        ((X, y), {}),
        ((changed, y), {}),
        ((X, swapped), {}),
        ((X, y, weights), {}),
        ((X, y, weights[::-1]), {}),
        ((X[::-1], y[::-1]), {}),
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
        with pytest.warns(UserWarning, match="checkpoint of epoch [23] is not written.*No space"):
            full = make_classifier(max_epochs=3, checkpoint=tmp_path).fit(X, y)
    assert_same_state(full.module_.state_dict(), whole.module_.state_dict())
    resumed = make_classifier(max_epochs=3, checkpoint=tmp_path).fit(X, y)
    assert_same_state(resumed.module_.state_dict(), whole.module_.state_dict())
    assert without_times(resumed.history_) == without_times(whole.history_)


def test_a_parameter_without_a_digest_is_named(make_classifier, make_images, tmp_path):
    """Its training could not be found again."""
    with open(__file__) as file:

        def augment(image):
            return image if file else None

        with pytest.raises(ValueError, match=r"^checkpoint must be None for this network"):
            make_classifier(augment=augment, checkpoint=tmp_path).fit(*make_images())


def test_an_image_that_cannot_be_read_is_named(make_classifier, make_images, tmp_path):
    """By its index in X."""
    X, y = make_images()
    with pytest.raises(ImageError, match=r"X\[2\]"):
        make_classifier(checkpoint=tmp_path).fit([*X[:2], "missing.png", *X[3:]], y)


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
    """After the first image, which tells their shape; they are removed in the end."""
    X, y = make_images()
    params = {"unfreeze": "hidden", "max_epochs": 3, "augment": None, "checkpoint": tmp_path}
    network = make_plain()
    options = {"X_val": X[:3], "y_val": y[:3]}
    _, pieces = fit_in_pieces(lambda: make_classifier(network, **params), X, y, **options)
    assert computed == [8, 3, *[1, 1] * (pieces - 1)]
    assert len(files_in(tmp_path)) == 1


def test_activations_that_are_not_whole_are_computed_again(
    make_classifier,
    make_plain,
    make_images,
    failing_in_second_epoch,
    computed,
    assert_same_state,
    tmp_path,
):
    """A file of another size is not used."""
    X, y = make_images()
    params = {"unfreeze": "hidden", "max_epochs": 3, "augment": None}
    network = make_plain()
    with failing_in_second_epoch(), pytest.raises(InterruptedError):
        make_classifier(network, checkpoint=tmp_path, **params).fit(X, y)
    (kept,) = (path for path in tmp_path.iterdir() if path.suffix != ".safetensors")
    os.truncate(kept, kept.stat().st_size - 4)
    make_classifier(network, checkpoint=tmp_path, **params).fit(X, y)
    assert computed == [8, 1 + 8]


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
