"""15-Scene: layouts of its folders, and splits."""

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
    """15-Scene as it was published, except that its files are empty."""
    return touch(tmp_path_factory.mktemp("published"), *scene_files(scenes=published))


def load(root: str | Path, **params: object) -> Bunch:
    """Load the small dataset."""
    return load_scene15(root, **{"train_per_class": 5, **params})


# In an order other than that of the published names.
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
    """Whatever the folders are called, the classes and their order are those published."""
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
    """There are 4,485 images of 15 classes, sorted, each with its class."""
    scenes = load_scene15(scenes_root, split="random", random_state=0)
    assert names_in(scenes_root, scenes.data) == scene_files(scenes=published)
    assert_array_equal(np.bincount(scenes.target), list(published.values()))
    assert_array_equal(load_image_folder(scenes_root).target, scenes.target)
    assert len(scenes.data) == 4485


@pytest.mark.parametrize("per_class", [1, 100, 209])
def test_a_random_split_has_equally_many_training_images_per_class(
    scenes_root: Path, per_class: int
) -> None:
    """Every image is either for training or for testing."""
    scenes = load_scene15(scenes_root, split="random", train_per_class=per_class, random_state=0)
    assert_array_equal(np.bincount(scenes.target[scenes.train]), [per_class] * 15)
    assert_array_equal(np.sort(np.r_[scenes.train, scenes.test]), np.arange(4485))
    assert_array_equal(scenes.train, np.unique(scenes.train))


def test_random_splits_follow_their_seed(scenes_root: Path) -> None:
    """Equal seeds draw equal splits, and different seeds different ones."""

    def draw(seed: object) -> list[int]:
        return list(load_scene15(scenes_root, split="random", random_state=seed).train)

    assert draw(0) == draw(0) == draw(np.random.RandomState(0))
    assert draw(0) != draw(1)
    assert draw(None) != draw(None)


@pytest.mark.parametrize("path", ["own/scene15_split.csv", "scene15_split.csv"])
def test_a_fixed_split_is_read_from_a_file(
    own_root: Path,
    tmp_path: Path,
    path: str,
    write_split: Callable[[Path, list[str]], None],
    scene_files: Callable[..., list[str]],
    names_in: Callable[..., list[str]],
    is_training: Callable[[str], bool],
) -> None:
    """The file lies in the folder of the images or beside it."""
    write_split(tmp_path / path, scene_files())
    scenes = load(own_root)
    for part, indices in {True: scenes.train, False: scenes.test}.items():
        expected = [file for file in scene_files() if is_training(file) is part]
        assert names_in(own_root, scenes.data[indices]) == expected


def test_a_split_file_is_found_beside_the_current_folder(
    own_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_split: Callable[[Path, list[str]], None],
    scene_files: Callable[..., list[str]],
) -> None:
    """The root may be given as "."."""
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
    """A split file may use the names of the folders or those published."""
    root = touch(tmp_path / "own", *scene_files(numbered))
    write_split(tmp_path / "scene15_split.csv", scene_files(rename))
    scenes = load(root)
    assert names_in(root, scenes.data[scenes.train]) == list(
        filter(is_training, scene_files(numbered))
    )


@pytest.mark.usefixtures("few")
def test_train_and_test_folders_are_the_fixed_split(
    tmp_path: Path,
    touch: Callable[..., Path],
    names_in: Callable[..., list[str]],
    is_training: Callable[[str], bool],
    scene_files: Callable[..., list[str]],
) -> None:
    """Copies with such folders are common in courses."""
    files = {file: "Train" if is_training(file) else "Test" for file in scene_files()}
    root = touch(tmp_path, *(f"data/{part}/{file}" for file, part in files.items()))
    scenes = load(root)
    assert names_in(root, scenes.data) == [f"data/{part}/{file}" for file, part in files.items()]
    assert all("Train" in path for path in scenes.data[scenes.train])
    assert not any("Train" in path for path in scenes.data[scenes.test])
    # The folders do not prevent another split.
    drawn = load(root, split="random", train_per_class=2, random_state=0)
    assert len(drawn.train) == 30


def test_no_fixed_split_is_made_up(scenes_root: Path) -> None:
    """None was published: if none comes with the images, the error says what to do."""
    with pytest.raises(ValueError, match=r"^The folder .* has no fixed split: .*split='random'"):
        load_scene15(scenes_root)


