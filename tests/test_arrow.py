"""`FeatureBatch`: tables with images become tables with features, and with reasons for failures."""

import io
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pytest
from numpy.testing import assert_array_equal
from PIL import Image
from pyarrow import parquet
from torch import nn
from torchvision.transforms import ToTensor

from deepfeat import DeepFeatureExtractor
from deepfeat.arrow import FeatureBatch


@pytest.fixture(scope="module")
def extractor():
    return DeepFeatureExtractor(
        "resnet10_slim", "layer1", image_size=32, cache=None, num_workers=0, device="cpu"
    )


@pytest.fixture(scope="module")
def expected(extractor, scene_paths):
    """What `transform` gives for the images."""
    return extractor.transform(scene_paths)


@pytest.fixture(scope="module")
def table(scene_paths):
    """A manifest in three chunks, with a column besides and metadata."""
    ids = np.arange(len(scene_paths)) * 7
    parts = [
        pa.table({"id": ids[some], "path": scene_paths[some]})
        for some in (slice(0, 5), slice(5, 6), slice(6, None))
    ]
    return pa.concat_tables(parts).replace_schema_metadata({"made by": "us"})


def to_matrix(column):
    """Return a column of lists as an array, and which of them are null."""
    lists = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    values = lists.values.to_numpy(zero_copy_only=False)
    return values.reshape(len(lists), -1), lists.is_null().to_numpy(zero_copy_only=False)


# Rows -------------------------------------------------------------------------------------------


def test_rows_get_the_features_of_their_images(extractor, table, expected):
    """In their order, to the bit; all that they had stays."""
    found = FeatureBatch(extractor)(table)
    assert found.column_names == ["id", "path", "features", "error"]
    assert found.select(["id", "path"]).equals(table)
    assert found.schema.metadata == {b"made by": b"us"}
    assert found.schema.field("features").type == pa.list_(pa.float32(), 32)
    assert found.schema.field("error").type == pa.string()
    features, is_null = to_matrix(found["features"])
    assert_array_equal(features, expected)
    assert not is_null.any()
    assert found["error"].null_count == len(found)


def test_a_record_batch_stays_one(extractor, table, expected):
    """As Spark passes them."""
    (batch,) = table.combine_chunks().to_batches()
    found = FeatureBatch(extractor)(batch)
    assert isinstance(found, pa.RecordBatch)
    found.validate(full=True)
    assert_array_equal(to_matrix(found["features"])[0], expected)


@pytest.mark.parametrize("count", [0, 1])
def test_tables_of_few_rows_have_the_same_types(count, extractor, table):
    """Also those of none, which engines pass to find the types."""
    find_schema = FeatureBatch(extractor)
    assert find_schema(table.slice(0, count)).schema == find_schema(table).schema


def to_struct(path, is_read):
    return {"bytes": Path(path).read_bytes() if is_read else None, "path": path}


