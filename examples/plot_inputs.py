"""
Every kind of input
===================

An image may come as a file, as bytes from a database, as an array or as a tensor. This example
passes the same photograph to the extractor in many forms, shows what the network sees of it, and
what happens to a file that is not an image.
"""

import io
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from deepfeat import DeepFeatureExtractor

palace, dahlia = load_sample_images().images
print(palace.shape, palace.dtype)

# %%
# One photograph, many forms
# --------------------------
#
# X is a sequence of images, each of which may have any of these forms. PNG is lossless, so the
# features must be equal to the last bit, whatever the form.

folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "palace.png"
Image.fromarray(palace).save(path)
scaled = palace.astype(np.float32) / 255

forms = {
    "a path": [path],
    "a path as text": [str(path)],
    "the bytes of a file": [path.read_bytes()],
    "a PIL image": [Image.open(path)],
    "an array (H, W, 3)": [palace],
    "an array (1, H, W, 3)": palace[np.newaxis],
    "an array (3, H, W)": [palace.transpose(2, 0, 1)],
    "floats from 0 to 1": [scaled],
    "16 bits per channel": [palace.astype(np.uint16) * 257],
    "a torch tensor": torch.from_numpy(scaled).permute(2, 0, 1)[None],
    "a pandas Series of paths": pd.Series([str(path)]),
    "a column of a DataFrame": pd.DataFrame({"photograph": [str(path)]}),
}
extractor = DeepFeatureExtractor("resnet10_slim", "stage4")
expected = extractor.fit_transform([palace])
for form, X in forms.items():
    same = np.array_equal(extractor.transform(X), expected)
    print(f"{form:<26}{'the same features' if same else 'OTHER FEATURES'}")

# %%
# The dtype determines the scale of the values: floats range from 0 to 1, and integers from 0 to the
# maximum of their type. If the scale were guessed from the values, the features of a dark image
# would depend on the other images of the batch.
#
# Tables of flattened images, such as scikit-learn's own datasets, need ``image_shape``.

grey = np.asarray(Image.fromarray(palace).convert("L"))
row = grey.reshape(1, -1)
flat = DeepFeatureExtractor("resnet10_slim", "stage4", image_shape=grey.shape)
print(row.shape, np.array_equal(flat.fit_transform(row), extractor.transform([grey])))

# %%
# What the network sees
# ---------------------
#
# The networks of torchvision expect square images. By default, an image is preprocessed as the
# weights require: its shorter side is resized, and the centre is cropped. This may cut off
# something important. ``resize="squash"`` keeps the whole image but distorts it, and
# ``resize="pad"`` keeps its aspect ratio on a background of the mean colour. ``preview`` shows the
# result before anything is computed.

pictures = {"the photograph": Image.fromarray(palace)}
for resize in ("weights", "squash", "pad"):
    extractor.set_params(resize=resize)
    (pictures[f'resize="{resize}"'],) = extractor.preview([palace])

figure, axes = plt.subplots(
    1, 4, figsize=(11, 2.9), layout="constrained", width_ratios=[1.5, 1, 1, 1]
)
for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
    axis.imshow(picture)
    axis.set_title(f"{title}\n{picture.width} x {picture.height}", fontsize="medium")
    axis.set_axis_off()
plt.show()

# %%
# All images are converted to three channels of 8 bits: transparent images are drawn on white, grey
# is copied to all channels, and photographs taken sideways are rotated upright.

transparent = Image.fromarray(dahlia).convert("RGBA")
transparent.putalpha(Image.radial_gradient("L").resize(transparent.size).point(lambda a: 255 - a))
sideways = io.BytesIO()
exif = Image.Exif()
exif[0x0112] = 8  # the orientation: to be rotated by 90 degrees for viewing
Image.fromarray(np.rot90(dahlia, -1)).save(sideways, "PNG", exif=exif)
palette = Image.fromarray(dahlia).quantize(6)
grey = Image.fromarray(dahlia).convert("L")

titles = ["transparent", "taken sideways", "palette of 6 colours", "grey"]
previews = extractor.set_params(resize="weights").preview(
    [transparent, sideways.getvalue(), palette, grey]
)
figure, axes = plt.subplots(1, 4, figsize=(11, 2.9), layout="constrained")
for axis, title, picture in zip(axes, titles, previews, strict=True):
    axis.imshow(picture)
    axis.set_title(title, fontsize="medium")
    axis.set_axis_off()
plt.show()

# %%
# Images that cannot be read
# --------------------------
#
# Among thousands of files, one is truncated or turns out to be an HTML page. By default, an error
# that names the file ends the run. With ``on_error="nan"`` its row is filled with NaN, the other
# rows stay where they are, and ``errors_`` contains the reason.

broken = Path(folder.name) / "broken.jpg"
broken.write_text("<html>404 Not Found</html>")
try:
    extractor.transform([palace, broken, dahlia])
except ValueError as error:
    print(error)

features = extractor.set_params(on_error="nan").transform([palace, broken, dahlia])
print("rows with NaN:", np.isnan(features).all(axis=1))
print("reasons:", extractor.errors_)
folder.cleanup()
