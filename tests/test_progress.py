"""Tests of progress bars: where there are no widgets, they are text, without a warning."""

import subprocess
import sys

CODE = """
import sys, types
shell = types.SimpleNamespace(config={"IPKernelApp": {}})
sys.modules["IPython"] = types.SimpleNamespace(get_ipython=lambda: shell)
sys.modules["ipywidgets"] = None
from deepfeat._progress import tqdm
list(tqdm(range(3), desc="images"))
"""


def test_a_notebook_without_widgets_shows_text():
    """tqdm itself would warn on import, also of those who want no bar."""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", CODE], stderr=subprocess.PIPE, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "images: 100%" in run.stderr
    assert "Warning" not in run.stderr
