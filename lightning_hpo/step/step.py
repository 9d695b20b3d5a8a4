"""One training step as a map, and its derivative."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor

from lightning_hpo._tensors import add_scaled_, rows, stacked_zeros
from lightning_hpo.distributed import collect_, sum_over_shards
from lightning_hpo.dynamics import (
    THETA,
    GenericDynamics,
    GradientClipping,
    OptimizerStep,
    State,
    add_to_tangent_,
    jvp_lean_,
    multiply_by_slope_,
    pull_back,
    vjp_lean_,
)
from lightning_hpo.objectives import Moment, is_plain
from lightning_hpo.step.batches import Batches
from lightning_hpo.step.effect import Effect
from lightning_hpo.step.network import Network, in_place
from lightning_hpo.step.space import Space
from lightning_hpo.step.tangents import Tangents


@dataclass
class Step:
    r"""The derivative of one training step with respect to s = (θ, optimizer state) and raw λ.

        s' = Φ(s, ĝ, λ),   ĝ = clip(g),   g = Σ_batches weight · ∇L_T + Σ_penalties λ ∇R

    An estimator gets it right before θ moves. :meth:`jvp_` is used then; what is to be
    differentiated after the step is :meth:`kept`, or made into an :meth:`effect`. Nothing outside
    of this package composes network, penalties, clipping, optimizer and tuned options; by which
    backend products are formed, and when, is decided here.

    Attributes:
        space: θ, and the λ with respect to which it is differentiated.
        point: The optimizer's step: θ_t, the gradient, the optimizer's state and options.
        moments: The micro-batches that can still be replayed, each with the factor of its loss.
        batches: The data of the step while it is under way; None once it is kept.
        through_optimizer: Whether Φ and clipping are applied; else ∂s'/∂g is taken to be −1.
        is_shared: Whether other estimators see the same tensors.

    Raises:
        RuntimeError: If a method needs θ_t after θ has moved, the batches of a step that was not to
            keep them, or a gradient that :meth:`effect` has used up.

    Example:
        >>> class OneStep(Estimator):
        ...     window = 1
        ...
        ...     def observe(self, step):
        ...         self.kept = step.kept()
        ...
        ...     def hypergradient(self, validation):
        ...         adjoint = {"theta": [g.unsqueeze(0) for g in validation.tensors()]}
        ...         return estimators.Estimate([t[0] for t in self.kept.vjp_(adjoint)])
        >>> train(OneStep())
    """

    space: Space
    point: OptimizerStep
    moments: list[tuple[Moment, float]]
    batches: Batches | None = None
    through_optimizer: bool = True
    is_shared: bool = False

    @property
    def lr(self) -> float:
        """The learning rate in force at this step, of the first parameter group."""
        return self.point.lr

    # ------------------------------------------------------------------------------------ tangents

    def jvp_(self, tangents: Tangents) -> None:
        r"""Moves tangents along with the step, in place; before θ has moved.

            ġ = H y + B e,   ĝ̇ = C ġ,   ṡ' = ∂Φ/∂s ṡ + ∂Φ/∂g ĝ̇ + ∂Φ/∂λ e

        for every scalar λ, e its unit vector, C the derivative of clipping (online-HPO paper, eq.
        7, with the user's optimizer in the place of plain gradient descent). Costs one product with
        the Hessian per scalar λ.

        Args:
            tangents: What ``space.tangents()`` has made.
        """
        self._check_in_place()
        assert self.batches is not None
        tangents.begin_step()
        for units, gradient, weights in self.batches.late(tangents):
            self._advance(tangents, units, gradient, weights)
            del gradient  # before the next is formed
        for name, i, derivative in self._option_derivatives():
            rates = tangents.unit[name].reshape(tangents.count, -1)[:, i]
            add_to_tangent_(tangents.state, derivative, rates)
        for scores, derivative in self._chosen_options():
            parts = [
                tangents.unit[name].reshape(tangents.count, -1)
                @ s.flatten().to(tangents.unit[name])
                for name, s in scores.items()
            ]
            add_to_tangent_(tangents.state, derivative, torch.stack(parts).sum(0))
        tangents.end_step()

    def _advance(
        self, tangents: Tangents, units: range, gradient: list[Tensor], weights: Tensor | None
    ) -> None:
        """Carries some tangents through the step; completes and uses up their gradient.

        Args:
            tangents: The tangents.
            units: Which of them.
            gradient: The network's H y + B.
            weights: How many times the step's own gradient is to be subtracted from it; None: not.
        """
        point = self.point
        part = slice(units.start, units.stop)
        if weights is not None:
            # The step's own gradient holds that of the penalties too, which is added again below.
            own = point.gradients if point.unclipped is None else point.unclipped
            pairs = [(t, g) for t, g in zip(gradient, own, strict=True) if g is not None]
            for j, weight in enumerate(weights):
                add_scaled_([t[j] for t, _ in pairs], [g for _, g in pairs], -weight)
        y = [t[part] for t in tangents.state[THETA]]
        self._add_penalty_tangents_(gradient, y, tangents.first, units, weights)
        if point.clipping is not None:
            assert point.unclipped is not None
            point.clipping.product_(point.unclipped, gradient)
        jvp_lean_(self.space.training.dynamics, point, tangents.state, gradient, part)

    def _add_penalty_tangents_(
        self,
        gradient: list[Tensor],
        y: list[Tensor],
        first: dict[str, int],
        units: range,
        weights: Tensor | None,
    ) -> None:
        """Adds λ ∇²R y + ∂λ/∂raw ∇R of the penalties that acted, and ``weights`` times λ ∇R."""
        for name, penalty, which, index in self.space.penalties_in(self.point):
            e = None if name is None else [float(j == first[name]) for j in units]
            penalty.tangent_(
                which,
                [self.point.theta[i] for i in index],
                [y[i] for i in index],
                e,
                [gradient[i] for i in index],
                weights,
            )

    # ------------------------------------------------------------------------------------ adjoints

    def vjp_(
        self,
        adjoint: State,
        statistics: list[Tensor] | None = None,
        *,
        state_part: bool = True,
    ) -> list[Tensor]:
        r"""Pulls m adjoints back through the step, in place, and returns what reaches λ.

            ḡ = Cᵀ (∂Φ/∂g)ᵀ s̄',   s̄ = (∂Φ/∂s)ᵀ s̄' + (H ḡ, 0),   λ̄ = Bᵀ ḡ + (∂Φ/∂λ)ᵀ s̄'

        (Reverse-HG of Franceschi et al. 2017, Algorithm 1, with the user's optimizer and clipping.)
        Costs one product with the Hessian per adjoint, whatever the number of λ. H and B are those
        at θ_t, wherever θ is now.

        Running statistics r' = r'(θ, r, λ) add ∂r'/∂θᵀ r̄' to θ̄ and ∂r'/∂λᵀ r̄' to λ̄.

        Args:
            adjoint: s̄', replaced by s̄.
            statistics: r̄' of this rank (:meth:`ValidationGradient.statistics`, stacked), replaced
                by r̄; None: they are taken as constants.
            state_part: Whether s̄ is wanted; else the adjoint is used up, and H is not needed.

        Returns:
            λ̄: one tensor ``(m, *raw.shape)`` per λ, with respect to raw λ.
        """
        self._check_in_place()
        space = self.space
        m = len(adjoint[THETA][0])
        total = space.zeros(m)
        for name, i, derivative in self._option_derivatives():
            row = total[name].reshape(m, -1)[:, i]
            row += sum_over_shards(pull_back(adjoint, derivative), space.training.sharded).to(row)
        for scores, derivative in self._chosen_options():
            dots = sum_over_shards(pull_back(adjoint, derivative), space.training.sharded)
            for name, score in scores.items():
                total[name] += torch.tensordot(dots.to(score), score, dims=0)
        g_bar = self._pull_gradient(adjoint, state_part=state_part)
        if state_part:
            for tensors in adjoint.values():
                for i in self.point.frozen:
                    tensors[i].zero_()  # as its tangent, from when it leaves the training
        result = adjoint[THETA] if state_part else []
        self._add_products_(g_bar, result, total, self.point, statistics)
        return list(total.values())

    def _pull_gradient(self, adjoint: State, *, state_part: bool) -> list[Tensor]:
        """Returns ḡ, and replaces the adjoint by (∂Φ/∂s)ᵀ s̄' where that is wanted."""
        point = self.point
        assert not state_part or (self.through_optimizer and point.slope is None)
        if not self.through_optimizer:
            return [t.neg_() for t in adjoint[THETA]]
        if point.slope is None:
            dynamics = self.space.training.dynamics
            g_bar = vjp_lean_(dynamics, point, adjoint, state_part=state_part)
        else:
            g_bar = adjoint[THETA]
            torch._foreach_mul_(g_bar, point.slope)
        if point.clipping is not None:
            assert point.unclipped is not None
            point.clipping.product_(point.unclipped, g_bar)
        return g_bar

    def products(
        self,
        u: list[Tensor],
        *,
        here: bool = False,
        theta_part: bool = True,
        lambda_part: bool = True,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns H u and Bᵀ u of the regularized loss of this step's batches.

        The optimizer and clipping play no part.

        Args:
            u: m stacked vectors like θ, ``(m, *p.shape)`` for each parameter p.
            here: Whether H and B are taken at the present θ; else at θ_t.
            theta_part: Whether H u is wanted; else the first list is empty.
            lambda_part: Whether Bᵀ u is wanted; else the second list is empty.

        Returns:
            One tensor ``(m, *p.shape)`` per parameter, and one ``(m, *raw.shape)`` per λ, with
            respect to raw λ.
        """
        if not here:
            self._check_in_place()
        space = self.space
        m = len(u[0])
        total = space.zeros(m) if lambda_part else {}
        result = stacked_zeros(space.theta, m) if theta_part else []
        self._add_products_(u, result, total, None if here else self.point)
        return result, list(total.values())

    def under(self, choices: Mapping[str, int]) -> Step:
        """Returns the step with other choices in its loss.

        Args:
            choices: Their indices, by name; those that are not named stay.
        """
        moments = [
            (replace(moment, choices={**moment.choices, **choices}), weight)
            for moment, weight in self.moments
        ]
        return replace(self, moments=moments)

    def _add_products_(
        self,
        u: list[Tensor],
        result: list[Tensor],
        total: dict[str, Tensor],
        at: OptimizerStep | None,
        statistics: list[Tensor] | None = None,
    ) -> None:
        """Adds H u and Bᵀ u of the batches and of the penalties that acted; may be given none.

        Args:
            u: m stacked vectors like θ.
            result: H u is added to it; empty where it is not wanted.
            total: Bᵀ u is added to it, by the names of the λ that are wanted.
            at: The step at whose θ they are taken; None: at the present θ.
            statistics: The adjoints of the running statistics after the step, replaced by those
                before it; None: zeros.
        """
        training = self.space.training
        if self.space.replays and not self.moments:
            raise RuntimeError(
                "A Step was asked for a product, but its batches were not kept: this estimator "
                "follows tangents (space.tangents()), for which a step is replayed before it is "
                "made. Use either tangents, or adjoints and products"
            )
        bar = training.statistics.zeros(len(u[0])) if statistics is None else statistics
        # Each micro-batch has moved the running statistics that the next one started from.
        for k, (moment, weight) in reversed(list(enumerate(self.moments))):
            carries_on = k > 0 and bool(total) and len(bar) > 0
            with Network(training, moment, list(total), at) as network:
                products, before, lam = network.adjoint(
                    u, [t / weight for t in bar], theta_part=bool(result) or carries_on
                )
            self.space.average_(products, lam.values())
            for t, new in zip(bar, before, strict=bool(before)):
                torch.mul(new, weight, out=t)
            if result:
                torch._foreach_add_(result, products, alpha=weight)
            for name, part in lam.items():
                total[name].add_(part, alpha=weight)
        if statistics and self.moments and training.statistics.is_broadcast:
            collect_(statistics)
        values = training.values() if at is None else at.theta
        dots: dict[str, Tensor] = {}
        for owner, penalty, which, index in self.space.penalties_in(self.point):
            dot = penalty.adjoint_(
                which,
                [values[i] for i in index],
                [u[i] for i in index],
                [result[i] for i in index] if result else None,
            )
            if owner in total:
                dots[owner] = dots[owner] + dot if owner in dots else dot
        if dots:
            complete = sum_over_shards(torch.stack(list(dots.values())), training.sharded)
            for known, part in zip(dots, complete, strict=True):
                total[known] += part.reshape(total[known].shape)

    def _option_derivatives(self) -> Iterator[tuple[str, int, dict[str, dict[int, Tensor]]]]:
        """Yields, for each element of a tuned option of the optimizer, its name and ∂s'/∂λ."""
        names = self.space.options
        if names:
            assert self.space.training.options is not None
            for name, entries in self.space.training.options.derivatives(self.point, names).items():
                for i, derivative in enumerate(entries):
                    yield name, i, derivative

    def _chosen_options(
        self,
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, dict[int, Tensor]]]]:
        r"""Yields, for each option v of the optimizer that was drawn, ∇φ log p_φ and what it did.

        The first by the names of the λ of this space; their product is ∂s'/∂φ in the mean. Where a
        network decides v together with choices a of the loss, B has S = ∇φ log p_φ(a) already,
        times ∂s'/∂g at v. With what is yielded here it is ∂s'/∂g at v̄, so that nothing counts
        twice.
        """
        training = self.space.training
        policy = {n: h for n, h in self.space.hyperparameters.items() if h.is_policy}
        if training.options is None or not policy:
            return

        def score(asked: list[str], sign: float = 1.0) -> dict[str, Tensor]:
            found = training.choices.score(list(policy.values()), self.point.choices, asked)
            return {name: sign * s for name, s in zip(policy, found, strict=True)}

        for name in training.options.choices:
            if name not in self.point.choices:
                continue
            baseline = training.choices.mean(name)
            together = training.choices.decided_with(name, self.point.asked)
            yield (
                score([*together, name]),
                training.options.displacement(self.point, name, baseline),
            )
            if together:
                along = self._loss_gradient()
                change = training.options.displacement(self.point, name, baseline, along)
                yield score(together, -1.0), change

    def _loss_gradient(self) -> list[Tensor]:
        """Returns C ∇L_T, the part of ĝ that comes from the loss alone; C linearizes clipping."""
        point = self.point
        whole = point.gradients if point.unclipped is None else point.unclipped
        pairs = zip(whole, point.theta, strict=True)
        result = [torch.zeros_like(p) if g is None else -g for g, p in pairs]
        for penalty, which, index in self.space.training.penalties_in(point):
            own = [result[i] for i in index]
            penalty.add_gradient_(which, own, [point.theta[i] for i in index])
        torch._foreach_neg_(result)
        if point.clipping is not None:
            point.clipping.product_(whole, [t.unsqueeze(0) for t in result])
        return result

    # ---------------------------------------------------------------------------- after the step

    def effect(self, *, through_optimizer: bool = True) -> Effect | None:
        """Returns ∂θ_{t+1}/∂λ of this step alone, where it is sparse; see :class:`Effect`.

        None where some λ acts inside the loss or in Φ, or Φ mixes elements. Else the step is used
        up: where clipping by norm acts, its gradient becomes a part of the effect.

        Args:
            through_optimizer: Whether the gradient passes through Φ; without, −1 stands for it.
        """
        self._check_in_place()
        space = self.space
        is_diagonal = space.training.dynamics.is_elementwise or not through_optimizer
        if space.in_loss or space.options or not is_diagonal:
            return None
        return Effect(
            space, self.point, through_optimizer=through_optimizer, is_shared=self.is_shared
        )

    def kept(
        self, *, is_first: bool = False, rebuilds: bool = False, through_optimizer: bool = True
    ) -> Step:
        r"""Returns the step for use after θ has moved: a copy of θ, and of what Φ' depends on.

        Args:
            is_first: Whether only ḡ and λ̄ will be asked for, since before this step θ does not
                depend on λ. ∂Φ/∂g then takes the place of the gradient and the state.
            rebuilds: Whether steps after this one are :meth:`thinned`, and will be :meth:`remade`.
            through_optimizer: See the attribute.
        """
        self._check_in_place()
        dynamics = self.space.training.dynamics
        point = self.point
        if not through_optimizer:
            point = replace(point.kept(values=False), clipping=None, unclipped=None)
        elif (
            is_first
            and dynamics.nonlinear
            and dynamics.is_elementwise
            and not (self.space.options or rebuilds)
        ):
            point = self._with_slope()
        else:
            values = dynamics.nonlinear or rebuilds or bool(self.space.options)
            point = point.kept(values=values)
        return self._after(point, through_optimizer)

    def _check_in_place(self) -> None:
        """Refuses to use a step of which something is no longer there.

        Raises:
            RuntimeError: If θ has moved, and the step has not been kept; or if :meth:`effect` has
                used up its gradient.
        """
        if self.point.clipping is not None and self.point.unclipped is None:
            raise RuntimeError(
                "A Step was used after its effect() had been taken, which uses it up where "
                "clipping by norm acts. Take the effect last, or use jvp_ or kept() in its place"
            )
        if self.batches is not None and not self.batches.is_open:
            raise RuntimeError(
                "A Step was used at θ_t after the optimizer had moved θ. Use it inside observe(), "
                "keep step.kept() instead of it, or ask for step.products(u, here=True)"
            )

    def thinned(self) -> Step:
        """Returns the step without its tensors, to be made again from one before it."""
        marks = [None if g is None else g.new_empty(0) for g in self.point.gradients]
        point = replace(self.point, theta=[], gradients=marks, state=[], own={}, unclipped=None)
        return self._after(point)

    @property
    def is_thinned(self) -> bool:
        """Whether θ has been left out."""
        return not self.point.theta

    def remade(self, before: Step) -> Step:
        """Makes a thinned step again from the complete one before it; costs a gradient.

        The gradient is taken again with the same batches and random draws, and gets the penalties
        and the clipping; θ and the state are those to which the optimizer's own formula leads.

        Args:
            before: The step that led to this one, which has its θ.
        """
        training = self.space.training
        after = GenericDynamics(training.dynamics.optimizer).advance(before.point)
        gradients = self._regularized_gradient(after.theta)
        unclipped = None
        if self.point.clipping is not None:
            unclipped = [None if g is None else g.clone() for g in gradients]
            self.point.clipping.clip_(gradients)
        point = replace(
            self.point,
            theta=after.theta,
            state=after.state,
            own=after.own,
            gradients=gradients,
            unclipped=unclipped,
        )
        return replace(self, point=point)

    def _regularized_gradient(self, theta: list[Tensor]) -> list[Tensor | None]:
        """Returns g at θ, before clipping."""
        training = self.space.training
        active = [i for i, g in enumerate(self.point.gradients) if g is not None]
        own = [training.theta[i] for i in active]
        result: list[Tensor | None] = [None] * len(theta)
        for i in active:
            result[i] = torch.zeros_like(theta[i])
        total = [g for g in result if g is not None]
        with in_place(training.theta, theta, active):
            for moment, weight in self.moments:
                parts = training.objective.gradient(moment, own)
                for part, whole in zip(parts or (), total, strict=bool(parts)):
                    if part is not None:
                        whole.add_(part, alpha=weight)
        self.space.average_(total)
        for penalty, which, index in training.penalties_in(self.point):
            own = [total[active.index(i)] for i in index]
            penalty.add_gradient_(which, own, [theta[i] for i in index])
        return result

    def _after(self, point: OptimizerStep, through_optimizer: bool = True) -> Step:
        return Step(self.space, point, list(self.moments), None, through_optimizer)

    def _with_slope(self) -> OptimizerStep:
        """Keeps ∂Φ/∂g in the place of g and the state, where adjoints need nothing else."""
        point = self.point
        slope = [t.new_ones((1, *t.shape)) for t in point.theta]  # contiguous
        multiply_by_slope_(self.space.training.dynamics, point, [rows(t) for t in slope])
        kept = replace(point.kept(values=False), slope=slope)
        if point.clipping is not None and point.clipping.by_value:
            kept = replace(kept, clipping=None, unclipped=None)  # it is part of the slope
        return kept

    def pack(self) -> dict[str, Any] | None:
        """Returns a kept step as tensors, numbers and containers, for a checkpoint.

        None where a batch is no container of tensors and numbers.
        """
        objective = self.space.training.objective
        moments = [(objective.pack(moment), weight) for moment, weight in self.moments]
        point = {**vars(self.point), "clipping": None}
        if self.point.clipping is not None:
            point["clipping"] = vars(self.point.clipping)
        if not is_plain(point) or any(moment is None for moment, _ in moments):
            return None
        return {"moments": moments, "point": point, "through_optimizer": self.through_optimizer}

    @classmethod
    def unpack(cls, space: Space, packed: dict[str, Any]) -> Step:
        """Reads what :meth:`pack` returned, onto the device of the training.

        Args:
            space: That of the resumed training.
            packed: What was saved.
        """
        objective = space.training.objective
        point = move_data_to_device(packed["point"], space.theta[0].device)
        if point["clipping"] is not None:
            point["clipping"] = GradientClipping(**point["clipping"])
        return cls(
            space,
            OptimizerStep(**point),
            [(objective.unpack(moment), weight) for moment, weight in packed["moments"]],
            through_optimizer=packed["through_optimizer"],
        )
