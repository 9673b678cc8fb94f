"""
A search over layers and C
==========================

Which layer of a network separates digits best, and with how much regularisation? The search needs
the features of each image for every combination of layer, C and fold, but the network sees each
image only once.

The images are the handwritten digits that come with scikit-learn, and the network is the one that
comes with deepfeat, so nothing is downloaded.
"""

import time

import matplotlib.pyplot as plt
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from deepfeat import DeepFeatureExtractor, FeatureCache
from deepfeat.plotting import LayerGridDisplay

digits = load_digits()
images, labels = digits.images[:500] / 16, digits.target[:500]

# %%
# The pipeline and its grid
# -------------------------
#
# The extractor has a cache by default. An explicit one is used here to read its counts.

cache = FeatureCache()
extractor = DeepFeatureExtractor("resnet10_slim", image_size=32, cache=cache)
layers = ["relu", "layer1", "layer2", "layer3", "layer4"]
cs = [0.001, 0.01, 0.1, 1, 10, 100]
search = GridSearchCV(
    make_pipeline(extractor, LinearSVC(random_state=0, max_iter=10_000)),
    {"deepfeatureextractor__layer": layers, "linearsvc__C": cs},
    cv=3,
)
start = time.perf_counter()
search.fit(images, labels)
with_cache = time.perf_counter() - start
print(f"best: {search.best_params_}, accuracy {search.best_score_:.3f}")
print(cache.info())

# %%
# A plot of the grid
# ------------------

LayerGridDisplay.from_search(search)
plt.show()

# %%
# The time saved by the cache
# ---------------------------
#
# Without the cache, the search gives the same scores but takes longer. Each column of the grid
# sends the same number of images through the network, so one column is timed and multiplied.

search.set_params(estimator__deepfeatureextractor__cache=None, refit=False)
search.set_params(param_grid={"deepfeatureextractor__layer": layers, "linearsvc__C": cs[:1]})
start = time.perf_counter()
search.fit(images, labels)
without = (time.perf_counter() - start) * len(cs)
print(f"with the cache {with_cache:.1f} s, without it about {without:.1f} s")
