"""
Features in a Parquet file, and back
====================================

Features are rows of numbers, and Parquet keeps them compactly, with the paths and whatever else is
known about the images, for programs that know neither torch nor deepfeat. This example writes the
features of a folder, reads them back, and uses them.

For more images than fit into memory, :class:`~deepfeat.arrow.FeatureBatch` adds features to tables
batch by batch, and :func:`deepfeat.ray.extract` does so on many machines.
"""

import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import NearestNeighbors

from deepfeat import DeepFeatureExtractor
from deepfeat.datasets import load_image_folder, write_sample_folder
from deepfeat.plotting import NeighborsDisplay

folder = tempfile.TemporaryDirectory()
photos = load_image_folder(write_sample_folder(Path(folder.name, "photos")))
extractor = DeepFeatureExtractor("resnet10_slim")
features = extractor.fit_transform(photos.data)

# %%
# Writing
# -------
#
# A row per image. The features are lists of one length, which take 4 bytes per value and no more,
# and the metadata of the table says where they come from.

table = pa.table(
    {
        "path": photos.data,
        "class": photos.target_names[photos.target],
        "features": pa.FixedSizeListArray.from_arrays(features.ravel(), features.shape[1]),
    }
).replace_schema_metadata({"extractor": json.dumps(extractor.get_params(), default=str)})
file = Path(folder.name, "features.parquet")
pq.write_table(table, file)
print(table.schema.to_string(show_schema_metadata=False))
print(f"{len(table)} rows, {file.stat().st_size:,} bytes")

# %%
# Reading
# -------
#
# Reading gives the same numbers, to the last bit.

again = pq.read_table(file)
rows = again["features"].combine_chunks().flatten().to_numpy().reshape(len(again), -1)
params = json.loads(again.schema.metadata[b"extractor"])
print({name: params[name] for name in ("backbone", "layer", "pooling", "norm")})
print("the same:", np.array_equal(rows, features))

# %%
# Any estimator of scikit-learn takes the rows as they are,

labels = again["class"].to_numpy(zero_copy_only=False)
scores = cross_val_score(LogisticRegression(C=100), rows, labels, cv=5)
print(f"accuracy in five folds: {scores.mean():.3f}")

# %%
# and only the images that are shown are opened again.

index = NearestNeighbors(n_neighbors=6, metric="cosine").fit(rows)
queries = [30, 60, 110]
distances, indices = index.kneighbors(rows[queries])
paths = again["path"].to_pylist()
NeighborsDisplay.from_neighbors(
    [paths[query] for query in queries], paths, distances[:, 1:], indices[:, 1:]
)
plt.show()
folder.cleanup()
