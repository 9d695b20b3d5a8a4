"""Choices among a few: hyperparameters whose λ is the logits φ of a distribution."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from lightning_hpo.hyperparameters.constraints import Constraint, UnitInterval
from lightning_hpo.hyperparameters.hyperparameter import Hyperparameter

# The logits of a choice that is certain: the others have a probability of about 1e-13.
_CERTAIN = 30.0


@dataclass(frozen=True)
class Softmax(Constraint):
    """Probabilities that sum to 1: ``value = softmax(raw)``, raw being logits.

    Args:
        spread: Logits (raw λ) stay within so much of the largest, so that no choice is out of
            reach.

    Raises:
        ValueError: If ``spread`` is not positive and finite.

    Example:
        >>> choice = CategoricalHyperparameter(["relu", "tanh", "elu"])
        >>> choice.constraint
        Softmax(spread=10.0)
        >>> choice.constraint.project(torch.tensor([12.0, 0.0, 5.0]))
        tensor([12.,  2.,  5.])
    """

    spread: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.spread < math.inf:
            raise ValueError(f"Softmax needs a positive, finite spread, got {self}")

    def __call__(self, raw: Tensor) -> Tensor:
        """Returns ``softmax(raw)`` over the last dimension."""
        return raw.softmax(-1)

    def inverse(self, value: Tensor) -> Tensor:
        """Returns ``log(value)``, with mean 0.

        Raises:
            ValueError: If these are no positive probabilities that sum to 1.
        """
        self._check(value, 0.0, 1.0)
        total = float(value.sum())
        if not math.isclose(total, 1.0, rel_tol=1e-4):
            raise ValueError(f"the probabilities sum to {total:g}, expected 1")
        logits = value.clamp(min=math.exp(-2 * _CERTAIN)).log()
        return logits - logits.mean()

    def project(self, raw: Tensor) -> Tensor:
        """Lifts logits that are further than ``spread`` below the largest."""
        return torch.maximum(raw, raw.max() - self.spread)

    def unit(self, raw: Tensor, first: Tensor) -> float:
        """Returns half a logit, as for the probability of :class:`UnitInterval`."""
        return 0.5


class CategoricalHyperparameter(Hyperparameter):
    r"""One of a few choices, drawn for each training batch from p_φ = softmax(φ); λ is φ.

    Calling it returns the choice that is in force: use it in ``training_step``, or in a layer, as
    an activation, a width, a branch or a number of layers. All choices share the weights. With
    :class:`OnlineHPOCallback` it is drawn anew for each batch; in a validation, and without the
    callback, it is the most probable one. :class:`PolicyGradient` learns φ.

        self.activation = CategoricalHyperparameter(["relu", "tanh"])
        x = getattr(torch, self.activation())(x)

    Given as an option of the optimizer, ``optimizer_hyperparameters={"lr":
    CategoricalHyperparameter([1e-3, 1e-2])}``, it is drawn for each step. Under a scheduler, or
    where the parameter groups differ in it, a choice of ``lr`` is a factor of the rates in force:
    then choose among ``[0.3, 1.0, 3.0]``.

    Under ``torch.compile`` a step that branches on a choice is compiled anew for each value, up to
    ``torch._dynamo.config.recompile_limit`` (8): raise it where there are more, or use masks.

    Args:
        choices: What to choose from: anything that can be compared, such as numbers or names. For
            indices pass ``range(n)``.
        logits: φ at the start, ``(n,)``, which is raw λ. Default: zeros, which makes all equally
            probable.

    Attributes:
        choices: The choices.
        drawn: The index of the one that has been drawn; None where none is in force.
        was_asked: Whether it has been called since this was last set to False.

    Raises:
        TypeError: If ``choices`` is no sequence of several things, or they cannot be compared, as
            tensors cannot; or ``logits`` is no tensor of floating-point numbers.
        ValueError: If there are fewer than two choices, or the same one twice; or ``logits`` has
            another shape or is not finite.

    Example:
        >>> activation = CategoricalHyperparameter(["relu", "tanh"])
        >>> getattr(torch, activation())(torch.tensor([-1.0, 1.0]))
        tensor([0., 1.])
    """

    is_policy = True

    def __init__(self, choices: Iterable[Any], logits: Tensor | None = None) -> None:
        found = _checked(choices)
        shape = (len(found),)
        if logits is None:
            logits = torch.zeros(shape)
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            raise TypeError(
                f"CategoricalHyperparameter: logits={logits!r}, expected a floating-point tensor "
                f"of shape {shape}"
            )
        if logits.shape != shape:
            raise ValueError(
                f"CategoricalHyperparameter: logits have shape {tuple(logits.shape)}, expected "
                f"{shape}: one for each of {list(found)}"
            )
        if not bool(logits.isfinite().all()):
            raise ValueError(
                f"CategoricalHyperparameter: logits={logits.tolist()} are not finite; leave a "
                "choice out that is never to be made"
            )
        # In half precision, steps of the λ-optimizer would be lost to rounding.
        logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        super().__init__(logits.softmax(-1), Softmax())
        self.raw.copy_(logits)
        self._begin(found)

    def _begin(self, choices: tuple[Any, ...]) -> None:
        self.choices = choices
        self.drawn: int | None = None
        self.was_asked = False

    def distribution(self, raw: Tensor | None = None) -> Categorical:
        """Returns p_φ over the indices of the choices; its ``logits`` are log p_φ.

        Args:
            raw: φ. Default: that of this hyperparameter.

        Example:
            >>> activation.distribution().entropy()  # log 2: not decided at all
            tensor(0.6931)
        """
        # Checking its arguments would make the host wait for a device.
        return Categorical(logits=self.raw if raw is None else raw, validate_args=False)

    def best(self) -> int:
        """Returns the index of the most probable choice.

        Example:
            >>> width = CategoricalHyperparameter([16, 32], logits=torch.tensor([0.0, 2.0]))
            >>> width.choices[width.best()]
            32
        """
        return int(self.distribution().logits.argmax())

    @property
    def in_force(self) -> int:
        """The index of the choice that is in force."""
        return self.best() if self.drawn is None else self.drawn

    @property
    def index(self) -> int:
        """The index of the choice that is in force, for a step that asks for it.

        Example:
            >>> branch = CategoricalHyperparameter(range(2))
            >>> branches = nn.ModuleList([nn.Linear(4, 3), nn.Identity()])
            >>> branches[branch.index]
            Linear(in_features=4, out_features=3, bias=True)
        """
        self.was_asked = True
        return self.in_force

    def forward(self) -> Any:
        """Returns the choice that is in force."""
        return self.choices[self.index]

    def fixed(self) -> Any:
        """Returns the most probable choice, for :func:`fixed_values`."""
        return self.choices[self.best()]

    def raw_of(self, value: Any) -> Tensor:
        """Returns φ that makes a choice certain.

        Raises:
            ValueError: If it is none of the choices.
            TypeError: If it cannot be compared with them, as a tensor with numbers.
        """
        for i, choice in enumerate(self.choices):
            if _is_same(choice, value):
                return self._certain(i)
        raise ValueError(f"got {value!r}, expected one of {list(self.choices)}")

    def _certain(self, index: int) -> Tensor:
        raw = torch.zeros_like(self.raw)
        raw[index] = _CERTAIN
        return raw

    def settled(self, raw: Tensor) -> Tensor:
        """Returns φ that makes the choice certain that is the most probable one under ``raw``."""
        return self._certain(int(self.distribution(raw).logits.argmax()))

    def extra_repr(self) -> str:
        """Shows the choices with their probabilities, and whether it is frozen."""
        return f"{described(self.choices, self.probabilities())}{', frozen' * self.frozen}"

    def probabilities(self) -> list[float]:
        """Returns p_φ of each choice.

        Example:
            >>> dict(zip(activation.choices, activation.probabilities()))
            {'relu': 0.5, 'tanh': 0.5}
        """
        numbers: list[float] = self.distribution().probs.tolist()
        return numbers


class BernoulliHyperparameter(CategoricalHyperparameter):
    r"""Yes or no, drawn for each training batch; λ is the logit φ of yes, p = 1 / (1 + e^(−φ)).

    For a skip connection, a layer that may be left out, an augmentation that is made or not; see
    :class:`CategoricalHyperparameter`. Calling it returns True or False.

    Args:
        probability: p at the start (not its logit).

    Raises:
        TypeError: If ``probability`` is not a number.
        ValueError: If it lies outside of [1e-4, 1 − 1e-4].

    Example:
        >>> skip = BernoulliHyperparameter(0.75)
        >>> skip()  # yes is the more probable one
        True
    """

    def __init__(self, probability: float = 0.5) -> None:
        Hyperparameter.__init__(self, probability, UnitInterval())
        self._begin((False, True))

    def distribution(self, raw: Tensor | None = None) -> Categorical:
        """Returns p_φ over (no, yes)."""
        logit = self.raw if raw is None else raw
        return Categorical(
            logits=torch.stack([torch.zeros_like(logit), logit], -1), validate_args=False
        )

    def _certain(self, index: int) -> Tensor:
        return torch.full_like(self.raw, _CERTAIN if index else -_CERTAIN)


def _checked(choices: Any) -> tuple[Any, ...]:
    if isinstance(choices, (str, bytes)) or not isinstance(choices, Iterable):
        raise TypeError(
            f"CategoricalHyperparameter: choices={choices!r}, expected several, in a list"
        )
    if isinstance(choices, (set, frozenset)):
        raise TypeError(
            f"CategoricalHyperparameter: choices={choices!r} is a {type(choices).__name__}, whose "
            "order differs between processes; pass a list"
        )
    if isinstance(choices, Tensor) and choices.dim() == 1:
        choices = choices.tolist()
    found = tuple(choices)
    if len(found) < 2:
        raise ValueError(
            f"CategoricalHyperparameter: choices={list(found)}, expected at least two; what is not "
            "to be chosen needs no hyperparameter"
        )
    for choice in found:
        if isinstance(choice, nn.Module) and any(True for _ in choice.parameters()):
            raise TypeError(
                f"CategoricalHyperparameter: a {type(choice).__name__} has parameters, which would "
                "be no part of the module: keep the branches in an nn.ModuleList, and choose an "
                f"index: CategoricalHyperparameter(range({len(found)}))"
            )
    for i, choice in enumerate(found):
        if any(_is_same(choice, other) for other in found[:i]):
            raise ValueError(
                f"CategoricalHyperparameter: choices={list(found)} has {choice!r} twice"
            )
    return found


def _is_same(a: Any, b: Any) -> bool:
    try:
        return bool(a == b or (a != a and b != b))  # NaN
    except (RuntimeError, ValueError) as error:  # of several numbers
        raise TypeError(
            f"CategoricalHyperparameter: choices that are a {type(a).__name__} cannot be compared "
            f"({error}); choose among indices, range(n), and look them up in a list"
        ) from None


def labels(choices: Sequence[Any]) -> list[str]:
    """Returns names of choices, which differ from each other and from ``"entropy"``."""
    names = [str(getattr(choice, "__name__", choice)) for choice in choices]
    if len({*names, "entropy"}) == len(names) + 1:
        return names
    return [f"{name} ({i})" for i, name in enumerate(names)]


def described(choices: Sequence[Any], probabilities: Sequence[float]) -> str:
    """Returns choices with their probabilities, the most probable ones first."""
    pairs = sorted(zip(probabilities, labels(choices), strict=True), key=lambda pair: -pair[0])
    shown = [f"{choice} {p:.2f}" for p, choice in pairs[:4]]
    return ", ".join(shown) + (", …" if len(pairs) > 4 else "")
