"""Maps between the raw tensor that is optimized and the value that a regularizer uses.

Hyperparameters are stored *raw* (unconstrained) so that the λ-optimizer can move freely; a
constraint turns the raw tensor into the value. Every derivative that the package reports is with
respect to the raw tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


class Constraint:
    """Contract of a constraint: ``value = constraint(raw)``, elementwise and differentiable.

    The λ-optimizer moves raw λ, after which :meth:`project` makes it feasible; derivatives are with
    respect to raw λ. A subclass implements :meth:`__call__`, :meth:`inverse`, and, where not every
    raw tensor is feasible, :meth:`project`.

    Example:
        >>> class Square(Constraint):
        ...     def __call__(self, raw):
        ...         return raw.square()
        ...
        ...     def inverse(self, value):
        ...         return value.sqrt()
        >>> Hyperparameter(9.0, Square()).raw
        tensor(3.)
    """

    def __call__(self, raw: Tensor) -> Tensor:
        """Returns the constrained value of ``raw``, of the same shape."""
        raise NotImplementedError

    def inverse(self, value: Tensor) -> Tensor:
        """Returns the raw tensor whose value is ``value``.

        Args:
            value: In the scale of the value, of any shape.

        Raises:
            ValueError: If ``value`` is not feasible.

        Example:
            >>> UnitInterval().inverse(torch.tensor(0.8))
            tensor(1.3863)
        """
        raise NotImplementedError

    def project(self, raw: Tensor) -> Tensor:
        """Returns the feasible raw tensor nearest to ``raw``; applied after every λ update.

        Args:
            raw: What the λ-optimizer has made of raw λ.

        Example:
            >>> class Magnitude(Square):
            ...     def project(self, raw):
            ...         return raw.clamp(min=0.0)
            >>> Magnitude().project(torch.tensor([-1.0, 2.0]))
            tensor([0., 2.])
        """
        return raw

    def derivatives(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the value and its derivative with respect to ``raw``, both of its shape.

        The default differentiates :meth:`__call__`.

        Args:
            raw: Raw λ.

        Example:
            >>> Square().derivatives(torch.tensor(3.0))
            (tensor(9.), tensor(6.))
        """
        with torch.enable_grad():
            leaf = raw.detach().clone().requires_grad_()
            value = self(leaf)
            (first,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), first

    def unit(self, raw: Tensor, first: Tensor) -> Tensor | float:
        """Returns by how much raw λ changes in a natural unit of its value.

        That is the unit in which the λ-optimizer moves that the callback chooses: a factor e of a
        strength, half a logit of a probability. By default |raw|, at least a fifth of the size at
        which it started.

        Args:
            raw: Raw λ where it is.
            first: Raw λ where it started, of the same shape.

        Returns:
            Positive numbers: a tensor like ``raw``, or one for all of its elements.

        Example:
            >>> class Relative(Square):
            ...     def unit(self, raw, first):
            ...         return 0.5 * raw.abs().clamp(min=1e-3)  # about a factor e of raw²
            >>> Relative().unit(torch.tensor(3.0), first=torch.tensor(1.0))
            tensor(1.5000)
        """
        return raw.abs().clamp(min=0.2 * _size(first))

    def _check(self, value: Tensor, low: float, high: float) -> None:
        """Refuses a value that is not finite or lies outside ``[low, high]``."""
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"got the value {_show(value)}, which is not finite")
        # A bound itself may miss its own interval by a rounding error.
        slack = 1e-6
        below = value < low - slack * abs(low) if math.isfinite(low) else value < low
        above = value > high + slack * abs(high) if math.isfinite(high) else value > high
        if bool(below.any()) or bool(above.any()):
            raise ValueError(
                f"got the value {_show(value)}, which lies outside [{low:g}, {high:g}] of {self}; "
                "start inside that range, or pass a constraint with a wider one"
            )


