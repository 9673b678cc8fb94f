"""Features of pretrained networks as scikit-learn estimators.

>>> from deepfeat import DeepFeatureExtractor
>>> from sklearn.pipeline import make_pipeline
>>> from sklearn.svm import LinearSVC
>>> pipe = make_pipeline(DeepFeatureExtractor("vgg16", "relu7"), LinearSVC())
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import datasets as datasets
    from . import plotting as plotting
    from ._backbones.find import list_backbones as list_backbones
    from ._cache.cache import FeatureCache as FeatureCache
    from ._cache.disk import CacheFormatError as CacheFormatError
    from ._extraction.categories import predict_categories as predict_categories
    from ._extraction.extractor import DeepFeatureExtractor as DeepFeatureExtractor
    from ._extraction.extractor import list_layers as list_layers
    from ._finetuning.classifier import FineTuneClassifier as FineTuneClassifier
    from ._images.records import ImageError as ImageError
    from ._layers.index import LayerNotFoundError as LayerNotFoundError

__version__ = "0.1.0.dev0"

# Names are imported when they are first used, since torch and torchvision take seconds to load.
_ROOM_OF = {
    "CacheFormatError": "_cache.disk",
    "DeepFeatureExtractor": "_extraction.extractor",
    "FeatureCache": "_cache.cache",
    "FineTuneClassifier": "_finetuning.classifier",
    "ImageError": "_images.records",
    "LayerNotFoundError": "_layers.index",
    "list_backbones": "_backbones.find",
    "list_layers": "_extraction.extractor",
    "predict_categories": "_extraction.categories",
}

__all__ = [
    "CacheFormatError",
    "DeepFeatureExtractor",
    "FeatureCache",
    "FineTuneClassifier",
    "ImageError",
    "LayerNotFoundError",
    "list_backbones",
    "list_layers",
    "predict_categories",
]


# Modules that can be used after `import deepfeat` alone.
_MODULES = ("datasets", "plotting")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_ROOM_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, *_MODULES, "__version__"]
