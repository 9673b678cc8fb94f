"""The 15-Scene data set: loading, splitting, downloading."""

import csv
import hashlib
import os
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import get_data_home
from sklearn.utils import Bunch, check_random_state

from .._optional import import_optional
from ._archive import download, unpack_zip
from ._folders import EXTENSIONS, HIDDEN, as_path, list_folders

RandomState: TypeAlias = int | np.random.RandomState | None
Split: TypeAlias = Literal["fixed", "random"]

_URL = "http://www-cvr.ai.uiuc.edu/ponce_grp/data/scene_categories/scene_categories.zip"
_HASH = "md5:58828019197b2ad0a7efb472e7a85c2a"
_MAX_FILES, _MAX_BYTES = 20_000, 2**30  # ample for 4,485 files of 92 MB
_SPLIT_FILE = "scene15_split.csv"
# The classes and how many images each has. No two have as many, so that a folder can be told by it.
_SCENES = {
    "CALsuburb": 241,
    "MITcoast": 360,
    "MITforest": 328,
    "MIThighway": 260,
    "MITinsidecity": 308,
    "MITmountain": 374,
    "MITopencountry": 410,
    "MITstreet": 292,
    "MITtallbuilding": 356,
    "PARoffice": 215,
    "bedroom": 216,
    "industrial": 311,
    "kitchen": 210,
    "livingroom": 289,
    "store": 315,
}


def load_scene15(
    root: str | os.PathLike[str],
    *,
    split: Split = "fixed",
    train_per_class: int = 100,
    random_state: RandomState = None,
) -> Bunch:
    """List the 4,485 images of the 15-Scene data set, and split them for training and testing.

    Parameters
    ----------
    root : str or path
        Folder of the images: class folders as published (`CALsuburb`, `MITcoast`, ..., `store`)
        or with such names as `suburb` or `InsideCity`; or numbered class folders (`00` to `14`),
        which are told by their number of images; or folders `train` and `test` with such
        class folders in each; or a folder with one of these as its only folder.
    split : {"fixed", "random"}, default="fixed"
        "fixed" is the split that comes with the images: the folders `train` and `test`, or a file
        `scene15_split.csv` in `root` or beside it, with columns `split` ("train" or "test"),
        `class` (name of the class folder) and `file` (name of the image). None was published with
        the data set, and none comes with deepfeat. "random" draws training images in each class,
        as those who published the data set did; the others are for testing.
    train_per_class : int, default=100
        Number of training images of each class. A fixed split must have as many.
    random_state : int, RandomState or None, default=None
        Seed of the random split: pass an int to draw the same one again.

    Returns
    -------
    scenes : Bunch
        `data`, ndarray of shape (4485,) of str: paths, sorted by class and name. `target`, ndarray
        of shape (4485,) of int: places in `target_names`. `target_names`, ndarray of shape (15,)
        of str: the classes as published, whatever the folders are called. `train` and `test`,
        ndarrays of int: places in `data` of the images to train and to test on.

    Raises
    ------
    ValueError
        If a class or an image is missing, or there are more than were published, saying where; or
        if there is no fixed split of that size.
    OSError
        If `root` is no folder, or a folder cannot be read.

    Notes
    -----
    Some images of the data set are the same, byte for byte: in the copy that deepfeat was
    developed on, 18 pairs, one of them across two classes. A split may have one half of a pair on
    either side.

    References
    ----------
    Lazebnik, Schmid and Ponce (2006), "Beyond Bags of Features: Spatial Pyramid Matching for
    Recognizing Natural Scene Categories".

    Examples
    --------
    >>> from deepfeat.datasets import load_scene15
    >>> scenes = load_scene15("scene_categories", split="random", random_state=0)  # doctest: +SKIP
    >>> len(scenes.data), len(scenes.train), len(scenes.test)  # doctest: +SKIP
    (4485, 1500, 2985)
    """
    _check_choices(split, train_per_class)
    folder = as_path(root)
    scenes = _list_scenes(folder)
    names = list(_SCENES)
    target = np.array([names.index(scene.name) for scene in scenes])
    if split == "random":
        is_train = _draw_split(target, train_per_class, random_state)
    else:
        is_train = _find_split(scenes, folder)
        _check_split(target[is_train], train_per_class)
    return Bunch(
        data=np.array([scene.path for scene in scenes]),
        target=target,
        target_names=np.array(names),
        train=np.flatnonzero(is_train),
        test=np.flatnonzero(~is_train),
    )


