"""`FineTuneClassifier`: a pretrained network fine-tuned as a scikit-learn classifier."""

import copy
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import NDArray
from PIL import Image
from sklearn.base import ClassifierMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, column_or_1d
from torch import Tensor, nn

from .._backbones.find import Backbone, find_backbone
from .._backbones.fingerprint import UnknownContentError
from .._backbones.preprocessing import Resize
from .._backbones.state_files import Weights, is_weights_file
from .._engine.batches import run_in_batches
from .._engine.devices import Precision, find_device
from .._engine.threads import Workers
from .._extraction.extractor import DeepFeatureExtractor
from .._extraction.readers import (
    EngineName,
    check_engine,
    find_engine,
    index_layers,
    make_logit_reader,
)
from .._images.records import Record
from .._images.tables import find_records, tag_images
from .._layers.index import LayerNotFoundError
from .._parameters import check_device, check_parameter, check_parameters
from .._progress import tqdm
from .._representation import Representation
from .augmentation import Augment, count_views
from .callbacks import CallbackSupport, Tasks, with_callbacks
from .checkpoints import Checkpoint, make_key
from .fitting import FitResult, plan_training, run_training
from .freezing import Unfreeze, find_blocks
from .heads import Head
from .labels import (
    ClassWeight,
    Dataset,
    apply_class_weight,
    check_known,
    drop_zero_weight,
    find_classes,
    hold_out,
    label_images,
)
from .networks import Network, build_network, rebuild_network
from .objectives import MultiLabel, Objective, make_objective
from .saving import (
    Fitted,
    SavedClassifier,
    blame_file,
    load_classifier,
    save_classifier,
    to_cpu,
    to_plain,
)
from .scoring import Scoring, make_score
from .training import OptimizerName, ScheduleName, Score, TrainingConfig


