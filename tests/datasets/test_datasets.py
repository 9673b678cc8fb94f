"""Tests of listing images in folders, of 15-Scene in its layouts, and of fetching it by HTTP."""

import csv
import hashlib
import http.server
import io
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from sklearn.datasets import load_files
from sklearn.utils import Bunch

from deepfeat import _optional
from deepfeat.datasets import _scene15 as datasets
from deepfeat.datasets._folders import load_image_folder
from deepfeat.datasets._scene15 import fetch_scene15, load_scene15

# What Lazebnik, Schmid and Ponce published, in the order of their folders' names.
SCENES = {
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
# As different in number, and as ordered, but sooner made.
FEW = {name: 13 + sorted(SCENES.values()).index(count) for name, count in SCENES.items()}


def touch(root: Path, *names: str) -> Path:
    """Make empty files, and the folders that they are in."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def names_in(root: Path, paths: np.ndarray) -> list[str]:
    return [Path(path).relative_to(root).as_posix() for path in paths]


# Folders ----------------------------------------------------------------------------------------


def test_images_are_listed_by_class_in_sorted_order(tmp_path: Path) -> None:
    """Paths, labels and names, whatever order the disk has; numbers are sorted as text."""
    touch(tmp_path, "dog/2.png", "dog/10.JPG", "cat/b/1.jpeg", "cat/z.jpg", "cat/a.tif")
    images = load_image_folder(tmp_path)
    expected = ["cat/a.tif", "cat/b/1.jpeg", "cat/z.jpg", "dog/10.JPG", "dog/2.png"]
    assert names_in(tmp_path, images.data) == expected
    assert_array_equal(images.target, [0, 0, 0, 1, 1])
    assert_array_equal(images.target_names, ["cat", "dog"])
    assert images.target.dtype.kind == "i"
    assert (images.n_hidden, images.n_links, images.n_other) == (0, 0, 0)


def test_folders_are_those_of_scikit_learn(tmp_path: Path) -> None:
    """`sklearn.datasets.load_files` lists the same files and labels of plain class folders."""
    touch(tmp_path, *(f"{name}/{number}.jpg" for name in ("b", "a", "ö", "C") for number in "312"))
    expected = load_files(tmp_path, load_content=False, shuffle=False)
    images = load_image_folder(tmp_path)
    assert sorted(images.data) == sorted(expected.filenames)
    assert_array_equal(images.target_names, expected.target_names)
    labels = dict(zip(expected.filenames, expected.target, strict=True))
    assert_array_equal(images.target, [labels[path] for path in images.data])


@given(st.lists(st.tuples(*[st.text("abAB.é", min_size=1, max_size=3)] * 2), min_size=1))
def test_nothing_is_lost_uncounted(tmp_path_factory: pytest.TempPathFactory, names: list) -> None:
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


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    """Hidden files and folders, files with other endings, and files that are in no class."""
    touch(tmp_path, "cat/1.jpg", "cat/.2.jpg", "cat/notes.txt", "cat/jpg", ".git/3.jpg", "4.jpg")
    touch(tmp_path, "__MACOSX/cat/._1.jpg", "cat/.thumbs/1.jpg", "cat/deep/5.gif.txt")
    images = load_image_folder(tmp_path)
    assert names_in(tmp_path, images.data) == ["cat/1.jpg"]
    assert (images.n_hidden, images.n_links, images.n_other) == (4, 0, 4)


def test_extensions_can_be_chosen(tmp_path: Path) -> None:
    """Small letters or capitals are the same."""
    touch(tmp_path, "cat/1.jpg", "cat/2.JP2", "cat/3.jp2")
    images = load_image_folder(tmp_path, extensions=[".Jp2"])
    assert names_in(tmp_path, images.data) == ["cat/2.JP2", "cat/3.jp2"]
    assert images.n_other == 1


@pytest.mark.parametrize("extensions", [".jpg", ["jpg"], ["*.jpg", ".png"]])
def test_extensions_without_a_dot_are_refused(tmp_path: Path, extensions: list[str]) -> None:
    """They would find nothing, or too much."""
    touch(tmp_path, "cat/1.jpg")
    with pytest.raises(ValueError, match=r"a list of endings with their dot"):
        load_image_folder(tmp_path, extensions=extensions)


def test_links_are_followed_on_request(tmp_path: Path) -> None:
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
def test_links_in_a_circle_are_an_error(tmp_path: Path, link: str, target: str) -> None:
    """Rather than images without end."""
    touch(tmp_path, "cat/1.jpg", "cat/x/2.jpg")
    (tmp_path / link).symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match=r"leads back to"):
        load_image_folder(tmp_path, follow_links=True)
    assert len(load_image_folder(tmp_path).data) == 2


def test_two_folders_that_link_to_each_other_are_an_error(tmp_path: Path) -> None:
    """A circle of two."""
    touch(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "a/b").symlink_to(tmp_path / "b")
    (tmp_path / "b/a").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match=r"leads back to"):
        load_image_folder(tmp_path, follow_links=True)


def test_a_folder_without_classes_is_an_error(tmp_path: Path) -> None:
    """Images that lie loose are mentioned."""
    touch(tmp_path, "1.jpg", "2.jpg", ".hidden")
    with pytest.raises(ValueError, match=r"no class folders; .* Left out: 1 hidden, 2 other files"):
        load_image_folder(tmp_path)


def test_a_class_without_images_is_an_error(tmp_path: Path) -> None:
    """It could not be learned, and its images are probably called otherwise."""
    touch(tmp_path, "cat/1.jpg", "dog/1.jp2")
    with pytest.raises(ValueError, match=r"class folders without an image: 'dog'.*extensions="):
        load_image_folder(tmp_path)


@pytest.mark.parametrize("name", ["nothing", "file.jpg"])
def test_no_folder_is_an_error(tmp_path: Path, name: str) -> None:
    """Neither a file nor nothing is a folder."""
    touch(tmp_path, "file.jpg")
    for load in (load_image_folder, load_scene15):
        with pytest.raises(NotADirectoryError, match=f"there is no folder .*{name}"):
            load(tmp_path / name)


def test_paths_begin_with_the_root_as_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


# 15-Scene ---------------------------------------------------------------------------------------


def scene_files(rename: Callable[[str], str] = str, scenes: dict[str, int] = FEW) -> list[str]:
    return [
        f"{rename(name)}/image_{number:04}.jpg"
        for name, count in scenes.items()
        for number in range(1, count + 1)
    ]


def is_training(file: str) -> bool:
    """Make a split of 5 a class that no rule of the library would make."""
    return 7 < int(file[-8:-4]) <= 12


@pytest.fixture(scope="module")
def scenes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of 15-Scene as it was published, but for what is in its files."""
    return touch(tmp_path_factory.mktemp("published"), *scene_files(scenes=SCENES))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a data set of some hundred images published instead of 15-Scene."""
    monkeypatch.setattr(datasets, "_SCENES", FEW)


@pytest.fixture
def own_root(few: None, tmp_path: Path) -> Path:
    """A folder of the smaller data set, which a test may change."""
    return touch(tmp_path / "own", *scene_files())


def load(root: str | Path, **params: object) -> Bunch:
    """Load the smaller data set."""
    return load_scene15(root, **{"train_per_class": 5, **params})


def write_split(path: Path, files: list[str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["split", "class", "file"])
        writer.writerows(
            ["train" if is_training(name) else "test", *name.split("/")] for name in files
        )


def numbered(name: str) -> str:
    """Number the classes in another order than the published names have."""
    return f"{sorted(SCENES, key=str.lower).index(name):02}"


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
@pytest.mark.usefixtures("few")
def test_every_layout_gives_the_same_images(tmp_path: Path, layout: str) -> None:
    """Classes and their order are those published, whatever the folders are called."""
    root = touch(tmp_path / "root", *scene_files(LAYOUTS[layout]), "readme.txt")
    plain = touch(tmp_path / "plain", *scene_files())
    scenes = load(root, split="random", random_state=0)
    expected = load(plain, split="random", random_state=0)
    assert list(scenes.target_names) == list(SCENES)
    for key in ("target", "train", "test"):
        assert_array_equal(scenes[key], expected[key])
    assert names_in(root, scenes.data) == scene_files(LAYOUTS[layout])


def test_all_images_are_listed(scenes_root: Path) -> None:
    """4,485 of 15 classes, sorted, each with its class."""
    scenes = load_scene15(scenes_root, split="random", random_state=0)
    assert names_in(scenes_root, scenes.data) == scene_files(scenes=SCENES)
    assert_array_equal(np.bincount(scenes.target), list(SCENES.values()))
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
def test_a_fixed_split_is_read_from_a_file(own_root: Path, tmp_path: Path, place: str) -> None:
    """In the folder of the images or beside it."""
    write_split(tmp_path / place, scene_files())
    scenes = load(own_root)
    for part, places in {True: scenes.train, False: scenes.test}.items():
        expected = [file for file in scene_files() if is_training(file) is part]
        assert names_in(own_root, scenes.data[places]) == expected


def test_a_split_file_is_found_beside_the_current_folder(
    own_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The root may be called "."."""
    write_split(tmp_path / "scene15_split.csv", scene_files())
    monkeypatch.chdir(own_root)
    assert len(load(".").train) == 75


@pytest.mark.parametrize("rename", [str, numbered])
@pytest.mark.usefixtures("few")
def test_a_split_file_may_name_folders_or_classes(
    tmp_path: Path, rename: Callable[[str], str]
) -> None:
    """Folders as they are called here, or as they were published."""
    root = touch(tmp_path / "own", *scene_files(numbered))
    write_split(tmp_path / "scene15_split.csv", scene_files(rename))
    scenes = load(root)
    assert names_in(root, scenes.data[scenes.train]) == list(
        filter(is_training, scene_files(numbered))
    )


@pytest.mark.usefixtures("few")
def test_folders_for_training_and_testing_are_the_fixed_split(tmp_path: Path) -> None:
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


def test_a_fixed_split_of_another_size_is_an_error(own_root: Path, tmp_path: Path) -> None:
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
    own_root: Path, tmp_path: Path, spoil: Callable[[str], str], message: str
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


@pytest.mark.usefixtures("few")
def test_a_numbered_folder_that_lacks_an_image_is_named(tmp_path: Path) -> None:
    """It cannot be told which class it is."""
    root = touch(tmp_path, *scene_files(numbered))
    (root / "03/image_0001.jpg").unlink()
    lacking = sorted(SCENES, key=str.lower)[3]
    message = rf"no folder of {lacking}\. Folders of no class: 03 \({FEW[lacking] - 1} images\)"
    with pytest.raises(ValueError, match=message):
        load(root, split="random")


def test_other_folders_do_not_matter(own_root: Path) -> None:
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


# Fetched ----------------------------------------------------------------------------------------


def pack(files: dict[str, bytes], **options: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def archive() -> bytes:
    """The data set, packed; each image holds its name."""
    return pack({file: file.encode() for file in scene_files()} | {"readme.txt": b"Hello"})


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at any address, as the test wants it; `ranges` is what was asked for."""

    content = b""
    can_resume = True
    shift = 0  # how far from what was asked for a continued answer begins
    cuts: list[int]  # after how many bytes to hang up, one answer each
    fails: list[int]  # codes of errors to answer with, before all else
    ranges: list[str | None]

    def handle_error(self, *_: object) -> None:
        """Say nothing: clients that hang up are part of the tests."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/scene_categories.zip"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, asked = self.server, self.headers["Range"]
        server.ranges.append(asked)
        if server.fails:
            self.send_error(server.fails.pop(0))
            return
        start = int(asked[6:-1]) + server.shift if asked and server.can_resume else 0
        size = len(server.content)
        if start >= size > 0:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        rest = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: server.cuts.pop(0)] if server.cuts else rest)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(archive: bytes, few: None) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.content, server.cuts, server.fails, server.ranges = archive, [], [], []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(server: Server, home: Path, **params: object) -> Bunch:
    """Fetch with the right hash, and without waiting."""
    digest = f"sha256:{hashlib.sha256(server.content).hexdigest()}"
    given = {"url": server.url, "known_hash": digest, "random_state": 0, "delay": 0.0}
    return fetch_scene15(home, **{"train_per_class": 5, **given, **params})


