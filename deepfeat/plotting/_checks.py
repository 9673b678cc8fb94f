"""Checks of the objects that displays are made from."""

from typing import Any

from deepfeat import DeepFeatureExtractor


def check_extractor(extractor: Any) -> None:
    """Raise unless an object is an extractor."""
    if not isinstance(extractor, DeepFeatureExtractor):
        raise TypeError(
            f"extractor must be a DeepFeatureExtractor; got {type(extractor).__name__}. If it is a "
            "step of a pipeline, pass that step, such as pipeline[0]."
        )
