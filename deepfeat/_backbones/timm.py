"""timm's networks: their names, preprocessing, weights on the Hugging Face hub, and building."""

import functools
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._optional import import_optional
from .networks import Building, strip_wrappers
from .preprocessing import Preprocessing, Resize, preprocess_like_timm
from .resnet10_slim import NAME as NAME_WITHOUT_DOWNLOAD
from .state_files import State, WeightsFile

PREFIX = "timm/"


@dataclass(frozen=True)
class TimmDescription:
    """A description by timm's configuration of a network with a tag, without the prefix."""

    name: str

    @property
    def network(self) -> str:
        return f"{PREFIX}{self.name}"

    @property
    def config(self) -> Any:
        """The configuration of the weights in timm; its defaults where there is none."""
        models = _import("timm.models")
        return models.get_pretrained_cfg(self.name) or models.PretrainedCfg()

    @property
    def categories(self) -> Sequence[str] | None:
        subset = _import("timm.data").infer_imagenet_subset(self.config.to_dict())
        return None if subset is None else _name_categories(subset)

    def preprocess(self, resize: Resize, image_size: int | None) -> Preprocessing:
        data = _import("timm.data")
        config = data.resolve_data_config(pretrained_cfg=self.config.to_dict())
        if image_size is not None:
            config["input_size"] = (3, image_size, image_size)
        return preprocess_like_timm(config, data.create_transform, resize)


@functools.cache  # the files that timm reads for it are large
def _name_categories(subset: str) -> tuple[str, ...]:
    return tuple(_import("timm.data").ImageNetInfo(subset).label_descriptions())


@dataclass(frozen=True)
class HubWeights:
    """Weights of timm on the Hugging Face hub, in the safetensors format.

    Downloading, the cache on disk and the offline mode are those of `huggingface_hub`.
    """

    description: TimmDescription

    @property
    def digest(self) -> str:
        """SHA-256 of the file's content, computed once in a process."""
        return _find_file(self.description).digest

    def state(self) -> State:
        return _find_file(self.description).state()


@functools.cache  # in one process, all rows are of one revision
def _find_file(description: TimmDescription) -> WeightsFile:
    path = _download(description)
    file = WeightsFile.find(path, description)
    # In the hub's cache a file is a link to one that is named by the SHA-256 of its content.
    expected = path.resolve().name
    if re.fullmatch("[0-9a-f]{64}", expected) and file.digest != expected:
        raise OSError(
            f"{path} does not hold the weights {description.network}: its SHA-256 is "
            f"{file.digest}, not {expected}. Delete {path.resolve()}: it is then downloaded again."
        )
    return file


def _download(description: TimmDescription) -> Path:
    """Find the weights in the hub's cache, or download them; raise OSError if that fails."""
    hub = _import("huggingface_hub")
    config = description.config
    weights = f"The weights {description.network}"
    if config.hf_hub_id is None:
        raise OSError(
            f"{weights} are not on the Hugging Face hub, from which alone weights of timm are "
            "downloaded. Download them yourself and give the path of the file as weights=."
        )
    repository, _, revision = config.hf_hub_id.partition("@")
    filename = _safe_name(config.hf_hub_filename or "model.safetensors")
    try:
        path = hub.hf_hub_download(repository, filename, revision=revision or None)
    except Exception as error:  # the network, the disk and the server may raise anything
        if isinstance(error, hub.errors.LocalEntryNotFoundError):
            reason = str(error.__cause__ or error)  # why the hub was not reached
        elif isinstance(error, hub.errors.EntryNotFoundError):
            reason = "it does not have them in the safetensors format"
        else:
            reason = str(error)
        reason = " ".join(reason.split()).rstrip(".")  # theirs have paragraphs
        raise OSError(
            f"{weights} could not be downloaded from {repository} on the Hugging Face hub: "
            f"{reason}. Give the path of a file as weights=, or fill the hub's cache on a machine "
            "with a network (`HF_HOME` is its folder). The backbone "
            f"{NAME_WITHOUT_DOWNLOAD!r} needs no network: its weights come with deepfeat."
        ) from error
    return Path(path)


def _safe_name(filename: str) -> str:
    """Return the name under which the hub has a file in the safetensors format."""
    if filename == "pytorch_model.bin":
        return "model.safetensors"
    return str(Path(filename).with_suffix(".safetensors"))


# The family -------------------------------------------------------------------------------------


def is_installed() -> bool:
    return importlib.util.find_spec("timm") is not None


def list_names() -> list[str]:
    return [f"{PREFIX}{name}" for name in _import("timm").list_pretrained()]


