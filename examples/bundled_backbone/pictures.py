"""Training pictures of the bundled backbone: drawings from formulas, crops of photographs."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw
from scipy.spatial import cKDTree
from skimage import data
from sklearn.datasets import load_sample_images

SIDE = 128
Rng = np.random.Generator
Texture = Callable[[np.ndarray, np.ndarray], np.ndarray]

ACROSS, DOWN = np.meshgrid(np.linspace(-1, 1, SIDE), np.linspace(-1, 1, SIDE))


def draw(family: str, rng: Rng) -> np.ndarray:
    """Draw a picture of a family as 8-bit RGB of shape (SIDE, SIDE, 3)."""
    picture = FAMILIES[family](rng)
    if picture.ndim == 2:
        picture = coloured(rng, picture)
    return (255 * np.clip(picture, 0, 1)).astype(np.uint8)


def photographs() -> dict[str, np.ndarray]:
    """Load the photographs that come with scikit-image and scikit-learn."""
    names = """astronaut brick camera cell chelsea clock coffee coins grass gravel
        hubble_deep_field immunohistochemistry retina rocket text"""
    loaded = {name: getattr(data, name)() for name in names.split()}
    samples = load_sample_images()
    loaded |= dict(zip(("china", "flower"), samples.images, strict=True))
    return {name: as_rgb(pixels) for name, pixels in loaded.items()}


def crop(photograph: np.ndarray, rng: Rng) -> np.ndarray:
    """Crop a square of random size and position as 8-bit RGB of shape (SIDE, SIDE, 3)."""
    height, width = photograph.shape[:2]
    side = np.exp(rng.uniform(np.log(min(96, height)), np.log(min(height, width))))
    left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
    image = Image.fromarray(photograph)
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box))


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype != np.uint8:
        pixels = (255 * pixels).astype(np.uint8)
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)


# Parts ------------------------------------------------------------------------------------------


def scaled(values: np.ndarray) -> np.ndarray:
    """Stretch to the range from 0 to 1, clipping a few outliers."""
    low, high = np.percentile(values, (0.5, 99.5))
    return np.clip((values - low) / (high - low + 1e-9), 0, 1)


def noise(rng: Rng, slope: float, stretch: float = 1.0) -> np.ndarray:
    """Draw tileable noise whose amplitude falls as a power of the frequency."""
    rows = np.fft.fftfreq(SIDE)[:, None] * stretch
    columns = np.fft.rfftfreq(SIDE)[None] / stretch
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = np.inf
    spectrum = rng.standard_normal(frequency.shape) + 1j * rng.standard_normal(frequency.shape)
    return scaled(np.fft.irfft2(spectrum / frequency**slope, s=(SIDE, SIDE)))


def coloured(rng: Rng, grey: np.ndarray) -> np.ndarray:
    """Colour a grey picture with two to four colours, from dark to bright or in any order."""
    levels = np.linspace(0, 1, rng.integers(2, 5)) + rng.normal(0, 0.15)
    if rng.random() < 0.2:
        levels = rng.permutation(levels)
    colours = levels[:, None] + rng.uniform(0, 0.8) * (rng.random((len(levels), 3)) - 0.5)
    stops = np.linspace(0, 1, len(colours))
    return np.stack([np.interp(grey, stops, colours[:, channel]) for channel in range(3)], axis=2)


def warped(rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    """Distort the plane by a random homography and some waves."""
    angle, scale = rng.uniform(0, 2 * np.pi), np.exp(rng.uniform(-0.7, 1))
    depth = 1 + rng.uniform(-0.7, 0.7) * ACROSS * rng.random() + rng.uniform(-0.8, 0.8) * DOWN
    depth = np.maximum(depth, 0.1) if rng.random() < 0.6 else 1.0
    x = scale * (np.cos(angle) * ACROSS + np.sin(angle) * DOWN) / depth
    y = scale * (np.cos(angle) * DOWN - np.sin(angle) * ACROSS) / depth
    if rng.random() < 0.4:
        strength = rng.uniform(0, 0.6)
        x, y = x + strength * noise(rng, 2), y + strength * noise(rng, 2)
    return x, y


def texture(rng: Rng) -> Texture:
    """Choose a grey pattern that covers the plane."""
    low, high = np.sort(rng.uniform(0, 1, 2))
    across, down = np.exp(rng.uniform(0.5, 3, 2))

    def stripes(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return np.sin(across * np.pi * u) > share

    def checks(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return (np.floor(across * u) + np.floor(down * v)) % 2

    def bricks(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        row = np.floor(down * v)
        return ((across * u + 0.5 * (row % 2)) % 1 > joint) & ((down * v) % 1 > joint)

    def tile(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        rows, columns = (v * SIDE / 2).astype(int) % SIDE, (u * SIDE / 2).astype(int) % SIDE
        return grain[rows, columns]

    share, joint = rng.uniform(-0.8, 0.8), rng.uniform(0.08, 0.5)
    grain = noise(rng, rng.uniform(0.3, 2), np.exp(rng.normal(0, 0.6)))
    pattern = rng.choice(np.array([stripes, checks, bricks, tile, tile, tile]))
    rough = rng.uniform(0, 0.4) if pattern is not tile else 0.0
    return lambda u, v: (low + (high - low) * pattern(u, v)) * (1 - rough * tile(u, v))


class Canvas:
    """A canvas of twice the size, so that edges become smooth."""

    def __init__(self, colour: float | np.ndarray):
        self._image = Image.new("RGB", (2 * SIDE, 2 * SIDE), ink(colour))
        self.pen = ImageDraw.Draw(self._image)

    def pixels(self) -> np.ndarray:
        return np.asarray(self._image.reduce(2), dtype=np.float32) / 255


def ink(colour: float | np.ndarray) -> tuple[int, ...]:
    channels = np.broadcast_to(np.asarray(colour), 3)
    return tuple(int(255 * np.clip(channel, 0, 1)) for channel in channels)


def points(*pairs: tuple[float, float]) -> list[tuple[float, float]]:
    """Convert coordinates from -1 to 1 to those of a canvas."""
    return [((x + 1) * SIDE, (y + 1) * SIDE) for x, y in pairs]


def outline(rng: Rng, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Draw a closed contour around a point: a polygon, an ellipse, a star or a blob."""
    count = rng.choice([3, 4, 4, 4, 5, 6, 8, 40])
    if rng.random() < 0.3:
        angles = np.sort(rng.uniform(0, 2 * np.pi, count))
    else:
        angles = rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(count) / count
    radii = radius * (1 + rng.uniform(0, 0.6) * np.sin(rng.integers(1, 9) * angles))
    flat, turn = rng.uniform(0.25, 1), rng.uniform(0, np.pi)
    along, aside = radii * np.cos(angles), flat * radii * np.sin(angles)
    xs = x + np.cos(turn) * along - np.sin(turn) * aside
    ys = y + np.sin(turn) * along + np.cos(turn) * aside
    return points(*zip(xs, ys, strict=True))


