"""g_V: the gradient of the validation loss at an update, taken once for all estimators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_hpo._tensors import filled, rows, separate, widened
from lightning_hpo.choices import Indices
from lightning_hpo.distributed import average_, sum_over_shards
from lightning_hpo.held_out import HeldOutBatch
from lightning_hpo.objectives import ValidationObjective
from lightning_hpo.step.training_map import TrainingMap


class ValidationGradient:
    """g_V = ∇θ L_V(θ_{t+1}) on one held-out batch, taken when it is asked for.

    Args:
        training: What all steps of the training share.
        objective: L_V.
        batch: The held-out batch.
        is_shared: Whether several estimators ask for it. It is then kept, in |θ|, so that it is
            taken once.

    Example:
        >>> class Shown(T1T2):
        ...     def hypergradient(self, validation):
        ...         print([tuple(g.shape) for g in validation.tensors()])
        ...         return super().hypergradient(validation)
        >>> train(Shown())
        [(16, 4), (16,), (3, 16), (3,)]
    """

    def __init__(
        self,
        training: TrainingMap,
        objective: ValidationObjective,
        batch: HeldOutBatch,
        *,
        is_shared: bool = False,
    ) -> None:
        self._training = training
        self._objective = objective
        self._batch = batch
        self._is_shared = is_shared
        self._loss: Tensor | None = None
        self._kept: list[Tensor] | None = None
        self._statistics: list[Tensor] | None = None

    def tensors(self) -> list[Tensor]:
        """Returns g_V, averaged over the ranks; zeros where L_V does not depend on a parameter.

        One tensor per parameter, in float32 or better, which may be used as work space.
        """
        if self._is_shared:
            return [g.clone() for g in self._shared()]
        return self._take()

    def loss(self) -> float | None:
        """Returns L_V, averaged over the ranks; None where no gradient was asked for."""
        return None if self._loss is None else float(self._loss)

    def _loss_to_average(self, dtype: torch.dtype) -> list[Tensor]:
        """Returns L_V of this rank, to be averaged in place along with other numbers."""
        assert self._objective.loss is not None
        self._loss = self._objective.loss.to(dtype, copy=True)
        return [self._loss]

    def statistics(self) -> list[Tensor]:
        """Returns ∂L_V/∂r, one tensor per running statistic, of this rank's own L_V.

        It comes with g_V, at no cost after :meth:`tensors`.
        """
        if self._statistics is None:
            self._shared()
        assert self._statistics is not None
        return self._statistics

    def products(
        self, stacks: Sequence[Tensor | None], statistics: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        """Returns ⟨g_V, y⟩ for each parameter, averaged over the ranks.

        Unless it is shared, each part of g_V is freed once it has been multiplied: the whole never
        exists.

        Args:
            stacks: Directions y, ``(m, *p.shape)`` for each parameter p, the same on all ranks;
                None where none is wanted. m may differ between parameters.
            statistics: Directions ṙ of the running statistics, of this rank's own; none: they are
                taken as constants.

        Returns:
            One tensor ``(m,)`` for each parameter, ``(0,)`` where there is no direction; then one
            ⟨∂L_V/∂r, ṙ⟩ for each of ``statistics``.
        """
        training = self._training
        every = [*stacks, *statistics]
        found: list[Tensor | None]
        if self._is_shared:
            gradients = [*self._shared(), *(self.statistics() if statistics else ())]
            found = [
                None if y is None else rows(y) @ g.flatten().to(y.dtype)
                for y, g in zip(every, gradients, strict=True)
            ]
        else:
            found = self._objective.gradient_products(
                self._batch,
                training.theta,
                every,
                training.statistics.buffers() if statistics else (),
            )
        sizes = [0 if y is None else len(y) for y in every]
        device = training.theta[0].device
        parts = [
            torch.zeros(size, device=device) if dots is None else dots
            for dots, size in zip(found, sizes, strict=True)
        ]
        own = torch.cat(parts[len(stacks) :]) if statistics else None
        total = sum_over_shards(torch.cat(parts[: len(stacks)]), training.sharded)
        of_this_rank = [] if own is None else [own]
        if not self._is_shared:
            of_this_rank += self._loss_to_average(total.dtype)
        if not (training.sharded or self._is_shared):  # else g_V comes averaged
            of_this_rank.append(total)
        average_(of_this_rank)
        whole = total if own is None else torch.cat([total, own.to(total)])
        return list(whole.split(sizes))

    def _shared(self) -> list[Tensor]:
        if self._kept is None:
            self._kept = self._take()
        return self._kept

    def _take(self) -> list[Tensor]:
        theta = self._training.theta
        buffers = self._training.statistics.buffers()
        gradients = self._objective.gradient(self._batch, theta, buffers)
        n = len(theta)
        every = separate([widened(g) for g in filled(gradients, [*theta, *buffers])])
        result, self._statistics = every[:n], every[n:]
        loss = self._loss_to_average(result[0].dtype)
        average_(loss if self._training.sharded else [*result, *loss])
        return result


class ExpectedValidation(ValidationGradient):
    """g_V of the mean of L_V(θ, a) over choices a, and each of these losses.

    Args:
        training: What all steps of the training share.
        objective: L_V.
        batch: The held-out batch, the same for all choices.
        drawn: The choices to look at, each with its weight in the mean.

    Attributes:
        drawn: See above.
        asked: The names of those that L_V has asked for; empty before :meth:`losses`.
    """

    def __init__(
        self,
        training: TrainingMap,
        objective: ValidationObjective,
        batch: HeldOutBatch,
        drawn: Sequence[tuple[Indices, float]],
    ) -> None:
        super().__init__(training, objective, batch, is_shared=True)
        self.drawn = list(drawn)
        self.asked: frozenset[str] = frozenset()
        self._losses: list[float] = []

    def losses(self) -> list[float]:
        """Returns L_V(θ, a) of each choice, averaged over the ranks."""
        self._shared()
        return self._losses

    def _take(self) -> list[Tensor]:
        choices = self._training.choices
        total: list[Tensor] = []
        statistics: list[Tensor] = []
        loss: Tensor | None = None
        self._losses = []
        for indices, weight in self.drawn:
            with choices.at(indices):
                gradients = super()._take()
            assert self._statistics is not None
            assert self._loss is not None
            self.asked |= choices.names_of(self._objective.asked)
            self._losses.append(float(self._loss))
            torch._foreach_mul_([*gradients, *self._statistics], weight)
            if loss is None:
                loss, total, statistics = self._loss * weight, gradients, self._statistics
            else:
                loss = loss + self._loss * weight
                torch._foreach_add_(total, gradients)
                if statistics:
                    torch._foreach_add_(statistics, self._statistics)
        self._loss, self._statistics = loss, statistics
        return total
