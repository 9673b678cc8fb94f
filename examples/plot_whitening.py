"""
Whitening features for retrieval
================================

Features of a network are correlated, and a few directions have most of their variance. Whitening
rotates the features and scales each direction to the same variance, which is often recommended
before searching for similar images (Jégou and Chum, 2012, "Negative evidences and co-occurrences in
image retrieval: the benefit of PCA and whitening"). Does it help here, and with how many
directions?

The images come with scikit-learn, and nothing is downloaded. For your own, leave out
``write_sample_folder`` and call ``load_image_folder("photos")``.
"""

import tempfile

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer

from deepfeat import DeepFeatureExtractor
from deepfeat.datasets import load_image_folder, write_sample_folder
from deepfeat.plotting import NeighborsDisplay

folder = tempfile.TemporaryDirectory()
photos = load_image_folder(write_sample_folder(folder.name))
digits = load_digits()
collections = {
    "photographs": (DeepFeatureExtractor("resnet10_slim"), photos.data, photos.target),
    "digits": (
        DeepFeatureExtractor("resnet10_slim", image_size=32),
        digits.images / 16,
        digits.target,
    ),
}

# %%
# The measure
# -----------
#
# Each image is a query among the others, which are ranked by their cosine similarity. Those of the
# same class are relevant. The average precision of a query is 1 if they come first, and its mean
# over all queries measures the features.


def mean_average_precision(rows, y):
    """Return the mean average precision of all rows as queries among the others."""
    similarity = rows @ rows.T
    np.fill_diagonal(similarity, -np.inf)  # a query does not find itself
    ranked = np.argsort(-similarity, axis=1, kind="stable")[:, :-1]
    relevant = y[ranked] == y[:, None]
    precision = np.cumsum(relevant, axis=1) / np.arange(1, len(y))
    return np.mean((precision * relevant).sum(axis=1) / relevant.sum(axis=1))


# %%
# PCA with and without whitening
# ------------------------------
#
# PCA is fitted on one half of the images, and the measure taken on the other, for five such splits.
# It needs no labels. A ``Normalizer`` after it scales each row to unit length again, as the
# extractor has done before.

results = []
for collection, (extractor, images, y) in collections.items():
    rows = extractor.transform(images)
    splits = StratifiedShuffleSplit(5, train_size=0.5, random_state=0)
    for split, (fitted, held_out) in enumerate(splits.split(rows, y)):
        score = mean_average_precision(rows[held_out], y[held_out])
        results.append((collection, split, "features", 0, score))
        for components in [2, 4, 8, 16, 32, 60, 128, 256]:
            if components >= len(fitted):
                continue
            for whiten in [False, True]:
                pca = PCA(components, whiten=whiten, svd_solver="full")
                reduce = make_pipeline(pca, Normalizer()).fit(rows[fitted])
                score = mean_average_precision(reduce.transform(rows[held_out]), y[held_out])
                name = "PCA, whitened" if whiten else "PCA"
                results.append((collection, split, name, components, score))
results = pd.DataFrame(results, columns=["images", "split", "method", "components", "score"])
table = results.pivot_table(index=["images", "components"], columns="method", values="score")
print(table.rename(index={0: "all"}).round(3).to_string(na_rep=""))

# %%
# The bands are one standard deviation of the splits to both sides of their mean.

figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
for axis, (collection, scores) in zip(axes, results.groupby("images", sort=False), strict=True):
    baseline = scores.loc[scores["method"] == "features", "score"].mean()
    axis.axhline(baseline, color="black", linestyle="--", label="features as they are")
    for name in ["PCA", "PCA, whitened"]:
        curves = scores[scores["method"] == name].groupby("components")["score"]
        mean, deviation = curves.mean(), curves.std()
        axis.plot(mean.index, mean, "o-", label=name)
        axis.fill_between(mean.index, mean - deviation, mean + deviation, alpha=0.2)
    axis.set_xscale("log", base=2)
    axis.set_xticks(mean.index, mean.index)
    axis.set(title=collection, xlabel="components", ylabel="mean average precision", ylim=(0, 1))
axes[0].legend(loc="lower left")
plt.show()

# %%
# In how many of the five splits is whitened better than not whitened?

wide = results.pivot(index=["images", "split", "components"], columns="method", values="score")
better = (wide["PCA, whitened"] > wide["PCA"]).groupby(["images", "components"]).sum()
print(better.unstack("images").drop(index=0).astype("Int64").to_string(na_rep=""))

# %%
# With 8 or 16 components, whitening helps to find digits. To find these photographs it does not
# help: with 2 components it makes no difference to speak of, and with more it does harm. With many
# components it does harm to both, since the last directions of PCA hold little of the variance, and
# whitening gives them the same weight as the first.
#
# PCA without whitening is the safer choice. It centres the features, and a fraction of the
# components ranks as well as the features, or better. The best number of them differs: choose it on
# labelled images of your own, not on those by which you report a score.
#
# What whitening does
# -------------------
#
# The same three queries among the photographs, without whitening and with it. A pipeline takes the
# place of the extractor.

extractor, images, y = collections["photographs"]
first, second = next(StratifiedShuffleSplit(1, train_size=0.5, random_state=0).split(images, y))
queries = [np.flatnonzero(y[second] == label)[3] for label in (1, 3, 4)]
for whiten, title in [(False, "32 components"), (True, "32 components, whitened")]:
    pca = PCA(32, whiten=whiten, svd_solver="full")
    pipeline = make_pipeline(extractor, pca, Normalizer()).fit(images[first])
    display = NeighborsDisplay.from_extractor(pipeline, images[second], queries, n_neighbors=6)
    display.figure_.suptitle(title)
    plt.show()
folder.cleanup()