# Families ---------------------------------------------------------------------------------------


def clouds(rng: Rng) -> np.ndarray:
    """Noise of one slope: stretched, folded or quantised."""
    grey = noise(rng, rng.uniform(0.4, 2.4), np.exp(rng.normal(0, 0.7)))
    change = rng.integers(4)
    if change == 0:
        grey = np.abs(2 * grey - 1) ** rng.uniform(0.3, 1.5)
    elif change == 1:
        grey = np.floor(rng.integers(2, 6) * grey) / 5
    elif change == 2:
        grey = scaled(np.sin(rng.uniform(5, 30) * grey))
    return grey


def formulas(rng: Rng) -> np.ndarray:
    """Random compositions of functions of the coordinates, one per channel."""
    x, y = warped(rng)
    values = [x, y, np.hypot(x, y), np.arctan2(y, x), 2 * noise(rng, rng.uniform(1, 2)) - 1]
    for _ in range(rng.integers(4, 11)):
        first, second = (values[number] for number in rng.integers(0, len(values), 2))
        scale, shift = np.exp(rng.uniform(-0.5, 2)), rng.uniform(-3, 3)
        values.append(
            [
                lambda a, b, s, t: np.sin(s * a + t),
                lambda a, b, s, t: np.sin(s * (a + b) + t),
                lambda a, b, s, t: np.abs(a - b),
                lambda a, b, s, t: a * b,
                lambda a, b, s, t: np.minimum(a, b),
                lambda a, b, s, t: np.maximum(a, b),
                lambda a, b, s, t: (s * a + t) % 1,
                lambda a, b, s, t: np.exp(-s * (a + b) ** 2),
                lambda a, b, s, t: np.tanh(4 * s * a) * b,
                lambda a, b, s, t: np.sin(s * np.pi * a) * np.cos(s * np.pi * b),
            ][rng.integers(10)](first, second, scale, shift)
        )
    mix = rng.normal(0, 1, (3, 4))
    if rng.random() < 0.5:
        mix[1:] = mix[0] + 0.3 * mix[1:]
    last = np.stack(values[-4:])
    return np.stack([scaled(np.tensordot(row, last, 1)) for row in mix], axis=2)