def fetch_scene15(
    data_home: str | os.PathLike[str] | None = None,
    *,
    split: Split = "random",
    train_per_class: int = 100,
    random_state: RandomState = None,
    download_if_missing: bool = True,
    url: str = _URL,
    known_hash: str | None = _HASH,
    n_retries: int = 3,
    delay: float = 1.0,
) -> Bunch:
    """Load the 15-Scene data set, downloading it (92 MB) if it is not there yet.

    The default address and hash are those that public code quotes. Neither could be checked while
    deepfeat was written: where they fail, give others, or unpack a copy of your own and use
    `load_scene15`.

    Parameters
    ----------
    data_home : str or path, optional
        Folder in which the folder `scene15` is, or will be. By default that of
        `sklearn.datasets.get_data_home`: `~/scikit_learn_data`, unless the environment variable
        `SCIKIT_LEARN_DATA` names another.
    split : {"fixed", "random"}, default="random"
        As for `load_scene15`. What is downloaded holds no fixed split: for one put a file
        `scene15_split.csv` into `data_home`.
    train_per_class : int, default=100
        As for `load_scene15`.
    random_state : int, RandomState or None, default=None
        As for `load_scene15`.
    download_if_missing : bool, default=True
        Whether to download what is not there. Else that is an error.
    url : str, optional
        Address of a zip archive of the class folders.
    known_hash : str or None, optional
        Digest of the archive as pooch writes it, such as "sha256:..."; None trusts any.
    n_retries : int, default=3
        Number of times that a download that breaks off is continued.
    delay : float, default=1.0
        Seconds between them.

    Returns
    -------
    scenes : Bunch
        As from `load_scene15`.

    Raises
    ------
    OSError
        If the data set is not there and may not or cannot be downloaded, or what was downloaded
        has another digest, is no archive, is not safe to unpack or is not the whole data set.
    ModuleNotFoundError
        If it must be downloaded and pooch is missing: `pip install 'deepfeat[datasets]'`.

    Notes
    -----
    A download that was interrupted goes on where it broke off when the function is called again,
    if the server can do that. The archive is checked and unpacked beside `scene15`, which appears
    when it is whole. Nothing is written outside `data_home`.

    Examples
    --------
    >>> from deepfeat.datasets import fetch_scene15
    >>> scenes = fetch_scene15(random_state=0)  # doctest: +SKIP
    >>> X_train, y_train = scenes.data[scenes.train], scenes.target[scenes.train]  # doctest: +SKIP
    """
    _check_choices(split, train_per_class)  # before a long download
    home = Path(get_data_home(data_home))
    folder = home / "scene15"
    if not folder.is_dir():
        if not download_if_missing:
            raise OSError(f"there is no {str(folder)!r}, and download_if_missing is False.")
        _download_scene15(folder, url, known_hash, n_retries, delay)
    return load_scene15(
        folder, split=split, train_per_class=train_per_class, random_state=random_state
    )


# 15-Scene ---------------------------------------------------------------------------------------


def _check_choices(split: Any, train_per_class: Any) -> None:
    if split not in ("fixed", "random"):
        raise ValueError(f"split={split!r} is none of ('fixed', 'random').")
    most = min(_SCENES.values()) - 1
    if not (isinstance(train_per_class, (int, np.integer)) and 0 < train_per_class <= most):
        raise ValueError(
            f"train_per_class={train_per_class!r}: a whole number from 1 to {most} is expected, "
            f"since one class has {most + 1} images."
        )


class _Scene(NamedTuple):
    """An image of 15-Scene: its class, the name of its file, its path, the folder of its class.

    `part` is "train" or "test" where it lies in a folder of that name, and else "".
    """

    name: str
    file: str
    path: str
    folder: str
    part: str


