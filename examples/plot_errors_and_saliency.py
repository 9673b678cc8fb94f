"""
What does the classifier get wrong, and where does it look?
===========================================================

A score says how often a classifier is wrong; the photographs say why. This example shows those with
the lowest probability of their class ("top losses"), class by class if wanted, and the regions that
a fine-tuned network bases its decisions on (Grad-CAM).
"""

# sphinx_gallery_thumbnail_number = 3

import tempfile

import matplotlib.pyplot as plt
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline

from deepfeat import DeepFeatureExtractor, FineTuneClassifier
from deepfeat.datasets import load_image_folder, write_sample_folder
from deepfeat.plotting import PredictionDisplay, SaliencyDisplay

folder = tempfile.TemporaryDirectory()
photos = load_image_folder(write_sample_folder(folder.name))
labels = photos.target_names[photos.target]
train, test, y_train, y_test = train_test_split(
    photos.data, labels, test_size=0.5, stratify=labels, random_state=0
)

# %%
# Top losses
# ----------
#
# ``y_true`` puts the worst predictions first. Above each photograph is its class, in red if another
# one is more probable, and the green bar is its probability. Some of these photographs show more
# than one thing, or are on the edge of what their folder says: labels can be wrong, too.

classifier = make_pipeline(DeepFeatureExtractor("resnet10_slim"), LogisticRegression(C=10))
classifier.fit(train, y_train)
print(f"accuracy {classifier.score(test, y_test):.3f}")
PredictionDisplay.from_estimator(classifier, test, y_true=y_test, top=3, max_images=6)
plt.show()

# %%
# Those of a single class:

trees = y_test == "trees"
PredictionDisplay.from_estimator(classifier, test[trees], y_true=y_test[trees], max_images=2)
plt.show()

# %%
# Where the network looks
# -----------------------
#
# Grad-CAM needs the gradients of a network, so it is for fine-tuned ones. The map has one value for
# each position of the last layer with positions, here 3 x 3, which is coarse.

tuned = FineTuneClassifier("resnet10_slim", max_epochs=5, random_state=0).fit(train, y_train)
print(f"accuracy, fine-tuned {tuned.score(test, y_test):.3f}")
shown = [np.flatnonzero(y_test == name)[1] for name in ("palace", "petals", "sky", "trees")]
SaliencyDisplay.from_estimator(tuned, test[shown])
plt.show()

# %%
# An earlier layer has more positions, and ``target`` asks for another class: what in a photograph
# of the palace could be trees?

palace = test[y_test == "palace"][:4]
SaliencyDisplay.from_estimator(tuned, palace, layer="stage4", target="trees")
plt.show()
folder.cleanup()
