"""Classify images with a file of deepfeat.onnx: python predict.py FILE IMAGE [IMAGE ...]"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def prepare(path, steps):
    """Read an image, and resize and crop it as the file says."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    width, height = size = steps["crop_size"][::-1]  # in Pillow the width comes first
    if steps["resize"] == "short side":
        resized = [int(steps["resize_size"] * side / min(image.size)) for side in image.size]
    elif steps["resize"] == "stretch":
        resized = steps["resize_size"][::-1]
    elif steps["resize"] == "pad":
        scale = min(width / image.width, height / image.height)
        resized = [max(1, round(side * scale)) for side in image.size]
    else:
        raise ValueError(f"{path}: this program does not know how to resize by {steps['resize']}")
    image = image.resize(resized, Image.Resampling[steps["interpolation"].upper()])
    canvas = Image.new("RGB", size, tuple(steps.get("fill", (0, 0, 0))))
    gaps = [side - own for side, own in zip(size, resized, strict=True)]  # negative: cut off
    canvas.paste(image, [gap // 2 if gap > 0 else -round(-gap / 2) for gap in gaps])
    return np.asarray(canvas)


if __name__ == "__main__":
    _, file, *paths = sys.argv
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    steps, classes = json.loads(metadata["preprocessing"]), json.loads(metadata["classes"])
    for path in paths:
        label, scores = session.run(None, {"images": prepare(path, steps)[None]})
        print(path, classes[label[0]], *np.ravel(scores), sep="\t")
