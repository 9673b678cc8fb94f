"""`extract` on one node of Ray: rows, errors, what resumes and what is refused."""

import _thread
import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import joblib
import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pytest
import ray
import torch
from filelock import FileLock
from numpy.testing import assert_array_equal
from pyarrow import parquet
from ray.util.joblib import register_ray
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from torchvision.transforms import ToTensor

import deepfeat
from deepfeat import DeepFeatureExtractor
from deepfeat.arrow import FeatureBatch
from deepfeat.ray import extract
from deepfeat.ray._cluster import limit_readers, plan_actors
from deepfeat.ray._extract import _Extraction

pytestmark = pytest.mark.filterwarnings("default")  # Ray warns of its own settings


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """A cluster of one node with the CPUs that two actors and Ray itself need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_enable_worker_prestart", "0")  # one per CPU, for two cores
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=200_000_000,
        )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def extractor():
    return DeepFeatureExtractor("resnet10_slim", "layer1", image_size=32, device="cpu")


@pytest.fixture(scope="module")
def rows(scene_paths, tmp_path_factory):
    """Sixteen images: one twice, one that is cut short and one that is missing."""
    folder = tmp_path_factory.mktemp("broken")
    cut, missing = folder / "cut.jpg", folder / "missing.jpg"
    with open(scene_paths[1], "rb") as file:
        cut.write_bytes(file.read()[:600])
    # Apart: a network may round differently where it is given one image alone.
    (*a, b), (*c, d), (*e, f) = scene_paths[:4], scene_paths[4:8], scene_paths[8:]
    paths = [*a, str(cut), b, *c, str(missing), d, *e[:2], None, e[2], f, scene_paths[3]]
    ids = [f"image {number}" for number in range(len(paths))]
    return pa.table({"path": paths, "id": ids, "city": ["Graz", "Gent"] * 8})


@pytest.fixture(scope="module")
def expected(extractor, rows):
    """What `transform` gives for these images, in one process."""
    alone = DeepFeatureExtractor(**{**extractor.get_params(), "on_error": "nan", "cache": None})
    return alone.transform(rows["path"].to_pylist())


@pytest.fixture(scope="module")
def manifest(rows, tmp_path_factory):
    """The rows in a folder of three files."""
    folder = tmp_path_factory.mktemp("manifest")
    for start, stop in ((0, 3), (3, 9), (9, 16)):
        parquet.write_table(rows.slice(start, stop - start), folder / f"from {start}.parquet")
    return folder


@pytest.fixture(scope="module")
def job(extractor, manifest, tmp_path_factory):
    """A finished job: its folder, and what it returned."""
    folder = tmp_path_factory.mktemp("job") / "with a space"
    return folder, extract(extractor, manifest, folder, rows_per_task=4)


@pytest.fixture
def filled(job, tmp_path):
    """A copy of the folder of the job."""
    return Path(shutil.copytree(job[0], tmp_path / "filled"))


@pytest.fixture
def output(tmp_path):
    """A folder that does not exist."""
    return tmp_path / "output"


def read(output):
    """Return the rows of a folder as any reader of Parquet finds them, ordered by their ids."""
    table = pyarrow.dataset.dataset(output).to_table()
    return table.sort_by("id")


def to_matrix(table):
    lists = table["features"].to_pylist()
    return np.array([np.full(32, np.nan) if one is None else one for one in lists], np.float32)


# Rows -------------------------------------------------------------------------------------------


def test_each_row_has_the_features_of_its_image(rows, job, expected):
    """To the bit, and an image that cannot be read has the reason."""
    folder, summary = job
    order = np.argsort(rows["id"].to_pylist())
    found = read(folder)
    assert found.column_names == ["id", "path", "city", "features", "error"]
    assert found.select(rows.column_names).equals(rows.take(order))
    assert_array_equal(to_matrix(found), expected[order])
    reasons = dict(zip(found["id"].to_pylist(), found["error"].to_pylist(), strict=True))
    failed = {name: reason for name, reason in reasons.items() if reason is not None}
    assert failed.keys() == {"image 3", "image 8", "image 12"}
    assert failed["image 8"] == "there is no such file"

    assert (summary.rows, summary.failed, summary.computed) == (16, 3, 16)
    assert summary.images_per_second == pytest.approx(16 / summary.seconds)
    assert json.loads((folder / "_SUCCESS").read_text())["rows"] == 16
    files = list(folder.glob("*.parquet"))
    assert [parquet.read_metadata(file).num_rows for file in files] == [4] * 4


def test_the_schema_says_what_computed_the_rows(extractor, job):
    """In each file, in words of the extractor."""
    for file in job[0].glob("*.parquet"):
        schema = parquet.read_schema(file)
        assert schema.field("features").type.list_size == 32
        described = json.loads(schema.metadata[b"deepfeat"])
        assert described.pop("preprocessing")["crop_size"] == [32, 32]
        assert described.pop("columns").keys() == set(schema.names)
        assert described == {
            "version": deepfeat.__version__,
            "backbone": "resnet10_slim",
            "digest": extractor._find_backbone().fingerprint().hex(),
            "layers": ["layer1"],
            "pooling": ["avg"],
            "norm": "l2",
            "precision": "float32",
            "engine": "torch",
            "id": "id",
            "image": "path",
        }


def test_a_job_leaves_things_as_they_were(extractor, job):
    """The extractor with its cache, and the settings of Ray Data."""
    assert extractor.cache == "memory"
    assert extractor.num_workers == "auto"
    assert ray.data.DataContext.get_current().checkpoint_config is None


@pytest.mark.slow
def test_a_dataset_of_encoded_images_is_a_manifest(extractor, rows, output, expected, tmp_path):
    """As Hugging Face has them; what they hold is not copied."""
    good = np.flatnonzero(np.isfinite(expected).all(axis=1))
    paths = map(Path, rows["path"].take(good).to_pylist())
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    parquet.write_table(pa.table({"key": good, "image": images}), tmp_path / "images.parquet")
    dataset = ray.data.read_parquet(str(tmp_path / "images.parquet"))
    dataset = dataset.filter(expr=ray.data.expressions.col("key") >= 4)
    summary = extract(extractor, dataset, output, id="key", image="image")
    found = pyarrow.dataset.dataset(output).to_table().sort_by("key")
    assert found.column_names == ["key", "features", "error"]
    assert found["key"].to_pylist() == good[good >= 4].tolist()
    assert_array_equal(to_matrix(found), expected[good[good >= 4]])
    assert summary.failed == 0
    assert dataset.context.checkpoint_config is None


@pytest.mark.slow
def test_a_step_of_ray_data_gives_the_same(extractor, rows, manifest, expected):
    """As the guide has it."""
    add_features = FeatureBatch(extractor)
    step = ray.data.read_parquet(str(manifest)).map_batches(
        add_features, batch_format="pyarrow", batch_size=16
    )
    found = pa.concat_tables(step.iter_batches(batch_size=None, batch_format="pyarrow"))
    order = np.argsort(rows["id"].to_pylist())
    assert_array_equal(to_matrix(found.sort_by("id")), expected[order])


@pytest.mark.slow
def test_a_search_on_ray_gives_the_same(scene_paths, scene_labels, tmp_path):
    """Joblib sends the candidates to Ray, as the guide has it."""
    extractor = DeepFeatureExtractor("resnet10_slim", image_size=32, cache=tmp_path)
    extractor.precompute(scene_paths)
    search = GridSearchCV(
        make_pipeline(extractor, LinearSVC()),
        {"deepfeatureextractor__layer": ["layer2", "layer4"], "linearsvc__C": [0.01, 1]},
        cv=2,
        n_jobs=2,
    )
    alone = clone(search).set_params(n_jobs=1).fit(scene_paths, scene_labels)
    register_ray()
    with joblib.parallel_backend("ray"):
        search.fit(scene_paths, scene_labels)
    assert_array_equal(search.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"])


# Resuming ---------------------------------------------------------------------------------------


def test_a_finished_job_has_nothing_to_do(extractor, manifest, filled):
    """The same call again gives what is there."""
    before = {path: path.read_bytes() for path in filled.glob("*.parquet")}
    summary = extract(extractor, manifest, filled)
    assert (summary.rows, summary.failed, summary.computed) == (16, 3, 0)
    assert {path: path.read_bytes() for path in filled.glob("*.parquet")} == before
    assert (filled / "_SUCCESS").exists()


def test_a_job_resumes(extractor, rows, manifest, filled, expected, tmp_path):
    """A torn file that is not committed is written again, and a row that is new is added."""
    (filled / "_SUCCESS").unlink()
    torn = next(filled.glob("*.parquet"))
    torn.write_bytes(torn.read_bytes()[:-100])
    record = find_record(filled, torn)
    record.rename(record.with_suffix(".pending.parquet"))
    more = pa.table({"path": rows["path"][:1], "id": ["image 99"], "city": ["Gent"]})
    longer = Path(shutil.copytree(manifest, tmp_path / "longer"))
    parquet.write_table(more, longer / "more.parquet")

    summary = extract(extractor, longer, filled)
    assert (summary.rows, summary.failed, summary.computed) == (17, 3, 5)
    order = np.argsort(rows["id"].to_pylist())
    assert_array_equal(to_matrix(read(filled)), expected[[*order, 0]])
    assert (filled / "_SUCCESS").exists()


@pytest.mark.slow
def test_weights_that_a_node_cannot_download_end_the_job(manifest, output):
    """With what to do about it; rows without features would look like bad images."""
    extractor = DeepFeatureExtractor("resnet18", device="cpu")
    with pytest.raises(ray.exceptions.RayError, match=r"resnet18 could not be downloaded.* Put "):
        extract(extractor, manifest, output)
    assert not list(output.glob("*.parquet"))


@pytest.mark.slow
def test_after_an_interrupt_the_same_call_resumes(extractor, manifest, output):
    """Also where the traceback is kept, as in a notebook, and with it what was running."""

    def interrupt():
        while not list(output.glob("*.parquet")):
            time.sleep(0.01)
        _thread.interrupt_main()

    slow = clone(extractor).set_params(image_size=1024)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt) as kept:
        extract(slow, manifest, output, rows_per_task=1)
    assert kept.tb is not None
    assert not (output / "_SUCCESS").exists()
    summary = extract(slow, manifest, output, rows_per_task=1)
    assert (summary.rows, summary.failed) == (16, 3)
    assert 0 < summary.computed < 16


def find_record(folder, file):
    """Return Ray's record of a file."""
    (record,) = (
        path for path in (folder / "_checkpoint").iterdir() if file.name.startswith(path.stem)
    )
    return record


