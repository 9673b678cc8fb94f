"""Rows of images: from the cache, or from a pass of the network."""

import functools
import hashlib
import itertools
import logging
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .._backbones.find import Backbone
from .._backbones.fingerprint import UnknownContentError
from .._backbones.fingerprint import fingerprint as digest_value
from .._cache.cache import FeatureCache, FileStat
from .._cache.disk import CacheFormatError
from .._cache.owners import PATIENCE_SECONDS
from .._engine.batches import Batch, run_in_batches
from .._engine.devices import Precision
from .._engine.threads import Workers, map_in_threads
from .._images.decoding import RGB, decoding_settings
from .._images.records import ImageError, Record
from .._layers.index import ResolvedLayer
from .._layers.pooling import PooledLayer
from .readers import (
    Engine,
    EngineName,
    find_engine,
    load_network,
    make_layer_reader,
    make_map_reader,
)

# Part of every key: increase it when the rows of the same image and layer change.
_SCHEMA = 3
_LOOK_UP = 1024  # images at a time, which limits what is in memory twice
_WAIT_SECONDS = 0.05, 1.0  # at first, and at most
_PATIENT_SECONDS = 5.0  # of waiting, before it is logged
MEMORY = FeatureCache()  # the cache of this process
_warned: set[str] = set()
_logger = logging.getLogger("deepfeat")


@dataclass(frozen=True)
class ExtractionSpec:
    """What is read of a backbone, and how.

    `layers` are requested, and `prefetched` ones are kept in the cache by the same pass, as are the
    `repooled` ones, the same layers under other poolings, if there is room. The `searched` ones are
    kept by a second pass over an image, so that a search over layers does not need a third.
    """

    backbone: Backbone
    layers: tuple[PooledLayer, ...]
    prefetched: tuple[PooledLayer, ...]
    repooled: tuple[PooledLayer, ...]
    searched: tuple[PooledLayer, ...]
    engine: EngineName
    device: str | torch.device
    precision: Precision
    batch_size: int
    num_workers: Workers
    verbose: int = 0

    def find_engine(self) -> Engine:
        """Find the engine, when the first image needs it."""
        return find_engine(self.engine, self.device, self.precision, self.batch_size, self.verbose)


def read_rows(
    spec: ExtractionSpec, records: list[Record], cache: FeatureCache | None
) -> Iterator[Batch[Record]]:
    """Yield the pooled rows of all records, by the keys of their layers, in any order.

    With a cache, each image goes through the network once, whoever asks for it: equal images,
    other layers, later calls and other processes are served from there. The network is loaded
    when the first image needs it.
    """
    fingerprint = None if cache is None else _find_fingerprint(spec.backbone)
    if cache is None or fingerprint is None:
        network = load_network(spec.backbone, spec.find_engine().device)
        for batch in _compute(spec, network, _find_outputs(spec.layers), records):
            yield replace(batch, rows=_to_layers(spec.layers, batch.rows))
        return
    before = _digest_settings(spec.backbone)
    groups, stats, failures = _group_equal(records, cache, spec.num_workers)
    if failures:
        yield Batch([], {}, failures)
    yield from _CachedExtraction(spec, cache, fingerprint, groups, stats).read()
    if _digest_settings(spec.backbone) != before:
        _warn_once(
            f"The preprocessing of {spec.backbone.name} changes while it is used (it may count its "
            "calls), so its rows will not be found in the cache again."
        )


def read_maps(
    spec: ExtractionSpec, layer: ResolvedLayer, records: list[Record]
) -> Iterator[Batch[Record]]:
    """Yield the maps (C, H, W) of a layer of all records, as "maps", in order."""
    engine = spec.find_engine()
    network = load_network(spec.backbone, engine.device)
    reader = make_map_reader(spec.backbone, network, layer, engine)
    return run_in_batches(
        reader, records, Record.open, batch_size=spec.batch_size, num_workers=spec.num_workers
    )


def _find_fingerprint(backbone: Backbone) -> bytes | None:
    """Digest a backbone; None, with one warning, if it cannot be digested: nothing is kept."""
    try:
        return backbone.fingerprint()
    except UnknownContentError as error:
        _warn_once(f"The rows of {backbone.name} are not cached: {error}.")
    return None


