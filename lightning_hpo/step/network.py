"""Products with the Hessian of the loss of one micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from lightning_hpo._tensors import holding, separate, stacked_zeros
from lightning_hpo.derivatives import Backend, FiniteDifference, Loss
from lightning_hpo.dynamics import OptimizerStep
from lightning_hpo.objectives import Moment
from lightning_hpo.step.backends import Result, make_backend, with_fallback
from lightning_hpo.step.training_map import TrainingMap


class Network:
    """Products with H and B of the loss of one micro-batch, on this rank alone.

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
        theta = training.theta
        if at is None:
            self._active = [i for i, p in enumerate(theta) if p.requires_grad]
        else:
            self._active = [i for i, g in enumerate(at.gradients) if g is not None]
        self._stack = ExitStack()
        self._opened: tuple[Backend, Loss, list[Tensor], list[Tensor]] | None = None

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Puts the module back as it was before the replay, and lets go of the graph."""
        self._stack.close()
        self._opened = None  # its loss refers to this object: a cycle

    def tangent(
        self, u: list[Tensor] | None, e: Mapping[str, Tensor], *, is_last: bool = True
    ) -> list[Tensor]:
        """Returns H u + B e in m directions.

        Args:
            u: Directions in θ, ``(m, *p.shape)`` for each parameter p, or None for zeros.
            e: Directions in raw λ, ``(m, *raw.shape)``, by name; zeros for λ that are not there.
            is_last: Whether no product follows within the context.

        Returns:
            One tensor ``(m, *p.shape)`` per parameter, zeros included, which is the caller's own.
        """
        m = len(u[0]) if u is not None else len(next(iter(e.values())))
        lam = self._directions(e, m)
        directions = [u[i] for i in self._active] if u is not None and self._active else None
        products: list[Tensor] = []
        if directions is not None or lam is not None:
            products = self._multiply(
                lambda backend, *at: backend.tangent(*at, directions, lam, is_last=is_last)
            )
            if is_last or self._training.derivatives != "reverse":
                self.close()
        return self._spread(separate(products, [*(directions or ()), *(lam or ())]), m)

    def adjoint(
        self, u: list[Tensor], *, theta_part: bool = True
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Returns H u and Bᵀ u for m stacked vectors like θ.

        Args:
            u: One tensor ``(m, *p.shape)`` per parameter p.
            theta_part: Whether H u is wanted; else the first list is empty.

        Returns:
            One tensor ``(m, *p.shape)`` per parameter, zeros included; and one tensor
            ``(m, *raw.shape)`` for each of the λ that the loss depends on, by name.
        """
        m = len(u[0])
        directions = [u[i] for i in self._active]
        products: tuple[list[Tensor], list[Tensor]] = ([], [])
        if directions and (theta_part or self._names):
            products = self._multiply(
                lambda backend, *at: backend.adjoint(*at, directions, theta_part=theta_part)
            )
            self.close()
        split = len(products[0])
        parts = separate([*products[0], *products[1]], directions)
        scale = self._training.objective.scale
        lam = [part.detach() / scale for part in parts[split:]]
        theta = self._spread(parts[:split], m) if theta_part else []
        return theta, dict(zip(self._names, lam, strict=bool(lam)))

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
            torch._foreach_add_(result, self.tangent(None, e))
        return result, weights

    def _directions(self, e: Mapping[str, Tensor], m: int) -> list[Tensor] | None:
        """Lists the directions in the λ that the loss depends on; None where all are zero."""
        if not any(name in e for name in self._names):
            return None
        raws = [self._training.hyperparameters[name].raw for name in self._names]
        return [
            e[name] if name in e else torch.zeros((m, *raw.shape), dtype=raw.dtype, device="cpu")
            for name, raw in zip(self._names, raws, strict=True)
        ]

    def _multiply(self, product: Callable[..., Result]) -> Result:
        """Calls ``product(backend, loss, θ, λ)``; see :func:`with_fallback`."""
        return with_fallback(self._training, lambda: product(*self._open()), self.close)

    def _open(self) -> tuple[Backend, Loss, list[Tensor], list[Tensor]]:
        """Returns the backend, and the loss as a function of the active θ and of λ."""
        if self._opened is None:
            backend = make_backend(
                self._training, self._names, theta_is_scratch=self._at is not None
            )
            # On kernels that have the derivatives which the backend needs.
            loss = self._loss(exact=backend.is_exact)
            self._opened = backend, *self._stack.enter_context(loss)
        return self._opened

    @contextmanager
    def _loss(self, *, exact: bool) -> Iterator[tuple[Loss, list[Tensor], list[Tensor]]]:
        """Gives the loss of the micro-batch as a function of the active θ and of the λ in it."""
        training = self._training
        theta = [training.theta[i] for i in self._active]
        leaves = dict(zip(training.hyperparameters, training.objective.leaves(), strict=True))
        values = None if self._at is None else self._at.theta
        with (
            in_place(training.theta, values, self._active),
            training.objective.at(self._moment, theta, exact=exact) as at,
        ):

            def loss(th: Sequence[Tensor], lam: Sequence[Tensor]) -> Tensor | None:
                every = leaves | dict(zip(self._names, lam, strict=True))
                return at(th, list(every.values()))

            yield loss, theta, [leaves[name] for name in self._names]

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
