"""15-Scene in its layouts, and its splits."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from sklearn.utils import Bunch

from deepfeat.datasets._folders import load_image_folder
from deepfeat.datasets._scene15 import load_scene15


@pytest.fixture(scope="module")
def scenes_root(
    tmp_path_factory: pytest.TempPathFactory,
    published: dict[str, int],
    touch: Callable[..., Path],
    scene_files: Callable[..., list[str]],
) -> Path:
    """The folder of 15-Scene as it was published, but for what is in its files."""
    return touch(tmp_path_factory.mktemp("published"), *scene_files(scenes=published))


def load(root: str | Path, **params: object) -> Bunch:
    """Load the smaller data set."""
    return load_scene15(root, **{"train_per_class": 5, **params})


# In another order than the published names have.
NUMBERED = (
    *("bedroom", "CALsuburb", "industrial", "kitchen", "livingroom", "MITcoast", "MITforest"),
    *("MIThighway", "MITinsidecity", "MITmountain", "MITopencountry", "MITstreet"),
    *("MITtallbuilding", "PARoffice", "store"),
)


def numbered(name: str) -> str:
    return f"{NUMBERED.index(name):02}"


LAYOUTS: dict[str, Callable[[str], str]] = {
    "published": str,
    "short": lambda name: name.removeprefix("CAL").removeprefix("MIT").removeprefix("PAR"),
    "capitals": lambda name: LAYOUTS["short"](name).replace("ingroom", "ingRoom").capitalize(),
    "words": lambda name: (
        LAYOUTS["short"](name).replace("inside", "inside_").replace("tall", "tall ")
    ),
    "numbered": numbered,
    "wrapped": lambda name: f"15-Scene/images/{name}",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_images(
    few: dict[str, int],
    tmp_path: Path,
    layout: str,
    touch: Callable[..., Path],
    names_in: Callable[..., list[str]],
    scene_files: Callable[..., list[str]],
) -> None:
    """Classes and their order are those published, whatever the folders are called."""
    root = touch(tmp_path / "root", *scene_files(LAYOUTS[layout]), "readme.txt")
    plain = touch(tmp_path / "plain", *scene_files())
    scenes = load(root, split="random", random_state=0)
    expected = load(plain, split="random", random_state=0)
    assert list(scenes.target_names) == list(few)
    for key in ("target", "train", "test"):
        assert_array_equal(scenes[key], expected[key])
    assert names_in(root, scenes.data) == scene_files(LAYOUTS[layout])


def test_all_images_are_listed(
    scenes_root: Path,
    published: dict[str, int],
    names_in: Callable[..., list[str]],
    scene_files: Callable[..., list[str]],
) -> None:
    """4,485 of 15 classes, sorted, each with its class."""
    scenes = load_scene15(scenes_root, split="random", random_state=0)
    assert names_in(scenes_root, scenes.data) == scene_files(scenes=published)
    assert_array_equal(np.bincount(scenes.target), list(published.values()))
    assert_array_equal(load_image_folder(scenes_root).target, scenes.target)
    assert len(scenes.data) == 4485


@pytest.mark.parametrize("per_class", [1, 100, 209])
def test_a_random_split_takes_as_many_of_each_class(scenes_root: Path, per_class: int) -> None:
    """Each image is for training or for testing."""
    scenes = load_scene15(scenes_root, split="random", train_per_class=per_class, random_state=0)
    assert_array_equal(np.bincount(scenes.target[scenes.train]), [per_class] * 15)
    assert_array_equal(np.sort(np.r_[scenes.train, scenes.test]), np.arange(4485))
    assert_array_equal(scenes.train, np.unique(scenes.train))


def test_random_splits_follow_their_seed(scenes_root: Path) -> None:
    """The same seed draws the same split, and others others."""

    def draw(seed: object) -> list[int]:
        return list(load_scene15(scenes_root, split="random", random_state=seed).train)

    assert draw(0) == draw(0) == draw(np.random.RandomState(0))
    assert draw(0) != draw(1)
    assert draw(None) != draw(None)


@pytest.mark.parametrize("place", ["own/scene15_split.csv", "scene15_split.csv"])
def test_a_fixed_split_is_read_from_a_file(
    own_root: Path,
    tmp_path: Path,
    place: str,
    write_split: Callable[[Path, list[str]], None],
    scene_files: Callable[..., list[str]],
    names_in: Callable[..., list[str]],
    is_training: Callable[[str], bool],
) -> None:
    """In the folder of the images or beside it."""
    write_split(tmp_path / place, scene_files())
    scenes = load(own_root)
    for part, places in {True: scenes.train, False: scenes.test}.items():
        expected = [file for file in scene_files() if is_training(file) is part]
        assert names_in(own_root, scenes.data[places]) == expected


def test_a_split_file_is_found_beside_the_current_folder(
    own_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_split: Callable[[Path, list[str]], None],
    scene_files: Callable[..., list[str]],
) -> None:
    """The root may be called "."."""
    write_split(tmp_path / "scene15_split.csv", scene_files())
    monkeypatch.chdir(own_root)
    assert len(load(".").train) == 75


@pytest.mark.parametrize("rename", [str, numbered])
@pytest.mark.usefixtures("few")
def test_a_split_file_may_name_folders_or_classes(
    tmp_path: Path,
    rename: Callable[[str], str],
    touch: Callable[..., Path],
    write_split: Callable[[Path, list[str]], None],
    scene_files: Callable[..., list[str]],
    names_in: Callable[..., list[str]],
    is_training: Callable[[str], bool],
) -> None:
    """Folders as they are called here, or as they were published."""
    root = touch(tmp_path / "own", *scene_files(numbered))
    write_split(tmp_path / "scene15_split.csv", scene_files(rename))
    scenes = load(root)
    assert names_in(root, scenes.data[scenes.train]) == list(
        filter(is_training, scene_files(numbered))
    )


@pytest.mark.usefixtures("few")
def test_folders_for_training_and_testing_are_the_fixed_split(
    tmp_path: Path,
    touch: Callable[..., Path],
    names_in: Callable[..., list[str]],
    is_training: Callable[[str], bool],
    scene_files: Callable[..., list[str]],
) -> None:
    """As in the copies that courses hand out."""
    files = {file: "Train" if is_training(file) else "Test" for file in scene_files()}
    root = touch(tmp_path, *(f"data/{part}/{file}" for file, part in files.items()))
    scenes = load(root)
    assert names_in(root, scenes.data) == [f"data/{part}/{file}" for file, part in files.items()]
    assert all("Train" in path for path in scenes.data[scenes.train])
    assert not any("Train" in path for path in scenes.data[scenes.test])
    # The folders do not stand in the way of another split.
    drawn = load(root, split="random", train_per_class=2, random_state=0)
    assert len(drawn.train) == 30


def test_no_fixed_split_is_made_up(scenes_root: Path) -> None:
    """None was published: where none comes with the images, the error tells what to do."""
    with pytest.raises(ValueError, match=r"no fixed split comes with .*split='random'"):
        load_scene15(scenes_root)


def test_a_fixed_split_of_another_size_is_an_error(
    own_root: Path,
    tmp_path: Path,
    write_split: Callable[[Path, list[str]], None],
    scene_files: Callable[..., list[str]],
) -> None:
    """`train_per_class` is not silently ignored."""
    write_split(tmp_path / "scene15_split.csv", scene_files())
    with pytest.raises(ValueError, match=r"not train_per_class=4 .*: 5 of CALsuburb, "):
        load(own_root, train_per_class=4)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text.replace("split,", "part,", 1), "no columns 'split', 'class' and 'file'"),
        (lambda text: "", "no columns"),
        (lambda text: text.replace("test,store,image_0001.jpg\n", ""), "store/image_0001.jpg"),
        (lambda text: text.replace("train,kitchen", "valid,kitchen"), "but 'valid'"),
    ],
)
def test_a_split_file_must_tell_of_every_image(
    own_root: Path,
    tmp_path: Path,
    spoil: Callable[[str], str],
    message: str,
    write_split: Callable[[Path, list[str]], None],
    scene_files: Callable[..., list[str]],
) -> None:
    """Else an image would be lost, or tested on by mistake."""
    path = tmp_path / "scene15_split.csv"
    write_split(path, scene_files())
    text = path.read_text()
    assert spoil(text) != text
    path.write_text(spoil(text))
    with pytest.raises(ValueError, match=message):
        load(own_root)


def test_what_is_missing_is_named(own_root: Path) -> None:
    """Classes without a folder, images too few and too many, and folders that are none."""
    (own_root / "store/image_0007.jpg").unlink()
    (own_root / "kitchen/image_0014.jpg").touch()
    (own_root / "MITcoast").rename(own_root / "beach")
    shutil.rmtree(own_root / "PARoffice")
    message = (
        "there is no folder of MITcoast, PARoffice; 14 instead of 13 images of kitchen; "
        "21 instead of 22 images of store. Folders of no class: beach (25 images)."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        load(own_root, split="random")


def test_a_numbered_folder_that_lacks_an_image_is_named(
    few: dict[str, int],
    tmp_path: Path,
    touch: Callable[..., Path],
    scene_files: Callable[..., list[str]],
) -> None:
    """It cannot be told which class it is."""
    root = touch(tmp_path, *scene_files(numbered))
    (root / "03/image_0001.jpg").unlink()
    lacking = NUMBERED[3]
    message = rf"no folder of {lacking}\. Folders of no class: 03 \({few[lacking] - 1} images\)"
    with pytest.raises(ValueError, match=message):
        load(root, split="random")


def test_other_folders_do_not_matter(
    own_root: Path, touch: Callable[..., Path], scene_files: Callable[..., list[str]]
) -> None:
    """All images of all classes are there."""
    touch(own_root, "splits/1.txt", "extra/1.jpg", "store/.hidden.jpg", "store/Thumbs.db")
    assert len(load(own_root, split="random").data) == len(scene_files())


def test_a_folder_that_holds_but_a_link_to_itself_is_an_error(tmp_path: Path) -> None:
    """The way down to the class folders does not go round."""
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="leads back to"):
        load_scene15(tmp_path)


@pytest.mark.parametrize("count", [0, 210, -5, 2.5, None])
def test_the_smallest_class_limits_the_training_images(scenes_root: Path, count: int) -> None:
    """None would be left to test on."""
    with pytest.raises(ValueError, match=f"train_per_class={count}: a whole number from 1 to 209"):
        load_scene15(scenes_root, split="random", train_per_class=count)


def test_an_unknown_split_is_an_error(scenes_root: Path) -> None:
    """There are two."""
    with pytest.raises(ValueError, match=r"split='train' is none of \('fixed', 'random'\)"):
        load_scene15(scenes_root, split="train")
