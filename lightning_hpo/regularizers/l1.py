"""L1 regularization with tunable strengths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_hpo._arguments import named_arguments
from lightning_hpo.hyperparameters import Constraint
from lightning_hpo.regularizers._placement import INIT_HINTS
from lightning_hpo.regularizers.penalty import Penalty, PenaltyMixin


class L1Penalty(Penalty):
    """λ ‖w‖₁ (Tibshirani 1996), with sign(0) = 0.

    Its gradient jumps where a weight crosses 0: hypergradients are exact for the steps in which
    none does.

    Example:
        >>> from lightning_hpo.regularizers import L1Penalty
        >>> module = with_mixins(LitModel(), L1Mixin)
        >>> module.register_penalty(L1Penalty, init=1e-4)  # as register_l1(1e-4)
        >>> module.l1
        Hyperparameter(0.0001, constraint=Positive(low=1e-10, high=10000.0))
    """

    degree = 1

    def value(self, weight: Tensor, constant: Any) -> Tensor:
        """Returns ‖w‖₁."""
        return weight.abs().sum()

    def gradient(self, weight: Tensor, constant: Any) -> Tensor:
        """Returns sign(w)."""
        return weight.sign()

    def hvp(self, weight: Tensor, u: Tensor, constant: Any) -> None:
        """Returns None: almost everywhere the second derivative is 0."""

    def total(self, weights: Sequence[Tensor]) -> Tensor:
        """Returns ‖w‖₁ over all weights; in few kernels, where no derivative is taken."""
        if torch.is_grad_enabled():
            return super().total(weights)
        return torch.stack(list(torch._foreach_norm(list(weights), 1))).sum()

    def gradients(self, which: Sequence[int], weights: Sequence[Tensor]) -> list[Tensor]:
        """Returns sign(w) per weight, in few kernels."""
        return list(torch._foreach_sign(list(weights)))


class L1Mixin(PenaltyMixin):
    """Gives a LightningModule L1 penalties λ ‖w‖₁ (Tibshirani 1996) with tunable strengths.

    Without the callback the strengths are simply fixed.

    Raises:
        TypeError: Where a class is defined that names this mixin after its LightningModule.

    Example:
        >>> class Sparse(L1Mixin, LitModel):  # the mixin first
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_l1(init=1e-4, granularity="layer")
        >>> sorted(named_hyperparameters(Sparse()))
        ['l1.net.0', 'l1.net.3']
    """

    @named_arguments("register_l1", INIT_HINTS)
    def register_l1(
        self,
        init: float | Literal["auto"] = "auto",
        name: str = "l1",
        granularity: str = "model",
        parameters: Iterable[nn.Parameter | str] | None = None,
        inside_loss: bool = False,
        constraint: Constraint | None = None,
    ) -> None:
        r"""Adds Σ λ ‖w‖₁ to the training loss. Call it after the network has been built.

        By default the penalty acts in the gradient: λ sign(w) is added before clipping, and
        ``training_step`` does not change. Together with :class:`L2Mixin` it is an elastic net
        (Zou & Hastie 2005).

        Args:
            init: Initial strength λ, in the scale of the value (not its logarithm). ``"auto"``:
                where the penalty begins to matter over this training, from its learning rates;
                found at its start, said once, and saved with λ (see :mod:`lightning_hpo.auto`).
            name: The attribute under which the hyperparameters are registered, and the first part
                of their names.
            granularity: ``"model"``: one λ for all weights, named ``name``. ``"layer"``: one per
                module that owns weights, named ``name.<module>``. ``"parameter"``: one per weight,
                named ``name.<module>.<weight>``.
            parameters: The weights to regularize: parameters of this module, or their dotted names.
                Default: all but biases and the parameters of normalization layers.
            inside_loss: Whether ``training_step`` adds ``self.penalty()`` to its loss instead. Both
                ways give the same θ and λ to rounding.
            constraint: Default: :class:`Positive`, so that λ is tuned on a log scale.

        Raises:
            TypeError: If ``init`` is no number and not ``"auto"``, or ``parameters`` holds
                something else than parameters and names.
            ValueError: If ``granularity`` is unknown, ``name`` is taken or no attribute name,
                ``init`` is not one number or lies outside the constraint, or ``parameters`` is
                empty or holds what this module does not own.
            MisconfigurationException: Before the first step, if ``"auto"`` meets ``inside_loss``
                and an optimizer that divides by the size of the gradient, such as Adam.

        Example:
            >>> module = with_mixins(LitModel(), L1Mixin, L2Mixin)
            >>> module.register_l1(1e-5, parameters=["net.0.weight"])
            >>> module.register_l2(1e-4)  # an elastic net in the first layer
        """
        self._register_penalty(
            "register_l1", L1Penalty, init, name, granularity, parameters, inside_loss, constraint
        )
