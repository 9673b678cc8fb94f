"""Images in one folder per class."""

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
HIDDEN = (".", "__MACOSX")  # macOS adds the latter to archives


def load_image_folder(
    root: str | os.PathLike[str],
    *,
    extensions: Sequence[str] = EXTENSIONS,
    follow_links: bool = False,
) -> Bunch:
    """List the images of a folder that contains one folder per class.

    An image of class "dog" is, for example, `root/dog/1.jpg` or, deeper, `root/dog/small/1.jpg`.
    No image is opened.

    Parameters
    ----------
    root : str or path
        Folder that contains the class folders.
    extensions : sequence of str, optional
        File name extensions of images, with their dot; case does not matter. By default, those of
        JPEG, PNG, WebP, GIF, BMP, TIFF and Netpbm.
    follow_links : bool, default=False
        Whether to follow symbolic links to files and folders. Otherwise, links are skipped.

    Returns
    -------
    images : Bunch
        `data`, ndarray of shape (n,) of str: paths, sorted by class, then by folder and name;
        they begin with `root`. `target`, ndarray of shape (n,) of int: indices into
        `target_names`. `target_names`, ndarray of str: names of the class folders, sorted.
        `n_hidden`, `n_links` and `n_other`, ints: how many hidden files and folders (such as
        names that begin with a dot), links, and other files (with other extensions, or outside of
        the class folders) were skipped.

    Raises
    ------
    ValueError
        If there is no class folder, a class folder has no image, links form a cycle, or an
        extension has no dot.
    OSError
        If `root` is not a folder, or a folder cannot be read.

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
    folders, skipped = list_folders(as_path(root), _check_extensions(extensions), follow_links)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items()))
    hint = f" Skipped: {counts}." if counts else ""
    if not folders:
        raise ValueError(
            "root must contain one folder per class, with the images of the class; got "
            f"{str(root)!r}, which has no class folders.{hint}"
        )
    empty = [name for name, paths in folders.items() if not paths]
    if empty:
        raise ValueError(
            f"root must have images in each class folder; got {str(root)!r}, without an image in "
            f"{', '.join(map(repr, empty))}. Remove these folders, or pass the extensions of their "
            f"images as extensions=.{hint}"
        )
    sizes = [len(paths) for paths in folders.values()]
    return Bunch(
        data=np.array([path for paths in folders.values() for path in paths]),
        target=np.repeat(np.arange(len(folders)), sizes),
        target_names=np.array(list(folders)),
        n_hidden=skipped["hidden"],
        n_links=skipped["links"],
        n_other=skipped["other files"],
    )


# Folders ----------------------------------------------------------------------------------------


def as_path(root: str | os.PathLike[str]) -> Path:
    path = Path(root).expanduser()
    if not path.is_dir():
        raise NotADirectoryError(f"root must be an existing folder; got {str(root)!r}.")
    return path


def _check_extensions(extensions: Sequence[str]) -> frozenset[str]:
    if isinstance(extensions, str) or not all(
        extension.startswith(".") for extension in extensions
    ):
        raise ValueError(
            "extensions must be a list of extensions with their dot, such as ['.jpg', '.png']; got "
            f"{extensions!r}."
        )
    return frozenset(extension.lower() for extension in extensions)


def list_folders(
    root: Path, extensions: frozenset[str], follow_links: bool
) -> tuple[dict[str, list[str]], Counter[str]]:
    """List the images of each folder in `root`, and count what is skipped."""
    skipped: Counter[str] = Counter()
    folders: dict[str, list[str]] = {}
    for entry in _scan(root, follow_links, skipped):
        if entry.is_dir():
            ancestors = (os.path.realpath(root),)
            images = _walk(entry.path, extensions, follow_links, skipped, ancestors)
            folders[entry.name] = list(images)
        else:
            skipped["other files"] += 1
    return folders, skipped


def _walk(
    folder: str,
    extensions: frozenset[str],
    follow_links: bool,
    skipped: Counter[str],
    ancestors: tuple[str, ...],
) -> Iterator[str]:
    """Yield the images below a folder in sorted order; `ancestors` are the folders above it."""
    path = os.path.realpath(folder)
    if path in ancestors:
        raise ValueError(f"The link {folder!r} leads back to {path!r}, which contains it.")
    for entry in _scan(folder, follow_links, skipped):
        if entry.is_dir():
            yield from _walk(entry.path, extensions, follow_links, skipped, (*ancestors, path))
        elif entry.is_file() and os.path.splitext(entry.name)[1].lower() in extensions:
            yield entry.path
        else:
            skipped["other files"] += 1


def _scan(
    folder: str | Path, follow_links: bool, skipped: Counter[str]
) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if entry.name.startswith(HIDDEN):
            skipped["hidden"] += 1
        elif entry.is_symlink() and not follow_links:
            skipped["links"] += 1
        else:
            yield entry
