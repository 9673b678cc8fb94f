"""The 15-Scene dataset: loading, splitting, downloading."""

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
_MAX_FILES, _MAX_BYTES = 20_000, 2**30  # generous for 4,485 files of 92 MB
_SPLIT_FILE = "scene15_split.csv"
# The number of images of each class. All are different, so they identify numbered folders.
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
    """List the 4,485 images of the 15-Scene dataset, split for training and testing.

    Parameters
    ----------
    root : str or path
        Folder of the images. It contains class folders with their published names (`CALsuburb`,
        `MITcoast`, ..., `store`) or such names as `suburb` or `InsideCity`; or numbered class
        folders (`00` to `14`), which are identified by their numbers of images; or folders `train`
        and `test` with such class folders in each; or one of these in its only folder.
    split : {"fixed", "random"}, default="fixed"
        "fixed" is the split that comes with the images: folders `train` and `test`, or a file
        `scene15_split.csv` in `root` or beside it, with columns `split` ("train" or "test"),
        `class` (name of the class folder) and `file` (name of the image). Neither the authors of
        the dataset nor deepfeat provide one. "random" draws training images from each class, as
        the authors did; the other images are for testing.
    train_per_class : int, default=100
        Number of training images per class. A fixed split must have exactly as many.
    random_state : int, RandomState or None, default=None
        Seed of the random split. Pass an int for reproducible splits.

    Returns
    -------
    scenes : Bunch
        `data`, ndarray of shape (4485,) of str: paths, sorted by class and name. `target`, ndarray
        of shape (4485,) of int: indices into `target_names`. `target_names`, ndarray of shape
        (15,) of str: the published names of the classes, whatever the folders are called. `train`
        and `test`, ndarrays of int: indices into `data` of the training and test images.

    Raises
    ------
    ValueError
        If the classes and their numbers of images are not those published; the message gives the
        differences. Also if there is no fixed split of that size, or a parameter is invalid.
    OSError
        If `root` is not a folder, or a folder cannot be read.

    Notes
    -----
    Some images of the dataset are identical, byte for byte: 18 pairs in the copy that deepfeat
    was developed with, one of them across two classes. A split may separate the images of a pair.

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
    _check_parameters(split, train_per_class)
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
    """Load the 15-Scene dataset, downloading it (92 MB) if necessary.

    The default URL and hash are quoted by public code, but could not be checked while deepfeat was
    written. If they fail, pass others, or unpack your own copy and use `load_scene15`.

    Parameters
    ----------
    data_home : str or path, optional
        Folder that contains, or will contain, the folder `scene15`. By default, that of
        `sklearn.datasets.get_data_home`: `~/scikit_learn_data`, unless the environment variable
        `SCIKIT_LEARN_DATA` names another.
    split : {"fixed", "random"}, default="random"
        See `load_scene15`. The download does not include a fixed split; to use one, put a file
        `scene15_split.csv` into `data_home`.
    train_per_class : int, default=100
        See `load_scene15`.
    random_state : int, RandomState or None, default=None
        See `load_scene15`.
    download_if_missing : bool, default=True
        If False, raise an OSError instead of downloading a missing dataset.
    url : str, optional
        URL of a zip archive of the class folders.
    known_hash : str or None, optional
        Hash of the archive in pooch's format, such as "sha256:..."; None accepts any archive.
    n_retries : int, default=3
        Number of times that an interrupted download is resumed.
    delay : float, default=1.0
        Seconds between retries.

    Returns
    -------
    scenes : Bunch
        As from `load_scene15`.

    Raises
    ------
    OSError
        If the dataset is missing and must not or cannot be downloaded; or the archive has another
        hash, is damaged, is unsafe to unpack or does not hold the whole dataset.
    ValueError
        See `load_scene15`.
    ModuleNotFoundError
        If it must be downloaded and pooch is missing; the extra `datasets` installs it.

    Notes
    -----
    An interrupted download resumes when the function is called again, if the server supports
    that. The archive is checked and unpacked beside `scene15`, which appears once it is complete.
    Nothing is written outside `data_home`.

    Examples
    --------
    >>> from deepfeat.datasets import fetch_scene15
    >>> scenes = fetch_scene15(random_state=0)  # doctest: +SKIP
    >>> X_train, y_train = scenes.data[scenes.train], scenes.target[scenes.train]  # doctest: +SKIP
    """
    _check_parameters(split, train_per_class)  # before a long download
    home = Path(get_data_home(data_home))
    folder = home / "scene15"
    if not folder.is_dir():
        if not download_if_missing:
            raise OSError(
                f"The folder {str(folder)!r} does not exist and download_if_missing is False."
            )
        _download_scene15(folder, url, known_hash, n_retries, delay)
    return load_scene15(
        folder, split=split, train_per_class=train_per_class, random_state=random_state
    )


# 15-Scene ---------------------------------------------------------------------------------------


def _check_parameters(split: Any, train_per_class: Any) -> None:
    if split not in ("fixed", "random"):
        raise ValueError(f"split must be 'fixed' or 'random'; got {split!r}.")
    smallest = min(_SCENES.values())
    if not (isinstance(train_per_class, (int, np.integer)) and 0 < train_per_class < smallest):
        raise ValueError(
            f"train_per_class must be an int from 1 to {smallest - 1}, since one class has "
            f"{smallest} images; got {train_per_class!r}."
        )


class _Scene(NamedTuple):
    """An image of 15-Scene: its class, its file name, its path and its class folder.

    `part` is "train" or "test" if it lies in a folder of that name, and "" otherwise.
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
        If images are missing, or there are more than were published.
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
    """Descend as long as there is only one folder."""
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
    """Map the folders that belong to a class to its name."""
    by_count = {count: name for name, count in _SCENES.items()}
    by_name = {_shorten(name): name for name in _SCENES}
    names = {
        folder: by_count.get(count) if folder.isdecimal() else by_name.get(_shorten(folder))
        for folder, count in counts.items()
    }
    return {folder: name for folder, name in names.items() if name is not None}


