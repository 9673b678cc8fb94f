"""`FineTuneClassifier`: fine-tuning for scikit-learn."""

import copy
import functools
import itertools
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, column_or_1d
from torch import Tensor, nn
from tqdm import tqdm

from .._backbones.find import Backbone, find_backbone
from .._backbones.preprocessing import Preprocessing, Resize
from .._backbones.state_files import Weights, is_weights_file
from .._engine.batches import run_in_batches
from .._engine.devices import Precision, find_device, limit_part
from .._engine.threads import Workers
from .._extraction.extractor import DeepFeatureExtractor
from .._extraction.readers import index_layers
from .._images.tables import find_records, tag_images
from .._layers.index import LayerIndex, LayerNotFoundError
from .._layers.trace import first_tensor
from .._parameters import check_device, check_parameter, check_parameters
from .cutting import find_cut
from .fitting import Best, Plan
from .freezing import Unfreeze, find_blocks, find_trained, freeze, leave_out_unfit
from .heads import Head
from .labels import (
    ClassWeight,
    LabelledImages,
    check_known,
    label_images,
    leave_out_weightless,
    set_aside,
    weigh,
)
from .networks import Network, build_network, rebuild_network
from .samples import Augment, ImageSamples, count_views, keep_activations
from .saving import (
    FORMAT,
    ORIGIN,
    from_json,
    read_network,
    to_cpu,
    to_json,
    to_plain,
    write_network,
)
from .training import Learner, OptimizerName, Recipe, Samples, ScheduleName, train


