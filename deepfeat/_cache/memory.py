"""Rows in the memory of this process."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .disk import Found, check_width
from .owners import ThreadClaims


class MemoryStore:
    """Rows in memory, the least recently used first."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.hits = self.misses = self.bytes = 0
        self.rows: OrderedDict[tuple[bytes, bytes], NDArray[np.float32]] = OrderedDict()
        self.widths: dict[bytes, int] = {}
        self.held: Counter[bytes] = Counter()  # number of rows per namespace
        self.claims = ThreadClaims()
        self.files: dict[bytes, tuple[bytes, bytes]] = {}
        self.write_error: str | None = None

    def get_many(self, namespace: bytes, images: list[bytes], *, touch: bool) -> Found:
        with self.lock:
            stored = [self.rows.get((namespace, image)) for image in images]
            found = np.array([row is not None for row in stored], dtype=bool)
            if not found.any():
                return found, None
            rows = np.full((len(images), self.widths[namespace]), np.nan, np.float32)
            for i, (image, row) in enumerate(zip(images, stored, strict=True)):
                if row is not None:
                    rows[i] = row
                    self.rows.move_to_end((namespace, image))
            return found, rows

    def list_images(self) -> dict[bytes, list[bytes]]:
        images: dict[bytes, list[bytes]] = {}
        with self.lock:
            for namespace, image in self.rows:
                images.setdefault(namespace, []).append(image)
        return images

    def find(self, namespace: bytes, images: list[bytes]) -> set[bytes]:
        with self.lock:
            return {image for image in images if (namespace, image) in self.rows}

    def put_many(
        self,
        images: list[bytes],
        rows: Mapping[bytes, NDArray[np.float32]],
        max_bytes: int | None,
        job: bytes | None,
    ) -> None:
        with self.lock:
            for namespace, matrix in rows.items():
                check_width(namespace, self.widths.get(namespace) or matrix.shape[1], matrix)
            for namespace, matrix in rows.items():
                for image, row in zip(images, matrix, strict=True):
                    self._put(namespace, image, row)
            if job is not None:
                self.claims.release(job, images)
            if max_bytes is not None:
                self.prune(max_bytes)

    def _put(self, namespace: bytes, image: bytes, row: NDArray[np.float32]) -> None:
        if (namespace, image) not in self.rows:
            # A copy: a view would keep the whole matrix alive, and change with it.
            self.rows[namespace, image] = row.copy()
            self.widths[namespace] = len(row)
            self.held[namespace] += 1
            self.bytes += row.nbytes

    def prune(self, max_bytes: int) -> int:
        with self.lock:
            before = len(self.rows)
            while self.bytes > max_bytes:
                (namespace, _), row = self.rows.popitem(last=False)
                self.bytes -= row.nbytes
                self.held[namespace] -= 1
                if not self.held[namespace]:
                    del self.held[namespace], self.widths[namespace]
            return before - len(self.rows)

    def claim(self, job: bytes, images: list[bytes]) -> NDArray[np.bool_]:
        with self.lock:
            return self.claims.claim(job, images)

    def release(self, job: bytes, images: list[bytes]) -> None:
        with self.lock:
            self.claims.release(job, images)

    def find_holders(self, job: bytes, images: list[bytes]) -> set[str]:
        with self.lock:
            return self.claims.find_holders(job, images)

    def known_digests(self, paths: list[bytes]) -> dict[bytes, tuple[bytes, bytes]]:
        with self.lock:
            return {path: self.files[path] for path in paths if path in self.files}

    def remember_digests(self, files: list[tuple[bytes, bytes, bytes]]) -> None:
        with self.lock:
            self.files |= {path: (stamp, digest) for path, stamp, digest in files}

    def count(self) -> tuple[int, int, int]:
        with self.lock:
            return len(self.rows), self.bytes, len(self.held)

    def clear(self) -> None:
        with self.lock:
            self.bytes = 0
            self.claims.clear()
            for table in self.rows, self.widths, self.held, self.files:
                table.clear()

    def retry(self) -> None:
        """Do nothing: there is no disk."""

    def close(self) -> None:
        """Do nothing: there is no file."""

    def forget_parent(self) -> None:
        self.claims.clear()
