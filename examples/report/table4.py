"""Table 4 of the report: networks fine-tuned from different blocks on."""

import time

from _report import (
    choose_network,
    draw_rows,
    load_images,
    make_row,
    parse_arguments,
    save_figure,
    write_table,
)

from deepfeat import FineTuneClassifier, list_layers

BLOCKS = [
    "layer4",
    "layer3",
    "layer2",
    "all",
]  # the first trained block; all later ones are trained as well
REPORT = {
    "resnet34": [92.56, 92.56, 92.70, 92.10],
    "resnet50": [93.03, 93.20, 93.37, 91.50],
    "resnet152": [92.50, 93.60, 92.60, 92.46],
}


def choose_blocks(backbone):
    """Return the report's blocks; of other networks, the last three stages, and "all"."""
    aliases = [alias for layer in list_layers(backbone) for alias in layer.aliases]
    if {"layer2", "layer3", "layer4"} <= set(aliases):
        return BLOCKS
    stages = [alias for alias in aliases if alias.removeprefix("stage").isdigit()]
    return [*stages[:-4:-1], "all"]


args = parse_arguments(__doc__, backbones=REPORT)
images = load_images(args)
epochs = 2 if args.quick else 10
X, y = images.data, images.target_names[images.target]

rows = []
for backbone in args.backbones:
    reported = REPORT.get(backbone, [None] * len(BLOCKS))
    for block, figure in zip(choose_blocks(backbone), reported, strict=False):
        classifier = FineTuneClassifier(
            unfreeze=block,
            max_epochs=epochs,
            head_epochs=0,  # the report trains all at once
            backbone_learning_rate=1e-4,
            random_state=0,
            verbose=not args.quick,
            **choose_network(args, backbone),
        )
        start = time.perf_counter()
        classifier.fit(X[images.train], y[images.train])
        accuracy = classifier.score(X[images.test], y[images.test])
        seconds = time.perf_counter() - start
        # At once, as the next one may take long.
        print(f"{backbone}, {block}: {100 * accuracy:.2f} % in {seconds:.0f} s", flush=True)
        rows.append(make_row({"backbone": backbone, "unfrozen from": block}, accuracy, figure))
for backbone in [name for name in REPORT if name not in args.backbones]:
    for block, figure in zip(BLOCKS, REPORT[backbone], strict=True):
        rows.append(make_row({"backbone": backbone, "unfrozen from": block}, None, figure))

write_table(args, rows, "table4.csv")
save_figure(args, draw_rows(rows, f"Fine-tuned, {epochs} epochs"), "table4.png")
