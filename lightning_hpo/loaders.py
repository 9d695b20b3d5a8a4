"""A DataLoader of our own over the data of the user's: the same class, batches without end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from lightning_hpo._lightning import MisconfigurationException
from lightning_hpo.rng import reseed

_CPU = torch.device("cpu")


def own_loader(
    loader: DataLoader[Any], seed: int, rank: int, world_size: int
) -> tuple[DataLoader[Any], EndlessBatches | None]:
    """Makes a loader over the same data, of the same class, with all that it overrides.

    Args:
        loader: The user's loader, which is never iterated, nor is its sampler.
        seed: Seed of the shuffling.
        rank: This process.
        world_size: The number of processes.

    Returns:
        The loader, and its batches; None for an iterable dataset, which orders itself.

    Raises:
        MisconfigurationException: If there are no data.
    """
    own = object.__new__(type(loader))
    # Not by way of __init__, which may take other arguments than a DataLoader does.
    attributes = vars(own)
    attributes.update(vars(loader))
    attributes.update(_iterator=None, generator=torch.Generator())
    if isinstance(loader.dataset, IterableDataset):
        return own, None
    batches = EndlessBatches(loader, seed, rank, world_size)
    if loader.batch_sampler is None:
        attributes["sampler"] = _Unpacked(batches)
    elif loader.batch_size is None:
        attributes["batch_sampler"] = _Unpacked(batches)
    else:
        attributes["batch_sampler"] = batches
    return own, batches


def is_plain(loader: DataLoader[Any]) -> bool:
    """Whether a loader iterates as a DataLoader does, and may have endless batches."""
    return type(loader).__iter__ is DataLoader.__iter__


def sampled_from(loader: DataLoader[Any]) -> tuple[Any, Sequence[Any] | None]:
    """Returns the user's sampler, and what it draws from; None where that is not known.

    Without automatic batching, or with a batch sampler of the user's, items are batches.
    """
    own = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    chosen = _unwrapped(own if loader.batch_size is None else loader.sampler)
    return chosen, _pool(chosen, loader.dataset)


class EndlessBatches(Sampler[list[Any]]):
    """Yields batch k = start, start + 1, … of what the loader draws from.

    Without end, unless the loader has an ``__iter__`` of its own, which may collect all there is:
    then it ends with each pass.

    Args:
        loader: The user's loader.
        seed: Seed of the shuffling.
        rank: This process.
        world_size: The number of processes.

    Attributes:
        start: The batch to begin with.
    """

    def __init__(self, loader: DataLoader[Any], seed: int, rank: int, world_size: int) -> None:
        self.start = 0
        has_batches = loader.batch_sampler is not None
        self._original: Any = loader.batch_sampler if has_batches else loader.sampler
        self._is_endless = is_plain(loader)
        self._rank = rank
        chosen, pool = sampled_from(loader)
        if pool is not None and len(pool) == 0:
            raise MisconfigurationException(
                "The T2 data of OnlineHPOCallback are empty "
                f"({type(loader.dataset).__name__} with no example); pass a dataloader with "
                "held-out data"
            )
        self._size = loader.batch_size or 1
        if pool is not None:
            self._size = min(self._size, len(pool))
        whole = self._size * world_size
        self._order: _Shuffled | _Sampled
        if pool is None:
            self._order = _Sampled(chosen, loader.dataset, whole, seed)
        else:
            self._order = _Shuffled(pool, whole, seed)
        length = self._order.length
        self._length = math.inf if length is None else math.ceil(length / whole)

    def __getattr__(self, name: str) -> Any:
        # Loaders that wrap their batch sampler ask for its own attributes.
        if name.startswith("__") or "_original" not in vars(self):
            raise AttributeError(name)
        return getattr(self._original, name)

    def __len__(self) -> int:
        if self._length == math.inf:
            raise TypeError("the sampler of the held-out data has no length")
        return int(self._length)

    def pass_start(self, k: int) -> int:
        """Returns the first batch of the pass that batch k belongs to."""
        return 0 if self._length == math.inf else k - k % int(self._length)

    def __iter__(self) -> Iterator[list[Any]]:
        k = self.start
        end = math.inf if self._is_endless else self.pass_start(k) + self._length
        while k < end:
            yield self._order.batch(k, self._rank * self._size, self._size)
            k += 1


class _Unpacked(Sampler[Any]):
    """Yields the single item of each batch."""

    def __init__(self, batches: EndlessBatches) -> None:
        self._batches = batches

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_batches" not in vars(self):
            raise AttributeError(name)
        return getattr(self._batches, name)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        for (item,) in self._batches:
            yield item


class _Shuffled:
    """Items that are known, shuffled anew for each pass; batches run on across passes."""

    def __init__(self, pool: Sequence[Any], whole: int, seed: int) -> None:
        self.length: int | None = len(pool)
        self._pool = pool
        self._whole = whole
        self._seed = seed
        self._order: tuple[int, list[int]] = (-1, [])

    def batch(self, k: int, offset: int, size: int) -> list[Any]:
        """Returns a part of the batch of all processes."""
        first = k * self._whole + offset
        return [self._item(position) for position in range(first, first + size)]

    def _item(self, position: int) -> Any:
        epoch, offset = divmod(position, len(self._pool))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(len(self._pool), generator=generator).tolist())
        return self._pool[self._order[1][offset]]


class _Sampled:
    """What a copy of the user's sampler draws, in its order; it may be endless."""

    def __init__(self, sampler: Any, dataset: Any, whole: int, seed: int) -> None:
        try:
            self.length: int | None = len(sampler)
        except (TypeError, NotImplementedError):
            self.length = None
        self._sampler = sampler
        self._shared = _shared_by(sampler, dataset)
        self._whole = whole
        self._seed = seed
        self._next = 0
        self._working: Any = None
        self._iterator: Iterator[Any] = iter(())

    def batch(self, k: int, offset: int, size: int) -> list[Any]:
        """Returns a part of the batch of all processes."""
        if self._working is None or k < self._next:
            self._next = 0
            self._working = self._copy()
            self._iterator = iter(())
        whole: list[Any] = []
        while self._next <= k:
            # What it draws from the global generators is tied to the batch. The stream that asks
            # puts them back.
            reseed(_CPU, self._seed, self._next)
            whole = [self._draw() for _ in range(self._whole)]
            self._next += 1
        return whole[offset : offset + size]

    def _draw(self) -> Any:
        for _ in range(2):
            try:
                return next(self._iterator)
            except StopIteration:
                self._iterator = iter(self._working)
        raise MisconfigurationException(
            "The T2 data of OnlineHPOCallback yield no batch "
            f"({type(self._sampler).__name__} draws nothing); pass a dataloader with held-out data"
        )

    def _copy(self) -> Any:
        try:
            return deepcopy(self._sampler, {id(s): s for s in self._shared})
        except Exception:  # anything may refuse to be copied
            return self._sampler  # what it changes is put back, see PrivateState


def _shared_by(sampler: Any, dataset: Any) -> list[Any]:
    """Lists what a sampler may hold and its copy must not copy: data and models."""
    shared = []
    while dataset is not None:
        shared.append(dataset)
        dataset = getattr(dataset, "dataset", None)
    large = (nn.Module, pl.Trainer, Dataset, DataLoader)
    for value in getattr(sampler, "__dict__", {}).values():
        if isinstance(value, large):
            shared.append(value)
    return shared


def _unwrapped(sampler: Any) -> Any:
    """Returns the user's sampler where Lightning deals what it draws out to the ranks."""
    wrapped = getattr(getattr(sampler, "dataset", None), "_sampler", None)
    is_wrapper = wrapped is not None and isinstance(sampler, DistributedSampler)
    return wrapped if is_wrapper else sampler


def _pool(sampler: Any, dataset: Any) -> Sequence[Any] | None:
    """Lists what a sampler of a known kind draws from; None for another kind."""
    known = (SequentialSampler, RandomSampler, DistributedSampler)
    if type(sampler) in known or "Distributed" in type(sampler).__name__:
        return range(len(dataset))
    if type(sampler) is SubsetRandomSampler:
        return sampler.indices
    return sampler if isinstance(sampler, (list, tuple, range)) else None
