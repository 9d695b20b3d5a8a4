"""Penalties λ R(w): their closed-form derivatives, and how a LightningModule applies them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from lightning_hpo._record import record_of, update_record
from lightning_hpo._tensors import add_scaled_, rows
from lightning_hpo.distributed import local
from lightning_hpo.hyperparameters import Constraint, Hyperparameter, Positive
from lightning_hpo.regularizers._placement import attach, check_free_name, closest

GRANULARITIES = ("model", "layer", "parameter")


class Penalty(ABC):
    """One term λ R(w) of the training loss: one scalar λ and the weights that it acts on.

    A subclass gives R, ∇R and products with the Hessian of R; the chain rule through λ and its
    constraint is done here. No method runs the network. Where parameters are sharded, the methods
    see local slices: R must be a sum over the elements of the weights.

    Args:
        hyperparameter: λ, of one element.
        weights: For each weight, the module that owns it and its name there. Weights are looked up
            when they are needed, since strategies may replace the parameters of a module.
    """

    def __init__(
        self, hyperparameter: Hyperparameter, weights: Sequence[tuple[nn.Module, str]]
    ) -> None:
        self.hyperparameter = hyperparameter
        self._weights = list(weights)

    @property
    def weights(self) -> list[Tensor]:
        """The weights w that the penalty acts on."""
        for owner, name in self._weights:
            if owner._parameters.get(name) is None:
                raise MisconfigurationException(
                    f"A penalty acts on the parameter {name!r} of a {type(owner).__name__}, which "
                    "no longer has it: register penalties after pruning, weight normalization and "
                    "whatever else replaces parameters"
                )
        return [owner._parameters[name] for owner, name in self._weights]  # type: ignore[misc]

    @abstractmethod
    def function(self, weights: Sequence[Tensor]) -> Tensor:
        """Returns R(w), a scalar."""

    @abstractmethod
    def gradient(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Returns ∇R(w), one tensor per weight."""

    @abstractmethod
    def hvp(self, weights: Sequence[Tensor], u: Sequence[Tensor]) -> list[Tensor] | None:
        """Returns ∇²R(w) u for m stacked directions u, or None where it is zero."""

    def value(self) -> Tensor:
        """Returns λ R(w) as a differentiable scalar, to be added to a loss.

        Costs one pass over w, and two in the backward pass.
        """
        strength: Tensor = self.hyperparameter().reshape(())
        if forward_ad._current_level >= 0 or peek_interpreter_stack() is not None:
            # Neither dual tensors nor torch.func pass through the fused term.
            return strength * self.function(self.weights)
        value: Tensor = _Term.apply(self, strength, *self.weights)
        return value

    def add_gradient_(self, gradients: list[Tensor], weights: list[Tensor]) -> None:
        """Adds λ ∇R(w) to gradients over some weights, in place; costs one pass over w."""
        if weights:
            strength = self.hyperparameter().detach().reshape(())
            add_scaled_(gradients, self.gradient(weights), strength)

    def joint_hvp_(
        self,
        weights: Sequence[Tensor],
        u: Sequence[Tensor] | None,
        e: Sequence[float] | None,
        theta_result: list[Tensor] | None,
        lambda_result: Tensor | None,
        gradient_weights: Tensor | None = None,
    ) -> None:
        r"""Adds the products of the Hessian of λ(raw) R(w) over (w, raw) with m directions.

            θ part: λ ∇²R u + (λ' e + λ a) ∇R        λ part: λ' ⟨∇R, u⟩ + λ'' R e

        with λ' and λ'' the derivatives of the constraint with respect to raw. One pass over w for
        each term; nothing of the size of w is allocated for L2.

        Args:
            weights: w, as it was when the gradient was taken.
            u: One tensor ``(m, *w.shape)`` per weight; None stands for zeros.
            e: m numbers; None stands for zeros.
            theta_result: One tensor ``(m, *w.shape)`` per weight, added to; None: not wanted.
            lambda_result: ``(m,)``, added to; None: not wanted.
            gradient_weights: a ``(m,)``, by which the gradient λ ∇R itself is added; None: 0.
        """
        value, first, second = (
            t.reshape(()) for t in self.hyperparameter.constraint.derivatives(self.raw)
        )
        gradient = self.gradient(weights)
        if theta_result is not None:
            product = None if u is None else self.hvp(weights, u)
            if product is not None:
                add_scaled_(theta_result, product, value)
            for j in range(len(theta_result[0])):
                rate = 0.0 if e is None else e[j]
                if gradient_weights is not None:
                    factor = first * rate + value * gradient_weights[j]
                elif rate:
                    factor = first * rate
                else:
                    continue
                add_scaled_([t[j] for t in theta_result], gradient, factor)
        if lambda_result is not None:
            if u is not None:
                dots = [rows(d) @ g.flatten() for d, g in zip(u, gradient, strict=True)]
                lambda_result += first * torch.stack(dots).sum(0).to(lambda_result.dtype)
            if e is not None:
                curvature = second * self.function(weights)
                lambda_result += curvature * torch.tensor(e).to(lambda_result)

    @property
    def raw(self) -> Tensor:
        """The raw tensor of λ."""
        return self.hyperparameter.raw