class FineTuneClassifier(ClassifierMixin, BaseEstimator):
    """Classify images with a pretrained network that is trained further, wholly or in part.

    The network gets a new head with one output a class. The head is trained, and of the rest what
    `unfreeze` names. All else is frozen: its weights get neither gradients nor weight decay, and
    its BatchNorm and Dropout stay in eval mode, so that every frozen weight and statistic is the
    same after `fit` as before.

    Parameters
    ----------
    backbone : str or torch.nn.Module, default="resnet50"
        One of `list_backbones()`, or a network of your own that puts out one vector of logits an
        image and needs `preprocessing`.
    weights : str, path, torchvision weights or None, default="DEFAULT"
        As for `DeepFeatureExtractor`; None trains from random weights.
    preprocessing : callable, default=None
        As for `DeepFeatureExtractor`.
    unfreeze : str, int, list of these or None, default="layer4"
        What is trained besides the head. A name of `list_layers(backbone)`, a place in that list,
        any module path, or "stage1", "stage2", ...: that block and all that follows. A list:
        exactly these blocks. "all": the whole network. None: the head alone.
    head : {"replace", "append"}, default="replace"
        "replace" puts a new layer in the place of the classification layer, also in auxiliary
        classifiers (GoogLeNet, Inception). "append" lets ReLU and a linear layer follow what the
        network put out: 1000 values an image for most weights.
    max_epochs : int, default=10
        Passes over the images.
    batch_size : int, default=32
        Images a step. Where memory runs out a batch is run in parts whose gradients add up; the
        step stays the same but for BatchNorm, which sees the parts.
    optimizer : {"adamw", "sgd"}, default="adamw"
        AdamW, or SGD with Nesterov momentum 0.9.
    learning_rate : float, default=1e-3
        Learning rate of the head.
    backbone_learning_rate : float, default=1e-4
        Learning rate of what is trained of the backbone.
    weight_decay : float, default=1e-4
        Weight decay of all that is trained.
    schedule : {"cosine", "one-cycle", "constant"}, default="cosine"
        How the learning rates change with the steps: they fall to zero; they rise during the
        warm-up, or the first 30 % of the steps, and fall; or they stay. `partial_fit` leaves them
        as they are.
    warmup_epochs : float, default=0
        Epochs in which the learning rates rise to their values, step by step; fewer than
        `max_epochs`.
    augment : {"flip", "crop"}, callable or None, default="flip"
        What happens to a training image before its preprocessing. "flip": every other one is
        mirrored, at random. "crop": a random part of 8 to 100 % of the area and ratio 3:4 to 4:3
        takes the place of the weights' resizing and cropping, or comes before `preprocessing` of
        your own, every other one mirrored. A callable gets an upright RGB PIL image and returns
        one; it is called for one image after the other in one thread, and may draw from torch's
        global generator, which is seeded.
    label_smoothing : float, default=0.0
        Probability in [0, 1) that is shared out among all classes (Szegedy et al., 2016).
    max_grad_norm : float, default=None
        Norm to which the gradients of a step are clipped; None for any.
    class_weight : dict, "balanced" or None, default=None
        Weights of the classes in the loss, as in scikit-learn. `fit` scales all weights to mean 1.
    early_stopping : bool, default=False
        Whether to stop when the validation score has not risen by `tol` for `n_iter_no_change`
        epochs, and to restore the best epoch's weights. The score is the accuracy on
        `X_val`, or on a stratified part of the training images that is set aside.
    validation_fraction : float, default=0.1
        Share of the training images to set aside, in (0, 1); used with `early_stopping` and
        without `X_val` only.
    n_iter_no_change : int, default=3
        Epochs without a better score after which training stops.
    tol : float, default=1e-4
        Rise of the score that counts.
    warm_start : bool, default=False
        Whether `fit` goes on from the network that an earlier `fit` left, with the same classes;
        `unfreeze` and the rest of the training may have been changed in between.
    resize : {"weights", "squash", "pad"}, default="weights"
        As for `DeepFeatureExtractor`.
    image_size : int, default=None
        As for `DeepFeatureExtractor`.
    image_shape : tuple of int, default=None
        As for `DeepFeatureExtractor`.
    device : str or torch.device, default="auto"
        "auto" takes CUDA, else MPS, else the CPU.
    precision : {"float32", "bfloat16", "float16"}, default="float32"
        Type in which the network computes (autocast). Weights stay float32; gradients of float16
        are scaled where needed.
    num_workers : int or "auto", default="auto"
        Threads that read and prepare images meanwhile; 0 for none.
    random_state : int, default=None
        Seed of the new head, the order, the augmentation, dropout and the split, and of random
        weights. With it two fits on one CPU are equal to the bit.
    verbose : int, default=0
        1 shows a progress bar with the loss and the remaining time.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The labels.
    module_ : torch.nn.Module
        The network, in eval mode.
    history_ : list of dict
        Of each epoch "epoch" (from 1), "train_loss" (with label smoothing, in train mode),
        "train_score" (accuracy), "validation_loss", "validation_score" (None without validation
        images), "learning_rate", "backbone_learning_rate" (at its beginning), "seconds" (with
        validation, and in the first epoch with what computing the frozen part took) and
        "images_per_second" (of training).
    n_iter_ : int
        Number of epochs.
    best_validation_score_ : float or None
        Highest validation score, of this `fit`; None without validation images.
    n_features_in_ : int
        Number of columns of X, where X was a table.
    feature_names_in_ : ndarray of str
        Names of the columns of X, where X was a table with names.

    See Also
    --------
    DeepFeatureExtractor : Features of a network that stays as it is, for any classifier.

    Notes
    -----
    X is what `DeepFeatureExtractor` takes.

    What the frozen beginning of the network gives for an image does not change from epoch to
    epoch. With `augment` None or "flip" it is computed once for each image, and its mirror image,
    if there are more epochs than these views. It is kept in memory up to 2 GiB (and as much for
    validation images), else in a temporary file, so that an epoch costs the trained part alone.

    A dropout between two layers acts where the layer after it is trained. A batch of one image, or
    a part of one, is normalised with BatchNorm's running statistics. An image whose
    `sample_weight` is 0 is left out.

    References
    ----------
    Yosinski et al. (2014), "How transferable are features in deep neural networks?"; Loshchilov
    and Hutter (2017), "SGDR: Stochastic Gradient Descent with Warm Restarts"; Smith and Topin
    (2019), "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates".

    Examples
    --------
    >>> from deepfeat import FineTuneClassifier
    >>> from sklearn.datasets import load_digits
    >>> images, labels = load_digits(n_class=2, return_X_y=True)
    >>> classifier = FineTuneClassifier(
    ...     "resnet10_slim", unfreeze="layer4", image_shape=(8, 8), image_size=32, max_epochs=5,
    ...     random_state=0,
    ... )
    >>> classifier.fit(images[:64] / 16, labels[:64]).predict_proba(images[:3] / 16).shape
    (3, 2)
    """

    def __init__(
        self,
        backbone: str | nn.Module = "resnet50",
        *,
        weights: Weights = "DEFAULT",
        preprocessing: Callable[[Image.Image], Tensor] | None = None,
        unfreeze: Unfreeze = "layer4",
        head: Head = "replace",
        max_epochs: int = 10,
        batch_size: int = 32,
        optimizer: OptimizerName = "adamw",
        learning_rate: float = 1e-3,
        backbone_learning_rate: float = 1e-4,
        weight_decay: float = 1e-4,
        schedule: ScheduleName = "cosine",
        warmup_epochs: float = 0,
        augment: Augment = "flip",
        label_smoothing: float = 0.0,
        max_grad_norm: float | None = None,
        class_weight: ClassWeight = None,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 3,
        tol: float = 1e-4,
        warm_start: bool = False,
        resize: Resize = "weights",
        image_size: int | None = None,
        image_shape: tuple[int, ...] | None = None,
        device: str | torch.device = "auto",
        precision: Precision = "float32",
        num_workers: Workers = "auto",
        random_state: int | None = None,
        verbose: int = 0,
    ):
        self.backbone = backbone
        self.weights = weights
        self.preprocessing = preprocessing
        self.unfreeze = unfreeze
        self.head = head
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.backbone_learning_rate = backbone_learning_rate
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.warmup_epochs = warmup_epochs
        self.augment = augment
        self.label_smoothing = label_smoothing
        self.max_grad_norm = max_grad_norm
        self.class_weight = class_weight
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
        self.warm_start = warm_start
        self.resize = resize
        self.image_size = image_size
        self.image_shape = image_shape
        self.device = device
        self.precision = precision
        self.num_workers = num_workers
        self.random_state = random_state
        self.verbose = verbose

    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        *,
        X_val: Any = None,
        y_val: Any = None,
    ) -> "FineTuneClassifier":
        """Train the network on images and their labels.

        Ctrl-C ends the training, with a warning, and keeps what was learned so far.

        Parameters
        ----------
        X : sequence or array of n images
            See the notes of `DeepFeatureExtractor`.
        y : array-like of shape (n,)
            Labels: strings, integers or booleans.
        sample_weight : array-like of shape (n,), optional
            Weights in the loss, not negative.
        X_val : sequence or array of m images, optional
            Images that are classified after each epoch, without learning from them.
        y_val : array-like of shape (m,), optional
            Their labels.

        Returns
        -------
        self : FineTuneClassifier
            The classifier itself.

        Raises
        ------
        ValueError
            If a parameter is out of its range; X, y and the weights do not go together; there are
            fewer than two classes, or too few images of a class to set some aside; an image
            cannot be read; or the loss becomes NaN or infinite.
        LayerNotFoundError
            If the backbone has no such block as `unfreeze` names.
        OSError
            If the weights cannot be downloaded.
        """
        self._check_parameters()
        if self.max_epochs <= self.warmup_epochs:
            raise ValueError(
                f"warmup_epochs={self.warmup_epochs}: less than max_epochs={self.max_epochs} is "
                "expected."
            )
        goes_on = self.warm_start and hasattr(self, "module_")
        with self._unchanged_on_error():
            images = self._label(X, y, sample_weight, reset=not goes_on)
            classes = self.classes_ if goes_on else np.unique(images.labels)
            check_known(images.labels, classes, "y")
            images = leave_out_weightless(images)
            seed = self._draw_seed(goes_on)
            validation = None
            if X_val is not None or y_val is not None:
                if X_val is None or y_val is None:
                    raise ValueError("X_val and y_val go together, and one of them is missing.")
                validation = self._label(X_val, y_val, None, reset=False, of="_val")
                check_known(validation.labels, classes, "y_val")
            elif self.early_stopping:
                images, validation = set_aside(images, self.validation_fraction, seed)
            images = weigh(images, classes, self.class_weight)
            # What is large in all of them is a matter of the learning rate.
            scaled = images.weights / images.weights.max()
            images = replace(images, weights=scaled / scaled.mean())
            return self._learn(images, validation, classes, seed, goes_on, self.max_epochs)

    def partial_fit(
        self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None
    ) -> "FineTuneClassifier":
        """Train for one epoch on these images, with constant learning rates.

        The optimizer goes on where the last call left it.

        Parameters
        ----------
        X : sequence or array of n images
            See the notes of `DeepFeatureExtractor`.
        y : array-like of shape (n,)
            Labels.
        classes : array-like, optional
            All labels that will come; needed in the first call.
        sample_weight : array-like of shape (n,), optional
            Weights in the loss, not negative.

        Returns
        -------
        self : FineTuneClassifier
            The classifier itself.

        Raises
        ------
        ValueError
            If `classes` is missing in the first call, or different in a later one; else as `fit`.
        """
        self._check_parameters()
        if isinstance(self.class_weight, str):
            raise ValueError(
                "class_weight='balanced' is not possible with partial_fit, which does not see all "
                "labels at once: use sklearn.utils.class_weight.compute_class_weight on all of "
                "them, and give the weights as a dict."
            )
        goes_on = hasattr(self, "module_")
        with self._unchanged_on_error():
            images = self._label(X, y, sample_weight, reset=not goes_on)
            if classes is None and not goes_on:
                raise ValueError("classes must be passed on the first call to partial_fit.")
            known = self.classes_ if goes_on else np.unique(column_or_1d(classes))
            if classes is not None and not np.array_equal(np.unique(classes), known):
                raise ValueError(f"classes={classes!r} are not those of the first call, {known!r}.")
            check_known(images.labels, known, "y")
            images = weigh(leave_out_weightless(images), known, self.class_weight)
            return self._learn(images, None, known, self._draw_seed(goes_on), goes_on, None)

    def predict(self, X: Any) -> NDArray[Any]:
        """Classify images.

        Parameters
        ----------
        X : sequence or array of n images
            See the notes of `DeepFeatureExtractor`.

        Returns
        -------
        labels : ndarray of shape (n,)
            The most probable of `classes_`.

        Raises
        ------
        ValueError
            If an image cannot be read.
        """
        chosen = self._compute_logits(X).argmax(axis=1)
        labels: NDArray[Any] = self.classes_[chosen]
        return labels

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Estimate the probability of each class.

        Parameters
        ----------
        X : sequence or array of n images
            See the notes of `DeepFeatureExtractor`.

        Returns
        -------
        probabilities : ndarray of shape (n, n_classes), float64
            In the order of `classes_`.

        Raises
        ------
        ValueError
            If an image cannot be read.
        """
        probabilities = torch.from_numpy(self._compute_logits(X)).softmax(1)
        return probabilities.numpy()

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Compute the logits.

        Parameters
        ----------
        X : sequence or array of n images
            See the notes of `DeepFeatureExtractor`.

        Returns
        -------
        logits : ndarray of shape (n, n_classes), or (n,) for two classes, float64
            In the order of `classes_`; for two classes how far the second one is ahead.

        Raises
        ------
        ValueError
            If an image cannot be read.
        """
        logits = self._compute_logits(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def to_extractor(self, layer: str | int | list[str | int]) -> DeepFeatureExtractor:
        """Make an extractor of features of the trained network, with the same preprocessing.

        It has a copy of the network, which further training leaves as it is. Its rows have the
        digest of the trained weights in their cache keys, and are kept in memory alone.

        Parameters
        ----------
        layer : str, int or list of these
            As for `DeepFeatureExtractor`.

        Returns
        -------
        extractor : DeepFeatureExtractor
            With the device, precision, batch size and workers of this classifier, and for the
            rest default parameters.
        """
        check_is_fitted(self, "module_")
        return DeepFeatureExtractor(
            copy.deepcopy(self.module_).cpu(),
            layer,
            preprocessing=self._preprocessing,
            image_shape=self.image_shape,
            batch_size=self.batch_size,
            device=self.device,
            precision=self.precision,
            num_workers=self.num_workers,
            verbose=self.verbose,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the classifier to a file in the safetensors format, without pickle.

        The weights are its tensors. Parameters, classes and history are JSON in its header.

        Parameters
        ----------
        path : str or path
            The file, replaced if it is there; safetensors files are named `.safetensors`.

        Raises
        ------
        ValueError
            If a parameter is code, which only a pickle can hold: a network, preprocessing or
            augmentation of your own.
        """
        check_is_fitted(self, "module_")
        params = {name: to_json(name, value) for name, value in self.get_params(False).items()}
        labels = [to_json("label", label) for label in self.classes_.tolist()]
        description = {
            "format": FORMAT,
            "params": params,
            "n_outputs": self._n_outputs,
            "seed": self._seed,
            "classes": [str(self.classes_.dtype), labels],
            "columns": [
                getattr(self, "n_features_in_", None),
                list(getattr(self, "feature_names_in_", [])),
            ],
            "history": self.history_,
            "best_validation_score": self.best_validation_score_,
        }
        write_network(path, self.module_.state_dict(), description)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FineTuneClassifier":
        """Read a classifier that `save` wrote. Neither downloads nor other files are needed.

        Parameters
        ----------
        path : str or path
            The file.

        Returns
        -------
        classifier : FineTuneClassifier
            As it was when it was saved, with its network on the CPU; an optimizer that
            `partial_fit` was to go on with starts anew.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is damaged, of a later release, or none that `save` wrote.
        """
        state, description = read_network(path)
        if description.get("format") != FORMAT:
            raise ValueError(
                f"{os.fspath(path)} has format {description.get('format')}, and this release "
                f"reads {FORMAT}: use the release of deepfeat that wrote it."
            )
        try:
            return cls(**from_json(description["params"]))._restore(state, description)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{os.fspath(path)} does not hold what its header says: {type(error).__name__}: "
                f"{error}"
            ) from error

    def _restore(
        self, state: dict[str, Tensor], description: dict[str, Any]
    ) -> "FineTuneClassifier":
        """Become the classifier that a file describes."""
        dtype, labels = description["classes"]
        classes = np.array(labels, dtype=dtype)
        backbone = self._find_backbone(with_file=False)
        network = rebuild_network(
            backbone,
            self.head,
            len(classes),
            description["n_outputs"],
            state,
            pretrained=self.weights is not None,
        )
        count, names = description["columns"]
        if count is not None:
            self.n_features_in_ = count
        if names:
            self.feature_names_in_ = np.array(names, dtype=object)
        seed, history = description["seed"], description["history"]
        best = description["best_validation_score"]
        return self._keep(network, backbone, classes, seed, history, best)

    def __sklearn_tags__(self) -> Tags:
        return tag_images(super().__sklearn_tags__(), self.image_shape)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__().copy()
        if "module_" in state:  # it shall open on machines without this device
            state["module_"] = copy.deepcopy(self.module_).cpu()
            state["_optimizer_state"] = to_cpu(self._optimizer_state)
        return state

    # Parameters and input -----------------------------------------------------------------------

    def _check_parameters(self) -> None:
        check_parameters(FineTuneClassifier, self.get_params(deep=False))
        check_device(self.device)
        if not callable(self.augment):
            check_parameter("augment", self.augment, Augment, "a callable")
        if not isinstance(self.class_weight, Mapping):
            check_parameter("class_weight", self.class_weight, ClassWeight, "a dict")
        if self.random_state is not None and self.random_state >= 2**32:
            raise ValueError(f"random_state must be less than 2**32; got {self.random_state}.")

    def _find_backbone(self, *, with_file: bool = True, resize: Resize | None = None) -> Backbone:
        """Find the backbone; without a weights file, its structure and preprocessing."""
        return find_backbone(
            self.backbone,
            self.weights if with_file or not is_weights_file(self.weights) else None,
            preprocessing=self.preprocessing,
            resize=resize or self.resize,
            image_size=self.image_size,
            seed=self.random_state or 0,
        )

    def _find_blocks(self, backbone: Backbone) -> tuple[str, ...]:
        try:
            return find_blocks(index_layers(backbone), backbone.skeleton, self.unfreeze)
        except (LayerNotFoundError, TypeError) as error:
            kind = LayerNotFoundError if isinstance(error, LayerNotFoundError) else ValueError
            raise kind(
                f"unfreeze={self.unfreeze!r} is neither 'all' nor None, and names no block: {error}"
            ) from error

    def _draw_seed(self, goes_on: bool) -> int:
        if self.random_state is not None:
            return int(self.random_state)
        if goes_on:  # else images that were learned from might be set aside
            return self._seed
        return int(np.random.SeedSequence().generate_state(1)[0])

    def _label(
        self, X: Any, y: Any, sample_weight: Any, *, reset: bool, of: str = ""
    ) -> LabelledImages:
        """Take X and y apart, or X_val and y_val (`of` "_val"), and check them."""
        if y is None:
            raise ValueError(
                f"{type(self).__name__} requires y to be passed, but the target y is None."
            )
        try:
            records = find_records(self, X, self.image_shape, reset=reset, of=f"X{of}")
            return label_images(records, y, sample_weight, name=f"y{of}")
        except ValueError as error:
            if not of:
                raise
            raise ValueError(f"X{of} and y{of}: {error}") from error

    @contextmanager
    def _unchanged_on_error(self) -> Iterator[None]:
        """Forget the columns of X where training fails; see to gradients, which may be off."""
        names = ("n_features_in_", "feature_names_in_")
        before = {name: self.__dict__[name] for name in names if name in self.__dict__}
        try:
            with torch.inference_mode(False), torch.enable_grad():
                yield
        except BaseException:
            for name in names:
                self.__dict__.pop(name, None)
            self.__dict__.update(before)
            raise

    # Training -----------------------------------------------------------------------------------

    def _learn(
        self,
        images: LabelledImages,
        validation: LabelledImages | None,
        classes: NDArray[Any],
        seed: int,
        goes_on: bool,
        epochs: int | None,
    ) -> "FineTuneClassifier":
        """Train, and keep what was learned; for one epoch where no number of them is given."""
        device = find_device(self.device)
        backbone = self._find_backbone(with_file=not goes_on)
        blocks = self._find_blocks(backbone)
        if goes_on:
            self._check_origin()
            # A copy: what is there stays as it is if this fails.
            network = Network(copy.deepcopy(self.module_), self._head, self._n_outputs)
        else:
            network = build_network(backbone, self.head, len(classes), device, seed)
        plan = self._plan(network, backbone, blocks, classes, device, seed, epochs)
        history = list(self.history_) if goes_on else []
        state = self._optimizer_state if goes_on and epochs is None else None
        # torch's global generators stay as they were.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            best, state = self._run_epochs(plan, images, validation, history, state)
        state = state if epochs is None else None
        return self._keep(network, backbone, classes, seed, history, best, state)

    def _check_origin(self) -> None:
        """Raise if the network in training comes from something else than the parameters say."""
        for name, value in self._origin.items():
            now = to_plain(getattr(self, name))
            if now is not value and now != value:
                raise ValueError(
                    f"{name} was {value!r} when the training began, and is {now!r} now: set it "
                    "back, or begin anew with a clone."
                )

    def _plan(
        self,
        network: Network,
        backbone: Backbone,
        blocks: tuple[str, ...],
        classes: NDArray[Any],
        device: torch.device,
        seed: int,
        epochs: int | None,
    ) -> "Plan":
        """Freeze the network, and find out how it is trained."""
        module, shape = network.module.to(device), backbone.preprocessing.input_shape
        index = LayerIndex(module, shape)
        trained = find_trained(module, index, blocks, network.head)
        trained = leave_out_unfit(module, trained, shape)
        freeze(module, trained)
        # Nothing is kept in a single epoch, and only a CPU runs the two parts apart for speed.
        is_cut = epochs is not None or device.type == "cpu"
        recipe = Recipe(
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            backbone_learning_rate=self.backbone_learning_rate,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            warmup_epochs=self.warmup_epochs,
            label_smoothing=self.label_smoothing,
            max_grad_norm=self.max_grad_norm,
            batch_size=self.batch_size,
            precision=self.precision,
            device=device,
            seed=seed,
        )
        return Plan(
            module=module,
            trained=trained,
            cut=find_cut(module, index, trained, shape) if is_cut else None,
            preprocessing=backbone.preprocessing,
            classes=classes,
            recipe=recipe,
            epochs=epochs,
        )

    def _run_epochs(
        self,
        plan: "Plan",
        images: LabelledImages,
        validation: LabelledImages | None,
        history: list[dict[str, Any]],
        optimizer_state: Any = None,
    ) -> tuple[float | None, Any]:
        """Train as long as it pays off, and add to the history.

        Return the best validation score and the state of the optimizer.
        """
        begin = time.perf_counter()
        samples = self._make_samples(plan, images, self.augment)
        checks = None if validation is None else self._make_samples(plan, validation, None)
        preparing = time.perf_counter() - begin
        batches = math.ceil(len(images.records) / self.batch_size)
        learner = Learner(plan.module, plan.trained, plan.recipe, batches, plan.epochs)
        if optimizer_state is not None:
            learner.load_state_dict(optimizer_state)
        best = Best(plan.module, plan.trained)
        epochs = plan.epochs or 1
        with tqdm(total=batches * epochs, unit="batch", disable=not self.verbose) as bar:

            def report(loss: float) -> None:
                bar.set_postfix(epoch=len(history) + 1, loss=f"{loss:.3f}", refresh=False)
                bar.update()

            training = train(learner, samples, checks, start=len(history) + 1, report=report)
            try:
                for epoch in itertools.islice(training, epochs):
                    history.append(asdict(replace(epoch, seconds=epoch.seconds + preparing)))
                    preparing = 0.0
                    if epoch.validation_score is not None:
                        best.note(epoch.validation_score, self.tol, keep=self.early_stopping)
                    if self.early_stopping and best.stale >= self.n_iter_no_change:
                        break
            except KeyboardInterrupt:
                warnings.warn(
                    f"training was interrupted in epoch {len(history) + 1}; what was learned so "
                    "far is kept.",
                    UserWarning,
                    stacklevel=3,
                )
        best.restore()
        plan.module.zero_grad()  # gradients are as large as what was trained
        return best.score, learner.state_dict()

    def _make_samples(self, plan: "Plan", images: LabelledImages, augment: Augment) -> Samples:
        """Say where the training gets its images from, or the activations kept of them."""
        recipe = plan.recipe
        drawn = ImageSamples(
            images.records,
            plan.preprocessing,
            self._find_squash(plan.preprocessing) if augment == "crop" else None,
            augment,
            recipe.device,
            self.num_workers,
            recipe.seed,
        )
        targets = torch.from_numpy(np.searchsorted(plan.classes, images.labels))
        weights = torch.from_numpy(images.weights.astype(np.float32))
        shape = plan.preprocessing.input_shape
        forward: Callable[[Tensor], Any] = plan.module
        if plan.cut is not None and recipe.device.type == "cpu":
            part = limit_part(self.batch_size, shape, recipe.device)
            forward = functools.partial(plan.cut.run, part=part)
        samples = Samples(targets.to(recipe.device), weights.to(recipe.device), drawn.draw, forward)
        views = count_views(augment)
        pays = plan.epochs is not None and views is not None and plan.epochs > views
        if plan.cut is None or views is None or not pays:
            return samples
        total = views * len(images.records)
        with tqdm(total=total, desc="frozen part", unit="image", disable=not self.verbose) as bar:
            kept = keep_activations(
                drawn,
                plan.module,
                plan.cut,
                views=views,
                precision=self.precision,
                batch_size=self.batch_size,
                report=bar.update,
            )
        if kept is None:
            return samples
        return replace(samples, draw=kept.draw, forward=plan.cut.run_suffix)

    def _find_squash(self, preprocessing: Preprocessing) -> Callable[[Image.Image], Tensor]:
        """Return a preparation of images that crops nothing off, for what is cropped already."""
        if self.preprocessing is not None:
            return preprocessing.prepare
        return self._find_backbone(with_file=False, resize="squash").preprocessing.prepare

    def _keep(
        self,
        network: Network,
        backbone: Backbone,
        classes: NDArray[Any],
        seed: int,
        history: list[dict[str, Any]],
        best: float | None,
        optimizer_state: Any = None,
    ) -> "FineTuneClassifier":
        """Keep what was learned, all at once."""
        self.module_ = network.module.eval()
        self.classes_ = classes
        self.history_ = history
        self.n_iter_ = len(history)
        self.best_validation_score_ = best
        self._name = backbone.name
        self._head = network.head
        self._n_outputs = network.n_outputs
        self._preprocessing = backbone.preprocessing
        self._origin = {name: to_plain(getattr(self, name)) for name in ORIGIN}
        self._seed = seed
        self._optimizer_state = optimizer_state
        return self

    def _compute_logits(self, X: Any) -> NDArray[np.float64]:
        """Run the network over images, in eval mode."""
        check_is_fitted(self, "module_")
        names = ("batch_size", "num_workers", "precision")
        check_parameters(FineTuneClassifier, {name: getattr(self, name) for name in names})
        records = find_records(self, X, self.image_shape, reset=False)
        device = find_device(self.device)
        module, steps = self.module_.to(device), self._preprocessing
        logits = np.empty((len(records), len(self.classes_)))
        with tqdm(
            total=len(records), desc=self._name, unit="image", disable=not self.verbose
        ) as bar:
            for batch in run_in_batches(
                module,
                lambda images: {"logits": first_tensor(module(steps.normalize(images))).float()},
                records,
                lambda record: steps.prepare(record.open()),
                device=device,
                precision=self.precision,
                batch_size=self.batch_size,
                num_workers=self.num_workers,
            ):
                for record, error in batch.failures:
                    raise record.error(error)
                logits[[record.index for record in batch.samples]] = batch.rows["logits"]
                bar.update(len(batch.samples))
        return logits
