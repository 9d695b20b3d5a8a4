"""The λ-optimizer that is chosen where none is given."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_hpo.hyperparameters import Hyperparameter

__docformat__ = "google"
__all__ = ["SignalToNoise"]

# An update moves λ only where the mean of its hypergradients exceeds this part of their size.
THRESHOLD = 0.15
# How fast mean and mean square forget.
BETAS = (0.9, 0.97)
# The first so many say nothing about how much they vary.
UNKNOWN = 3
# Early in a training nothing has overfitted yet, and less regularization always looks better.
WARM_UP = 0.1
# At its first rate λ would travel so many units (factors e, of a strength) in a quarter of all
# updates …
TRAVEL = 6.0
# … but in one update not more than so many: a tangent answers late.
FASTEST = 0.25
# Where hypergradients say nothing, the part of the rate at which λ drifts to its typical value …
DRIFT = 0.2
# … from so many units away; from closer by, in proportion.
NEAR = 2.0
# Without a known end the rate falls to this part and stays there.
FLOOR = 0.1


def _floor(is_known: bool) -> float:
    return 0.0 if is_known else FLOOR


def _rate(done: int, count: int, floor: float) -> float:
    """Returns η of lr = 1 after so many of ``count`` updates."""
    part = 0.5 * (1 + math.cos(math.pi * min(1.0, done / count)))
    return min(4 * TRAVEL / count, FASTEST) * max(part, floor)


def reach(made: int, count: int, *, is_known: bool = True) -> float:
    """Returns how many units λ can travel, at lr = 1, in the first updates.

    Args:
        made: How many updates.
        count: Of how many in the whole training.
        is_known: As for :class:`SignalToNoise`.
    """
    total = 0.0
    for done in range(made):
        waits = done < max(WARM_UP * count, UNKNOWN)
        total += (DRIFT if waits else 1.0) * _rate(done, count, _floor(is_known))
    return total


class SignalToNoise(torch.optim.Optimizer):
    r"""Moves each λ as far as its hypergradients h stand out from their own noise.

        m ← β₁ m + (1 − β₁) h,   v ← β₂ v + (1 − β₂) h²,   q = m̂ / √v̂
        raw λ ← raw λ − η_k u sign(q) (|q| − c) / (1 − c)                  where |q| > c
        raw λ ← raw λ − η_k 0.2 clip((raw λ − raw λ₀) / 2, −u, u)          elsewhere
        η_k = lr · min(24 / n, ¼) · ½ (1 + cos(π k / n)),   β = (0.9, 0.97),   c = 0.15

    m̂ and v̂ are corrected for their start, as in Adam (Kingma & Ba 2015, Algorithm 1), and the rate
    falls by a cosine (Loshchilov & Hutter 2017, eq. 5); the first three hypergradients say nothing
    about their noise, and those of the first tenth of all updates come too early: they count as
    q = 0. So do, element by element, hypergradients of 0. u is the unit of raw λ
    (:meth:`Constraint.unit`): a factor e of a strength, half a logit of a probability. From about
    100 updates on λ can travel ten units in all; with 30, three.

    q does not depend on the scale of h, which is different by orders of magnitude between kinds of
    λ, and between values of a strength; noise alone, of which |q| is 0.2 on the average, moves it
    little. Below c λ drifts to a typical value λ₀ of its kind, where one is known: early in a
    training, hypergradients do not show yet what it will come to.

    Args:
        hyperparameters: What is moved.
        updates: n, the number of updates of λ in the whole training.
        typical: Their λ₀, as raw values; those that are not in it have none. It is read at each
            step.
        lr: A factor of the rate, without unit. With 0 nothing moves.
        is_known: Whether n is known. Else the rate does not fall below a tenth.

    Example:
        >>> module = Tuned()
        >>> tuned = named_hyperparameters(module).values()
        >>> make = signal_to_noise.SignalToNoise
        >>> callback = OnlineHPOCallback(T1T2(), lambda raw: make(tuned, 20, {}))
        >>> Trainer(callbacks=[callback]).fit(module, train_loader, validation_loader)
    """

    def __init__(
        self,
        hyperparameters: Iterable[Hyperparameter],
        updates: int,
        typical: Mapping[Hyperparameter, Tensor],
        *,
        lr: float = 1.0,
        is_known: bool = True,
    ) -> None:
        self._owners = {h.raw: h for h in hyperparameters}
        self._typical = typical
        self._count = updates
        self._floor = _floor(is_known)
        # How many have been made is kept with the group, and so in a checkpoint.
        super().__init__(list(self._owners), {"lr": lr, "updates": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Makes one update of those that have a gradient."""
        for group in self.param_groups:
            done = group["updates"]
            group["updates"] = done + 1
            rate = group["lr"] * _rate(done, self._count, self._floor)
            for raw in group["params"]:
                if group["lr"] > 0 and raw.grad is not None:
                    is_early = done < WARM_UP * self._count
                    self._move(self._owners[raw], raw.grad, rate, is_early)

    def _move(self, h: Hyperparameter, gradient: Tensor, rate: float, is_early: bool) -> None:
        raw, state = h.raw, self.state[h.raw]
        typical = self._typical.get(h)
        if not state:
            for name in ("count", "mean", "size"):
                state[name] = torch.zeros_like(raw)
            state["first"] = raw.clone()
        # The weight of an example that was not in the batch is none the wiser.
        seen = (gradient != 0).to(raw.dtype)
        count = state["count"].add_(seen)
        mean = state["mean"].lerp_(gradient, (1 - BETAS[0]) * seen) / (1 - BETAS[0] ** count)
        # By a hypotenuse: the square of a small hypergradient is 0 in float32.
        kept, new = math.sqrt(BETAS[1]), math.sqrt(1 - BETAS[1])
        size = torch.hypot(kept * state["size"], new * gradient)
        size = state["size"].copy_(torch.where(seen > 0, size, state["size"]))
        q = mean / (size / (1 - BETAS[1] ** count).sqrt())
        q = q.nan_to_num(0.0, 0.0, 0.0)
        q = q * 0 if is_early else torch.where(count > UNKNOWN, q, 0.0)
        move = q.sign() * (q.abs() - THRESHOLD).clamp(min=0) / (1 - THRESHOLD)
        unit = h.constraint.unit(raw, state["first"])
        if typical is not None:
            drift = DRIFT * ((raw - typical) / (NEAR * unit)).clamp(-1, 1)
            move = torch.where(q.abs() > THRESHOLD, move, drift)
        raw.sub_(rate * unit * move)
