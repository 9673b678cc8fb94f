"""Archives: downloads that can be resumed, and safe unpacking."""

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
    """Download a file to `part`, resuming an interrupted download, and move it to `target`.

    Raises
    ------
    OSError
        If the server refuses, or the download is still interrupted after `n_retries` retries,
        which are `delay` seconds apart. `part` is kept, so that the next call can resume.
    """
    while not _download_rest(url, part, may_fail=n_retries > 0):
        warnings.warn(
            f"The download of {url} was interrupted; retrying.", UserWarning, stacklevel=2
        )
        n_retries -= 1
        time.sleep(delay)
    os.replace(part, target)


def unpack_zip(archive: Path, folder: Path, *, max_files: int, max_bytes: int) -> None:
    """Unpack the files of a zip archive into a new folder.

    Raises
    ------
    ValueError
        If the archive is damaged or exceeds the limits, or a member is encrypted, is not a regular
        file or lies outside the folder. Nothing is ever written outside the folder.
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
                # No more is read than the declared size, which was checked.
                with zipped.open(member) as source, path.open("xb") as target:
                    shutil.copyfileobj(source, target)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(
            f"The archive holds {path.name!r} twice, or uses a file as a folder."
        ) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(f"The archive is damaged or not a zip file ({error}).") from error


# Downloading ------------------------------------------------------------------------------------


def _download_rest(url: str, part: Path, *, may_fail: bool) -> bool:
    """Append the missing bytes to `part`; return whether it is complete."""
    try:
        _append(url, part)
    except (OSError, HTTPException) as error:
        refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
        if may_fail and not refused:
            return False
        raise OSError(
            f"The download of {url} failed ({error}). "
            "Check the address and the connection, and try again."
        ) from error
    return True


def _append(url: str, part: Path) -> None:
    start = part.stat().st_size if part.exists() else 0
    # Bytes that are compressed in transit could not be counted.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != 416:  # range not satisfiable
            raise
        if error.headers["Content-Range"] == f"bytes */{start}":
            return  # `part` is complete
        part.unlink()  # it belongs to another file than the server's present one
        raise OSError("the file on the server has changed") from error
    with response:
        if response.status != 206:  # the server sends the whole file, from the start
            start = 0
        elif not str(response.headers["Content-Range"]).startswith(f"bytes {start}-"):
            part.unlink()
            raise OSError("the server sent another part of the file than requested")
        length = response.headers["Content-Length"]
        with part.open("ab" if start else "wb") as file:
            shutil.copyfileobj(response, file)
    size = part.stat().st_size
    if length is not None and size != start + int(length):
        raise OSError(f"received {size} of {start + int(length)} bytes")


# Unpacking --------------------------------------------------------------------------------------


def _check_size(members: Sequence[zipfile.ZipInfo], max_files: int, max_bytes: int) -> None:
    size = sum(member.file_size for member in members)
    if len(members) > max_files or size > max_bytes:
        raise ValueError(
            f"The archive must hold at most {max_files} files of {max_bytes} bytes in all; got "
            f"{len(members)} file(s) of {size} bytes."
        )


def _check_member(member: zipfile.ZipInfo) -> None:
    name = member.filename
    path = PurePosixPath(name)
    # On Windows, a backslash or a colon may lead elsewhere.
    if not path.parts or path.is_absolute() or ".." in path.parts or set(name) & set("\\:"):
        raise ValueError(f"The archive holds {name!r}, which lies outside its folder.")
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):  # 0: packed on a system without file types
        raise ValueError(f"The archive holds {name!r}, which is a link or not a regular file.")
    if member.flag_bits & 1:
        raise ValueError(f"The archive holds {name!r}, which is encrypted.")
