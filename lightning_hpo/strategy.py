"""What the callback chooses where it is told nothing: estimators, intervals, rates."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_hpo._repr import briefly, counted, listed
from lightning_hpo._trainer import length
from lightning_hpo.auto import Starts, agreed
from lightning_hpo.estimators import T1T2, ClipR, Estimator, PolicyGradient
from lightning_hpo.hyper_optimizer import DEFAULT_RATE
from lightning_hpo.hyperparameters import (
    Constraint,
    Hyperparameter,
    Interval,
    Positive,
    UnitInterval,
)
from lightning_hpo.regularizers import Penalty
from lightning_hpo.schedule import UNKNOWN_LENGTH
from lightning_hpo.signal_to_noise import reach

__docformat__ = "google"
__all__ = ["Strategy", "choose_estimators"]

# Steps between two updates, where these are cheap.
INTERVAL = 10
# Tangents and mixed derivatives may cost so many gradients of the training loss per step.
BUDGET = 0.2
# A training has at least so many updates, whatever they cost …
LEAST_UPDATES = 15
# … and, if it is short and they are cheap, rather more.
MANY_UPDATES = 50
# Tangents that advance less often than so many times in a training show little more than one step.
LEAST_ADVANCES = 20
# Forward tangents are carried for at most so many λ.
MOST_TANGENTS = 5
# Tangents forget what lies further back than this part of the training.
MEMORY = 1 / 3
# Half the width, in logits, of differences over keep probabilities. Their variance falls as its
# inverse, their bias grows as its square; λ follows a biased signal better than a noisy one.
LOGIT_STEP = 1.0
# A step whose gradient is not finite does not say where a penalty begins to matter.
LOOKS = 5
# Noise in units of the root mean square of what it is added to.
TYPICAL_NOISE = 0.3
# A start further off than this factor, of a strength or of odds, is taken to be a guess …
FAR = 10.0
# … and so is a penalty stronger than so many times the strength at which it begins to matter …
STRONG = 3.0
# … if the training has so many steps: in a shorter one nothing overfits, and what is typical of
# whole trainings is too strong (of 100 steps by 3 %, of 30 by 25 % of the loss on an MLP).
LONG_ENOUGH = 300
# What a guess is replaced by is found anew until it changes by less than this part of it.
SETTLED = 0.01

# Units in which raw λ travels, in logarithms.
_ONE = torch.ones(())
_OF_A_STRENGTH, _OF_ODDS = Positive().unit(_ONE, _ONE), UnitInterval().unit(_ONE, _ONE)

Assigned = Sequence[tuple[str, Estimator, list[str]]]
"""Estimators, each with a name and the hyperparameters that it serves."""


@dataclass(frozen=True)
class Strategy:
    """What acts in a training: what was given to the callback, and what it has chosen.

    Attributes:
        assigned: The estimators, each with a name and the hyperparameters that it serves.
        every_n_steps: Optimizer steps between two updates.
        steps: The length of the training, in optimizer steps, that rates and memories are fractions
            of.
        is_length_known: Whether that is its length; else it is a guess.
        lr: The factor of the λ-optimizer's rate; None where another optimizer was given.
        is_chosen: Whether the estimators were chosen; else they were given.
        chosen_for: The length that the training had when they were chosen.

    Example:
        >>> callback = OnlineHPOCallback()
        >>> Trainer(callbacks=[callback]).fit(Tuned(), train_loader, validation_loader)
        >>> str(callback.strategy)
        'T1T2() for l2; λ every 1 step; by its signal-to-noise ratio, ... over 20 steps'
    """

    assigned: Assigned
    every_n_steps: int
    steps: int
    is_length_known: bool
    lr: float | None
    is_chosen: bool
    chosen_for: int

    @property
    def drifts(self) -> bool:
        """Whether λ drifts to typical values.

        Example:
            >>> callback.strategy.drifts
            True
        """
        return self.is_chosen and bool(self.lr)

    @property
    def replaces_guesses(self) -> bool:
        """Whether starts far from typical values are replaced by them.

        Example:
            >>> callback.strategy.replaces_guesses  # not in so short a training
            False
        """
        return self.drifts and self.steps >= LONG_ENOUGH

    @property
    def updates(self) -> int:
        """The number of updates in the training.

        Example:
            >>> callback.strategy.updates
            20
        """
        return max(1, self.steps // self.every_n_steps)

    def reach(self, updates: int) -> tuple[float, float] | None:
        """Returns how far the λ-optimizer can move λ in the first updates.

        Args:
            updates: How many.

        Returns:
            The natural logarithms of the factors for a strength and for the odds of a probability,
            about, with Adam; None where λ is to stay, or is moved by an optimizer that was given.

        Example:
            >>> strength, odds = callback.strategy.reach(updates=20)
            >>> strength > odds > 0  # e**strength is the largest factor of a strength
            True
        """
        if not self.lr:
            return None
        if not self.is_chosen:
            return updates * DEFAULT_RATE * self.lr, updates * DEFAULT_RATE * self.lr
        units = self.lr * reach(updates, self.updates, is_known=self.is_length_known)
        return units * _OF_A_STRENGTH, units * _OF_ODDS

    def __str__(self) -> str:
        parts = [
            f"{briefly(estimator)} for {_some(names)}" for _, estimator, names in self.assigned
        ]
        parts.append(f"λ every {counted(self.every_n_steps, 'step')}")
        if self.lr is not None and not self.is_chosen:
            parts.append(f"by Adam({DEFAULT_RATE * self.lr:g})")
        elif self.lr is not None:
            factor = "" if self.lr == 1 else f" × {self.lr:g}"
            parts.append(f"by its signal-to-noise ratio{factor}, at a rate that falls")
        length = f"over {counted(self.steps, 'step')}"
        unknown = "" if self.is_length_known else " (the length of the training is not known)"
        return f"{'; '.join(parts)} {length}{unknown}"


def choose(
    trainer: pl.Trainer,
    hyperparameters: Mapping[str, Hyperparameter],
    first_step: int,
    *,
    chosen_for: int | None = None,
    assigned: Assigned | None,
    outside_loss: Collection[str],
    every_n_steps: int | None,
    lr: float | None,
) -> Strategy:
    """Chooses what is not given.

    Args:
        trainer: The trainer, at the start of a training.
        hyperparameters: All that are tuned, by name.
        first_step: The trainer's ``global_step`` when the training with the callback began.
        chosen_for: The length for which estimators were chosen, if the training goes on from a
            checkpoint. Its state is theirs.
        assigned: The estimators that were given, if any.
        outside_loss: The names of those that act on the gradient or in the optimizer, not in the
            training loss.
        every_n_steps: The interval that was given, if any.
        lr: The factor of the rate; None where a λ-optimizer was given.
    """
    end = length(trainer)
    is_known = math.isfinite(end)
    steps = max(1, int(end) - first_step) if is_known else UNKNOWN_LENGTH
    is_chosen = assigned is None
    if assigned is None:
        assigned, every_n_steps = choose_estimators(
            hyperparameters, outside_loss, chosen_for or steps, every_n_steps
        )
    assert every_n_steps is not None
    return Strategy(assigned, every_n_steps, steps, is_known, lr, is_chosen, chosen_for or steps)


def choose_estimators(
    hyperparameters: Mapping[str, Hyperparameter],
    outside_loss: Collection[str],
    steps: int,
    every_n_steps: int | None = None,
) -> tuple[list[tuple[str, Estimator, list[str]]], int]:
    """Chooses estimators and the steps between two updates, by cost and length.

    Few scalars get tangents (``ClipR`` without a radius), which see what λ has done since about a
    third of the training, once per update: each costs a product with the Hessian, about three
    gradients of the training loss. The rest, or all where that would cost too much, gets ``T1T2``,
    which sees one step but costs no more for many λ than for one. What acts by random masks costs
    two gradients per λ either way. Choices get ``PolicyGradient``.

    Args:
        hyperparameters: All that are tuned, by name.
        outside_loss: Those that act on the gradient or in the optimizer, not in the loss.
        steps: The length of the training, in optimizer steps.
        every_n_steps: The interval, if it is given, likewise.

    Returns:
        The estimators, each with a name and the hyperparameters that it serves, and the interval.

    Example:
        >>> strength = Hyperparameter(1e-4, Positive())
        >>> strategy.choose_estimators({"l2": strength}, outside_loss=["l2"], steps=6000)
        ([('tangents', ClipR(...), ['l2'])], 15)
    """
    choices = [n for n, h in hyperparameters.items() if h.is_policy]
    hyperparameters = {n: h for n, h in hyperparameters.items() if n not in choices}
    sizes = {name: h.raw.numel() for name, h in hyperparameters.items()}
    masked = sum(sizes[n] for n, h in hyperparameters.items() if h.difference_step is not None)
    smooth = [n for n, h in hyperparameters.items() if h.difference_step is None]
    scalars = [name for name, size in sizes.items() if size == 1]
    tangents = scalars if len(scalars) <= MOST_TANGENTS else []
    rest = [name for name in hyperparameters if name not in tangents]

    def interval(gradients: int) -> int:
        wanted = min(INTERVAL, steps // MANY_UPDATES)
        affordable = min(math.ceil(gradients / BUDGET), steps // LEAST_UPDATES)
        return max(1, wanted, affordable)

    policies: list[tuple[str, Estimator, list[str]]] = []
    if choices:
        policies = [("choices", PolicyGradient(), choices)]
        masked += 1  # a mixed derivative
    one_step = 2 * masked + (2 if any(n not in outside_loss for n in smooth) else 0)
    both = 2 * masked + 3 * len(tangents)
    if not tangents or both / BUDGET > steps / LEAST_ADVANCES:
        others: list[tuple[str, Estimator, list[str]]] = []
        if hyperparameters:
            others = [("*", T1T2(), list(hyperparameters))]
        return others + policies, every_n_steps or interval(one_step)
    every = every_n_steps or interval(both)
    stride = max(every, interval(both))
    clip = ClipR(radius=math.inf, decay=math.exp(-1 / (MEMORY * steps)), stride=stride)
    assigned: list[tuple[str, Estimator, list[str]]] = [("tangents", clip, tangents)]
    if rest:
        assigned.append(("one step", T1T2(), rest))
    return assigned + policies, every


class TypicalValues(dict[Hyperparameter, Tensor]):
    """Raw λ that are usual for their kinds, where these are known.

    Those of penalties and of weight decay are where they begin to matter over the training (see
    :mod:`lightning_hpo.auto`), which is known once there is a gradient.

    Args:
        hyperparameters: All that are tuned, by name.
    """

    def __init__(self, hyperparameters: Mapping[str, Hyperparameter]) -> None:
        super().__init__()
        self._names = {h: name for name, h in hyperparameters.items()}
        self._looks_left = LOOKS
        self._strengths: set[Hyperparameter] = set()
        for h in hyperparameters.values():
            vars(h).pop("input_size", None)  # of a training before this one
            if h.typical is not None:
                self._put(h, h.typical)

    def _put(self, h: Hyperparameter, value: float) -> None:
        with suppress(ValueError):  # its constraint says otherwise
            self[h] = h.constraint.inverse(torch.full_like(h.raw, value))

    @property
    def is_complete(self) -> bool:
        """Whether no look is left to be taken."""
        return self._looks_left == 0

    def look(self, trainer: pl.Trainer, penalties: Sequence[Penalty]) -> list[Hyperparameter]:
        """Finds those that need a gradient, which is complete now and without these penalties.

        Returns:
            Those that have been found.
        """
        self._looks_left -= 1
        starts = Starts(trainer, at_step=True)
        known = [p for p in penalties if p.hyperparameter in self._names]
        strengths = {p.hyperparameter: starts.penalty(p) for p in known}
        for h, name in self._names.items():
            if name == "optimizer.weight_decay":
                strengths[h] = starts.weight_decay(trainer.optimizers[0])
        self._strengths |= strengths.keys()
        values = {h: math.nan if s is None else s.value for h, s in strengths.items()}
        for h in self._names:
            if h.typical is None and "input_size" in vars(h):
                values[h] = TYPICAL_NOISE * vars(h)["input_size"]
        found = self._put_agreed(trainer, values)
        if len(found) == len(values):
            self._looks_left = 0
        return found

    def look_at_inputs(
        self, trainer: pl.Trainer, sizes: Mapping[Hyperparameter, float]
    ) -> list[Hyperparameter]:
        """Finds those of noise, of which it is known what they are added to.

        Args:
            trainer: The trainer.
            sizes: The root mean squares of these inputs.

        Returns:
            Those that have been found.
        """
        sizes = {h: sizes.get(h, math.nan) for h in self._names if h.typical is None}
        return self._put_agreed(trainer, {h: TYPICAL_NOISE * size for h, size in sizes.items()})

    def _put_agreed(
        self, trainer: pl.Trainer, values: Mapping[Hyperparameter, float]
    ) -> list[Hyperparameter]:
        found = []
        for h, value in zip(values, agreed(trainer, list(values.values())), strict=True):
            if 0 < value < math.inf:
                self._put(h, value)
                found.append(h)
        return found

    def replace_guesses(
        self, hyperparameters: Iterable[Hyperparameter], replaced: Set[Hyperparameter] = frozenset()
    ) -> list[str]:
        """Lets those start at their typical values that start far away from there.

        More than ten times a strength, or the odds of a probability, away; or more than three times
        the strength at which a penalty begins to matter: too strong a one does damage early, of
        which a training does not recover. Such a start is taken to be a guess. What was assigned,
        loaded or tuned is none.

        Args:
            hyperparameters: Which to look at.
            replaced: Those that have been replaced already, and follow a value that has changed.

        Returns:
            The names of those that have moved.
        """
        moved = {}
        for h in hyperparameters:
            typical = self.get(h)
            if typical is None or not (h.is_resolved and h.is_initial):
                continue
            low, high = _neighborhood(
                h.constraint, typical, STRONG if h in self._strengths else FAR
            )
            is_far = (h.raw < low) | (h.raw > high)
            if h in replaced:
                is_far |= ~h.raw.isclose(typical, rtol=SETTLED, atol=0.0)
            if bool(is_far.any()):
                before = float(h.value.mean())
                h.raw.copy_(torch.where(is_far, typical, h.raw))
                moved[self._names[h]] = f"{before:.3g} → {float(h.value.mean()):.3g}"
        if moved:
            changes = _some([f"{name} {change}" for name, change in moved.items()])
            rank_zero_info(
                f"OnlineHPOCallback: {changes}: the start is far from what is typical, and taken "
                "to be a guess. Pass an optimizer= to start there all the same"
            )
        return list(moved)

    def settle(self) -> None:
        """Notes that λ are no longer what they were made with."""
        for h in self._names:
            h.is_initial = False

    def state_dict(self) -> dict[str, Any]:
        """Returns the raw values, by name, and what is still to be found."""
        return {
            "raws": {self._names[h]: raw for h, raw in self.items()},
            "initial": [name for h, name in self._names.items() if h.is_initial],
            "looks": self._looks_left,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores them."""
        for h, name in self._names.items():
            if name in state["raws"]:
                self[h] = state["raws"][name].to(h.raw.device)
            h.is_initial = name in state["initial"]
        self._looks_left = state["looks"]


def _neighborhood(constraint: Constraint, typical: Tensor, above: float) -> tuple[Tensor, Tensor]:
    """Returns the smallest and the largest raw λ that is no mere guess.

    A tenth of the value and ``above`` times it; of the odds where it lies between two bounds.
    """
    down, up = math.log(FAR), math.log(above)
    if isinstance(constraint, (Positive, UnitInterval)):
        return typical - down, typical + up
    size = typical - constraint.low if isinstance(constraint, Interval) else typical
    inside = bool((size > 0).all())
    if isinstance(constraint, Interval) and math.isfinite(constraint.low) and inside:
        if math.isinf(constraint.high):
            return constraint.low + size / FAR, constraint.low + size * above
        width = constraint.high - constraint.low
        if bool((size < width).all()):
            odds = (size / width).logit()
            low, high = ((odds + d).sigmoid() * width + constraint.low for d in (-down, up))
            return low, high
    return torch.full_like(typical, -math.inf), torch.full_like(typical, math.inf)


_some = partial(listed, most=4)
