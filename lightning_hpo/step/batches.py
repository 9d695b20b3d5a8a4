"""The micro-batches of one step, and the products that are formed with them for tangents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_hpo._tensors import stacked_zeros
from lightning_hpo.distributed import average_
from lightning_hpo.dynamics import THETA
from lightning_hpo.objectives import Moment
from lightning_hpo.step.network import Network
from lightning_hpo.step.tangents import Tangents
from lightning_hpo.step.training_map import TrainingMap

Product = tuple[range, list[Tensor], "Tensor | None"]
"""The network's H y + B in some directions, and the weights of what remains to be subtracted."""


class Batches:
    """The data of a step that is under way.

    For tangents, H y + B is formed right before the step (:meth:`late`), for a few directions at a
    time. Where the step must be replayed at its batches, it is formed there (:meth:`multiply`), for
    all directions, which takes |θ| per scalar λ in between. One replay serves all tangents.

    Args:
        training: What all steps of the training share.

    Attributes:
        moments: The micro-batches that are kept, each with the factor of its loss.
        is_open: Whether θ is still where the step starts.
    """

    def __init__(self, training: TrainingMap) -> None:
        self.moments: list[tuple[Moment, float]] = []
        self.is_open = True
        self._training = training
        self._sums: dict[Tangents, list[Tensor]] = {}
        self._network: Network | None = None
        self._expected: tuple[Moment, Sequence[Tangents]] | None = None
        self._left = 0

    def multiply(self, moment: Moment, weight: float, followed: Sequence[Tangents]) -> None:
        """Adds the H y + B of a micro-batch to those of the step."""
        self.expect(moment, followed)
        try:
            for tangents in followed:
                tangents.begin_step()
                for units in tangents.portions():
                    self._add(tangents, units, weight)
                # The next micro-batch starts from the running statistics that this one has moved.
                tangents.is_zero &= not tangents.statistics
        finally:
            self._end_replay()

    def _add(self, tangents: Tangents, units: range, weight: float) -> None:
        """Adds the H y + B of some directions."""
        products, _ = self._product(tangents, units, None)
        sums = self._sums.get(tangents)
        if sums is None and len(units) == tangents.count:
            torch._foreach_mul_(products, weight)
            self._sums[tangents] = products
            return
        sums = self._sums[tangents] = self._complete(sums or [], tangents.count)
        parts = [t[units.start : units.stop] for t in sums]
        torch._foreach_add_(parts, products, alpha=weight)

    def expect(self, moment: Moment, followed: Sequence[Tangents]) -> None:
        """Prepares the replay of a micro-batch that products will be formed with."""
        names = dict.fromkeys(name for tangents in followed for name in tangents.unit)
        self._network = Network(self._training, moment, list(names))
        self._expected = moment, followed
        self._left = sum(1 for tangents in followed for _ in tangents.portions())

    def late(self, tangents: Tangents) -> Iterator[Product]:
        """Yields H y + B, some directions at a time, right before the step.

        One-sided differences take the place of central ones where the step's own gradient will do.
        """
        if self._network is None:  # formed at the batches; nothing, where they had no loss
            sums = self._complete(self._sums.pop(tangents, []), tangents.count)
            yield range(tangents.count), sums, None
            return
        norms = None
        if tangents.sync and self._training.is_one_sided and not tangents.is_zero:
            norms = tangents.norms()
        for units in tangents.portions():
            yield units, *self._product(tangents, units, norms)

    def close(self) -> None:
        """Ends the step: θ moves now."""
        self.is_open = False
        self._end_replay()

    def _end_replay(self) -> None:
        """Puts the module back as it was."""
        if self._network is not None:
            self._network.close()
            self._network = None

    def _product(
        self, tangents: Tangents, units: range, norms: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Returns the network's H y + B in some directions; see :data:`Product`."""
        assert self._network is not None
        self._left -= 1
        part = slice(units.start, units.stop)
        y = None if tangents.is_zero else [t[part] for t in tangents.state[THETA]]
        e = {name: t[part] for name, t in tangents.unit.items()}
        weights = None
        products, moved, weights = self._formed(tangents, part, y, e, norms)
        if self._follow_newly_written():
            products, moved, weights = self._formed(tangents, part, y, e, None)
        for t, new in zip(tangents.statistics, moved, strict=True):
            t[part].copy_(new)
        if tangents.sync and not self._training.sharded:
            average_(products)
        return products, weights

    def _formed(
        self,
        tangents: Tangents,
        part: slice,
        y: list[Tensor] | None,
        e: dict[str, Tensor],
        norms: Tensor | None,
    ) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """Returns H y + B, what becomes of the statistics' tangents, and see :data:`Product`."""
        assert self._network is not None
        if norms is not None and y is not None and not tangents.statistics:
            products, weights = self._network.one_sided(y, e, norms[part])
            return products, [], weights
        r = [t[part] for t in tangents.statistics]
        products, moved = self._network.tangent(y, e, r, is_last=self._left == 0)
        return products, moved, None

    def _follow_newly_written(self) -> bool:
        """Looks for buffers that this step writes to as the first; returns whether they matter."""
        training = self._training
        if not training.objective.newly_written or training.follow_newly_written is None:
            return False
        assert self._expected is not None
        self._end_replay()
        is_new = training.follow_newly_written(self._expected[0])
        left = self._left
        self.expect(*self._expected)
        self._left = left
        return is_new

    def _complete(self, sums: list[Tensor], m: int) -> list[Tensor]:
        """Adds zeros for parameters that have joined since, or for all where there is nothing."""
        return sums + stacked_zeros(self._training.theta[len(sums) :], m)
