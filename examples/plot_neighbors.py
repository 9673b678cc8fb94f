"""
Similar photographs and near-duplicates
=======================================

Images with similar features look alike. This example finds the photographs of a folder that are
most similar to a given one, and then the near-duplicates among them: copies that were compressed,
resized, cropped or brightened.

The folder is small, so that this page can be built offline. For your own, leave out
``write_sample_folder`` and call ``load_image_folder("photos")``.
"""

# sphinx_gallery_thumbnail_number = 1

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from PIL import Image, ImageEnhance
from scipy import sparse
from sklearn.metrics import average_precision_score, pairwise_distances, precision_recall_curve
from sklearn.model_selection import train_test_split
from sklearn.neighbors import radius_neighbors_graph

from deepfeat import DeepFeatureExtractor
from deepfeat.datasets import load_image_folder, write_sample_folder
from deepfeat.plotting import NeighborsDisplay

folder = tempfile.TemporaryDirectory()
photos = load_image_folder(write_sample_folder(Path(folder.name) / "photos"))
print(f"{len(photos.data)} photographs: {', '.join(photos.target_names)}")

# %%
# Similar photographs
# -------------------
#
# Each row is a query and the photographs closest to it, with their cosine distances. Queries are
# indices of photographs, or new images. The folder names are not used.

extractor = DeepFeatureExtractor("resnet10_slim")
NeighborsDisplay.from_extractor(extractor, photos.data, [5, 35, 55, 84, 118], n_neighbors=6)
plt.show()

# %%
# Altered copies
# --------------
#
# How close must two photographs be to count as duplicates? No distance is right for all networks
# and all photographs, but you can measure it: take photographs without duplicates, alter copies of
# them in the ways you expect, and compare. Half of the folder is used for this, the other half for
# a test.


