"""Knows how the rows of images are found: in a cache, or by one pass of the network over each."""

import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ._backbones import Backbone
from ._cache import FeatureCache, FileStat
from ._decoding import decoding_settings
from ._engine import (
    Batch,
    Pooling,
    Precision,
    Workers,
    find_device,
    map_in_threads,
    pool,
    run_in_batches,
)
from ._images import ImageError, Record
from ._layers import ResolvedLayer, read_layers

# Part of every key: raise it when the rows of the same image and layer come out differently.
_SCHEMA = 1
_LOOK_UP = 1024  # images at a time, which bounds what is in memory twice
_WAIT_SECONDS = 0.05, 1.0  # at first, and at most
MEMORY = FeatureCache()  # of this process


@dataclass(frozen=True)
class Reading:
    """What is read of a backbone, and how."""

    backbone: Backbone
    layers: tuple[ResolvedLayer, ...]
    prefetched: tuple[ResolvedLayer, ...]  # kept in the cache by the same pass
    pooling: Pooling
    device: str | torch.device
    precision: Precision
    batch_size: int
    num_workers: Workers


def read_rows(
    reading: Reading, records: list[Record], cache: FeatureCache | None
) -> Iterator[Batch[Record]]:
    """Yield the pooled rows of all records, by layer name, in no certain order.

    With a cache each image goes through the network once, whoever asks for it: equal images,
    other layers, later calls and other processes are served from there. The network is loaded
    when the first image needs it.
    """
    fingerprint = None if cache is None else reading.backbone.fingerprint()
    if cache is not None and not reading.backbone.portable:
        cache = cache if cache.path is None else MEMORY
    if cache is None or fingerprint is None:
        yield from _compute(reading, reading.layers, records)
        return
    groups, stats, failures = _group_equal(records, cache, reading.num_workers)
    if failures:
        yield Batch([], {}, failures)
    passes = _Passes(reading, cache, fingerprint, groups, stats)
    waiting = list(groups)
    pause, longest = _WAIT_SECONDS
    while waiting:
        missing: list[bytes] = []
        for images in _chunks(waiting, _LOOK_UP):
            yield from passes.look_up(images, missing)
        waiting = []
        computed = 0
        for batch in passes.compute(missing, waiting):
            computed += len(batch.samples)
            yield batch
        if waiting and not computed:
            time.sleep(pause)  # another process is at work on these
            pause = min(2 * pause, longest)


class _Passes:
    """Passes of the network over images that the cache lacks."""

    def __init__(
        self,
        reading: Reading,
        cache: FeatureCache,
        fingerprint: bytes,
        groups: dict[bytes, list[Record]],
        stats: dict[Record, FileStat],
    ):
        self.reading = reading
        self.stats = stats
        self.cache = cache
        self.groups = groups
        self.image_of = {records[0]: image for image, records in groups.items()}
        asked = {(layer.path, layer.rectified) for layer in reading.layers}
        extra = [one for one in reading.prefetched if (one.path, one.rectified) not in asked]
        self.layers = (*reading.layers, *extra)
        key = functools.partial(
            _digest, _SCHEMA, fingerprint, reading.precision, decoding_settings()
        )
        self.contexts = {
            # Pooling leaves vectors as they are.
            layer.name: key(
                layer.path, layer.rectified, reading.pooling * (len(layer.output_shape) > 1)
            )
            for layer in self.layers
        }
        self.work = key(reading.pooling)

    def look_up(self, images: Sequence[bytes], missing: list[bytes]) -> Iterator[Batch[Record]]:
        """Yield what the cache holds of every layer; add the other images to `missing`."""
        found = np.ones(len(images), dtype=bool)
        rows = {}
        for layer in self.reading.layers:
            here, matrix = self.cache.get_many(self.contexts[layer.name], images)
            found &= here
            if matrix is not None:
                rows[layer.name] = matrix
        missing += [image for image, here in zip(images, found, strict=True) if not here]
        if found.any():
            hits = [image for image, here in zip(images, found, strict=True) if here]
            yield self._for_all(hits, {name: matrix[found] for name, matrix in rows.items()})

    def compute(self, missing: list[bytes], waiting: list[bytes]) -> Iterator[Batch[Record]]:
        """Compute, keep and yield what nobody else is at; add the rest to `waiting`."""
        if not missing:
            return
        held: set[bytes] = set()
        claimed = self._claim(missing, waiting, held)
        try:
            for batch in _compute(self.reading, self.layers, claimed, self._open):
                images = [self.image_of[record] for record in batch.samples]
                if images:
                    rows = {self.contexts[name]: rows for name, rows in batch.rows.items()}
                    self.cache.put_many(images, rows, self.work)
                failed = [(self.image_of[record], error) for record, error in batch.failures]
                self._release([image for image, _ in failed], held)
                held.difference_update(images)
                failures = [
                    (record, _for_record(record, error))
                    for image, error in failed
                    for record in self.groups[image]
                ]
                yield replace(self._for_all(images, batch.rows), failures=failures)
        finally:
            self._release(list(held), held)

    def _claim(
        self, missing: list[bytes], waiting: list[bytes], held: set[bytes]
    ) -> Iterator[Record]:
        """Yield a record of each image that is ours to compute, claiming it just before."""
        for images in _chunks(missing, self.reading.batch_size):
            granted = self.cache.claim(self.work, images)
            ours = [image for image, ok in zip(images, granted, strict=True) if ok]
            held.update(ours)
            # Whoever held one of these until now may have finished it.
            done = np.ones(len(ours), dtype=bool)
            for layer in self.reading.layers:
                done &= self.cache.has(self.contexts[layer.name], ours)
            self._release([one for one, is_done in zip(ours, done, strict=True) if is_done], held)
            waiting += [image for image in images if image not in held]
            yield from (self.groups[image][0] for image in ours if image in held)

    def _open(self, record: Record) -> Image.Image:
        image = record.open()
        if record in self.stats and record.stat() != self.stats[record]:
            raise ImageError(str(record), "the file was changed while X was being read")
        return image

    def _release(self, images: list[bytes], held: set[bytes]) -> None:
        if images:
            self.cache.release(self.work, images)
            held.difference_update(images)

    def _for_all(self, images: list[bytes], rows: dict[str, NDArray[np.float32]]) -> Batch[Record]:
        """Give the row of an image to every record of it."""
        samples = [record for image in images for record in self.groups[image]]
        if len(samples) > len(images):
            counts = [len(self.groups[image]) for image in images]
            rows = {name: np.repeat(matrix, counts, axis=0) for name, matrix in rows.items()}
        return Batch(samples, rows, [])