def has_name(name: str) -> bool:
    if not name.startswith(PREFIX):
        return False
    architecture, tag = _split(name)
    # A name that timm has replaced by another is a model, too, but does not have a configuration.
    if not _import("timm").is_model(architecture) or _is_deprecated(architecture):
        return False
    return not tag or tag in _list_tags(architecture)


def known_weights(name: str) -> dict[str, HubWeights]:
    architecture, tag = _split(name)
    tags = [
        other
        for other, config in _list_tags(architecture).items()
        if config.has_weights  # some only say how random weights are to be trained
    ]
    known = {
        other: HubWeights(TimmDescription(f"{architecture}.{other}")) for other in tags if other
    }
    default = tag or next(iter(tags), "")
    if default in known:
        known = {"DEFAULT": known[default], **known}
    elif tags and not tag:  # weights without a tag
        known["DEFAULT"] = HubWeights(TimmDescription(architecture))
    return known


def describe(name: str) -> TimmDescription:
    known = known_weights(name)
    _, tag = _split(name)
    if tag or "DEFAULT" not in known:
        return TimmDescription(name.removeprefix(PREFIX))
    return known["DEFAULT"].description


def version() -> str:
    return f"timm {_import('timm').__version__}"


def is_sized(name: str) -> bool:
    return bool(_config_of(name).fixed_input_size)


def build(name: str, size: tuple[int, int] | None, **options: Any) -> nn.Module:
    if size is not None:
        options["img_size"] = size
    try:
        network: nn.Module = _import("timm").create_model(name.removeprefix(PREFIX), **options)
    except (AssertionError, RuntimeError, ValueError) as error:
        if size is None or options.get("pretrained"):
            raise
        raise ValueError(
            f"{name} cannot be built for images of {size[0]} x {size[1]} pixels: {error}"
        ) from error
    return network


def load(name: str, size: tuple[int, int] | None, state: State) -> nn.Module:
    """Build a network around a state dict as timm does, which knows older and other formats.

    Position embeddings are resampled to the input size.
    """
    state = strip_wrappers(state)
    config = _config_of(name)
    n_classes = config.num_classes
    head = config.classifier[0] if isinstance(config.classifier, tuple) else config.classifier
    if f"{head}.weight" in state:
        n_classes = len(state[f"{head}.weight"])
    overlay = {"state_dict": state, "num_classes": n_classes}
    try:
        with _Loading() as loading:
            network = build(
                name, size, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=n_classes
            )
        loading.check(network)
        kept: Any = network.pretrained_cfg
        kept.pop("state_dict")  # all of it, in addition to the network
        return network.float()
    except MemoryError:
        raise
    except Exception as error:  # what converts other formats may raise anything
        reason = "; ".join(line.strip() for line in str(error).splitlines()[:4])
        if len(reason) > 500:
            reason = f"{reason[:500]}..."
        raise ValueError(f"The weights file does not fit {name}: {reason}") from error


class _Loading(Building):
    """Build a network, and note what is copied into it: timm is strict with most networks only."""

    def __init__(self) -> None:
        super().__init__(None)
        self._copied: set[int] = set()  # addresses

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.copy_:
            self._copied.add(args[0].data_ptr())
        return super().__torch_function__(func, types, args, kwargs)

    def check(self, network: nn.Module) -> None:
        """Raise ValueError if the state dict lacked an entry."""
        missing = [
            key
            for key, value in network.state_dict().items()
            if value.data_ptr() not in self._copied
            and value.numel()
            and not key.endswith("num_batches_tracked")
        ]
        if missing:
            raise ValueError(f"{len(missing)} missing: {', '.join(missing[:5])}")


def count_outputs(network: nn.Module) -> int:
    count = getattr(network, "num_classes", 0)
    return count if isinstance(count, int) else 0


def _import(module: str) -> Any:
    return import_optional(module, extra="timm")


def _is_deprecated(architecture: str) -> bool:
    return architecture in _import("timm.models").get_deprecated_models()


def _split(name: str) -> tuple[str, str]:
    architecture, _, tag = name.removeprefix(PREFIX).partition(".")
    return architecture, tag


@functools.cache
def _list_tags(architecture: str) -> dict[str, Any]:
    configs: dict[str, Any] = _import("timm.models").get_arch_pretrained_cfgs(architecture)
    prefix = f"{architecture}."
    return {
        name.removeprefix(prefix) if name != architecture else "": config
        for name, config in configs.items()
    }


def _config_of(name: str) -> Any:
    return TimmDescription(name.removeprefix(PREFIX)).config
