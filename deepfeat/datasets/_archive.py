"""Archives: downloaded bit by bit, and unpacked without trusting them."""

import os
import shutil
import stat
import time
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path, PurePosixPath

_TIMEOUT_SECONDS = 30


def download(url: str, target: Path, part: Path, *, n_retries: int, delay: float) -> None:
    """Download to `part`, from where an earlier attempt broke off, and move that to `target`.

    Raises
    ------
    OSError
        If it breaks off more than `n_retries` times, `delay` seconds apart. `part` stays, for the
        next call to go on from.
    """
    while not _download_rest(url, part, may_fail=n_retries > 0):
        warnings.warn(f"the download of {url} broke off; trying again.", UserWarning, stacklevel=2)
        n_retries -= 1
        time.sleep(delay)
    os.replace(part, target)


def unpack_zip(archive: Path, folder: Path, *, max_files: int, max_bytes: int) -> None:
    """Unpack the files of a zip archive into a new folder.

    Raises
    ------
    ValueError
        If the archive is damaged, or a member is encrypted, is no plain file, or would lie outside
        the folder, or there is more than the limits allow. Nothing outside is ever written.
    """
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = [member for member in zipped.infolist() if not member.is_dir()]
            _check_size(members, max_files, max_bytes)
            for member in members:
                _check_member(member)
            folder.mkdir()
            for member in members:
                path = folder / member.filename
                path.parent.mkdir(parents=True, exist_ok=True)
                # Not more than the size that was checked is read, whatever is packed.
                with zipped.open(member) as source, path.open("xb") as target:
                    shutil.copyfileobj(source, target)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"the archive holds {path.name!r} twice, or a file as a folder") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(f"the archive is damaged, or none: {error}") from error


# Downloading ------------------------------------------------------------------------------------


def _download_rest(url: str, part: Path, *, may_fail: bool) -> bool:
    """Append to `part` what is missing; tell whether it is whole."""
    try:
        _append(url, part)
    except (OSError, HTTPException) as error:
        refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
        if may_fail and not refused:
            return False
        raise OSError(f"{url} could not be downloaded: {error}") from error
    return True


def _append(url: str, part: Path) -> None:
    start = part.stat().st_size if part.exists() else 0
    # Compressed on the way, the bytes could not be counted.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != 416:  # no such range
            raise
        if error.headers["Content-Range"] == f"bytes */{start}":
            return  # nothing is missing
        part.unlink()  # what was begun is not the file that is there now
        raise OSError("the server has another file by now") from error
    with response:
        if response.status != 206:  # the server sends the whole file, from the start
            start = 0
        elif not str(response.headers["Content-Range"]).startswith(f"bytes {start}-"):
            part.unlink()
            raise OSError("the server sent another part of the file than was asked for")
        length = response.headers["Content-Length"]
        with part.open("ab" if start else "wb") as file:
            shutil.copyfileobj(response, file)
    size = part.stat().st_size
    if length is not None and size != start + int(length):
        raise OSError(f"{size} of {start + int(length)} bytes arrived")


# Unpacking --------------------------------------------------------------------------------------


def _check_size(members: Sequence[zipfile.ZipInfo], max_files: int, max_bytes: int) -> None:
    size = sum(member.file_size for member in members)
    if len(members) > max_files or size > max_bytes:
        raise ValueError(
            f"the archive holds {len(members)} files of {size} bytes; no more than {max_files} "
            f"files of {max_bytes} bytes are expected"
        )


def _check_member(member: zipfile.ZipInfo) -> None:
    name = member.filename
    path = PurePosixPath(name)
    # A backslash or a colon leads elsewhere on Windows.
    if not path.parts or path.is_absolute() or ".." in path.parts or set(name) & set("\\:"):
        raise ValueError(f"the archive would write outside its folder: {name!r}")
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):  # 0: packed where files have no kinds
        raise ValueError(f"the archive holds {name!r}, which is a link or no plain file")
    if member.flag_bits & 1:
        raise ValueError(f"the archive holds {name!r}, which is encrypted")
