"""
Images next to other columns
============================

Datasets rarely consist of images alone: a product has a photograph and a weight, a patient a scan
and an age. Here each row of a DataFrame has an image, a number and a category, and a single
pipeline handles them all. It is cross-validated and searched like any other.

The task is to sort mail. Each item carries a handwritten digit: 0 for north, 1 for east, 2 for
south. Letters and parcels differ in weight, and registered items go to the counter. The digits are
those of scikit-learn; everything else is random.
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
# One transformer per column
# --------------------------
#
# The extractor takes the column of images as a pandas Series of arrays, as here, or of paths. It
# scales each row to unit length, so that the many features of an image do not drown out a single
# weight. The result is one estimator, drawn below by scikit-learn, that can be cloned, pickled and
# deployed.

pictures = DeepFeatureExtractor("resnet10_slim", "stage3", image_size=32)
steps = {
    "pictures": (pictures, "picture"),
    "weight": (StandardScaler(), ["log_grams"]),
    "service": (OneHotEncoder(), ["service"]),
}


def make_sorter(*chosen):
    """Make a classifier that uses only some of the columns."""
    columns = ColumnTransformer([(name, *steps[name]) for name in chosen])
    return Pipeline([("columns", columns), ("classify", LogisticRegression(C=100, max_iter=1000))])


sorter = make_sorter("pictures", "weight", "service")
train, test, y_train, y_test = train_test_split(post, bins, stratify=bins, random_state=0)
sorter.fit(train, y_train)

# %%
# The name of each feature says which column it comes from.

names = sorter[0].get_feature_names_out()
print(f"{len(names)} features:", names[0], "...", *names[-4:], sep="\n  ")

# %%
# The value of each column
# ------------------------
#
# No column is enough to sort the mail, but all of them together are. As features are cached, each
# image goes through the network only once in this example.

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
# Searching over layers
# ---------------------
#
# The layer and the regularisation are parameters of the pipeline. Their names are long, as they
# contain the path through its steps; ``LayerGridDisplay`` recognises them by their endings.

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
# The best candidate, on mail that it has not seen:

display = ConfusionMatrixDisplay.from_estimator(
    search, test, y_test, cmap="Blues", colorbar=False, xticks_rotation=20
)
display.ax_.set_title(f"accuracy {search.score(test, y_test):.3f}")
display.figure_.set_layout_engine("constrained")
plt.show()
