"""
Layers and activation maps
==========================

A network turns an image into numbers layer by layer. This example first looks at the structure of
networks (their layers, output shapes and parameters), then at the activations of layers for a
photograph, and finally at the row of features that a classifier gets.
"""

# sphinx_gallery_thumbnail_number = 3

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_images

from deepfeat import DeepFeatureExtractor, list_layers
from deepfeat.plotting import ActivationMapDisplay, ArchitectureDisplay

palace, dahlia = load_sample_images().images

# %%
# The structure of a network
# --------------------------
#
# VGG16 is used in countless papers. Its maps become smaller and more numerous with depth, and nine
# out of ten parameters are in the three fully connected layers at its end. Most of these are in the
# first one, which connects 25,088 inputs to 4,096 neurons. The plot needs no weights, and none are
# loaded.

ArchitectureDisplay.from_backbone("vgg16")
plt.show()

# %%
# A ResNet consists of blocks instead of single layers, and its only fully connected layer is the
# classifier. Blocks of the same kind and shape share a row.

ArchitectureDisplay.from_backbone("resnet50")
plt.show()

# %%
# The same information as a table, for the small network that comes with deepfeat. Layers are
# requested by any name or alias in it, or by the path of a module inside a block.

print(list_layers("resnet10_slim"))

# %%
# Activation maps
# ---------------
#
# The first convolution slides small filters over the image, one per channel: some respond to edges
# of a certain direction, others to a colour. The image on the left is the input of the network: the
# photograph, cropped to a square.

extractor = DeepFeatureExtractor("resnet10_slim", "conv1", image_size=224)
before = ActivationMapDisplay.from_extractor(extractor, palace)
plt.show()

# %%
# The ReLU after it sets negative values to zero: each channel now shows where its pattern is, and
# no longer where the opposite pattern is. (Between the two layers, the batch normalisation ``bn1``
# shifts and scales each channel.)

after = ActivationMapDisplay.from_extractor(extractor, palace, layer="relu")
plt.show()
normalized = ActivationMapDisplay.from_extractor(extractor, palace, layer="bn1").maps
plt.close()
negative = [np.mean(maps < 0) for maps in (normalized, after.maps)]
print(f"negative before the ReLU: {negative[0]:.0%}, after it: {negative[1]:.0%}")
print("the rest is the same:", np.array_equal(after.maps, np.maximum(normalized, 0)))

# %%
# Deeper layers have coarser maps and more channels. The ends of four stages for the dahlia, side by
# side; each subplot is divided as needed.

figure, axes = plt.subplots(2, 2, figsize=(11, 6.5), layout="constrained")
for layer, axis in zip(["stage2", "stage3", "stage4", "stage5"], axes.flat, strict=True):
    ActivationMapDisplay.from_extractor(extractor, dahlia, layer=layer, channels=9, ax=axis)
plt.show()

# %%
# From maps to features
# ---------------------
#
# A classifier needs one row per image. By default, each map is averaged, which keeps how strongly a
# pattern occurs but not where. The row is then scaled to unit length.

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