COLUMNS = {
    "strings": lambda paths: pa.array(paths),
    "large strings": lambda paths: pa.array(paths, pa.large_string()),
    "categories": lambda paths: pa.array(paths).dictionary_encode(),
    "bytes": lambda paths: pa.array([Path(path).read_bytes() for path in paths]),
    "large bytes": lambda paths: pa.array(
        [Path(path).read_bytes() for path in paths], pa.large_binary()
    ),
    "Hugging Face's": lambda paths: pa.array(
        [to_struct(path, is_read=number % 2) for number, path in enumerate(paths)]
    ),
    "URIs": lambda paths: pa.array([f"file://{path}" for path in paths]),
    "URIs in structs": lambda paths: pa.array(
        [to_struct(f"file://{path}", is_read=False) for path in paths]
    ),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_images_may_be_anything_that_a_column_holds(kind, extractor, scene_paths, expected):
    """Under any name."""
    table = pa.table({"picture": COLUMNS[kind](scene_paths)})
    found = FeatureBatch(extractor, image="picture", column="x", error_column="why")(table)
    assert found.column_names == ["picture", "x", "why"]
    assert_array_equal(to_matrix(found["x"])[0], expected)


def test_a_uri_names_a_file_as_it_is(extractor, scene_paths, expected, tmp_path):
    """Objects in a bucket may have any name; it is not decoded."""
    names = ["a b.jpg", "100%.jpg", "a%20b.jpg", "ä?#.jpg"]
    for name, path in zip(names, scene_paths, strict=False):
        (tmp_path / name).write_bytes(Path(path).read_bytes())
    table = pa.table({"path": [f"file://{tmp_path}/{name}" for name in names]})
    found = FeatureBatch(extractor)(table)
    assert found["error"].to_pylist() == [None] * 4
    assert_array_equal(to_matrix(found["features"])[0], expected[:4])


# Failures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_error", ["raise", "warn", "nan"])
@pytest.mark.parametrize("place", ["", "file://"])
def test_failures_are_a_column(place, on_error, extractor, scene_paths, expected, tmp_path):
    """With what `errors_` says, whatever the extractor does on errors; the others are as ever."""
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "cut.jpg").write_bytes(Path(scene_paths[1]).read_bytes()[:400])
    (tmp_path / "empty.jpg").touch()
    bad = [f"{place}{tmp_path / name}.jpg" for name in ("broken", "cut", "empty", "missing")]
    paths = [*bad[:2], *scene_paths[:3], *bad[2:], None, *scene_paths[3:]]
    failing = [0, 1, 5, 6, 7]
    silent = DeepFeatureExtractor(**extractor.get_params() | {"on_error": on_error})
    found = FeatureBatch(silent)(pa.table({"path": paths}))
    assert silent.on_error == on_error
    features, is_null = to_matrix(found["features"])
    assert_array_equal(np.flatnonzero(is_null), failing)
    assert_array_equal(features[~is_null], expected)
    reasons = found["error"].to_pylist()
    assert [index for index, reason in enumerate(reasons) if reason] == failing
    assert reasons[6] == "there is no such file"
    assert reasons[7] == "the image is null"
    assert "not an image" in reasons[0]
    assert str(tmp_path) not in "".join(filter(None, reasons))
    local = [path.removeprefix("file://") if path else "" for path in paths]
    oracle = DeepFeatureExtractor(**extractor.get_params() | {"on_error": "nan"})
    oracle.transform(local)
    for index in (0, 1, 5, 6):
        assert reasons[index] == oracle.errors_[index]


def test_a_table_of_failures_alone_is_one(extractor):
    """Nulls of the same types."""
    missing = pa.table({"path": ["none.jpg", "ftp://host/none.jpg"]})
    found = FeatureBatch(extractor)(missing)
    assert found["features"].null_count == 2
    assert found.schema.field("features").type == pa.list_(pa.float32(), 32)
    assert found["error"][0].as_py() == "there is no such file"
    assert "filesystem" in found["error"][1].as_py()
    nulls = FeatureBatch(extractor)(pa.table({"path": pa.nulls(2)}))
    assert nulls["error"].to_pylist() == ["the image is null"] * 2


# float16 ----------------------------------------------------------------------------------------


def test_features_may_be_halved(extractor, table, expected):
    """Rounded to the next value."""
    found = FeatureBatch(extractor, dtype="float16")(table)
    assert found.schema.field("features").type == pa.list_(pa.float16(), 32)
    assert_array_equal(to_matrix(found["features"])[0], expected.astype(np.float16))


def test_features_beyond_float16_are_failures():
    """They would be infinite."""
    net = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.Flatten()).eval()
    nn.init.constant_(net[0].weight, 40_000)
    extractor = DeepFeatureExtractor(
        net, "0", preprocessing=ToTensor(), norm=None, cache=None, num_workers=0, device="cpu"
    )
    pictures = [np.full((8, 8, 3), value, dtype=np.uint8) for value in (10, 255)]
    encoded = [encode(picture) for picture in pictures]
    found = FeatureBatch(extractor, image="image", dtype="float16")(pa.table({"image": encoded}))
    assert found["features"].is_null().to_pylist() == [False, True]
    assert "65,504" in found["error"][1].as_py()
    whole = FeatureBatch(extractor, image="image")(pa.table({"image": encoded}))
    assert whole["error"].null_count == 2


