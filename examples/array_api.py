"""
A classifier on the GPU
=======================

Features of many images are a large matrix, and a GPU can fit a logistic regression to it. From
version 1.9 on, scikit-learn's ``LogisticRegression`` computes on tensors of torch where they are,
through the array API::

    python examples/array_api.py

The script uses CUDA or Apple's MPS if torch finds one, and a processor otherwise.
"""

import os

os.environ["SCIPY_ARRAY_API"] = "1"  # before scipy is imported

import tempfile

import numpy as np
import torch
from sklearn import config_context
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from deepfeat import DeepFeatureExtractor
from deepfeat.datasets import load_image_folder, write_sample_folder

if torch.cuda.is_available():
    device = "cuda"
else:
    device = "mps" if torch.backends.mps.is_available() else "cpu"

with tempfile.TemporaryDirectory() as folder:
    photos = load_image_folder(write_sample_folder(folder))
    features = DeepFeatureExtractor("resnet10_slim").fit_transform(photos.data)
split = train_test_split(
    features, photos.target, test_size=0.5, stratify=photos.target, random_state=0
)

# %%
# The tensors take the place of arrays, also for the labels, which are numbers therefore.
# ``target_names`` turns predictions into names.

X_train, X_test, y_train, y_test = (torch.asarray(part, device=device) for part in split)
classifier = LogisticRegression(C=100, max_iter=1000)
with config_context(array_api_dispatch=True):
    classifier.fit(X_train, y_train)
    predicted = classifier.predict(X_test)
print(f"coefficients on {classifier.coef_.device}")
print(f"accuracy {(predicted == y_test).float().mean():.3f}")
print("first predictions:", *photos.target_names[predicted[:3].cpu()])

# %%
# It is the same model as on arrays.

X_train, X_test, y_train, y_test = split
classifier = LogisticRegression(C=100, max_iter=1000).fit(X_train, y_train)
agreement = np.mean(classifier.predict(X_test) == predicted.cpu().numpy())
print(f"predictions that are the same with NumPy: {agreement:.1%}")
