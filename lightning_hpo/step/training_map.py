"""What all steps of one training share: the parts of which the map is composed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_hpo._tensors import widened
from lightning_hpo.choices import Choices
from lightning_hpo.distributed import is_sharded, local
from lightning_hpo.dynamics import Dynamics, OptimizerOptions, OptimizerStep
from lightning_hpo.hyperparameters import Hyperparameter, UnitInterval
from lightning_hpo.objectives import Moment, TrainingObjective
from lightning_hpo.regularizers import Penalty
from lightning_hpo.statistics import RunningStatistics


@dataclass
class TrainingMap:
    """The parts of s' = Φ(s, clip(∇L_T + Σ λ ∇R), λ), and how its derivatives are taken.

    Where parameters are sharded (``fully_shard``), all that is shaped like θ is a local slice, and
    gradients of a loss over θ come averaged over the ranks.

    Attributes:
        objective: L_T without the penalties that act in the gradient.
        hyperparameters: All λ, by name.
        penalties: The penalties that act in the gradient.
        dynamics: The optimizer's step Φ.
        options: The optimizer's own options that are tuned; None where there are none.
        derivatives: The name of the backend, or ``"auto"`` before the first product.
        is_automatic: Whether another backend may take its place where an operator needs it.
        is_agreed: Whether all ranks use the same backend.
        in_loss: The names of the λ that the training loss itself depends on.
        reuses_gradient: Whether the gradient of the real step has been seen to be that of a replay.
        scales_gradient: Whether a factor of the loss is one of its gradient. Hooks inside of the
            network that clip gradients see to it that it is not.
        follow_newly_written: Follows buffers that a step, at a moment, is the first to write to;
            returns whether tangents have to be moved anew. None where nobody can.
        logit_step: Differences over a logit (random masks) reach at least so far to either side.
    """

    objective: TrainingObjective
    hyperparameters: dict[str, Hyperparameter]
    penalties: list[Penalty]
    dynamics: Dynamics
    options: OptimizerOptions | None
    derivatives: str
    is_automatic: bool = field(init=False)
    is_agreed: bool = True
    in_loss: frozenset[str] = frozenset()
    reuses_gradient: bool = False
    scales_gradient: bool = True
    logit_step: float = 0.0
    follow_newly_written: Callable[[Moment], bool] | None = None

    def __post_init__(self) -> None:
        self.is_automatic = self.derivatives == "auto"
        self.sharded = is_sharded(self.theta)

    def difference_step(self, name: str) -> float | None:
        """Returns half the width of the difference over a λ; None where autograd serves.

        Args:
            name: That of the hyperparameter.

        Returns:
            A number in units of raw λ, or None.
        """
        h = self.hyperparameters[name]
        if h.difference_step is None or not isinstance(h.constraint, UnitInterval):
            return h.difference_step
        return max(h.difference_step, self.logit_step)

    @property
    def theta(self) -> list[Tensor]:
        """The parameters that the optimizer moves, in its order; more may join them."""
        return self.dynamics.theta

    @property
    def choices(self) -> Choices:
        """What is drawn for each batch."""
        return self.objective.choices

    @property
    def statistics(self) -> RunningStatistics:
        """The running statistics that are carried along; none for most networks."""
        return self.objective.statistics

    def followed(self) -> list[str]:
        """Returns the names of the buffers that are carried along."""
        return [self.objective.name_of(place) for place in self.statistics.places]

    @property
    def is_one_sided(self) -> bool:
        """Whether one-sided differences may take the place of central ones.

        They reuse the step's own gradient, so it has to be that of the replay to rounding, and
        put their factor into the loss.
        """
        in_loss = [self.hyperparameters[name] for name in self.in_loss]
        return (
            self.reuses_gradient
            and self.scales_gradient
            and self.is_agreed
            and self.derivatives == "finite_difference"
            and not self.sharded
            and not self.statistics  # their values come from a replay, not from the step
            and self.objective.rounding is None  # √ε would be far too wide
            and {t.dtype for t in (*self.theta, *(h.raw for h in in_loss))}
            in ({torch.float32}, {torch.float64})
            and all(h.difference_step is None for h in in_loss)
        )

    def penalties_in(self, step: OptimizerStep) -> Iterator[tuple[Penalty, list[int], list[int]]]:
        """Yields the penalties that acted in a step: on weights that had a gradient.

        Not those whose strength is not resolved yet.

        Args:
            step: What the optimizer was given.

        Yields:
            The penalty, the positions of these weights among its own, and those in θ.
        """
        positions = {id(p): i for i, p in enumerate(self.theta)}
        for penalty in self.penalties:
            if not penalty.hyperparameter.is_resolved:
                continue
            found = [
                (k, i)
                for k, w in enumerate(penalty.weights)
                if (i := positions.get(id(w))) is not None and step.gradients[i] is not None
            ]
            if found:
                which, index = zip(*found, strict=True)
                yield penalty, list(which), list(index)

    def values(self) -> list[Tensor]:
        """Returns θ as it is now, in float32 or better: the parameters' own memory, or a copy."""
        return [widened(local(p.detach())) for p in self.theta]
