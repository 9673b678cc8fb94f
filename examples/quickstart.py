"""
From images to a classifier
===========================

A complete example with the images that come with scikit-learn and the network that comes with
deepfeat: a pipeline, a search over layers and regularisation, the accuracy on unseen images, a
confusion matrix, and the same task by fine-tuning. It takes about a minute and downloads nothing.
For photographs, use a larger network such as ``"resnet50"``; its weights are downloaded once.
"""

import matplotlib.pyplot as plt
from sklearn.datasets import load_digits
from sklearn.metrics import ConfusionMatrixDisplay
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from deepfeat import DeepFeatureExtractor, FineTuneClassifier

digits = load_digits()
images = digits.images / 16  # floats range from 0 to 1
train, test, y_train, y_test = train_test_split(
    images, digits.target, test_size=0.5, stratify=digits.target, random_state=0
)

# %%
# Features and a linear classifier
# --------------------------------
#
# The search covers layers of the network and values of the classifier's C. Each image goes through
# the network once, whatever the number of folds and candidates.

extractor = DeepFeatureExtractor("resnet10_slim", "layer2", pooling="flatten", image_size=32)
search = GridSearchCV(
    make_pipeline(extractor, LinearSVC(random_state=0, max_iter=10_000)),
    {
        "deepfeatureextractor__layer": ["layer2", "layer3", "layer4"],
        "linearsvc__C": [0.1, 1, 10],
    },
    cv=3,
)
search.fit(train, y_train)
pixels = LinearSVC(random_state=0, max_iter=10_000).fit(train.reshape(len(train), -1), y_train)

print(f"best parameters:              {search.best_params_}")
print(f"accuracy, features:           {search.score(test, y_test):.3f}")
print(f"accuracy, raw pixels:         {pixels.score(test.reshape(len(test), -1), y_test):.3f}")

# %%
# Which digits are confused with each other?

ConfusionMatrixDisplay.from_estimator(search, test, y_test, cmap="Blues", colorbar=False)
plt.title("Features and a linear classifier")
plt.tight_layout()
plt.savefig("confusion_matrix.png", dpi=150)
print("confusion matrix:             confusion_matrix.png")

# %%
# Fine-tuning
# -----------
#
# The same task with the network itself as the classifier, of which a new head and the last two
# blocks are trained.

classifier = FineTuneClassifier(
    "resnet10_slim",
    unfreeze="layer3",
    backbone_learning_rate=1e-3,
    augment=None,  # mirrored digits are no digits
    image_size=32,
    random_state=0,
)
classifier.fit(train, y_train)
print(f"accuracy, fine-tuned network: {classifier.score(test, y_test):.3f}")