class _Term(torch.autograd.Function):
    """λ R(w) with a backward pass that allocates nothing but the gradient."""

    @staticmethod
    def forward(ctx: Any, penalty: Penalty, strength: Tensor, *weights: Tensor) -> Tensor:
        value = penalty.function(weights)
        ctx.penalty = penalty
        ctx.save_for_backward(strength, value, *weights)
        return strength * value

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor | None, ...]:
        strength, value, *weights = ctx.saved_tensors
        factor = bar * strength
        directions = ctx.penalty.gradient(weights)
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            value = ctx.penalty.function(weights)
            return None, bar * value, *[d * factor for d in directions]
        return None, bar * value, *torch._foreach_mul(directions, factor.to(directions[0].dtype))


class PenaltyMixin(pl.LightningModule):
    """Adds registered penalties to the gradient, or offers them as a term of the loss.

    In the gradient, λ ∇R(w) is added in :meth:`on_before_optimizer_step`: after unscaling and
    before clipping, where a coupled weight decay would act. In the loss, the user adds
    :meth:`penalty`. Each penalty acts in exactly one of the two ways, which are the same but for
    two things: a weight that has no gradient is penalized in the loss only; and where an epoch ends
    within an accumulation, Lightning's loss, penalty included, is divided by the full number of
    batches.
    """

    def _add_penalty(self, penalty: Penalty, *, inside_loss: bool) -> None:
        if inside_loss:
            update_record(self, penalties_in_loss=(*self.loss_penalties, penalty))
        else:
            update_record(self, penalties_in_gradient=(*self.gradient_penalties, penalty))

    def _register_penalty(
        self,
        kind: type[Penalty],
        init: float,
        name: str,
        granularity: str,
        parameters: Iterable[nn.Parameter | str] | None,
        inside_loss: bool,
        constraint: Constraint | None,
    ) -> None:
        """Registers λ R(w), as described at ``register_l2``."""
        caller = f"register_{kind.__name__.removesuffix('Penalty').lower()}"
        if granularity not in GRANULARITIES:
            raise ValueError(
                f"{caller}: granularity={granularity!r}, expected one of {GRANULARITIES}"
            )
        check_free_name(caller, self, name)
        weights = (
            default_weights(self)
            if parameters is None
            else _chosen_weights(caller, self, parameters)
        )
        if not weights:
            raise ValueError(
                f"{caller}: {type(self).__name__} has no weights to regularize (biases and "
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
            attach(self, f"{name}.{key}" if key else name, made[key])
            self._add_penalty(kind(made[key], members), inside_loss=inside_loss)

    @property
    def gradient_penalties(self) -> list[Penalty]:
        """The penalties that act on the gradient."""
        return list(record_of(self).penalties_in_gradient)

    @property
    def loss_penalties(self) -> list[Penalty]:
        """The penalties that :meth:`penalty` sums."""
        return list(record_of(self).penalties_in_loss)

    def penalty(self) -> Tensor:
        """Returns Σ λ R(w) over the penalties registered with ``inside_loss=True``.

        Raises:
            MisconfigurationException: If none is registered that way: the penalties that act in
                the gradient must not be counted twice.
        """
        penalties = self.loss_penalties
        if not penalties:
            raise MisconfigurationException(
                "penalty() was called, but no penalty is registered with inside_loss=True. Those "
                "that act in the gradient need no term in the loss: remove the call, or register "
                "with inside_loss=True"
            )
        total = torch.stack([p.value() for p in penalties]).sum()
        # L_V is unregularized, also where validation_step shares its code with training_step.
        return total * 0.0 if record_of(self).without_penalty else total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Adds the gradients of the penalties; an override must call ``super()``."""
        super().on_before_optimizer_step(optimizer)
        with torch.no_grad():
            for penalty in self.gradient_penalties:
                trained = [w for w in penalty.weights if w.grad is not None]
                penalty.add_gradient_(
                    [local(w.grad) for w in trained if w.grad is not None],
                    [local(w.detach()) for w in trained],
                )
        update_record(self, penalties_applied=True)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Steps the optimizer, then checks that the penalties took part in the step.

        Raises:
            MisconfigurationException: If an override of :meth:`on_before_optimizer_step` does not
                call ``super()``.
        """
        update_record(self, penalties_applied=False)
        super().optimizer_step(*args, **kwargs)
        self.check_penalties_applied()

    def check_penalties_applied(self) -> None:
        """Refuses a step in which :meth:`on_before_optimizer_step` of this mixin did not run.

        Raises:
            MisconfigurationException: See :meth:`optimizer_step`.
        """
        if self.gradient_penalties and not record_of(self).penalties_applied:
            raise MisconfigurationException(
                f"{type(self).__name__}.on_before_optimizer_step does not call "
                "super().on_before_optimizer_step(optimizer), so the registered penalties never "
                "reach the gradient. Call it, or register the penalties with inside_loss=True and "
                "add self.penalty() to the loss"
            )


_NORMALIZATION = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
)


