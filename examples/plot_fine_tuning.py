"""
Fine-tuning, block by block
===========================

A pretrained network gets a new head and is trained on images of another kind. How much of it
should be trained? This example unfreezes one block after another and compares the results.

The images are the handwritten digits that come with scikit-learn, and the network is the one that
comes with deepfeat, so nothing is downloaded.
"""

import time

import matplotlib.pyplot as plt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from deepfeat import FineTuneClassifier, list_layers
from deepfeat.plotting import LearningCurveDisplay

digits = load_digits()
images, held_out, labels, held_out_labels = train_test_split(
    digits.images / 16, digits.target, train_size=400, stratify=digits.target, random_state=0
)
list_layers("resnet10_slim", image_size=32)

# %%
# The last block
# --------------
#
# ``unfreeze="layer4"`` trains the fourth block and the new head. Everything before them is frozen:
# its weights and BatchNorm statistics do not change, and it processes each image only once. A tenth
# of the images is held out to decide when to stop.

classifier = FineTuneClassifier(
    "resnet10_slim",
    unfreeze="layer4",
    max_epochs=12,
    backbone_learning_rate=1e-3,
    augment=None,  # mirrored digits are no digits
    early_stopping=True,
    image_size=32,
    random_state=0,
)
classifier.fit(images, labels)
print(f"{classifier.n_iter_} epochs, accuracy {classifier.score(held_out, held_out_labels):.3f}")

# %%
# The learning curve shows training and validation, first of the head alone, for as many epochs as
# ``max_epochs`` allows afterwards. With so few validation images, the accuracy changes in steps.

LearningCurveDisplay.from_estimator(classifier)
plt.show()

# %%
# How much to unfreeze
# --------------------
#
# The same settings, from the head alone to the whole network.

choices = [None, "layer4", "layer3", "layer2", "all"]
accuracies, seconds = [], []
for unfreeze in choices:
    classifier.set_params(unfreeze=unfreeze, early_stopping=False)
    start = time.perf_counter()
    classifier.fit(images, labels)
    seconds.append(time.perf_counter() - start)
    accuracies.append(classifier.score(held_out, held_out_labels))
    print(f"{unfreeze or 'head alone':10}  accuracy {accuracies[-1]:.3f}  {seconds[-1]:4.1f} s")

# %%
# With each unfrozen block, an epoch takes longer.

names = ["head\nalone", "layer4", "layer3,\nlayer4", "layer2\nto layer4", "all"]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
left.plot(names, accuracies, "o-")
left.set(title="Accuracy on unseen images", xlabel="unfrozen", ylabel="accuracy")
right.bar(names, seconds)
right.set(title="Time of 12 epochs", xlabel="unfrozen", ylabel="seconds")
plt.show()

# %%
# Features of the trained network
# -------------------------------
#
# A trained network can serve as a feature extractor, here for the vectors before its head.

extractor = classifier.to_extractor("avgpool")
print(extractor.transform(held_out[:5]).shape)
