"""Displays of layers, features, predictions, searches and training.

They follow scikit-learn's conventions: `from_extractor`, `from_search` and the like compute the
data and plot it, and `plot` plots it again. They need Matplotlib, which the extra `plot` installs.
"""

from ._activation_maps import ActivationMapDisplay
from ._architecture import ArchitectureDisplay
from ._embedding import EmbeddingDisplay
from ._layer_grid import LayerGridDisplay
from ._learning_curve import LearningCurveDisplay
from ._neighbors import NeighborsDisplay
from ._predictions import PredictionDisplay
from ._saliency import SaliencyDisplay

__all__ = [
    "ActivationMapDisplay",
    "ArchitectureDisplay",
    "EmbeddingDisplay",
    "LayerGridDisplay",
    "LearningCurveDisplay",
    "NeighborsDisplay",
    "PredictionDisplay",
    "SaliencyDisplay",
]
