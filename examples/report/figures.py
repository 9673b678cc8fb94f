"""Figures of the report: architecture, activation maps and predictions of a network."""

import numpy as np
from _report import (
    choose_network,
    load_images,
    parse_arguments,
    save_figure,
    write_table,
)
from sklearn.datasets import load_sample_images

from deepfeat import DeepFeatureExtractor, list_layers, predict_categories
from deepfeat.plotting import ActivationMapDisplay, ArchitectureDisplay, PredictionDisplay

FULLY_CONNECTED = (
    123_642_856  # number of parameters in VGG16's fc6, fc7 and fc8, according to the report
)

args = parse_arguments(__doc__, backbones=["vgg16"], quick_backbones=["vgg16", "resnet10_slim"])
images = load_images(args)
one_of_each = np.unique(images.target, return_index=True)[1][:4]
photographs = [*load_sample_images().images, *images.data[one_of_each]]
captions = ["china.jpg", "flower.jpg", *images.target_names[images.target[one_of_each]]]

rows = []
for backbone in args.backbones:
    network = choose_network(args, backbone)
    display = ArchitectureDisplay.from_backbone(backbone)
    save_figure(args, display.figure_, f"architecture_{backbone}.png")
    layers = list_layers(backbone)
    linear = sum(layer.parameters for layer in layers if layer.kind == "Linear")
    rows.append(
        {
            "backbone": backbone,
            "parameters": sum(layer.parameters for layer in layers),
            "of these fully connected": linear,
            "report": FULLY_CONNECTED if backbone == "vgg16" else "",
        }
    )

    relus = [layer for layer in layers if layer.kind == "ReLU"]
    for layer in [layers[0], *relus[:1]]:  # the first convolution and its ReLU
        display = ActivationMapDisplay.from_extractor(
            DeepFeatureExtractor(**network), photographs[0], layer=layer.name
        )
        save_figure(args, display.figure_, f"maps_{backbone}_{layer.name}.png")

    if network["weights"] is None:
        print(f"{backbone} has random weights, so it predicts no categories")
        continue
    predictions = predict_categories(images=photographs, **network)
    display = PredictionDisplay.from_predictions(photographs, predictions)
    for ax, caption in zip(display.axes_[:, 0], captions, strict=True):
        ax.set_title(caption, fontsize="medium")
    save_figure(args, display.figure_, f"predictions_{backbone}.png")
    for caption, pairs in zip(captions, predictions, strict=True):
        print(f"{caption}:", ", ".join(f"{name} {share:.1%}" for name, share in pairs))

write_table(args, rows, "figures.csv")
