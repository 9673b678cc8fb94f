"""Tests of the extractor among scikit-learn's tools: its own checks, and ours over images."""

import copy
import pickle
from collections import Counter

import cloudpickle
import joblib
import numpy as np
import pandas as pd
import polars as pl
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import check_estimator, parametrize_with_checks

from deepfeat import DeepFeatureExtractor


def make(layer="stage2", **params):
    fast = {"weights": None, "image_size": 32, "num_workers": 0}
    return DeepFeatureExtractor("squeezenet1_1", layer, **fast | params)


# The checks of scikit-learn ---------------------------------------------------------------------

# Its tables of random numbers become images of one line.
of_tables = make(image_shape=(1, -1))


def expected_to_fail(_estimator):
    return {
        "check_estimators_dtypes": (
            "int64 values from 0 to 2 are read on the scale of int64, where they are black: such "
            "an image is refused, rather than read on a scale that is guessed from its values"
        ),
    }


# The checks draw from normal distributions; of pixels, what lies outside [0, 1] is clipped.
ignores_clipping = pytest.mark.filterwarnings("ignore:Pixels outside the scale:UserWarning")


@ignores_clipping
@parametrize_with_checks([of_tables], expected_failed_checks=expected_to_fail)
def test_the_checks_of_scikit_learn_pass(estimator, check):
    """On the real class: with `image_shape` a table is a legal input."""
    check(estimator)


@ignores_clipping
def test_the_checks_of_scikit_learn_really_run():
    """An estimator that refuses tables passes one check: ours passes at least forty."""
    results = check_estimator(
        of_tables,
        expected_failed_checks=expected_to_fail(of_tables),
        on_fail=None,
        on_skip=None,
    )
    counts = Counter(result["status"] for result in results)
    assert counts["passed"] >= 40
    assert counts["failed"] == 0
    assert counts["xfail"] == len(expected_to_fail(of_tables))


# Parameters and copies --------------------------------------------------------------------------


def test_get_params_and_set_params_name_every_parameter():
    """What was given is kept as it is, by a clone as well."""
    extractor = make(layer=["stage1", "stage2"], norm=None, batch_size=np.int64(3))
    params = extractor.get_params()
    assert params["layer"] is extractor.layer
    assert clone(extractor).get_params() == params
    other = DeepFeatureExtractor().set_params(**params)
    assert other.get_params() == params
    with pytest.raises(ValueError, match="Invalid parameter 'layers'"):
        extractor.set_params(layers="stage1")


def test_nothing_is_checked_before_fit():
    """As scikit-learn has it: a constructor only keeps what it is given."""
    params = DeepFeatureExtractor("nothing", None, pooling=3, batch_size="many").get_params()
    assert params["backbone"] == "nothing"
    assert params["batch_size"] == "many"


COPIES = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "cloudpickle": lambda value: pickle.loads(cloudpickle.dumps(value)),
    "deepcopy": copy.deepcopy,
    "clone": clone,
}


@pytest.mark.parametrize("copied", [*COPIES, "joblib"])
def test_a_copy_gives_the_same_rows(scene_paths, tmp_path, copied):
    """After fit and transform, errors and all."""
    extractor = make(on_error="nan")
    rows = extractor.fit_transform(scene_paths)
    if copied == "joblib":
        joblib.dump(extractor, tmp_path / "extractor.joblib")
        again = joblib.load(tmp_path / "extractor.joblib")
    else:
        again = COPIES[copied](extractor)
    assert_array_equal(again.transform(scene_paths), rows)
    assert again.get_params() == extractor.get_params()


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps], ids=["pickle", "cloudpickle"])
@pytest.mark.parametrize("state", ["new", "fitted", "used", "in a pipeline"])
def test_a_pickle_is_small(scene_paths, scene_labels, state, dumps):
    """A network of megabytes, and the rows in the cache, stay outside."""
    extractor = make()
    if state != "new":
        extractor.fit(scene_paths)
    if state == "used":
        extractor.transform(scene_paths)
    if state == "in a pipeline":
        extractor = make_pipeline(extractor, LinearSVC()).fit(scene_paths, scene_labels)
    assert len(dumps(extractor)) < 100_000


def test_a_joblib_file_is_small(scene_paths, tmp_path):
    """So is what `joblib.dump` writes."""
    extractor = make()
    extractor.fit_transform(scene_paths)
    joblib.dump(extractor, tmp_path / "extractor.joblib")
    assert (tmp_path / "extractor.joblib").stat().st_size < 100_000


def test_an_extractor_shows_its_parameters():
    """In text and in a notebook, alone and in a pipeline."""
    extractor = DeepFeatureExtractor("vgg16", "relu7", norm=None)
    text = "DeepFeatureExtractor(backbone='vgg16', layer='relu7', norm=None)"
    assert repr(extractor) == text
    assert "vgg16" in extractor._repr_html_()
    assert "DeepFeatureExtractor" in make_pipeline(extractor, LinearSVC())._repr_html_()


def test_nothing_needs_to_be_fitted(scene_paths):
    """scikit-learn's `check_is_fitted` agrees, and a pipeline of ready steps can predict."""
    tags = make().__sklearn_tags__()
    assert not tags.requires_fit
    assert not tags.input_tags.two_d_array
    assert of_tables.__sklearn_tags__().input_tags.two_d_array
    assert make_pipeline(make()).transform(scene_paths).shape == (12, 128)


# Pipelines and searches -------------------------------------------------------------------------

