"""The contract of an estimator, and the problem that it is given."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_hpo._tensors import filled, holding, separate, stacked_zeros, widened
from lightning_hpo.derivatives import (
    GradientGraph,
    Loss,
    is_missing_derivative,
    joint_hvp,
    one_sided_differences,
)
from lightning_hpo.distributed import average_, local, sum_over_shards, world_size
from lightning_hpo.dynamics import (
    Dynamics,
    OptimizerOptions,
    OptimizerStep,
    State,
    add_to_tangent_,
    pull_back,
)
from lightning_hpo.hyperparameters import Hyperparameter
from lightning_hpo.objectives import Moment, TrainingObjective, ValidationObjective
from lightning_hpo.regularizers import Penalty

Products = tuple[list[Tensor], list[Tensor]]
"""The θ part and the λ part of a product, each entry stacked over m directions."""


@dataclass
class Problem:
    """What an estimator differentiates: the training loss, the penalties and the optimizer.

    Where parameters are sharded (``fully_shard``), all that is shaped like θ is a local slice, and
    gradients of a loss over θ come averaged over the ranks.

    Attributes:
        objective: L_T without the penalties that act in the gradient.
        hyperparameters: λ, by name; the order of every list of λ-shaped tensors.
        penalties: The penalties that act in the gradient.
        dynamics: The optimizer's step.
        derivatives: ``"auto"`` or the name of a backend of :func:`joint_hvp`.
        options: The optimizer's own options that are tuned; None where there are none.
        in_loss: The names of the λ that the training loss itself depends on.
        reuses_gradient: Whether the gradient of the real step has been seen to be that of a replay.
        sharded: Whether the parameters are sharded.
        replays_at_once: Whether a step that is replayed before it happens must be so at its batch:
            gradients are accumulated, or hooks may change what it depends on before it happens.
    """

    objective: TrainingObjective
    hyperparameters: dict[str, Hyperparameter]
    penalties: list[Penalty]
    dynamics: Dynamics
    derivatives: str
    options: OptimizerOptions | None = None
    in_loss: set[str] = field(default_factory=set)
    reuses_gradient: bool = False
    sharded: bool = False
    replays_at_once: bool = False
    _compared: bool = field(default=False, init=False)
    _is_agreed: bool = field(default=True, init=False)
    _is_automatic: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._is_automatic = self.derivatives == "auto"

    @property
    def theta(self) -> list[Tensor]:
        """The parameters that the optimizer moves."""
        return self.dynamics.theta

    @property
    def count(self) -> int:
        """The number m of scalar hyperparameters."""
        return sum(h.raw.numel() for h in self.hyperparameters.values())

    def unit_directions(self) -> list[Tensor]:
        """Returns the m unit vectors of λ space, one tensor ``(m, *raw.shape)`` per λ, on the CPU.

        There it can be seen which entries are zero without waiting for a device.
        """
        directions = []
        start = 0
        for h in self.hyperparameters.values():
            n = h.raw.numel()
            e = torch.zeros((self.count, n), dtype=h.raw.dtype, device="cpu")
            e[start : start + n] = torch.eye(n, dtype=e.dtype, device="cpu")
            directions.append(e.reshape(self.count, *h.raw.shape))
            start += n
        return directions

    def from_stack(self, stack: Tensor) -> list[Tensor]:
        """Splits m numbers, one per scalar hyperparameter, into tensors shaped like raw λ."""
        sizes = [h.raw.numel() for h in self.hyperparameters.values()]
        return [
            part.reshape(h.raw.shape)
            for part, h in zip(stack.split(sizes), self.hyperparameters.values(), strict=True)
        ]

    def zeros(self, m: int, *, theta_part: bool = True, lambda_part: bool = True) -> Products:
        """Returns m zero products, in float32 or better; an unwanted part is empty."""
        raws = [h.raw for h in self.hyperparameters.values()]
        return (
            stacked_zeros(self.theta, m) if theta_part else [],
            stacked_zeros(raws, m) if lambda_part else [],
        )

    @contextmanager
    def network(self, moment: Moment, step: OptimizerStep | None = None) -> Iterator[Network]:
        """Gives products with the joint Hessian of the loss of one micro-batch.

        Within the context further directions spare the replay, where the backend allows it.

        Args:
            moment: The micro-batch.
            step: The step whose values of θ to differentiate at, over the parameters that took part
                in it; they may change by rounding. Default: the values in place, over those that
                require grad.
        """
        with ExitStack() as stack:
            yield Network(self, moment, step, stack)

    def network_hvp(
        self,
        moment: Moment,
        u: list[Tensor] | None,
        e: list[Tensor] | None,
        *,
        step: OptimizerStep | None = None,
        theta_part: bool = True,
        lambda_part: bool = True,
    ) -> Products:
        """Makes one product; see :meth:`network` and :meth:`Network.hvp`."""
        with self.network(moment, step) as network:
            return network.hvp(u, e, theta_part=theta_part, lambda_part=lambda_part)

    def average_(self, theta: Sequence[Tensor | None], lam: Sequence[Tensor] = ()) -> None:
        """Averages parts of a gradient over the ranks, in place.

        Those over sharded θ come averaged.
        """
        average_([*([] if self.sharded else [t for t in theta if t is not None]), *lam])

    @property
    def is_one_sided(self) -> bool:
        """Whether one-sided differences may take the place of central ones now."""
        return (
            self.reuses_gradient
            and self._is_agreed
            and not self.replays_at_once
            and self.derivatives == "finite_difference"
            and not self.sharded
            and self.objective.rounding is None  # √ε would be far too wide
            and self._dtypes() in ({torch.float32}, {torch.float64})
            and all(step is None for step in self._difference_steps())
        )

    def _dtypes(self) -> set[torch.dtype]:
        raws = [h.raw for n, h in self.hyperparameters.items() if n in self.in_loss]
        return {t.dtype for t in (*self.theta, *raws)}

    def _active(self, step: OptimizerStep | None) -> list[int]:
        """Lists the parameters that took part in a step, or that require grad now."""
        if step is None:
            return [i for i, p in enumerate(self.theta) if p.requires_grad]
        return [i for i, g in enumerate(step.gradients) if g is not None]

    def _in_loss(self) -> list[int]:
        """Lists the λ that the training loss itself depends on."""
        return [i for i, name in enumerate(self.hyperparameters) if name in self.in_loss]

    def _reach(self) -> list[Tensor]:
        """How far differences may move raw λ: until the value has changed by about a tenth."""
        result = []
        for name, h in self.hyperparameters.items():
            if name in self.in_loss:
                value, rate = h.constraint.derivatives(h.raw.detach())
                distance = 0.1 * (value / rate).abs()
                is_known = torch.isfinite(distance) & (distance > 0)
                result.append(torch.where(is_known, distance, math.inf))
        return result

    def _difference_steps(self) -> list[float | None]:
        return [h.difference_step for n, h in self.hyperparameters.items() if n in self.in_loss]

    @contextmanager
    def _loss(
        self, moment: Moment, active: list[int], step: OptimizerStep | None, *, exact: bool
    ) -> Iterator[tuple[Loss, list[Tensor], list[Tensor]]]:
        """Gives the loss of a micro-batch as a function of the active θ and of the λ in it."""
        theta = [self.theta[i] for i in active]
        leaves = self.objective.leaves()
        in_loss = self._in_loss()
        with (
            in_place(self.theta, None if step is None else step.theta, active),
            self.objective.at(moment, theta, exact=exact) as at,
        ):

            def loss(th: Sequence[Tensor], lam: Sequence[Tensor]) -> Tensor | None:
                every = list(leaves)
                for i, value in zip(in_loss, lam, strict=True):
                    every[i] = value
                return at(th, every)

            yield loss, theta, [leaves[i] for i in in_loss]

    def settle(self, moment: Moment, gradients: list[Tensor | None] | None = None) -> None:
        """Settles what ``auto`` stands for, as far as that is known before the first product.

        Args:
            moment: A micro-batch, at the present θ.
            gradients: Its gradient, one per parameter, on the kernels of the training. Default:
                taken here, where it is needed.
        """
        if self.sharded and self.derivatives == "auto":
            self._fall_back("the parameters are sharded")
        if self.derivatives != "finite_difference" and not self._compared:
            self._compare_kernels(moment, gradients)

    def _settled(self, multiply: Callable[[str], Products]) -> Products:
        """Calls ``multiply(backend)``; settles at the first call what ``auto`` stands for.

        All ranks agree then. Later, an operator that a rank has not met before makes that rank fall
        back by itself: its products are as good as theirs, but no parts of them can be shared.
        """
        is_first = self.derivatives == "auto"
        backend = "reverse" if is_first else self.derivatives
        reason = ""
        try:
            result = multiply(backend)
        except RuntimeError as error:
            if not is_missing_derivative(error):
                raise
            if not self._is_automatic:
                raise RuntimeError(
                    f"OnlineHPOCallback(derivatives={backend!r}): an operator of this model lacks "
                    f"the derivative that this backend needs ({error}). Use derivatives='auto' or "
                    "'finite_difference'"
                ) from error
            reason = f"an operator of this model has no double backward: {error}"
        if is_first and world_size() > 1:
            fallen = torch.tensor(float(bool(reason)), device=self.theta[0].device)
            average_([fallen])
            if fallen > 0:
                reason = reason or "an operator of this model has no double backward"
        elif reason:
            self._is_agreed = world_size() == 1
        if reason:
            self._fall_back(reason)
            return multiply(self.derivatives)
        self.derivatives = backend
        return result

    def _fall_back(self, reason: str) -> None:
        warnings.warn(
            f"OnlineHPOCallback(derivatives='auto') uses finite differences, because {reason}",
            stacklevel=2,
        )
        self.derivatives = "finite_difference"

    def _compare_kernels(self, moment: Moment, gradients: list[Tensor | None] | None) -> None:
        """Sees whether the kernels that exact backends need give the gradient of the training.

        They do not where they draw other random numbers: inductor's dropout is not that of eager
        mode. ``auto`` then takes finite differences, which run on the kernels of the training.
        """
        theta = self.theta
        none: list[Tensor | None] = [None] * len(theta)
        if gradients is None:
            gradients = self.objective.gradient(moment, theta) or none
        first = filled(gradients, theta)
        second = filled(self.objective.gradient(moment, theta, exact=True) or none, theta)
        parts = [
            torch.stack([(a - b).norm(), b.norm()]).double()
            for a, b in zip(second, first, strict=True)
        ]
        norms = torch.stack(parts).norm(dim=0)
        average_([norms])  # all ranks must come to the same decision
        difference, scale = norms.tolist()
        self._compared = scale > 0
        if not difference > 0.05 * scale:
            return
        reason = (
            "eager mode and the kernels that have second derivatives give another gradient "
            f"({difference / scale:.0%} apart) than the training's own: they draw other random "
            "numbers"
        )
        remedy = "with torch.compile, torch._inductor.config.fallback_random = True avoids that"
        if self.derivatives == "auto":
            self._fall_back(f"{reason}; {remedy}")
        else:
            warnings.warn(
                f"OnlineHPOCallback(derivatives={self.derivatives!r}): {reason}, so that "
                "hypergradients belong to other noise and dropout masks than the step. Use "
                f"derivatives='auto' or 'finite_difference'; {remedy}",
                stacklevel=2,
            )

    def add_penalty_hvp_(
        self,
        products: Products,
        step: OptimizerStep,
        u: list[Tensor] | None,
        *,
        units: range | None = None,
        gradient_weights: Tensor | None = None,
    ) -> None:
        """Adds the products of the penalties that act in the gradient; no pass over the network.

        A weight without a gradient in this step gets no penalty in it either.

        Args:
            products: Both parts, added to in place; an empty part is not wanted.
            step: The step in which the penalties acted, with θ as it was then.
            u: Directions in θ, or None for zeros.
            units: Which unit vectors of λ space the directions are; None: they are zero there.
            gradient_weights: ``(m,)``: how many times the gradient of the penalties is added
                besides, in each direction; None: not at all.
        """
        theta_result, lam_result = products
        totals: list[tuple[int, Tensor]] = []
        lam_index = {id(h): i for i, h in enumerate(self.hyperparameters.values())}
        sizes = [h.raw.numel() for h in self.hyperparameters.values()]
        for penalty, which, index in self.penalties_in(step):
            k = lam_index.get(id(penalty.hyperparameter))  # None: it is frozen
            own = [step.theta[i] for i in index]
            into = [theta_result[i] for i in index] if theta_result else None
            along = None if u is None else [u[i] for i in index]
            if lam_result and k is not None:
                assert along is not None
                totals.append((k, penalty.adjoint_(which, own, along, into)))
            elif into is not None:
                e = None
                if units is not None and k is not None:
                    e = [float(j == sum(sizes[:k])) for j in units]
                penalty.tangent_(which, own, along, e, into, gradient_weights)
        if totals:
            complete = sum_over_shards(torch.stack([part for _, part in totals]), self.sharded)
            for (k, _), part in zip(totals, complete, strict=True):
                lam_result[k] += part.reshape(lam_result[k].shape)

    def penalties_in(
        self, step: OptimizerStep
    ) -> Iterator[tuple[Penalty, tuple[int, ...], tuple[int, ...]]]:
        """Yields the penalties that acted in a step, on which of their weights, and where in θ."""
        yield from self._acting(step.gradients)

    def _acting(
        self, gradients: Sequence[Tensor | None]
    ) -> Iterator[tuple[Penalty, tuple[int, ...], tuple[int, ...]]]:
        positions = {id(p): i for i, p in enumerate(self.theta)}
        for penalty in self.penalties:
            pairs = [
                (k, i)
                for k, w in enumerate(penalty.weights)
                if (i := positions.get(id(w))) is not None and gradients[i] is not None
            ]
            if pairs:
                which, index = zip(*pairs, strict=True)
                yield penalty, which, index

    def add_penalty_gradients_(
        self, gradients: list[Tensor | None], theta: list[Tensor] | None = None
    ) -> None:
        """Adds λ ∇R(w) of the penalties that act in the gradient, where there is a gradient.

        Args:
            gradients: One per parameter, added to in place.
            theta: Values of θ. Default: those in place.
        """
        values = [local(p.detach()) for p in self.theta] if theta is None else theta
        for penalty, which, index in self._acting(gradients):
            into = [g for i in index if (g := gradients[i]) is not None]
            penalty.add_gradient_(which, into, [values[i] for i in index])

    def refuse_options(self, estimator: str, reason: str) -> None:
        """Refuses to tune the optimizer's options with an estimator that cannot see them.

        Raises:
            MisconfigurationException: If any is to be tuned.
        """
        if self.options is not None:
            raise MisconfigurationException(
                f"{estimator} cannot tune {list(self.options.hyperparameters)}: {reason}. Use "
                "T1T2(), UnrollK or ClipR"
            )

    def add_option_tangents_(self, step: OptimizerStep, tangent: State, e: list[Tensor]) -> None:
        """Adds ∂Φ/∂λ λ̇ of the tuned optimizer options to tangents that have passed the step."""
        for k, i, derivative in self._option_derivatives(step):
            add_to_tangent_(tangent, derivative, e[k].reshape(self.count, -1)[:, i])

    def add_option_adjoints_(
        self, step: OptimizerStep, adjoint: State, lam_result: list[Tensor]
    ) -> None:
        """Adds (∂Φ/∂λ)ᵀ s̄' of the tuned optimizer options, for adjoints that are yet to pass."""
        for k, i, derivative in self._option_derivatives(step):
            row = lam_result[k].reshape(len(lam_result[k]), -1)[:, i]
            row += sum_over_shards(pull_back(adjoint, derivative), self.sharded).to(row)

    def _option_derivatives(
        self, step: OptimizerStep
    ) -> Iterator[tuple[int, int, dict[str, dict[int, Tensor]]]]:
        """Yields the position of λ, the element, and ∂s'/∂λ."""
        if self.options is not None:
            names = list(self.hyperparameters)
            for name, entries in self.options.derivatives(step).items():
                for i, derivative in enumerate(entries):
                    yield names.index(name), i, derivative


