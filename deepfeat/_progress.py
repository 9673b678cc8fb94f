"""Progress bars: widgets in a notebook, text everywhere else."""

import warnings

with warnings.catch_warnings():
    # Without ipywidgets, tqdm warns in a notebook, also of those who want no bar, and draws text.
    warnings.simplefilter("ignore")
    from tqdm.auto import tqdm

__all__ = ["tqdm"]
