"""From images to a searched pipeline: digits, a convolutional network, a linear SVM.

Runs in seconds and downloads nothing: the images come with scikit-learn, and the network has
seeded random weights, which say more about strokes than about the world. For photographs leave
out `weights=None`, and the weights that were trained on ImageNet are downloaded once.
"""

from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from deepfeat import DeepFeatureExtractor

digits = load_digits()
images = digits.images / 16  # floats are read on the scale from 0 to 1
train, test, y_train, y_test = train_test_split(
    images, digits.target, test_size=0.5, stratify=digits.target, random_state=0
)

extractor = DeepFeatureExtractor(
    "resnet18", "layer2", weights=None, random_state=0, pooling="flatten", image_size=32
)
search = GridSearchCV(
    make_pipeline(extractor, LinearSVC(random_state=0, max_iter=5000)),
    {"deepfeatureextractor__layer": ["layer2", "layer3"], "linearsvc__C": [0.1, 1, 10]},
    cv=3,
)
search.fit(train, y_train)
pixels = LinearSVC(random_state=0, max_iter=5000).fit(train.reshape(len(train), -1), y_train)

print("8 x 8 digits of scikit-learn; ResNet-18 with random weights, no download")
print(f"best of the search:      {search.best_params_}")
print(f"accuracy on held-out half, deepfeat + LinearSVC:   {search.score(test, y_test):.3f}")
print(
    "accuracy on held-out half, raw pixels + LinearSVC: "
    f"{pixels.score(test.reshape(len(test), -1), y_test):.3f}"
)
