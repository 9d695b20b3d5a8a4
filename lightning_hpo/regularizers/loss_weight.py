"""Tunable weights of auxiliary losses."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_hpo._arguments import named_arguments
from lightning_hpo._record import record_of, update_record
from lightning_hpo.hyperparameters import Constraint, Hyperparameter, Interval
from lightning_hpo.regularizers._mixin import RegularizerMixin
from lightning_hpo.regularizers._placement import LR_HINTS, attach, check_free_name, closest

# torch keeps submodules of these names from being registered.
_TAKEN = frozenset(dir(nn.Module)) | {"main", "training"}

_INITS = "the initial weights are given as inits={'context': 1.0}"


def _example(inits: object) -> str:
    """Writes what was probably meant: each of the names that were given, with a weight."""
    given = [inits] if isinstance(inits, str) else inits
    names = [*given] if isinstance(given, (list, tuple)) else []
    is_known = bool(names) and all(isinstance(name, str) for name in names)
    return str(dict.fromkeys(names if is_known else ["context"], 1.0))


class LossWeightMixin(RegularizerMixin):
    """Weighs auxiliary tasks: ρ in the phone experiment of Franceschi et al. (2017, §5.3).

    Example:
        >>> class MultiTask(LossWeightMixin, LitModel):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_loss_weights({"size": 0.1})
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         x, y = batch
        ...         logits = self.net(x)
        ...         loss = F.cross_entropy(logits, y)
        ...         return self.weighted_loss(loss, size=logits.square().mean())
        >>> trainer = Trainer(callbacks=[OnlineHPOCallback()])
        >>> trainer.fit(MultiTask(), train_loader, validation_loader)
    """

    @named_arguments("register_loss_weights", LR_HINTS | {"init": _INITS, "weights": _INITS})
    def register_loss_weights(
        self,
        inits: Mapping[str, float],
        name: str = "loss_weights",
        constraint: Constraint | None = None,
    ) -> None:
        """Registers one weight per auxiliary loss, named ``name.<loss>``.

        Args:
            inits: Initial weights ρ (in the scale of the value), by the name of the loss.
            name: The attribute under which they are registered.
            constraint: Default: ``Interval(0, inf)``, so that a weight can reach 0.

        Raises:
            TypeError: If ``inits`` is no mapping from names to numbers, or ``constraint`` is none.
            ValueError: If ``inits`` is empty, a name is taken or no attribute name, or an initial
                weight lies outside the constraint.

        Example:
            >>> module = with_mixins(LitModel(), LossWeightMixin)
            >>> module.register_loss_weights({"size": 0.5, "context": 1.0}, constraint=Box(0, 2))
            >>> fixed_values(module)
            {'loss_weights.size': 0.5, 'loss_weights.context': 1.0}
        """
        check_free_name("register_loss_weights", self, name)
        if not isinstance(inits, Mapping) or not all(isinstance(key, str) for key in inits):
            raise TypeError(
                f"register_loss_weights: inits={inits!r}, expected a weight for each auxiliary "
                f"loss by its name, for example {_example(inits)}"
            )
        for key, init in inits.items():
            if isinstance(init, bool) or not isinstance(init, (int, float, Tensor)):
                raise TypeError(
                    f"register_loss_weights: the weight of {key!r} is {init!r}, expected a number, "
                    "or a tensor of them"
                )
        if not inits or not all(key.isidentifier() and key not in _TAKEN for key in inits):
            raise ValueError(
                f"register_loss_weights: inits={dict(inits)}, expected a weight for each name of "
                "an auxiliary loss that is a free attribute name, for example {'context': 1.6}"
            )
        constraint = Interval(0.0) if constraint is None else constraint
        for key, init in inits.items():
            attach(self, f"{name}.{key}", Hyperparameter(init, constraint))
        update_record(self, loss_weights=name)

    def weighted_loss(self, main: Tensor, **auxiliary: Tensor) -> Tensor:
        """Returns main + Σ ρ_k loss_k.

        Args:
            main: The loss whose weight is 1.
            **auxiliary: The auxiliary losses, by the names that were registered; scalars.

        Raises:
            ValueError: If a loss has no registered weight, or a weight no loss.

        Example:
            >>> module = MultiTask()
            >>> module.weighted_loss(torch.tensor(1.0), size=torch.tensor(2.0))  # 1 + 0.1 · 2
            tensor(1.2000)
        """
        name = record_of(self).loss_weights
        if name is None:
            raise ValueError("weighted_loss: call register_loss_weights in __init__ first")
        weights = self.get_submodule(name)._modules
        # What is not known comes first: it may be a missing one, misspelt.
        for key in [*(auxiliary.keys() - weights.keys()), *(weights.keys() - auxiliary.keys())]:
            raise ValueError(
                f"weighted_loss: {key!r} is "
                + (
                    f"not registered; {closest(key, weights)}"
                    if key in auxiliary
                    else f"missing; expected a loss for each weight, as in weighted_loss(main, "
                    f"{', '.join(f'{name}=…' for name in weights)})"
                )
            )
        for key, loss in auxiliary.items():
            weight = weights[key]
            assert weight is not None
            main = main + weight() * loss
        return main
