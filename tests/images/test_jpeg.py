"""JPEGs: a thousand odd and broken ones, decoded by simplejpeg as by Pillow, bit for bit."""

import functools
import io
import itertools
import struct
import sys
import warnings

import numpy as np
import pytest
from numpy.testing import assert_array_equal, assert_equal
from PIL import ExifTags, Image, ImageCms, ImageFile

from deepfeat._images import decoding
from deepfeat._images.records import ImageError, as_records

SUBSAMPLINGS = "4:4:4", "4:2:2", "4:2:0"
SIDES = 1, 2, 3, 7, 8, 9, 16, 17, 33, 50, 70

# Making JPEGs -----------------------------------------------------------------------------------


@functools.cache
def picture(mode="RGB", size=(33, 21)):
    """Make an image with flat, smooth and noisy parts, of colours and without."""
    rng = np.random.default_rng(list(size))
    coarse = rng.integers(0, 256, (4, 4, 4), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse, "RGBA").resize(size)).astype(int)
    noise = rng.integers(-40, 41, smooth.shape) * (np.arange(size[0]) % 20 < 10)[:, None]
    inks = (smooth + noise).clip(0, 255).astype(np.uint8)
    if mode == "CMYK":
        return Image.frombytes("CMYK", size, inks.tobytes())
    return Image.fromarray(inks[..., :3]).convert(mode)


def encode(mode="RGB", size=(33, 21), format="JPEG", **options):
    file = io.BytesIO()
    picture(mode, size).save(file, format, **options)
    return file.getvalue()


def segment(marker, data):
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def insert(data, *segments):
    """Insert segments at the start of a JPEG."""
    return data[:2] + b"".join(segments) + data[2:]


def find(data, *markers):
    """Find the first of some markers among a JPEG's segments."""
    position = 2
    while data[position + 1] not in markers:
        position += 2 + struct.unpack_from(">H", data, position + 2)[0]
    return position


def change(data, position, *values):
    return data[:position] + bytes(values) + data[position + len(values) :]


def make_exif(value, type=3, tag=ExifTags.Base.Orientation, order="<", count=1):
    """Write EXIF data with a single tag, whose value is at most four bytes."""
    start = b"II*\0\x08\0\0\0" if order == "<" else b"MM\0*\0\0\0\x08"
    entry = struct.pack(order + "HHHI", 1, tag, type, count)
    return segment(0xE1, b"Exif\0\0" + start + entry + value.ljust(4, b"\0") + bytes(4))


def all_qualities():
    for quality in range(1, 101):
        mode = "L" if quality % 5 == 0 else "RGB"
        yield encode(mode, (29, 23), quality=quality, subsampling=SUBSAMPLINGS[quality % 3])
        yield encode(mode, (16, 40), quality=quality, progressive=True)


def all_options():
    restarts = [{}, {"restart_marker_blocks": 1}, {"restart_marker_blocks": 5}]
    restarts += [{"restart_marker_rows": 1}, {"restart_marker_rows": 2}]
    for subsampling, progressive, optimize, restart in itertools.product(
        SUBSAMPLINGS, (False, True), (False, True), restarts
    ):
        options = {"progressive": progressive, "optimize": optimize, **restart}
        yield encode(subsampling=subsampling, **options)
        if subsampling == "4:4:4":
            yield encode(keep_rgb=True, **options)
            yield encode("L", **options)
            yield encode("CMYK", **options)
    for options in ({"smooth": 50}, {"dpi": (300, 72)}, {"qtables": [[1 + i for i in range(64)]]}):
        yield encode(**options)
        yield encode("L", **options)
    for preset in ("web_low", "web_maximum", "low", "high", "maximum"):
        yield encode(quality=preset)


def all_sizes():
    for number, size in enumerate(itertools.product(SIDES, SIDES)):
        mode = "L" if number % 7 == 0 else "RGB"
        progressive = number % 4 == 0
        yield encode(mode, size, subsampling=SUBSAMPLINGS[number % 3], progressive=progressive)


def all_orientations():
    for orientation, order in itertools.product([*range(10), 255, 65535], "<>"):
        exif = make_exif(struct.pack(order + "H", orientation), order=order)
        for mode, subsampling in (("RGB", "4:2:0"), ("RGB", "4:4:4"), ("L", "4:4:4")):
            yield insert(encode(mode, subsampling=subsampling), exif)


