"""Products with the Hessian of the loss of one micro-batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property

import torch
from torch import Tensor

from lightning_hpo._tensors import holding, separate, stacked_zeros
from lightning_hpo.derivatives import Backend, FiniteDifference, Loss
from lightning_hpo.dynamics import OptimizerStep
from lightning_hpo.objectives import Moment
from lightning_hpo.step.backends import Result, make_backend, with_fallback
from lightning_hpo.step.training_map import TrainingMap


class Network:
    r"""Products with H and B of the loss of one micro-batch, on this rank alone.

    The running statistics r, which the micro-batch moves to r'(θ, r, λ), are carried along. With
    q(θ, r, c, λ) = L_T(θ, r, λ) + ⟨c, r'(θ, r, λ)⟩ both products are parts of one with the Hessian
    of q, at c = 0, over θ, r and c together (:meth:`TrainingObjective.at`):

        tangent: (y, ṙ, 0), e → (H y + B e + ∂²L/∂θ∂r ṙ, ·, ∂r'/∂θ y + ∂r'/∂r ṙ + ∂r'/∂λ e)
        adjoint: (u, 0, w) → (H u + ∂r'/∂θᵀ w, ∂²L/∂r∂θ u + ∂r'/∂rᵀ w, ·), Bᵀ u + ∂r'/∂λᵀ w

    A context: within it further directions share the replay, where the backend allows it. λ that
    the loss does not depend on play no part.

    Args:
        training: What all steps of the training share.
        moment: The micro-batch.
        names: The λ that products are wanted of.
        at: The step whose values of θ to differentiate at, over the parameters that took part in
            it; they may change by rounding. None: the values in place, over those that require
            grad.
    """

    def __init__(
        self,
        training: TrainingMap,
        moment: Moment,
        names: Sequence[str],
        at: OptimizerStep | None = None,
    ) -> None:
        self._training = training
        self._moment = moment
        self._names = [name for name in names if name in training.in_loss]
        self._at = at
        self._stack = ExitStack()
        self._opened: tuple[Backend, Loss, list[Tensor], list[Tensor]] | None = None

    @cached_property
    def _active(self) -> list[int]:
        """The positions of what is differentiated, as late as possible: a step may unfreeze it."""
        if self._at is None:
            return [i for i, p in enumerate(self._training.theta) if p.requires_grad]
        return [i for i, g in enumerate(self._at.gradients) if g is not None]

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Puts the module back as it was before the replay, and lets go of the graph."""
        self._stack.close()
        self._opened = None  # its loss refers to this object: a cycle

    def tangent(
        self,
        u: list[Tensor] | None,
        e: Mapping[str, Tensor],
        statistics: Sequence[Tensor] = (),
        *,
        is_last: bool = True,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns H u + B e in m directions, and ṙ'.

        Args:
            u: Directions in θ, ``(m, *p.shape)`` for each parameter p, or None for zeros.
            e: Directions in raw λ, ``(m, *raw.shape)``, by name; zeros for λ that are not there.
            statistics: Directions in the running statistics; not read where u is None.
            is_last: Whether no product follows within the context.

        Returns:
            One tensor ``(m, *p.shape)`` per parameter, zeros included, and one per running
            statistic, which are the caller's own.
        """
        m = len(u[0]) if u is not None else len(next(iter(e.values())))
        lam = self._directions(e, m)
        directions = None
        if u is not None:
            zeros = self._training.statistics.zeros(m)
            directions = [*(u[i] for i in self._active), *statistics, *zeros] or None
        products: list[Tensor] = []
        if directions is not None or lam is not None:
            products = self._multiply(
                lambda backend, *at: backend.tangent(*at, directions, lam, is_last=is_last)
            )
            if is_last or self._training.derivatives != "reverse":
                self.close()
        products = separate(products, [*(directions or ()), *(lam or ())])
        theta, _, moved = self._parts(products)
        return self._spread(theta, m), moved or self._training.statistics.zeros(m)

    def adjoint(
        self, u: list[Tensor], statistics: Sequence[Tensor], *, theta_part: bool = True
    ) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
        """Returns H u and Bᵀ u for m stacked vectors like θ, with what reaches them through r'.

        Args:
            u: One tensor ``(m, *p.shape)`` per parameter p.
            statistics: w, the adjoints of r', one tensor per running statistic.
            theta_part: Whether H u is wanted; else the first two lists are empty.

        Returns:
            One tensor ``(m, *p.shape)`` per parameter, zeros included; the adjoints of r; and one
            tensor ``(m, *raw.shape)`` for each of the λ that the loss depends on, by name.
        """
        m = len(u[0])
        known = self._training.statistics
        if known and known.by_value and self._training.derivatives == "finite_difference":
            warnings.warn(
                "OnlineHPOCallback: reverse mode takes the running statistics of normalization "
                f"layers, and other buffers, as constants, because {known.by_value_because}. Use "
                "UnrollK(mode='forward') or ClipR",
                stacklevel=2,
            )
        zeros = known.zeros(m)
        directions = [*(u[i] for i in self._active), *zeros, *statistics]
        products: tuple[list[Tensor], list[Tensor]] = ([], [])
        if directions and (theta_part or self._names):
            training = self._training
            smooth = any(
                training.hyperparameters[name].difference_step is None for name in self._names
            )
            products = self._multiply(
                lambda backend, *at: backend.adjoint(*at, directions, theta_part=theta_part),
                first_order=not (theta_part or smooth),
            )
            self.close()
        split = len(products[0])
        parts = separate([*products[0], *products[1]], directions)
        scale = self._training.objective.scale
        lam = [part.detach() / scale for part in parts[split:]]
        theta, before, _ = self._parts(parts[:split])
        return (
            self._spread(theta, m) if theta_part else [],
            before,
            dict(zip(self._names, lam, strict=bool(lam))),
        )

    def one_sided(
        self, u: list[Tensor], e: Mapping[str, Tensor], u_norms: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Returns the displaced gradients of one-sided differences; half the price of central ones.

        H u + B e is what is left when the weights times the gradient itself, which the training
        computes anyway, have been subtracted. B e comes from central differences all the same: a λ
        inside the loss often does little, and would be lost to rounding.

        Args:
            u: Directions in θ, ``(m, *p.shape)`` each.
            e: Directions in raw λ, by name.
            u_norms: ‖u‖ of each direction ``(m,)``.

        Returns:
            One tensor ``(m, *p.shape)`` per parameter; and the weights ``(m,)``, the same on all
            ranks where u is.
        """
        backend, loss, theta, lam = self._open()
        assert isinstance(backend, FiniteDifference)  # see TrainingMap.is_one_sided
        directions = [u[i] for i in self._active]
        products, weights = backend.one_sided(loss, theta, lam, directions, u_norms)
        self.close()
        result = self._spread(products, len(weights))
        if self._names:
            torch._foreach_add_(result, self.tangent(None, e)[0])
        return result, weights

    def _parts(self, products: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Splits products into those over θ, r and c; the last two without the loss's factor."""
        n = len(self._active)
        half = (len(products) - n) // 2
        scale = self._training.objective.scale
        rest = [t.detach() / scale if scale != 1 else t.detach() for t in products[n:]]
        return products[:n], rest[:half], rest[half:]

    def _directions(self, e: Mapping[str, Tensor], m: int) -> list[Tensor] | None:
        """Lists the directions in the λ that the loss depends on; None where all are zero."""
        if not any(name in e for name in self._names):
            return None
        raws = [self._training.hyperparameters[name].raw for name in self._names]
        return [
            e[name] if name in e else torch.zeros((m, *raw.shape), dtype=raw.dtype, device="cpu")
            for name, raw in zip(self._names, raws, strict=True)
        ]

    def _multiply(self, product: Callable[..., Result], *, first_order: bool = False) -> Result:
        """Calls ``product(backend, loss, θ, λ)``; see :func:`with_fallback`."""
        return with_fallback(self._training, lambda: product(*self._open(first_order)), self.close)

    def _open(self, first_order: bool = False) -> tuple[Backend, Loss, list[Tensor], list[Tensor]]:
        """Returns the backend, and the loss as a function of (active θ, r, c) and of λ.

        Args:
            first_order: Whether the product takes differences of gradients over λ alone.
        """
        if self._opened is None:
            backend = make_backend(
                self._training,
                self._names,
                len(self._active),
                theta_is_scratch=self._at is not None,
            )
            # On kernels that have the derivatives which the backend needs; those of recurrent
            # layers take three times as long as the training's.
            loss = self._loss(exact=backend.is_exact and not first_order)
            self._opened = backend, *self._stack.enter_context(loss)
        return self._opened

    @contextmanager
    def _loss(self, *, exact: bool) -> Iterator[tuple[Loss, list[Tensor], list[Tensor]]]:
        """Gives the loss of the micro-batch as a function of (active θ, r, c) and the λ in it."""
        training = self._training
        theta = [training.theta[i] for i in self._active]
        statistics = training.statistics.leaves(self._moment.state)
        weights = [torch.zeros_like(r).requires_grad_() for r in statistics]
        leaves = dict(zip(training.hyperparameters, training.objective.leaves(), strict=True))
        values = None if self._at is None else self._at.theta
        with (
            in_place(training.theta, values, self._active),
            training.objective.at(self._moment, theta, exact=exact, statistics=True) as at,
        ):

            def loss(th: Sequence[Tensor], lam: Sequence[Tensor]) -> Tensor | None:
                every = leaves | dict(zip(self._names, lam, strict=True))
                return at(th, list(every.values()))

            yield loss, [*theta, *statistics, *weights], [leaves[name] for name in self._names]

    def _spread(self, products: list[Tensor], m: int) -> list[Tensor]:
        """Puts products at their positions in a list over all θ, and zeros elsewhere.

        All are in float32 or better.
        """
        found = dict(zip(self._active, products, strict=bool(products)))
        result = [
            found[i].detach().to(torch.promote_types(p.dtype, torch.float32))
            if i in found
            else stacked_zeros([p], m)[0]
            for i, p in enumerate(self._training.theta)
        ]
        if (scale := self._training.objective.scale) != 1:
            torch._foreach_div_(result, scale)
        return result


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
