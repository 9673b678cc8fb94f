"""The configuration of Sphinx, which builds these pages offline from the installed package."""

import doctest
import os
import sys
from importlib.metadata import version as installed_version

sys.path.insert(0, os.path.dirname(__file__))
from cross_references import TYPES, write_inventories

project = "deepfeat"
author = "the deepfeat developers"
copyright = "2026, the deepfeat developers"
release = version = installed_version("deepfeat")

extensions = [
    "cross_references",
    "matplotlib.sphinxext.plot_directive",
    "myst_parser",
    "numpydoc",
    "plain_text",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 2  # for links to the sections of a page
templates_path = ["_templates"]
intersphinx_mapping = write_inventories(f"{os.path.dirname(__file__)}/_build/inventories")

smartquotes = False  # docstrings quote values: "l2"

html_theme = "pydata_sphinx_theme"
html_title = f"deepfeat {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_sidebars = {"**": ["sidebar-nav-bs"], "index": [], "install": []}
html_show_sourcelink = False
html_theme_options = {
    "navbar_align": "left",
    "navigation_with_keys": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_end": [],
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/(plot_|quickstart)",
    "within_subsection_order": "gallery_order.GalleryOrder",
    "show_memory": False,
    "remove_config_comments": True,
    "download_all_examples": False,
    # Names in the code of examples link to the API, whose pages list the examples that use them.
    "reference_url": {"deepfeat": None},
    "doc_module": ("deepfeat",),
    "backreferences_dir": "_generated/examples",
}

# The examples of a display's docstring draw the picture on its page.
numpydoc_use_plots = True
plot_include_source = True
plot_html_show_formats = False
plot_html_show_source_link = False
plot_formats = [("png", 120)]
plot_rcparams = {"savefig.bbox": "tight"}

# With IGNORE_EXCEPTION_DETAIL, which is on by default, the messages of errors are not compared.
doctest_default_flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

# The docstrings give the types; signatures that repeat them are hard to read.
autodoc_typehints = "none"
# The page of a class lists its own members; get_params, set_output and the like are documented by
# scikit-learn.
numpydoc_show_class_members = False
numpydoc_xref_param_type = True
numpydoc_xref_aliases = TYPES
numpydoc_xref_ignore = "all"  # words that are not in TYPES
default_role = "literal"
toc_object_entries_show_parents = "hide"
numpydoc_validation_checks = {
    "all",  # except:
    "ES01",  # a one-line summary may be enough
    "EX01",  # the example of a class covers its methods
    "RT02",  # return values are named, as in scikit-learn
    "SA01",  # the API fits on one page
}
