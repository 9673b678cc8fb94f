"""A small folder of photographs that needs no download."""

import os
import tempfile
from pathlib import Path

SIDE = 48  # pixels

# Regions of scikit-learn's two photographs that show one thing only, as left, top, right, bottom.
_PALACE, _DAHLIA = range(2)
_REGIONS = {
    "leaves": [(_DAHLIA, (0, 0, 144, 427))],
    "palace": [(_PALACE, (88, 88, 328, 328))],
    "petals": [(_DAHLIA, (190, 100, 430, 340))],
    "sky": [(_PALACE, (345, 0, 635, 192))],
    "trees": [(_PALACE, (340, 283, 640, 427)), (_PALACE, (0, 330, 240, 427))],
}


def write_sample_folder(root: str | os.PathLike[str]) -> Path:
    """Write a small folder of photographs, with one folder per class, for trying things out.

    The photographs are pieces of 48 x 48 pixels, none of which overlap, of the two photographs
    that come with scikit-learn: leaves, petals, a palace, sky and trees.

    Parameters
    ----------
    root : str or path
        The folder, which must be missing or empty.

    Returns
    -------
    root : Path
        The folder, for `load_image_folder`.

    Raises
    ------
    FileExistsError
        If the folder exists and is not empty.
    OSError
        If it cannot be written.

    Notes
    -----
    The photographs are `china.jpg` by danielbuechele and `flower.jpg` by vultilion, both CC BY 2.0,
    of `sklearn.datasets.load_sample_images`.

    Examples
    --------
    >>> from deepfeat.datasets import load_image_folder, write_sample_folder
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as root:
    ...     photos = load_image_folder(write_sample_folder(root))
    >>> len(photos.data), photos.target_names.tolist()
    (126, ['leaves', 'palace', 'petals', 'sky', 'trees'])
    """
    root = Path(root).expanduser().resolve()
    if root.exists():
        if any(root.iterdir()):
            raise FileExistsError(f"root must be missing or empty; {str(root)!r} has files.")
        root.rmdir()
    root.parent.mkdir(parents=True, exist_ok=True)
    # The folder appears once it is complete.
    with tempfile.TemporaryDirectory(prefix=".deepfeat-", dir=root.parent) as scratch:
        photos = Path(scratch, "photos")
        _write(photos)
        photos.rename(root)
    return root


def _write(root: Path) -> None:
    # Here, since those who only list folders need neither.
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for name, regions in _REGIONS.items():
        folder = root / name
        folder.mkdir(parents=True)
        boxes = [(number, box) for number, region in regions for box in _divide(*region)]
        for index, (number, box) in enumerate(boxes):
            photographs[number].crop(box).save(folder / f"{index:02}.png")


def _divide(left: int, top: int, right: int, bottom: int) -> list[tuple[int, int, int, int]]:
    """Divide a region into squares; what is left at its right and bottom belongs to none."""
    return [
        (x, y, x + SIDE, y + SIDE)
        for y in range(top, bottom - SIDE + 1, SIDE)
        for x in range(left, right - SIDE + 1, SIDE)
    ]
