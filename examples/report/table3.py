"""Table 3 of the report: a linear SVM on the penultimate features of several networks."""

from _report import (
    choose_network,
    draw_rows,
    find_penultimate,
    load_images,
    make_row,
    parse_arguments,
    save_figure,
    write_table,
)
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from deepfeat import DeepFeatureExtractor

REPORT = {
    "alexnet": 87.14,
    "vgg16": 88.81,
    "vgg19": 88.91,
    "resnet34": 90.52,
    "resnet50": 91.02,
    "resnet152": 92.26,
}

args = parse_arguments(__doc__, backbones=REPORT)
images = load_images(args)
X, y = images.data, images.target_names[images.target]

rows = []
for backbone in args.backbones:
    layer = find_penultimate(backbone)
    extractor = DeepFeatureExtractor(
        layer=layer, verbose=not args.quick, **choose_network(args, backbone)
    )
    pipe = make_pipeline(extractor, LinearSVC(C=1, random_state=0))
    pipe.fit(X[images.train], y[images.train])
    accuracy = pipe.score(X[images.test], y[images.test])
    names = {"backbone": backbone, "layer": layer}
    rows.append(make_row(names, accuracy, REPORT.get(backbone)))
for backbone in [name for name in REPORT if name not in args.backbones]:
    names = {"backbone": backbone, "layer": find_penultimate(backbone)}
    rows.append(make_row(names, None, REPORT[backbone]))

write_table(args, rows, "table3.csv")
figure = draw_rows(rows, "LinearSVC (C = 1) on penultimate features, L2 norm")
save_figure(args, figure, "table3.png")
