"""Imports of optional packages, with errors that name the extra to install."""

import importlib
from typing import Any


def import_optional(name: str, *, extra: str) -> Any:
    """Import the module `name`; if its package is missing, name the extra that installs it."""
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # An installed package that lacks a module or a dependency has an error of its own.
        if error.name != package:
            raise
        raise ModuleNotFoundError(
            f"The package {package} is needed here, but it is not installed. "
            f"Install it with `pip install 'deepfeat[{extra}]'`.",
            name=error.name,
        ) from error
