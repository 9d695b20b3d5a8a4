"""θ, and the λ that one estimator serves: the order of lists, stacks, and averages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_hpo._lightning import MisconfigurationException
from lightning_hpo._tensors import stacked_zeros
from lightning_hpo.distributed import average_, sum_over_shards
from lightning_hpo.dynamics import OptimizerStep
from lightning_hpo.hyperparameters import Hyperparameter
from lightning_hpo.regularizers import Penalty
from lightning_hpo.step.tangents import Tangents
from lightning_hpo.step.training_map import TrainingMap


class Space:
    """The parameters θ and the raw λ that an estimator works on.

    Lists over θ have one tensor per parameter, in the order of the optimizer; lists over λ one per
    hyperparameter, shaped like its raw tensor. Stacks of m directions have a leading dimension m.

    Args:
        training: What all steps of the training share.
        names: The hyperparameters that the estimator serves.
        uses_hessian: Whether it asks for products with H. Where it does not, and λ act through
            penalties alone, no step is replayed.
        window: How many steps it may keep.

    Attributes:
        training: What all steps of the training share.
        hyperparameters: The λ, by name.
        followed: The tangents that the estimator carries along.
        window: See above.

    Example:
        >>> class Shown(T1T2):
        ...     def setup(self, space):
        ...         super().setup(space)
        ...         print(list(space.hyperparameters), space.raws[0].shape)
        >>> train(Shown())
        ['l2'] torch.Size([])
    """

    def __init__(
        self,
        training: TrainingMap,
        names: Iterable[str],
        *,
        uses_hessian: bool = True,
        window: int | None = None,
    ) -> None:
        self.training = training
        self.hyperparameters = {name: training.hyperparameters[name] for name in names}
        self.followed: list[Tangents] = []
        self.window = window
        self._uses_hessian = uses_hessian

    @property
    def theta(self) -> list[Tensor]:
        """The parameters that the optimizer moves; local slices where they are sharded."""
        return self.training.theta

    @property
    def raws(self) -> list[Tensor]:
        """The raw tensors of λ."""
        return [h.raw for h in self.hyperparameters.values()]

    @property
    def count(self) -> int:
        """The number m of scalar hyperparameters."""
        return sum(raw.numel() for raw in self.raws)

    @property
    def in_loss(self) -> list[str]:
        """The names of the λ that the training loss itself depends on."""
        return [name for name in self.hyperparameters if name in self.training.in_loss]

    @property
    def options(self) -> list[str]:
        """The names of the λ that are options of the model's optimizer, or decide about some."""
        options = self.training.options
        if options is None:
            return []
        known, chosen = options.hyperparameters, set(options.choices)

        def decides(h: Hyperparameter) -> bool:
            return h.is_policy and not chosen.isdisjoint(self.training.choices.decided_by([h]))

        return [name for name, h in self.hyperparameters.items() if name in known or decides(h)]

    @property
    def replays(self) -> bool:
        """Whether steps are replayed at all."""
        return self._uses_hessian or bool(self.in_loss)

    def tangents(self, *, decay: float = 1.0, sync: bool = True) -> Tangents:
        """Makes tangents dθ/dλ, which start at zero, for :meth:`Step.jvp_` at observed steps.

        Args:
            decay: The factor by which they fade before each observed step; 1: not at all.
            sync: Whether H y + B is averaged over the ranks, which is exact. With False each rank
                follows the tangents of its own data, and ⟨g_V, y⟩ is averaged instead.
        """
        tangents = Tangents(self.training, self.unit_directions(), decay=decay, sync=sync)
        self.followed.append(tangents)
        return tangents

    def unit_directions(self) -> dict[str, Tensor]:
        """Returns the m unit vectors of λ space, one tensor ``(m, *raw.shape)`` per λ, on the CPU.

        There it can be seen which entries are zero without waiting for a device.
        """
        directions = {}
        start = 0
        for name, h in self.hyperparameters.items():
            n = h.raw.numel()
            e = torch.zeros((self.count, n), dtype=h.raw.dtype, device="cpu")
            e[start : start + n] = torch.eye(n, dtype=e.dtype, device="cpu")
            directions[name] = e.reshape(self.count, *h.raw.shape)
            start += n
        return directions

    def split(self, stack: Tensor) -> list[Tensor]:
        """Splits m numbers, one per scalar hyperparameter, into tensors shaped like raw λ.

        Args:
            stack: ``(m,)``, in the order of the hyperparameters.
        """
        sizes = [raw.numel() for raw in self.raws]
        parts = zip(stack.split(sizes), self.raws, strict=True)
        return [part.reshape(raw.shape) for part, raw in parts]

    def zeros(self, m: int) -> dict[str, Tensor]:
        """Returns m zeros per λ, in float32 or better, by name.

        Args:
            m: The number of directions.
        """
        return dict(zip(self.hyperparameters, stacked_zeros(self.raws, m), strict=True))

    def penalties_in(
        self, step: OptimizerStep
    ) -> Iterator[tuple[str | None, Penalty, list[int], list[int]]]:
        """Yields the penalties that acted in a step: on weights that had a gradient.

        Args:
            step: What the optimizer was given.

        Yields:
            The name of the strength, None where it is frozen or another estimator's; the penalty;
            the positions of its weights among its own, and in θ.
        """
        names = {id(h): name for name, h in self.hyperparameters.items()}
        for penalty, which, index in self.training.penalties_in(step):
            yield names.get(id(penalty.hyperparameter)), penalty, which, index

    def average_(self, theta: Sequence[Tensor | None], lam: Iterable[Tensor] = ()) -> None:
        """Averages parts of a gradient over the ranks, in place; those over sharded θ come so.

        Args:
            theta: One tensor per parameter; None is passed over.
            lam: Tensors of the size of λ.
        """
        own = [] if self.training.sharded else [t for t in theta if t is not None]
        average_([*own, *lam])

    def dot(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """Returns ⟨a, b⟩ over all elements of θ.

        Args:
            a: One tensor per parameter.
            b: The same.
        """
        dots = torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)])
        return sum_over_shards(dots.sum(), self.training.sharded)

    def refuse_options(self, estimator: str, reason: str) -> None:
        """Refuses to tune the optimizer's options with an estimator that cannot see them.

        Args:
            estimator: How the message calls it.
            reason: Why it cannot, as the message says.

        Raises:
            MisconfigurationException: If any is to be tuned.
        """
        if self.options:
            raise MisconfigurationException(
                f"{estimator} cannot tune {self.options}: {reason}. Use T1T2(), UnrollK or ClipR"
            )
