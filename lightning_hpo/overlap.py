"""Whether two loaders draw the same examples, as far as datasets and samplers tell."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    IterableDataset,
    Subset,
    WeightedRandomSampler,
)

from lightning_hpo.loaders import sampled_from
from lightning_hpo.regularizers import IndexedDataset


def flattened(loaders: Any) -> list[Any]:
    """Lists the loaders of any structure that Lightning accepts; empty for None."""
    return [] if loaders is None else list(CombinedLoader(loaders, "sequential").flattened)


def overlap(some: Iterable[Any], others: Iterable[Any], *, in_doubt: bool = False) -> bool:
    """Whether a loader of one collection draws an example that one of the other draws as well.

    Seen are ``Subset`` (the parts of ``random_split``), ``ConcatDataset`` and the package's
    ``IndexedDataset`` in any nesting, and what known samplers choose. What a sampler of another
    kind draws is not known.

    Args:
        some: Loaders, or other iterables of batches.
        others: Those that they are compared with.
        in_doubt: Whether a sampler of an unknown kind is taken to draw everything, or nothing.
    """
    known: dict[int, list[Sequence[Any] | None]] = {}
    # The objects are kept: the ids of what a loader makes anew each time would be used again.
    kept = [pair for loader in some for pair in _drawn(loader, in_doubt)]
    for source, indices in kept:
        known.setdefault(id(source), []).append(indices)
    return any(
        _meet(indices, other)
        for loader in others
        for source, indices in _drawn(loader, in_doubt)
        for other in known.get(id(source), ())
    )


def _drawn(loader: Any, in_doubt: bool) -> Iterator[tuple[Any, Sequence[Any] | None]]:
    """Yields what a loader draws from, each with the indices that it chooses; None: all."""
    if not isinstance(loader, DataLoader):
        yield loader, None
        return
    if isinstance(loader.dataset, IterableDataset):
        yield loader.dataset, None
        return
    pool = _pool(loader)
    if pool is None and in_doubt:
        pool = range(len(loader.dataset))  # type: ignore[arg-type]
    if pool is not None:
        yield from _sources(loader.dataset, pool)


def _pool(loader: DataLoader[Any]) -> Sequence[Any] | None:
    sampler, pool = sampled_from(loader)
    if pool is None and isinstance(sampler, WeightedRandomSampler):
        return [i for i, weight in enumerate(sampler.weights.tolist()) if weight > 0]
    if pool and isinstance(pool[0], (list, tuple)):  # a list of batches
        return [i for batch in pool for i in batch]
    return pool


def _sources(dataset: Any, indices: Sequence[Any]) -> Iterator[tuple[Any, Sequence[Any]]]:
    """Follows indices into the datasets that others are made of."""
    if isinstance(dataset, Subset):
        inner = dataset.indices
        chosen = inner if _is_whole(indices, inner) else [inner[i] for i in indices]
        yield from _sources(dataset.dataset, chosen)
    elif isinstance(dataset, IndexedDataset):
        yield from _sources(dataset.dataset, indices)
    elif isinstance(dataset, ConcatDataset):
        parts: list[list[int]] = [[] for _ in dataset.datasets]
        ends = dataset.cumulative_sizes
        for i in map(int, indices):
            part = bisect_right(ends, i)
            if part < len(parts):
                parts[part].append(i - (ends[part - 1] if part else 0))
        for part_of, own in zip(dataset.datasets, parts, strict=True):
            yield from _sources(part_of, own)
    else:
        yield dataset, indices


def _is_whole(indices: Sequence[Any], inner: Sequence[Any]) -> bool:
    return isinstance(indices, range) and indices == range(len(inner))


def _meet(some: Sequence[Any] | None, others: Sequence[Any] | None) -> bool:
    if some is None or others is None:
        return True
    if isinstance(others, range):
        some, others = others, some
    # A range knows what lies in it; keys of any other kind are compared as they are.
    chosen = some if isinstance(some, range) else set(map(_key, some))
    return any(_key(i) in chosen for i in others)


def _key(index: Any) -> Any:
    """Lets an integer of a tensor or an array count as the number that it is."""
    try:
        return int(index)
    except (TypeError, ValueError):
        return index
