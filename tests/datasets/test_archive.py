"""15-Scene, downloaded by HTTP and unpacked."""

import hashlib
import http.server
import io
import re
import shutil
import stat
import sys
import threading
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from numpy.testing import assert_array_equal
from sklearn.utils import Bunch

from deepfeat import _optional
from deepfeat.datasets import _scene15 as datasets
from deepfeat.datasets._scene15 import fetch_scene15


def pack(files: dict[str, bytes], **options: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def archive(scene_files: Callable[..., list[str]]) -> bytes:
    """The packed dataset; the content of each image is its name."""
    return pack({file: file.encode() for file in scene_files()} | {"readme.txt": b"Hello"})


class Server(http.server.ThreadingHTTPServer):
    """A server of `content` at any address, with faults; it records the requested `ranges`."""

    content = b""
    can_resume = True
    shift = 0  # offset of a resumed answer from the requested start
    cuts: list[int]  # numbers of bytes after which to hang up, one per answer
    fails: list[int]  # error codes to answer with first
    ranges: list[str | None]

    def handle_error(self, *_: object) -> None:
        """Print nothing: clients that hang up are part of the tests."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/scene_categories.zip"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, requested = self.server, self.headers["Range"]
        server.ranges.append(requested)
        if server.fails:
            self.send_error(server.fails.pop(0))
            return
        start = int(requested[6:-1]) + server.shift if requested and server.can_resume else 0
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
        """Print nothing."""


@pytest.fixture
def server(archive: bytes, few: dict[str, int]) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.content, server.cuts, server.fails, server.ranges = archive, [], [], []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(server: Server, home: Path, **params: object) -> Bunch:
    """Fetch with the right hash, without waiting between retries."""
    digest = f"sha256:{hashlib.sha256(server.content).hexdigest()}"
    given = {"url": server.url, "known_hash": digest, "random_state": 0, "delay": 0.0}
    return fetch_scene15(home, **{"train_per_class": 5, **given, **params})


def left_in(home: Path) -> set[str]:
    return {re.sub("-[0-9a-f]{8}", "", path.name) for path in home.iterdir()}


@pytest.fixture(autouse=True)
def quiet_pooch() -> None:
    """Keep pooch from reporting downloads on stderr."""
    pooch = pytest.importorskip("pooch")
    pooch.get_logger().setLevel("ERROR")


def test_the_data_set_is_fetched_once(
    server: Server,
    tmp_path: Path,
    names_in: Callable[..., list[str]],
    scene_files: Callable[..., list[str]],
) -> None:
    """All of it goes into the folder scene15 and nowhere else; later calls need no server."""
    scenes = fetch(server, tmp_path)
    assert names_in(tmp_path / "scene15", scenes.data) == scene_files()
    assert [Path(path).read_text() for path in scenes.data[::50]] == scene_files()[::50]
    assert (len(scenes.train), len(scenes.test)) == (75, len(scene_files()) - 75)
    assert left_in(tmp_path) == {"scene15"}
    again = fetch(server, tmp_path, download_if_missing=False, url="http://127.0.0.1:9/nowhere")
    assert_array_equal(again.train, scenes.train)
    assert server.ranges == [None]


def test_missing_data_that_must_not_be_downloaded_are_an_error(tmp_path: Path) -> None:
    """As in scikit-learn's fetch functions."""
    with pytest.raises(
        OSError, match=r"scene15' does not exist and download_if_missing is False\.$"
    ):
        fetch_scene15(tmp_path, download_if_missing=False)


def test_invalid_parameters_download_nothing(server: Server, tmp_path: Path) -> None:
    """They are checked first."""
    with pytest.raises(ValueError, match=r"train_per_class must be .*; got 0\."):
        fetch(server, tmp_path, train_per_class=0)
    with pytest.raises(ValueError, match="split must be 'fixed' or 'random'; got 'train'"):
        fetch(server, tmp_path, split="train")
    assert server.ranges == []


def test_data_are_in_the_data_home_of_scikit_learn(
    own_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless another folder is given."""
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    own_root.rename(tmp_path / "scene15")
    scenes = fetch_scene15(download_if_missing=False, train_per_class=5)
    assert scenes.data[0].startswith(str(tmp_path))
    assert len(scenes.train) == 75


def test_a_split_file_in_the_data_home_is_used(
    server: Server,
    tmp_path: Path,
    write_split: Callable[[Path, list[str]], None],
    scene_files: Callable[..., list[str]],
    is_training: Callable[[str], bool],
) -> None:
    """The download has no fixed split of its own."""
    write_split(tmp_path / "scene15_split.csv", scene_files())
    scenes = fetch(server, tmp_path, split="fixed")
    assert all(is_training(path) for path in scenes.data[scenes.train])


@pytest.mark.parametrize("can_resume", [True, False])
def test_an_interrupted_download_is_resumed(
    server: Server, tmp_path: Path, can_resume: bool
) -> None:
    """It resumes from the first missing byte if the server can do that, or else starts again."""
    server.can_resume, server.cuts = can_resume, [1000, 5000]
    with pytest.warns(UserWarning, match=r"^The download of .* was interrupted; retrying\.$"):
        fetch(server, tmp_path)
    second = 6000 if can_resume else 5000
    assert server.ranges == [None, "bytes=1000-", f"bytes={second}-"]
    assert left_in(tmp_path) == {"scene15"}


def test_a_later_call_resumes_an_interrupted_download(server: Server, tmp_path: Path) -> None:
    """What has been received is kept, and never taken for the whole."""
    server.cuts = [1000]
    with pytest.raises(OSError, match=rf"failed \(received 1000 of {len(server.content)} bytes\)"):
        fetch(server, tmp_path, n_retries=0)
    assert left_in(tmp_path) == {"scene15.zip.part"}
    with pytest.raises(OSError, match="does not exist"):
        fetch(server, tmp_path, download_if_missing=False)
    fetch(server, tmp_path)
    assert server.ranges == [None, "bytes=1000-"]
    assert left_in(tmp_path) == {"scene15"}


def test_a_complete_part_is_not_downloaded_again(server: Server, tmp_path: Path) -> None:
    """The process may have been killed just before the file was renamed."""
    part_of(server, tmp_path).write_bytes(server.content)
    fetch(server, tmp_path)
    assert server.ranges == [f"bytes={len(server.content)}-"]


def test_a_part_longer_than_the_file_is_dropped(server: Server, tmp_path: Path) -> None:
    """It belongs to another file."""
    part_of(server, tmp_path).write_bytes(server.content + b"more")
    with pytest.warns(UserWarning, match="was interrupted"):
        fetch(server, tmp_path)
    assert server.ranges == [f"bytes={len(server.content) + 4}-", None]


def test_an_answer_with_another_range_is_not_appended(server: Server, tmp_path: Path) -> None:
    """The download starts from the beginning."""
    server.cuts, server.shift = [1000], 7
    with pytest.warns(UserWarning, match="was interrupted"):
        fetch(server, tmp_path)
    assert server.ranges == [None, "bytes=1000-", None]


def test_parts_from_two_urls_are_not_joined(server: Server, tmp_path: Path) -> None:
    """Each URL has a file of its own."""
    part_of(server, tmp_path)
    fetch(server, tmp_path, url=f"{server.url}?other")
    assert server.ranges == [None]


def test_a_part_of_another_file_fails_the_check_once(server: Server, tmp_path: Path) -> None:
    """The hash reveals it, and the next call starts from the beginning."""
    part_of(server, tmp_path).write_bytes(b"x" * 1000)
    with pytest.raises(OSError, match="does not match the known hash"):
        fetch(server, tmp_path)
    assert left_in(tmp_path) == set()
    fetch(server, tmp_path)
    assert server.ranges == ["bytes=1000-", None]


def part_of(server: Server, home: Path) -> Path:
    """Return the path of the partial download, by interrupting one."""
    server.cuts = [1]
    with pytest.raises(OSError, match=r"^The download of .* failed"):
        fetch(server, home, n_retries=0)
    server.ranges.clear()
    (part,) = home.iterdir()
    return part


def test_server_errors_are_retried(server: Server, tmp_path: Path) -> None:
    """They may be temporary."""
    server.fails = [503, 500]
    with pytest.warns(UserWarning, match="was interrupted"):
        fetch(server, tmp_path)
    assert len(server.ranges) == 3


def test_a_refusal_is_final(server: Server, tmp_path: Path) -> None:
    """A file that is not found will not be found a second later."""
    server.fails = [404]
    with pytest.raises(OSError, match=r"^The download of .*scene_categories\.zip failed \(.*404"):
        fetch(server, tmp_path)
    assert len(server.ranges) == 1
    assert left_in(tmp_path) == set()


def test_an_unreachable_server_is_an_error(tmp_path: Path) -> None:
    """The error is raised after the retries, and gives the URL."""
    url = "http://127.0.0.1:9/x.zip"
    with pytest.warns(UserWarning, match="was interrupted"), pytest.raises(OSError, match=url):
        fetch_scene15(tmp_path, url=url, n_retries=1, delay=0)
    assert left_in(tmp_path) == set()


def test_a_wrong_hash_is_an_error(server: Server, tmp_path: Path) -> None:
    """Nothing of the download is kept."""
    with pytest.raises(
        OSError, match=r"does not match known_hash\. .* does not match the known hash"
    ):
        fetch(server, tmp_path, known_hash="md5:58828019197b2ad0a7efb472e7a85c2a")
    assert left_in(tmp_path) == set()


def test_any_hash_is_trusted_on_request(
    server: Server, tmp_path: Path, scene_files: Callable[..., list[str]]
) -> None:
    """known_hash=None accepts any archive."""
    assert len(fetch(server, tmp_path, known_hash=None).data) == len(scene_files())


def test_an_archive_with_an_outer_folder_is_accepted(
    server: Server,
    tmp_path: Path,
    names_in: Callable[..., list[str]],
    scene_files: Callable[..., list[str]],
) -> None:
    """Its class folders lie one level deeper."""
    server.content = pack({f"scene_categories/{file}": b"" for file in scene_files()})
    scenes = fetch(server, tmp_path)
    assert names_in(tmp_path / "scene15/scene_categories", scenes.data) == scene_files()


def with_entry(
    archive: bytes, name: str, mode: int = stat.S_IFREG | 0o644, content: bytes = b"evil"
) -> bytes:
    """Add an entry to an archive."""
    buffer = io.BytesIO(archive)
    with zipfile.ZipFile(buffer, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about duplicate names
        entry = zipfile.ZipInfo(name)
        entry.external_attr = mode << 16
        archive.writestr(entry, content)
    return buffer.getvalue()


def as_encrypted(content: bytes) -> bytes:
    """Mark the last entry as encrypted."""
    start = content.rindex(b"PK\1\2")
    return content[: start + 8] + b"\1" + content[start + 9 :]


def without_last(archive: bytes) -> bytes:
    """Pack an archive again, without its last image."""
    with zipfile.ZipFile(io.BytesIO(archive)) as whole:
        *images, _ = (name for name in whole.namelist() if name.endswith(".jpg"))
    return pack(dict.fromkeys(images, b""))


BAD_ARCHIVES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "climbs": (lambda good: with_entry(good, "../evil.txt"), "outside its folder"),
    "climbs-deeper": (lambda good: with_entry(good, "store/../../evil.txt"), "outside its folder"),
    "absolute": (lambda good: with_entry(good, "/tmp/evil.txt"), "outside its folder"),
    "windows": (lambda good: with_entry(good, "..\\evil.txt"), "outside its folder"),
    "drive": (lambda good: with_entry(good, "C:evil.txt"), "outside its folder"),
    "nameless": (lambda good: with_entry(good, "."), "outside its folder"),
    "link": (
        lambda good: with_entry(good, "link", stat.S_IFLNK | 0o777, b"/etc"),
        "a link or not a regular file",
    ),
    "fifo": (
        lambda good: with_entry(good, "pipe", stat.S_IFIFO | 0o666),
        "a link or not a regular file",
    ),
    "twice": (lambda good: with_entry(good, "store/image_0001.jpg"), "'image_0001.jpg' twice"),
    "file-as-folder": (
        lambda good: with_entry(good, "store/image_0001.jpg/a/b"),
        "a file as a folder",
    ),
    "encrypted": (lambda good: as_encrypted(with_entry(good, "secret")), "encrypted"),
    "no-zip": (lambda _: b"<html>not found</html>" * 9, "damaged or not a zip file"),
    "cut": (lambda good: with_entry(good, "x")[:-30], "damaged or not a zip file"),
    "bad-crc": (
        lambda good: with_entry(good, "x").replace(b"evil", b"EVIL", 1),
        "damaged or not a zip file",
    ),
    "incomplete": (without_last, "21 images of store instead of 22"),
    "something-else": (lambda _: pack({"a/1.jpg": b""}), "no folder for CALsuburb"),
    "empty": (lambda _: pack({}), "no folder for CALsuburb"),
}


@pytest.mark.parametrize("kind", BAD_ARCHIVES)
def test_a_bad_archive_leaves_nothing_behind(
    server: Server, tmp_path: Path, kind: str, scene_files: Callable[..., list[str]]
) -> None:
    """Nothing is left inside or outside, and a good archive can be fetched afterwards."""
    home = tmp_path / "outside/home"
    home.mkdir(parents=True)
    make, message = BAD_ARCHIVES[kind]
    good = server.content
    server.content = make(good)
    with pytest.raises(OSError, match=f"^The archive downloaded from .* is unusable: .*{message}"):
        fetch(server, home)
    assert [path for path in (tmp_path / "outside").rglob("*") if path != home] == []
    server.content = good
    assert len(fetch(server, home).data) == len(scene_files())


def test_a_zip_bomb_is_not_unpacked(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scene_files: Callable[..., list[str]],
) -> None:
    """Neither a few bytes that expand to many are unpacked, nor countless files."""
    server.content = pack({"a/1.jpg": bytes(10**7)}, compression=zipfile.ZIP_DEFLATED)
    assert len(server.content) < 20_000
    monkeypatch.setattr(datasets, "_MAX_BYTES", 10**6)
    with pytest.raises(
        OSError, match=r"at most .* of 1000000 bytes in all; got 1 file\(s\) of 10000000 bytes"
    ):
        fetch(server, tmp_path)
    monkeypatch.setattr(datasets, "_MAX_FILES", 10)
    server.content = pack(dict.fromkeys(scene_files()[:11], b""))
    with pytest.raises(OSError, match=r"at most 10 files of .*; got 11 file\(s\) of 0 bytes"):
        fetch(server, tmp_path)
    assert left_in(tmp_path) == set()


def test_a_zip_bomb_with_a_false_size_is_cut_short(server: Server, tmp_path: Path) -> None:
    """No more is read than declared, and that fails its checksum."""
    packed = pack({"a/1.jpg": bytes(10**6)}, compression=zipfile.ZIP_DEFLATED)
    declared = (10**6).to_bytes(4, "little")
    assert packed.count(declared) == 2
    server.content = packed.replace(declared, (10).to_bytes(4, "little"))
    with pytest.raises(OSError, match="damaged or not a zip file"):
        fetch(server, tmp_path)


def test_a_partly_unpacked_folder_is_never_taken_for_a_complete_one(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scene_files: Callable[..., list[str]],
) -> None:
    """Interrupted unpacking leaves the archive, but no folder scene15."""
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


def test_another_process_may_be_faster(
    server: Server, own_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder is kept and used."""
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
    """The error is raised before anything is downloaded."""
    monkeypatch.setitem(sys.modules, "pooch", None)
    monkeypatch.setattr(_optional.importlib, "import_module", missing_pooch)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pooch>="):
        fetch_scene15(tmp_path)


def missing_pooch(name: str) -> None:
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
