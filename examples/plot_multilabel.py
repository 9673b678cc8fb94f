"""
Several labels per image
========================

A photograph may show a beach and a sunset, or neither. This example predicts any number of labels
per image, first with features and one linear classifier per label, then by fine-tuning.

The images are composed of the digits that come with scikit-learn, so nothing is downloaded. With
photographs of your own, X is a list of paths, and the labels come from a table, or from
``load_image_folder("photos")`` for those that already lie in folders of a single label.
"""

# sphinx_gallery_thumbnail_number = 2

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, label_ranking_average_precision_score
from sklearn.model_selection import train_test_split
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MultiLabelBinarizer, StandardScaler

from deepfeat import DeepFeatureExtractor, FineTuneClassifier

rng = np.random.default_rng(0)
digits = load_digits(n_class=6)
names = np.array(["zero", "one", "two", "three", "four", "five"])


def compose(count, digit_images, digit_labels):
    """Place two or three different digits anywhere in the quarters of each picture."""
    pictures = np.zeros((count, 32, 32))
    labels = []
    for picture in pictures:
        shown = rng.choice(6, size=rng.integers(2, 4), replace=False)
        for digit, quarter in zip(shown, rng.permutation(4), strict=False):
            top, left = 16 * np.array(divmod(quarter, 2)) + rng.integers(0, 9, size=2)
            index = rng.choice(np.flatnonzero(digit_labels == digit))
            picture[top : top + 8, left : left + 8] = digit_images[index]
        labels.append(names[np.sort(shown)].tolist())
    return pictures, labels


# No digit is in both sets.
images, held_out, y, y_held_out = train_test_split(
    digits.images / 16, digits.target, test_size=0.3, stratify=digits.target, random_state=0
)
train, labels = compose(600, images, y)
test, labels_test = compose(300, held_out, y_held_out)
print(labels[:3])

# %%
# A column per label
# ------------------
#
# ``MultiLabelBinarizer`` turns the labels into a matrix of 0 and 1, with a column for each.

binarizer = MultiLabelBinarizer(classes=names)
y_train, y_test = binarizer.fit_transform(labels), binarizer.transform(labels_test)
print(y_train[:3])

# %%
# Features and linear classifiers
# -------------------------------
#
# ``OneVsRestClassifier`` fits a classifier per label, for all of which the images go through the
# network once. Only whether a digit is there matters, not where it is, so the maps are pooled, by
# their mean and their maximum.

extractor = DeepFeatureExtractor(
    "resnet10_slim", ["layer2", "layer3"], pooling=["avg", "max"], image_size=96
)
linear = make_pipeline(
    extractor,
    StandardScaler(),
    OneVsRestClassifier(LogisticRegression(C=0.1, max_iter=1000)),
)
_ = linear.fit(train, y_train)

# %%
# Fine-tuning
# -----------
#
# ``FineTuneClassifier`` takes the same matrix. Its head then has an output per label, each with a
# logistic loss of its own.

fine_tuned = FineTuneClassifier(
    "resnet10_slim",
    unfreeze="layer2",
    max_epochs=12,
    backbone_learning_rate=1e-3,
    augment=None,  # mirrored digits are no digits
    image_size=64,
    random_state=0,
)
_ = fine_tuned.fit(train, y_train)

# %%
# Comparison
# ----------
#
# All have a probability for each label of an image. The F1 score compares the labels with a
# probability above one half to the true ones, and is averaged over labels. The ranking needs no
# threshold: it is 1 if the true labels of each image come first. The last measure is the fraction
# of images of which all labels are right. Raw pixels serve as a baseline.

pixels = OneVsRestClassifier(LogisticRegression(max_iter=1000)).fit(
    train.reshape(len(train), -1), y_train
)
probabilities = {
    "pixels": pixels.predict_proba(test.reshape(len(test), -1)),
    "features": linear.predict_proba(test),
    "fine-tuned": fine_tuned.predict_proba(test),
}
scores = pd.DataFrame(
    {
        name: {
            "F1": f1_score(y_test, values > 0.5, average="macro"),
            "ranking": label_ranking_average_precision_score(y_test, values),
            "all labels": np.mean(((values > 0.5) == y_test).all(axis=1)),
        }
        for name, values in probabilities.items()
    }
)
print(scores.T.round(2).to_string())

f1 = pd.DataFrame(
    {name: f1_score(y_test, values > 0.5, average=None) for name, values in probabilities.items()},
    index=binarizer.classes_,
)
figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
f1.plot.bar(ax=axis, rot=0, ylim=(0, 1), ylabel="F1", title="F1 score of each label")
axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
plt.show()

# %%
# Raw pixels are of little use, since a digit may be anywhere. Features and fine-tuning are close to
# each other here, although the fine-tuned network sees smaller images. Labels that are hard for one
# are mostly hard for the other.
#
# Predictions
# -----------
#
# ``inverse_transform`` turns the predicted matrix back into names. Mistakes are in red: labels that
# are missing, with a minus, and those that are not in the image, with a plus.

predicted = binarizer.inverse_transform(fine_tuned.predict(test))
figure, axes = plt.subplots(2, 6, figsize=(10, 4.8), layout="constrained")
for axis, image, truth, guess in zip(axes.flat, test, labels_test, predicted, strict=False):
    extra, missing = set(guess) - set(truth), set(truth) - set(guess)
    marks = [*guess, *sorted(f"-{name}" for name in missing)]
    marks = [f"+{name}" if name in extra else name for name in marks]
    axis.imshow(image, cmap="gray_r")
    color = "tab:red" if extra | missing else "black"
    axis.set_title("\n".join(marks), fontsize="small", color=color)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_color("lightgrey")
plt.show()