INPUTS = {
    "list of paths": list,
    "array of paths": np.array,
    "Series of paths": pd.Series,
    "list of images": lambda paths: [Image.open(path) for path in paths],
    "array of images": lambda paths: np.stack(
        [np.asarray(Image.open(path).convert("RGB").resize((24, 20))) for path in paths]
    ),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_a_pipeline_learns_from_images(scene_paths, scene_labels, kind):
    """It tells striped pictures from flat ones that it has not seen."""
    X = INPUTS[kind](scene_paths)
    pipe = make_pipeline(make(), LinearSVC(C=10, random_state=0))
    assert pipe.fit(X[:8], scene_labels[:8]).score(X[8:], scene_labels[8:]) == 1
    assert pipe[:-1].get_feature_names_out()[17] == "stage2_0017"


def test_cross_validation_takes_images(scene_paths, scene_labels):
    """Folds of a list of paths are lists of paths."""
    pipe = Pipeline([("features", make()), ("svm", LinearSVC(C=10, random_state=0))])
    assert_array_equal(cross_val_score(pipe, scene_paths, scene_labels, cv=3), [1, 1, 1])


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_search_chooses_layer_and_C(scene_paths, scene_labels, n_jobs):
    """Also in two processes, to which the extractor is sent as a pickle."""
    search = GridSearchCV(
        make_pipeline(make(), LinearSVC(C=10, random_state=0)),
        {
            "deepfeatureextractor__layer": ["stage1", "stage2", ["stage1", "stage2"]],
            "linearsvc__C": [1, 10],
        },
        cv=2,
        n_jobs=n_jobs,
        error_score="raise",
    )
    search.fit(scene_paths, scene_labels)
    assert search.best_score_ == 1
    assert len(search.cv_results_["params"]) == 6
    assert_array_equal(search.predict(scene_paths), scene_labels)


# Columns ----------------------------------------------------------------------------------------


@pytest.fixture
def table(scene_paths):
    """A column of paths beside one of numbers, in an order of its own."""
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {"path": scene_paths, "age": rng.normal(size=12)}, index=[f"id{i}" for i in range(12)]
    )


@pytest.mark.parametrize("column", ["path", ["path"]], ids=["Series", "DataFrame"])
def test_a_column_of_paths_goes_with_columns_of_numbers(table, scene_labels, column):
    """A ColumnTransformer hands over a Series or a DataFrame; both are read, and named."""
    columns = ColumnTransformer(
        [("image", make(), column), ("number", StandardScaler(), ["age"])],
    )
    rows = columns.fit_transform(table)
    assert_allclose(rows[:, :128], make().transform(list(table["path"])), rtol=1e-6)
    assert rows.shape == (12, 129)
    assert_array_equal(
        columns.get_feature_names_out()[[17, 128]], ["image__stage2_0017", "number__age"]
    )
    pipe = make_pipeline(columns, LogisticRegression()).fit(table, scene_labels)
    assert len(pipe.predict(table[:3])) == 3


def test_a_union_puts_extractors_side_by_side(scene_paths):
    """Their names tell them apart."""
    union = FeatureUnion([("deep", make()), ("shallow", make(layer="stage1", pooling="max"))])
    rows = union.fit_transform(scene_paths)
    parts = [make(), make(layer="stage1", pooling="max")]
    assert_array_equal(rows, np.hstack([part.transform(scene_paths) for part in parts]))
    assert_array_equal(
        union.get_feature_names_out()[[0, 128]], ["deep__stage2_0000", "shallow__stage1_0000"]
    )


def test_pandas_output_keeps_the_index(table):
    """So rows can be joined with what else is known of an image."""
    extractor = make().set_output(transform="pandas")
    frame = extractor.fit_transform(table[["path"]])
    assert_array_equal(frame.index, table.index)
    assert_array_equal(frame.columns, extractor.get_feature_names_out())
    assert (frame.dtypes == np.float32).all()
    assert_array_equal(frame, make().transform(table[["path"]]))
    without_index = extractor.transform(list(table["path"]))
    assert_array_equal(without_index.index, range(12))


def test_polars_output_has_the_names(table):
    """From polars to polars, or from anything else."""
    extractor = make().set_output(transform="polars")
    for X in (pl.DataFrame({"path": table["path"].tolist()}), list(table["path"])):
        frame = extractor.fit_transform(X)
        assert isinstance(frame, pl.DataFrame)
        assert frame.columns == list(extractor.get_feature_names_out())
        assert_array_equal(frame.to_numpy(), make().transform(X))


def test_a_table_of_pixels_has_names_and_a_width():
    """scikit-learn's attributes and complaints are those of any estimator of tables."""
    pixels = np.random.default_rng(0).random((3, 48))
    names = [f"pixel{i}" for i in range(48)]
    extractor = make(image_shape=(4, 4, 3)).fit(pd.DataFrame(pixels, columns=names))
    assert extractor.n_features_in_ == 48
    assert_array_equal(extractor.feature_names_in_, names)
    with pytest.raises(ValueError, match="feature names should match"):
        extractor.transform(pd.DataFrame(pixels, columns=names[::-1]))
    with pytest.raises(ValueError, match="X has 24 features, but DeepFeatureExtractor is expect"):
        make(image_shape=(-1, 4, 3)).fit(pixels).transform(pixels[:, :24])
    with pytest.raises(ValueError, match="input_features is not equal to feature_names_in_"):
        extractor.get_feature_names_out(names[::-1])


def test_bad_images_pass_a_pipeline_that_can_do_without(table, tmp_path):
    """Rows of NaN stay in their place for an imputer or a dropper to see."""
    bad = tmp_path / "bad.jpg"
    bad.write_text("no image")
    table.loc["id3", "path"] = str(bad)
    frame = make(on_error="nan").set_output(transform="pandas").fit_transform(table[["path"]])
    assert list(frame.index[frame.isna().all(axis=1)]) == ["id3"]
    assert len(frame.dropna()) == 11
