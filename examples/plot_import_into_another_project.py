"""
deepfeat in another project
===========================

The extractor is designed as a building block for pipelines and for your own classes. This example
has a class that finds similar images and leaves the network to deepfeat. Nothing is subclassed: the
extractor is a parameter. Everything that works for scikit-learn's own estimators then works for the
class: ``clone``, ``set_params``, searches and pickling.
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
# It follows scikit-learn's conventions: ``__init__`` only stores parameters, and ``fit`` clones the
# extractor before using it, so that the caller's extractor does not change. The class is not
# concerned with the type of images: paths, arrays and bytes are passed on to the extractor.


class SimilarPictures(BaseEstimator):
    """Find the images of an album that are most similar to a given one."""

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
        """Return the indices of the neighbours of each image in the album."""
        check_is_fitted(self)
        return self.index_.kneighbors(self.extractor_.transform(X), return_distance=False)

    def score(self, X, y):
        """Return the fraction of neighbours with the same label as their image."""
        return np.mean(self.labels_[self.find(X)] == np.asarray(y)[:, None])


# %%
# Not a line of it deals with networks, layers, batches, devices or preprocessing. The album
# consists of patches of scikit-learn's two photographs; as they overlap, the task is easy.

album = np.concatenate(
    [
        extract_patches_2d(photograph, (80, 80), max_patches=150, random_state=0)
        for photograph in load_sample_images().images
    ]
)
labels = np.repeat(["palace", "dahlia"], 150)
rng = np.random.default_rng(0)
queries, kept = np.split(rng.permutation(len(album)), [100])
pictures = SimilarPictures().fit(album[kept], labels[kept])
print(f"neighbours from the same photograph: {pictures.score(album[queries], labels[queries]):.1%}")

figure, axes = plt.subplots(4, 6, figsize=(7, 4.9), layout="constrained")
for row, query in zip(axes, queries[:4], strict=True):
    (neighbours,) = pictures.find(album[[query]])
    for axis, picture in zip(row, [album[query], *album[kept][neighbours]], strict=True):
        axis.imshow(picture)
        axis.set_axis_off()
axes[0, 0].set_title("query", fontsize="medium")
axes[0, 1].set_title("found", fontsize="medium")
plt.show()

# %%
# Nested parameters
# -----------------
#
# ``get_params`` and ``set_params`` include the parameters of the extractor, with two underscores
# per level. A search can therefore find the best layer for this task.

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
print(f"on images not used in the search: {search.score(album[queries], labels[queries]):.1%}")

# %%
# Pickles without a network
# -------------------------
#
# A pickle contains the name of the network, not its weights. After unpickling, the network is
# loaded when it is first needed.

saved = pickle.dumps(search.best_estimator_)
restored = pickle.loads(saved)
without = len(saved) - len(pickle.dumps(search.best_estimator_.index_))
print(f"everything but the index of features takes {without:,} bytes")
found = search.best_estimator_.find(album[queries])
print("the same neighbours:", np.array_equal(restored.find(album[queries]), found))

# %%
# A network from the other project
# --------------------------------
#
# The network does not have to be torchvision's or timm's. Any ``torch.nn.Module`` will do, together
# with a function that turns an RGB image into the input of the module. Its layers are named by
# their paths. The module itself does not change: it stays in its mode and on its device.

torch.manual_seed(0)
network = nn.Sequential(
    nn.Conv2d(3, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 5, stride=2), nn.ReLU()
)
to_tensor = transforms.Compose([transforms.Resize((48, 48)), transforms.ToTensor()])
own = DeepFeatureExtractor(network, "3", preprocessing=to_tensor)
theirs = SimilarPictures(own, n_neighbors=3).fit(album[kept], labels[kept])
print(f"an untrained network of two layers: {theirs.score(album[queries], labels[queries]):.1%}")
