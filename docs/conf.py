"""The configuration of Sphinx, which builds these pages offline from the installed package."""

from importlib.metadata import version as installed_version

project = "deepfeat"
author = "the deepfeat developers"
copyright = "2026, the deepfeat developers"
release = version = installed_version("deepfeat")

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build"]
myst_heading_anchors = 2  # for links to the sections of a page
templates_path = ["_templates"]

html_theme = "pydata_sphinx_theme"
html_title = "deepfeat"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_sidebars = {"guide/*": []}  # an empty one would leave less room for tables

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/(plot_|quickstart)",
    "show_memory": False,
    "remove_config_comments": True,
    "download_all_examples": False,
}

# The docstrings give the types; signatures that repeat them are hard to read.
autodoc_typehints = "none"
# The page of a class lists its own members; get_params, set_output and the like are documented by
# scikit-learn.
numpydoc_show_class_members = False
numpydoc_validation_checks = {
    "all",  # except:
    "ES01",  # a one-line summary may be enough
    "EX01",  # the example of a class covers its methods
    "RT02",  # return values are named, as in scikit-learn
    "SA01",  # the API fits on one page
}
