"""The endless, seeded, resumable stream of held-out (T2) batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_unflatten
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from lightning_hpo._lightning import MisconfigurationException
from lightning_hpo.loaders import EndlessBatches, is_plain, own_loader
from lightning_hpo.private_state import PrivateState
from lightning_hpo.rng import forked_rng, seeded_rng

_CPU = torch.device("cpu")


class T2Stream:
    """Batches of held-out data, without end and independent of everything the training draws.

    Over a map-style dataset, batch k is a pure function of (seed, k, rank, number of ranks): the
    dataset is shuffled anew for each pass, and batches run on across passes, so that every batch is
    full on every rank. A ``SubsetRandomSampler`` keeps its choice; of another sampler, or a batch
    sampler, a copy draws, in its own order, and may be endless. Iterable datasets and plain
    iterables of batches are repeated in their own order. A subclass of DataLoader keeps its
    ``__iter__`` and whatever else it overrides.

    The user's DataLoader object is never iterated: a second iterator would reset its workers. What
    datasets, transforms and collators keep is as the user's loaders left it after each batch; see
    :class:`~lightning_hpo.private_state.PrivateState`.

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
        self._passes = 0
        self._peeked: list[Any] = []
        self._batches: EndlessBatches | None = None
        self._source: Iterable[Any] = source
        self._has_own_order = True
        roots: list[Any] = [source]
        if isinstance(source, DataLoader):
            with forked_rng(_CPU):
                self._source, self._batches = own_loader(source, seed, rank, world_size)
            self._has_own_order = not is_plain(source)
            roots = _parts(source)
        self._private = PrivateState(*roots)

    @property
    def length(self) -> int | None:
        """The number of batches of one pass, where that is known."""
        try:
            return len(self._source)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            return None

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

    def skip_to(self, consumed: int, *, anew: bool = False) -> None:
        """Continues after ``consumed`` batches, for a resumed training.

        Args:
            consumed: How many there were.
            anew: Whether data that order themselves begin anew, instead of being read up to there.
        """
        self._peeked.clear()
        self._iterator = None
        self._passes = 0
        first = consumed
        if self._batches is None:
            first = consumed if anew else 0
        elif self._has_own_order:
            first = self._batches.pass_start(consumed)
            self._passes = first // self.length if self.length else 0
        for self.consumed in range(first, consumed):  # each is drawn with a seed of its own
            self._fetch()
        self.consumed = consumed

    def _fetch(self) -> Any:
        # Transforms that draw random numbers are tied to the batch, not to the training.
        with seeded_rng(_CPU, self._seed, self.consumed) as seed, self._private(seed):
            if self._iterator is None:
                self._iterator = self._begin(seed)
            try:
                return next(self._iterator)
            except StopIteration:
                self._passes += 1
                self._iterator = self._begin(seed)
                try:
                    return next(self._iterator)
                except StopIteration:
                    raise MisconfigurationException(
                        "The T2 data of OnlineHPOCallback yield no batch; pass a dataloader with "
                        "held-out data"
                    ) from None

    def _begin(self, seed: int) -> Iterator[Any]:
        """Starts a pass; one of endless batches never ends."""
        if not isinstance(self._source, DataLoader):
            return iter(self._source)
        loader = self._source
        if self._batches is not None:
            self._batches.start = self.consumed
            if self._has_own_order and self.length:
                self._batches.start = self._passes * self.length
        if loader.generator is not None:
            loader.generator.manual_seed(seed)
        for name, value in vars(loader).items():
            # Loaders that keep their workers hold an iterator, which here is the user's.
            if isinstance(value, _BaseDataLoaderIter) and name != "_iterator":
                vars(loader)[name] = loader._get_iterator()
        return iter(loader)


class CombinedStream:
    """Batches made of one batch from each of several streams, as a CombinedLoader makes them.

    Args:
        streams: One for each loader.
        spec: The structure of a batch.
    """

    def __init__(self, streams: list[T2Stream], spec: TreeSpec) -> None:
        self._streams = streams
        self._spec = spec

    @property
    def consumed(self) -> int:
        """How many batches were consumed."""
        return self._streams[0].consumed

    @property
    def length(self) -> int | None:
        """The number of batches of the shortest pass, where that is known."""
        return min((s.length for s in self._streams if s.length is not None), default=None)

    def peek(self) -> Any:
        """Returns the next batch without consuming it."""
        return tree_unflatten([stream.peek() for stream in self._streams], self._spec)

    def next(self) -> Any:
        """Returns the next batch, on the CPU as the DataLoaders made it."""
        return tree_unflatten([stream.next() for stream in self._streams], self._spec)

    def skip_to(self, consumed: int, *, anew: bool = False) -> None:
        """Continues after ``consumed`` batches; see :meth:`T2Stream.skip_to`."""
        for stream in self._streams:
            stream.skip_to(consumed, anew=anew)


def _parts(loader: DataLoader[Any]) -> list[Any]:
    """Lists the objects that make the batches of a loader, in this process."""
    own = () if is_plain(loader) else vars(type(loader)).values()
    if loader.num_workers > 0 and not own:
        return []  # workers have copies of the dataset and the collator
    ours = ("batch_sampler", "sampler", "generator", "_iterator")
    parts = [value for name, value in vars(loader).items() if name not in ours]
    if not isinstance(loader.dataset, IterableDataset):
        parts += [loader.sampler, loader.batch_sampler]
    return [*parts, *(value for value in own if callable(value))]