def left_in(home: Path) -> set[str]:
    return {re.sub("-[0-9a-f]{8}", "", path.name) for path in home.iterdir()}


@pytest.fixture(autouse=True)
def quiet_pooch() -> None:
    """Let pooch not say on stderr what it downloads."""
    pooch = pytest.importorskip("pooch")
    pooch.get_logger().setLevel("ERROR")


def test_the_data_set_is_fetched_once(server: Server, tmp_path: Path) -> None:
    """All of it, into the folder scene15 and nowhere else; later calls need no server."""
    scenes = fetch(server, tmp_path)
    assert names_in(tmp_path / "scene15", scenes.data) == scene_files()
    assert [Path(path).read_text() for path in scenes.data[::50]] == scene_files()[::50]
    assert (len(scenes.train), len(scenes.test)) == (75, len(scene_files()) - 75)
    assert left_in(tmp_path) == {"scene15"}
    again = fetch(server, tmp_path, download_if_missing=False, url="http://127.0.0.1:9/nowhere")
    assert_array_equal(again.train, scenes.train)
    assert server.ranges == [None]


def test_what_is_missing_and_may_not_be_downloaded_is_an_error(tmp_path: Path) -> None:
    """As scikit-learn's fetch functions have it."""
    with pytest.raises(OSError, match=r"there is no '.*scene15', and download_if_missing is False"):
        fetch_scene15(tmp_path, download_if_missing=False)


