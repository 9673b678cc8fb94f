"""Knows which objects a display can be made from, and says so of any other."""

from typing import Any

from deepfeat import DeepFeatureExtractor


def check_extractor(extractor: Any) -> None:
    """Raise unless it is an extractor."""
    if not isinstance(extractor, DeepFeatureExtractor):
        raise TypeError(
            f"extractor is a {type(extractor).__name__}; a DeepFeatureExtractor is expected. Of a "
            "pipeline take the step that is one, such as pipeline[0]."
        )
