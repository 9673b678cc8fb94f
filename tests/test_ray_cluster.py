"""`extract` on a cluster of a head and two nodes, also when these are killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pytest
from numpy.testing import assert_array_equal
from PIL import Image
from pyarrow import parquet
from sklearn.datasets import load_sample_images

from deepfeat import DeepFeatureExtractor

pytestmark = pytest.mark.slow

ROWS_PER_TASK = 16
NETWORK = {"backbone": "resnet18", "weights": None, "device": "cpu", "on_error": "nan"}
# In a process of its own, which can be killed. Kills a node once so many files have been written.
JOB = f"""
import json, os, sys, threading, time
from dataclasses import asdict
from pathlib import Path

import ray
from deepfeat import DeepFeatureExtractor
from deepfeat.ray import extract
from ray.cluster_utils import Cluster

manifest, output, files_before_kill = sys.argv[1:]
memory = {{"object_store_memory": 100_000_000}}
cluster = Cluster(
    initialize_head=True, head_node_args={{"num_cpus": 0, "include_dashboard": False, **memory}}
)
nodes = [cluster.add_node(num_cpus=2, **memory) for _ in range(2)]
ray.init(address=cluster.address, log_to_driver=False)


def kill_a_node():
    while len(list(Path(output).glob("*.parquet"))) < int(files_before_kill):
        time.sleep(0.05)
    cluster.remove_node(nodes[0], allow_graceful=False)


if files_before_kill != "never":
    threading.Thread(target=kill_a_node, daemon=True).start()
extractor = DeepFeatureExtractor(**{NETWORK!r})
summary = extract(extractor, manifest, output, rows_per_task={ROWS_PER_TASK})
print(json.dumps(asdict(summary)), flush=True)
ray.shutdown()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Files of 280 photographs: of DEEPFEAT_DATA, or cut out of those of scikit-learn."""
    if "DEEPFEAT_DATA" in os.environ:
        found = sorted(Path(os.environ["DEEPFEAT_DATA"], "scene15").glob("*/*.jpg"))
        return found[:: len(found) // 280][:280]
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for number in range(280):
        photograph = load_sample_images().images[number % 2]
        top, left = (rng.integers(side - 200) for side in photograph.shape[:2])
        cut = photograph[top : top + 200, left : left + 200]
        Image.fromarray(cut).save(folder / f"{number:03}.jpg")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def manifest(photographs, tmp_path_factory):
    """Ten files of 30 rows: 12 photographs twice, 7 cut short and one missing, in any order."""
    broken = tmp_path_factory.mktemp("broken")
    for number, path in enumerate(photographs[:7]):
        content = path.read_bytes()
        (broken / f"{number}.jpg").write_bytes(content[: len(content) // 2])
    paths = [*photographs, *photographs[50:62], *broken.iterdir(), broken / "missing.jpg"]
    assert len(paths) == 300
    order = np.random.default_rng(1).permutation(300)
    rows = pa.table({"id": np.arange(300), "path": [str(paths[index]) for index in order]})
    folder = tmp_path_factory.mktemp("manifest")
    for start in range(0, 300, 30):
        parquet.write_table(rows.slice(start, 30), folder / f"{start:03}.parquet")
    return folder


@pytest.fixture(scope="module")
def expected(manifest):
    """What `transform` gives in one process."""
    paths = pyarrow.dataset.dataset(manifest).to_table().sort_by("id")["path"].to_pylist()
    return DeepFeatureExtractor(**NETWORK, cache=None).transform(paths)


@pytest.fixture
def start_job():
    """Start a job; in the end, kill it with its cluster."""
    jobs = []

    def start(manifest, output, files_before_kill="never"):
        environment = {**os.environ, "RAY_enable_worker_prestart": "0"}
        arguments = (sys.executable, "-c", JOB, str(manifest), str(output), str(files_before_kill))
        jobs.append(subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True))
        return jobs[-1]

    yield start
    for job in jobs:
        kill_with_descendants(job)


def kill_with_descendants(job):
    """Kill a process and all that it has started, without grace."""
    listed = subprocess.run(("ps", "-eo", "pid=,ppid="), capture_output=True, text=True, check=True)
    parents = dict(map(int, line.split()) for line in listed.stdout.splitlines())
    doomed = {job.pid} if job.poll() is None else set()
    while more := {pid for pid, parent in parents.items() if parent in doomed} - doomed:
        doomed |= more
    for pid in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    job.wait()
    job.stdout.close()


def read_summary(job):
    printed = job.stdout.read()
    assert job.wait() == 0
    return json.loads(printed.splitlines()[-1])


def assert_complete(output, expected):
    """Each row once, with its features to the bit, and the reasons of the eight without."""
    rows = pyarrow.dataset.dataset(output).to_table().sort_by("id")
    assert rows["id"].to_pylist() == list(range(300))
    nothing = np.full(expected.shape[1], np.nan)
    lists = [nothing if row is None else row for row in rows["features"].to_pylist()]
    assert_array_equal(np.array(lists, dtype=np.float32), expected)
    failed = np.isnan(expected).any(axis=1)
    assert failed.sum() == 8
    assert_array_equal([reason is not None for reason in rows["error"].to_pylist()], failed)
    assert (output / "_SUCCESS").exists()


def test_two_nodes_share_the_work(manifest, expected, tmp_path, start_job):
    """Into as many files as there are tasks."""
    summary = read_summary(start_job(manifest, tmp_path / "rows"))
    assert summary.items() >= {"rows": 300, "failed": 8, "computed": 300}.items()
    assert_complete(tmp_path / "rows", expected)
    assert len(list((tmp_path / "rows").glob("*.parquet"))) == 19


def test_a_node_may_be_killed(manifest, expected, tmp_path, start_job):
    """In the middle: what it had not written is computed by the other."""
    summary = read_summary(start_job(manifest, tmp_path / "rows", files_before_kill=4))
    assert summary.items() >= {"rows": 300, "failed": 8, "computed": 300}.items()
    assert_complete(tmp_path / "rows", expected)


def test_everything_may_be_killed(manifest, expected, tmp_path, start_job, record_property):
    """The same call again computes what was not committed, and that alone."""
    output = tmp_path / "rows"
    job = start_job(manifest, output)
    while len(list(output.glob("*.parquet"))) < 6:
        assert job.poll() is None
        time.sleep(0.05)
    kill_with_descendants(job)
    assert not (output / "_SUCCESS").exists()
    records = [
        record
        for record in (output / "_checkpoint").iterdir()
        if not record.name.endswith(".pending.parquet")
    ]
    committed = sum(parquet.read_metadata(record).num_rows for record in records)
    files = [output / f"{record.stem}-0.parquet" for record in records]
    before = {file: file.read_bytes() for file in files}
    assert 0 < committed < 300

    summary = read_summary(start_job(manifest, output))
    assert summary.items() >= {"rows": 300, "failed": 8, "computed": 300 - committed}.items()
    assert_complete(output, expected)
    assert {file: file.read_bytes() for file in files} == before
    record_property(
        "figure", f"Killed with {committed} of 300 rows committed; {300 - committed} computed after"
    )
