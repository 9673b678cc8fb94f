"""Images in folders, one per class."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from sklearn.utils import Bunch

EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm"),
)
HIDDEN = (".", "__MACOSX")  # the latter is what macOS adds to the archives that it packs


def load_image_folder(
    root: str | os.PathLike[str],
    *,
    extensions: Sequence[str] = EXTENSIONS,
    follow_links: bool = False,
) -> Bunch:
    """List the images of a folder that has a folder for each class.

    An image of class "dog" is `root/dog/1.jpg`, or lies deeper, as `root/dog/small/1.jpg`. No
    image is opened.

    Parameters
    ----------
    root : str or path
        Folder of the class folders.
    extensions : sequence of str, optional
        Endings of the names of images, with their dot, in small letters or capitals. By default
        those of JPEG, PNG, WebP, GIF, BMP, TIFF and Netpbm.
    follow_links : bool, default=False
        Whether symbolic links to files and folders count as what they lead to. Else they are left
        out.

    Returns
    -------
    images : Bunch
        `data`, ndarray of shape (n,) of str: paths, sorted by class, then by folder and name;
        they begin with `root`. `target`, ndarray of shape (n,) of int: places in `target_names`.
        `target_names`, ndarray of str: names of the class folders, sorted. What was left out:
        `n_hidden`, `n_links` and `n_other`, the numbers of hidden files and folders (names that
        begin with a dot), of links that were not followed, and of other files that are not in a
        class folder or have other endings.

    Raises
    ------
    ValueError
        If there is no class folder, one has no image, or links lead round in a circle.
    OSError
        If `root` is no folder, or a folder cannot be read.

    Examples
    --------
    >>> from deepfeat.datasets import load_image_folder
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as root:
    ...     for name in ("dog/1.jpg", "dog/2.JPG", "cat/a.png", "cat/notes.txt"):
    ...         Path(root, name).parent.mkdir(exist_ok=True)
    ...         Path(root, name).touch()
    ...     images = load_image_folder(root)
    >>> [Path(path).name for path in images.data]
    ['a.png', '1.jpg', '2.JPG']
    >>> images.target, images.target_names, images.n_other
    (array([0, 1, 1]), array(['cat', 'dog'], dtype='<U3'), 1)
    """
    folders, left_out = list_folders(as_path(root), _check_extensions(extensions), follow_links)
    skipped = ", ".join(f"{count} {words}" for words, count in sorted(left_out.items()))
    hint = f" Left out: {skipped}." if skipped else ""
    if not folders:
        raise ValueError(
            f"{str(root)!r} has no class folders; a folder for each class is expected, with "
            f"images of the class in it.{hint}"
        )
    empty = [name for name, paths in folders.items() if not paths]
    if empty:
        raise ValueError(
            f"{str(root)!r} has class folders without an image: {', '.join(map(repr, empty))}; "
            f"remove them, or name the endings of your images in extensions=.{hint}"
        )
    counts = [len(paths) for paths in folders.values()]
    return Bunch(
        data=np.array([path for paths in folders.values() for path in paths]),
        target=np.repeat(np.arange(len(folders)), counts),
        target_names=np.array(list(folders)),
        n_hidden=left_out["hidden"],
        n_links=left_out["links"],
        n_other=left_out["other files"],
    )


# Folders ----------------------------------------------------------------------------------------


def as_path(root: str | os.PathLike[str]) -> Path:
    path = Path(root).expanduser()
    if not path.is_dir():
        raise NotADirectoryError(f"there is no folder {str(root)!r}.")
    return path


def _check_extensions(extensions: Sequence[str]) -> frozenset[str]:
    if isinstance(extensions, str) or not all(one.startswith(".") for one in extensions):
        raise ValueError(
            f"extensions={extensions!r}: a list of endings with their dot is expected, such as "
            "['.jpg', '.png']."
        )
    return frozenset(one.lower() for one in extensions)


def list_folders(
    root: Path, extensions: frozenset[str], follow_links: bool
) -> tuple[dict[str, list[str]], Counter[str]]:
    """List the images of each folder in `root`, and count what is left out."""
    left_out: Counter[str] = Counter()
    folders: dict[str, list[str]] = {}
    for entry in _scan(root, follow_links, left_out):
        if entry.is_dir():
            way = (os.path.realpath(root),)
            images = _walk(entry.path, extensions, follow_links, left_out, way)
            folders[entry.name] = list(images)
        else:
            left_out["other files"] += 1
    return folders, left_out


def _walk(
    folder: str,
    extensions: frozenset[str],
    follow_links: bool,
    left_out: Counter[str],
    way: tuple[str, ...],
) -> Iterator[str]:
    """Yield the images below a folder, in sorted order; `way` is the folders on the way to it."""
    place = os.path.realpath(folder)
    if place in way:
        raise ValueError(f"the link {folder!r} leads back to {place!r}, which it lies in.")
    for entry in _scan(folder, follow_links, left_out):
        if entry.is_dir():
            yield from _walk(entry.path, extensions, follow_links, left_out, (*way, place))
        elif entry.is_file() and os.path.splitext(entry.name)[1].lower() in extensions:
            yield entry.path
        else:
            left_out["other files"] += 1


def _scan(
    folder: str | Path, follow_links: bool, left_out: Counter[str]
) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if entry.name.startswith(HIDDEN):
            left_out["hidden"] += 1
        elif entry.is_symlink() and not follow_links:
            left_out["links"] += 1
        else:
            yield entry