class FineTuneClassifier(ClassifierMixin, CallbackSupport, Representation):
    """Fine-tune a pretrained network, in full or in part, to classify images.

    The network gets a new head with one output per class. The head is trained, together with the
    blocks that `unfreeze` names. Everything else is frozen: its weights receive neither gradients
    nor weight decay, and its BatchNorm and Dropout stay in eval mode, so that every frozen weight
    and statistic is the same after `fit` as before.

    Parameters
    ----------
    backbone : str or torch.nn.Module, default="resnet50"
        One of `list_backbones()`, or a network of your own that returns one vector of logits per
        image and requires `preprocessing`.
    weights : str, path, torchvision weights or None, default="DEFAULT"
        As for `DeepFeatureExtractor`; None starts from random weights.
    preprocessing : callable, default=None
        As for `DeepFeatureExtractor`.
    unfreeze : str, int, list of these or None, default="last_stage"
        The blocks to train in addition to the head. "last_stage": the last of "stage1", "stage2",
        ... and all that follows (`layer4` of ResNets, the last block of most transformers). A name
        in `list_layers(backbone)`, an index into that list, any module path, or "stage1", "stage2",
        ...: that block and all that follow. A list: exactly these blocks. "all": the whole network.
        None: only the head.
    head : {"replace", "append"}, default="replace"
        "replace" replaces the classification layer, also that of auxiliary classifiers (GoogLeNet,
        Inception). "append" adds ReLU and a linear layer after the output of the network: 1000
        values per image for most weights.
    max_epochs : int, default=20
        Number of passes over the images.
    head_epochs : int or "auto", default="auto"
        Number of passes before these in which only the head is trained, so that it does not begin
        by spoiling the backbone (LP-FT, Kumar et al., 2022). They have a schedule of their own,
        without warm-up and early stopping. "auto": as many as `max_epochs` if `augment` is None or
        "flip", with which they cost little, or else 0.
    batch_size : int, default=32
        Number of images per step. If memory runs out, a batch is run in parts whose gradients add
        up; the step stays the same, except that BatchNorm sees the parts.
    optimizer : {"adamw", "sgd"}, default="adamw"
        AdamW, or SGD with Nesterov momentum 0.9.
    learning_rate : float, default=1e-3
        Learning rate of the head.
    backbone_learning_rate : float, default=3e-4
        Learning rate of the trained part of the backbone.
    weight_decay : float, default=1e-4
        Weight decay of all trained parameters.
    schedule : {"cosine", "one-cycle", "constant"}, default="cosine"
        How the learning rates change from step to step: they fall to zero; they rise during the
        warm-up, or the first 30 % of the steps, and then fall; or they stay constant, as they
        always do in `partial_fit`.
    warmup_epochs : float, default=0
        Number of epochs during which the learning rates rise to their values, step by step; less
        than `max_epochs`.
    augment : {"flip", "crop"}, callable or None, default="flip"
        What is done to a training image before its preprocessing. "flip": a random half of the
        images is mirrored. "crop": a random crop of 8 to 100 % of the area, with an aspect ratio
        from 3:4 to 4:3, replaces the resizing and cropping of the weights, or precedes your own
        `preprocessing`; a random half of the images is mirrored. A callable takes an upright RGB
        PIL image and returns one; it is called in a single thread, image by image, and may draw
        from torch's global generator, which is seeded.
    cutmix : float, default=0.0
        If positive, a rectangle of each training image is replaced by that of another one of its
        batch, whose label then counts in proportion (CutMix, Yun et al., 2019). Its share of the
        area is drawn from the beta distribution with both parameters of this value, uniformly for
        1. The frozen part is run anew in each epoch, except in those of the head, which do without.
        `partial_fit` mixes images, too.
    label_smoothing : float, default=0.0
        Probability in [0, 1) that is spread evenly over all classes (Szegedy et al., 2016), or,
        with several labels per image, over 0 and 1.
    max_grad_norm : float, default=None
        Norm to which the gradients of a step are clipped; None does not clip them.
    class_weight : dict, "balanced" or None, default=None
        Class weights in the loss, as in scikit-learn. `fit` scales all weights to mean 1. With
        several labels per image, each label is a separate problem with the classes 0 and 1.
    early_stopping : bool, default=False
        Whether to stop when the validation score has not improved by `tol` for `n_iter_no_change`
        epochs, and to restore the weights of the best epoch. The score is that on `X_val`, or on a
        part of the training images that is held out, stratified by class.
    scoring : str, callable or None, default=None
        How validation images are scored. None: by accuracy. "loss": by the loss, of which less is
        better. Otherwise a name of scikit-learn's scorers, such as "balanced_accuracy" or
        "roc_auc_ovr", or a callable of a classifier, what the network gives for the images, and
        their labels.
    validation_fraction : float, default=0.1
        Fraction of the training images to hold out, in (0, 1). Only used with `early_stopping`
        and without `X_val`.
    n_iter_no_change : int, default=3
        Number of epochs without improvement after which training stops.
    tol : float, default=1e-4
        Smallest rise of the score that counts as an improvement.
    checkpoint : str or path, default=None
        Folder in which `fit` keeps, after each epoch, how far it has come. An interrupted `fit`
        with the same data and parameters goes on from there, and on the same CPU gives the same
        result, to the bit, as one without interruption; a complete one is not repeated. Each has
        its own file, named by a digest, so that the fits of a grid search can share a folder.
    warm_start : bool, default=False
        Whether `fit` resumes with the network of the previous call, for the same classes.
        `unfreeze` and all other parameters of the training may change in between.
    resize : {"weights", "squash", "pad"}, default="weights"
        As for `DeepFeatureExtractor`.
    image_size : int, default=None
        As for `DeepFeatureExtractor`.
    image_shape : tuple of int, default=None
        As for `DeepFeatureExtractor`.
    device : str or torch.device, default="auto"
        "auto" uses CUDA if available, else MPS, else the CPU.
    precision : {"float32", "bfloat16", "float16"}, default="float32"
        Data type in which the network computes (autocast). Weights stay float32; float16 gradients
        are scaled as needed.
    engine : {"torch", "openvino"}, default="torch"
        What runs the network in `predict`, as for `DeepFeatureExtractor`; it is trained by torch.
    num_workers : int or "auto", default="auto"
        Number of threads that read and prepare images in the background; 0 for none.
    random_state : int, RandomState or None, default=None
        Seed for the new head, the order of images, augmentation, dropout, the hold-out split and
        random weights. With a seed, two fits on the same CPU are identical to the bit. A
        RandomState gives each fit another seed; random weights are then those of seed 0, as without
        a seed, and `save` leaves it out.
    verbose : int, default=0
        1 shows a progress bar with the loss and the remaining time.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,) or (n_labels,)
        The class labels; of several labels per image, their indices.
    module_ : torch.nn.Module
        The network, in eval mode.
    history_ : list of dict
        One entry per epoch, with "epoch" (from 1), "train_loss" (with label smoothing, in train
        mode), "train_score" (accuracy; with several labels per image, the share of images whose
        labels are all correct), "validation_loss", "validation_score" (None without validation
        images), "learning_rate", "backbone_learning_rate" (at the start of the epoch), "seconds"
        (including validation and, in the first epoch, computing the frozen part) and
        "images_per_second" (of training).
    n_iter_ : int
        Number of epochs.
    best_validation_score_ : float or None
        Best validation score of the last `fit`, of the epochs after those of the head alone; None
        without validation images.
    n_features_in_ : int
        Number of columns of X, if X was a table.
    feature_names_in_ : ndarray of str
        Names of the columns of X, if X was a table with column names.

    See Also
    --------
    DeepFeatureExtractor : Features of a network that is not trained, for any classifier.

    Notes
    -----
    X is any input that `DeepFeatureExtractor` accepts.

    The output of the frozen beginning of the network for an image is the same in every epoch. With
    `augment` None or "flip" it is computed once per image, and once per mirror image, if there are
    more epochs than these views. It is cached in memory up to 2 GiB (and as much for validation
    images), or else in a temporary file, or next to the checkpoint, so that an epoch only runs the
    trained part.

    A dropout between two layers is active if the layer after it is trained. A batch of a single
    image, or a part of one, is normalised with the running statistics of BatchNorm. Images whose
    `sample_weight` is 0 are dropped.

    References
    ----------
    Yosinski et al. (2014), "How transferable are features in deep neural networks?"; Loshchilov
    and Hutter (2017), "SGDR: Stochastic Gradient Descent with Warm Restarts"; Smith and Topin
    (2019), "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates";
    Yun et al. (2019), "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable
    Features"; Kumar et al. (2022), "Fine-Tuning can Distort Pretrained Features and Underperform
    Out-of-Distribution".

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

    __module__ = "deepfeat"  # so that pickles outlive moves

    def __init__(
        self,
        backbone: str | nn.Module = "resnet50",
        *,
        weights: Weights = "DEFAULT",
        preprocessing: Callable[[Image.Image], Tensor] | None = None,
        unfreeze: Unfreeze = "last_stage",
        head: Head = "replace",
        max_epochs: int = 20,
        head_epochs: int | Literal["auto"] = "auto",
        batch_size: int = 32,
        optimizer: OptimizerName = "adamw",
        learning_rate: float = 1e-3,
        backbone_learning_rate: float = 3e-4,
        weight_decay: float = 1e-4,
        schedule: ScheduleName = "cosine",
        warmup_epochs: float = 0,
        augment: Augment = "flip",
        cutmix: float = 0.0,
        label_smoothing: float = 0.0,
        max_grad_norm: float | None = None,
        class_weight: ClassWeight = None,
        early_stopping: bool = False,
        scoring: Scoring = None,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 3,
        tol: float = 1e-4,
        checkpoint: str | os.PathLike[str] | None = None,
        warm_start: bool = False,
        resize: Resize = "weights",
        image_size: int | None = None,
        image_shape: tuple[int, ...] | None = None,
        device: str | torch.device = "auto",
        precision: Precision = "float32",
        engine: EngineName = "torch",
        num_workers: Workers = "auto",
        random_state: int | RandomState | None = None,
        verbose: int = 0,
    ):
        self.backbone = backbone
        self.weights = weights
        self.preprocessing = preprocessing
        self.unfreeze = unfreeze
        self.head = head
        self.max_epochs = max_epochs
        self.head_epochs = head_epochs
        self.batch_size = batch_size
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.backbone_learning_rate = backbone_learning_rate
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.warmup_epochs = warmup_epochs
        self.augment = augment
        self.cutmix = cutmix
        self.label_smoothing = label_smoothing
        self.max_grad_norm = max_grad_norm
        self.class_weight = class_weight
        self.early_stopping = early_stopping
        self.scoring = scoring
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
        self.checkpoint = checkpoint
        self.warm_start = warm_start
        self.resize = resize
        self.image_size = image_size
        self.image_shape = image_shape
        self.device = device
        self.precision = precision
        self.engine = engine
        self.num_workers = num_workers
        self.random_state = random_state
        self.verbose = verbose

    @with_callbacks
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

        Ctrl-C ends the training with a warning, and keeps what has been learned so far.

        Parameters
        ----------
        X : sequence or array of n images
            See the notes of `DeepFeatureExtractor`.
        y : array-like of shape (n,) or (n, n_labels)
            Classes: strings, integers or booleans. Or any number of labels per image, as
            `MultiLabelBinarizer` of scikit-learn encodes them: 0 and 1, in a column per label;
            also a sparse matrix.
        sample_weight : array-like of shape (n,), optional
            Non-negative weights in the loss.
        X_val : sequence or array of m images, optional
            Validation images, which are classified after each epoch.
        y_val : array-like of shape (m,) or (m, n_labels), optional
            Labels of the validation images.

        Returns
        -------
        self : FineTuneClassifier
            The classifier itself.

        Raises
        ------
        ValueError
            If a parameter is out of range; X, y and the weights do not match; there are fewer than
            two classes, or too few images of a class to hold some out; an image cannot be read; or
            the loss becomes NaN or infinite.
        LayerNotFoundError
            If the backbone does not have a block that `unfreeze` names.
        OSError
            If the weights cannot be downloaded, or the checkpoint cannot be written. (Later than
            before the first epoch, that is a warning.)
        """
        self._check_parameters()
        if self.max_epochs <= self.warmup_epochs:
            raise ValueError(
                f"warmup_epochs must be less than max_epochs={self.max_epochs}; got "
                f"{self.warmup_epochs}."
            )
        resume = self.warm_start and hasattr(self, "module_")
        with self._unchanged_on_error():
            dataset = self._label(X, y, sample_weight, reset=not resume)
            multilabel = self._multilabel if resume else dataset.is_multilabel
            classes = self.classes_ if resume else find_classes(dataset)
            check_known(dataset, classes, "y", multilabel=multilabel)
            dataset = drop_zero_weight(dataset)
            seed = self._draw_seed(resume)
            validation = None
            if X_val is not None or y_val is not None:
                if X_val is None or y_val is None:
                    given = "X_val" if y_val is None else "y_val"
                    raise ValueError(f"X_val and y_val must be passed together; got only {given}.")
                validation = self._label(X_val, y_val, None, reset=False, suffix="_val")
                check_known(validation, classes, "y_val", multilabel=multilabel)
            checkpoint = None
            if self.checkpoint is not None:
                checkpoint = self._open_checkpoint(dataset, validation, seed, resume)
                seed = checkpoint.seed
            if validation is None and self.early_stopping:
                dataset, validation = hold_out(dataset, self.validation_fraction, seed)
            dataset = apply_class_weight(dataset, classes, self.class_weight)
            # A scale common to all weights is up to the learning rate.
            scaled = dataset.weights / dataset.weights.max()
            dataset = replace(dataset, weights=scaled / scaled.mean())
            metadata = {} if sample_weight is None else {"sample_weight": sample_weight}
            data = {"X": X, "y": y, "metadata": metadata}
            return self._train(
                dataset,
                validation,
                make_objective(classes, multilabel=multilabel),
                seed,
                resume=resume,
                epochs=int(self.max_epochs),
                data=data,
                checkpoint=checkpoint,
            )

    def partial_fit(
        self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None
    ) -> "FineTuneClassifier":
        """Train for one epoch on these images, at constant learning rates.

        The optimizer resumes where the last call left off.

        Parameters
        ----------
        X : sequence or array of n images
            See the notes of `DeepFeatureExtractor`.
        y : array-like of shape (n,) or (n, n_labels)
            Labels, as in `fit`.
        classes : array-like, optional
            All classes that any call will pass, or the indices of the labels, `range(n_labels)`;
            required in the first call.
        sample_weight : array-like of shape (n,), optional
            Non-negative weights in the loss.

        Returns
        -------
        self : FineTuneClassifier
            The classifier itself.

        Raises
        ------
        ValueError
            If `classes` is missing in the first call or differs in a later one; otherwise as for
            `fit`.
        """
        self._check_parameters()
        if isinstance(self.class_weight, str):
            raise ValueError(
                "class_weight='balanced' is not supported by partial_fit, which does not see all "
                "labels at once. Compute the weights from all of them with "
                "sklearn.utils.class_weight.compute_class_weight and pass them as a dict."
            )
        resume = hasattr(self, "module_")
        with self._unchanged_on_error():
            dataset = self._label(X, y, sample_weight, reset=not resume)
            if classes is None and not resume:
                raise ValueError("classes must be passed on the first call to partial_fit.")
            multilabel = self._multilabel if resume else dataset.is_multilabel
            known = self.classes_ if resume else np.unique(column_or_1d(classes))
            if classes is not None and not np.array_equal(np.unique(classes), known):
                raise ValueError(
                    f"classes must be the same as in the first call, {known!r}; got {classes!r}."
                )
            if multilabel and not np.array_equal(known, find_classes(dataset)) and not resume:
                raise ValueError(
                    "classes must be the indices of the labels, "
                    f"range({dataset.labels.shape[1]}); got {classes!r}."
                )
            check_known(dataset, known, "y", multilabel=multilabel)
            dataset = apply_class_weight(drop_zero_weight(dataset), known, self.class_weight)
            objective = make_objective(known, multilabel=multilabel)
            seed = self._draw_seed(resume)
            return self._train(dataset, None, objective, seed, resume=resume, epochs=None)

    def predict(self, X: Any) -> NDArray[Any]:
        """Classify images.

        Parameters
        ----------
        X : sequence or array of n images
            See the notes of `DeepFeatureExtractor`.

        Returns
        -------
        labels : ndarray of shape (n,) or (n, n_labels)
            The most probable class of each image; or 1 for each label with a probability of more
            than one half, and 0 for the others.

        Raises
        ------
        ValueError
            If an image cannot be read.
        """
        logits = self._compute_logits(X)
        return self._objective.predict(logits)

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Estimate the probability of each class or label.

        Parameters
        ----------
        X : sequence or array of n images
            See the notes of `DeepFeatureExtractor`.

        Returns
        -------
        probabilities : ndarray of shape (n, n_classes) or (n, n_labels), float64
            In the order of `classes_`. Those of classes add up to 1.

        Raises
        ------
        ValueError
            If an image cannot be read.
        """
        logits = self._compute_logits(X)
        return self._objective.predict_proba(logits)

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Compute the logits.

        Parameters
        ----------
        X : sequence or array of n images
            See the notes of `DeepFeatureExtractor`.

        Returns
        -------
        logits : ndarray of shape (n, n_classes) or (n, n_labels), or (n,) for two classes, float64
            In the order of `classes_`; for two classes, the logit of the second minus that of the
            first.

        Raises
        ------
        ValueError
            If an image cannot be read.
        """
        logits = self._compute_logits(X)
        return self._objective.decision_function(logits)

    def to_extractor(
        self, layer: str | int | list[str | int] = "penultimate"
    ) -> DeepFeatureExtractor:
        """Return a feature extractor with the trained network and the same preprocessing.

        It holds a copy of the network, which further training does not change. The cache keys of
        its rows include a digest of the trained weights; the rows are cached in memory only.

        Parameters
        ----------
        layer : str, int or list of these, default="penultimate"
            As for `DeepFeatureExtractor`.

        Returns
        -------
        extractor : DeepFeatureExtractor
            With the engine, device, precision, batch size and workers of this classifier, and
            defaults for all other parameters.
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
            engine=self.engine,
            num_workers=self.num_workers,
            verbose=self.verbose,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the classifier to a file in the safetensors format, without pickle.

        The file holds the weights as tensors, and parameters, classes and history as JSON in its
        header, with a digest of all that, by which `load` finds damage.

        Parameters
        ----------
        path : str or path
            The file, by convention with the suffix `.safetensors`. An existing file is replaced.

        Raises
        ------
        ValueError
            If a parameter is code, which only a pickle can hold: your own network, preprocessing
            or augmentation; or if one has changed that says which network it is.
        FileNotFoundError
            If the folder of the file does not exist.
        OSError
            If the file cannot be written.
        """
        check_is_fitted(self, "module_")
        self._check_origin()
        saved = SavedClassifier(
            params=self.get_params(deep=False),
            state=self.module_.state_dict(),
            n_outputs=self._n_outputs,
            seed=self._seed,
            classes=self.classes_,
            multilabel=self._multilabel,
            n_features_in=getattr(self, "n_features_in_", None),
            feature_names_in=list(getattr(self, "feature_names_in_", [])),
            history=self.history_,
            best_validation_score=self.best_validation_score_,
        )
        save_classifier(path, saved)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FineTuneClassifier":
        """Load a classifier from a file that `save` wrote, without any download or other file.

        Parameters
        ----------
        path : str or path
            The file.

        Returns
        -------
        classifier : FineTuneClassifier
            The classifier as it was saved, with its network on the CPU. The state of the optimizer
            is not saved: `partial_fit` starts with a fresh one.

        Raises
        ------
        FileNotFoundError
            If the file does not exist.
        ValueError
            If it is damaged, was written by a later release, or not by `save`.
        """
        saved = load_classifier(path)
        with blame_file(path):
            return cls(**saved.params)._restore(saved)

    def _restore(self, saved: SavedClassifier) -> "FineTuneClassifier":
        """Become the classifier that a file describes."""
        backbone = self._find_backbone(with_file=False)
        network = rebuild_network(
            backbone,
            self.head,
            len(saved.classes),
            saved.n_outputs,
            saved.state,
            pretrained=self.weights is not None,
        )
        if saved.n_features_in is not None:
            self.n_features_in_ = saved.n_features_in
        if saved.feature_names_in:
            self.feature_names_in_ = np.array(saved.feature_names_in, dtype=object)
        result = FitResult(saved.history, saved.best_validation_score, None, interrupted=False)
        objective = make_objective(saved.classes, multilabel=saved.multilabel)
        return self._keep(network, backbone, objective, saved.seed, result)

    def __sklearn_tags__(self) -> Tags:
        tags = tag_images(super().__sklearn_tags__(), self.image_shape)
        tags.classifier_tags.multi_label = True
        return tags

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__().copy()
        if "module_" in state:  # so that it can be unpickled on machines without this device
            fitted = {name: state.pop(name) for name in _FITTED if name in state}
            fitted["module_"] = copy.deepcopy(self.module_).cpu()
            fitted["_optimizer_state"] = to_cpu(fitted.get("_optimizer_state"))
            state["_fitted"] = Fitted(attributes=fitted, save=self.save)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        fitted = state.get("_fitted", Fitted())
        super().__setstate__({name: state[name] for name in state.keys() - {"_fitted"}})
        if fitted.content:  # of skops
            self._restore(fitted.load())
        else:
            self.__dict__.update(fitted.attributes)

    # Parameters and input -----------------------------------------------------------------------

    def _check_parameters(self) -> None:
        check_parameters(FineTuneClassifier, self.get_params(deep=False))
        check_device(self.device)
        check_engine(self.engine, self.device, self.precision)  # before it is trained
        if not callable(self.augment):
            check_parameter("augment", self.augment, Augment, "a callable")
        if not isinstance(self.checkpoint, (str, os.PathLike)):
            check_parameter("checkpoint", self.checkpoint, type(None), "the path of a folder")
        if not isinstance(self.class_weight, Mapping):
            check_parameter("class_weight", self.class_weight, ClassWeight, "a dict")
        if not isinstance(self.random_state, RandomState):
            check_parameter("random_state", self.random_state, int | None, "a RandomState")
            if self.random_state is not None and self.random_state >= 2**32:
                raise ValueError(f"random_state must be less than 2**32; got {self.random_state}.")

    def _find_backbone(self, *, with_file: bool = True) -> Backbone:
        """Find the backbone; without its weights file, only its structure and preprocessing."""
        return find_backbone(
            self.backbone,
            self.weights if with_file or not is_weights_file(self.weights) else None,
            preprocessing=self.preprocessing,
            resize=self.resize,
            image_size=self.image_size,
            seed=0 if isinstance(self.random_state, RandomState) else self.random_state or 0,
        )

    def _find_blocks(self, backbone: Backbone) -> tuple[str, ...]:
        try:
            return find_blocks(index_layers(backbone), backbone.skeleton, self.unfreeze)
        except (LayerNotFoundError, TypeError) as error:
            kind = LayerNotFoundError if isinstance(error, LayerNotFoundError) else ValueError
            raise kind(
                "unfreeze must be 'all', None, or the name of a block or a list of these; got "
                f"{self.unfreeze!r}: {error}"
            ) from error

    def _draw_seed(self, resume: bool) -> int:
        state = self.random_state
        if state is not None and not isinstance(state, RandomState):
            return int(state)
        if resume:  # another split would hold out images that have been trained on
            return self._seed
        if state is not None:
            return int(state.randint(2**32, dtype=np.uint32))
        return int(np.random.SeedSequence().generate_state(1)[0])

    def _open_checkpoint(
        self, dataset: Dataset, validation: Dataset | None, seed: int, resume: bool
    ) -> Checkpoint:
        """Open the checkpoint of the training that the data and the parameters describe."""
        assert self.checkpoint is not None
        params = {
            name: to_plain(value)
            for name, value in self.get_params(deep=False).items()
            if name not in _WITHOUT_EFFECT
        }
        known_seed = None if self.random_state is None and not resume else seed
        try:
            # The order of images is drawn anew in each epoch, by its number.
            origin = (
                (
                    *(self.module_, self._preprocessing.settings),
                    *(self.classes_, self._multilabel, len(self.history_)),
                )
                if resume
                else self._find_backbone().fingerprint()
            )
            key = make_key(origin, params, known_seed, dataset, validation, self.num_workers)
        except UnknownContentError as error:
            raise ValueError(
                "checkpoint must be None for this network and these parameters, by whose content "
                f"a training would be found again: {error}."
            ) from error
        return Checkpoint(self.checkpoint, key, seed)

    def _label(
        self, X: Any, y: Any, sample_weight: Any, *, reset: bool, suffix: str = ""
    ) -> Dataset:
        """Validate X and y, or X_val and y_val (`suffix` "_val"), as one dataset."""
        if y is None:
            raise ValueError(
                f"{type(self).__name__} requires y to be passed, but the target y is None."
            )
        try:
            records = find_records(self, X, self.image_shape, reset=reset, input_name=f"X{suffix}")
            return label_images(records, y, sample_weight, name=f"y{suffix}")
        except ValueError as error:
            if not suffix:
                raise
            raise ValueError(f"X{suffix} and y{suffix}: {error}") from error

    @contextmanager
    def _unchanged_on_error(self) -> Iterator[None]:
        """Restore the attributes of X's columns on an error; enable gradients meanwhile."""
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

    def _train(
        self,
        dataset: Dataset,
        validation: Dataset | None,
        objective: Objective,
        seed: int,
        *,
        resume: bool,
        epochs: int | None,
        data: Mapping[str, Any] | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> "FineTuneClassifier":
        """Train a new network, or `resume` with the current one, and keep the result.

        Without a number of epochs it is trained for one, and the optimizer resumes too. Callbacks
        are told of `data`, if there is any.
        """
        device = find_device(self.device)
        classes = objective.classes
        backbone = self._find_backbone(with_file=not resume)
        blocks = self._find_blocks(backbone)
        if resume:
            self._check_origin()
            # A copy: the current network stays as it is if training fails.
            network = Network(copy.deepcopy(self.module_), self._head, self._n_outputs)
        else:
            network = build_network(backbone, self.head, len(classes), device, seed)
        score = None if validation is None else make_score(self.scoring, objective, validation)
        config = self._make_config(objective, epochs, device, seed, score)
        stages = [(blocks, config)]
        head_epochs = self._count_head_epochs(blocks)
        if head_epochs and epochs is not None and not resume:
            head_alone = replace(
                config, epochs=head_epochs, warmup_epochs=0, cutmix=0, early_stopping=False
            )
            stages = [((), head_alone), *stages]
        tasks = None
        if data is not None:
            n_epochs = sum(how.epochs or 0 for _, how in stages)
            fitted = functools.partial(_copy_fitted, network, backbone, objective)
            tasks = Tasks(self, n_epochs, data, fitted)
        history = self.history_ if resume else []
        state = self._optimizer_state if resume and epochs is None else None
        for stage, (trained, how) in enumerate(stages):
            if checkpoint is not None:
                if stage < min(checkpoint.stage, len(stages) - 1):
                    continue
                checkpoint.enter(stage)
            plan = plan_training(
                *(network, trained, backbone.preprocessing, dataset, how),
                keep_auxiliary=stage < len(stages) - 1,
            )
            result = run_training(
                plan,
                dataset,
                validation,
                history=history,
                optimizer_state=state,
                watch=tasks,
                checkpoint=checkpoint,
            )
            history = result.history
            if result.interrupted:
                break
        if epochs is not None:
            result = replace(result, optimizer_state=None)
        self._keep(network, backbone, objective, seed, result)
        if tasks is not None:
            tasks.end()
        return self

    def _check_origin(self) -> None:
        """Raise if the parameters describe another network than the one being trained."""
        for name, value in self._origin.items():
            now = to_plain(getattr(self, name))
            if now is not value and now != value:
                raise ValueError(
                    f"{name} must not change while a network is trained; it was {value!r} when "
                    f"training began and is {now!r} now. Restore it, or start over with a clone."
                )

    def _count_head_epochs(self, blocks: tuple[str, ...]) -> int:
        if self.head_epochs == "auto":
            is_cheap = count_views(self.augment) is not None
            return int(self.max_epochs) if blocks and is_cheap else 0
        return int(self.head_epochs)

    def _make_config(
        self,
        objective: Objective,
        epochs: int | None,
        device: torch.device,
        seed: int,
        score: Score | None,
    ) -> TrainingConfig:
        # Those of this class: a subclass may have fewer.
        shared = TrainingConfig.__dataclass_fields__.keys() & FineTuneClassifier._get_param_names()
        given = {name: to_plain(getattr(self, name)) for name in shared}
        found = {"objective": objective, "epochs": epochs, "score": score}
        return TrainingConfig(**given | found | {"device": device, "seed": seed})

    def _keep(
        self,
        network: Network,
        backbone: Backbone,
        objective: Objective,
        seed: int,
        result: FitResult,
    ) -> "FineTuneClassifier":
        """Keep a trained network and the result of its training, all at once."""
        self.module_ = network.module.eval()
        self.classes_ = objective.classes
        self._multilabel = isinstance(objective, MultiLabel)
        self.history_ = result.history
        self.n_iter_ = len(result.history)
        self.best_validation_score_ = result.best_score
        self._name = backbone.name
        self._head = network.head
        self._n_outputs = network.n_outputs
        self._preprocessing = backbone.preprocessing
        self._origin = {name: to_plain(getattr(self, name)) for name in _ORIGIN}
        self._seed = seed
        self._optimizer_state = result.optimizer_state
        return self

    @property
    def _objective(self) -> Objective:
        return make_objective(self.classes_, multilabel=self._multilabel)

    def _compute_logits(self, X: Any) -> NDArray[np.float64]:
        """Run the network on images, in eval mode."""
        check_is_fitted(self, "module_")
        names = ("batch_size", "num_workers", "precision", "engine")
        check_parameters(FineTuneClassifier, {name: getattr(self, name) for name in names})
        check_engine(self.engine, self.device, self.precision)
        records = find_records(self, X, self.image_shape, reset=False)
        engine = find_engine(
            self.engine, self.device, self.precision, self.batch_size, self.verbose
        )
        network = self.module_.to(engine.device)
        reader = make_logit_reader(self._name, network, self._preprocessing, engine)
        logits = np.empty((len(records), len(self.classes_)))
        with tqdm(
            total=len(records), desc=self._name, unit="image", disable=not self.verbose
        ) as bar:
            for batch in run_in_batches(
                reader,
                records,
                Record.open,
                batch_size=self.batch_size,
                num_workers=self.num_workers,
            ):
                for record, error in batch.failures:
                    raise record.error(error)
                logits[[record.index for record in batch.samples]] = batch.rows["logits"]
                bar.update(len(batch.samples))
        return logits


def _copy_fitted(network: Network, backbone: Backbone, objective: Objective) -> dict[str, Any]:
    """Return what `predict` needs of a network that is being trained."""
    return {
        "module_": copy.deepcopy(network.module).eval(),
        "classes_": objective.classes,
        "_multilabel": isinstance(objective, MultiLabel),
        "_name": backbone.name,
        "_preprocessing": backbone.preprocessing,
    }


# What training gives, as `_keep` keeps it.
_FITTED = (
    *("module_", "classes_", "history_", "n_iter_", "best_validation_score_", "_multilabel"),
    *("_name", "_head", "_n_outputs", "_preprocessing", "_origin", "_seed", "_optimizer_state"),
)

# The parameters that decide which network is trained.
_ORIGIN = ("backbone", "weights", "preprocessing", "head", "resize", "image_size")


# Parameters that do not decide what is learned, or are told by the network or the seed.
_WITHOUT_EFFECT = {
    *("backbone", "weights", "preprocessing", "random_state", "warm_start"),
    *("checkpoint", "device", "engine", "num_workers", "verbose"),
}


# Here doctest finds the examples of a class that says it is in another module.
__test__ = {"FineTuneClassifier": FineTuneClassifier}
