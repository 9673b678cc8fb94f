"""
A vision transformer
====================

A transformer cuts an image into patches and computes one token for each of them, plus, in most
networks, a class token for the whole image. This example lists the layers of a transformer,
searches over the ways to turn its tokens into one row, and draws the tokens as a picture.

timm has hundreds of transformers (``pip install ".[timm]"``), but their weights have to be
downloaded. So that this page can be built offline, a tiny transformer with random weights stands in
for a real one: the code is the same, but its scores say nothing about transformers. For real
features, leave out ``weights=None`` and choose one of the
:doc:`backbones of the guide </guide/backbones>`.
"""

# sphinx_gallery_thumbnail_number = 2

import matplotlib.pyplot as plt
import pandas as pd
from sklearn.datasets import load_digits, load_sample_images
from sklearn.decomposition import PCA
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, minmax_scale
from sklearn.svm import LinearSVC

from deepfeat import DeepFeatureExtractor, list_layers

# %%
# The layers, without the weights
# -------------------------------
#
# The structure of a network is known before its weights are downloaded. These are the layers of
# DINOv2's small transformer with four registers, for images of 224 x 224 pixels instead of the
# 518 x 518 of its weights. A block returns 261 tokens of 384 values: the class token, the
# four registers, and 16 x 16 patches. Each block is a stage.

layers = list_layers("timm/vit_small_patch14_reg4_dinov2.lvd142m", image_size=224)
print(layers)
print(f"{sum(layer.parameters for layer in layers):,} parameters")
print(f"{sum(layer.multiply_adds for layer in layers):,} multiply-adds")

# %%
# One row per image
# -----------------
#
# ``pooling="cls"`` takes the class token, and ``"avg"`` the mean of the patches, without class
# token and registers. A list takes both, next to each other. The names of the columns tell which is
# which.

extractor = DeepFeatureExtractor("timm/test_vit", "norm", weights=None, pooling=["cls", "avg"])
photographs = load_sample_images().images
print(extractor.fit_transform(photographs).shape)
print(extractor.get_feature_names_out()[[0, -1]])

# %%
# Which layer, and which pooling?
# -------------------------------
#
# Both are parameters like any other, so a grid can search over them. Each image goes through the
# network once: the pass keeps the last five stages and what the classifier takes, as means, maxima
# and class tokens. The images are digits.

digits = load_digits()
images, labels = digits.images[:300] / 16, digits.target[:300]
search = GridSearchCV(
    make_pipeline(
        extractor.set_params(norm=None, image_size=96),
        StandardScaler(),
        LinearSVC(C=0.01, random_state=0),
    ),
    {
        "deepfeatureextractor__layer": ["stage2", "stage4", "stage6"],
        "deepfeatureextractor__pooling": ["cls", "avg", "max", ["cls", "avg"]],
    },
    cv=3,
)
search.fit(images, labels)

results = pd.DataFrame(search.cv_results_)
results["layer"] = results["param_deepfeatureextractor__layer"]
results["pooling"] = [
    pooling if isinstance(pooling, str) else " + ".join(pooling)
    for pooling in results["param_deepfeatureextractor__pooling"]
]
table = results.pivot(index="layer", columns="pooling", values="mean_test_score")
table = table[["cls", "avg", "max", "cls + avg"]]
print(table.round(3))

figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
table.plot.bar(ax=axis, rot=0, ylim=(0, 1), ylabel="accuracy")
axis.set_title("Random weights, 300 digits")
axis.legend(title="pooling", loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %%
# The patches as a picture
# ------------------------
#
# ``transform_maps`` returns the output of a layer at each position: for a transformer, the tokens
# of the patches on their grid. Here each token becomes a colour, made of the first three principal
# components of all tokens of an image. With weights of DINOv2, such pictures show which parts of
# objects have similar features (Oquab et al., 2023, "DINOv2: Learning Robust Visual Features
# without Supervision"). With random weights, similar tokens only mean similar colours and
# brightness. The third column has the maps of ``resnet10_slim``, a small network that is trained
# and has no tokens: ``transform_maps`` treats both alike.

NETWORKS = {
    "timm/test_vit, random weights": DeepFeatureExtractor(
        "timm/test_vit", "norm", weights=None, resize="squash", image_size=448
    ),
    "resnet10_slim, layer3": DeepFeatureExtractor(
        "resnet10_slim", "layer3", resize="squash", image_size=448
    ),
}


def color(maps):
    """Turn maps (C, H, W) into a picture (H, W, 3) of three principal components."""
    tokens = maps.reshape(len(maps), -1).T
    components = minmax_scale(PCA(3).fit_transform(tokens)).clip(0, 1)
    return components.reshape(*maps.shape[1:], 3)


figure, axes = plt.subplots(2, 3, figsize=(10, 5), layout="constrained")
for row, photograph in zip(axes, photographs, strict=True):
    row[0].imshow(photograph)
for axis, (name, network) in zip(axes.T[1:], NETWORKS.items(), strict=True):
    maps = network.transform_maps(photographs)
    axis[0].set_title(f"{name}\n{maps.shape[1]} values at {maps.shape[2]} x {maps.shape[3]}")
    for ax, image_maps in zip(axis, maps, strict=True):
        ax.imshow(color(image_maps), extent=(0, 640, 427, 0))
for ax in axes.flat:
    ax.set_axis_off()
plt.show()

# %%
# For many images, pass an array to fill, such as a memory-mapped file, instead of memory:
# ``transform_maps(paths, out=numpy.lib.format.open_memmap("maps.npy", "w+", "float32", shape))``.