def encode(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


# Where it runs ----------------------------------------------------------------------------------


def test_it_travels_light(extractor, table, expected):
    """Its pickle has a name instead of a network, and works in another process."""
    pickled = pickle.dumps(FeatureBatch(extractor))
    assert len(pickled) < 1000
    program = (
        "import pickle, sys, pyarrow as pa\n"
        "add_features, table = pickle.loads(sys.stdin.buffer.read())\n"
        "sys.stdout.buffer.write(pickle.dumps(add_features(table)))"
    )
    message = pickle.dumps((FeatureBatch(extractor), table))
    run = subprocess.run(
        [sys.executable, "-c", program], input=message, capture_output=True, check=True
    )
    assert_array_equal(to_matrix(pickle.loads(run.stdout)["features"])[0], expected)


def test_threads_may_share_it(extractor, table, expected):
    """Each gets the reasons of its own rows."""
    add_features = FeatureBatch(extractor)
    tables = [table.slice(start, 3) for start in range(0, 12, 3)]
    tables[2] = pa.table({"path": ["none.jpg"] * 3})
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(add_features, tables))
    for number in (0, 1, 3):
        assert found[number]["error"].null_count == 3
        features, _ = to_matrix(found[number]["features"])
        assert_array_equal(features, expected[3 * number : 3 * number + 3])
    assert found[2]["error"].null_count == 0


def test_a_loop_over_parquet_files(extractor, table, expected, tmp_path):
    """As the guide has it: one file of features for each file of the manifest."""
    (tmp_path / "manifest").mkdir()
    for number in range(3):
        part = table.slice(4 * number, 4)
        parquet.write_table(part, tmp_path / "manifest" / f"{number}.parquet")
    add_features = FeatureBatch(extractor)
    (tmp_path / "features").mkdir()
    for file in sorted((tmp_path / "manifest").glob("*.parquet")):
        manifest = parquet.ParquetFile(file)
        target = tmp_path / "features" / file.name
        schema = add_features(manifest.schema_arrow.empty_table()).schema
        with parquet.ParquetWriter(target, schema) as writer:
            for rows in manifest.iter_batches(2):
                writer.write_batch(add_features(rows))
    found = pyarrow.dataset.dataset(tmp_path / "features").to_table().sort_by("id")
    assert found["id"].to_pylist() == table["id"].to_pylist()
    assert_array_equal(to_matrix(found["features"])[0], expected)


# Refusals ---------------------------------------------------------------------------------------


def test_columns_must_be_there_and_hold_images(extractor, table):
    """The message names those that are there."""
    with pytest.raises(ValueError, match=r"^image must name a column .* 'image', and .*'id', 'pa"):
        FeatureBatch(extractor, image="image")(table)
    with pytest.raises(ValueError, match=r"^image must name a column of paths, .*'id' of type int"):
        FeatureBatch(extractor, image="id")(table)
    for options in ({"column": "id"}, {"error_column": "id"}):
        with pytest.raises(ValueError, match=r"^The rows have a column 'id' already"):
            FeatureBatch(extractor, **options)(table)


def test_parameters_are_checked_at_once(extractor):
    """Before a cluster is asked."""
    with pytest.raises(ValueError, match=r"^dtype must be 'float32' or 'float16'; got 'int8'\.$"):
        FeatureBatch(extractor, dtype="int8")
    with pytest.raises(TypeError, match=r"^extractor must be a DeepFeatureExtractor; got str"):
        FeatureBatch("vgg16")
    with pytest.raises(ValueError, match=r"^image, column and error_column must be three names"):
        FeatureBatch(extractor, column="path")
    wrong = DeepFeatureExtractor("resnet10_slim", "layer9")
    with pytest.raises(ValueError, match="layer9"):
        FeatureBatch(wrong)


def test_a_missing_package_is_named():
    """With the extra that installs it."""
    program = "import sys; sys.modules['pyarrow'] = None; import deepfeat.arrow"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install 'pyarrow>=" in run.stderr
