"""
A search over layers and C
==========================

Which layer of a network tells digits apart best, and with how much regularisation? The search asks
for the features of every image once a layer, a C and a fold; the network sees it once.

The images are the handwritten digits that come with scikit-learn, and the network is the one that
comes with deepfeat: nothing is downloaded.
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
# The cache would be there without being named. It has a name here so that its counts can be read.

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
search.fit(images, labels)
without = (time.perf_counter() - start) * len(cs)
print(f"with the cache {with_cache:.1f} s, without it about {without:.1f} s")
