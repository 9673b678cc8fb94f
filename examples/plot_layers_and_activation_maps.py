"""
Layers and activation maps
==========================

A network turns a picture into numbers layer by layer. This example looks at a network from
outside (which layers are there, what do they give, where are the parameters?), then from inside
(what does a layer make of a photograph?), and ends with the row of features that a classifier
gets.
"""

# sphinx_gallery_thumbnail_number = 3

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_images

from deepfeat import DeepFeatureExtractor, list_layers
from deepfeat.plotting import ActivationMapDisplay, ArchitectureDisplay

palace, dahlia = load_sample_images().images

# %%
# A network from outside
# ----------------------
#
# VGG16 is the network of a thousand papers. Its maps get smaller and more numerous from layer to
# layer, and nine of ten parameters are in the three fully connected layers at its end, most of
# them in the first of these: it alone joins 25,088 numbers with 4,096 neurons. No weights are
# needed to see that, and none are loaded.

ArchitectureDisplay.from_backbone("vgg16")
plt.show()

# %%
# A ResNet has blocks instead of single layers, and no fully connected layer but the classifier.
# Blocks of one kind and shape share a row.

ArchitectureDisplay.from_backbone("resnet50")
plt.show()

# %%
# The same as a table, for the small network that comes with deepfeat. Any name in it, first name or
# alias, may be asked for, and the path of any module inside a block too.

print(list_layers("resnet10_slim"))

# %%
# A network from inside
# ---------------------
#
# The first convolution slides small filters over the picture, one for each channel: some answer to
# edges of one direction, others to a colour. The picture to the left is what the network sees: the
# photograph, cropped to a square.

extractor = DeepFeatureExtractor("resnet10_slim", "conv1", image_size=224)
before = ActivationMapDisplay.from_extractor(extractor, palace)
plt.show()

# %%
# The ReLU after it keeps what is positive and drops the rest: each channel now says where its
# pattern is, and no longer where its opposite is. (Between the two lies the batch normalization
# ``bn1``, which shifts and scales each channel.)

after = ActivationMapDisplay.from_extractor(extractor, palace, layer="relu")
plt.show()
normalized = ActivationMapDisplay.from_extractor(extractor, palace, layer="bn1").maps
plt.close()
negative = [np.mean(maps < 0) for maps in (normalized, after.maps)]
print(f"negative before the ReLU: {negative[0]:.0%}, after it: {negative[1]:.0%}")
print("the rest is the same:", np.array_equal(after.maps, np.maximum(normalized, 0)))

# %%
# Deeper layers have coarser maps of more channels. Side by side, for the dahlia, the ends of four
# stages: a subplot is divided as need be.

figure, axes = plt.subplots(2, 2, figsize=(11, 6.5), layout="constrained")
for layer, axis in zip(["stage2", "stage3", "stage4", "stage5"], axes.flat, strict=True):
    ActivationMapDisplay.from_extractor(extractor, dahlia, layer=layer, channels=9, ax=axis)
plt.show()

# %%
# From maps to a row
# ------------------
#
# A classifier wants one row an image. By default each map becomes its mean: whether a pattern is
# there counts, and how much of it, but not where. The row is then scaled to length one.

row = extractor.set_params(layer="stage3").fit_transform([dahlia])[0]
everything = ActivationMapDisplay.from_extractor(extractor, dahlia, channels=1000)
plt.close()
means = everything.maps.mean(axis=(1, 2))
print(everything.maps.shape, "->", row.shape)
print("by hand:", np.allclose(row, means / np.linalg.norm(means), atol=1e-6))

figure, axis = plt.subplots(figsize=(9, 2.6), layout="constrained")
axis.bar(range(len(row)), row)
axis.set(xlabel="feature", ylabel="value", title="the dahlia, as a classifier sees it")
axis.margins(x=0.01)
plt.show()