def fractal(rng: Rng) -> np.ndarray:
    """The attractor of an iterated function system (Kataoka et al., 2020)."""
    maps = rng.uniform(-1, 1, (rng.integers(2, 6), 2, 3))
    sizes = np.abs(np.linalg.svd(maps[:, :, :2], compute_uv=False))
    maps[:, :, :2] *= (rng.uniform(0.4, 0.9, (len(maps), 1)) / sizes[:, :1])[..., None]
    area = np.abs(np.linalg.det(maps[:, :, :2])) + 0.05
    position = rng.uniform(-1, 1, (400, 2))
    path = []
    for step in range(90):
        chosen = maps[rng.choice(len(maps), len(position), p=area / area.sum())]
        position = np.einsum("nij,nj->ni", chosen[:, :, :2], position) + chosen[:, :, 2]
        if step > 9:
            path.append(position)
    cloud = np.concatenate(path)
    low, high = np.percentile(cloud, (1, 99), axis=0)
    margin = 0.1 * (high - low) + 1e-3
    edges = [np.linspace(a, b, SIDE + 1) for a, b in zip(low - margin, high + margin, strict=True)]
    density = np.log1p(np.histogram2d(*cloud.T, bins=edges)[0])
    grey = scaled(density) if rng.random() < 0.5 else (density > 0).astype(float)
    return grey if rng.random() < 0.7 else np.maximum(grey, noise(rng, 1.5) * rng.random())


def gratings(rng: Rng) -> np.ndarray:
    """Sines, square waves and Gabor patches on a plane seen at an angle."""
    x, y = warped(rng)
    grey = np.zeros_like(x)
    for _ in range(rng.integers(1, 5)):
        angle, frequency = rng.uniform(0, np.pi), np.exp(rng.uniform(1, 3.6))
        wave = np.sin(frequency * (np.cos(angle) * x + np.sin(angle) * y) + rng.uniform(0, 6))
        if rng.random() < 0.4:
            wave = np.sign(wave - rng.uniform(-0.7, 0.7))
        if rng.random() < 0.4:
            there = (x - rng.uniform(-1, 1)) ** 2 + (y - rng.uniform(-1, 1)) ** 2
            wave = wave * np.exp(-there / rng.uniform(0.05, 1))
        grey = grey * wave if rng.random() < 0.3 else grey + wave
    return scaled(grey)


def cells(rng: Rng) -> np.ndarray:
    """Voronoi cells of random points: filled, shaded or only their walls."""
    x, y = warped(rng)
    count = int(np.exp(rng.uniform(2, 5.5)))
    spread = max(np.abs(x).max(), np.abs(y).max())
    seeds = rng.uniform(-spread, spread, (count, 2))
    near, which = cKDTree(seeds).query(np.stack([x.ravel(), y.ravel()], axis=1), k=2)
    kind = rng.integers(4)
    if kind == 0:
        grey = rng.random(count)[which[:, 0]]
    elif kind == 1:
        grey = scaled(near[:, 0])
    elif kind == 2:
        grey = scaled(np.minimum(near[:, 1] - near[:, 0], rng.uniform(0.02, 0.2)))
    else:
        wall = near[:, 1] - near[:, 0] > 0.1 * near.mean()
        grey = wall * rng.uniform(0.3, 1, count)[which[:, 0]]
    return grey.reshape(SIDE, SIDE)