def _shorten(name: str) -> str:
    """Reduce `MITinsidecity`, `InsideCity` and `inside_city` to the same name."""
    return re.sub("[^a-z]", "", re.sub("^(CAL|MIT|PAR)", "", name).lower())


def _check_scenes(root: Path, counts: Mapping[str, int], names: Mapping[str, str]) -> None:
    images: Counter[str] = Counter()
    for folder, name in names.items():
        images[name] += counts[folder]
    missing = [name for name in _SCENES if name not in images]
    faults = [f"no folder for {', '.join(missing)}"] if missing else []
    faults += [
        f"{images[name]} images of {name} instead of {count}"
        for name, count in _SCENES.items()
        if name in images and images[name] != count
    ]
    others = [
        f"{folder} ({count} images)" for folder, count in counts.items() if folder not in names
    ]
    if faults:
        raise ValueError(
            f"The folder {str(root)!r} does not hold the 15 classes and 4,485 images of 15-Scene: "
            f"{'; '.join(faults)}."
            + (f" Other folders: {', '.join(others)}." if others else "")
            + " Use load_image_folder to load a subset."
        )


def _draw_split(
    target: NDArray[np.int_], train_per_class: int, random_state: RandomState
) -> NDArray[np.bool_]:
    random = check_random_state(random_state)
    is_train = np.zeros(len(target), dtype=bool)
    for label in range(len(_SCENES)):
        indices = np.flatnonzero(target == label)
        is_train[random.permutation(indices)[:train_per_class]] = True
    return is_train


def _find_split(scenes: list[_Scene], root: Path) -> NDArray[np.bool_]:
    if scenes[0].part:
        return np.array([scene.part == "train" for scene in scenes])
    # Not `root.parent`: that of "." is ".".
    for path in (root / _SPLIT_FILE, root.resolve().parent / _SPLIT_FILE):
        if path.is_file():
            return _read_split(scenes, path)
    raise ValueError(
        f"The folder {str(root)!r} has no fixed split: it has no folders 'train' and 'test', and "
        f"there is no {_SPLIT_FILE} in it or beside it. Draw a split with split='random', "
        "random_state=0."
    )


def _read_split(scenes: list[_Scene], path: Path) -> NDArray[np.bool_]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or ())
        rows: list[dict[str, Any]] = list(reader)
    if not rows or not {"split", "class", "file"} <= set(columns):
        raise ValueError(
            f"The split file {path} must have columns 'split', 'class' and 'file', and one row per "
            f"image; got columns {columns} and {len(rows)} rows."
        )
    split = {(row["class"], row["file"]): row["split"] for row in rows}
    parts = [
        split.get((scene.folder, scene.file), split.get((scene.name, scene.file)))
        for scene in scenes
    ]
    for scene, part in zip(scenes, parts, strict=True):
        if part not in ("train", "test"):
            raise ValueError(
                f"The split of {scene.folder}/{scene.file} in {path} must be 'train' or 'test'; "
                f"got {part!r}."
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
            f"The fixed split does not have {train_per_class} training images per class "
            f"(train_per_class): it has {', '.join(wrong)}. Pass another train_per_class, or draw "
            "a split with split='random'."
        )


def _download_scene15(
    folder: Path, url: str, known_hash: str | None, n_retries: int, delay: float
) -> None:
    """Download, check and unpack 15-Scene to `folder`, which appears once it is complete."""
    pooch = import_optional("pooch", extra="datasets")
    # One file per URL, so that parts of different archives are never joined.
    name = f"scene15-{hashlib.sha256(url.encode()).hexdigest()[:8]}.zip"
    part = folder.with_name(f"{name}.part")

    def download_to(url: str, target: str, _: object) -> None:
        download(url, Path(target), part, n_retries=n_retries, delay=delay)

    try:
        found = pooch.retrieve(url, known_hash, name, folder.parent, downloader=download_to)
    except ValueError as error:
        raise OSError(
            f"The archive downloaded from {url} does not match known_hash. {error}"
        ) from error
    archive = Path(found)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="scene15-") as scratch:
        unpacked = Path(scratch, "scene15")
        try:
            unpack_zip(archive, unpacked, max_files=_MAX_FILES, max_bytes=_MAX_BYTES)
            _list_scenes(unpacked)
        except ValueError as error:
            archive.unlink()
            raise OSError(
                f"The archive downloaded from {url} is unusable: pass another url. {error}"
            ) from error
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster
                raise
    archive.unlink(missing_ok=True)
