"""`export`: an estimator becomes a file, which is tried before it is kept."""

import json
import math
import os
import shutil
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator

from .. import __version__
from .._optional import import_optional
from .._parameters import check_parameters
from ._graphs import OUTPUTS, Plan, plan_export
from ._trials import compare, load, make_example, make_noise, make_trial, run

FilePrecision: TypeAlias = Literal["float32", "float16"]
Batch: TypeAlias = int | Literal["dynamic"]

# How far values may differ, relative to the largest of all.
_TOLERANCES: dict[FilePrecision, float] = {"float32": 1e-4, "float16": 1e-2}
_OPSET = 18  # to which torch converts first
_LIMIT = 2**31 - 2**26  # bytes of weights: a protobuf message is smaller than 2 GB
_SMALL = 1024  # values of a tensor that is not worth halving
_LOSS = 1e-3  # of a tensor that is halved, relative to its largest value
_converting = threading.Lock()


def export(
    estimator: BaseEstimator,
    path: str | os.PathLike[str],
    *,
    check: Any = None,
    batch: Batch = "dynamic",
    precision: FilePrecision = "float32",
) -> None:
    """Write a fitted estimator, with its network, to one ONNX file, and check what that computes.

    Only decoding, resizing and cropping remain outside: the file takes 8-bit images at the input
    size of the network and normalises them itself. Before it is written, ONNX Runtime runs it on
    noise and on the images in `check`, and it is compared with what the estimator gives in float32
    with torch.

    Parameters
    ----------
    estimator : estimator
        A fitted `FineTuneClassifier`; a `DeepFeatureExtractor`; a fitted Pipeline of an extractor,
        any of Normalizer, StandardScaler, MinMaxScaler, PCA and feature selectors, and a linear
        model (LinearSVC, LogisticRegression, SGDClassifier, RidgeClassifier, LinearRegression,
        Ridge); or a search (GridSearchCV) that has found one of these.
    path : str or path
        The file, by convention with the suffix `.onnx`. An existing file is replaced in one step.
    check : sequence or array of images, optional
        Images for which the file must give the same as the estimator, in addition to noise.
        Required for a classifier if `precision` is "float16".
    batch : int or "dynamic", default="dynamic"
        Number of images that the file takes at once: any, or always as many.
    precision : {"float32", "float16"}, default="float32"
        Type in which weights are stored: "float16" halves the file. It computes in float32 in
        either case, also if the estimator itself does not.

    Raises
    ------
    ValueError
        If the estimator has a step that cannot be exported, or gives several labels per image; the
        network cannot be; an image in
        `check` cannot be read; the file would be larger than 2 GB; or it would not give what the
        estimator does. Nothing is written.
    NotFittedError
        If the estimator is not fitted.
    FileNotFoundError
        If the folder of the file does not exist.
    OSError
        If the file cannot be written.
    ModuleNotFoundError
        If the packages of the extra `onnx` are not installed.

    Notes
    -----
    The input "images" is uint8 of shape (n, H, W, 3), RGB. With your own `preprocessing` it is what
    that returns: float32 of shape (n, C, H, W).

    The output of a classifier is "label", int64 of shape (n,), an index into the classes, and
    "scores", float32, what `decision_function` returns: of shape (n, n_classes), or (n,) for two
    classes. That of a regressor is "predictions", that of transformers "features" of shape (n, d),
    both float32.

    The metadata has "deepfeat" (the version), "backbone", and as JSON "layer" (names of the layers;
    null for a `FineTuneClassifier`), "classes" (null without) and "preprocessing" (null if it is
    your own). That has "resize": "short side", "stretch", "pad", or, for some weights of timm, what
    timm does; "resize_size", an int for "short side", else [H, W]; "crop_size" [H, W], from the
    centre; "interpolation", with antialiasing; "fill", the colour of "pad"; and "mean" and "std",
    for values from 0 to 1, by which the file itself normalises.

    Values are compared relative to the largest of all: they may differ by 1e-4, or 1e-2 if
    `precision` is "float16". A label may differ only where the two best scores of the estimator are
    as close as 1e-4.

    Examples
    --------
    >>> from deepfeat import DeepFeatureExtractor
    >>> from deepfeat.onnx import export
    >>> export(DeepFeatureExtractor("resnet10_slim"), "features.onnx")  # doctest: +SKIP
    """
    check_parameters(export, {"batch": batch, "precision": precision})
    for package in ("onnx", "onnxruntime", "onnxscript"):  # torch itself needs the last
        import_optional(package, extra="onnx")
    target = _check_path(path)
    size = None if batch == "dynamic" else batch
    tolerance, strict = _TOLERANCES[precision], _TOLERANCES["float32"]
    # Neither inference mode nor the autocast of the caller, which would become part of the file.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        plan = plan_export(estimator)
        if precision == "float16" and plan.kind == "classifier" and check is None:
            raise ValueError(
                "check must be images if precision is 'float16', which may change labels; got None."
            )
        trials = [make_trial(plan, make_noise(plan), "noise", tie=tolerance)]
        if check is not None:
            trials.append(make_trial(plan, check, "the images in check", tie=strict))
        content = _convert(plan, make_example(plan, trials[0], size), size, precision)
        session = load(content, plan)
        for trial in trials:
            compare(plan, trial, run(session, plan, trial, size), tolerance)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".deepfeat-") as folder:
        draft = Path(folder, "draft")
        draft.write_bytes(content)
        if target.exists():
            shutil.copymode(target, draft)
        draft.replace(target)


