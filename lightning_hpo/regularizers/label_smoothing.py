"""Label smoothing with a tunable strength."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hpo._arguments import named_arguments
from lightning_hpo.hyperparameters import Constraint, Hyperparameter, Interval


class LabelSmoothing(nn.Module):
    r"""Cross-entropy against smoothed labels (Szegedy et al. 2016, §7), in training only.

        L = (1 − ε) · (−log p_y) + ε / C · Σ_c (−log p_c)

    In evaluation mode it is the plain cross-entropy, so that the same module serves
    ``training_step`` and ``validation_step``.

    Args:
        init: Initial strength ε, a part of 1, in the scale of the value.
        constraint: Default: ``Interval(0, 1)``.

    Raises:
        TypeError: If ``init`` is not a number, or ``constraint`` is none.
        ValueError: If ``init`` lies outside the constraint.

    Example:
        >>> loss = LabelSmoothing(0.1)
        >>> loss(torch.zeros(2, 3), torch.tensor([0, 2]))  # log(3)
        tensor(1.0986)
    """

    @named_arguments("LabelSmoothing")
    def __init__(self, init: float, constraint: Constraint | None = None) -> None:
        super().__init__()
        self.epsilon = Hyperparameter(
            init, Interval(0.0, 1.0) if constraint is None else constraint, typical=0.1
        )

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean loss over a batch.

        Args:
            logits: ``(N, C, …)``, of C classes.
            labels: ``(N, …)``, integers.
        """
        plain = F.cross_entropy(logits, labels)
        if not self.training:
            return plain
        epsilon: Tensor = self.epsilon()
        uniform = -torch.log_softmax(logits, dim=1).mean()
        return (1 - epsilon) * plain + epsilon * uniform
