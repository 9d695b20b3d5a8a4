"""PolicyGradient: choices, learned by their probabilities."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Collection
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_hpo._arguments import (
    check_choice,
    check_count,
    check_flag,
    check_integer,
    check_number,
    named_arguments,
)
from lightning_hpo._lightning import MisconfigurationException
from lightning_hpo.choices import Indices
from lightning_hpo.estimators.base import Estimate, Estimator
from lightning_hpo.estimators.implicit import Implicit
from lightning_hpo.estimators.t1t2 import T1T2
from lightning_hpo.estimators.unroll import UnrollK
from lightning_hpo.step import ExpectedValidation, Space, Step, ValidationGradient

Baseline = Literal["average", "leave_one_out", "none"]
BASELINES = get_args(Baseline)

# How fast moving averages forget.
_KEPT = 0.9


class PolicyGradient(Estimator):
    r"""dE[L_V]/dφ of choices a ~ p_φ (Adam & Lorraine 2018, eq. 2), direct and response gradient.

        direct   = E[(L_V(θ, a) − b) ∇φ log p_φ(a)]
        response = E[(⟨u, ∇θL_T(θ, a)⟩ − b') ∇φ log p_φ(a)]
        estimate = direct + response − entropy · ∇φ H(p_φ)

    The direct gradient is REINFORCE on held-out losses of choices that are drawn for the update, or
    exact where all choices together are few: Σ_a L_V(θ, a) ∇φ p_φ(a). The response gradient, which
    ENAS (Pham et al. 2018) takes to be 0, is what the choices of the training steps have done to θ:
    Bᵀu with u of another estimator, B = E[∇θL_T(θ, a) ∇φ log p_φ(a)ᵀ]. The response is right to
    first order in the length of a step, since L_V is taken to be linear between the θ that
    different choices lead to.

    What a step does with the gradient is linearized at the gradient of the choice that was drawn.
    Clipping, which leaves the length of a gradient as it is, so takes the response away, and says
    so at the start; the first steps of Adam, whose size does not depend on the gradient, distort
    it, by a factor of up to 3. With SGD, momentum, and Adam after its first steps it is right.

    An option of the optimizer has a response only. Choices of ``lr`` are learning rates; under a
    scheduler, or where the parameter groups differ in it, they are factors of the rates in force,
    as a continuous one is.

    Cost per update: one validation gradient for each choice that is looked at, and the cost of the
    other estimator. Memory: twice θ, and that of the other estimator.

    Args:
        estimator: Gives the response: :class:`T1T2` (the default), :class:`UnrollK` or
            :class:`Implicit`.
        response: With False, the response is left out: ENAS. Options of the optimizer are refused.
        samples: How many choices are drawn for an update, where they are too many to look at all.
        baseline: b. ``"average"``: a moving average of held-out losses; ``"leave_one_out"``: the
            mean loss of the other samples; ``"none"``: 0. b' is a moving average of earlier
            responses, or with ``"none"`` 0. They leave the mean of the estimate as it is.
        entropy: A bonus for the entropy H of p_φ, in units of the loss, against early decisions.
        enumerate_up_to: With at most so many combinations of choices the direct gradient is exact,
            and so is H of an :class:`LSTMController` that decides about no more, those of options
            included. Else they are estimated by ``samples`` choices.

    Raises:
        TypeError: If ``estimator`` is none of these, or a flag or number is of the wrong type.
        ValueError: If ``baseline`` is unknown, ``"leave_one_out"`` has fewer than two samples, or a
            number is out of range.
        MisconfigurationException: At the start of a training, if options of the optimizer are
            tuned with ``response=False``, or with an ``estimator`` that refuses them.

    Example:
        >>> class Searched(LitModel):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.skip = BernoulliHyperparameter()
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         x, y = batch
        ...         return F.cross_entropy(self.net(x) + self.skip() * x[:, :3], y)
        ...
        ...     validation_step = training_step
        >>> callback = OnlineHPOCallback(PolicyGradient(T1T2()), every_n_steps=5)
        >>> Trainer(callbacks=[callback]).fit(Searched(), train_loader, validation_loader)
        >>> len(callback.history)
        4
    """

    @named_arguments("PolicyGradient")
    def __init__(
        self,
        estimator: Estimator | None = None,
        response: bool = True,
        samples: int = 2,
        baseline: Baseline = "average",
        entropy: float = 0.0,
        enumerate_up_to: int = 8,
    ) -> None:
        name = "PolicyGradient"
        check_flag(name, response=response)
        check_choice(name, BASELINES, baseline=baseline)
        check_count(name, samples=samples)
        check_integer(name, 0, enumerate_up_to=enumerate_up_to)
        check_number(name, "a finite number ≥ 0", lambda x: 0 <= x < math.inf, entropy=entropy)
        if baseline == "leave_one_out" and samples < 2:
            raise ValueError(
                f"{name}: baseline='leave_one_out' with samples={samples}, expected at least 2: it "
                "is the mean of the others"
            )
        estimator = T1T2() if estimator is None else estimator
        if not serves_choices(estimator):
            raise TypeError(
                f"{name}: estimator={estimator!r} cannot give the response of choices, expected "
                "T1T2(), UnrollK or Implicit: others would carry the noise of every earlier draw, "
                "or are no derivatives"
            )
        self.estimator = estimator
        self.response = response
        self.samples = samples
        self.baseline = baseline
        self.entropy = float(entropy)
        self.enumerate_up_to = enumerate_up_to
        self.horizon = estimator.horizon if response else 1
        self.window = estimator.window if response else 0
        self.uses_hessian = response and estimator.uses_hessian
        self.restart = response and estimator.restart
        self.follows_statistics = response and estimator.follows_statistics

    def setup(self, space: Space) -> None:
        """Starts a training."""
        super().setup(space)
        if not self.response and space.options:
            raise MisconfigurationException(
                f"PolicyGradient(response=False) cannot learn {space.options}: options of the "
                "optimizer act on the held-out loss by the response alone. Leave response=True, or "
                "give them no choices"
            )
        self._inner = copy.copy(self.estimator)
        if isinstance(self._inner, Implicit):
            self._inner.enumerate_up_to = self.enumerate_up_to
        self._inner.setup(space)
        # A mean over all choices has no noise that a baseline could take away.
        self._is_noisy = not (isinstance(self._inner, Implicit) and self._inner.is_exact)
        self._is_told = False
        self._policy = list(space.hyperparameters.values())
        self._choices = space.training.choices
        options = space.training.options
        of_optimizer = set() if options is None else set(options.choices)
        own = [n for n in self._choices.decided_by(self._policy) if n not in of_optimizer]
        self._names = self._choices.relevant(own)
        self._score = self._zeros()
        self._mean_loss = math.nan
        self._mean_response = 0.0

    @property
    def kind(self) -> str:
        """That of the other estimator is a part of it."""
        inner = self._inner.kind if self.response else "no response"
        return f"PolicyGradient({inner})"

    def draws(self, *place: object) -> list[tuple[Indices, float]]:
        """Returns the choices to look at in an update, each with its weight in the mean loss.

        Args:
            place: What identifies the update.
        """
        choices = self._choices
        self._is_exact = choices.number(self._names) <= self.enumerate_up_to
        if not self._is_exact:
            return [(choices.sample(*place, i), 1 / self.samples) for i in range(self.samples)]
        others = choices.sample(*place)
        return [({**others, **own}, weight) for own, weight in choices.every(self._names)]

    def observe(self, step: Step) -> None:
        """Lets the other estimator see the step."""
        self._inner.observe(step)
        if self._is_noisy:
            drawn = step.point.choices
            score = self._choices.score(self._policy, drawn, drawn.keys())
            torch._foreach_add_(self._score, score)

    def hypergradient(self, validation: ValidationGradient) -> Estimate | None:
        """Returns direct and response gradient, with respect to raw λ: logits φ."""
        assert isinstance(validation, ExpectedValidation)
        total = self._zeros()
        outcome = None
        if self.response:
            estimate = self._inner.hypergradient(validation)
            score, self._score = self._score, self._zeros()
            if estimate is None:
                return None
            outcome = estimate.outcome
            torch._foreach_add_(total, estimate.gradients)
            self._subtract_baseline_(total, score)
        torch._foreach_add_(total, self._direct(validation))
        if self.entropy:
            drawn = [indices for indices, _ in validation.drawn]
            slope = self._choices.entropy_slope(self._policy, drawn, self.enumerate_up_to)
            torch._foreach_add_(total, slope, alpha=-self.entropy)
        return Estimate(total, outcome=outcome)

    def _subtract_baseline_(self, response: list[Tensor], score: list[Tensor]) -> None:
        """Subtracts b' Σ ∇φ log p_φ(a) over the steps of the window, whose mean is 0."""
        size = sum(float(s.square().sum()) for s in score)
        if self.baseline == "none" or not size > 0:
            return
        pairs = zip(response, score, strict=True)
        found = sum(float((r * s).sum()) for r, s in pairs) / size
        torch._foreach_add_(response, score, alpha=-self._mean_response)
        if math.isfinite(found):
            self._mean_response += (1 - _KEPT) * (found - self._mean_response)

    def _direct(self, validation: ExpectedValidation) -> list[Tensor]:
        """Returns the direct gradient, of the choices that the held-out loss depends on."""
        losses = validation.losses()
        drawn = validation.drawn
        self._tell_of_losses(losses, [indices for indices, _ in drawn], validation.asked)
        factors: list[float]
        if self._is_exact:
            weights = [weight for _, weight in drawn]
            mean = sum(w * loss for w, loss in zip(weights, losses, strict=True))
            # Without a baseline the sum is the same, but for rounding.
            factors = [w * (loss - mean) for w, loss in zip(weights, losses, strict=True)]
        else:
            factors = [
                (loss - self._baseline(losses, i)) / len(losses) for i, loss in enumerate(losses)
            ]
            mean = sum(losses) / len(losses)
        if math.isfinite(mean):
            before = self._mean_loss if math.isfinite(self._mean_loss) else mean
            self._mean_loss = _KEPT * before + (1 - _KEPT) * mean
        total = self._zeros()
        for (indices, _), factor in zip(drawn, factors, strict=True):
            score = self._choices.score(self._policy, indices, validation.asked & indices.keys())
            torch._foreach_add_(total, score, alpha=factor)
        return total

    def _tell_of_losses(
        self, losses: list[float], drawn: list[Indices], asked: Collection[str]
    ) -> None:
        """Warns once of choices under which the held-out loss is not finite, or that it ignores."""
        if not (self._is_told or self.response or asked):
            self._is_told = True
            warnings.warn(
                "PolicyGradient(response=False) learns nothing: the held-out loss asks for none of "
                f"the choices {self._names}, so that they act on it by the response alone. Leave "
                "response=True",
                stacklevel=2,
            )
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if self._is_told or not bad:
            return
        self._is_told = True
        indices = drawn[bad[0]]
        names = [name for name in indices if name in asked]
        shown = ", ".join(f"{n}={self._choices[n].choices[indices[n]]!r}" for n in names)
        warnings.warn(
            f"PolicyGradient: the held-out loss is {losses[bad[0]]} with {shown}; λ stays where it "
            "is in updates that look at such choices. Remove them, or see to it that their loss is "
            "finite",
            stacklevel=2,
        )

    def _baseline(self, losses: list[float], i: int) -> float:
        if self.baseline == "leave_one_out":
            return (sum(losses) - losses[i]) / (len(losses) - 1)
        if self.baseline == "none" or not math.isfinite(self._mean_loss):
            return 0.0
        return self._mean_loss

    def _zeros(self) -> list[Tensor]:
        return [torch.zeros_like(raw) for raw in self.space.raws]

    def state_dict(self) -> dict[str, Any]:
        """Returns the moving averages, and the state of the other estimator."""
        return {
            "inner": self._inner.state_dict(),
            "score": self._score,
            "mean_loss": self._mean_loss,
            "mean_response": self._mean_response,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores them."""
        self._inner.load_state_dict(state["inner"])
        self._score = [s.to(raw) for s, raw in zip(state["score"], self.space.raws, strict=True)]
        self._mean_loss = state["mean_loss"]
        self._mean_response = state["mean_response"]


def serves_choices(estimator: Estimator) -> bool:
    """Whether an estimator can give the response of choices."""
    if isinstance(estimator, T1T2):
        return estimator.scale_by_lr  # else it is no derivative, to which a direct one can be added
    return isinstance(estimator, (UnrollK, Implicit))