class ValidationGradient:
    """g_V = ∇θ L_V on one held-out batch, taken when it is asked for.

    Args:
        problem: The problem.
        objective: L_V.
        batch: The batch, on the device.
        batch_idx: Its index.
    """

    def __init__(
        self, problem: Problem, objective: ValidationObjective, batch: Any, batch_idx: int
    ) -> None:
        self._problem = problem
        self._objective = objective
        self._batch = batch
        self._batch_idx = batch_idx

    def tensors(self) -> list[Tensor]:
        """Returns g_V, averaged over the ranks; zeros where L_V does not depend on a parameter.

        One tensor per parameter, in float32 or better, which may be used as work space.
        """
        theta = self._problem.theta
        gradients = self._objective.gradient(self._batch, self._batch_idx, theta)
        result = separate([widened(g) for g in filled(gradients, theta)])
        self._problem.average_(result)
        return result

    def products(self, stacks: Sequence[Tensor | None]) -> list[Tensor]:
        """Returns ⟨g_V, y⟩ for each parameter, averaged over the ranks.

        Each part of g_V is freed once it has been multiplied: the whole never exists.

        Args:
            stacks: Directions y, ``(m, *p.shape)`` for each parameter p, the same on all ranks;
                None where none is wanted. m may differ between parameters.

        Returns:
            One tensor ``(m,)`` for each parameter, ``(0,)`` where there is no direction.
        """
        problem = self._problem
        found = self._objective.gradient_products(
            self._batch, self._batch_idx, problem.theta, stacks
        )
        sizes = [0 if y is None else len(y) for y in stacks]
        parts = [
            torch.zeros(size, device=p.device) if dots is None else dots
            for dots, size, p in zip(found, sizes, problem.theta, strict=True)
        ]
        total = sum_over_shards(torch.cat(parts), problem.sharded)
        if not problem.sharded:
            average_([total])
        return list(total.split(sizes))


