"""Imports of optional packages, with errors that say what to install."""

import importlib
import re
from importlib import metadata
from typing import Any


def import_optional(name: str, *, extra: str) -> Any:
    """Import the module `name`; if its package is missing, say how to install the extra."""
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # An installed package that lacks a module or a dependency has an error of its own.
        if error.name != package:
            raise
        raise ModuleNotFoundError(
            f"The package {package} is needed here, but it is not installed. Install the extra "
            f"`{extra}` of deepfeat: `pip install {_list_requirements(extra) or package}`.",
            name=error.name,
        ) from error


def _list_requirements(extra: str) -> str:
    """Return the requirements of an extra, as arguments of pip; they work with any deepfeat."""
    try:
        requirements = metadata.requires("deepfeat") or []
    except metadata.PackageNotFoundError:  # the sources are imported without an installation
        return ""
    pairs = [requirement.split(";", 1) for requirement in requirements if ";" in requirement]
    return " ".join(
        f"'{required.strip()}'"
        for required, marker in pairs
        if re.search(rf"extra\s*==\s*['\"]{extra}['\"]", marker)
    )
