"""OpenVINO as an engine: networks converted, checked against torch, and run as Readers."""

import functools
import hashlib
import json
import logging
import os
import tempfile
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._backbones.fingerprint import UnknownContentError
from .._backbones.preprocessing import Preprocessing
from .._engine.devices import Outputs, Precision, limit_part
from .._layers.inference import is_close
from .._optional import import_optional
from .._progress import tqdm

# A folder in which converted networks are kept for other processes.
FOLDER_VARIABLE = "DEEPFEAT_OPENVINO_DIR"
_TYPES: dict[Precision, str] = {"float32": "f32", "bfloat16": "bf16"}
_FORMAT = 1  # part of the names of files: increase it when conversions change
_KEPT = 4  # converted networks in a process, each with a copy of its weights
_KEYS = ["deepfeat", "keys"]  # where the keys of outputs stand in a converted network
_converting = threading.Lock()


@dataclass(frozen=True)
class Compiled:
    """A compiled network, whose outputs have these keys."""

    network: Any  # openvino.CompiledModel
    keys: tuple[str, ...]


_compiled: OrderedDict[Hashable, Compiled] = OrderedDict()  # the least recently used first


@dataclass(frozen=True)
class Source:
    """A network of torch that is to be converted.

    `forward` runs `module` on a normalised batch, and is what the tuple `reads` names. `network` is
    where the weights come from; `digest` identifies them, if they have one.
    """

    name: str
    network: nn.Module
    module: nn.Module
    forward: Callable[[Tensor], Outputs]
    reads: tuple[str, ...]
    preprocessing: Preprocessing
    digest: Callable[[], bytes] | None = None


class OpenVinoReader:
    """A network converted to OpenVINO, or a part of one, as a Reader on the CPU.

    It runs on batches of one size; the last one is padded.
    """

    def __init__(self, source: Source, precision: Precision, batch_size: int, verbose: int):
        self.device = torch.device("cpu")
        self.prepare = source.preprocessing.prepare
        self._source = source
        self._precision = precision
        self._batch_size = batch_size
        self._verbose = verbose
        self._requests: dict[Hashable, tuple[Any, tuple[str, ...]]] = {}

    def read(self, batch: Tensor) -> Outputs:
        """Run a batch, in parts of one size."""
        size = limit_part(self._batch_size, tuple(batch.shape[1:]), self.device)
        request, keys = self._find_request(size, batch)
        parts = []
        for part in torch.split(batch, size):
            padded = F.pad(part, (*(0, 0) * (batch.ndim - 1), 0, size - len(part)))
            outputs = request.infer([padded.numpy()]).values()
            parts.append([torch.from_numpy(output[: len(part)].copy()) for output in outputs])
        return {
            key: torch.cat(outputs)
            for key, outputs in zip(keys, zip(*parts, strict=True), strict=True)
        }

    def _find_request(self, size: int, batch: Tensor) -> tuple[Any, tuple[str, ...]]:
        shape = (size, *batch.shape[1:])
        if (shape, batch.dtype) not in self._requests:
            noise = _make_noise(shape, batch.dtype)
            compiled = _compile_once(self._source, noise, self._precision, self._verbose)
            request = compiled.network.create_infer_request()
            self._requests[shape, batch.dtype] = request, compiled.keys
        return self._requests[shape, batch.dtype]


def check_openvino(device: str | torch.device, precision: Precision) -> None:
    """Raise unless OpenVINO is installed, and runs on this device in this precision."""
    openvino = import_optional("openvino", extra="openvino")
    if device != "auto" and torch.device(device).type != "cpu":
        raise ValueError(
            f"engine='openvino' runs on the CPU: device must be 'auto' or 'cpu'; got {device!r}."
        )
    if precision not in _TYPES:
        raise ValueError(
            f"precision must be 'float32' or 'bfloat16' if engine is 'openvino'; got {precision!r}."
        )
    if precision == "bfloat16" and "BF16" not in _find_core(openvino).get_property(
        "CPU", "OPTIMIZATION_CAPABILITIES"
    ):
        raise ValueError(
            "precision='bfloat16' is not possible with engine='openvino' on this processor, which "
            "does not have instructions for it: use 'float32'."
        )


