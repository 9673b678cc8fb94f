"""Tests of the sample folder: what it holds, and what it must not overwrite."""

import itertools

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from deepfeat.datasets import load_image_folder, write_sample_folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return load_image_folder(write_sample_folder(tmp_path_factory.mktemp("new") / "deep/photos"))


def test_each_class_has_a_folder_of_photographs(photos):
    """All of one size, and enough of each class for five folds."""
    assert photos.target_names.tolist() == ["leaves", "palace", "petals", "sky", "trees"]
    assert np.bincount(photos.target).min() >= 20
    assert photos.n_other == photos.n_hidden == 0
    for path in photos.data:
        with Image.open(path) as image:
            assert (image.size, image.mode, image.format) == ((48, 48), "RGB", "PNG")


def test_no_two_photographs_overlap(photos):
    """A pixel that is in two of them would let a classifier know test images."""
    photographs = load_sample_images().images
    taken = [np.zeros(pixels.shape[:2], int) for pixels in photographs]
    for path in photos.data:
        piece = np.asarray(Image.open(path))
        found = [
            (number, y, x)
            for number, pixels in enumerate(photographs)
            for y, x in np.argwhere((pixels[:-47, :-47] == piece[0, 0]).all(axis=2))
            if np.array_equal(pixels[y : y + 48, x : x + 48], piece)
        ]
        ((number, y, x),) = found
        taken[number][y : y + 48, x : x + 48] += 1
    assert max(map(np.max, taken)) == 1


def test_a_folder_with_files_is_left_alone(tmp_path):
    """Also one that this function has written."""
    (tmp_path / "mine.txt").touch()
    for _ in range(2):
        with pytest.raises(FileExistsError, match=r"^root must be missing or empty; "):
            write_sample_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_file_is_no_folder(tmp_path):
    """The error of the system names it."""
    (tmp_path / "photos").touch()
    with pytest.raises(NotADirectoryError):
        write_sample_folder(tmp_path / "photos")


def test_the_photographs_are_the_same_everywhere(photos, tmp_path):
    """Their digests, and so the rows in a cache, do not depend on the folder."""
    again = load_image_folder(write_sample_folder(str(tmp_path)))
    for first, second in itertools.zip_longest(photos.data, again.data):
        with open(first, "rb") as one, open(second, "rb") as other:
            assert one.read() == other.read()


def test_an_interruption_leaves_nothing_behind(tmp_path, monkeypatch):
    """A part of the folder would pass for the whole."""
    save, saved = Image.Image.save, []

    def interrupt(self, *args, **kwargs):
        saved.append(args)
        if len(saved) == 50:
            raise KeyboardInterrupt
        save(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_sample_folder(tmp_path / "photos")
    assert not list(tmp_path.iterdir())
    assert len(load_image_folder(write_sample_folder(tmp_path / "photos")).data) == 126