def leaves(rng: Rng) -> np.ndarray:
    """Dead leaves: overlapping shapes of all sizes."""
    canvas = Canvas(rng.random(3))
    smallest, grey = rng.uniform(0.02, 0.15), rng.random() < 0.3
    base = rng.random(3)
    spread = rng.uniform(0.1, 1)
    for _ in range(rng.integers(30, 400)):
        radius = min(smallest / rng.power(2), 0.8)
        colour = base + spread * ((rng.random() if grey else rng.random(3)) - 0.5)
        shape = outline(rng, *rng.uniform(-1.1, 1.1, 2), radius)
        canvas.pen.polygon(shape, ink(colour), ink(colour / 2) if rng.random() < 0.2 else None)
    pixels = canvas.pixels()
    return pixels * (1 - rng.uniform(0, 0.5) * noise(rng, rng.uniform(0.3, 2)))[..., None]


def strokes(rng: Rng) -> np.ndarray:
    """Pen strokes on plain paper: curves, scribbles, illegible letters."""
    paper = rng.random(3)
    canvas = Canvas(paper)
    cursor, colour = rng.uniform(-1, 1, 2), rng.random(3)
    width, bend = rng.integers(1, 14), rng.uniform(0, 1)
    for _ in range(rng.integers(1, 40)):
        if rng.random() < 0.4:
            cursor = rng.uniform(-1, 1, 2)
        if rng.random() < 0.1:
            colour, width = rng.random(3), rng.integers(1, 14)
        angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.5)
        angles = angle + bend * np.cumsum(rng.normal(0, 0.5) + rng.normal(0, 0.1, 12))
        steps = length / 4 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        path = cursor + np.cumsum(steps, axis=0)
        canvas.pen.line(points(*path), ink(colour), int(width), joint="curve")
        cursor = path[-1]
    return canvas.pixels()


def contours(rng: Rng) -> np.ndarray:
    """Nested radial contours (Kataoka et al., 2022)."""
    canvas = Canvas(rng.random(3))
    colour, width = rng.random(3), int(rng.integers(1, 8))
    for _ in range(rng.integers(1, 5)):
        x, y = rng.uniform(-0.7, 0.7, 2)
        angles = np.linspace(0, 2 * np.pi, rng.choice([4, 5, 6, 7, 9, 60]))
        waves = 1 + rng.uniform(0, 0.4) * np.sin(rng.integers(2, 9) * angles + rng.uniform(0, 6))
        rough = 1 + rng.uniform(0, 0.1) * rng.standard_normal(len(angles))
        rough[-1] = rough[0]
        flat = np.exp(rng.normal(0, 0.3))
        for radius in rng.uniform(0.2, 1) * np.linspace(1, 0.1, rng.integers(1, 20)):
            radii = radius * waves * rough
            xs, ys = radii * np.cos(angles), radii * np.sin(angles)
            canvas.pen.line(points(*zip(x + flat * xs, y + ys, strict=True)), ink(colour), width)
    return canvas.pixels()


def relief(rng: Rng) -> np.ndarray:
    """A rough or bumpy surface in slanting light."""
    height = noise(rng, rng.uniform(1.2, 2.5), np.exp(rng.normal(0, 0.4))) * rng.uniform(5, 60)
    if rng.random() < 0.6:
        height *= 0.2
        for _ in range(rng.integers(1, 25)):
            radius = rng.uniform(0.08, 0.7)
            there = (ACROSS - rng.uniform(-1, 1)) ** 2 + (DOWN - rng.uniform(-1, 1)) ** 2
            bump = np.sqrt(np.maximum(radius**2 - there, 0)) * SIDE / 2
            height = np.maximum(height, bump + rng.uniform(0, 5)) if bump.any() else height
    down, across = np.gradient(height)
    light = rng.normal(0, 1, 3)
    light[2] = abs(light[2]) + 0.3
    length = np.sqrt(down**2 + across**2 + 1) * np.linalg.norm(light)
    shade = np.clip((light[2] - light[0] * across - light[1] * down) / length, 0, 1)
    skin = texture(rng)(ACROSS, DOWN) if rng.random() < 0.5 else 1.0
    shine = rng.uniform(0, 0.5) * shade ** rng.integers(8, 40)
    return np.clip(rng.uniform(0, 0.3) + shade * skin + shine, 0, 1)


