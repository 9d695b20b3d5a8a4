"""L2 regularization with tunable strengths."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lightning_hpo.hyperparameters import Constraint, Hyperparameter, Positive
from lightning_hpo.regularizers.penalty import (
    Penalty,
    PenaltyMixin,
    all_weights,
    default_weights,
)

GRANULARITIES = ("model", "layer", "parameter")


class L2Penalty(Penalty):
    """½ λ ‖w‖² (Luketina et al. 2016, §2.2; online-HPO paper, §3.5.1)."""

    def function(self, weights: Sequence[Tensor]) -> Tensor:
        """Returns ½ ‖w‖²."""
        return 0.5 * torch.stack([w.square().sum() for w in weights]).sum()

    def gradient(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Returns w."""
        return list(weights)

    def hvp(self, weights: Sequence[Tensor], u: Sequence[Tensor]) -> list[Tensor]:
        """Returns u."""
        return list(u)


class L2Mixin(PenaltyMixin):
    """Gives a LightningModule L2 penalties whose strengths can be tuned.

    Without the callback the strengths are simply fixed.

    Example::

        class LitClassifier(L2Mixin, lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = make_net()
                self.register_l2(init=1e-4)
    """

    def register_l2(
        self,
        init: float,
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
            init: Initial strength λ, in the scale of the value (not its logarithm).
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
            TypeError: If ``parameters`` holds something else than parameters and names.
            ValueError: If ``granularity`` is unknown, ``name`` is taken or no attribute name,
                ``init`` lies outside the constraint, or ``parameters`` is empty or holds what this
                module does not own.
        """
        if granularity not in GRANULARITIES:
            raise ValueError(
                f"register_l2: granularity={granularity!r}, expected one of {GRANULARITIES}"
            )
        if not name.isidentifier() or hasattr(self, name):
            raise ValueError(
                f"register_l2: name={name!r} is {'taken' if name.isidentifier() else 'no name'} "
                f"in {type(self).__name__}; expected an attribute name that is free"
            )
        weights = default_weights(self) if parameters is None else _chosen_weights(self, parameters)
        if not weights:
            raise ValueError(
                f"register_l2: {type(self).__name__} has no weights to regularize (biases and "
                "normalization layers are left out). Call it after the network has been built, or "
                "choose with parameters="
            )
        groups: dict[str, list[tuple[nn.Module, str]]] = {}
        for full, owner, leaf in weights:
            layer = full.rpartition(".")[0]
            key = {"model": "", "layer": layer or "own", "parameter": full}[granularity]
            groups.setdefault(key, []).append((owner, leaf))
        constraint = Positive() if constraint is None else constraint
        made = {key: Hyperparameter(init, constraint) for key in groups}
        for key, members in groups.items():
            _attach(self, f"{name}.{key}" if key else name, made[key])
            self._add_penalty(L2Penalty(made[key], members), inside_loss=inside_loss)


def _chosen_weights(
    module: nn.Module, parameters: Iterable[nn.Parameter | str]
) -> list[tuple[str, nn.Module, str]]:
    """Finds the given parameters or names in the module."""
    known = all_weights(module)
    by_name = {full: (full, owner, leaf) for full, owner, leaf in known}
    by_id = {id(owner._parameters[leaf]): (full, owner, leaf) for full, owner, leaf in known}
    chosen = {}
    for item in [parameters] if isinstance(parameters, (str, nn.Parameter)) else parameters:
        if isinstance(item, str):
            if item not in by_name:
                close = difflib.get_close_matches(item, by_name, n=3)
                raise ValueError(
                    f"register_l2: parameters names {item!r}, which {type(module).__name__} does "
                    f"not have; the closest names are {close or list(by_name)[:3]}"
                )
            entry = by_name[item]
        elif isinstance(item, nn.Parameter):
            if id(item) not in by_id:
                raise ValueError(
                    f"register_l2: parameters holds a parameter of shape {tuple(item.shape)} that "
                    f"is not registered in {type(module).__name__}; pass parameters of this module"
                )
            entry = by_id[id(item)]
        else:
            raise TypeError(
                f"register_l2: parameters holds a {type(item).__name__}, expected parameters of "
                "this module or their dotted names"
            )
        chosen[entry[0]] = entry
    return list(chosen.values())


def _attach(module: nn.Module, path: str, hyperparameter: Hyperparameter) -> None:
    """Registers a hyperparameter under a dotted path, with plain modules in between."""
    *parents, leaf = path.split(".")
    for part in parents:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    if leaf in module._modules:
        # A container is already there: a layer that owns weights besides its sub-layers'.
        module, leaf = module.get_submodule(leaf), "own"
    module.add_module(leaf, hyperparameter)
