"""L2 regularization with tunable strengths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_hpo._arguments import named_arguments
from lightning_hpo.hyperparameters import Constraint
from lightning_hpo.regularizers._placement import INIT_HINTS
from lightning_hpo.regularizers.penalty import Penalty, PenaltyMixin


class L2Penalty(Penalty):
    """½ λ ‖w‖² (Luketina et al. 2016, §2.2; online-HPO paper, §3.5.1).

    Example:
        >>> from lightning_hpo.regularizers import L2Penalty
        >>> module = with_mixins(LitModel(), L2Mixin)
        >>> module.register_penalty(L2Penalty, init=1e-4)  # as register_l2(1e-4)
        >>> module.l2
        Hyperparameter(0.0001, constraint=Positive(low=1e-10, high=10000.0))
    """

    degree = 2

    def value(self, weight: Tensor, constant: Any) -> Tensor:
        """Returns ½ ‖w‖²."""
        return 0.5 * weight.square().sum()

    def gradient(self, weight: Tensor, constant: Any) -> Tensor:
        """Returns w."""
        return weight

    def hvp(self, weight: Tensor, u: Tensor, constant: Any) -> Tensor:
        """Returns u."""
        return u

    def total(self, weights: Sequence[Tensor]) -> Tensor:
        """Returns ½ ‖w‖² over all weights; in few kernels, where no derivative is taken."""
        if torch.is_grad_enabled():
            return super().total(weights)
        # In one pass, but without a second derivative at 0.
        return 0.5 * torch.stack(list(torch._foreach_norm(list(weights)))).square().sum()


class L2Mixin(PenaltyMixin):
    """Gives a LightningModule L2 penalties ½ λ ‖w‖² with tunable strengths.

    Without the callback the strengths are simply fixed: weight decay (Krogh & Hertz 1992). Tuned,
    one for all layers or one for each, they are those of Luketina et al. (2016, §3).

    Raises:
        TypeError: Where a class is defined that names this mixin after its LightningModule.

    Example:
        >>> class Tuned(L2Mixin, LitModel):  # the mixin first
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_l2()  # once the network is there
        >>> fixed_values(Tuned())  # found when a training starts
        {'l2': 'auto'}
    """

    @named_arguments("register_l2", INIT_HINTS)
    def register_l2(
        self,
        init: float | Literal["auto"] = "auto",
        name: str = "l2",
        granularity: str = "model",
        parameters: Iterable[nn.Parameter | str] | None = None,
        inside_loss: bool = False,
        constraint: Constraint | None = None,
    ) -> None:
        r"""Adds ½ Σ λ ‖w‖² to the training loss. Call it after the network has been built.

        By default the penalty acts in the gradient: λ w is added before clipping, as a coupled
        weight decay would, and ``training_step`` does not change.

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
            >>> module = with_mixins(LitModel(), L2Mixin)
            >>> module.register_l2(1e-4, granularity="layer")
            >>> sorted(named_hyperparameters(module))
            ['l2.net.0', 'l2.net.3']
        """
        self._register_penalty(
            "register_l2", L2Penalty, init, name, granularity, parameters, inside_loss, constraint
        )
