"""
Every kind of input
===================

A picture is the same picture as a file, as bytes from a database, as an array or as a tensor.
This example hands the same photograph to the extractor in many ways, looks at what the network
gets to see of it, and shows what becomes of a file that is none.
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
# One photograph, many ways
# -------------------------
#
# X is a sequence of images, and each of them may be any of these. PNG keeps pixels exactly, so the
# features must be equal to the last bit, whichever way the photograph came.

folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "palace.png"
Image.fromarray(palace).save(path)
scaled = palace.astype(np.float32) / 255

ways = {
    "a path": [path],
    "a path as text": [str(path)],
    "the bytes of a file": [path.read_bytes()],
    "a PIL image": [Image.open(path)],
    "an array (H, W, 3)": [palace],
    "an array (1, H, W, 3)": palace[np.newaxis],
    "an array (3, H, W)": [palace.transpose(2, 0, 1)],
    "floats from 0 to 1": [scaled],
    "16 bits a channel": [palace.astype(np.uint16) * 257],
    "a torch tensor": torch.from_numpy(scaled).permute(2, 0, 1)[None],
    "a pandas Series of paths": pd.Series([str(path)]),
    "a column of a DataFrame": pd.DataFrame({"photograph": [str(path)]}),
}
extractor = DeepFeatureExtractor("resnet10_slim", "stage4")
expected = extractor.fit_transform([palace])
for way, X in ways.items():
    same = np.array_equal(extractor.transform(X), expected)
    print(f"{way:<26}{'the same features' if same else 'OTHER FEATURES'}")

# %%
# The type of the numbers decides their scale, never their values: floats are read from 0 to 1,
# integers from 0 to the largest of their type. Were the scale guessed from the values, the features
# of a dark picture would depend on the pictures that came with it.
#
# Tables of flattened images, as scikit-learn's own data sets have them, need to be told their
# shape.

grey = np.asarray(Image.fromarray(palace).convert("L"))
row = grey.reshape(1, -1)
flat = DeepFeatureExtractor("resnet10_slim", "stage4", image_shape=grey.shape)
print(row.shape, np.array_equal(flat.fit_transform(row), extractor.transform([grey])))

# %%
# What the network sees
# ---------------------
#
# The networks of torchvision want squares. By default a photograph is treated as the weights were
# trained: its short side is resized, and the middle is cut out. That may lose what matters:
# ``resize="squash"`` shows the whole picture out of proportion, and ``resize="pad"`` keeps its
# proportions on a ground of the mean colour. ``preview`` tells what becomes of a picture before
# anything is computed.

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
# Pictures that are not three channels of 8 bits are turned into such: transparency is laid on
# white, grey is copied to all channels, and a photograph that a camera held sideways is turned
# upright.

transparent = Image.fromarray(dahlia).convert("RGBA")
transparent.putalpha(Image.radial_gradient("L").resize(transparent.size).point(lambda a: 255 - a))
sideways = io.BytesIO()
exif = Image.Exif()
exif[0x0112] = 8  # the orientation: turn by 90 degrees to look at it
Image.fromarray(np.rot90(dahlia, -1)).save(sideways, "PNG", exif=exif)
palette = Image.fromarray(dahlia).quantize(6)
grey = Image.fromarray(dahlia).convert("L")

titles = ["transparent", "turned by its camera", "6 colours of a palette", "grey"]
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
# What cannot be read
# -------------------
#
# Among thousands of files there is one that was cut off, or is a page of HTML. By default it ends
# the run, with an error that names it. With ``on_error="nan"`` its row is NaN, no other row moves,
# and ``errors_`` has the reason.

broken = Path(folder.name) / "broken.jpg"
broken.write_text("<html>404 Not Found</html>")
try:
    extractor.transform([palace, broken, dahlia])
except ValueError as error:
    print(error)

features = extractor.set_params(on_error="nan").transform([palace, broken, dahlia])
print("rows of NaN:", np.isnan(features).all(axis=1))
print("their reasons:", extractor.errors_)
folder.cleanup()