class Network:
    """Products with the joint Hessian of the loss of one micro-batch; see :meth:`Problem.network`.

    Args:
        problem: The problem.
        moment: The micro-batch.
        step: The step whose values of θ to differentiate at, which may change by rounding; None:
            those in place.
        stack: Holds what an evaluation of the loss needs, for as long as there are products.
    """

    def __init__(
        self, problem: Problem, moment: Moment, step: OptimizerStep | None, stack: ExitStack
    ) -> None:
        self._problem = problem
        self._moment = moment
        self._step = step
        self._stack = stack
        self._active = problem._active(step)
        self._in_loss = problem._in_loss()
        self._is_exact: bool | None = None

    def _open(self, *, exact: bool) -> tuple[Loss, list[Tensor], list[Tensor]]:
        """Returns the loss and what it depends on, on kernels that have the derivatives needed."""
        if self._is_exact is not exact:
            self._close()
            self._opened = self._stack.enter_context(
                self._problem._loss(self._moment, self._active, self._step, exact=exact)
            )
            self._graph = GradientGraph()
            self._is_exact = exact
        return self._opened

    def _close(self) -> None:
        """Puts the module back as it was before the replay."""
        self._stack.close()
        self._is_exact = None

    def hvp(
        self,
        u: list[Tensor] | None,
        e: list[Tensor] | None,
        *,
        theta_part: bool = True,
        lambda_part: bool = True,
        sync: bool = True,
        is_last: bool = True,
    ) -> Products:
        """Multiplies with m directions.

        Args:
            u: Directions in θ, ``(m, *p.shape)`` each, or None for zeros.
            e: Directions in raw λ, or None for zeros.
            theta_part: Whether H u + B e is wanted.
            lambda_part: Whether Bᵀ u + C e is wanted.
            sync: Whether to average over the ranks; with False each has the product of its own
                micro-batch. (With sharded parameters the θ part is always the average.)
            is_last: Whether no product follows within the context. Those before it must have had
                the same kinds of directions.

        Returns:
            Both parts, over all θ and all λ, zeros included; an unwanted part is empty.
        """
        problem = self._problem
        m = (u or e or [])[0].shape[0]
        e = [e[i] for i in self._in_loss] if e is not None and self._in_loss else None
        u = [u[i] for i in self._active] if u is not None and self._active else None
        wants_lambda = lambda_part and bool(self._in_loss)
        products: Products = ([], [])
        if (u is not None or e is not None) and (theta_part or wants_lambda):

            def multiply(backend: str) -> Products:
                exact = backend != "finite_difference"
                loss, theta, lam = self._open(exact=exact)
                self._graph.is_kept = not is_last
                return joint_hvp(
                    loss,
                    theta,
                    lam,
                    u,
                    e,
                    backend=backend,
                    theta_part=theta_part,
                    lambda_part=wants_lambda,
                    difference_steps=problem._difference_steps(),
                    rounding=problem.objective.rounding,
                    reach=problem._reach() if not exact else None,
                    graph=self._graph,
                    theta_is_scratch=self._step is not None,
                )

            if self._is_exact is None:
                problem.settle(self._moment)
            products = problem._settled(multiply)
            if is_last or problem.derivatives != "reverse":
                self._close()
        raws = [h.raw for h in problem.hyperparameters.values()]
        split = len(products[0])
        separated = separate([*products[0], *products[1]], [*(u or ()), *(e or ())])
        theta_result, lam_result = [], []
        if theta_part:
            theta_result = _spread(separated[:split], self._active, problem.theta, m)
        if lambda_part:
            lam_result = _spread(separated[split:], self._in_loss, raws, m)
        if (scale := problem.objective.scale) != 1:
            torch._foreach_div_([*theta_result, *lam_result], scale)
        if sync:
            problem.average_(theta_result, lam_result)
        return theta_result, lam_result

    def one_sided(
        self, u: list[Tensor], e: list[Tensor], u_norms: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Returns the displaced gradients of one-sided differences; half the price of central ones.

        H u + B e is what is left when the weights times the gradient itself, which the training
        computes anyway, have been subtracted. B e comes from central differences all the same: a λ
        inside the loss often does little, and would be lost to rounding.

        Args:
            u: Directions in θ, ``(m, *p.shape)`` each.
            e: Directions in raw λ.
            u_norms: ‖u‖ of each direction ``(m,)``.

        Returns:
            One tensor ``(m, *p.shape)`` per parameter, of this rank alone; and the weights
            ``(m,)``, the same for all micro-batches of a step, and on all ranks where u is.
        """
        problem = self._problem
        loss, theta, lam = self._open(exact=False)
        products, weights = one_sided_differences(
            loss, theta, lam, [u[i] for i in self._active], u_norms
        )
        self._close()
        result = _spread(products, self._active, problem.theta, len(weights))
        if problem.in_loss:
            torch._foreach_add_(result, self.hvp(None, e, lambda_part=False, sync=False)[0])
        return result, weights


def _spread(
    products: list[Tensor], positions: list[int], like: Sequence[Tensor], m: int
) -> list[Tensor]:
    """Puts products at their positions in a list over all tensors, and zeros elsewhere.

    All are in float32 or better.
    """
    found = dict(zip(positions, products, strict=bool(products)))
    return [
        found[i].detach().to(torch.promote_types(t.dtype, torch.float32))
        if i in found
        else stacked_zeros([t], m)[0]
        for i, t in enumerate(like)
    ]


@contextmanager
def in_place(
    parameters: list[Tensor], values: list[Tensor] | None, active: Sequence[int]
) -> Iterator[None]:
    """Lets parameters hold the values of another step for a while.

    The parameters themselves stay in the module. Meanwhile the active ones require grad, also if
    they have been frozen since.

    Args:
        parameters: All of θ.
        values: What they hold; None: what they hold anyway.
        active: The positions of those that are differentiated.
    """
    if values is None:
        yield
        return
    before = [p.requires_grad for p in parameters]
    with holding(parameters, values):
        try:
            for i in active:
                parameters[i].requires_grad_()
            yield
        finally:
            for p, requires_grad in zip(parameters, before, strict=True):
                p.requires_grad_(requires_grad)


class Estimator(ABC):
    """Estimates dL_V/dλ, the total derivative along the training as far back as it can see.

    The callback calls, for every optimizer step that the estimator observes,
    :meth:`before_batch` once per micro-batch (θ_t in place), :meth:`before_step` when the gradient
    is final (θ_t still in place), and, where an update is due, :meth:`hypergradient` after θ has
    moved to θ_{t+1}. :meth:`discard` ends a step that did not happen.
    """

    horizon: int = 1
    """Steps between λ updates unless ``every_n_steps`` says otherwise."""

    window: int | None = None
    """How many steps before an update the estimator observes; None: every ``stride``-th step."""

    stride: int = 1
    """Which steps an estimator without a window observes."""

    outcome: str | None = None
    """How the last estimate ended, where that can fail; kept in the history."""

    def setup(self, problem: Problem) -> None:
        """Starts a training; forgets everything about an earlier one."""
        self.problem = problem

    @abstractmethod
    def before_batch(self, moment: Moment, weight: float) -> None:
        """Sees a micro-batch before it is trained on.

        Args:
            moment: The micro-batch.
            weight: The factor of its loss: 1 over the number of accumulated batches.
        """

    @abstractmethod
    def before_step(self, step: OptimizerStep) -> None:
        """Sees the final gradient before θ moves."""

    @abstractmethod
    def hypergradient(self, validation: ValidationGradient) -> list[Tensor] | None:
        """Returns the estimate of dL_V/dλ and starts the next window.

        Args:
            validation: ∇θ L_V at θ_{t+1}; not yet taken.

        Returns:
            One tensor per hyperparameter, with respect to raw λ and shaped like it; None where the
            window is incomplete, so that λ is left alone.
        """

    @property
    def kind(self) -> str:
        """What a checkpoint is compared by: its state fits only an estimator of the same kind."""
        return type(self).__name__

    @property
    def replay(self) -> Literal["never", "before_step", "after_step"]:
        """When ``training_step`` is replayed; :meth:`before_batch` is called unless it never is.

        A replay before the step may come as late as in :meth:`before_step`, unless
        ``problem.replays_at_once``: then it must be in :meth:`before_batch`.
        """
        return "after_step"

    def discard(self) -> None:  # noqa: B027 - most estimators have nothing to forget
        """Forgets the micro-batches of a step that did not happen (a gradient overflow)."""

    def release(self) -> None:
        """Lets go of the training: only the constructor's arguments and the outcome stay."""
        for name in ("problem", "_window", "_effect", "_mechanism", "_tangents"):
            vars(self).pop(name, None)
        for name in ("_moments", "_step"):
            vars(self).pop(name, None)

    def after_update(self) -> None:  # noqa: B027
        """Follows the λ update, or the end of an incomplete window."""

    def tangent_norms(self) -> list[Tensor] | None:
        """Returns ‖dθ/dλ‖ per scalar λ, shaped like raw λ; None for a reverse-mode estimator."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that a resumed training needs: tensors, numbers, lists and dicts."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restores what :meth:`state_dict` returned, after :meth:`setup`."""