def _list_scenes(root: Path) -> list[_Scene]:
    """List all images of 15-Scene, sorted by class and name.

    Raises
    ------
    ValueError
        If not all images are there, and no more.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for part, folder in _find_parts(_unwrap(root)).items():
        folders, _ = list_folders(folder, frozenset(EXTENSIONS), follow_links=True)
        for name, paths in folders.items():
            found.setdefault(name, []).extend((path, part) for path in paths)
    names = _name_folders({folder: len(images) for folder, images in found.items()})
    _check_scenes(root, {folder: len(images) for folder, images in found.items()}, names)
    return sorted(
        _Scene(names[folder], os.path.basename(path), path, folder, part)
        for folder, images in found.items()
        if folder in names
        for path, part in images
    )


def _unwrap(root: Path) -> Path:
    """Go down where there is but one folder to go to."""
    inside = [
        path
        for path in root.iterdir()
        if path.is_dir() and not path.is_symlink() and not path.name.startswith(HIDDEN)
    ]
    return _unwrap(inside[0]) if len(inside) == 1 else root


def _find_parts(root: Path) -> dict[str, Path]:
    parts = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    if "train" in parts and "test" in parts:
        return {"train": parts["train"], "test": parts["test"]}
    return {"": root}


def _name_folders(counts: Mapping[str, int]) -> dict[str, str]:
    """Tell which class is in which folder, of those that have one."""
    by_count = {count: name for name, count in _SCENES.items()}
    by_name = {_shorten(name): name for name in _SCENES}
    names = {
        folder: by_count.get(count) if folder.isdecimal() else by_name.get(_shorten(folder))
        for folder, count in counts.items()
    }
    return {folder: name for folder, name in names.items() if name is not None}


def _shorten(name: str) -> str:
    """Leave of `MITinsidecity`, `InsideCity` and `inside_city` what they have in common."""
    return re.sub("[^a-z]", "", re.sub("^(CAL|MIT|PAR)", "", name).lower())


def _check_scenes(root: Path, counts: Mapping[str, int], names: Mapping[str, str]) -> None:
    images: Counter[str] = Counter()
    for folder, name in names.items():
        images[name] += counts[folder]
    missing = [name for name in _SCENES if name not in images]
    faults = [f"there is no folder of {', '.join(missing)}"] if missing else []
    faults += [
        f"{images[name]} instead of {count} images of {name}"
        for name, count in _SCENES.items()
        if name in images and images[name] != count
    ]
    others = [
        f"{folder} ({count} images)" for folder, count in counts.items() if folder not in names
    ]
    if faults:
        raise ValueError(
            f"{str(root)!r} does not hold the 15 classes and 4,485 images of 15-Scene: "
            f"{'; '.join(faults)}."
            + (f" Folders of no class: {', '.join(others)}." if others else "")
            + " Of part of it, load_image_folder makes a list."
        )


def _draw_split(
    target: NDArray[np.int_], train_per_class: int, random_state: RandomState
) -> NDArray[np.bool_]:
    random = check_random_state(random_state)
    is_train = np.zeros(len(target), dtype=bool)
    for label in range(len(_SCENES)):
        places = np.flatnonzero(target == label)
        is_train[random.permutation(places)[:train_per_class]] = True
    return is_train


def _find_split(scenes: list[_Scene], root: Path) -> NDArray[np.bool_]:
    if scenes[0].part:
        return np.array([scene.part == "train" for scene in scenes])
    # Not `root.parent`, which of "." is ".".
    for path in (root / _SPLIT_FILE, root.resolve().parent / _SPLIT_FILE):
        if path.is_file():
            return _read_split(scenes, path)
    raise ValueError(
        f"no fixed split comes with {str(root)!r}: it has no folders 'train' and 'test', and there "
        f"is no {_SPLIT_FILE} in it or beside it. Draw one with split='random', random_state=0."
    )


def _read_split(scenes: list[_Scene], path: Path) -> NDArray[np.bool_]:
    with path.open(newline="", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    if not rows or not {"split", "class", "file"} <= rows[0].keys():
        raise ValueError(f"{path} has no columns 'split', 'class' and 'file'.")
    split = {(row["class"], row["file"]): row["split"] for row in rows}
    parts = [
        split.get((scene.folder, scene.file), split.get((scene.name, scene.file)))
        for scene in scenes
    ]
    for scene, part in zip(scenes, parts, strict=True):
        if part not in ("train", "test"):
            raise ValueError(
                f"{path} does not say of {scene.folder}/{scene.file} whether it is of the split "
                f"'train' or 'test', but {part!r}."
            )
    return np.array([part == "train" for part in parts])


def _check_split(train_target: NDArray[np.int_], train_per_class: int) -> None:
    counts = np.bincount(train_target, minlength=len(_SCENES))
    wrong = [
        f"{count} of {name}"
        for name, count in zip(_SCENES, counts, strict=True)
        if count != train_per_class
    ]
    if wrong:
        raise ValueError(
            f"the fixed split has not train_per_class={train_per_class} training images of each "
            f"class: {', '.join(wrong)}. Draw one with split='random'."
        )


def _download_scene15(
    folder: Path, url: str, known_hash: str | None, n_retries: int, delay: float
) -> None:
    """Download, check and unpack 15-Scene to `folder`, which appears when it is whole."""
    pooch = import_optional("pooch", extra="datasets")
    # Of each address a file of its own: parts of two archives must not be joined.
    name = f"scene15-{hashlib.sha256(url.encode()).hexdigest()[:8]}.zip"
    part = folder.with_name(f"{name}.part")

    def download_to(url: str, target: str, _: object) -> None:
        download(url, Path(target), part, n_retries=n_retries, delay=delay)

    try:
        found = pooch.retrieve(url, known_hash, name, folder.parent, downloader=download_to)
    except ValueError as error:  # the digest is another one
        raise OSError(f"what {url} sent is not what was expected: {error}") from error
    archive = Path(found)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="scene15-") as scratch:
        unpacked = Path(scratch, "scene15")
        try:
            unpack_zip(archive, unpacked, max_files=_MAX_FILES, max_bytes=_MAX_BYTES)
            _list_scenes(unpacked)
        except ValueError as error:
            archive.unlink()
            raise OSError(f"what {url} sent is of no use: {error}") from error
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was quicker
                raise
    archive.unlink(missing_ok=True)
