"""
Regression on images
====================

A target can also be a number: the price of a product, the age of a person, the angle of an object.
This example predicts by how many degrees a digit was rotated, searches for the layer and the
pooling, and compares the result with models that do without a network.

The digits come with scikit-learn, so nothing is downloaded. With photographs of your own, X is a
list of paths and y an array with one number per path; a column of a DataFrame will do for either.
"""

# sphinx_gallery_thumbnail_number = 3

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.dummy import DummyRegressor
from sklearn.linear_model import RidgeCV
from sklearn.metrics import PredictionErrorDisplay, mean_absolute_error
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.svm import SVR

from deepfeat import DeepFeatureExtractor

rng = np.random.default_rng(0)
digits = load_digits()
angles = rng.uniform(-60, 60, 800)
shifts = rng.integers(-12, 13, size=(800, 2))


def draw(digit, angle, shift):
    """Enlarge a digit, rotate it anticlockwise and move it, in an image of 64 x 64 pixels."""
    picture = Image.fromarray((np.pad(digit, 4) * 255).astype(np.uint8)).resize((64, 64))
    return np.asarray(picture.rotate(angle, Image.Resampling.BICUBIC, translate=tuple(shift)))


images = np.stack([draw(*each) for each in zip(digits.images / 16, angles, shifts, strict=False)])
train, test, y_train, y_test = train_test_split(images, angles, test_size=200, random_state=0)

figure, axes = plt.subplots(1, 9, figsize=(9, 1.4), layout="constrained")
for axis, image, angle in zip(axes, train, y_train, strict=False):
    axis.imshow(image, cmap="gray_r")
    axis.set_title(f"{angle:.0f}°", fontsize="medium")
    axis.set_axis_off()
plt.show()

# %%
# Layer, pooling and regressor
# ----------------------------
#
# Averaging the maps of a layer tells how strongly each pattern occurs, but not where.
# ``pooling="flatten"`` keeps all positions. A linear model and a kernel machine take turns after
# each. Every image goes through the network a few times at most, whatever the size of the grid.

linear, kernel = RidgeCV(np.logspace(-6, 2, 17)), SVR(C=1000)
pipe = Pipeline(
    [("extract", DeepFeatureExtractor("resnet10_slim", image_size=96)), ("regress", linear)]
)
search = GridSearchCV(
    pipe,
    {
        "extract__layer": ["layer2", "layer3", "layer4"],
        "extract__pooling": ["avg", "flatten"],
        "regress": [linear, kernel],
    },
    scoring="neg_mean_absolute_error",
    cv=3,
)
search.fit(train, y_train)

results = pd.DataFrame(search.cv_results_)
results["layer"] = results["param_extract__layer"]
results["pooling"] = results["param_extract__pooling"]
results["model"] = results["param_regress"].map(lambda model: type(model).__name__)
results["error"] = -results["mean_test_score"]
table = results.pivot(index="layer", columns=["model", "pooling"], values="error")
print(table.round(1).to_string())

# %%
# Comparison
# ----------
#
# Digits that were not used in the search, and three models without a network: the mean angle, which
# is what can be said without looking, and a linear model and a kernel machine on raw pixels.


def flatten(images):
    """Return one row of pixels per image, from 0 to 1."""
    return images.reshape(len(images), -1) / 255


to_pixels = FunctionTransformer(flatten)
models = {
    "mean angle": DummyRegressor(),
    "pixels, linear": make_pipeline(to_pixels, RidgeCV(np.logspace(-3, 5, 17))),
    "pixels, kernel": make_pipeline(to_pixels, SVR(C=1000)),
    "features": search.best_estimator_,
}
predicted = {name: model.fit(train, y_train).predict(test) for name, model in models.items()}
errors = {name: mean_absolute_error(y_test, values) for name, values in predicted.items()}
for name, error in errors.items():
    print(f"{name:<18}{error:5.1f} degrees")

figure, axes = plt.subplots(1, 3, figsize=(10, 3.7), layout="constrained")
for axis, name in zip(axes, list(models)[1:], strict=True):
    PredictionErrorDisplay.from_predictions(
        y_test,
        predicted[name],
        kind="actual_vs_predicted",
        ax=axis,
        scatter_kwargs={"s": 16, "alpha": 0.6, "linewidths": 0},
    )
    axis.set(title=f"{name}\nmean error {errors[name]:.1f}°", xlabel="predicted", ylabel="true")
    axis.set(xticks=[-60, 0, 60], yticks=[-60, 0, 60])
plt.show()

# %%
# Unseen digits, and the same digits rotated back by the predicted angle.

figure, axes = plt.subplots(2, 9, figsize=(9, 2.3), layout="constrained")
for column, image, angle in zip(axes.T, test, predicted["features"], strict=False):
    column[0].imshow(image, cmap="gray_r")
    column[1].imshow(Image.fromarray(image).rotate(-angle, Image.Resampling.BICUBIC), cmap="gray_r")
for axis in axes.flat:
    axis.set_axis_off()
plt.show()

# %%
# When pixels are enough
# ----------------------
#
# What if each digit lies in the centre of its image? A pixel then has the same meaning in all
# images, which is hardly ever true of photographs.

centred = np.stack(
    [draw(digit, angle, (0, 0)) for digit, angle in zip(digits.images / 16, angles, strict=False)]
)
train, test, y_train, y_test = train_test_split(centred, angles, test_size=200, random_state=0)
for name, model in models.items():
    error = mean_absolute_error(y_test, model.fit(train, y_train).predict(test))
    print(f"{name:<18}{error:5.1f} degrees")

# %%
# Where the digits lie anywhere, features have smaller errors than pixels. Where all of them lie in
# the centre, a kernel machine on pixels does as well: compare with it before you settle on a
# network.
