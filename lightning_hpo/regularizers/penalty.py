"""Penalties λ R(w): their derivatives, and how a LightningModule applies them."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from lightning_hpo._arguments import named_arguments
from lightning_hpo._lightning import MisconfigurationException, is_lightning_module
from lightning_hpo._record import record_of, update_record
from lightning_hpo._repr import listed
from lightning_hpo._tensors import add_scaled_, rows
from lightning_hpo.auto import resolve_penalties
from lightning_hpo.distributed import broadcast_, local, world_size
from lightning_hpo.hyperparameters import Constraint, Hyperparameter, Positive
from lightning_hpo.regularizers._mixin import RegularizerMixin, lightning_bases
from lightning_hpo.regularizers._placement import INIT_HINTS, attach, check_free_name
from lightning_hpo.regularizers._weights import chosen_weights, current_weight, default_weights
from lightning_hpo.regularizers.constants import Constants, kept, refuse_sharded, tensors_of

GRANULARITIES = ("model", "layer", "parameter")


class Penalty(ABC):
    r"""One term λ R(w) of the training loss, with R a sum of one function per weight.

    A subclass gives :meth:`value`, and, where a closed form is cheaper than autograd,
    :meth:`gradient` and :meth:`hvp`. :meth:`constant` lets it keep something for each weight. The
    chain rule through λ and its constraint is done here, and no method runs the network.

    What constants are made of comes in by an ``__init__`` of the penalty's own, and an instance
    is registered.

    Where parameters are sharded, weights are local slices: :meth:`value` must be a sum over the
    elements of a weight, and constants are refused.

    Raises:
        MisconfigurationException: In a training, if a weight is no longer where it was registered.

    Attributes:
        degree: 2 where R is a square of the weights and 1 where it is their size, so that
            ``init="auto"`` is known; else None.
        hyperparameter: λ, of one element, whose value multiplies R.
        constants: What :meth:`constant` returned, one entry per weight.

    Example:
        >>> from lightning_hpo.regularizers import Penalty, PenaltyMixin
        >>> class L2SP(Penalty):
        ...     '''½ λ ‖w − w₀‖²: stay near where training started (Li et al. 2018).'''
        ...
        ...     def constant(self, weight):
        ...         return weight.detach().clone()
        ...
        ...     def value(self, weight, constant):
        ...         return 0.5 * (weight - constant).square().sum()
        >>> class EWC(Penalty):
        ...     '''½ λ Σ F (w − w₀)²: elastic weight consolidation (Kirkpatrick et al. 2017).'''
        ...
        ...     def __init__(self, fisher):  # a dict from parameters to tensors
        ...         self.fisher = fisher
        ...
        ...     def constant(self, weight):
        ...         return weight.detach().clone(), self.fisher[weight]
        ...
        ...     def value(self, weight, constant):
        ...         start, fisher = constant
        ...         return 0.5 * (fisher * (weight - start).square()).sum()
        >>> class FineTuned(PenaltyMixin, LitModel):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_penalty(L2SP, init=1e-3)
        ...         fisher = {p: torch.ones_like(p) for p in self.parameters()}
        ...         self.register_penalty(EWC(fisher), init=1.0)
        >>> sorted(named_hyperparameters(FineTuned()))
        ['ewc', 'l2sp']
    """

    degree: ClassVar[int | None] = None
    hyperparameter: Hyperparameter
    constants: list[Any]
    _weights: list[tuple[nn.Module, str]]

    # -------------------------------------------------------------------- what a subclass defines

    @abstractmethod
    def value(self, weight: Tensor, constant: Any) -> Tensor:
        """Returns R of one weight, a scalar that can be differentiated twice.

        Args:
            weight: w.
            constant: What :meth:`constant` has kept for it.

        Example:
            >>> L2SP().value(torch.tensor([1.0, 2.0]), torch.zeros(2))  # w₀ = 0
            tensor(2.5000)
        """

    def constant(self, weight: Tensor) -> Any:
        """Returns what is kept for a weight; called once, when the penalty is registered.

        It moves with the module, is part of its state_dict, and is the first process's on all.

        Args:
            weight: The module's own parameter.

        Returns:
            A tensor, a tuple of tensors, or None. One that shares the memory of the weight is
            copied.

        Example:
            >>> L2SP().constant(nn.Parameter(torch.ones(2)))
            tensor([1., 1.])
        """
        return None

    def gradient(self, weight: Tensor, constant: Any) -> Tensor:
        """Returns ∇R, of the shape of the weight; it may be the weight itself.

        The default differentiates :meth:`value`. An override must be differentiable, unless it
        comes with an :meth:`hvp` and acts in the gradient.

        Args:
            weight: w.
            constant: What :meth:`constant` has kept for it.

        Example:
            >>> class Fast(L2SP):
            ...     def gradient(self, weight, constant):
            ...         return weight - constant
            >>> Fast().gradient(torch.tensor([1.0, 2.0]), torch.ones(2))
            tensor([0., 1.])
        """
        gradient: Tensor = torch.func.grad(self.value)(weight, constant)
        return gradient

    def hvp(self, weight: Tensor, u: Tensor, constant: Any) -> Tensor | None:
        """Returns ∇²R u for m directions, or None where that is zero.

        The default differentiates :meth:`gradient`, at the cost of a backward pass through it per
        direction.

        Args:
            weight: w.
            u: The directions ``(m, *weight.shape)``, in float32 or better.
            constant: What :meth:`constant` has kept.

        Returns:
            A tensor of the shape of ``u``; it may be ``u`` itself.

        Example:
            >>> class Faster(L2SP):
            ...     def hvp(self, weight, u, constant):
            ...         return u  # the second derivative is the identity
            >>> directions = torch.eye(2)
            >>> torch.equal(Faster().hvp(torch.ones(2), directions, None), directions)
            True
        """

        def gradient(w: Tensor) -> Tensor:
            return self.gradient(w, constant)

        pull_back = torch.func.vjp(gradient, weight.detach().to(u.dtype))[1]
        return torch.stack([pull_back(direction)[0] for direction in u])

    # ------------------------------------------------------------------ what the package calls

    def bound(
        self, hyperparameter: Hyperparameter, weights: Sequence[tuple[nn.Module, str]]
    ) -> Penalty:
        """Returns a copy with a strength and weights of its own, whose constants are taken now.

        Args:
            hyperparameter: λ, of one element.
            weights: For each weight, the module that owns it and its name there. Weights are looked
                up when they are needed, since strategies may replace the parameters of a module.

        Raises:
            TypeError: If a constant is no tensor or tuple of tensors.
            MisconfigurationException: If there are constants of sharded weights.
        """
        penalty = copy.copy(self)
        penalty.hyperparameter = hyperparameter
        penalty._weights = list(weights)
        with torch.no_grad():
            penalty.constants = [kept(self.constant(w), w) for w in penalty.weights]
        return penalty

    @property
    def weights(self) -> list[Tensor]:
        """The weights w that the penalty acts on.

        Example:
            >>> penalty = FineTuned().gradient_penalties[0]
            >>> [w.shape for w in penalty.weights]  # no biases
            [torch.Size([16, 4]), torch.Size([3, 16])]
        """
        return [current_weight(owner, name) for owner, name in self._weights]

    @property
    def raw(self) -> Tensor:
        """The raw tensor of λ."""
        return self.hyperparameter.raw

    @property
    def has_constants(self) -> bool:
        """Whether anything is kept for any weight."""
        return any(constant is not None for constant in self.constants)

    def total(self, weights: Sequence[Tensor]) -> Tensor:
        """Returns R(w), the sum over all weights; an override may need fewer kernels.

        Args:
            weights: Their values, in the order of :attr:`weights`.
        """
        values = [self.value(w, self._constant(k, w)) for k, w in enumerate(weights)]
        return torch.stack(values).sum()

    def term(self) -> Tensor:
        """Returns λ R(w) as a differentiable scalar, to be added to a loss.

        Costs one pass over w, and two in the backward pass.
        """
        strength: Tensor = self.hyperparameter().reshape(())
        if forward_ad._current_level >= 0 or peek_interpreter_stack() is not None:
            # Neither dual tensors nor torch.func pass through the fused term.
            return strength * self.total(self.weights)
        value: Tensor = _Term.apply(self, strength, *self.weights)
        return value

    def gradients(self, which: Sequence[int], weights: Sequence[Tensor]) -> list[Tensor]:
        """Returns ∇R per weight; an override may need fewer kernels.

        Args:
            which: The positions of the weights in :attr:`weights`.
            weights: Their values.
        """
        return [self.gradient(w, self._constant(k, w)) for k, w in zip(which, weights, strict=True)]

    def add_gradient_(
        self, which: Sequence[int], gradients: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> None:
        """Adds λ ∇R to gradients, in place; costs one pass over the weights.

        Args:
            which: The positions of the weights in :attr:`weights`.
            gradients: One per weight.
            weights: Their values.
        """
        if weights:
            strength = self.hyperparameter().detach().reshape(())
            add_scaled_(gradients, self.gradients(which, weights), strength)

    def tangent_(
        self,
        which: Sequence[int],
        weights: Sequence[Tensor],
        u: Sequence[Tensor] | None,
        e: Sequence[float] | None,
        result: Sequence[Tensor],
        gradient_weights: Tensor | None = None,
    ) -> None:
        r"""Adds the θ part of the products with the Hessian of λ(raw) R(w), for m directions.

            λ ∇²R u + (λ' e + λ a) ∇R        λ' = ∂λ/∂raw

        One pass over w for each term; nothing of the size of w is allocated for L2.

        Args:
            which: The positions of the weights in :attr:`weights`.
            weights: Their values when the gradient was taken.
            u: Directions in w, ``(m, *w.shape)`` per weight; None stands for zeros.
            e: Directions in raw λ, m numbers; None stands for zeros.
            result: One tensor ``(m, *w.shape)`` per weight, added to in place.
            gradient_weights: a ``(m,)``, by which the gradient λ ∇R itself is added; None: 0.
        """
        value, first = self._strength()
        if u is not None:
            self._add_products_(which, weights, u, result, value)
        rates = [0.0] * len(result[0]) if e is None else e
        if gradient_weights is None and not any(rates):
            return
        gradients = self.gradients(which, weights)
        for j, rate in enumerate(rates):
            if gradient_weights is not None:
                factor = first * rate + value * gradient_weights[j]
            elif rate:
                factor = first * rate
            else:
                continue
            add_scaled_([t[j] for t in result], gradients, factor)

    def adjoint_(
        self,
        which: Sequence[int],
        weights: Sequence[Tensor],
        u: Sequence[Tensor],
        result: Sequence[Tensor] | None,
    ) -> Tensor:
        r"""Multiplies m directions with the Hessian of λ(raw) R(w), from the side of w.

            θ part: λ ∇²R u        λ part: λ' ⟨∇R, u⟩        λ' = ∂λ/∂raw

        One pass over w for each part; nothing of the size of w is allocated for L2.

        Args:
            which: The positions of the weights in :attr:`weights`.
            weights: Their values when the gradient was taken.
            u: Directions, ``(m, *w.shape)`` per weight.
            result: One tensor ``(m, *w.shape)`` per weight, to which the θ part is added in place;
                None: not wanted.

        Returns:
            The λ part ``(m,)``, in float32 or better.
        """
        value, first = self._strength()
        if result is not None:
            self._add_products_(which, weights, u, result, value)
        gradients = self.gradients(which, weights)
        dots = [rows(d) @ g.flatten().to(d.dtype) for d, g in zip(u, gradients, strict=True)]
        wide = torch.promote_types(first.dtype, torch.float32)
        return first * torch.stack(dots).sum(0).to(wide)

    def _constant(self, k: int, weight: Tensor) -> Any:
        """Returns what is kept for the k-th weight, in the precision of a value of that weight."""
        constant = self.constants[k]
        if isinstance(constant, tuple):
            return tuple(_like(part, weight) for part in constant)
        return None if constant is None else _like(constant, weight)

    def _strength(self) -> tuple[Tensor, Tensor]:
        """Returns λ and λ' as scalars."""
        value, first = self.hyperparameter.constraint.derivatives(self.raw)
        return value.reshape(()), first.reshape(())

    def _add_products_(
        self,
        which: Sequence[int],
        weights: Sequence[Tensor],
        u: Sequence[Tensor],
        result: Sequence[Tensor],
        factor: Tensor,
    ) -> None:
        """Adds ``factor`` times ∇²R u to the result, in place."""
        products = [
            self.hvp(w, d, self._constant(k, w)) for k, w, d in zip(which, weights, u, strict=True)
        ]
        pairs = [(t, p) for t, p in zip(result, products, strict=True) if p is not None]
        add_scaled_([t for t, _ in pairs], [p for _, p in pairs], factor)


def _like(constant: Tensor, weight: Tensor) -> Tensor:
    """Estimators hold θ in float32 where the weights themselves are in half precision."""
    return constant.to(weight.dtype) if constant.is_floating_point() else constant


class _Term(torch.autograd.Function):
    """λ R(w) with a backward pass that allocates nothing but the gradient."""

    @staticmethod
    def forward(ctx: Any, penalty: Penalty, strength: Tensor, *weights: Tensor) -> Tensor:
        value = penalty.total(weights)
        ctx.penalty = penalty
        ctx.save_for_backward(strength, value, *weights)
        return strength * value

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor | None, ...]:
        strength, value, *weights = ctx.saved_tensors
        factor = bar * strength
        directions = ctx.penalty.gradients(range(len(weights)), weights)
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            value = ctx.penalty.total(weights)
            return None, bar * value, *[d * factor for d in directions]
        return None, bar * value, *torch._foreach_mul(directions, factor.to(directions[0].dtype))