@pytest.mark.slow
@pytest.mark.parametrize("event", ["the file was removed", "its record is pending too"])
def test_a_row_without_a_file_is_computed_again(extractor, manifest, filled, event):
    """Ray takes it for done. A record is both where a kill came between copying and deleting it."""
    file = next(filled.glob("*.parquet"))
    record = find_record(filled, file)
    if event == "the file was removed":
        file.unlink()
    else:
        shutil.copy(record, record.with_suffix(".pending.parquet"))
    summary = extract(extractor, manifest, filled)
    assert (summary.rows, summary.failed, summary.computed) == (16, 3, 4)
    assert read(filled)["id"].to_pylist() == sorted(f"image {number}" for number in range(16))


def test_rows_that_are_there_twice_are_found(extractor, manifest, filled):
    """Two jobs may have written to one folder."""
    file = next(filled.glob("*.parquet"))
    shutil.copy(file, filled / "copy.parquet")
    with pytest.raises(RuntimeError, match=r"Rows are repeated in .*another job wrote"):
        extract(extractor, manifest, filled)
    assert not (filled / "_SUCCESS").exists()


# What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": "layer2"}, r"expected layers \['layer2'\], found \['layer1'\]"),
        ({"norm": None}, "expected norm None, found 'l2'"),
        ({"image_size": 64}, "expected digest '.*', found '"),
        ({"weights": None}, "expected digest "),
        ({"precision": "bfloat16"}, "expected precision 'bfloat16', found 'float32'"),
        ({"engine": "openvino"}, "expected engine 'openvino', found 'torch'"),
    ],
    ids=str,
)
def test_the_folder_of_another_extractor_is_refused(extractor, filled, manifest, change, message):
    """Whatever would change its rows; `_SUCCESS` stays."""
    other = DeepFeatureExtractor(**{**extractor.get_params(), **change})
    with pytest.raises(ValueError, match=f"filled by another extractor.*{message}"):
        extract(other, manifest, filled)
    assert (filled / "_SUCCESS").exists()


