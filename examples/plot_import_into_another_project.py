"""
deepfeat in another project
===========================

The extractor is made to be a part: of a pipeline, and of classes that others write. Here somebody
has a class that finds similar pictures, and wants to leave the network to deepfeat. Nothing is
subclassed; the extractor is a parameter. What scikit-learn promises for its own then holds for the
whole: clone, ``set_params``, searches, pickles.
"""

import pickle

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.datasets import load_sample_images
from sklearn.feature_extraction.image import extract_patches_2d
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.validation import check_is_fitted
from torch import nn
from torchvision import transforms

from deepfeat import DeepFeatureExtractor

# %%
# The class of the other project
# ------------------------------
#
# It keeps to the customs of scikit-learn: ``__init__`` stores its parameters and does nothing else,
# and ``fit`` clones the extractor before it uses it, so that the caller's stays as it is. It does
# not know what an image is. Paths, arrays and bytes go through to the extractor.


class SimilarPictures(BaseEstimator):
    """Find the pictures of an album that look most like a given one."""

    def __init__(self, extractor=None, n_neighbors=5):
        self.extractor = extractor
        self.n_neighbors = n_neighbors

    def fit(self, X, y=None):
        default = DeepFeatureExtractor("resnet10_slim", "stage4")
        self.extractor_ = default if self.extractor is None else clone(self.extractor)
        self.index_ = NearestNeighbors(n_neighbors=self.n_neighbors)
        self.index_.fit(self.extractor_.fit_transform(X))
        self.labels_ = y
        return self

    def find(self, X):
        """Return the places of the neighbours of each picture in the album."""
        check_is_fitted(self)
        return self.index_.kneighbors(self.extractor_.transform(X), return_distance=False)

    def score(self, X, y):
        """Return the share of neighbours that have the label of their picture."""
        return np.mean(self.labels_[self.find(X)] == np.asarray(y)[:, None])


# %%
# It has no line about networks, layers, batches, devices or preprocessing. The album is made of
# patches of scikit-learn's two photographs; they overlap, so that the task is easy.

album = np.concatenate(
    [
        extract_patches_2d(photograph, (80, 80), max_patches=150, random_state=0)
        for photograph in load_sample_images().images
    ]
)
labels = np.repeat(["palace", "dahlia"], 150)
rng = np.random.default_rng(0)
asked, kept = np.split(rng.permutation(len(album)), [100])
pictures = SimilarPictures().fit(album[kept], labels[kept])
print(f"neighbours from the same photograph: {pictures.score(album[asked], labels[asked]):.1%}")

figure, axes = plt.subplots(4, 6, figsize=(7, 4.9), layout="constrained")
for row, place in zip(axes, asked[:4], strict=True):
    (neighbours,) = pictures.find(album[[place]])
    for axis, picture in zip(row, [album[place], *album[kept][neighbours]], strict=True):
        axis.imshow(picture)
        axis.set_axis_off()
axes[0, 0].set_title("asked for", fontsize="medium")
axes[0, 1].set_title("found", fontsize="medium")
plt.show()

# %%
# Parameters all the way down
# ---------------------------
#
# ``get_params`` sees the parameters of the extractor, and ``set_params`` reaches them, with two
# underscores for each step down. So a search can look for the layer that is best for this task.

ours = SimilarPictures(DeepFeatureExtractor("resnet10_slim", "stage4"))
ours.set_params(extractor__pooling="max", n_neighbors=3)
print(clone(ours))

search = GridSearchCV(
    ours,
    {
        "extractor__layer": ["stage1", "stage2", "stage3", "stage4", "avgpool"],
        "extractor__pooling": ["avg", "max"],
    },
    cv=3,
)
search.fit(album[kept], labels[kept])
print(search.best_params_)
print(f"on pictures that were not searched: {search.score(album[asked], labels[asked]):.1%}")

# %%
# Pickles without a network
# -------------------------
#
# A pickle holds the name of the network, not its weights: whoever opens it loads the network when
# it is first needed. The caller's extractor was cloned and is as new.

saved = pickle.dumps(search.best_estimator_)
again = pickle.loads(saved)
without = len(saved) - len(pickle.dumps(search.best_estimator_.index_))
print(f"all but the index of features takes {without:,} bytes")
found = search.best_estimator_.find(album[asked])
print("the same neighbours:", np.array_equal(again.find(album[asked]), found))

# %%
# A network of the other project
# ------------------------------
#
# The network need not be one of torchvision's. Any ``torch.nn.Module`` will do, with the function
# that turns an RGB picture into what the module takes; its layers are called by their paths. The
# module itself is left alone: it stays in its mode, on its device.

torch.manual_seed(0)
network = nn.Sequential(
    nn.Conv2d(3, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 5, stride=2), nn.ReLU()
)
to_tensor = transforms.Compose([transforms.Resize((48, 48)), transforms.ToTensor()])
own = DeepFeatureExtractor(network, "3", preprocessing=to_tensor)
theirs = SimilarPictures(own, n_neighbors=3).fit(album[kept], labels[kept])
print(f"an untrained network of two layers: {theirs.score(album[asked], labels[asked]):.1%}")