class PenaltyMixin(RegularizerMixin):
    """Gives a LightningModule penalties, in the gradient or as a term of the loss.

    In the gradient, λ ∇R(w) is added in :meth:`on_before_optimizer_step`: after unscaling and
    before clipping, where a coupled weight decay would act. In the loss, the user adds
    :meth:`penalty`. Each penalty acts in exactly one of the two ways, which are the same but for
    two things: a weight that has no gradient is penalized in the loss only; and where an epoch ends
    within an accumulation, Lightning's loss, penalty included, is divided by the full number of
    batches.

    Raises:
        TypeError: Where a class is defined that names this mixin after its LightningModule, or
            derives from the LightningModules of ``lightning.pytorch`` and ``pytorch_lightning``.
        MisconfigurationException: In a training, if a penalty meets a sparse gradient, or an
            ``init="auto"`` that cannot be found.

    Example:
        >>> from lightning_hpo.regularizers import L2Penalty, PenaltyMixin
        >>> class Penalized(PenaltyMixin, LitModel):  # the mixin first
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_penalty(L2Penalty, init=1e-4, parameters=["net.3.weight"])
        >>> list(named_hyperparameters(Penalized()))
        ['l2']
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        for base in lightning_bases(cls):
            if order.index(base) < order.index(PenaltyMixin):
                raise TypeError(
                    f"{cls.__name__} names {base.__name__} before the mixin, which hides the hooks "
                    f"of the mixin. Name the mixin first: class {cls.__name__}(L2Mixin, "
                    f"{base.__name__})"
                )

    @named_arguments("register_penalty", INIT_HINTS)
    def register_penalty(
        self,
        kind: type[Penalty] | Penalty,
        init: float | Literal["auto"],
        name: str | None = None,
        granularity: str = "model",
        parameters: Iterable[nn.Parameter | str] | None = None,
        inside_loss: bool = False,
        constraint: Constraint | None = None,
    ) -> None:
        r"""Adds Σ λ R(w) to the training loss.

        Call it after the network has been built, and where the penalty keeps constants, once the
        weights have the values that these are made of (pretrained ones, say).

        By default the penalty acts in the gradient: λ ∇R(w) is added before clipping, as a coupled
        weight decay would, and ``training_step`` does not change. Without the callback the
        strengths are simply fixed.

        Args:
            kind: A subclass of :class:`Penalty`; or an instance, of which each λ gets a copy.
            init: Initial strength λ, in the scale of the value (not its logarithm). ``"auto"`` is
                known for penalties that have a ``degree``; see :mod:`lightning_hpo.auto`.
            name: The attribute under which the hyperparameters are registered, and the first part
                of their names. Default: that of the class in lower case, without ``Penalty``.
            granularity: ``"model"``: one λ for all weights, named ``name``. ``"layer"``: one per
                module that owns weights, named ``name.<module>``. ``"parameter"``: one per weight,
                named ``name.<module>.<weight>``.
            parameters: The weights to regularize: parameters of this module, or their dotted names.
                Default: all but biases and the parameters of normalization layers.
            inside_loss: Whether ``training_step`` adds ``self.penalty()`` to its loss instead. Both
                ways give the same θ and λ to rounding.
            constraint: Default: :class:`Positive`, so that λ is tuned on a log scale.

        Raises:
            TypeError: If ``kind`` is no penalty, ``parameters`` holds something else than
                parameters and names, or a constant is no tensor or tuple of tensors.
            ValueError: If ``granularity`` is unknown, ``name`` is taken or no attribute name,
                ``init`` is not one number or lies outside the constraint, or ``parameters`` is
                empty or holds what this module does not own.
            MisconfigurationException: If the penalty keeps constants of weights that are sharded.

        Example:
            >>> module = Penalized()
            >>> module.register_penalty(L2Penalty, 1e-3, "l2_first", parameters=["net.0.weight"])
            >>> sorted(named_hyperparameters(module))
            ['l2', 'l2_first']
        """
        if name is None:
            owner = kind if isinstance(kind, type) else type(kind)
            name = owner.__name__.removesuffix("Penalty").lower()
        self._register_penalty(
            "register_penalty", kind, init, name, granularity, parameters, inside_loss, constraint
        )

    def _register_penalty(
        self,
        caller: str,
        kind: type[Penalty] | Penalty,
        init: float | Literal["auto"],
        name: str,
        granularity: str,
        parameters: Iterable[nn.Parameter | str] | None,
        inside_loss: bool,
        constraint: Constraint | None,
    ) -> None:
        """See :meth:`register_penalty`; errors name the caller."""
        if not is_lightning_module(self):
            raise TypeError(
                f"{caller}: {type(self).__name__} is no LightningModule, whose hooks apply the "
                f"penalty; derive from one as well: class {type(self).__name__}(L2Mixin, "
                "LightningModule)"
            )
        template: Any = kind
        if isinstance(kind, type) and issubclass(kind, Penalty):
            try:
                template = kind()
            except TypeError as error:
                raise TypeError(
                    f"{caller}: {kind.__name__} cannot be made without arguments ({error}); pass "
                    f"an instance, {kind.__name__}(...), instead of the class"
                ) from None
        if not isinstance(template, Penalty):
            raise TypeError(
                f"{caller}: kind={kind!r}, expected a subclass of Penalty or an instance of one"
            )
        if isinstance(init, str) and (init != "auto" or template.degree is None):
            raise TypeError(
                f"{caller}: init={init!r}, expected a number"
                + (
                    ' or "auto"'
                    if template.degree
                    else f'; "auto" is known for L2 and L1, not for {type(template).__name__}'
                )
            )
        if granularity not in GRANULARITIES:
            raise ValueError(
                f"{caller}: granularity={granularity!r}, expected one of {GRANULARITIES}"
            )
        check_free_name(caller, self, name)
        weights = (
            default_weights(self)
            if parameters is None
            else chosen_weights(caller, self, parameters)
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
        made = {
            key: template.bound(_strength(caller, init, constraint), members)
            for key, members in groups.items()
        }
        for key, penalty in made.items():
            attach(self, f"{name}.{key}" if key else name, penalty.hyperparameter)
            if penalty.has_constants:
                penalty.hyperparameter.add_module("constants", Constants(penalty))
        if inside_loss:
            update_record(self, penalties_in_loss=(*self.loss_penalties, *made.values()))
        else:
            update_record(self, penalties_in_gradient=(*self.gradient_penalties, *made.values()))
        awaits = record_of(self).awaits_later_weights or parameters is None
        update_record(self, constants_agreed=False, awaits_later_weights=awaits)

    @property
    def gradient_penalties(self) -> list[Penalty]:
        """The penalties that act on the gradient.

        Example:
            >>> [type(penalty).__name__ for penalty in Penalized().gradient_penalties]
            ['L2Penalty']
        """
        return list(record_of(self).penalties_in_gradient)

    @property
    def loss_penalties(self) -> list[Penalty]:
        """The penalties that :meth:`penalty` sums.

        Example:
            >>> Penalized().loss_penalties  # its one penalty acts on the gradient
            []
        """
        return list(record_of(self).penalties_in_loss)

    def penalty(self) -> Tensor:
        """Returns Σ λ R(w) over the penalties registered with ``inside_loss=True``.

        Raises:
            MisconfigurationException: If none is registered that way: the penalties that act in
                the gradient must not be counted twice.

        Example:
            >>> module = with_mixins(LitModel(), L2Mixin)
            >>> module.register_l2(1e-4, inside_loss=True)
            >>> loss = module.training_step(next(iter(train_loader)), 0)
            >>> loss = loss + module.penalty()  # as the last line of training_step would
        """
        penalties = self.loss_penalties
        self.resolve_strengths()
        if not penalties:
            raise MisconfigurationException(
                "penalty() was called, but no penalty is registered with inside_loss=True. Those "
                "that act in the gradient need no term in the loss: remove the call, or register "
                "with inside_loss=True"
            )
        # What is not resolved yet acts on nothing that is trained, or outside of a training.
        terms = [p.term() for p in penalties if p.hyperparameter.is_resolved]
        total = torch.stack(terms or [penalties[0].weights[0].new_zeros(())]).sum()
        # L_V is unregularized, also where validation_step shares its code with training_step.
        return total * 0.0 if record_of(self).without_penalty else total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Adds the gradients of the penalties; an override must call ``super()``."""
        super().on_before_optimizer_step(optimizer)  # type: ignore[misc]
        with torch.no_grad():
            self.agree_on_constants()
            self.resolve_strengths(at_step=True)
            for penalty in self.gradient_penalties:
                if not penalty.hyperparameter.is_resolved:
                    continue  # no gradient of its weights says anything yet
                weights = penalty.weights
                if penalty.has_constants:
                    refuse_sharded(weights)
                acting = [(k, w, w.grad) for k, w in enumerate(weights) if w.grad is not None]
                self._refuse_sparse([w for _, w, g in acting if g.layout != torch.strided])
                penalty.add_gradient_(
                    [k for k, _, _ in acting],
                    [local(g) for _, _, g in acting],
                    [local(w.detach()) for _, w, _ in acting],
                )
        update_record(self, penalties_applied=True)

    def _refuse_sparse(self, weights: Sequence[Tensor]) -> None:
        if not weights:
            return
        names = {id(p): name for name, p in self.named_parameters()}
        found = [repr(names.get(id(w), "one")) for w in weights]
        raise MisconfigurationException(
            f"{type(self).__name__}: a penalty acts on {listed(found, 3)}, which gets a sparse "
            "gradient; that of a penalty is dense. Use nn.Embedding(sparse=False), or leave it "
            "out: register the penalty with parameters= for the others"
        )

    def on_fit_start(self) -> None:
        """Lets all processes have the same constants; an override calls ``super()``."""
        super().on_fit_start()  # type: ignore[misc]
        self.agree_on_constants()

    def on_train_start(self) -> None:
        """Resolves ``init="auto"``, where no gradient is needed; an override calls ``super()``."""
        super().on_train_start()  # type: ignore[misc]
        self._warn_of_later_weights()
        self.resolve_strengths()

    def _warn_of_later_weights(self) -> None:
        """Names, once, the trained weights that were added after all had been registered."""
        if not record_of(self).awaits_later_weights:
            return
        update_record(self, awaits_later_weights=False)
        trainer: Any = self.trainer
        moved = [p for o in trainer.optimizers for g in o.param_groups for p in g["params"]]
        trained = {id(p) for p in moved if p.requires_grad}
        penalties = (*self.gradient_penalties, *self.loss_penalties)
        covered = {id(w) for penalty in penalties for w in penalty.weights}
        later = [
            repr(full)
            for full, owner, leaf in default_weights(self)
            if id(owner._parameters[leaf]) in trained - covered
        ]
        if later:
            warnings.warn(
                f"{type(self).__name__}: no penalty acts on {listed(later, 3)}, added after "
                "penalties were registered for all weights. Register them at the end of __init__, "
                "or say with parameters= which weights are meant",
                stacklevel=2,
            )

    def on_train_end(self) -> None:
        """Forgets what ``fast_dev_run`` has resolved; an override calls ``super()``."""
        super().on_train_end()  # type: ignore[misc]
        for penalty in record_of(self).found_dry:
            penalty.hyperparameter.forget()
        update_record(self, found_dry=())

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Steps the optimizer, then checks that the penalties took part in the step.

        Raises:
            MisconfigurationException: If an override of :meth:`on_before_optimizer_step` does not
                call ``super()``.
        """
        update_record(self, penalties_applied=False)
        self.agree_on_constants()
        super().optimizer_step(*args, **kwargs)  # type: ignore[misc]
        self.check_penalties_applied()

    def agree_on_constants(self) -> None:
        """Takes the constants of the first process on all, as DDP does its weights; once.

        All processes must call it together. It happens at the start of a fit, and for an override
        of :meth:`on_fit_start` that does not call ``super()``, before the first batch under the
        callback, or at the first step without it.
        """
        if record_of(self).constants_agreed:
            return
        # A module that is used without a Trainer has none to ask.
        trainer: Any = self.trainer if world_size() > 1 else None
        if trainer is not None and trainer.world_size > 1:
            for penalty in (*self.gradient_penalties, *self.loss_penalties):
                broadcast_(tensors_of(penalty.constants))
        update_record(self, constants_agreed=True)

    def resolve_strengths(self, *, at_step: bool = False) -> None:
        """Gives strengths with ``init="auto"`` their values, as far as these are known by now.

        All processes must call it together. It happens at the start of a training, and where it
        takes a gradient, at the first step that has one. For an override of :meth:`on_train_start`
        that does not call ``super()``, see :meth:`agree_on_constants`.

        Args:
            at_step: Whether the gradients are complete, and without penalties.

        Raises:
            MisconfigurationException: Without a Trainer; for a penalty in the loss of an adaptive
                optimizer; for a value that does not fit the constraint.
        """
        penalties = (*self.gradient_penalties, *self.loss_penalties)
        waiting = [p for p in penalties if not p.hyperparameter.is_resolved]
        if waiting:
            resolve_penalties(self, waiting, at_step=at_step)
            trainer: Any = self.trainer
            if trainer.fast_dev_run:
                update_record(self, found_dry=(*record_of(self).found_dry, *waiting))

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


def _strength(caller: str, init: float | Literal["auto"], constraint: Constraint) -> Hyperparameter:
    """Makes the strength of a penalty; errors name the caller."""
    try:
        if isinstance(init, str):
            return Hyperparameter.unresolved(constraint)
        strength = Hyperparameter(init, constraint)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{caller}: {str(error).removeprefix('Hyperparameter: ')}") from None
    if strength.raw.numel() != 1:
        raise ValueError(
            f"{caller}: init has {strength.raw.numel()} elements, expected one number; "
            "granularity='layer' or 'parameter' makes several strengths"
        )
    return strength