def test_a_fixed_split_of_another_size_is_an_error(
    own_root: Path,
    tmp_path: Path,
    write_split: Callable[[Path, list[str]], None],
    scene_files: Callable[..., list[str]],
) -> None:
    """`train_per_class` is not silently ignored."""
    write_split(tmp_path / "scene15_split.csv", scene_files())
    message = (
        r"does not have 4 training images per class \(train_per_class\): it has 5 of CALsuburb, "
    )
    with pytest.raises(ValueError, match=message):
        load(own_root, train_per_class=4)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda text: text.replace("split,", "part,", 1),
            r"must have columns 'split', 'class' and 'file', .*; got columns \['part', 'class', ",
        ),
        (lambda text: "", r"must have columns .*; got columns \[\] and 0 rows\.$"),
        (
            lambda text: text.replace("test,store,image_0001.jpg\n", ""),
            r"The split of store/image_0001.jpg in .*; got None\.$",
        ),
        (
            lambda text: text.replace("train,kitchen", "valid,kitchen"),
            "'train' or 'test'; got 'valid'",
        ),
    ],
)
def test_a_split_file_must_assign_every_image(
    own_root: Path,
    tmp_path: Path,
    spoil: Callable[[str], str],
    message: str,
    write_split: Callable[[Path, list[str]], None],
    scene_files: Callable[..., list[str]],
) -> None:
    """Otherwise an image would be lost, or used for testing by mistake."""
    path = tmp_path / "scene15_split.csv"
    write_split(path, scene_files())
    text = path.read_text()
    assert spoil(text) != text
    path.write_text(spoil(text))
    with pytest.raises(ValueError, match=message):
        load(own_root)


def test_differences_from_the_published_classes_are_named(own_root: Path) -> None:
    """Missing classes, missing and surplus images, and other folders are named."""
    (own_root / "store/image_0007.jpg").unlink()
    (own_root / "kitchen/image_0014.jpg").touch()
    (own_root / "MITcoast").rename(own_root / "beach")
    shutil.rmtree(own_root / "PARoffice")
    message = (
        "no folder for MITcoast, PARoffice; 14 images of kitchen instead of 13; "
        "21 images of store instead of 22. Other folders: beach (25 images)."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        load(own_root, split="random")


def test_a_numbered_folder_that_lacks_an_image_is_named(
    few: dict[str, int],
    tmp_path: Path,
    touch: Callable[..., Path],
    scene_files: Callable[..., list[str]],
) -> None:
    """Its class cannot be identified."""
    root = touch(tmp_path, *scene_files(numbered))
    (root / "03/image_0001.jpg").unlink()
    lacking = NUMBERED[3]
    message = rf"no folder for {lacking}\. Other folders: 03 \({few[lacking] - 1} images\)"
    with pytest.raises(ValueError, match=message):
        load(root, split="random")


def test_other_folders_do_not_matter(
    own_root: Path, touch: Callable[..., Path], scene_files: Callable[..., list[str]]
) -> None:
    """They are ignored as long as all images of all classes are there."""
    touch(own_root, "splits/1.txt", "extra/1.jpg", "store/.hidden.jpg", "store/Thumbs.db")
    assert len(load(own_root, split="random").data) == len(scene_files())


def test_a_folder_with_only_a_link_to_itself_is_an_error(tmp_path: Path) -> None:
    """The search for class folders does not go in circles."""
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="leads back to"):
        load_scene15(tmp_path)


@pytest.mark.parametrize("count", [0, 210, -5, 2.5, None])
def test_the_smallest_class_limits_the_training_images(scenes_root: Path, count: int) -> None:
    """At least one image of each class must be left for testing."""
    message = rf"^train_per_class must be an int from 1 to 209, .*; got {count}\.$"
    with pytest.raises(ValueError, match=message):
        load_scene15(scenes_root, split="random", train_per_class=count)


def test_an_unknown_split_is_an_error(scenes_root: Path) -> None:
    """The error names the splits that there are."""
    with pytest.raises(ValueError, match=r"^split must be 'fixed' or 'random'; got 'train'\.$"):
        load_scene15(scenes_root, split="train")