@functools.cache
def _find_core(openvino: Any) -> Any:
    return openvino.Core()


def _make_noise(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return torch.rand(shape, generator=generator, dtype=dtype)
    return torch.randint(0, 256, shape, generator=generator, dtype=dtype)


# Conversion ---------------------------------------------------------------------------------------


def _compile_once(source: Source, noise: Tensor, precision: Precision, verbose: int) -> Compiled:
    """Return a compiled network; the last few are kept in this process."""
    settings = source.preprocessing.settings
    what = (
        *(source.reads, tuple(noise.shape), str(noise.dtype)),
        settings if isinstance(settings, str) else "",  # the user's own do nothing on the device
    )
    digest = _find_digest(source)
    weights = _look_at(source.network) if digest is None else digest
    key = weights, what, precision, torch.get_num_threads()
    with _converting:
        if key not in _compiled:
            for dead in [other for other in _compiled if _is_dead(other)]:
                del _compiled[dead]
            _compiled[key] = _compile(source, noise, precision, (digest, what), verbose)
            while len(_compiled) > _KEPT:
                _compiled.popitem(last=False)
        _compiled.move_to_end(key)
        return _compiled[key]


def _is_dead(key: Any) -> bool:
    """Return whether the network of a key without digest is gone."""
    return isinstance(key[0], tuple) and key[0][0]() is None


def _find_digest(source: Source) -> bytes | None:
    try:
        return None if source.digest is None else source.digest()
    except UnknownContentError:
        return None


def _look_at(network: nn.Module) -> Hashable:
    """Return what changes if a network does, as far as can be told without reading all of it.

    Weights that are written through `data` keep their version, but hardly their first value.
    """
    modules = tuple((id(module), type(module)) for module in network.modules())
    tensors = tuple(
        (
            tensor.data_ptr(),
            0 if tensor.is_inference() else tensor._version,
            tensor[(0,) * tensor.ndim].item() if tensor.numel() else None,
        )
        for tensor in (*network.parameters(), *network.buffers())
    )
    return weakref.ref(network), modules, tensors


def _compile(
    source: Source,
    noise: Tensor,
    precision: Precision,
    content: tuple[bytes | None, Hashable],
    verbose: int,
) -> Compiled:
    openvino = import_optional("openvino", extra="openvino")
    file = _find_file(content, openvino)
    converted = _load(file, openvino)
    if converted is None:
        if verbose:
            tqdm.write(f"{source.name}: converting to OpenVINO")
        converted = _convert(source, noise, openvino)
        if file is not None and _save(converted, file, openvino):
            # Read again, it computes as it will in other processes.
            converted = _load(file, openvino) or converted
    keys = json.loads(converted.get_rt_info(_KEYS).astype(str))
    return Compiled(_compile_for(converted, precision, openvino), tuple(keys))


def _convert(source: Source, noise: Tensor, openvino: Any) -> Any:
    """Convert a network; refuse one that OpenVINO cannot convert, or computes differently.

    A conversion follows the path that the computation takes for one batch. It is tried on a darker
    and on a lighter one, so that a network that decides by its input does not go unnoticed.
    """
    module = _Converting(source)
    trials = noise // 4, 255 - noise // 4
    if noise.is_floating_point():
        trials = noise / 4, 1 - noise / 4
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates the tracing that OpenVINO uses
            with _keep_logger():
                converted = openvino.convert_model(module, example_input=noise)
            converted.reshape(list(noise.shape))
            compiled = _compile_for(converted, "float32", openvino)
            expected = [module(trial) for trial in trials]
            found = [compiled([trial.numpy()]).values() for trial in trials]
    except Exception as error:
        raise ValueError(_refuse(source, f"cannot be converted ({_explain(error)})")) from error
    for ours, theirs in zip(expected, found, strict=True):
        close = (
            is_close(row, torch.from_numpy(other)) for row, other in zip(ours, theirs, strict=True)
        )
        if not all(close):
            raise ValueError(_refuse(source, "gives other values there than in torch"))
    converted.set_rt_info(json.dumps(module.keys), _KEYS)  # names of outputs are changed on the way
    return converted


@contextmanager
def _keep_logger() -> Iterator[None]:
    """Restore the root logger, which OpenVINO leaves silenced where a conversion fails."""
    logger = logging.getLogger()
    level, filters, handlers = logger.level, list(logger.filters), list(logger.handlers)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.filters[:], logger.handlers[:] = filters, handlers


def _explain(error: Exception) -> str:
    lines = [line.lstrip("- ") for line in str(error).splitlines() if line.strip()]
    missing = [line for line in lines if line.startswith("No conversion rule")]
    return (missing or lines or [type(error).__name__])[0]


def _refuse(source: Source, problem: str) -> str:
    return f"engine='openvino' is not possible for {source.name}, which {problem}: use 'torch'."


class _Converting(nn.Module):
    """A network as OpenVINO takes it: images as they are prepared in, a tuple of outputs out."""

    def __init__(self, source: Source):
        super().__init__()
        self.module = source.module  # in which tracing looks for weights
        self.keys: tuple[str, ...] = ()
        self._normalize = source.preprocessing.normalize
        self._forward = source.forward

    def forward(self, batch: Tensor) -> tuple[Tensor, ...]:
        outputs = self._forward(self._normalize(batch))
        self.keys = tuple(outputs)
        return tuple(outputs.values())


def _compile_for(converted: Any, precision: Precision, openvino: Any) -> Any:
    settings = {
        # Left to itself, OpenVINO takes bfloat16 wherever the processor has it.
        "INFERENCE_PRECISION_HINT": _TYPES[precision],
        "PERFORMANCE_HINT": "LATENCY",  # one batch at a time, on all threads
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    return _find_core(openvino).compile_model(converted, "CPU", settings)


# Files --------------------------------------------------------------------------------------------


def _find_file(content: tuple[bytes | None, Hashable], openvino: Any) -> Path | None:
    """Return where a converted network is kept; None if that is not wanted, or not possible."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder or content[0] is None:
        return None
    versions = _FORMAT, openvino.get_version(), torch.__version__
    name = hashlib.blake2b(repr((content, versions)).encode(), digest_size=16).hexdigest()
    return Path(folder).expanduser() / f"{name}.xml"


def _load(file: Path | None, openvino: Any) -> Any:
    """Load a converted network; None if there is none, or, with a warning, if it is damaged."""
    if file is None or not file.exists():
        return None
    try:
        if file.with_suffix(".digest").read_text() != _digest_files(file):
            raise ValueError("its content has changed")
        return _find_core(openvino).read_model(file)
    except (OSError, ValueError, RuntimeError) as error:
        warnings.warn(f"{file} cannot be read, and is replaced: {error}", stacklevel=2)
        return None


def _save(converted: Any, file: Path, openvino: Any) -> bool:
    """Save a converted network, in three files, of which the one that is looked for comes last."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            new = Path(folder) / file.name
            openvino.save_model(converted, new, compress_to_fp16=False)
            new.with_suffix(".digest").write_text(_digest_files(new))
            for suffix in (".digest", ".bin", ".xml"):
                os.replace(new.with_suffix(suffix), file.with_suffix(suffix))
    except (OSError, RuntimeError) as error:
        warnings.warn(f"The converted network was not saved as {file}: {error}", stacklevel=2)
        return False
    return True


def _digest_files(file: Path) -> str:
    digests = []
    for suffix in (".bin", ".xml"):
        with open(file.with_suffix(suffix), "rb") as content:
            digests.append(hashlib.file_digest(content, "blake2b").hexdigest())
    return " ".join(digests)