def alter(path):
    """Return copies of a photograph, altered in different ways."""
    photo = Image.open(path).convert("RGB")
    width, height = photo.size
    return {
        "compressed": photo,  # saved with a low quality below
        "resized": photo.resize((2 * width // 3, 2 * height // 3)),
        "cropped": photo.crop((2, 2, width - 2, height - 2)),
        "brighter": ImageEnhance.Brightness(photo).enhance(1.15),
    }


def save_copies(paths, root):
    """Save the altered copies as JPEG files, and list them."""
    root.mkdir()
    rows = []
    for original, path in enumerate(paths):
        for kind, copy in alter(path).items():
            target = root / f"{original}_{kind}.jpg"
            copy.save(target, quality=60 if kind == "compressed" else 95)
            rows.append((str(target), original, kind))
    return pd.DataFrame(rows, columns=["path", "original", "kind"])


first, second, first_target, second_target = train_test_split(
    photos.data, photos.target, test_size=0.5, stratify=photos.target, random_state=0
)
copies = save_copies(first, Path(folder.name) / "copies")

# %%
# Which layer separates copies from other photographs best? Each copy is compared with all
# photographs of the first half, one of which is its original. The average precision is 1 if every
# distance of a copy to its original is smaller than all other distances.

is_original = copies["original"].to_numpy()[:, None] == np.arange(len(first))
distances, scores = {}, {}
for layer in ["stage1", "stage2", "stage3", "stage4", "stage5"]:
    extractor = DeepFeatureExtractor("resnet10_slim", layer, image_size=64)
    distances[layer] = pairwise_distances(
        extractor.transform(copies["path"]), extractor.transform(first), metric="cosine"
    )
    scores[layer] = average_precision_score(is_original.ravel(), -distances[layer].ravel())
    print(f"{layer}  average precision {scores[layer]:.3f}")
best = max(scores, key=scores.get)
print("best:", best)

# %%
# A threshold
# -----------
#
# The two groups overlap, so every threshold misses some copies, takes some other photographs for
# copies, or both. Which of these is worse is up to you. Here, the threshold is the largest one for
# which nine out of ten pairs below it are a copy and its original.

precision, recall, thresholds = precision_recall_curve(
    is_original.ravel(), -distances[best].ravel()
)
threshold = -thresholds[np.argmax(precision >= 0.9)]
print(f"threshold {threshold:.4f}, which finds {recall[np.argmax(precision >= 0.9)]:.0%} of copies")

to_original = distances[best][is_original]
to_others = np.where(is_original, np.inf, distances[best]).min(axis=1)
names = photos.target_names[first_target][copies["original"]]
groups = {kind: to_original[copies["kind"] == kind] for kind in copies["kind"].unique()}
groups |= {name: to_others[names == name] for name in photos.target_names}

figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
rng = np.random.default_rng(0)
for row, values in enumerate(groups.values()):
    color = "tab:blue" if row < copies["kind"].nunique() else "tab:orange"
    jitter = rng.uniform(-0.25, 0.25, len(values))
    axis.scatter(values, row + jitter, s=12, color=color, alpha=0.7, linewidths=0)
axis.scatter([], [], color="tab:blue", label="to the original,\nby alteration")
axis.scatter([], [], color="tab:orange", label="to the nearest other\nphoto, by folder")
axis.axvline(threshold, color="black", linestyle="--", label="threshold")
axis.set_yticks(range(len(groups)), list(groups))
axis.invert_yaxis()
axis.set(xscale="log", xlabel=f"cosine distance, {best}", title="How far copies are from photos")
axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
plt.show()

# %%
# The test
# --------
#
# The second half of the folder, with some altered copies hidden in it. ``radius_neighbors_graph``
# has an entry for each pair of images below the threshold.

hidden = save_copies(second[::3], Path(folder.name) / "hidden")
images = np.concatenate([second, hidden["path"]])
source = np.concatenate([np.arange(len(second)), 3 * hidden["original"]])

rows = DeepFeatureExtractor("resnet10_slim", best, image_size=64).transform(images)
graph = radius_neighbors_graph(rows, threshold, mode="distance", metric="cosine")
pairs = sparse.triu(graph, k=1).tocoo()  # each pair once
right = source[pairs.row] == source[pairs.col]

same = source[:, None] == source
total = np.triu(same, k=1).sum()
print(f"{len(right)} pairs found, {right.sum()} of the same photo, {(~right).sum()} of others")
print(f"{total - right.sum()} of the {total} pairs of the same photo missed")
for kind, indices in hidden.groupby("kind").groups.items():
    found = np.isin(len(second) + indices, pairs.col[right & (pairs.row < len(second))])
    print(f"  {kind:<12}{found.sum()} of {len(found)} recognised by the original")

# %%
# Which photographs are taken for copies of others? Those that hardly differ to the eye either.

wrong = photos.target_names[second_target[source[pairs.row[~right]]]]
print("wrong pairs by folder:", pd.Series(wrong).value_counts().to_dict())

# %%
# Some of the pairs that were found, correct ones on the left, and wrong ones on the right:


def choose(candidates, count):
    """Choose pairs at even steps of their distance."""
    ordered = candidates[np.argsort(pairs.data[candidates])]
    return ordered[np.linspace(0, len(ordered) - 1, count + 2).astype(int)[1:-1]]


shown = np.concatenate([choose(np.flatnonzero(right), 5), choose(np.flatnonzero(~right), 3)])
figure, axes = plt.subplots(2, 8, figsize=(10, 3), layout="constrained")
NeighborsDisplay.from_neighbors(
    images[pairs.row[shown]],
    images,
    pairs.data[shown, None],
    pairs.col[shown, None],
    ax=axes.T,
)
plt.show()
folder.cleanup()

# %%
# Of your own folder, look at such pairs before you delete anything. The share of wrong ones grows
# with the number of photographs and falls with the number of copies, so that it need not be the one
# that the threshold was chosen for.
#
# For millions of images, an approximate index such as FAISS replaces the search. It takes the same
# rows, and ``NeighborsDisplay.from_neighbors`` shows what it returns, as it did here.