def test_wrong_arguments_download_nothing(server: Server, tmp_path: Path) -> None:
    """They are refused first."""
    with pytest.raises(ValueError, match="train_per_class=0: "):
        fetch(server, tmp_path, train_per_class=0)
    with pytest.raises(ValueError, match="split='train' is none of"):
        fetch(server, tmp_path, split="train")
    assert server.ranges == []


def test_data_lie_where_those_of_scikit_learn_do(
    own_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless a folder is named."""
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    own_root.rename(tmp_path / "scene15")
    scenes = fetch_scene15(download_if_missing=False, train_per_class=5)
    assert scenes.data[0].startswith(str(tmp_path))
    assert len(scenes.train) == 75


def test_a_split_file_in_the_data_home_is_used(server: Server, tmp_path: Path) -> None:
    """What is downloaded has no fixed split of its own."""
    write_split(tmp_path / "scene15_split.csv", scene_files())
    scenes = fetch(server, tmp_path, split="fixed")
    assert all(is_training(path) for path in scenes.data[scenes.train])


@pytest.mark.parametrize("can_resume", [True, False])
def test_a_download_that_breaks_off_is_continued(
    server: Server, tmp_path: Path, can_resume: bool
) -> None:
    """Where the server can, from the byte that is missing; else from the start."""
    server.can_resume, server.cuts = can_resume, [1000, 5000]
    with pytest.warns(UserWarning, match="broke off; trying again"):
        fetch(server, tmp_path)
    second = 6000 if can_resume else 5000
    assert server.ranges == [None, "bytes=1000-", f"bytes={second}-"]
    assert left_in(tmp_path) == {"scene15"}


def test_a_later_call_goes_on_where_the_last_one_broke_off(server: Server, tmp_path: Path) -> None:
    """The part that came is kept, and never taken for the whole."""
    server.cuts = [1000]
    with pytest.raises(OSError, match=rf"could not be downloaded: 1000 of {len(server.content)}"):
        fetch(server, tmp_path, n_retries=0)
    assert left_in(tmp_path) == {"scene15.zip.part"}
    with pytest.raises(OSError, match="there is no"):
        fetch(server, tmp_path, download_if_missing=False)
    fetch(server, tmp_path)
    assert server.ranges == [None, "bytes=1000-"]
    assert left_in(tmp_path) == {"scene15"}


def test_a_part_that_is_whole_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    """The process may have been ended just before the file got its name."""
    part_of(server, tmp_path).write_bytes(server.content)
    fetch(server, tmp_path)
    assert server.ranges == [f"bytes={len(server.content)}-"]


def test_a_part_longer_than_the_file_is_dropped(server: Server, tmp_path: Path) -> None:
    """It is of another file."""
    part_of(server, tmp_path).write_bytes(server.content + b"more")
    with pytest.warns(UserWarning, match="broke off"):
        fetch(server, tmp_path)
    assert server.ranges == [f"bytes={len(server.content) + 4}-", None]


def test_an_answer_that_begins_elsewhere_is_not_joined(server: Server, tmp_path: Path) -> None:
    """The download starts anew."""
    server.cuts, server.shift = [1000], 7
    with pytest.warns(UserWarning, match="broke off"):
        fetch(server, tmp_path)
    assert server.ranges == [None, "bytes=1000-", None]


def test_parts_from_two_addresses_are_not_joined(server: Server, tmp_path: Path) -> None:
    """Each address has a file of its own."""
    part_of(server, tmp_path)
    fetch(server, tmp_path, url=f"{server.url}?other")
    assert server.ranges == [None]


def test_a_part_of_another_file_fails_the_check_once(server: Server, tmp_path: Path) -> None:
    """The digest finds it out, and the next call starts anew."""
    part_of(server, tmp_path).write_bytes(b"x" * 1000)
    with pytest.raises(OSError, match="does not match the known hash"):
        fetch(server, tmp_path)
    assert left_in(tmp_path) == set()
    fetch(server, tmp_path)
    assert server.ranges == ["bytes=1000-", None]


def part_of(server: Server, home: Path) -> Path:
    """Find where the part of a download lies, by breaking one off."""
    server.cuts = [1]
    with pytest.raises(OSError, match="could not be downloaded"):
        fetch(server, home, n_retries=0)
    server.ranges.clear()
    (part,) = home.iterdir()
    return part


def test_errors_of_the_server_are_tried_again(server: Server, tmp_path: Path) -> None:
    """They may pass."""
    server.fails = [503, 500]
    with pytest.warns(UserWarning, match="broke off"):
        fetch(server, tmp_path)
    assert len(server.ranges) == 3


def test_a_refusal_is_final(server: Server, tmp_path: Path) -> None:
    """What is not found now will not be found in a second."""
    server.fails = [404]
    with pytest.raises(OSError, match=r"scene_categories.zip could not be downloaded: .*404"):
        fetch(server, tmp_path)
    assert len(server.ranges) == 1
    assert left_in(tmp_path) == set()


def test_no_server_is_an_error(tmp_path: Path) -> None:
    """After the retries, with the address."""
    url = "http://127.0.0.1:9/x.zip"
    with pytest.warns(UserWarning, match="broke off"), pytest.raises(OSError, match=url):
        fetch_scene15(tmp_path, url=url, n_retries=1, delay=0)
    assert left_in(tmp_path) == set()


def test_a_wrong_hash_is_an_error(server: Server, tmp_path: Path) -> None:
    """Nothing of what came is kept."""
    with pytest.raises(OSError, match=r"not what was expected: .* does not match the known hash"):
        fetch(server, tmp_path, known_hash="md5:58828019197b2ad0a7efb472e7a85c2a")
    assert left_in(tmp_path) == set()


def test_any_hash_is_trusted_on_request(server: Server, tmp_path: Path) -> None:
    """Where nobody knows it."""
    assert len(fetch(server, tmp_path, known_hash=None).data) == len(scene_files())


def test_a_wrapped_archive_is_taken(server: Server, tmp_path: Path) -> None:
    """With its class folders one folder down."""
    server.content = pack({f"scene_categories/{file}": b"" for file in scene_files()})
    scenes = fetch(server, tmp_path)
    assert names_in(tmp_path / "scene15/scene_categories", scenes.data) == scene_files()


def with_entry(name: str, mode: int = stat.S_IFREG | 0o644, content: bytes = b"evil") -> bytes:
    """Pack the data set with one more entry."""
    buffer = io.BytesIO(pack(dict.fromkeys(scene_files(), b"")))
    with zipfile.ZipFile(buffer, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a name is there twice
        entry = zipfile.ZipInfo(name)
        entry.external_attr = mode << 16
        archive.writestr(entry, content)
    return buffer.getvalue()


def as_encrypted(content: bytes) -> bytes:
    """Set the bit of the last entry that says so."""
    place = content.rindex(b"PK\1\2")
    return content[: place + 8] + b"\1" + content[place + 9 :]


BAD_ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "climbs": (lambda: with_entry("../evil.txt"), "outside its folder"),
    "climbs-deeper": (lambda: with_entry("store/../../evil.txt"), "outside its folder"),
    "absolute": (lambda: with_entry("/tmp/evil.txt"), "outside its folder"),
    "windows": (lambda: with_entry("..\\evil.txt"), "outside its folder"),
    "drive": (lambda: with_entry("C:evil.txt"), "outside its folder"),
    "nameless": (lambda: with_entry("."), "outside its folder"),
    "link": (lambda: with_entry("link", stat.S_IFLNK | 0o777, b"/etc"), "a link or no plain file"),
    "fifo": (lambda: with_entry("pipe", stat.S_IFIFO | 0o666), "a link or no plain file"),
    "twice": (lambda: with_entry("store/image_0001.jpg"), "'image_0001.jpg' twice"),
    "file-as-folder": (lambda: with_entry("store/image_0001.jpg/a/b"), "a file as a folder"),
    "encrypted": (lambda: as_encrypted(with_entry("secret")), "encrypted"),
    "no-zip": (lambda: b"<html>not found</html>" * 9, "damaged, or none"),
    "cut": (lambda: with_entry("x")[:-30], "damaged, or none"),
    "bad-crc": (lambda: with_entry("x").replace(b"evil", b"EVIL", 1), "damaged, or none"),
    "incomplete": (lambda: pack(dict.fromkeys(scene_files()[:-1], b"")), "21 instead of 22"),
    "something-else": (lambda: pack({"a/1.jpg": b""}), "there is no folder of CALsuburb"),
    "empty": (lambda: pack({}), "there is no folder"),
}


@pytest.mark.parametrize("kind", BAD_ARCHIVES)
def test_a_bad_archive_leaves_nothing_behind(server: Server, tmp_path: Path, kind: str) -> None:
    """Neither inside nor outside, though its digest is right; and a good one is fetched after."""
    home = tmp_path / "outside/home"
    home.mkdir(parents=True)
    make, message = BAD_ARCHIVES[kind]
    good, server.content = server.content, make()
    with pytest.raises(OSError, match=message):
        fetch(server, home)
    assert [path for path in (tmp_path / "outside").rglob("*") if path != home] == []
    server.content = good
    assert len(fetch(server, home).data) == len(scene_files())


def test_a_bomb_is_not_unpacked(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one of a few bytes that unfold into many, nor one of countless files."""
    server.content = pack({"a/1.jpg": bytes(10**7)}, compression=zipfile.ZIP_DEFLATED)
    assert len(server.content) < 20_000
    monkeypatch.setattr(datasets, "_MAX_BYTES", 10**6)
    with pytest.raises(OSError, match="1 files of 10000000 bytes; no more than"):
        fetch(server, tmp_path)
    monkeypatch.setattr(datasets, "_MAX_FILES", 10)
    server.content = pack(dict.fromkeys(scene_files()[:11], b""))
    with pytest.raises(OSError, match="11 files of 0 bytes; no more than 10 files"):
        fetch(server, tmp_path)
    assert left_in(tmp_path) == set()


def test_a_bomb_that_lies_about_its_size_is_cut_short(server: Server, tmp_path: Path) -> None:
    """No more is read than was declared, which then fails its checksum."""
    packed = pack({"a/1.jpg": bytes(10**6)}, compression=zipfile.ZIP_DEFLATED)
    declared = (10**6).to_bytes(4, "little")
    assert packed.count(declared) == 2
    server.content = packed.replace(declared, (10).to_bytes(4, "little"))
    with pytest.raises(OSError, match="damaged, or none"):
        fetch(server, tmp_path)


def test_a_folder_that_is_half_unpacked_is_never_taken_for_a_whole_one(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interruption while unpacking leaves the archive, and no folder scene15."""
    copy, calls = shutil.copyfileobj, Counter()

    def copy_some(*args: object) -> None:
        calls["copies"] += 1
        if calls["copies"] > 100:
            raise KeyboardInterrupt
        copy(*args)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", copy_some)
        with pytest.raises(KeyboardInterrupt):
            fetch(server, tmp_path)
    assert left_in(tmp_path) == {"scene15.zip"}
    server.ranges.clear()
    assert len(fetch(server, tmp_path).data) == len(scene_files())
    assert (left_in(tmp_path), server.ranges) == ({"scene15"}, [])


def test_another_process_may_be_quicker(
    server: Server, own_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has put there stays, and is as good."""
    rename = Path.rename

    def be_late(path: Path, target: Path) -> Path:
        shutil.copytree(own_root, target)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", be_late)
    home = tmp_path / "home"
    scenes = fetch(server, home)
    assert Path(scenes.data[0]).read_bytes() == b""
    assert left_in(home) == {"scene15"}


def test_without_pooch_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is downloaded."""
    monkeypatch.setitem(sys.modules, "pooch", None)
    monkeypatch.setattr(_optional.importlib, "import_module", missing_pooch)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'deepfeat\[datasets\]'"):
        fetch_scene15(tmp_path)


def missing_pooch(name: str) -> None:
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