def _compute(
    reading: Reading,
    layers: tuple[ResolvedLayer, ...],
    records: Iterable[Record],
    open_record: Callable[[Record], Image.Image] = Record.open,
) -> Iterator[Batch[Record]]:
    """Run the network over records as far as the deepest of the layers."""
    steps = reading.backbone.preprocessing
    reduce = functools.partial(pool, pooling=reading.pooling)
    device = find_device(reading.device)
    module = reading.backbone.load(device)  # before the first image is claimed: it may take long
    yield from run_in_batches(
        module,
        lambda batch: read_layers(module, layers, steps.normalize(batch), reduce),
        records,
        lambda record: steps.prepare(open_record(record)),
        device=device,
        precision=reading.precision,
        batch_size=reading.batch_size,
        num_workers=reading.num_workers,
    )


def _group_equal(
    records: list[Record], cache: FeatureCache, num_workers: Workers
) -> tuple[dict[bytes, list[Record]], dict[Record, FileStat], list[tuple[Record, Exception]]]:
    """Group records by the digest of their image; files seen before are not read for that."""
    now = time.time_ns()
    stats = {record: stat for record in records if (stat := record.stat()) is not None}
    known = zip(stats, cache.known_digests(list(stats.values())), strict=True)
    digests = {record: digest for record, digest in known if digest is not None}
    unknown = [record for record in records if record not in digests]
    failures: list[tuple[Record, Exception]] = []
    for record, result in map_in_threads(Record.digest, unknown, num_workers, ahead=64):
        if isinstance(result, Exception):
            # Only the first can be raised: of all others, however many, the words will do.
            words = ImageError(str(record), record.error(result).reason)
            failures.append((record, words if failures else result))
        else:
            digests[record] = result
    fresh = [record for record in unknown if record in digests and record in stats]
    cache.remember_digests(
        [stats[record] for record in fresh],
        [digests[record] for record in fresh],
        stat_time_ns=now,
    )
    groups: dict[bytes, list[Record]] = {}
    for record in records:
        if record in digests:
            groups.setdefault(digests[record], []).append(record)
    return groups, stats, failures


def _for_record(record: Record, error: Exception) -> Exception:
    """Word the error of an image for another place in X that holds the same image."""
    if not isinstance(error, ImageError):
        return error
    other = ImageError(str(record), error.reason)
    other.__cause__ = error.__cause__
    return other


def _digest(*parts: object) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=32).digest()


def _chunks(items: Sequence[bytes], size: int) -> Iterator[Sequence[bytes]]:
    return (items[start : start + size] for start in range(0, len(items), size))
