"""
Pictures beside other columns
=============================

Data sets are seldom pictures alone: a product has a photograph and a weight, a patient a scan and
an age. Here each row of a DataFrame has a picture, a number and a category, and one pipeline
takes them all, cross-validated and searched like any other.

The post is to be sorted. Somebody has written a digit on each item, 0 for north, 1 for east, 2
for south; letters and parcels are told apart by their weight; and what is registered goes to the
counter. The digits are scikit-learn's, the rest is drawn at random.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import ConfusionMatrixDisplay
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from deepfeat import DeepFeatureExtractor
from deepfeat.plotting import LayerGridDisplay

rng = np.random.default_rng(0)
digits = load_digits(n_class=3)
count = len(digits.images)
post = pd.DataFrame(
    {
        "picture": list(digits.images / 16),
        "log_grams": rng.normal(6, 1.5, count).round(2),
        "service": rng.choice(["standard", "express", "registered"], count, p=[0.5, 0.3, 0.2]),
    }
)
direction = np.array(["north", "east", "south"])[digits.target]
kind = np.where(post["log_grams"] < 6, "letters", "parcels")
bins = np.array([f"{where} {what}" for where, what in zip(direction, kind, strict=True)])
bins[post["service"] == "registered"] = "counter"
print(post.drop(columns="picture").assign(bin=bins).head())

figure, axes = plt.subplots(1, 6, figsize=(9, 2.1), layout="constrained")
for axis, (_, item), label in zip(axes, post.iterrows(), bins, strict=False):
    axis.imshow(item["picture"], cmap="gray_r")
    axis.set_title(
        f"{label}\n{np.exp(item['log_grams']):.0f} g, {item['service']}", fontsize="small"
    )
    axis.set_axis_off()
plt.show()

# %%
# One transformer a column
# ------------------------
#
# The extractor takes the column of pictures as a pandas Series, whether that holds arrays, as
# here, or paths. It scales each row to length one, so that the many features of a picture do not
# drown one weight. The whole is one estimator, drawn below by scikit-learn: it can be cloned,
# pickled and put behind a server.

pictures = DeepFeatureExtractor("resnet10_slim", "stage3", image_size=32)
steps = {
    "pictures": (pictures, "picture"),
    "weight": (StandardScaler(), ["log_grams"]),
    "service": (OneHotEncoder(), ["service"]),
}


def make_sorter(*chosen):
    """Make a classifier that looks at some of the columns."""
    columns = ColumnTransformer([(name, *steps[name]) for name in chosen])
    return Pipeline([("columns", columns), ("classify", LogisticRegression(C=100, max_iter=1000))])


sorter = make_sorter("pictures", "weight", "service")
train, test, y_train, y_test = train_test_split(post, bins, stratify=bins, random_state=0)
sorter.fit(train, y_train)

# %%
# Every feature has a name that tells which column it came from.

names = sorter[0].get_feature_names_out()
print(f"{len(names)} features:", names[0], "...", *names[-4:], sep="\n  ")

# %%
# What each column is worth
# -------------------------
#
# No column can sort the post alone, and all together do. Every picture goes through the network
# once for all that this example computes, since the features are kept.

accuracies = {
    " + ".join(chosen): cross_val_score(make_sorter(*chosen), train, y_train, cv=5).mean()
    for chosen in [
        ("pictures",),
        ("weight", "service"),
        ("pictures", "weight"),
        ("pictures", "weight", "service"),
    ]
}
for chosen, accuracy in accuracies.items():
    print(f"{chosen:<30}{accuracy:.3f}")

# %%
# Searched like any other
# -----------------------
#
# Layer and regularization are parameters of the whole, and their names are long: the path through
# the steps. ``LayerGridDisplay`` finds them by their ends.

search = GridSearchCV(
    sorter,
    {
        "columns__pictures__layer": ["stage1", "stage2", "stage3", "stage4", "avgpool"],
        "classify__C": [1, 10, 100, 1000],
    },
    cv=3,
)
search.fit(train, y_train)
LayerGridDisplay.from_search(search)
plt.show()

# %%
# The best of them, on post that it has not seen:

display = ConfusionMatrixDisplay.from_estimator(
    search, test, y_test, cmap="Blues", colorbar=False, xticks_rotation=20
)
display.ax_.set_title(f"accuracy {search.score(test, y_test):.3f}")
display.figure_.set_layout_engine("constrained")
plt.show()
