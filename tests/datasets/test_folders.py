"""Images in one folder per class."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from sklearn.datasets import load_files

from deepfeat.datasets._folders import load_image_folder
from deepfeat.datasets._scene15 import load_scene15


def test_images_are_listed_by_class_in_sorted_order(
    tmp_path: Path, touch: Callable[..., Path], names_in: Callable[..., list[str]]
) -> None:
    """Whatever the order on disk, paths and names are sorted, numbers in them as text."""
    touch(tmp_path, "dog/2.png", "dog/10.JPG", "cat/b/1.jpeg", "cat/z.jpg", "cat/a.tif")
    images = load_image_folder(tmp_path)
    expected = ["cat/a.tif", "cat/b/1.jpeg", "cat/z.jpg", "dog/10.JPG", "dog/2.png"]
    assert names_in(tmp_path, images.data) == expected
    assert_array_equal(images.target, [0, 0, 0, 1, 1])
    assert_array_equal(images.target_names, ["cat", "dog"])
    assert images.target.dtype.kind == "i"
    assert (images.n_hidden, images.n_links, images.n_other) == (0, 0, 0)


def test_images_and_labels_are_those_of_scikit_learn(
    tmp_path: Path, touch: Callable[..., Path]
) -> None:
    """`sklearn.datasets.load_files` lists the same files and labels for plain class folders."""
    touch(tmp_path, *(f"{name}/{number}.jpg" for name in ("b", "a", "ö", "C") for number in "312"))
    expected = load_files(tmp_path, load_content=False, shuffle=False)
    images = load_image_folder(tmp_path)
    assert sorted(images.data) == sorted(expected.filenames)
    assert_array_equal(images.target_names, expected.target_names)
    labels = dict(zip(expected.filenames, expected.target, strict=True))
    assert_array_equal(images.target, [labels[path] for path in images.data])


@given(names=st.lists(st.tuples(*[st.text("abAB.é", min_size=1, max_size=3)] * 2), min_size=1))
def test_every_file_is_listed_or_counted(
    tmp_path_factory: pytest.TempPathFactory,
    names: list,
    touch: Callable[..., Path],
    names_in: Callable[..., list[str]],
) -> None:
    """Files in class folders are listed, or counted among those skipped."""
    root = tmp_path_factory.mktemp("root")
    files = {(folder, f"{name}.png") for folder, name in names}
    files = {pair for pair in files if set(pair[0]) != {"."}}
    hidden = {folder for folder, _ in files if folder.startswith(".")}
    hidden_files = {(a, b) for a, b in files if a not in hidden and b.startswith(".")}
    visible = {(a, b) for a, b in files if a not in hidden} - hidden_files
    touch(root, *(f"{folder}/{name}" for folder, name in files))
    if not visible or {a for a, _ in visible} != {a for a, _ in files} - hidden:
        with pytest.raises(ValueError, match=r"class folders|each class folder"):
            load_image_folder(root)
        return
    images = load_image_folder(root)
    assert names_in(root, images.data) == [f"{a}/{b}" for a, b in sorted(visible)]
    assert images.n_hidden == len(hidden) + len(hidden_files)


def test_skipped_files_are_counted(
    tmp_path: Path, touch: Callable[..., Path], names_in: Callable[..., list[str]]
) -> None:
    """Hidden files and folders, files with other extensions, and files outside of classes."""
    touch(tmp_path, "cat/1.jpg", "cat/.2.jpg", "cat/notes.txt", "cat/jpg", ".git/3.jpg", "4.jpg")
    touch(tmp_path, "__MACOSX/cat/._1.jpg", "cat/.thumbs/1.jpg", "cat/deep/5.gif.txt")
    images = load_image_folder(tmp_path)
    assert names_in(tmp_path, images.data) == ["cat/1.jpg"]
    assert (images.n_hidden, images.n_links, images.n_other) == (4, 0, 4)


def test_extensions_can_be_chosen(
    tmp_path: Path, touch: Callable[..., Path], names_in: Callable[..., list[str]]
) -> None:
    """Their case does not matter."""
    touch(tmp_path, "cat/1.jpg", "cat/2.JP2", "cat/3.jp2")
    images = load_image_folder(tmp_path, extensions=[".Jp2"])
    assert names_in(tmp_path, images.data) == ["cat/2.JP2", "cat/3.jp2"]
    assert images.n_other == 1


@pytest.mark.parametrize("extensions", [".jpg", ["jpg"], ["*.jpg", ".png"]])
def test_extensions_without_a_dot_are_refused(
    tmp_path: Path, extensions: list[str], touch: Callable[..., Path]
) -> None:
    """They would find nothing, or too much."""
    touch(tmp_path, "cat/1.jpg")
    with pytest.raises(
        ValueError, match=r"^extensions must be a list of .* with their dot, .*; got "
    ):
        load_image_folder(tmp_path, extensions=extensions)


def test_links_are_followed_on_request(
    tmp_path: Path, touch: Callable[..., Path], names_in: Callable[..., list[str]]
) -> None:
    """Links to files, folders and classes are followed if requested, and otherwise counted."""
    store = touch(tmp_path / "store", "a/1.jpg", "b/2.jpg")
    root = touch(tmp_path / "root", "cat/0.jpg")
    (root / "cat/link.jpg").symlink_to(store / "a/1.jpg")
    (root / "cat/more").symlink_to(store / "a")
    (root / "dog").symlink_to(store / "b")
    (root / "cat/broken.jpg").symlink_to(store / "nothing.jpg")
    images = load_image_folder(root)
    assert names_in(root, images.data) == ["cat/0.jpg"]
    assert (images.n_links, images.n_other) == (4, 0)
    images = load_image_folder(root, follow_links=True)
    assert names_in(root, images.data) == [
        "cat/0.jpg",
        "cat/link.jpg",
        "cat/more/1.jpg",
        "dog/2.jpg",
    ]
    assert (images.n_links, images.n_other) == (0, 1)


@pytest.mark.parametrize(
    ("link", "target"),
    [("cat/again", "cat"), ("cat/up", "."), ("dog", "."), ("cat/x/up", "cat")],
)
def test_links_that_form_a_cycle_are_an_error(
    tmp_path: Path, link: str, target: str, touch: Callable[..., Path]
) -> None:
    """They would give endless images."""
    touch(tmp_path, "cat/1.jpg", "cat/x/2.jpg")
    (tmp_path / link).symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match=r"leads back to"):
        load_image_folder(tmp_path, follow_links=True)
    assert len(load_image_folder(tmp_path).data) == 2


def test_two_folders_that_link_to_each_other_are_an_error(
    tmp_path: Path, touch: Callable[..., Path]
) -> None:
    """They form a cycle of two."""
    touch(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "a/b").symlink_to(tmp_path / "b")
    (tmp_path / "b/a").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match=r"leads back to"):
        load_image_folder(tmp_path, follow_links=True)


def test_a_folder_without_classes_is_an_error(tmp_path: Path, touch: Callable[..., Path]) -> None:
    """Images outside of class folders are mentioned."""
    touch(tmp_path, "1.jpg", "2.jpg", ".hidden")
    message = r"which has no class folders\. Skipped: 1 hidden, 2 other files\.$"
    with pytest.raises(ValueError, match=message):
        load_image_folder(tmp_path)


def test_a_class_without_images_is_an_error(tmp_path: Path, touch: Callable[..., Path]) -> None:
    """It could not be learned, and its images probably have other extensions."""
    touch(tmp_path, "cat/1.jpg", "dog/1.jp2")
    with pytest.raises(ValueError, match=r"without an image in 'dog'\..*extensions="):
        load_image_folder(tmp_path)


@pytest.mark.parametrize("name", ["nothing", "file.jpg"])
def test_a_root_that_is_not_a_folder_is_an_error(
    tmp_path: Path, name: str, touch: Callable[..., Path]
) -> None:
    """It may be a file, or not exist."""
    touch(tmp_path, "file.jpg")
    for load in (load_image_folder, load_scene15):
        with pytest.raises(
            NotADirectoryError, match=rf"^root must be an existing folder; got .*{name}"
        ):
            load(tmp_path / name)


def test_paths_begin_with_the_root_as_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, touch: Callable[..., Path]
) -> None:
    """Relative paths stay relative, and ~ stands for the home directory."""
    touch(tmp_path, "photos/cat/1.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert load_image_folder("photos").data[0] == os.path.join("photos", "cat", "1.jpg")
    assert load_image_folder("~/photos").data[0] == str(tmp_path / "photos/cat/1.jpg")


def test_import_loads_no_torch() -> None:
    """`import deepfeat.datasets` is quick."""
    code = "import sys, deepfeat.datasets; assert not {'torch', 'PIL', 'pooch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
