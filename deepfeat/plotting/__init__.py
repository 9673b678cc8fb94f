"""Knows the names of the displays: pictures of layers, predictions, searches and training.

Each follows scikit-learn's convention: `from_extractor`, `from_search` and the like gather the
data and draw it, `plot` draws it again. Matplotlib comes with the extra `plot`.
"""

from ._activation_maps import ActivationMapDisplay
from ._architecture import ArchitectureDisplay
from ._layer_grid import LayerGridDisplay
from ._learning_curve import LearningCurveDisplay
from ._predictions import PredictionDisplay

__all__ = [
    "ActivationMapDisplay",
    "ArchitectureDisplay",
    "LayerGridDisplay",
    "LearningCurveDisplay",
    "PredictionDisplay",
]
