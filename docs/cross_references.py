"""Links to the documentation of other projects, without a network, and from code in text.

Sphinx reads what a project documents from an inventory. Those below are written here, and hold only
the names that these pages refer to; an unknown name fails a build with `--nitpicky`.
"""

import zlib
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import desc, pending_xref
from sphinx.transforms.post_transforms import SphinxPostTransform

# For each project its address and, for each kind of name, the names at each place; {} is the name.
PROJECTS = {
    "python": (
        "https://docs.python.org/3/",
        {
            ("py:class", "library/stdtypes.html#{}"): "bytes dict list str tuple",
            ("py:class", "library/functions.html#{}"): "bool float int",
            ("py:function", "library/functions.html#{}"): "callable",
            ("py:data", "library/constants.html#{}"): "None",
            ("py:exception", "library/exceptions.html#{}"): "MemoryError OSError ValueError",
            ("std:term", "glossary.html#term-{}"): "iterable sequence",
        },
    ),
    "numpy": (
        "https://numpy.org/doc/stable/",
        {
            ("py:class", "reference/generated/{0}.html#{0}"): "numpy.memmap numpy.ndarray",
            ("py:class", "reference/random/legacy.html#{}"): "numpy.random.RandomState",
            ("std:term", "glossary.html#term-{}"): "array_like",
        },
    ),
    "sklearn": (
        "https://scikit-learn.org/stable/",
        {
            ("py:class", "modules/generated/{0}.html#{0}"): (
                "sklearn.calibration.CalibratedClassifierCV sklearn.decomposition.PCA "
                "sklearn.linear_model.LinearRegression sklearn.linear_model.LogisticRegression "
                "sklearn.linear_model.Ridge sklearn.linear_model.RidgeClassifier "
                "sklearn.linear_model.SGDClassifier sklearn.model_selection.GridSearchCV "
                "sklearn.multioutput.MultiOutputClassifier sklearn.neighbors.NearestNeighbors "
                "sklearn.pipeline.Pipeline sklearn.preprocessing.MinMaxScaler "
                "sklearn.preprocessing.MultiLabelBinarizer sklearn.preprocessing.Normalizer "
                "sklearn.preprocessing.StandardScaler sklearn.svm.LinearSVC sklearn.utils.Bunch"
            ),
            ("py:function", "modules/generated/{0}.html#{0}"): (
                "sklearn.datasets.get_data_home sklearn.model_selection.cross_val_score "
                "sklearn.pipeline.make_pipeline"
            ),
        },
    ),
    "torch": (
        "https://docs.pytorch.org/docs/stable/",
        {
            ("py:class", "generated/{0}.html#{0}"): "torch.nn.Module torch.nn.Sequential",
            ("py:class", "tensors.html#{}"): "torch.Tensor",
            ("py:class", "tensor_attributes.html#{}"): "torch.device torch.dtype",
            ("py:class", "data.html#{}"): "torch.utils.data.Dataset",
        },
    ),
    "torchvision": (
        "https://docs.pytorch.org/vision/stable/",
        {("py:class", "generated/{0}.html#{0}"): "torchvision.transforms.v2.CutMix"},
    ),
    "PIL": (
        "https://pillow.readthedocs.io/en/stable/",
        {("py:class", "reference/Image.html#{}"): "PIL.Image.Image"},
    ),
    "matplotlib": (
        "https://matplotlib.org/stable/",
        {
            ("py:class", "api/_as_gen/{0}.html#{0}"): (
                "matplotlib.axes.Axes matplotlib.figure.Figure matplotlib.lines.Line2D"
            ),
            ("py:class", "api/image_api.html#{}"): "matplotlib.image.AxesImage",
            ("py:class", "api/text_api.html#{}"): "matplotlib.text.Text",
        },
    ),
}

# What types are called in docstrings.
TYPES = {
    "array": "numpy.ndarray",
    "Axes": "matplotlib.axes.Axes",
    "AxesImage": "matplotlib.image.AxesImage",
    "bool": ":class:`python:bool`",
    "Bunch": "sklearn.utils.Bunch",
    "bytes": ":class:`python:bytes`",
    "callable": ":func:`callable <python:callable>`",
    "DeepFeatureExtractor": "deepfeat.DeepFeatureExtractor",
    "FeatureCache": "deepfeat.FeatureCache",
    "Figure": "matplotlib.figure.Figure",
    "FineTuneClassifier": "deepfeat.FineTuneClassifier",
    "GridSearchCV": "sklearn.model_selection.GridSearchCV",
    "Line2D": "matplotlib.lines.Line2D",
    "PIL": "PIL.Image.Image",
    "Text": "matplotlib.text.Text",
    "torch.device": ":class:`torch.device`",
    "torch.dtype": ":class:`torch.dtype`",
    "torch.nn.Module": ":class:`torch.nn.Module`",
}


def write_inventories(folder):
    """Write an inventory per project, and return `intersphinx_mapping`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    mapping = {}
    for project, (address, places) in PROJECTS.items():
        entries = "".join(
            f"{name} {kind} 1 {place.format(name)} -\n"
            for (kind, place), names in places.items()
            for name in names.split()
        )
        header = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n"
        header += "# The remainder of this file is compressed using zlib.\n"
        path = Path(folder, f"{project}.inv")
        path.write_bytes(header.encode() + zlib.compress(entries.encode()))
        mapping[project] = (address, str(path))
    return mapping


class LinkCode(SphinxPostTransform):
    """Let code that names something documented link to it: `list_layers`, `fit` of a class."""

    default_priority = 5  # before references are resolved

    def run(self):
        known = self.find_names()
        for code in list(self.document.findall(nodes.literal)):
            if isinstance(code.parent, nodes.title | nodes.reference | pending_xref):
                continue
            name = code.astext().removesuffix("()")
            target = known.get(find_class(code) + name) or known.get(name)
            if target:
                link = pending_xref("", refdomain="py", reftype="obj", reftarget=target)
                code.replace_self(link)
                link += code

    def find_names(self):
        """Return what text may call the things that are documented, with their full names."""
        documented = list(self.env.domains["py"].objects)
        known = {
            name.removeprefix(module): name
            for module in ("deepfeat.plotting.", "deepfeat.datasets.", "deepfeat.", "-")
            for name in documented
        }
        for _, places in PROJECTS.values():
            for name in " ".join(places.values()).split():
                if "." in name:
                    known[name] = name
                if name.startswith("sklearn."):
                    known[name.rpartition(".")[2]] = name
        return known


def find_class(node):
    """Return the full name of the class whose documentation a node is part of, and a dot."""
    while node := node.parent:
        if isinstance(node, desc) and node["objtype"] == "class":
            return f"{node[0]['module']}.{node[0]['fullname']}."
    return ""


def setup(app):
    app.add_post_transform(LinkCode)
    return {"parallel_read_safe": True}