def _digest_settings(backbone: Backbone) -> bytes | None:
    try:
        return digest_value(backbone.preprocessing.settings)
    except UnknownContentError:  # it may have opened something in the meantime
        return None


def _warn_once(problem: str) -> None:
    if problem not in _warned:
        _warned.add(problem)
        warnings.warn(problem, UserWarning, stacklevel=7)


class _CachedExtraction:
    """Rows of images from the cache, and passes of the network over those that it lacks.

    `groups` has the records of each image by its digest, `stats` the state of their files then.
    """

    def __init__(
        self,
        spec: ExtractionSpec,
        cache: FeatureCache,
        fingerprint: bytes,
        groups: dict[bytes, list[Record]],
        stats: dict[Record, FileStat],
    ):
        self.spec = spec
        self.cache = cache
        self.groups = groups
        self.stats = stats
        self.image_of = {records[0]: image for image, records in groups.items()}
        self.requested = _find_outputs(spec.layers)
        least = _find_outputs((*spec.layers, *spec.prefetched))
        self.first = self._add_if_room(least, spec.repooled)
        self.second = self._add_if_room(self.first, spec.searched)
        # Not in the key: threads and batch size change a row by 1e-6 of its length (MobileNetV2),
        # Pillow 11.1 to 13.0 change 0.6 % of the pixels of JPEGs by one grey level, and devices and
        # releases of torch round differently as well. A cache that took weeks to fill should
        # survive upgrades of these and another GPU; a change beyond rounding increases _SCHEMA.
        # In float32 the engines differ by rounding only. In half precision they differ a hundred
        # times as much as two runs of one engine do, so their rows are kept apart.
        arithmetic = (
            spec.precision if spec.precision == "float32" else (spec.precision, spec.engine)
        )
        key = functools.partial(_digest, _SCHEMA, fingerprint, arithmetic, decoding_settings())
        self.namespaces = {
            output.key: key(output.layer.source, output.pooling or "") for output in self.second
        }
        self.job = key("job")

    @functools.cached_property
    def network(self) -> nn.Module:
        """The network, loaded when the first image needs it, and once for all passes of a call."""
        return load_network(self.spec.backbone, self.spec.find_engine().device)

    def _add_if_room(
        self, outputs: tuple[PooledLayer, ...], more: tuple[PooledLayer, ...]
    ) -> tuple[PooledLayer, ...]:
        """Add outputs to those that a pass keeps, if the cache has room for all of them."""
        together = _find_outputs((*outputs, *more))
        width = sum(output.n_features for output in together)
        return together if 4 * width * len(self.groups) <= self.cache.room() else outputs

    def read(self) -> Iterator[Batch[Record]]:
        """Yield the rows of all records, and wait for those that another process computes."""
        pending = list(self.groups)
        pause, longest = _WAIT_SECONDS
        waited = 0.0
        while pending:
            missing = yield from self._look_up_all(pending)
            pending, computed = yield from self._compute_missing(missing)
            if pending and not computed:
                time.sleep(pause)
                if waited < _PATIENT_SECONDS <= waited + pause:
                    self._log_holders(pending)
                waited += pause
                pause = min(2 * pause, longest)

    def _look_up_all(self, images: Sequence[bytes]) -> Generator[Batch[Record], None, list[bytes]]:
        """Yield the rows of images of which the cache has every layer; return the others."""
        missing: list[bytes] = []
        for some in _chunks(images, _LOOK_UP):
            batch, absent = self.look_up(some)
            missing += absent
            if batch.samples:
                yield batch
        return missing

    def look_up(self, images: Sequence[bytes]) -> tuple[Batch[Record], list[bytes]]:
        """Return the rows of images of which the cache has every layer, and the other images."""
        found = np.ones(len(images), dtype=bool)
        rows = {}
        for output in self.requested:
            here, matrix = self.cache.get_many(self.namespaces[output.key], images)
            found &= here
            if matrix is not None:
                self._check_width(output, matrix)
                rows[output.key] = matrix
        missing = list(itertools.compress(images, ~found))
        if not found.any():
            return Batch([], {}, []), missing
        hits = list(itertools.compress(images, found))
        return self._for_all(hits, {key: matrix[found] for key, matrix in rows.items()}), missing

    def _check_width(self, output: PooledLayer, matrix: NDArray[np.float32]) -> None:
        """Refuse rows that the layer cannot have given."""
        if matrix.shape[1] != output.n_features:
            raise CacheFormatError(
                f"{self.cache} has rows of {matrix.shape[1]} values for layer "
                f"{output.layer.source!r}, which gives {output.n_features}: it was tampered with. "
                "Delete it, or choose another one."
            )

    def _log_holders(self, images: Sequence[bytes]) -> None:
        """Log who is being waited for. It is not a warning: the caller did nothing wrong."""
        holders = ", ".join(self.cache.find_holders(self.job, images))
        if holders:
            _logger.warning(
                "Waiting for %d images that %s is computing for %s. If it hangs, end it; after %d "
                "minutes without progress, its images are computed here.",
                *(len(images), holders, self.cache, PATIENCE_SECONDS // 60),
            )

    def _compute_missing(
        self, missing: list[bytes]
    ) -> Generator[Batch[Record], None, tuple[list[bytes], int]]:
        """Compute, keep and yield images that nobody else is computing.

        Return the images that are left to others, and how many rows were yielded.
        """
        pending: list[bytes] = []
        computed = 0
        if not missing:
            return pending, computed
        seen = np.concatenate([self._find_seen(images) for images in _chunks(missing, _LOOK_UP)])
        for outputs, images in (
            (self.first, list(itertools.compress(missing, ~seen))),
            (self.second, list(itertools.compress(missing, seen))),
        ):
            if images:
                network = self.network  # before an image is claimed: loading may take long
                claims = _Claims(self.cache, self.job)
                try:
                    for batch in self._pass(network, outputs, images, claims):
                        computed += len(batch.samples)
                        yield batch
                finally:
                    claims.release(list(claims.held))
                pending += claims.refused
        return pending, computed

    def _find_seen(self, images: Sequence[bytes]) -> NDArray[np.bool_]:
        """Tell which images the cache has any row of: they have been through the network."""
        seen = np.zeros(len(images), dtype=bool)
        for namespace in self.namespaces.values():
            if not seen.all():
                unseen = list(itertools.compress(images, ~seen))
                seen[~seen] = self.cache.has(namespace, unseen)
        return seen

    def _pass(
        self,
        network: nn.Module,
        outputs: tuple[PooledLayer, ...],
        images: list[bytes],
        claims: "_Claims",
    ) -> Iterator[Batch[Record]]:
        """Run the network over images up to the deepest of some outputs, and keep these."""
        records = self._claim(images, claims)
        for batch in _compute(self.spec, network, outputs, records, self._open):
            done = [self.image_of[record] for record in batch.samples]
            if done:
                rows = {self.namespaces[key]: rows for key, rows in batch.rows.items()}
                self.cache.put_many(done, rows, self.job)  # which releases them
                claims.held.difference_update(done)
            failed = [(self.image_of[record], error) for record, error in batch.failures]
            claims.release([image for image, _ in failed])
            failures = [
                (record, _for_record(record, error))
                for image, error in failed
                for record in self.groups[image]
            ]
            yield replace(self._for_all(done, batch.rows), failures=failures)

    def _claim(self, images: list[bytes], claims: "_Claims") -> Iterator[Record]:
        """Yield a record of each image that is ours to compute, claiming it just before."""
        for some in _chunks(images, self.spec.batch_size):
            ours = claims.claim(some)
            # Whoever held one of these until now may have finished it.
            done = np.ones(len(ours), dtype=bool)
            for output in self.requested:
                done &= self.cache.has(self.namespaces[output.key], ours)
            claims.refuse(list(itertools.compress(ours, done)))
            yield from (self.groups[image][0] for image in itertools.compress(ours, ~done))

    def _open(self, record: Record) -> RGB:
        pixels = record.open()
        if record in self.stats and record.stat() != self.stats[record]:
            raise ImageError(str(record), "the file was changed while X was being read")
        return pixels

    def _for_all(self, images: list[bytes], rows: dict[str, NDArray[np.float32]]) -> Batch[Record]:
        """Repeat the row of each image for all its records, for the requested layers."""
        rows = _to_layers(self.spec.layers, rows)
        samples = [record for image in images for record in self.groups[image]]
        if len(samples) > len(images):
            counts = [len(self.groups[image]) for image in images]
            rows = {name: np.repeat(matrix, counts, axis=0) for name, matrix in rows.items()}
        return Batch(samples, rows, [])


class _Claims:
    """The images that a pass computes and no other call, and those that it was refused."""

    def __init__(self, cache: FeatureCache, job: bytes):
        self._cache = cache
        self._job = job
        self.held: set[bytes] = set()
        self.refused: list[bytes] = []

    def claim(self, images: Sequence[bytes]) -> list[bytes]:
        """Claim images; return those that nobody else is computing."""
        granted = self._cache.claim(self._job, images)
        ours = list(itertools.compress(images, granted))
        self.held.update(ours)
        self.refused += itertools.compress(images, ~granted)
        return ours

    def refuse(self, images: list[bytes]) -> None:
        """Release images that another call has finished, so that they are looked up again."""
        self.release(images)
        self.refused += images

    def release(self, images: list[bytes]) -> None:
        if images:
            self._cache.release(self._job, images)
            self.held.difference_update(images)


def _find_outputs(layers: Iterable[PooledLayer]) -> tuple[PooledLayer, ...]:
    """Return the pooled outputs of the network that layers are made of, each once."""
    return tuple({output.key: output for output in map(_find_output, layers)}.values())


def _find_output(pooled: PooledLayer) -> PooledLayer:
    return replace(pooled, layer=replace(pooled.layer, rectified=False))


def _to_layers(
    layers: tuple[PooledLayer, ...], rows: dict[str, NDArray[np.float32]]
) -> dict[str, NDArray[np.float32]]:
    """Turn the rows of outputs into those of layers; `relu8` follows from `fc8`."""
    found = {}
    for pooled, output in zip(layers, map(_find_output, layers), strict=True):
        if output.key in rows:
            matrix = rows[output.key]
            found[pooled.key] = np.maximum(matrix, 0) if pooled.layer.rectified else matrix
    return found


def _compute(
    spec: ExtractionSpec,
    network: nn.Module,
    outputs: tuple[PooledLayer, ...],
    records: Iterable[Record],
    open_record: Callable[[Record], RGB] = Record.open,
) -> Iterator[Batch[Record]]:
    """Run the network over records up to the deepest of some outputs."""
    requested = {output.key for output in _find_outputs(spec.layers)}
    reader = make_layer_reader(
        spec.backbone,
        network,
        outputs,
        spec.find_engine(),
        optional={output.key for output in outputs} - requested,
    )
    return run_in_batches(
        reader, records, open_record, batch_size=spec.batch_size, num_workers=spec.num_workers
    )


def _group_equal(
    records: list[Record], cache: FeatureCache, num_workers: Workers
) -> tuple[dict[bytes, list[Record]], dict[Record, FileStat], list[tuple[Record, Exception]]]:
    """Group records by the digest of their image, without reading files that were seen before."""
    now = time.time_ns()
    stats = {record: stat for record in records if (stat := record.stat()) is not None}
    known = zip(stats, cache.known_digests(list(stats.values())), strict=True)
    digests = {record: digest for record, digest in known if digest is not None}
    unknown = [record for record in records if record not in digests]
    failures: list[tuple[Record, Exception]] = []
    for record, result in map_in_threads(Record.digest, unknown, num_workers, ahead=64):
        if isinstance(result, Exception):
            # Only the first can be raised: of the others, however many, the message is enough.
            message = ImageError(str(record), record.error(result).reason)
            failures.append((record, message if failures else result))
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
    """Give the error of an image to another record of the same image."""
    if not isinstance(error, ImageError):
        return error
    other = ImageError(str(record), error.reason)
    other.__cause__ = error.__cause__
    return other


def _digest(*parts: object) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=32).digest()


def _chunks(items: Sequence[bytes], size: int) -> Iterator[Sequence[bytes]]:
    return (items[start : start + size] for start in range(0, len(items), size))