def ground(rng: Rng, horizon: float) -> np.ndarray:
    """A textured plane below a horizon, and a graded sky above."""
    depth = np.maximum(DOWN - horizon, 0.02)
    size, drift, turn = np.exp(rng.uniform(-1, 0.7)), rng.uniform(-3, 3), rng.uniform(-0.6, 0.6)
    u, v = (ACROSS + turn * depth) / depth * size + drift, size / depth
    floor = texture(rng)(u, v)
    haze, mist = rng.random(), np.exp(-depth / rng.uniform(0.03, 0.4))
    floor = floor * (1 - mist) + haze * mist
    top, bottom = rng.random(2)
    grade = np.clip((DOWN + 1) / (horizon + 1), 0, 1)
    sky = top + (bottom - top) * grade ** rng.uniform(0.5, 2)
    sky = sky + rng.uniform(0, 0.5) * (noise(rng, rng.uniform(1.2, 2), 0.6) - 0.5)
    return np.where(horizon < DOWN, floor, sky)


def landscape(rng: Rng) -> np.ndarray:
    """Ground, sky, ridges behind each other, and upright objects on the ground."""
    horizon = rng.uniform(-0.7, 0.6)
    grey = ground(rng, horizon)
    x = np.linspace(-1, 1, SIDE)
    for _ in range(rng.integers(0, 4)):
        rough = noise(rng, rng.uniform(1, 2.2))[0]
        height = rng.uniform(0.02, 1.2) * rough + rng.uniform(-0.2, 0.2) * x
        ridge = (horizon - height[None] < DOWN) & (horizon > DOWN)
        tone, grain = rng.random(), texture(rng)(ACROSS, DOWN)
        mixed = rng.uniform(0, 0.6)
        grey = np.where(ridge, tone * (1 - mixed) + mixed * grain, grey)
    for _ in range(rng.integers(0, 12) * (rng.random() < 0.6)):
        foot = rng.uniform(horizon, 1.2)
        scale = foot - horizon + 0.1
        middle, half = rng.uniform(-1, 1), scale * rng.uniform(0.01, 0.08)
        trunk = (abs(ACROSS - middle) < half) & (foot > DOWN) & (foot - 3 * scale < DOWN)
        grey = np.where(trunk, rng.random(), grey)
        if rng.random() < 0.6:
            there = (ACROSS - middle) ** 2 + (DOWN - foot + rng.uniform(0.5, 1.5) * scale) ** 2
            crown = there < (scale * rng.uniform(0.2, 0.8)) ** 2 * (0.5 + noise(rng, 1))
            grey = np.where(crown, rng.random() * noise(rng, 0.7), grey)
    return grey


