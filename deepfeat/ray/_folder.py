"""The folder of the rows: what fills it, which rows are committed, and whether all are there."""

import bisect
import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .._optional import import_optional
from ._ids import find_missing, find_repeated

checkpoint: Any = import_optional("ray.data.checkpoint", extra="ray")
writing: Any = import_optional("ray.data.checkpoint.checkpoint_writer", extra="ray")
pa: Any = import_optional("pyarrow", extra="ray")
datasets: Any = import_optional("pyarrow.dataset", extra="ray")
fs: Any = import_optional("pyarrow.fs", extra="ray")

# Readers of Parquet pass over names that begin with an underscore.
_DESCRIPTION, _CHECKPOINT, _SUCCESS = "_deepfeat.json", "_checkpoint", "_SUCCESS"
_DRAFT = "_deepfeat.draft"  # what is written first, and then renamed
_PENDING = f"{writing.PENDING_CHECKPOINT_SUFFIX}.parquet"


@dataclass(frozen=True)
class Folder:
    """The folder of the rows, what has filled it, and Ray's record of what is committed."""

    url: str
    system: Any
    path: str

    @classmethod
    def find(cls, output: str | os.PathLike[str]) -> "Folder":
        """Find the folder of a path or a URI, which need not exist."""
        return cls(*find_file_system(output))

    def check(self, description: Mapping[str, Any]) -> None:
        """Raise if something else has filled the folder."""
        names = self._list_names()
        if _DESCRIPTION not in names:
            if names - {_DRAFT}:
                raise ValueError(
                    "output must be a new or empty folder, or one that extract has begun; "
                    f"{self.url!r} contains other files."
                )
            return
        found = json.loads(self._read(_DESCRIPTION))
        for key, value in json.loads(json.dumps(dict(description))).items():  # tuples become lists
            if key != "version" and found.get(key) != value:
                raise ValueError(
                    "output was filled by another extractor or with other columns: expected "
                    f"{key} {value!r}, found {found.get(key)!r} in {self.url!r}. Choose another "
                    "folder."
                )

    def claim(self, description: Mapping[str, Any]) -> None:
        """Note what fills the folder, and that it is not finished."""
        names = self._list_names()
        if _DESCRIPTION not in names:
            self.system.create_dir(self.path, recursive=True)
            self._write(_DESCRIPTION, description)
        if _SUCCESS in names:
            self.system.delete_file(f"{self.path}/{_SUCCESS}")

    def read_committed(self, id: str, kind: Any) -> Any:
        """Return the ids of the rows that earlier calls have committed."""
        files = self._drop_unsure_records()
        if not files:
            return pa.chunked_array([], kind)
        return datasets.dataset(files, filesystem=self.system).to_table([id])[id].cast(kind)

    def _drop_unsure_records(self) -> list[str]:
        """Delete the records of files that are to be written again; return the others.

        A file is, if it has been removed, or if its record is pending as well as committed: Ray
        then deletes the file, but takes its rows for done.
        """
        records = set(self.list_records())
        files = sorted(self._list_names())
        sure = []
        for record in sorted(records):
            if record.endswith(_PENDING):
                continue
            name = record.rpartition("/")[2].removesuffix(".parquet")
            file = files[bisect.bisect_left(files, name) :][:1]
            is_pending = record.removesuffix(".parquet") + _PENDING in records
            if is_pending or not (file and file[0].startswith(name)):
                self.system.delete_file(record)
            else:
                sure.append(record)
        return sure

    def check_rows(self, ids: Any, id: str, error_column: str) -> tuple[int, int]:
        """Return how many rows there are and how many have failed; raise unless each id has one."""
        files = [path for path in list_files(self.system, self.path) if path.endswith(".parquet")]
        try:
            rows = datasets.dataset(files, filesystem=self.system).to_table([id, error_column])
        except pa.ArrowInvalid as error:
            raise RuntimeError(
                f"{self.url!r} has a file that cannot be read; another job may be writing it: "
                f"{error}"
            ) from error
        found = rows[id].cast(ids.type)
        missing = find_missing(ids, found)
        if len(missing):
            raise RuntimeError(
                f"{len(missing)} of {len(ids)} rows are missing in {self.url!r}, such as that of "
                f"{missing[0].as_py()!r}: the nodes do not share this folder, or files were "
                "removed meanwhile. The same call again computes them."
            )
        if len(find_repeated(found)):
            raise RuntimeError(
                f"Rows are repeated in {self.url!r}, to which another job wrote as well. Extract "
                "to a new folder."
            )
        return len(found), len(found) - rows[error_column].null_count

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Note that all rows are there."""
        self._write(_SUCCESS, summary)

    def list_records(self) -> list[str]:
        """List the paths of Ray's records of files, pending ones among them."""
        return list_files(self.system, f"{self.path}/{_CHECKPOINT}")

    def _list_names(self) -> set[str]:
        return {path.rpartition("/")[2] for path in list_files(self.system, self.path)}

    def _read(self, name: str) -> bytes:
        with self.system.open_input_file(f"{self.path}/{name}") as file:
            content: bytes = file.read()
        return content

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        with self.system.open_output_stream(f"{self.path}/{_DRAFT}") as file:
            file.write(json.dumps(dict(content), indent=1).encode())
        self.system.move(f"{self.path}/{_DRAFT}", f"{self.path}/{name}")


@contextlib.contextmanager
def committing_to(folder: Folder, context: Any, id: str) -> Iterator[None]:
    """Let Ray leave out the rows that are in a folder, and commit those that it writes there."""
    before = context.checkpoint_config
    context.checkpoint_config = checkpoint.CheckpointConfig(
        id_column=id,
        checkpoint_path=f"{folder.path}/{_CHECKPOINT}",
        override_filesystem=folder.system,
        delete_checkpoint_on_success=False,
    )
    try:
        yield
    finally:
        context.checkpoint_config = before


def list_files(system: Any, path: str, *, recursive: bool = False) -> list[str]:
    """List the paths in a folder; none if it does not exist or is a file."""
    if system.get_file_info(path).type == fs.FileType.File:
        return []
    selector = fs.FileSelector(path, allow_not_found=True, recursive=recursive)
    return [info.path for info in system.get_file_info(selector)]


def find_file_system(path: str | os.PathLike[str]) -> tuple[str, Any, str]:
    """Return a path or URI in full, its file system, and the path there."""
    url = os.fspath(path)
    if "://" not in url:
        url = os.path.abspath(os.path.expanduser(url))
    system, found = fs.FileSystem.from_uri(url)
    return url, system, found.rstrip("/")
