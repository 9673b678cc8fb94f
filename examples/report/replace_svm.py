"""Replacement of the SVM in the report: ReLU and a linear layer after a network's scores."""

from _report import (
    choose_network,
    draw_rows,
    load_images,
    make_row,
    parse_arguments,
    save_figure,
    write_table,
)

from deepfeat import FineTuneClassifier
from deepfeat.plotting import LearningCurveDisplay

REPORT = {"vgg16": 85.56}

args = parse_arguments(__doc__, backbones=REPORT)
images = load_images(args)
epochs = 2 if args.quick else 10
X, y = images.data, images.target_names[images.target]

rows = []
for backbone in args.backbones:
    classifier = FineTuneClassifier(
        head="append",
        unfreeze=None,
        max_epochs=epochs,
        random_state=0,
        verbose=not args.quick,
        **choose_network(args, backbone),
    )
    classifier.fit(X[images.train], y[images.train])
    accuracy = classifier.score(X[images.test], y[images.test])
    rows.append(make_row({"backbone": backbone}, accuracy, REPORT.get(backbone)))
    display = LearningCurveDisplay.from_estimator(classifier)
    display.figure_.suptitle(f"{backbone}, ReLU and a linear layer appended")
    save_figure(args, display.figure_, f"replace_svm_{backbone}.png")
for backbone in [name for name in REPORT if name not in args.backbones]:
    rows.append(make_row({"backbone": backbone}, None, REPORT[backbone]))

write_table(args, rows, "replace_svm.csv")
figure = draw_rows(rows, f"ReLU and a linear layer after the scores, {epochs} epochs")
save_figure(args, figure, "replace_svm.png")
