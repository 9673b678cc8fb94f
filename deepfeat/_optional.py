"""Knows how to import a package that only some users need, or to name the extra that brings it."""

import importlib
from typing import Any


def import_optional(name: str, *, extra: str) -> Any:
    """Import the module `name`; where it is missing, say which extra of deepfeat brings it."""
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A package that is there but lacks a module or a package of its own is not ours to explain.
        if error.name != package:
            raise
        raise ModuleNotFoundError(
            f"{package} is needed here and is not installed: pip install 'deepfeat[{extra}]'",
            name=error.name,
        ) from error