def _check_path(path: str | os.PathLike[str]) -> Path:
    """Return the file that is to be written, past links; raise if that is not possible."""
    target = Path(path).expanduser().resolve()
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"path must be in an existing folder; {os.fspath(target.parent)!r} does not exist."
        )
    if target.exists() and not target.is_file():
        raise OSError(f"path must be a regular file; got {os.fspath(target)!r}.")
    if not os.access(target.parent, os.W_OK):
        raise PermissionError(f"path must be in a writable folder; got {os.fspath(target)!r}.")
    return target


# Conversion ---------------------------------------------------------------------------------------


def _convert(
    plan: Plan, example: NDArray[Any], batch_size: int | None, precision: FilePrecision
) -> bytes:
    """Convert an estimator into the content of a file."""
    model = _convert_graph(plan, example, batch_size)
    _strip_notes(model.graph)
    for key, value in _describe(plan).items():
        model.metadata_props.add(key=key, value=value)
    if precision == "float16":
        _halve_weights(model.graph)
    n_bytes = _count_bytes(model.graph)
    if n_bytes > _LIMIT:
        hint = " Try precision='float16'." * (precision == "float32")
        raise ValueError(
            f"{plan.name} cannot be exported: its weights take {n_bytes / 1e9:.2f} GB, and an ONNX "
            f"file cannot be larger than 2 GB.{hint}"
        )
    content: bytes = model.SerializeToString()
    return content


def _convert_graph(plan: Plan, example: NDArray[Any], batch_size: int | None) -> Any:
    """Convert the module of an estimator with torch."""
    any_size = ({0: torch.export.Dim("n")},)
    try:
        # torch traces one module at a time in a process, and filters of warnings are global.
        with _converting, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of its own deprecations
            program: Any = torch.onnx.export(
                plan.graph.eval(),
                (torch.from_numpy(example),),
                dynamo=True,
                input_names=["images"],
                output_names=OUTPUTS[plan.kind],
                dynamic_shapes=any_size if batch_size is None else None,
                opset_version=_OPSET,
                verbose=False,
            )
    except Exception as error:
        raise ValueError(f"{plan.name} cannot be exported: {_explain(error)}") from error
    if batch_size is None and isinstance(program.model.graph.inputs[0].shape[0], int):
        raise ValueError(
            f"{plan.name} cannot be exported for any number of images: give a number as batch=."
        )
    return program.model_proto


def _explain(error: Exception) -> str:
    """Return the first line of what caused an error."""
    cause = error.__cause__ or error
    return next(iter(str(cause).splitlines()), "") or type(cause).__name__


def _strip_notes(graph: Any) -> None:
    """Strip torch's notes: they are long, and name files of this machine."""
    values = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for part in (graph, *graph.node, *values):
        del part.metadata_props[:]
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        if attribute.HasField("g"):  # of a branch or a loop
            _strip_notes(attribute.g)


def _describe(plan: Plan) -> dict[str, str]:
    """Describe an estimator, for programs that read the file."""
    classes = plan.classes
    if classes is not None and classes.dtype.kind == "M":  # dates, which may become integers
        classes = classes.astype(str)
    described = {
        "layer": plan.layers,
        "classes": None if classes is None else classes.tolist(),
        "preprocessing": plan.preprocessing.description,
    }
    return {
        "deepfeat": __version__,
        "backbone": plan.name,
        **{name: json.dumps(value, default=str) for name, value in described.items()},
    }


def _halve_weights(graph: Any) -> None:
    """Store large float32 tensors as float16, which are cast when the file is loaded."""
    onnx = import_optional("onnx", extra="onnx")
    casts = []
    for weight in graph.initializer:
        if weight.data_type != onnx.TensorProto.FLOAT or math.prod(weight.dims) < _SMALL:
            continue
        values = onnx.numpy_helper.to_array(weight)
        with np.errstate(all="ignore"):
            halved = values.astype(np.float16)
            loss = np.abs(halved - values).max() / np.abs(values).max()
        if not loss < _LOSS:  # too large for float16, or too small, or all zero
            continue
        name, stored = weight.name, f"{weight.name}.float16"
        weight.CopyFrom(onnx.numpy_helper.from_array(halved, stored))
        casts.append(onnx.helper.make_node("Cast", [stored], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _count_bytes(graph: Any) -> int:
    """Count the bytes of the weights."""
    as_numpy = import_optional("onnx", extra="onnx").helper.tensor_dtype_to_np_dtype
    return sum(
        math.prod(weight.dims) * as_numpy(weight.data_type).itemsize for weight in graph.initializer
    )
