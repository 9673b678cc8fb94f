"""
A search over layers and C
==========================

Which layer of a network tells two scenes apart, and with how much regularisation? The search asks
for the features of every image once a layer, a C and a fold; the network sees it once.

The images are patches of the two photographs that come with scikit-learn: the roofs of the Summer
Palace and a dahlia. The network has random weights, so nothing is downloaded.
"""

import time

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_images
from sklearn.feature_extraction.image import extract_patches_2d
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from deepfeat import DeepFeatureExtractor, FeatureCache
from deepfeat.plotting import LayerGridDisplay

patches = np.concatenate(
    [
        extract_patches_2d(photograph, (48, 48), max_patches=60, random_state=0)
        for photograph in load_sample_images().images
    ]
)
labels = np.repeat(["palace", "dahlia"], 60)

# %%
# The pipeline and its grid
# -------------------------
#
# The cache would be there without being named. It has a name here so that its counts can be read.

cache = FeatureCache()
extractor = DeepFeatureExtractor("resnet18", weights=None, image_size=64, cache=cache)
layers = ["layer1", "layer2", "layer3", "layer4", "avgpool"]
cs = [0.001, 0.01, 0.1, 1, 10, 100]
search = GridSearchCV(
    make_pipeline(extractor, LinearSVC(random_state=0, max_iter=10_000)),
    {"deepfeatureextractor__layer": layers, "linearsvc__C": cs},
    cv=3,
)
start = time.perf_counter()
search.fit(patches, labels)
with_cache = time.perf_counter() - start
print(f"best: {search.best_params_}, accuracy {search.best_score_:.3f}")
print(cache.info())

# %%
# The grid as a picture
# ---------------------

LayerGridDisplay.from_search(search)
plt.show()

# %%
# What the cache saved
# --------------------
#
# Without it the same search is as good, and slower. One column of the grid is timed and the time
# multiplied, since each column asks the network for the same number of images.

search.set_params(estimator__deepfeatureextractor__cache=None, refit=False)
search.set_params(param_grid={"deepfeatureextractor__layer": layers, "linearsvc__C": cs[:1]})
start = time.perf_counter()
search.fit(patches, labels)
without = (time.perf_counter() - start) * len(cs)
print(f"with the cache {with_cache:.1f} s, without it about {without:.1f} s")
