"""
A map of a folder, and its clusters
===================================

What is in a folder of photographs? This example draws them on a map, on which similar ones are
neighbours, and sorts them into clusters without looking at their labels.

The folder is small, so that this page can be built offline. For your own, leave out
``write_sample_folder`` and call ``load_image_folder("photos")``.
"""

# sphinx_gallery_thumbnail_number = 2

import tempfile

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from PIL import Image
from sklearn.cluster import HDBSCAN, KMeans
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import adjusted_rand_score, silhouette_score

from deepfeat import DeepFeatureExtractor
from deepfeat.datasets import load_image_folder, write_sample_folder
from deepfeat.plotting import EmbeddingDisplay

folder = tempfile.TemporaryDirectory()
photos = load_image_folder(write_sample_folder(folder.name))
folders = photos.target_names[photos.target]
print(pd.Series(folders).value_counts(sort=False).to_string())

# %%
# Two maps
# --------
#
# The extractor turns each photograph into a row of 256 features, which PCA reduces to two: those
# directions in which the photographs differ most.

extractor = DeepFeatureExtractor("resnet10_slim")
display = EmbeddingDisplay.from_extractor(extractor, photos.data, y=folders)
display.ax_.set_title("PCA")
plt.show()

# %%
# t-SNE keeps neighbours together instead. Groups stand out more clearly, but distances between them
# mean little. Any reducer with ``fit_transform`` that returns two columns will do, such as
# ``umap.UMAP()``.

tsne = TSNE(random_state=0)
display = EmbeddingDisplay.from_extractor(extractor, photos.data, reducer=tsne, y=folders)
display.ax_.set_title("t-SNE")
plt.show()

# %%
# How many clusters?
# ------------------
#
# K-means has to be told. The silhouette compares numbers of clusters without labels. Here there are
# labels, the names of the folders, to check it with: the adjusted Rand index is 1 if clusters and
# folders agree, and about 0 for random clusters.

rows = extractor.transform(photos.data)
results = []
for n_clusters in range(2, 11):
    clusters = KMeans(n_clusters, n_init=10, random_state=0).fit_predict(rows)
    silhouette = silhouette_score(rows, clusters)
    results.append((n_clusters, silhouette, adjusted_rand_score(folders, clusters)))
results = pd.DataFrame(results, columns=["clusters", "silhouette", "adjusted Rand index"])
results = results.set_index("clusters")

axes = results.plot(subplots=True, layout=(1, 2), figsize=(8, 3), marker="o", legend=False)
for axis, name in zip(axes.flat, results, strict=True):
    axis.set(title=name, xticks=results.index, ylim=(0, None))
axes[0, 0].figure.set_layout_engine("constrained")
plt.show()
print(results.idxmax().to_string())

# %%
# The silhouette only tells that there should be more than three clusters and fewer than nine. The
# folders decide for as many as there are of them.
#
# Clusters and folders
# --------------------
#
# The rows of this table are folders, and its columns are clusters.

kmeans = KMeans(len(photos.target_names), n_init=10, random_state=0).fit(rows)
table = pd.crosstab(pd.Series(folders, name="folder"), pd.Series(kmeans.labels_, name="cluster"))
print(table.to_string())
print(f"adjusted Rand index {adjusted_rand_score(folders, kmeans.labels_):.2f}")

# %%
# The photographs of each cluster, from its centre outwards at even steps. The last ones of a row
# show what else has got into it.

figure, axes = plt.subplots(kmeans.n_clusters, 9, figsize=(9, 5.2), layout="constrained")
distances = kmeans.transform(rows)
for cluster, row in enumerate(axes):
    (members,) = np.nonzero(kmeans.labels_ == cluster)
    members = members[np.argsort(distances[members, cluster])]
    steps = np.linspace(0, len(members) - 1, len(row)).astype(int)
    row[0].set_ylabel(f"cluster {cluster}")
    for axis, path in zip(row, photos.data[members[steps]], strict=True):
        axis.imshow(Image.open(path))
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
plt.show()

# %%
# Clusters and outliers
# ---------------------
#
# HDBSCAN finds the number of clusters by itself, and leaves out what belongs to none. Densities are
# hard to tell in many dimensions, so PCA goes before it. The map is that of t-SNE, with clusters as
# colours.

reduced = PCA(8, random_state=0).fit_transform(rows)
clusters = HDBSCAN(min_cluster_size=5, copy=True).fit_predict(reduced)
names = np.where(clusters < 0, "none", np.char.add("cluster ", clusters.astype(str)))
display = EmbeddingDisplay.from_embedding(photos.data, tsne.embedding_, y=names)
display.ax_.set_title(f"HDBSCAN: {clusters.max() + 1} clusters, {np.sum(clusters < 0)} in none")
plt.show()
print(pd.crosstab(pd.Series(folders, name="folder"), pd.Series(names, name="")).to_string())
print(f"adjusted Rand index {adjusted_rand_score(folders, clusters):.2f}")
folder.cleanup()
