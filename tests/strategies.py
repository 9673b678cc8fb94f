"""Knows how hypothesis draws images."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import ExifTags, Image

MODES = (
    *("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"),
    *("I;16", "I;16L", "I;16B", "I", "F"),
)


def sides():
    """Draw a height or width that cannot be taken for a number of channels."""
    return st.integers(5, 12)


@st.composite
def pixels(draw, channels):
    """Draw a uint8 array (H, W, C), or (H, W) where the channels are None."""
    last = draw(st.sampled_from(channels))
    shape = draw(sides()), draw(sides())
    return draw(arrays(np.uint8, shape if last is None else (*shape, last)))


@st.composite
def pil_images(draw):
    """Draw a PIL image of any mode, palette and orientation."""
    mode, size = draw(st.sampled_from(MODES)), (draw(sides()), draw(sides()))
    blank = Image.new(mode, size)
    if mode == "F":
        image = Image.fromarray(draw(arrays("f4", size[::-1], elements=st.floats(0, 1, width=32))))
    elif mode == "I":
        image = Image.fromarray(draw(arrays("u1", size[::-1])).astype(np.int32) << 23)
    else:
        count = len(blank.tobytes())
        image = Image.frombytes(mode, size, draw(st.binary(min_size=count, max_size=count)))
    if mode in ("P", "PA"):
        image.putpalette(draw(st.binary(min_size=768, max_size=768)))
    image.getexif()[ExifTags.Base.Orientation] = draw(st.integers(1, 8))
    return image


def sources():
    """Draw what a sequence of images may hold; none of it need open."""
    return st.text() | st.binary() | st.none() | pixels([None, 3]) | pil_images()
