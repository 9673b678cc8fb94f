"""Tests of callbacks: those of scikit-learn are told of each epoch."""

import importlib
import pickle
import sys

import numpy as np
import pytest
from numpy.testing import assert_allclose
from sklearn.model_selection import GridSearchCV

callback = pytest.importorskip("sklearn.callback", reason="scikit-learn has them from 1.9 on")


class Recorder:
    """A callback that notes what it is told, and stops after some epochs."""

    def __init__(self, stop_after=None):
        self.told, self.fitted, self.stop_after = [], [], stop_after

    def setup(self, estimator, context):
        self.told.append("setup")

    def teardown(self, estimator, context):
        self.told.append("teardown")

    def on_fit_task_begin(self, estimator, context, *, metadata=None):
        self.told.append(f"begin {context.task_name}")
        self.metadata = metadata

    def on_fit_task_end(self, estimator, context, *, X=None, fitted_estimator=None):
        self.told.append(f"end {context.task_name}")
        if context.task_name == "epoch":
            kept = pickle.loads(pickle.dumps(fitted_estimator))  # as one that keeps the best does
            self.fitted.append(kept.predict_proba(X))
        return self.told.count("end epoch") == self.stop_after


def test_a_callback_is_told_of_each_epoch(images, make_classifier, assert_same_state, state_of):
    """And gets a classifier as it is after that; the training is the same as without."""
    X, y = images
    recorder = Recorder()
    classifier = make_classifier(max_epochs=3, head_epochs=1, unfreeze="blocks.2")
    classifier.set_callbacks(recorder).fit(X, y, np.arange(1, 9))
    epochs = ["begin epoch", "end epoch"] * 4
    assert recorder.told == ["setup", "begin fit", *epochs, "end fit", "teardown"]
    assert recorder.metadata["sample_weight"].tolist() == list(range(1, 9))
    assert_allclose(recorder.fitted[-1], classifier.predict_proba(X))
    assert not np.allclose(recorder.fitted[0], recorder.fitted[1])
    without = make_classifier(max_epochs=3, head_epochs=1, unfreeze="blocks.2")
    assert_same_state(state_of(classifier), state_of(without.fit(X, y, np.arange(1, 9))))


def test_a_callback_may_stop_a_training(images, make_classifier):
    """Also where the head is trained alone; the network is kept."""
    recorder = Recorder(stop_after=2)
    classifier = make_classifier(max_epochs=3, head_epochs=3, unfreeze="blocks.2")
    assert classifier.set_callbacks(recorder).fit(*images).n_iter_ == 2
    assert recorder.told[-2:] == ["end fit", "teardown"]


def test_callbacks_are_torn_down_after_an_error(images, make_classifier):
    """As scikit-learn promises."""
    recorder = Recorder()
    classifier = make_classifier(learning_rate=1e36).set_callbacks(recorder)
    with pytest.raises(ValueError, match="became"):
        classifier.fit(*images)
    assert recorder.told[-1] == "teardown"


def test_a_monitor_scores_each_epoch(images, make_classifier):
    """On the training images, in eval mode."""
    X, y = images
    monitor = callback.ScoringMonitor(scoring="accuracy")
    classifier = make_classifier(max_epochs=3).set_callbacks(monitor).fit(X, y)
    log = monitor.get_logs().data_as_pandas
    scores = log[log["task_name"] == "epoch"]["accuracy"]
    assert len(scores) == 3
    assert scores.iloc[-1] == classifier.score(X, y)


def test_a_search_hands_its_progress_bar_on(images, make_classifier, capsys):
    """Down to the epochs."""
    search = GridSearchCV(make_classifier(), {"max_epochs": [1, 2]}, cv=2)
    search.set_callbacks(callback.ProgressBar(max_propagation_depth=2)).fit(*images)
    assert "FineTuneClassifier" in capsys.readouterr().out


def test_releases_without_callbacks_do_without(monkeypatch):
    """Those of scikit-learn before 1.9: a classifier has no set_callbacks, and tells nobody."""
    name = "deepfeat._finetuning.callbacks"
    with monkeypatch.context() as patch:
        patch.delattr("sklearn.callback")
        patch.setitem(sys.modules, "sklearn.callback", None)
        patch.delitem(sys.modules, name)
        module = importlib.import_module(name)
    estimator = module.CallbackSupport()
    assert not hasattr(estimator, "set_callbacks")
    tasks = module.Tasks(estimator, 2, {"X": None, "y": None, "metadata": {}}, dict)
    tasks.begin_epoch()
    assert tasks.end_epoch() is False
    tasks.end()
    assert module.with_callbacks(abs)(-1) == 1
