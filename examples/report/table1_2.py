"""Tables 1 and 2 of the report: a linear SVM for several layers, norms and values of C."""

import time

import matplotlib.pyplot as plt
from _report import (
    choose_network,
    load_images,
    make_row,
    parse_arguments,
    save_figure,
    write_table,
)
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from deepfeat import DeepFeatureExtractor, list_layers
from deepfeat.plotting import LayerGridDisplay

CS = [1e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 1e-1, 1, 5, 10, 100]
TABLES = {1: None, 2: "l2"}  # the norm of the features
REPORT = {  # the best accuracy of each row
    ("vgg16", 1, "relu6"): 90.85,
    ("vgg16", 1, "relu7"): 88.98,
    ("vgg16", 1, "relu8"): 87.34,
    ("vgg16", 2, "relu6"): 90.82,
    ("vgg16", 2, "relu7"): 88.81,
    ("vgg16", 2, "relu8"): 87.37,
}


def choose_layers(backbone):
    """Return the report's layers; of other networks, the last two stages and the scores."""
    layers = list_layers(backbone)
    names = [layer.name for layer in layers]
    if {"relu6", "relu7", "relu8"} <= set(names):
        return ["relu6", "relu7", "relu8"]
    stages = [
        alias
        for layer in layers
        for alias in layer.aliases
        if alias.removeprefix("stage").isdigit()
    ]
    return [*stages[-2:], names[-1]]


args = parse_arguments(__doc__, backbones=["vgg16"], quick_backbones=["vgg16"])
images = load_images(args)
X, y = images.data, images.target_names[images.target]

best = []
for backbone in args.backbones:
    layers = choose_layers(backbone)
    figure, axes = plt.subplots(2, figsize=(11, 5.5), layout="constrained")
    for (table, norm), ax in zip(TABLES.items(), axes, strict=True):
        extractor = DeepFeatureExtractor(
            norm=norm, verbose=not args.quick, **choose_network(args, backbone)
        )
        search = GridSearchCV(
            make_pipeline(extractor, LinearSVC(random_state=0)),
            {"deepfeatureextractor__layer": layers, "linearsvc__C": CS},
            cv=[(images.train, images.test)],
            refit=False,
        )
        start = time.perf_counter()
        search.fit(X, y)
        print(f"\nTable {table}, {backbone}: {time.perf_counter() - start:.0f} s", end="")
        display = LayerGridDisplay.from_search(
            search, ax=ax, score_name="score", values_format=".4f"
        )
        ax.set_title(f"Table {table}: {backbone}, norm={norm!r}")
        grid = []
        for layer, scores in zip(display.layers, display.scores, strict=True):
            columns = {f"{c:g}": f"{100 * score:.2f}" for c, score in zip(CS, scores, strict=True)}
            grid.append({"layer": layer} | columns)
            names = {"backbone": backbone, "table": table, "layer": layer}
            best_c = {"best C": f"{CS[scores.argmax()]:g}"}
            reported = REPORT.get((backbone, table, layer))
            best.append(make_row(names | best_c, scores.max(), reported))
        write_table(args, grid, f"table{table}_{backbone}.csv")
    save_figure(args, figure, f"table1_2_{backbone}.png")

if "vgg16" not in args.backbones:
    for (backbone, table, layer), reported in REPORT.items():
        names = {"backbone": backbone, "table": table, "layer": layer, "best C": ""}
        best.append(make_row(names, None, reported))
write_table(args, best, "table1_2.csv")
