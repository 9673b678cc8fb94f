"""Features of millions of images: `extract` on a cluster of Ray."""

from .._optional import import_optional

import_optional("ray.data", extra="ray")  # first, because `arrow` would name its own extra

from ._extract import Summary, extract  # noqa: E402

__all__ = ["Summary", "extract"]