@dataclass(frozen=True)
class Positive(Constraint):
    """Positive values on a log scale: ``value = exp(raw)``.

    A step of the λ-optimizer is therefore a relative change of the value. The bounds keep a
    strength that is driven to zero within reach of a later return.

    Args:
        low: Smallest value, in the scale of the value. Must be positive.
        high: Largest value, likewise.

    Raises:
        ValueError: If not ``0 < low < high < inf``.

    Example:
        >>> strength = Hyperparameter(1e-3, Positive(high=10.0))
        >>> strength.raw  # log(1e-3)
        tensor(-6.9078)
    """

    low: float = 1e-10
    high: float = 1e4

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise ValueError(f"Positive needs 0 < low < high < inf, got {self}")

    def __call__(self, raw: Tensor) -> Tensor:
        """Returns ``exp(raw)``."""
        return raw.exp()

    def inverse(self, value: Tensor) -> Tensor:
        """Returns ``log(value)``; raises ``ValueError`` outside ``[low, high]``."""
        self._check(value, self.low, self.high)
        return value.log()

    def project(self, raw: Tensor) -> Tensor:
        """Clamps ``raw`` to ``[log(low), log(high)]``."""
        return raw.clamp(math.log(self.low), math.log(self.high))

    def derivatives(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``exp(raw)`` twice: the exponential is its own derivative."""
        value = raw.detach().exp()
        return value, value

    def unit(self, raw: Tensor, first: Tensor) -> float:
        """Returns 1: a factor e."""
        return 1.0


@dataclass(frozen=True)
class UnitInterval(Constraint):
    """Values between 0 and 1 on a logit scale: ``value = 1 / (1 + exp(-raw))``.

    Args:
        margin: Values (not logits) stay within ``[margin, 1 - margin]``, where the logit is still
            moderate and its derivative ``value * (1 - value)`` is not lost to rounding.

    Raises:
        ValueError: If not ``0 < margin < 0.5``.

    Example:
        >>> probability = Hyperparameter(0.8, UnitInterval())
        >>> probability.raw  # log(0.8 / 0.2)
        tensor(1.3863)
    """

    margin: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 < self.margin < 0.5:
            raise ValueError(f"UnitInterval needs 0 < margin < 0.5, got {self}")

    def __call__(self, raw: Tensor) -> Tensor:
        """Returns ``sigmoid(raw)``."""
        return raw.sigmoid()

    def inverse(self, value: Tensor) -> Tensor:
        """Returns ``logit(value)``; raises ``ValueError`` outside ``[margin, 1 - margin]``."""
        self._check(value, self.margin, 1 - self.margin)
        return value.logit()

    def project(self, raw: Tensor) -> Tensor:
        """Clamps ``raw`` so that the value stays within ``[margin, 1 - margin]``."""
        bound = math.log1p(-self.margin) - math.log(self.margin)
        return raw.clamp(-bound, bound)

    def derivatives(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Returns s and s(1 − s) with s = sigmoid(raw)."""
        value = raw.detach().sigmoid()
        return value, value * (1 - value)

    def unit(self, raw: Tensor, first: Tensor) -> float:
        """Returns half a logit: at most an eighth of the interval."""
        return 0.5


@dataclass(frozen=True)
class Unconstrained(Constraint):
    """Any finite value: the identity, without a projection.

    Example:
        >>> bias = Hyperparameter(-0.5, Unconstrained())
        >>> bias.raw
        tensor(-0.5000)
    """

    def __call__(self, raw: Tensor) -> Tensor:
        """Returns ``raw`` itself."""
        return raw

    def inverse(self, value: Tensor) -> Tensor:
        """Returns ``value`` itself; raises ``ValueError`` where it is not finite."""
        self._check(value, -math.inf, math.inf)
        return value

    def derivatives(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``raw`` and ones."""
        return raw.detach(), torch.ones_like(raw)


@dataclass(frozen=True)
class Interval(Unconstrained):
    """Values in ``[low, high]``: the identity, projected by clamping after every update.

    Args:
        low: Smallest value, which is raw λ itself; may be ``-inf``.
        high: Largest value, likewise; may be ``inf``.

    Raises:
        ValueError: If not ``low < high``.

    Example:
        >>> sigma = Hyperparameter(0.1, Interval(0.0))  # up to infinity
        >>> Interval(0.0, 2.0).project(torch.tensor([-1.0, 1.5, 2.5]))
        tensor([0.0000, 1.5000, 2.0000])
    """

    low: float = 0.0
    high: float = math.inf

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"Interval needs low < high, got {self}")

    def inverse(self, value: Tensor) -> Tensor:
        """Returns ``value`` itself; raises ``ValueError`` outside ``[low, high]``."""
        self._check(value, self.low, self.high)
        return value

    def project(self, raw: Tensor) -> Tensor:
        """Clamps ``raw`` to ``[low, high]``."""
        return raw.clamp(self.low, self.high)

    def unit(self, raw: Tensor, first: Tensor) -> Tensor:
        """Returns what a unit of the logarithm, or logit, of the distance to the bounds makes.

        At the bounds it would be 0; there it is a tenth of the interval, or a twentieth of where λ
        started.
        """
        if math.isinf(self.low) and math.isinf(self.high):
            return raw.abs().clamp(min=0.2 * _size(first))
        if math.isinf(self.low) or math.isinf(self.high):
            bound = self.high if math.isinf(self.low) else self.low
            return (raw - bound).abs().clamp(min=0.05 * _size(first - bound))
        width = self.high - self.low
        part = (raw - self.low) / width
        return (part * (1 - part)).clamp(min=0.1) * width


@dataclass(frozen=True)
class Box(Interval):
    """Vectors whose elements all lie in ``[low, high]``: the identity, projected by clamping.

    Args:
        low: Smallest value of an element, which is raw λ itself.
        high: Largest value of an element, likewise.

    Raises:
        ValueError: If not ``low < high``.

    Example:
        >>> weights = Hyperparameter(torch.ones(128), Box())
        >>> Box().project(torch.tensor([-0.5, 0.5, 1.5]))
        tensor([0.0000, 0.5000, 1.0000])
    """

    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class Simplex(Unconstrained):
    """Vectors of weights that are not negative and sum to ``total``, projected by distance.

    Source of the projection: Duchi et al. (2008, Fig. 1).

    Args:
        total: The sum, in the scale of the values, which are raw λ themselves.

    Raises:
        ValueError: If ``total`` is not positive and finite.

    Example:
        >>> mixture = Hyperparameter(torch.tensor([0.25, 0.75]), Simplex())
        >>> Simplex().project(torch.tensor([0.5, 1.0]))
        tensor([0.2500, 0.7500])
    """

    total: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.total < math.inf:
            raise ValueError(f"Simplex needs a positive, finite total, got {self}")

    def inverse(self, value: Tensor) -> Tensor:
        """Returns ``value``; raises ``ValueError`` where it does not lie on the simplex."""
        self._check(value, 0.0, math.inf)
        total = float(value.sum())
        if not math.isclose(total, self.total, rel_tol=1e-4):
            raise ValueError(f"the values sum to {total:g}, expected {self.total:g} of {self}")
        return value

    def project(self, raw: Tensor) -> Tensor:
        """Returns the nearest point of the simplex (Duchi et al. 2008, Fig. 1)."""
        return _nearest_on_simplex(raw, self.total)

    def unit(self, raw: Tensor, first: Tensor) -> Tensor:
        """Returns each weight, at least the mean."""
        return raw.clamp(min=self.total / raw.numel())


@dataclass(frozen=True)
class L1Ball(Unconstrained):
    """Vectors with Σ |x| ≤ ``radius``, projected by distance.

    Source of the projection: Duchi et al. (2008, §4).

    Args:
        radius: R of the data hyper-cleaner (Franceschi et al. 2017, §5.1), in the scale of the
            values, which are raw λ themselves.
        nonnegative: Whether elements below 0 are projected to 0 too, as weights need.

    Raises:
        ValueError: If ``radius`` is not positive and finite.

    Example:
        >>> weights = Hyperparameter(torch.full((128,), 0.5), L1Ball(64.0))
        >>> L1Ball(1.0).project(torch.tensor([0.5, 1.0]))
        tensor([0.2500, 0.7500])
    """

    radius: float = 1.0
    nonnegative: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.radius < math.inf:
            raise ValueError(f"L1Ball needs a positive, finite radius, got {self}")

    def inverse(self, value: Tensor) -> Tensor:
        """Returns ``value``; raises ``ValueError`` where it lies outside the ball."""
        self._check(value, 0.0 if self.nonnegative else -math.inf, math.inf)
        norm = float(value.abs().sum())
        if norm > self.radius * (1 + 1e-4):
            raise ValueError(
                f"the values have L1 norm {norm:g}, but the radius of {self} is {self.radius:g}; "
                f"start at {self.radius / value.numel():g} each, or take a larger radius"
            )
        return value

    def project(self, raw: Tensor) -> Tensor:
        """Returns the nearest point of the ball (Duchi et al. 2008, §4)."""
        inside = raw.clamp(min=0) if self.nonnegative else raw
        if float(inside.abs().sum()) <= self.radius:
            return inside
        return inside.sign() * _nearest_on_simplex(inside.abs(), self.radius)

    def unit(self, raw: Tensor, first: Tensor) -> Tensor:
        """Returns the size of each element, at least the mean at the surface of the ball."""
        return raw.abs().clamp(min=self.radius / raw.numel())


def _size(first: Tensor) -> float:
    """Returns the root mean square; 1 of zeros."""
    return float(first.square().mean().sqrt()) or 1.0


def _nearest_on_simplex(x: Tensor, total: float) -> Tensor:
    """Projects a vector onto {w ≥ 0, Σ w = total} by sorting."""
    flat = x.flatten()
    ordered, _ = flat.sort(descending=True)
    excess = ordered.cumsum(0) - total
    rank = torch.arange(1, len(flat) + 1, device=x.device, dtype=x.dtype)
    count = int((ordered - excess / rank > 0).sum())
    return (flat - excess[count - 1] / count).clamp(min=0).reshape(x.shape)


def _show(value: Tensor) -> str:
    """Returns a short text for an error message."""
    return f"{value.item():g}" if value.numel() == 1 else str(value.detach().cpu().tolist()[:8])
