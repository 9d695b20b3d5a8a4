"""The choices of a training: drawn for each batch, by random numbers of their own."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, product

from lightning_hpo.hyperparameters import CategoricalHyperparameter

Indices = dict[str, int]
"""For each categorical hyperparameter, by name, the index of a choice."""


class Choices:
    """Draws the choices of all categorical hyperparameters of a training, frozen ones included.

    What is drawn follows from the seed, the place in the training and the probabilities alone: all
    ranks draw the same, and so does a training that is resumed. The user's random numbers are left
    alone.

    Args:
        hyperparameters: By name.
        seed: That of the callback.
    """

    def __init__(self, hyperparameters: Mapping[str, CategoricalHyperparameter], seed: int) -> None:
        self._hyperparameters = dict(hyperparameters)
        self._seed = seed
        self._known: dict[str, tuple[tuple[int, int], list[float]]] = {}

    def __bool__(self) -> bool:
        return bool(self._hyperparameters)

    def __getitem__(self, name: str) -> CategoricalHyperparameter:
        return self._hyperparameters[name]

    def draw(self, *place: object) -> None:
        """Draws what is in force until :meth:`forget`.

        Args:
            place: What identifies the batch.
        """
        for name, index in self.sample(*place).items():
            self._hyperparameters[name].drawn = index

    def forget(self) -> None:
        """Lets the most probable choices be in force again."""
        for h in self._hyperparameters.values():
            h.drawn = None

    def sample(self, *place: object) -> Indices:
        """Draws choices without putting them in force."""
        found = {}
        for name in self._hyperparameters:
            number = random.Random(repr((self._seed, name, *place))).random()
            bounds = accumulate(self._probabilities(name))
            found[name] = next((i for i, bound in enumerate(bounds) if number < bound), 0)
        return found

    def _probabilities(self, name: str) -> list[float]:
        """Returns p_φ; waits for a device only where φ has been written to."""
        raw = self._hyperparameters[name].raw
        written = raw._version, raw.data_ptr()
        before, known = self._known.get(name, (None, []))
        if before != written:
            known = self._hyperparameters[name].probabilities()
            self._known[name] = written, known
        return known

    def every(self, names: Sequence[str]) -> list[tuple[Indices, float]]:
        """Returns all choices of some of them, each with its probability."""
        each = [list(enumerate(self._probabilities(name))) for name in names]
        return [
            ({n: i for n, (i, _) in zip(names, pairs, strict=True)}, math.prod(p for _, p in pairs))
            for pairs in product(*each)
        ]

    def names_of(self, hyperparameters: Iterable[CategoricalHyperparameter]) -> frozenset[str]:
        """Returns the names of some of them."""
        wanted = {id(h) for h in hyperparameters}
        return frozenset(n for n, h in self._hyperparameters.items() if id(h) in wanted)

    @contextmanager
    def at(self, indices: Mapping[str, int]) -> Iterator[None]:
        """Puts choices in force for a while; of those that are not named, the most probable."""
        before = {name: h.drawn for name, h in self._hyperparameters.items()}
        for name, h in self._hyperparameters.items():
            h.drawn = indices.get(name)
        try:
            yield
        finally:
            for name, h in self._hyperparameters.items():
                h.drawn = before[name]