def default_weights(module: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Lists the weights that a penalty acts on unless told otherwise.

    Biases (parameters whose name contains ``bias``) and the parameters of normalization layers
    (the classes of torch, and any whose class name contains ``norm``) are left out; a shared
    weight is listed once.

    Returns:
        The dotted name, the owning module and the name there, of each weight.
    """
    return [
        (full, owner, name)
        for full, owner, name in all_weights(module)
        if "bias" not in name
        and not isinstance(owner, _NORMALIZATION)
        and "norm" not in type(owner).__name__.lower()
    ]


def all_weights(module: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Lists every parameter once, as in :func:`default_weights`."""
    found = []
    seen = set()
    for prefix, owner in module.named_modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found.append((f"{prefix}.{name}" if prefix else name, owner, name))
    return found


def _chosen_weights(
    caller: str, module: nn.Module, parameters: Iterable[nn.Parameter | str]
) -> list[tuple[str, nn.Module, str]]:
    """Finds the given parameters or names in the module."""
    known = all_weights(module)
    by_name = {full: (full, owner, leaf) for full, owner, leaf in known}
    by_id = {id(owner._parameters[leaf]): (full, owner, leaf) for full, owner, leaf in known}
    for full, p in module.named_parameters(remove_duplicate=False):
        by_name.setdefault(full, by_id[id(p)])  # a tied weight has several names
    chosen = {}
    for item in [parameters] if isinstance(parameters, (str, nn.Parameter)) else parameters:
        if isinstance(item, str):
            if item not in by_name:
                raise ValueError(
                    f"{caller}: {type(module).__name__} has no parameter {item!r}; "
                    f"{closest(item, by_name)}"
                )
            entry = by_name[item]
        elif isinstance(item, nn.Parameter):
            if id(item) not in by_id:
                raise ValueError(
                    f"{caller}: parameters holds a parameter of shape {tuple(item.shape)} that "
                    f"is not registered in {type(module).__name__}; pass parameters of this module"
                )
            entry = by_id[id(item)]
        else:
            raise TypeError(
                f"{caller}: parameters holds a {type(item).__name__}, expected parameters of "
                "this module or their dotted names"
            )
        chosen[entry[0]] = entry
    return list(chosen.values())