def test_other_columns_are_refused(extractor, filled, manifest):
    """A reader of the folder would find the columns of one of its files."""
    with pytest.raises(ValueError, match=r"with other columns: expected columns .*, found"):
        extract(extractor, manifest, filled, columns=["city"])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (list("abacb"), "a column of distinct values; 2 in 'id' are repeated, such as 'a', 'b'"),
        ([1, None, 2, None, 3], "a column without nulls; 2 of 5 in 'id' are null"),
        ([0.5, 1, 2, 3, 4], "a column of integers, strings or bytes; got 'id' of type double"),
    ],
    ids=["repeated", "null", "floats"],
)
def test_ids_that_do_not_identify_are_refused(
    extractor, scene_paths, output, tmp_path, ids, message
):
    """Before anything is written."""
    table = pa.table({"id": ids, "path": scene_paths[:5]})
    parquet.write_table(table, tmp_path / "manifest.parquet")
    with pytest.raises(ValueError, match=f"^id must name {message}"):
        extract(extractor, tmp_path / "manifest.parquet", output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"id": "key"}, "id must name a column of the manifest; got 'key', and the columns are"),
        ({"image": "file"}, "image must name a column of the manifest; got 'file'"),
        ({"columns": ["name"]}, "columns must name a column of the manifest; got 'name'"),
        ({"columns": "city"}, "columns must be a list of names or None; got 'city'"),
        ({"rows_per_task": 0}, "rows_per_task must be an int of at least 1; got 0"),
        ({"concurrency": 0}, "concurrency must be an int of at least 1 or None; got 0"),
        ({"num_cpus": 0}, "num_cpus must be a float in"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(extractor, manifest, output, arguments, message):
    """With what there is instead, and before anything is written."""
    with pytest.raises(ValueError, match=message):
        extract(extractor, manifest, output, **arguments)
    assert not output.exists()


def test_a_manifest_without_rows_is_refused(extractor, rows, output, tmp_path):
    parquet.write_table(rows.slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="source must have rows"):
        extract(extractor, tmp_path / "empty.parquet", output)


def test_a_folder_inside_that_of_the_manifest_is_refused(extractor, manifest):
    """The next call would take its files for the manifest."""
    with pytest.raises(ValueError, match="output must not lie in the folder of the manifest"):
        extract(extractor, manifest, manifest / "features")
    assert not (manifest / "features").exists()


def test_a_device_that_no_actor_has_is_refused(manifest, output):
    """Before anything is written."""
    extractor = DeepFeatureExtractor("resnet10_slim", device="cuda")
    with pytest.raises(ValueError, match="device='cuda' needs a GPU per actor; the cluster has 0"):
        extract(extractor, manifest, output)
    assert not output.exists()


@pytest.mark.parametrize("source", [["a.parquet"], None, pa.table({"id": [1]})], ids=type)
def test_what_is_no_manifest_is_refused(extractor, output, source):
    """The error says what is one."""
    with pytest.raises(TypeError, match=r"source must be the path of Parquet files or a ray.data"):
        extract(extractor, source, output)


def test_a_folder_of_other_files_is_refused(extractor, manifest, output):
    """Readers would take them for rows."""
    output.mkdir()
    (output / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"output must be a new or empty folder.*other files"):
        extract(extractor, manifest, output)


@pytest.mark.parametrize("case", ["no read", "a limit", "a renamed id"])
def test_a_dataset_with_which_a_job_could_not_resume_is_refused(
    extractor, rows, manifest, output, case
):
    """Ray leaves out finished rows right after the read, or not at all, without a word."""
    dataset, message = {
        "no read": (ray.data.from_arrow(rows).map(dict), "got one with FromArrow"),
        "a limit": (ray.data.read_parquet(str(manifest)).limit(4), "got one with limit=4"),
        "a renamed id": (
            ray.data.read_parquet(str(manifest)).rename_columns({"id": "key"}),
            "'key' is added or renamed after the read, of 'path', 'id', 'city'",
        ),
    }[case]
    with pytest.raises(ValueError, match=f"so that the job can resume; {message}"):
        extract(extractor, dataset, output, id="key" if case == "a renamed id" else "id")
    assert not output.exists()


@pytest.mark.slow
def test_a_dataset_of_other_rows_each_time_is_found(extractor, manifest, output):
    """Its ids are read before its rows."""
    dataset = ray.data.read_parquet(str(manifest)).random_sample(0.5)
    with pytest.raises(RuntimeError, match=r"rows are missing|did not give the same rows"):
        extract(extractor, dataset, output)
    assert not (output / "_SUCCESS").exists()


def test_a_column_of_the_output_may_be_left_out(extractor, rows, output, tmp_path):
    """The manifest may be what another job has written."""
    parquet.write_table(rows.append_column("error", rows["city"]), tmp_path / "manifest.parquet")
    with pytest.raises(ValueError, match="a column 'error', as the output will: leave it out with"):
        extract(extractor, tmp_path / "manifest.parquet", output)
    assert not output.exists()


def test_what_is_no_extractor_is_refused(manifest, output):
    with pytest.raises(TypeError, match="extractor must be a DeepFeatureExtractor; got str"):
        extract("resnet50", manifest, output)


def test_a_network_that_cannot_be_identified_is_refused(manifest, output):
    """Nothing could tell whether the rows of a folder are its own."""
    lock = threading.Lock()

    def prepare(image):
        with lock:
            return ToTensor()(image.resize((32, 32)))

    network = torch.nn.Sequential(torch.nn.Flatten())
    extractor = DeepFeatureExtractor(network, preprocessing=prepare)
    with pytest.raises(ValueError, match="could not resume"):
        extract(extractor, manifest, output)
    assert not output.exists()


# Actors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_files", "readers"), [(0, "1"), (1, "1"), (25, "3"), (10_000, "32")])
def test_ray_reads_a_few_files_in_few_processes(monkeypatch, n_files, readers):
    """It would start 32 in any case, which takes a laptop minutes; who has set them knows why."""
    name = "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS"
    monkeypatch.delenv(name, raising=False)
    with limit_readers(n_files):
        assert os.environ[name] == readers
    assert name not in os.environ
    monkeypatch.setenv(name, "7")
    with limit_readers(n_files):
        assert os.environ[name] == "7"
    assert os.environ[name] == "7"


def test_actors_leave_cpus_to_ray(extractor):
    """Without these, nothing would read the manifest for them."""
    assert plan_actors(extractor, None, 1, None) == (2, None)
    assert plan_actors(extractor, None, 0.5, None) == (4, None)
    assert plan_actors(extractor, 2, 1, None) == (2, None)
    words = "concurrency=3 needs 5 CPUs, including 2 CPUs for Ray .* of 1 nodes has 4 CPUs"
    with pytest.warns(UserWarning, match=words):
        assert plan_actors(extractor, 3, 1, None) == (3, None)
    with pytest.warns(UserWarning, match="concurrency=1 needs 6 CPUs and 1 GPUs"):
        assert plan_actors(extractor, None, 4, 1) == (1, 1)


@pytest.mark.parametrize(
    ("params", "actors"),
    [
        ({"device": "auto"}, (5, 1)),
        ({"device": "cuda"}, (5, 1)),
        ({"device": "cpu"}, (14, None)),
        ({"device": "auto", "engine": "openvino"}, (14, None)),
    ],
    ids=str,
)
def test_an_actor_has_a_gpu_if_it_uses_one(monkeypatch, params, actors):
    """As many as there are on each node, of those that are alive."""
    nodes = [
        ({"CPU": 4.0, "GPU": 2.0}, True),
        ({"CPU": 12.0, "GPU": 3.0}, True),
        ({"CPU": 8}, False),
    ]
    listed = [{"Resources": resources, "Alive": alive} for resources, alive in nodes]
    monkeypatch.setattr(ray, "nodes", lambda: listed)
    extractor = DeepFeatureExtractor("resnet10_slim", **params)
    assert plan_actors(extractor, None, 1, None) == actors


def test_an_actor_waits_while_another_downloads_the_weights(extractor, monkeypatch, tmp_path):
    """One download per node, however many actors it has."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    node = ray.get_runtime_context().get_node_id()
    lock = FileLock(tmp_path / f"deepfeat-{node[:16]}-{'0' * 16}.lock")

    def start():
        threads = torch.get_num_threads()
        actor = _Extraction(FeatureBatch(extractor), ["path"], threads, "0" * 32)
        thread = threading.Thread(target=actor.download)
        thread.start()
        return thread

    with lock:
        thread = start()
        thread.join(1)
        assert thread.is_alive()
    thread.join(60)
    assert not thread.is_alive()
    assert len(list(tmp_path.iterdir())) == 2
