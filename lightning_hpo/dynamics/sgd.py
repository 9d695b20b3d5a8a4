"""Closed-form tangents and adjoints of torch.optim.SGD."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_hpo._tensors import filled
from lightning_hpo.dynamics.base import Dynamics, OptimizerStep, pick, put
from lightning_hpo.dynamics.state import THETA, State, entries_like_theta

_BUFFER = "momentum_buffer"


class SGDDynamics(Dynamics):
    r"""Φ of SGD with momentum μ, dampening d, weight decay w, nesterov and maximize.

        h = ±g + w θ
        b' = μ b + (1 − d) h      (b' = h at the first step)
        θ' = θ − η (h + μ b')     with nesterov, else θ − η b'

    Φ is linear in (θ, b, g), so its derivative needs none of their values.
    """

    nonlinear: ClassVar[bool] = False

    @property
    def state_names(self) -> tuple[str, ...]:
        """See :attr:`Dynamics.state_names`: the buffers b, where any group has momentum."""
        has_momentum = any(group["momentum"] for group in self.optimizer.param_groups)
        return (_BUFFER,) if has_momentum else ()

    def jvp_(self, step: OptimizerStep, tangent: State, gradient: list[Tensor]) -> None:
        """See :meth:`Dynamics.jvp_`; costs about as much as the optimizer's step, m times."""
        for options, index in step.parts(lambda i: step.state[i].get(_BUFFER) is None):
            theta, h = pick(tangent[THETA], index), pick(gradient, index)
            if options["maximize"]:
                torch._foreach_neg_(h)
            if weight_decay := float(options["weight_decay"]):
                torch._foreach_add_(h, theta, alpha=weight_decay)
            if momentum := float(options["momentum"]):
                buffer = entries_like_theta(tangent, _BUFFER, index)
                is_first = step.state[index[0]].get(_BUFFER) is None
                if options["nesterov"]:  # has no dampening
                    torch._foreach_mul_(buffer, 0.0 if is_first else momentum)
                    torch._foreach_add_(buffer, h)
                    torch._foreach_add_(h, buffer, alpha=momentum)
                else:
                    if not is_first:
                        if dampening := float(options["dampening"]):
                            torch._foreach_mul_(h, 1 - dampening)
                        torch._foreach_add_(h, buffer, alpha=momentum)
                    # h becomes the buffer: one pass less than to update the old one.
                    put(tangent[_BUFFER], index, h)
            torch._foreach_add_(theta, h, alpha=-float(options["lr"]))

    def vjp_(self, step: OptimizerStep, adjoint: State, *, state_part: bool = True) -> list[Tensor]:
        """See :meth:`Dynamics.vjp_`; ``state_part=False`` costs one pass over θ."""
        result: list[Tensor | None] = [None] * len(adjoint[THETA])
        for options, index in step.parts(lambda i: step.state[i].get(_BUFFER) is None):
            is_first = step.state[index[0]].get(_BUFFER) is None
            momentum = float(options["momentum"])
            into_buffer = 1.0 if is_first else 1 - float(options["dampening"])
            theta = pick(adjoint[THETA], index)
            if not state_part and (not momentum or _BUFFER not in adjoint):
                # Every term is a multiple of the adjoint of θ.
                factor = -float(options["lr"]) * (-1.0 if options["maximize"] else 1.0)
                if momentum:
                    direct = 1.0 if options["nesterov"] else 0.0
                    through = momentum if options["nesterov"] else 1.0
                    factor *= direct + through * into_buffer
                torch._foreach_mul_(theta, factor)
                put(result, index, theta)
                continue
            h = list(torch._foreach_mul(theta, -float(options["lr"])))
            if momentum:
                buffer = entries_like_theta(adjoint, _BUFFER, index)
                torch._foreach_add_(buffer, h, alpha=momentum if options["nesterov"] else 1.0)
                if not options["nesterov"]:
                    torch._foreach_zero_(h)
                torch._foreach_add_(h, buffer, alpha=into_buffer)
                torch._foreach_mul_(buffer, 0.0 if is_first else momentum)
            if weight_decay := float(options["weight_decay"]):
                torch._foreach_add_(theta, h, alpha=weight_decay)
            if options["maximize"]:
                torch._foreach_neg_(h)
            put(result, index, h)
        return filled(result, adjoint[THETA])