def facade(rng: Rng, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A wall with rows of openings."""
    columns, rows = rng.integers(1, 14, 2)
    wide, high = rng.uniform(0.2, 0.8, 2)
    inside = ((columns * u) % 1 < wide) & ((rows * v) % 1 < high)
    wall = texture(rng)(u, v) if rng.random() < 0.3 else rng.uniform(0.2, 1)
    return np.where(inside, rng.random() * rng.uniform(0.3, 1.0), wall)


def blocks(rng: Rng) -> np.ndarray:
    """Boxes with openings that stand on a plane, drawn with a vanishing point."""
    horizon, vanish = rng.uniform(-0.2, 0.8), rng.uniform(-1.5, 1.5)
    grey = ground(rng, horizon)
    for far in np.sort(rng.uniform(1, 6, rng.integers(1, 9)))[::-1]:
        left = rng.uniform(-2.5, 1.5)
        width, height, deep = rng.uniform(0.3, 1.5), rng.uniform(0.3, 3), rng.uniform(0.2, 3)
        eye = rng.uniform(0.2, 0.5)
        edge = left if vanish < (left + width / 2) / far else left + width
        # The side runs from the near edge to the vanishing point: depth by position.
        z = np.clip(edge / np.where(abs(ACROSS - vanish) < 1e-3, 1e-3, ACROSS - vanish), 0, 1e3)
        for u, d, front in (
            (((ACROSS - vanish) * far - left) / width, np.full_like(z, far), True),
            ((z - far) / deep, z, False),
        ):
            v = ((horizon - DOWN) * d + eye) / height
            wall = (u > 0) & (u < 1) & (v > 0) & (v < 1)
            shade = rng.uniform(0.5, 1) if front else rng.uniform(0.2, 0.9)
            grey = np.where(wall, shade * facade(rng, u, v), grey)
    return grey


def room(rng: Rng) -> np.ndarray:
    """The inside of a box: floor, ceiling and three walls, with frames and furniture."""
    x0, y0 = rng.uniform(-0.5, 0.5, 2)
    half_width, up, low = rng.uniform(0.3, 1.2), rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8)
    back = rng.uniform(1.2, 4)
    x, y = ACROSS - x0, DOWN - y0
    distances = np.stack(
        [
            np.full_like(x, back),
            half_width / np.maximum(-x, 1e-3),
            half_width / np.maximum(x, 1e-3),
            up / np.maximum(-y, 1e-3),
            low / np.maximum(y, 1e-3),
        ]
    )
    surface, depth = distances.argmin(axis=0), distances.min(axis=0)
    along = [(x * depth, y * depth), *2 * [(depth, y * depth)], *2 * [(x * depth, depth)]]
    grey = np.zeros_like(x)
    for number, (u, v) in enumerate(along):
        pattern = texture(rng)(u, v) if rng.random() < 0.5 else rng.uniform(0.2, 1)
        if number < 3:
            for _ in range(rng.integers(0, 4)):
                a, b = rng.uniform(-1, 3), rng.uniform(-up, low)
                frame = (abs(u - a) < rng.uniform(0.1, 0.6)) & (abs(v - b) < rng.uniform(0.1, 0.5))
                pattern = np.where(frame, rng.random() * texture(rng)(u, v), pattern)
        grey = np.where(surface == number, rng.uniform(0.4, 1) * pattern, grey)
    grey = grey * np.exp(-rng.uniform(0, 0.3) * depth)
    for far in np.sort(rng.uniform(0.8, back, rng.integers(0, 7)))[::-1]:
        a, width, high = rng.uniform(-half_width, half_width), *rng.uniform(0.05, 0.5, 2)
        deep = rng.uniform(0.1, 0.5)
        face = (abs(x * far - a) < width) & (y * far < low) & (y * far > low - high)
        top_depth = np.where(y > 0, (low - high) / np.maximum(y, 1e-3), np.inf)
        lid = (top_depth > far) & (top_depth < far + deep) & (abs(x * top_depth - a) < width)
        tone = rng.random()
        grey = np.where(lid, np.minimum(1.3 * tone + 0.1, 1), grey)
        grey = np.where(face, tone * texture(rng)(x * far, y * far), grey)
    return grey


def collage(rng: Rng) -> np.ndarray:
    """Pieces of several other pictures."""
    names = [name for name in FAMILIES if name != "collage"]
    picture = draw(rng.choice(names), rng) / 255
    for _ in range(rng.integers(1, 3)):
        other = draw(rng.choice(names), rng) / 255
        mask = Canvas(0.0)
        for _ in range(rng.integers(1, 6)):
            shape = outline(rng, *rng.uniform(-1, 1, 2), rng.uniform(0.2, 0.9))
            mask.pen.polygon(shape, ink(1.0))
        share = mask.pixels()
        picture = picture * (1 - share) + other * share
    return picture


FAMILIES: dict[str, Callable[[Rng], np.ndarray]] = {
    family.__name__: family
    for family in (
        clouds,
        formulas,
        fractal,
        gratings,
        cells,
        leaves,
        strokes,
        contours,
        relief,
        landscape,
        blocks,
        room,
        collage,
    )
}
