"""Ids of rows: which are there twice, and which are missing."""

from typing import Any

from .._optional import import_optional

compute: Any = import_optional("pyarrow.compute", extra="ray")


def find_repeated(ids: Any) -> Any:
    """Return each id that is there more than once; by sorting, which takes the least memory."""
    ordered = ids.take(compute.sort_indices(ids)).combine_chunks()
    later = ordered[1:]
    return later.filter(compute.equal(later, ordered[:-1])).unique()


def find_missing(ids: Any, found: Any) -> Any:
    """Return the ids that are not among others."""
    return ids.filter(compute.invert(compute.is_in(ids, value_set=found)))
