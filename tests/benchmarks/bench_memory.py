"""Peak memory of `transform(paths)` on few and on many images."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from _pictures import SIZE, write_pictures

COUNTS = (500, 2_000)
SMOKE = (5, 20)
BACKBONE, LAYER = "mobilenet_v3_small", "avgpool"

# Run in a new process, so that nothing else counts. The images are opened by path, so the peak
# covers the images in flight and the output.
CHILD = """
import resource, sys
from pathlib import Path
from deepfeat import DeepFeatureExtractor

paths = sorted(map(str, Path(sys.argv[1]).iterdir()))[: int(sys.argv[2])]
extractor = DeepFeatureExtractor(sys.argv[3], sys.argv[4], weights=None, cache=None)
output = extractor.transform(paths)
unit = 1 if sys.platform == "darwin" else 1024
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, output.nbytes)
"""


def measure_peak(folder: str, count: int) -> tuple[int, int]:
    """Return the peak resident memory of a fresh process and the size of its output, in bytes."""
    command = [sys.executable, "-c", CHILD, folder, str(count), BACKBONE, LAYER]
    words = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    return int(words[0]), int(words[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="only check that it runs")
    counts = SMOKE if parser.parse_known_args()[0].smoke else COUNTS
    print(
        f"Peak memory of {BACKBONE}, {LAYER}, random weights, each in a new process, "
        f"default parameters except for cache=None;\nJPEGs of {SIZE[0]} x {SIZE[1]} pixels by "
        "path, half of them grey."
    )
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder), max(counts))
        peaks = [measure_peak(folder, count) for count in counts]
    for count, (peak, output) in zip(counts, peaks, strict=True):
        print(
            f"  {count:5} images: peak {peak / 1e6:6.1f} MB, of which output {output / 1e6:.1f} MB"
        )
    few, many = (peak - output for peak, output in peaks)
    print(
        f"  without the output, {counts[1]} images take {(many - few) / 1e6:+.1f} MB, "
        f"{many / few:.3f} x the memory of {counts[0]}; target 1"
    )


if __name__ == "__main__":
    main()
