"""How estimators present themselves: a short text, and a link from HTML to the documentation."""

import contextlib
import functools
from importlib import metadata
from typing import Any

from sklearn.base import BaseEstimator
from torch import nn


class Representation(BaseEstimator):
    """Estimators that name a network instead of listing its layers, and link to their pages."""

    def __repr__(self, N_CHAR_MAX: int = 700) -> str:
        params = self.get_params(deep=False)
        backbone = params.get("backbone")
        if isinstance(backbone, nn.Module):
            params["backbone"] = _Plain(f"{type(backbone).__name__}(...)")
        shown: Any = object.__new__(type(self))
        vars(shown).update(params)
        return str(BaseEstimator.__repr__(shown, N_CHAR_MAX))

    def _get_doc_link(self) -> str:
        """Return the address of the page of this class, for which scikit-learn asks."""
        root = find_documentation()
        if not root or type(self).__module__ != "deepfeat":  # a class of the user has no page
            return ""
        return f"{root.rstrip('/')}/_generated/deepfeat.{type(self).__name__}.html"


with contextlib.suppress(ImportError, AttributeError):
    # scikit-learn breaks the lines of estimators that have the method of BaseEstimator, which it
    # looks up here; without this, parts of pipelines and searches would be shown on one line.
    from sklearn.utils._pprint import _EstimatorPrettyPrinter as _Printer

    _Printer._dispatch[Representation.__repr__] = _Printer._pprint_estimator


class _Plain(str):
    """A text that is shown without quotes."""

    def __repr__(self) -> str:
        return str(self)


@functools.cache
def find_documentation() -> str:
    """Return the address of the documentation, one of the URLs of the installed package."""
    try:
        urls = metadata.metadata("deepfeat").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:  # the sources are imported without an installation
        return ""
    pairs = [url.partition(", ") for url in urls]
    return next((str(address) for label, _, address in pairs if label == "Documentation"), "")