def odd_orientations():
    """Write orientations of wrong types and counts, twice, or not as EXIF, and broken data."""
    plain = encode()
    right = make_exif(b"\6")
    for type, count in itertools.product(range(15), (0, 1, 2, 4, 5, 2**31)):
        yield insert(plain, make_exif(b"\6", type, count=count))
    for stop in range(0, len(right), 2):
        yield insert(plain, segment(0xE1, right[4:stop]))
    rng = np.random.default_rng(1)
    for position in range(4, len(right)):
        yield insert(plain, change(right, position, int(rng.integers(256))))
    yield insert(plain, right, make_exif(b"\3"))
    yield insert(plain, segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0"), right)
    for form in ('tiff:Orientation="8"', "<tiff:Orientation>8</tiff:Orientation>"):
        yield encode(xmp=f"<x:xmpmeta>{form}</x:xmpmeta>".encode())
    # That of the thumbnail, in a second directory, is another one.
    both = right[4:-4] + struct.pack("<I", 26) + make_exif(b"\3")[18:]
    yield insert(plain, segment(0xE1, both))


def damaged_exif():
    """Change bytes of EXIF data with several directories, texts, fractions and notes."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "Camera"
    exif[ExifTags.Base.XResolution] = 72.5
    shot, place = exif.get_ifd(ExifTags.IFD.Exif), exif.get_ifd(ExifTags.IFD.GPSInfo)
    shot[ExifTags.Base.ExposureTime] = 0.01
    shot[ExifTags.Base.ISOSpeedRatings] = (100, 200)
    shot[ExifTags.Base.MakerNote] = b"abc" * 20
    place[ExifTags.GPS.GPSLatitudeRef] = "N"
    place[ExifTags.GPS.GPSLatitude] = (1.0, 2.0, 3.5)
    data = encode(exif=exif)
    start = find(data, 0xE1)
    rng = np.random.default_rng(3)
    for position in range(start + 10, find(data, 0xDB)):
        for value in (data[position] ^ (1 << int(rng.integers(8))), int(rng.integers(256))):
            yield change(data, position, value)


def other_metadata():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for mode in ("RGB", "L"):
        yield encode(mode, icc_profile=profile)
        yield encode(mode, icc_profile=bytes(range(256)) * 600)  # in three segments
        yield encode(mode, comment=b"a comment" * 1000)
        yield encode(mode, comment=b"\xff\xd8\xff\xd9\xff\xda")
        yield encode(mode, extra=segment(0xED, b"Photoshop 3.0\0" + bytes(99)))
        for marker in [*range(0xE0, 0xF0), 0xFE]:
            yield insert(encode(mode), segment(marker, b""), segment(marker, b"\0" * 50))
            yield insert(encode(mode), segment(marker, b"\xff" * 65533))
    yield insert(encode(), encode()[2:20], segment(0xE1, b"Exif\0\0" + encode()))
    for padding in range(1, 4):
        position = find(encode(), 0xDB)
        yield encode()[:position] + b"\xff" * padding + encode()[position:]


def color_spaces():
    """Name other color spaces: by the transform of Adobe's segment, by the components' names."""
    for mode, keep_rgb in (("RGB", False), ("RGB", True), ("L", False)):
        data = encode(mode, keep_rgb=keep_rgb)
        bare = data[:2] + data[find(data, 0xDB) :]
        for start, transform in itertools.product((data, bare), (None, *range(4), 255)):
            name = b"Adobe\0\x64\0\0\0\0" + bytes([transform or 0])
            yield insert(start, *[segment(0xEE, name)] * (transform is not None))
        for names in (b"\1\2\3", b"RGB", b"\0\1\2", b"rgb", b"\1\x22\x23"):
            for start in (data, bare):
                named = bytearray(start)
                frame, scan = find(start, 0xC0), find(start, 0xDA)
                for index, name in enumerate(names[: 3 if mode == "RGB" else 1]):
                    named[frame + 10 + 3 * index] = named[scan + 5 + 2 * index] = name
                yield bytes(named)


def layouts():
    """Give components other sampling factors, with as many blocks in a unit: 4:4:0, say."""
    for size in ((16, 16), (48, 32), (30, 13), (1, 1)):
        half = encode(size=size, subsampling="4:2:2")
        yield change(half, find(half, 0xC0) + 11, 0x12)
        quarter = encode(size=size, subsampling="4:2:0")
        for factors in (0x41, 0x14):
            yield change(quarter, find(quarter, 0xC0) + 11, factors)
        grey = encode("L", size=size)
        for factors in (0x22, 0x21, 0x44, 0x31):
            yield change(grey, find(grey, 0xC0) + 11, factors)


def several_pictures():
    exif = make_exif(b"\6")[4:]
    for mode, other, options in itertools.product(
        ("RGB", "L"),
        (picture(), picture("RGB", (70, 50)), picture("L")),
        ({}, {"progressive": True}, {"exif": exif}),
    ):
        yield encode(mode, format="MPO", save_all=True, append_images=[other], **options)
    yield encode() + encode("L", (8, 8))
    yield encode(progressive=True) * 3


def garbage_at_the_end():
    for data in (encode(), encode("L"), encode(progressive=True)):
        for tail in (b"\0", b"\xff", bytes(4), b"\xff\xd9", b"\xff\xd8", b"text" * 999, data[:99]):
            yield data + tail


def cut():
    """Cut files anywhere, with and without a marker of the end."""
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 2}, {"mode": "L"}):
        data = encode(**options)
        stops = [*range(0, len(data), max(1, len(data) // 30)), *range(len(data) - 9, len(data))]
        for stop in stops:
            yield data[:stop]
            yield data[:stop] + b"\xff\xd9"
    both = encode(format="MPO", save_all=True, append_images=[picture()])
    for stop in range(len(both) // 2, len(both), len(both) // 20):
        yield both[:stop]


def garbage_inside():
    """Insert bytes before the marker of the end and into the compressed pixels."""
    for data in (encode(), encode("L"), encode(progressive=True, restart_marker_rows=1)):
        start = find(data, 0xDA) + 20
        for position in (len(data) - 2, start, (start + len(data)) // 2):
            for filling in (b"\0", b"\xff", b"\xff\0", b"\xff\xd0", bytes(9), b"\xff\xfe\0\4ab"):
                yield data[:position] + filling + data[position:]


def flipped():
    """Change single bytes anywhere: in tables, headers, compressed pixels and markers."""
    rng = np.random.default_rng(2)
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 2}, {"mode": "L"}):
        data = encode(**options)
        for position in rng.integers(2, len(data), 120).tolist():
            yield change(data, position, data[position] ^ (1 << int(rng.integers(8))))
        for position in rng.integers(find(data, 0xDA), len(data), 30).tolist():
            yield change(data, position, int(rng.integers(256)))


def other_headers():
    """Change sides, depth, number of components and process in the header of the frame."""
    for data in (encode(), encode("L"), encode(progressive=True)):
        frame = find(data, 0xC0, 0xC2)
        for low, high in ((5, 6), (7, 8)):
            for value in (0, 1, 8, 20, 22, 24, 25, 34, 64, 300, 65535):
                yield change(change(data, frame + low, value >> 8), frame + high, value & 255)
        for depth in (0, 2, 12, 16):
            yield change(data, frame + 4, depth)
        for count in (0, 1, 2, 3, 4):
            yield change(data, frame + 9, count)
        for marker in {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}:
            yield change(data, frame + 1, marker)
        yield data[:frame] + data[frame : find(data, 0xC4)] * 2 + data[find(data, 0xC4) :]


# Comparing --------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch):
    """The images that simplejpeg has decoded so far."""
    decode = decoding._find_jpeg_decoder()
    images = []

    def note(*args, **options):
        images.append(decode(*args, **options))
        return images[-1]

    monkeypatch.setattr(decoding, "_find_jpeg_decoder", lambda: note)
    return images


def read(data):
    """Return the pixels of a file, or why it was refused, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = as_records([data])[0].open()
        except ImageError as error:
            found = str(error)
    return found, {str(warning.message) for warning in caught}


def read_by_pillow(data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "_find_jpeg_decoder", lambda: None)
        return read(data)


# How many there are, and how many of them simplejpeg must decode: all that are good and in RGB.
FILES = {
    "qualities": (all_qualities, 200, 200),
    "options": (all_options, 131, 111),
    "sizes": (all_sizes, 121, 121),
    "orientations": (all_orientations, 72, 72),
    "odd orientations": (odd_orientations, 145, 145),
    "other metadata": (other_metadata, 82, 82),
    "color spaces": (color_spaces, 66, 60),
    "layouts": (layouts, 28, 24),
    "several pictures": (several_pictures, 20, 20),
    "garbage at the end": (garbage_at_the_end, 21, 21),
    "garbage inside": (garbage_inside, 54, 20),
    "cut": (cut, 329, 15),
    "flipped": (flipped, 600, 300),
    "other headers": (other_headers, 135, 15),
}


@pytest.mark.parametrize(("make", "count", "least"), FILES.values(), ids=FILES)
def test_simplejpeg_decodes_as_pillow_does(make, count, least, decoded):
    """The same pixels, bit for bit, or the same error, and the same warnings."""
    files = list(make())
    assert_equal(len(files), count)
    check_all(files)
    assert len(decoded) >= least


def check_all(files):
    for data in files:
        found, warned = read(data)
        expected, expected_warned = read_by_pillow(data)
        assert_array_equal(found, expected)
        assert_equal(warned, expected_warned)


def test_cmyk_is_left_to_pillow(decoded):
    """It has four channels, which Pillow mixes."""
    read(encode("CMYK"))
    assert not decoded


@pytest.mark.parametrize("stop", [None, -40])
def test_truncated_files_that_pillow_shall_load_are_left_to_it(stop, decoded, monkeypatch):
    """simplejpeg would refuse them, or fill in something else."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    found, _ = read(encode()[:stop])
    with Image.open(io.BytesIO(encode()[:stop])) as image:
        assert_array_equal(found, image)
    assert not decoded


def test_pixels_of_another_size_than_the_header_says_are_not_taken(monkeypatch):
    """The file may have been replaced since its header was read; Pillow has it open."""
    other = np.zeros((5, 5, 3), dtype=np.uint8)
    monkeypatch.setattr(decoding, "_find_jpeg_decoder", lambda: lambda *args, **options: other)
    assert_array_equal(read(encode())[0], read_by_pillow(encode())[0])


def test_jpegs_are_read_without_simplejpeg(monkeypatch):
    """It is optional: where it is not installed, Pillow decodes."""
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    decoding._find_jpeg_decoder.cache_clear()
    try:
        assert decoding._find_jpeg_decoder() is None
        assert_array_equal(read(encode())[0], Image.open(io.BytesIO(encode())))
    finally:
        decoding._find_jpeg_decoder.cache_clear()
