"""Closed-form tangents and adjoints of torch.optim.Adam and AdamW."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_hpo._tensors import filled
from lightning_hpo.dynamics.base import Dynamics, OptimizerStep, pick, put
from lightning_hpo.dynamics.state import THETA, State, entries_like_theta

_MEAN = "exp_avg"
_SQUARE = "exp_avg_sq"


class AdamDynamics(Dynamics):
    r"""Φ of Adam (Kingma & Ba 2015) and AdamW, without amsgrad, at their t-th step.

        h = ±g + w θ              (AdamW: h = ±g, and θ is first scaled by 1 − η w)
        m' = β₁ m + (1 − β₁) h
        v' = β₂ v + (1 − β₂) h²
        θ' = θ − η/(1 − β₁ᵗ) · m' / (√v' / √(1 − β₂ᵗ) + ε)

    The derivative of √v' at v' = 0 is defined as 0: units that have never received a gradient
    (dead ReLUs, unused embedding rows) get zero tangents instead of 0 · ∞ = NaN.
    """

    @property
    def state_names(self) -> tuple[str, ...]:
        """See :attr:`Dynamics.state_names`: m and v."""
        return (_MEAN, _SQUARE)

    def capture(self) -> OptimizerStep:
        """Records the step; see :meth:`Dynamics.capture`.

        A fused or capturable optimizer counts its steps on the device, which is waited for once.
        """
        step = super().capture()
        step.counts = _counts(step)
        return step

    def jvp_(self, step: OptimizerStep, tangent: State, gradient: list[Tensor]) -> None:
        """See :meth:`Dynamics.jvp_`; costs about twice the optimizer's step, m times."""
        counts = _counts(step)
        for options, index in step.parts(counts.__getitem__):
            theta, h = pick(tangent[THETA], index), pick(gradient, index)
            mean, square = (entries_like_theta(tangent, n, index) for n in (_MEAN, _SQUARE))
            point = self._point(step, options, index, counts[index[0]] + 1)
            if options["maximize"]:
                torch._foreach_neg_(h)
            if point.coupled:
                torch._foreach_add_(h, theta, alpha=point.coupled)
            torch._foreach_mul_(mean, point.beta1)
            torch._foreach_add_(mean, h, alpha=1 - point.beta1)
            torch._foreach_mul_(square, point.beta2)
            torch._foreach_addcmul_(square, h, point.h, value=2 * (1 - point.beta2))
            if point.shrink != 1:
                torch._foreach_mul_(theta, point.shrink)
            torch._foreach_addcdiv_(theta, mean, point.denominator, value=-point.step_size)
            torch._foreach_addcmul_(theta, square, point.slope, value=point.step_size)

    def vjp_(self, step: OptimizerStep, adjoint: State, *, state_part: bool = True) -> list[Tensor]:
        """See :meth:`Dynamics.vjp_`."""
        result: list[Tensor | None] = [None] * len(adjoint[THETA])
        counts = _counts(step)
        for options, index in step.parts(counts.__getitem__):
            theta = pick(adjoint[THETA], index)
            mean, square = (entries_like_theta(adjoint, n, index) for n in (_MEAN, _SQUARE))
            point = self._point(step, options, index, counts[index[0]] + 1)
            torch._foreach_addcdiv_(mean, theta, point.denominator, value=-point.step_size)
            torch._foreach_addcmul_(square, theta, point.slope, value=point.step_size)
            h = list(torch._foreach_mul(mean, 1 - point.beta1))
            torch._foreach_addcmul_(h, square, point.h, value=2 * (1 - point.beta2))
            if not state_part:
                if options["maximize"]:
                    torch._foreach_neg_(h)
                put(result, index, h)
                continue
            torch._foreach_mul_(mean, point.beta1)
            torch._foreach_mul_(square, point.beta2)
            if point.shrink != 1:
                torch._foreach_mul_(theta, point.shrink)
            if point.coupled:
                torch._foreach_add_(theta, h, alpha=point.coupled)
            if options["maximize"]:
                torch._foreach_neg_(h)
            put(result, index, h)
        return filled(result, adjoint[THETA])

    def _point(
        self, step: OptimizerStep, options: dict[str, Any], index: list[int], t: float
    ) -> _Point:
        """Computes the values at which Φ is differentiated, at step t."""
        lr, weight_decay = float(options["lr"]), float(options["weight_decay"])
        beta1, beta2 = (float(beta) for beta in options["betas"])
        decoupled = options.get(
            "decoupled_weight_decay", isinstance(self.optimizer, torch.optim.AdamW)
        )
        state = [step.state[i] for i in index]
        h = [g for i in index if (g := step.gradients[i]) is not None]
        if options["maximize"]:
            h = list(torch._foreach_neg(h))
        coupled = 0.0 if decoupled else weight_decay
        if coupled:
            h = list(torch._foreach_add(h, pick(step.theta, index), alpha=coupled))
        mean = list(torch._foreach_mul(h, 1 - beta1))
        square = list(torch._foreach_mul(h, h))
        torch._foreach_mul_(square, 1 - beta2)
        if _MEAN in state[0]:
            torch._foreach_add_(mean, [s[_MEAN] for s in state], alpha=beta1)
            torch._foreach_add_(square, [s[_SQUARE] for s in state], alpha=beta2)
        torch._foreach_sqrt_(square)
        root = square
        correction = (1 - beta2**t) ** 0.5
        denominator = list(torch._foreach_div(root, correction))
        torch._foreach_add_(denominator, float(options["eps"]))
        # slope = ∂(−m'/denominator)/∂v' negated: m' / (2 √v' √(1 − β₂ᵗ) denominator²), 0 at v' = 0.
        positive = list(torch._foreach_sign(root))
        torch._foreach_mul_(mean, positive)
        torch._foreach_neg_(positive)
        torch._foreach_add_(positive, 1.0)
        torch._foreach_add_(root, positive)
        torch._foreach_div_(mean, root)
        torch._foreach_div_(mean, denominator)
        torch._foreach_div_(mean, denominator)
        torch._foreach_div_(mean, 2 * correction)
        return _Point(
            h=h,
            denominator=denominator,
            slope=mean,
            step_size=lr / (1 - beta1**t),
            beta1=beta1,
            beta2=beta2,
            coupled=coupled,
            shrink=1 - lr * weight_decay if decoupled else 1.0,
        )


class _Point(NamedTuple):
    h: list[Tensor]
    denominator: list[Tensor]
    slope: list[Tensor]
    step_size: float
    beta1: float
    beta2: float
    coupled: float
    shrink: float


def _counts(step: OptimizerStep) -> list[float]:
    """Returns how many steps each parameter has taken."""
    if step.counts:
        return step.counts
    known = {i: s["step"] for i, s in enumerate(step.state) if "step" in s}
    counts = [0.0] * len(step.state)  # before its first step a parameter has no state
    if known:
        tensors = [torch.as_tensor(value) for value in known.values()]
        numbers = torch.stack([t.to(tensors[0]) for t in tensors]).tolist()
        for i, count in zip(known, numbers, strict=True):
            counts[i] = count
    return counts
