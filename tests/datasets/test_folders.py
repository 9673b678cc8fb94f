"""Images in folders, one folder per class."""

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
    """Paths, labels and names, whatever order the disk has; numbers are sorted as text."""
    touch(tmp_path, "dog/2.png", "dog/10.JPG", "cat/b/1.jpeg", "cat/z.jpg", "cat/a.tif")
    images = load_image_folder(tmp_path)
    expected = ["cat/a.tif", "cat/b/1.jpeg", "cat/z.jpg", "dog/10.JPG", "dog/2.png"]
    assert names_in(tmp_path, images.data) == expected
    assert_array_equal(images.target, [0, 0, 0, 1, 1])
    assert_array_equal(images.target_names, ["cat", "dog"])
    assert images.target.dtype.kind == "i"
    assert (images.n_hidden, images.n_links, images.n_other) == (0, 0, 0)


def test_folders_are_those_of_scikit_learn(tmp_path: Path, touch: Callable[..., Path]) -> None:
    """`sklearn.datasets.load_files` lists the same files and labels of plain class folders."""
    touch(tmp_path, *(f"{name}/{number}.jpg" for name in ("b", "a", "ö", "C") for number in "312"))
    expected = load_files(tmp_path, load_content=False, shuffle=False)
    images = load_image_folder(tmp_path)
    assert sorted(images.data) == sorted(expected.filenames)
    assert_array_equal(images.target_names, expected.target_names)
    labels = dict(zip(expected.filenames, expected.target, strict=True))
    assert_array_equal(images.target, [labels[path] for path in images.data])


@given(names=st.lists(st.tuples(*[st.text("abAB.é", min_size=1, max_size=3)] * 2), min_size=1))
def test_nothing_is_lost_uncounted(
    tmp_path_factory: pytest.TempPathFactory,
    names: list,
    touch: Callable[..., Path],
    names_in: Callable[..., list[str]],
) -> None:
    """Every file in a class folder is listed, or counted among those left out."""
    root = tmp_path_factory.mktemp("root")
    files = {(folder, f"{name}.png") for folder, name in names}
    files = {pair for pair in files if set(pair[0]) != {"."}}
    hidden = {folder for folder, _ in files if folder.startswith(".")}
    hidden_files = {(a, b) for a, b in files if a not in hidden and b.startswith(".")}
    visible = {(a, b) for a, b in files if a not in hidden} - hidden_files
    touch(root, *(f"{folder}/{name}" for folder, name in files))
    if not visible or {a for a, _ in visible} != {a for a, _ in files} - hidden:
        with pytest.raises(ValueError, match="class folders"):
            load_image_folder(root)
        return
    images = load_image_folder(root)
    assert names_in(root, images.data) == [f"{a}/{b}" for a, b in sorted(visible)]
    assert images.n_hidden == len(hidden) + len(hidden_files)


def test_what_is_left_out_is_counted(
    tmp_path: Path, touch: Callable[..., Path], names_in: Callable[..., list[str]]
) -> None:
    """Hidden files and folders, files with other endings, and files that are in no class."""
    touch(tmp_path, "cat/1.jpg", "cat/.2.jpg", "cat/notes.txt", "cat/jpg", ".git/3.jpg", "4.jpg")
    touch(tmp_path, "__MACOSX/cat/._1.jpg", "cat/.thumbs/1.jpg", "cat/deep/5.gif.txt")
    images = load_image_folder(tmp_path)
    assert names_in(tmp_path, images.data) == ["cat/1.jpg"]
    assert (images.n_hidden, images.n_links, images.n_other) == (4, 0, 4)


def test_extensions_can_be_chosen(
    tmp_path: Path, touch: Callable[..., Path], names_in: Callable[..., list[str]]
) -> None:
    """Small letters or capitals are the same."""
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
    with pytest.raises(ValueError, match=r"a list of endings with their dot"):
        load_image_folder(tmp_path, extensions=extensions)


def test_links_are_followed_on_request(
    tmp_path: Path, touch: Callable[..., Path], names_in: Callable[..., list[str]]
) -> None:
    """To files, to folders and to classes; else they are counted."""
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
def test_links_in_a_circle_are_an_error(
    tmp_path: Path, link: str, target: str, touch: Callable[..., Path]
) -> None:
    """Rather than images without end."""
    touch(tmp_path, "cat/1.jpg", "cat/x/2.jpg")
    (tmp_path / link).symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match=r"leads back to"):
        load_image_folder(tmp_path, follow_links=True)
    assert len(load_image_folder(tmp_path).data) == 2


def test_two_folders_that_link_to_each_other_are_an_error(
    tmp_path: Path, touch: Callable[..., Path]
) -> None:
    """A circle of two."""
    touch(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "a/b").symlink_to(tmp_path / "b")
    (tmp_path / "b/a").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match=r"leads back to"):
        load_image_folder(tmp_path, follow_links=True)


def test_a_folder_without_classes_is_an_error(tmp_path: Path, touch: Callable[..., Path]) -> None:
    """Images that lie loose are mentioned."""
    touch(tmp_path, "1.jpg", "2.jpg", ".hidden")
    with pytest.raises(ValueError, match=r"no class folders; .* Left out: 1 hidden, 2 other files"):
        load_image_folder(tmp_path)


def test_a_class_without_images_is_an_error(tmp_path: Path, touch: Callable[..., Path]) -> None:
    """It could not be learned, and its images are probably called otherwise."""
    touch(tmp_path, "cat/1.jpg", "dog/1.jp2")
    with pytest.raises(ValueError, match=r"class folders without an image: 'dog'.*extensions="):
        load_image_folder(tmp_path)


@pytest.mark.parametrize("name", ["nothing", "file.jpg"])
def test_no_folder_is_an_error(tmp_path: Path, name: str, touch: Callable[..., Path]) -> None:
    """Neither a file nor nothing is a folder."""
    touch(tmp_path, "file.jpg")
    for load in (load_image_folder, load_scene15):
        with pytest.raises(NotADirectoryError, match=f"there is no folder .*{name}"):
            load(tmp_path / name)


def test_paths_begin_with_the_root_as_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, touch: Callable[..., Path]
) -> None:
    """Relative stays relative, and ~ is the home."""
    touch(tmp_path, "photos/cat/1.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert load_image_folder("photos").data[0] == os.path.join("photos", "cat", "1.jpg")
    assert load_image_folder("~/photos").data[0] == str(tmp_path / "photos/cat/1.jpg")


def test_listing_loads_no_torch() -> None:
    """`import deepfeat.datasets` takes no seconds."""
    code = "import sys, deepfeat.datasets; assert not {'torch', 'PIL', 'pooch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
