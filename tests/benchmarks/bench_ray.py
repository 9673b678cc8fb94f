"""`deepfeat.ray.extract` against `transform`: throughput with 1 and 2 actors of one thread each.

MobileNetV2 with random weights on JPEGs, in turns on one machine. "Rate" is that between the first
and the last file that is written, without the seconds in which Ray and its actors start; "whole" is
that of the call.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import torch
from _pictures import write_photographs, write_pictures
from pyarrow import parquet

from deepfeat import DeepFeatureExtractor
from deepfeat.ray import extract

ROWS_PER_TASK = 128


def make_extractor() -> DeepFeatureExtractor:
    return DeepFeatureExtractor(
        "mobilenet_v2", weights=None, device="cpu", num_workers=1, cache=None
    )


def measure_preparation(paths: list[str]) -> float:
    """Return how many files one thread decodes and prepares per second, the median of five."""
    extractor = make_extractor()
    prepare = extractor._find_backbone().preprocessing.prepare
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        for record in extractor._find_records(paths, reset=False):
            prepare(record.open())
        rates.append(len(paths) / (time.perf_counter() - start))
    return statistics.median(rates)


def measure_transform(paths: list[str]) -> float:
    """Return images per second of one process with one thread and another that decodes."""
    extractor = make_extractor()
    extractor.transform(paths[:16])
    start = time.perf_counter()
    extractor.transform(paths)
    return len(paths) / (time.perf_counter() - start)


def measure_extract(manifest: Path, actors: int) -> tuple[float, float]:
    """Return images per second between the first and the last file, and of the whole call."""
    with tempfile.TemporaryDirectory() as folder:
        summary = extract(
            make_extractor(), manifest, folder, concurrency=actors, rows_per_task=ROWS_PER_TASK
        )
        files = sorted(Path(folder).glob("*.parquet"), key=lambda file: file.stat().st_mtime)
        seconds = files[-1].stat().st_mtime - files[actors - 1].stat().st_mtime
        rows = sum(parquet.read_metadata(file).num_rows for file in files[actors:])
    return rows / seconds, summary.images_per_second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1536)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    with tempfile.TemporaryDirectory() as folder:
        paths = write_pictures(Path(folder), arguments.images)
        manifest = Path(folder, "manifest.parquet")
        parquet.write_table(pa.table({"id": np.arange(len(paths)), "path": paths}), manifest)
        print(f"preparing, images/s per thread: {measure_preparation(paths[:200]):.0f}")
        photographs = write_photographs(Path(folder), 8)
        print(f"preparing, of 12 megapixels:    {measure_preparation(photographs):.0f}")
        print(f"{'':12}{'transform':>10}  1 actor: rate  whole   2 actors: rate  whole  (images/s)")
        ratios: dict[str, list[float]] = {"one": [], "two": []}
        for repeat in range(arguments.repeats):
            plain = measure_transform(paths)
            (one, one_whole), (two, two_whole) = (
                measure_extract(manifest, actors) for actors in (1, 2)
            )
            ratios["one"].append(one / plain)
            ratios["two"].append(two / one)
            print(
                f"{f'turn {repeat + 1}':12}{plain:10.1f}{one:15.1f}{one_whole:7.1f}"
                f"{two:17.1f}{two_whole:7.1f}",
                flush=True,
            )
        print(f"1 actor / transform: {statistics.median(ratios['one']):.2f} (aim: 0.9)")
        print(f"2 actors / 1 actor:  {statistics.median(ratios['two']):.2f}")


if __name__ == "__main__":
    main()
