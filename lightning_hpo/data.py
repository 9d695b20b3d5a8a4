"""The endless, seeded, resumable stream of held-out (T2) batches."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from lightning_hpo._lightning import MisconfigurationException
from lightning_hpo._trainer import stage
from lightning_hpo.rng import forked_rng

_CPU = torch.device("cpu")


class T2Stream:
    """Batches of held-out data, without end and independent of everything the training draws.

    Over a map-style dataset, batch k is a pure function of (seed, k, rank, number of ranks): the
    dataset is shuffled anew for each pass, and batches run on across passes, so that every batch is
    full on every rank. A ``SubsetRandomSampler``, or any other sampler that chooses, keeps its
    choice. Iterable datasets, custom batch samplers and plain iterables of batches are repeated in
    their own order.

    The user's DataLoader object is never iterated: a second iterator would reset its workers.

    Args:
        source: A DataLoader, or any iterable of batches.
        seed: Seed of the shuffling.
        rank: This process.
        world_size: The number of processes.

    Raises:
        MisconfigurationException: If there is no data in ``source``.
    """

    def __init__(
        self, source: Iterable[Any], seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.consumed = 0
        self._seed = seed
        self._iterator: Iterator[Any] | None = None
        self._peeked: list[Any] = []
        self._batches: _EndlessBatches | None = None
        self._source: Iterable[Any] = source
        self._generator = torch.Generator()
        if isinstance(source, DataLoader):
            with forked_rng(_CPU):
                self._source = self._rebuild(source, rank, world_size)

    def peek(self) -> Any:
        """Returns the next batch without consuming it."""
        if not self._peeked:
            self._peeked.append(self._fetch())
        return self._peeked[0]

    def next(self) -> Any:
        """Returns the next batch, on the CPU as the DataLoader made it."""
        batch = self._peeked.pop() if self._peeked else self._fetch()
        self.consumed += 1
        return batch

    def skip_to(self, consumed: int) -> None:
        """Continues after ``consumed`` batches, for a resumed training."""
        self._peeked.clear()
        self._iterator = None
        if self._batches is None:
            for self.consumed in range(consumed):  # each is drawn with a seed of its own
                self._fetch()
        self.consumed = consumed

    def _fetch(self) -> Any:
        with forked_rng(_CPU):
            # Transforms that draw random numbers are tied to the batch, not to the training.
            seed = (self._seed * 1_000_003 + self.consumed) % 2**32
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
            if self._iterator is None:
                self._generator.manual_seed(seed)
                if self._batches is not None:
                    self._batches.start = self.consumed
                self._iterator = iter(self._source)
            try:
                return next(self._iterator)
            except StopIteration:
                self._iterator = iter(self._source)
                try:
                    return next(self._iterator)
                except StopIteration:
                    raise MisconfigurationException(
                        "The T2 data of OnlineHPOCallback yield no batch; pass a dataloader with "
                        "held-out data"
                    ) from None

    def _rebuild(self, loader: DataLoader[Any], rank: int, world_size: int) -> DataLoader[Any]:
        """Makes a DataLoader over the same data with endless batches of our own."""
        options: dict[str, Any] = {
            "num_workers": loader.num_workers,
            "collate_fn": loader.collate_fn,
            "pin_memory": loader.pin_memory,
            "timeout": loader.timeout,
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context,
            "generator": self._generator,
        }
        if loader.num_workers > 0:
            options["prefetch_factor"] = loader.prefetch_factor
        dataset = loader.dataset
        if isinstance(dataset, IterableDataset):
            return DataLoader(
                dataset, batch_size=loader.batch_size, drop_last=loader.drop_last, **options
            )
        pool = _pool(loader)
        if not pool:
            raise MisconfigurationException(
                f"The T2 data of OnlineHPOCallback are empty ({type(dataset).__name__} with no "
                "example); pass a dataloader with held-out data"
            )
        if loader.batch_size is None:
            # No automatic batching, or a batch sampler of the user's: its items are the batches.
            self._batches = _EndlessBatches(pool, 1, self._seed, rank, world_size)
            if loader.batch_sampler is not None:
                return DataLoader(dataset, batch_sampler=_Unpacked(self._batches), **options)
            return DataLoader(dataset, batch_size=None, sampler=_Unpacked(self._batches), **options)
        size = min(loader.batch_size, len(pool))
        self._batches = _EndlessBatches(pool, size, self._seed, rank, world_size)
        return DataLoader(dataset, batch_sampler=self._batches, **options)


class _EndlessBatches(Sampler[list[Any]]):
    """Yields batch k = start, start + 1, … of endlessly reshuffled items."""

    def __init__(
        self, pool: Sequence[Any], size: int, seed: int, rank: int, world_size: int
    ) -> None:
        self.start = 0
        self._pool = pool
        self._size = size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._order: tuple[int, list[int]] = (-1, [])

    def __iter__(self) -> Iterator[list[Any]]:
        k = self.start
        while True:
            first = (k * self._world_size + self._rank) * self._size
            yield [self._item(position) for position in range(first, first + self._size)]
            k += 1

    def _item(self, position: int) -> Any:
        epoch, offset = divmod(position, len(self._pool))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(len(self._pool), generator=generator).tolist())
        return self._pool[self._order[1][offset]]


class _Unpacked(Sampler[Any]):
    """Yields the single item of each batch."""

    def __init__(self, batches: _EndlessBatches) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        for (item,) in self._batches:
            yield item


def _pool(loader: DataLoader[Any]) -> Sequence[Any]:
    """Lists what the loader draws from: indices, or the batches of a custom batch sampler."""
    if loader.batch_size is None and loader.batch_sampler is not None:
        return list(loader.batch_sampler)
    if type(loader.sampler) in (SequentialSampler, RandomSampler, DistributedSampler):
        return range(len(loader.dataset))  # type: ignore[arg-type]
    if "Distributed" in type(loader.sampler).__name__:  # Lightning's own distributed samplers
        return range(len(loader.dataset))  # type: ignore[arg-type]
    return list(loader.sampler)


def find_t2_source(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    dataloader: Iterable[Any] | None = None,
    dataloader_idx: int = 0,
) -> Iterable[Any] | None:
    """Finds the held-out data: an argument, else ``hpo_dataloader()``, else the validation loader.

    Args:
        trainer: The trainer.
        module: The LightningModule.
        dataloader: The callback's argument.
        dataloader_idx: Which of several validation loaders.

    Returns:
        The loader, or None if there is none.

    Raises:
        MisconfigurationException: If ``dataloader_idx`` is out of range.
    """
    if dataloader is not None:
        return dataloader
    for owner in (module, getattr(trainer, "datamodule", None)):
        hook = getattr(owner, "hpo_dataloader", None)
        if callable(hook):
            with forked_rng(_CPU):
                return hook()  # type: ignore[no-any-return]
    loaders: Any = trainer.val_dataloaders
    if loaders is None:
        # Not loaded yet (no sanity check, or check_val_every_n_epoch > 1).
        source = getattr(trainer.fit_loop.epoch_loop.val_loop, "_data_source", None)
        if source is None or not source.is_defined():
            return None
        with forked_rng(_CPU):
            loaders = source.dataloader()
    flat = CombinedLoader(loaders, "sequential").flattened
    if not flat:
        return None
    if not 0 <= dataloader_idx < len(flat):
        raise MisconfigurationException(
            f"OnlineHPOCallback: dataloader_idx={dataloader_idx}, but there are {len(flat)} "
            f"validation dataloaders; expected 0 to {len(flat) - 1}"
        )
    return flat[dataloader_idx]  # type: ignore[no-any-return]


def to_device(trainer: pl.Trainer, batch: Any, dataloader_idx: int = 0) -> Any:
    """Moves a T2 batch to the device through the user's transfer hooks, as in validation."""
    with stage(trainer, RunningStage.VALIDATING):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(
            batch, dataloader_idx=dataloader_idx
        )
        return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)
