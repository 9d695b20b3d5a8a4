"""What one training has shown, in words: a summary, and warnings of what went wrong."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_hpo._repr import counted, listed
from lightning_hpo._stopwatch import Stopwatch
from lightning_hpo._tensors import widened
from lightning_hpo.distributed import local, norm_over_shards
from lightning_hpo.estimators import ClipR, Estimator, UnrollK
from lightning_hpo.hyperparameters import (
    CategoricalHyperparameter,
    Constraint,
    Hyperparameter,
    Interval,
    Positive,
    Softmax,
    UnitInterval,
    described,
)
from lightning_hpo.hyperparameters.constraints import Unconstrained
from lightning_hpo.monitoring import History, HistoryRecord
from lightning_hpo.overlap import overlap
from lightning_hpo.validation_value import NAMES

# An effect is measurable if a whole unit of raw λ moves L_V by this part of it.
MEASURABLE = 1e-4
# Fewer updates say nothing about a training.
FEW_UPDATES = 20
# Forward tangents of more λ than this cost more than reverse estimators do.
MANY = 20
# That of a dead network is the noise of what is left of it: less than this part of L_V.
INSIGNIFICANT = 1e-3
# The gradient does not reach half of θ if that gets less than this part of it: of a network that
# learns it gets about 0.7, of one that too much L2 or dead units have killed 0.01 to 0.11.
REACHED = 0.15
# Gradients are looked at every so many updates until they are found not to reach half of θ: a pass
# over θ at each update is 1 % of a step of a large MLP.
LOOK_EVERY = 10
# A training has learned something if it has lowered L_V by more than this part.
LEARNED = 0.1
# A training has ended early if it has had less than this part of its steps.
EARLY = 0.9
# Hypergradients have a direction where their mean is larger than this part of their size.
DIRECTED = 0.7
# The held-out loss has risen again if its last mean (of a tenth of the updates, or so many) exceeds
# the lowest by more than this part of it, and by so many standard errors of the two. The lowest of
# many is low by chance: of steady noise it is said in 2 of 100 trainings, with two errors in 30.
FEW_LOSSES = 5
RISEN = 0.1
ERRORS = 4
# Updates are few if they can move λ by less than this factor.
NEAR = 10.0
# Of one training: so many values of the validation loss, at least, in the half that is looked at.
FEW_VALIDATIONS = 4

_ROWS = 10
_NAMES = 5


Tables = Mapping[str, Mapping[str, Tensor]]
"""The history as numbers; see :meth:`~lightning_hpo.monitoring.History.tables`."""


@dataclass
class Subject:
    """What is known of a hyperparameter besides its history.

    Attributes:
        constraint: Its constraint.
        initial: Its value before the first update, as in the history.
        radius: Where ``ClipR`` clips its tangent.
        span: How many steps back its hypergradient sees; ``inf``: all.
        is_option: Whether it is an option of the model's optimizer.
        choices: What it chooses from, if its values are probabilities of choices.
    """

    constraint: Constraint
    initial: Any
    radius: float = math.inf
    span: float = math.inf
    is_option: bool = False
    choices: tuple[Any, ...] = ()

    @classmethod
    def of(cls, name: str, h: Hyperparameter, initial: Any, estimator: Estimator | None) -> Subject:
        """Describes a hyperparameter and the estimator that serves it."""
        subject = cls(h.constraint, initial, is_option=name.startswith("optimizer."))
        if isinstance(h, CategoricalHyperparameter):
            subject.choices = h.choices
        if isinstance(estimator, ClipR):
            subject.radius = estimator.radius
            kept = estimator.decay**estimator.stride
            subject.span = estimator.stride / (1 - kept) if kept < 1 else math.inf
        elif estimator is not None and estimator.window is not None:
            subject.span = estimator.window
        return subject


@dataclass
class Diagnosis:
    """What one training has shown, besides its history; each warning is given once.

    Plain data, so that it can be copied along with the callback.

    Attributes:
        subjects: The hyperparameters, by name.
        clock: The time of the training, and what of it was spent here.
        is_told: Whether this process warns: only the first one does.
        steps: How many steps were taken with the callback.
        every: The callback's ``every_n_steps``.
        warmup: Its ``warmup_steps``.
        first_due: The first step after which λ is updated; None where that is not known.
        planned: How many steps there were to be with the callback; ``inf`` if that is not known.
        has_ended: Whether the training is over.
        replaced: The λ whose starts were taken for guesses, and replaced.
        validations: The step and the loss of each validation on other data than the tuned ones.
        is_fresh: Whether validations are on other data; None where that was not looked at yet.
        dead: How many updates in a row have found the network dead. As long as it is 0, one of
            ``LOOK_EVERY`` updates looks.
        warned: What has been warned about.
    """

    subjects: dict[str, Subject] = field(default_factory=dict)
    clock: Stopwatch = field(default_factory=Stopwatch)
    is_told: bool = True
    steps: int = 0
    every: int = 1
    warmup: int = 0
    first_due: int | None = None
    planned: float = math.inf
    has_ended: bool = False
    replaced: set[str] = field(default_factory=set)
    validations: list[tuple[int, float]] = field(default_factory=list)
    is_fresh: bool | None = None
    dead: int = 0
    warned: set[str] = field(default_factory=set)

    def warn(self, kind: str, text: str) -> None:
        """Warns once of each kind."""
        if kind not in self.warned and self.is_told:
            warnings.warn(f"OnlineHPOCallback: {text}", stacklevel=3)
        self.warned.add(kind)

    # -------------------------------------------------------------------------------- at the start

    def look_at_data(self, train: Sequence[Any], held_out: Sequence[Any]) -> None:
        """Warns where λ are fitted to the data that θ is trained on."""
        if overlap(train, held_out):
            self.warn(
                "same data",
                "the held-out data are training data: both draw from the same dataset, with "
                "examples in common. λ that weaken regularization then always look better. Pass a "
                "dataloader= of other examples, for example one part of torch.utils.data."
                "random_split and the other for training",
            )

    def look_at_estimators(
        self,
        assigned: Sequence[tuple[str, Estimator, list[str]]],
        sizes: Mapping[str, int],
        theta: Sequence[Tensor],
    ) -> None:
        """Warns where forward tangents are asked for many λ."""
        for _, estimator, names in assigned:
            m = sum(sizes[name] for name in names)
            if m <= MANY or not _is_forward(estimator, m):
                continue
            mib = m * sum(local(p).numel() * p.element_size() for p in theta) / 2**20
            k = estimator.k if isinstance(estimator, UnrollK) else 10
            self.warn(
                "many",
                f"{type(estimator).__name__} carries forward tangents of {m} λ: {m} products with "
                f"the Hessian at each step, and at least {mib:.3g} MiB of tangents. Reverse "
                "estimators cost the same for any number of λ: T1T2(), one validation gradient "
                f'per update; UnrollK({k}, mode="reverse"), {k} products per update; Implicit(), '
                "one product per iteration of its solver",
            )

    def look_at_length(self, steps: float) -> None:
        """Warns where the training will end before the first update.

        Args:
            steps: How many steps there will be with the callback; ``inf`` where that is not known.
        """
        if self.first_due is not None and 0 < steps < self.first_due:
            self.warn("no update", self._too_short(f"will end after step {steps:g}"))

    def _too_short(self, what: str) -> str:
        return (
            f"this training {what}, and the first update of λ is due after step {self.first_due} "
            f"(every_n_steps={self.every}, warmup_steps={self.warmup}): λ stays where it is. "
            "Train longer, or make every_n_steps (with the window of UnrollK) or warmup_steps less"
        )

    # ------------------------------------------------------------------------------ while it trains

    def note_starts(self, initial: Mapping[str, Any]) -> None:
        """Notes the starts that were not known when the training began."""
        for name, subject in self.subjects.items():
            if subject.initial != subject.initial:  # NaN
                subject.initial = initial[name]

    def look_at_direct_parts(self, names: Sequence[str]) -> None:
        """Warns where L_V itself reads λ.

        Args:
            names: Which it reads.
        """
        if names:
            self.warn(
                "direct",
                f"the held-out loss is computed with λ itself: {_some(names)}. Hypergradients "
                "follow how λ acts through the weights, and take it for constant there; and losses "
                "at different λ cannot be compared. Let it act in training_step alone: return the "
                "plain loss from validation_step (of several losses, the main one without the "
                "weights), or pass validation_loss=. What belongs to the network itself, as the "
                "slope of an activation, is better an nn.Parameter",
            )

    def look_at_update(
        self,
        history: History,
        record: HistoryRecord,
        theta: Sequence[Tensor],
        *,
        sharded: bool = False,
    ) -> None:
        """Warns where the network is dead, at the end of an update's step.

        That is where hypergradients vanish, L_V is no better than at the first update, and the
        gradient of the training, as the step has left it, does not reach half of θ. Gradients are
        looked at last: on a GPU, the host waits for that.
        """
        if not self.dead and len(history) % LOOK_EVERY:
            return
        is_dead = (
            _learned_nothing(record, history.loss_at(0))
            and _is_insignificant(record)
            and _share_of_half(theta, sharded) < REACHED
        )
        self.dead = self.dead + 1 if is_dead else 0
        if self.dead >= FEW_UPDATES:
            self._tell_dead(history)

    def _tell_dead(self, history: History) -> None:
        record = history[-1]
        values = [f"{name} = {_short(value)}" for name, value in list(record.values.items())[:3]]
        self.warn(
            "dead",
            f"the network is dead: for {self.dead} updates up to step {record.step} its gradient "
            "does not reach half of the parameters, the hypergradients vanish, and the held-out "
            f"loss is {record.loss:.4g}, that of a constant prediction (it was "
            f"{history.loss_at(0):.4g} at the first update). No hypergradient leads out of this. "
            f"Start anew with weaker regularization (now {', '.join(values)}) or a smaller "
            "learning rate",
        )

    def look_at_validation(
        self,
        step: int,
        metrics: Mapping[str, Any],
        monitor: str | None,
        is_fresh: Callable[[], bool],
    ) -> None:
        """Keeps the loss of a validation by Lightning, if it is on other data than the tuned ones.

        Args:
            step: The number of steps taken.
            metrics: The trainer's ``callback_metrics``.
            monitor: The callback's argument.
            is_fresh: Whether λ has not seen these data.
        """
        names = NAMES if monitor is None else (monitor,)
        value = next((metrics[name] for name in names if name in metrics), None)
        if value is None:
            return
        if self.is_fresh is None:
            self.is_fresh = is_fresh()
        if self.is_fresh:
            self.validations.append((step, float(value)))

    # ---------------------------------------------------------------------------------- at the end

    def look_back(self, history: History, skipped: int) -> None:
        """Warns of what the whole training shows.

        Args:
            history: Its updates.
            skipped: How many of them were skipped.
        """
        if self.steps == 0:
            return
        if len(history) == skipped:
            self._tell_no_update(history)
            return
        if self.dead > 1 and len(history) >= FEW_UPDATES:
            self._tell_dead(history)
        elif skipped > len(history) / 2:
            self.warn(
                "skipped",
                f"{skipped} of the {len(history)} updates were skipped, since their hypergradients "
                "were not finite. Look at the training loss and at validation_step for what makes "
                "L_V or its gradient NaN or infinite, and at λ for what makes it overflow",
            )
        tables = history.tables()
        self._tell_bounds(tables)
        if len(history) < FEW_UPDATES:
            return
        self._tell_clipped(tables)
        if "dead" not in self.warned:  # it says the same, and why
            self._tell_effects(history, tables)
        self._tell_overfitted(history)

    def _tell_no_update(self, history: History) -> None:
        if len(history) > 0:
            text = (
                f"none of the {len(history)} updates was made, since no hypergradient was finite. "
                "Look at the held-out batches and at validation_step for what makes L_V or its "
                "gradient NaN or infinite"
            )
        elif self.first_due is not None and self.steps < self.first_due:
            text = self._too_short(f"has ended after step {self.steps}")
        else:
            text = (
                f"there was no update of λ in the {self.steps} steps of this training: "
                "should_update() was never True, or the window of no estimator was complete"
            )
        self.warn("no update", text)

    def _tell_bounds(self, tables: Tables) -> None:
        found = {}
        for name, subject in self.subjects.items():
            values = tables["values"].get(name)
            side = None if values is None else _side(subject, values[-1])
            if side is not None:
                found[name] = side
        if found:
            self.warn(
                "bound",
                f"λ sits at a bound: {_some([f'{n} at its {s}' for n, s in found.items()])}. "
                "The optimum may lie beyond it: give its Hyperparameter a wider constraint=. If "
                "the bound means that it is switched off, leave it out. If it was driven there "
                "against what you expect, forget old tangents (decay= of ClipR below 1), or take a "
                "smaller learning rate of λ",
            )

    def _tell_clipped(self, tables: Tables) -> None:
        shares = {name: self._clipped(name, tables) for name in self.subjects}
        found = {name: share for name, share in shares.items() if share > 0.5}
        if found:
            parts = [f"{name} in {share:.0%}" for name, share in found.items()]
            self.warn(
                "radius",
                f"the tangent sits at the radius of ClipR: {_some(parts)} of the updates. Its "
                "direction may be long out of date. Pass a larger radius=, or a decay= below 1, "
                "such as 0.99, which forgets old steps before they fill the ball",
            )

    def _clipped(self, name: str, tables: Tables) -> float:
        """Returns the share of the updates in which the tangent was at the radius."""
        radius = self.subjects[name].radius
        norms = tables["tangent_norms"].get(name)
        if norms is None or math.isinf(radius):
            return 0.0
        # In rounding, a clipped norm comes out a little smaller as well.
        return float((_elements(norms, self.subjects[name]) > radius * (1 - 1e-4)).double().mean())

    def _tell_effects(self, history: History, tables: Tables) -> None:
        losses = history.losses().abs()
        parts = []
        for name, subject in self.subjects.items():
            gradients = tables["hypergradients"].get(name)
            if gradients is None or subject.choices or not subject.span:
                continue  # what a choice does at once is no sum over windows
            if isinstance(subject.initial, dict):
                gradients = gradients[:, [0, 2]]  # the smallest and the largest
            # What a change of λ over the whole training does is the sum of what windows show.
            windows = max(1.0, self.steps / subject.span)
            effects = windows * gradients.abs().amax(1) / losses
            known = torch.isfinite(effects)
            if int(known.sum()) < FEW_UPDATES:
                continue
            effects = torch.where(known, effects, 0.0)
            at = int(effects.argmax())
            largest = float(effects[at])
            if largest >= MEASURABLE:
                continue
            text = f"{name} ({largest:.2g} of L_V at most"
            if math.isfinite(subject.span):
                text += f", as windows of {counted(int(subject.span), 'step')} show it"
            text += ")"
            if largest > 0 and isinstance(subject.constraint, Positive):
                # A strength's effect is proportional to it as long as it is small.
                value = float(_elements(tables["values"][name], subject)[at].max())
                text += f", measurable from about {_rounded_up(value * MEASURABLE / largest)}"
            parts.append(text)
        if parts:
            self.warn(
                "effect",
                f"λ has no measurable effect on the held-out loss: {_some(parts)}. A whole unit "
                f"of raw λ (a factor e of a strength) changes it by less than {MEASURABLE:g} of "
                "itself, so λ moves at random. Start it where it acts, or leave it alone "
                "(for one of them: module.NAME.frozen = True)",
            )

    def _tell_overfitted(self, history: History) -> None:
        half = self.validations[len(self.validations) // 2 :]
        if len(half) < FEW_VALIDATIONS:
            return
        at, fresh = (torch.tensor(c, dtype=torch.float64) for c in zip(*half, strict=True))
        steps, tuned = history.steps(), history.losses()
        inside = (steps >= at[0]) & (steps <= at[-1]) & torch.isfinite(tuned)
        if _trend(at, fresh) > 2 and _trend(steps[inside], tuned[inside]) < -2:
            self.warn(
                "overfitted",
                "λ is fitted to its held-out data (T2): over the last half, the loss of the "
                f"validation rises, from {fresh[0]:.4g} to {fresh[-1]:.4g}, while that of the "
                "held-out batches falls. Hold out more data, or tune fewer λ (one strength for the "
                "model instead of one for each layer or example)",
            )

    # ------------------------------------------------------------------------------------- summary

    def summary(
        self, history: History, skipped: int, reach: tuple[float, float] | None = None
    ) -> str:
        """Returns a few lines about the training, for people.

        Args:
            history: Its updates.
            skipped: How many of them were skipped.
            reach: How far λ can get in them; see :meth:`lightning_hpo.strategy.Strategy.reach`.
        """
        updates, steps = counted(len(history), "update"), counted(self.steps, "step")
        head = f"OnlineHPOCallback: {updates} of λ in {steps}"
        lines = []
        if len(history) > 0:
            tables = history.tables()
            trends = self._trends(tables)
            lines += self._table(tables, trends)
            lines += self._reached(len(history), trends, reach)
            lines += _course(history)
            shares = [
                self._clipped(name, tables)
                for name, subject in self.subjects.items()
                if not math.isinf(subject.radius)
            ]
            parts = [f"clipped tangents: {sum(shares) / len(shares):.0%}"] if shares else []
            parts += [f"skipped updates: {skipped / len(history):.0%}"] if skipped else []
            lines += [f"  {', '.join(parts)}"] if parts else []
        elif self.subjects:
            lines.append("  λ is where it was: there was no update")
        if self.has_ended and math.isfinite(self.planned) and self.steps < EARLY * self.planned:
            lines.append(
                f"  ended early, after {counted(self.steps, 'step')} (planned: "
                f"{counted(int(self.planned), 'step')}), so that λ had less time to move"
            )
        inside, total = self.clock.inside, self.clock.total
        if 0 < inside < total:
            lines.append(
                f"  cost: {total / (total - inside):.2f} times the training without tuning "
                f"({inside:.3g} of {total:.3g} s)"
            )
        return "\n".join([head, *lines])

    def _trends(self, tables: Tables) -> dict[str, str]:
        """Tells of each λ whether it is still on its way."""
        found = {}
        for name, subject in self.subjects.items():
            values = tables["values"].get(name)
            if values is None:
                continue
            gradients = tables["hypergradients"].get(name)
            if gradients is not None and not bool(torch.isfinite(gradients).any()):
                found[name] = "not moved: no hypergradient was finite"
                continue
            found[name] = _movement(subject, values)
            if found[name] == "settled" and _side(subject, values[-1]) is None:
                found[name] = _pulled(subject, gradients) or found[name]
        return found

    def _table(self, tables: Tables, trends: Mapping[str, str]) -> list[str]:
        rows = []
        moving = bounded = 0
        for name, trend in trends.items():
            subject, values = self.subjects[name], tables["values"][name]
            side = _side(subject, values[-1])
            moving += trend.startswith("still")
            bounded += side is not None
            remark = trend if side is None else f"{trend}, at its {side}"
            remark += ", from a start that was replaced" if name in self.replaced else ""
            first, last = _described(subject, subject.initial), _last(subject, values)
            rows.append((name, first, _described(subject, last), remark))
        shown = rows[:_ROWS]
        widths = [max(len(row[i]) for row in shown) for i in range(3)]
        lines = [
            f"  {a:<{widths[0]}}  {b:>{widths[1]}} → {c:<{widths[2]}}  {d}" for a, b, c, d in shown
        ]
        if len(rows) > _ROWS:
            lines.append(
                f"  … and {len(rows) - _ROWS} more; of all {len(rows)}, {moving} still move, "
                f"{bounded} are at a bound"
            )
        return lines

    def _reached(
        self, updates: int, trends: Mapping[str, str], reach: tuple[float, float] | None
    ) -> list[str]:
        """Says how far λ can get in so few updates, where one has not settled."""
        names = [name for name, trend in trends.items() if trend != "settled"]
        moving = [self.subjects[name] for name in names]
        if reach is None:
            return []
        parts = [
            f"{what} by a factor of about {math.exp(distance):.3g}"
            for what, kind, distance in (
                ("a strength", Positive, reach[0]),
                ("the odds of a probability", UnitInterval, reach[1]),
            )
            if distance < math.log(NEAR)
            and any(isinstance(s.constraint, kind) and not s.choices for s in moving)
        ]
        if not parts:
            return []
        besides = ", besides replacing its start" if self.replaced.intersection(names) else ""
        return [f"  {counted(updates, 'update')} can move {' and '.join(parts)} at most{besides}"]

    # --------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed training cannot find out again."""
        return {
            "initial": {name: subject.initial for name, subject in self.subjects.items()},
            "validations": [list(pair) for pair in self.validations],
            "dead": self.dead,
            "replaced": sorted(self.replaced),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores it, as far as the hyperparameters are the same."""
        for name, initial in state.get("initial", {}).items():
            if name in self.subjects:
                self.subjects[name].initial = initial
        self.validations = [(int(step), loss) for step, loss in state.get("validations", ())]
        self.dead = state.get("dead", 0)
        self.replaced.update(state.get("replaced", ()))


def _is_forward(estimator: Estimator, m: int) -> bool:
    if isinstance(estimator, UnrollK):
        return estimator.mode == "forward" or (estimator.mode == "auto" and m < estimator.k)
    return isinstance(estimator, ClipR)


# ---------------------------------------------------------------------------------- a dead network


def _learned_nothing(record: HistoryRecord, first: float) -> bool:
    return record.loss is not None and first > 0 and record.loss >= (1 - LEARNED) * first


def _is_insignificant(record: HistoryRecord) -> bool:
    assert record.loss is not None
    least = INSIGNIFICANT * record.loss
    for h in record.hypergradients.values():
        size = max(abs(h["min"]), abs(h["max"])) if isinstance(h, dict) else float(h.abs().max())
        if not size < least:
            return False
    return True


def _share_of_half(theta: Sequence[Tensor], sharded: bool) -> float:
    """Returns the part of the last step's gradient that the half of θ with the least of it gets.

    Tensors are taken whole, in the order of their mean squares, and norms are compared: about 0.7
    where all elements get the same.
    """
    pairs = [(p.numel(), p.grad) for p in theta if p.grad is not None]
    if not pairs:
        return 1.0
    norms = torch.stack([torch.linalg.vector_norm(widened(local(g))).double() for _, g in pairs])
    squares = norm_over_shards(norms, sharded).square().cpu()
    sizes = torch.tensor([size for size, _ in pairs], dtype=torch.float64)
    order = (squares / sizes).argsort()
    end = int((sizes[order].cumsum(0) < sizes.sum() / 2).sum()) + 1
    total = float(squares.sum())
    return math.sqrt(float(squares[order[:end]].sum()) / total) if total > 0 else 0.0


# --------------------------------------------------------------------------------------- λ in words


def _elements(table: Tensor, subject: Subject) -> Tensor:
    """Returns the columns that are elements; of a summary, the mean."""
    return table[..., 1:2] if isinstance(subject.initial, dict) else table


def _side(subject: Subject, values: Tensor) -> str | None:
    """Tells at which bound the last values sit, if all of them sit at the same.

    A vector with some elements at a bound is as it should be: weights of examples that are left
    out, for one. So is a probability of a choice.
    """
    if subject.choices:
        return None
    values = values[[0, 2]] if isinstance(subject.initial, dict) else values
    constraint = subject.constraint
    slack = 1e-3
    if isinstance(constraint, Positive):
        low, high = constraint.low, constraint.high
        raw = values.log()
        is_low = raw - math.log(low) <= slack * max(1.0, abs(math.log(low)))
        is_high = math.log(high) - raw <= slack * max(1.0, abs(math.log(high)))
    elif isinstance(constraint, UnitInterval):
        # Decay rates of an optimizer, such as 0.999, are meant to be close to 1.
        least = 0.0 if subject.is_option else slack
        low = max(least, constraint.margin * (1 + slack))
        high = 1 - low
        is_low, is_high = values <= low, values >= high
    elif isinstance(constraint, Interval):
        low, high = constraint.low, constraint.high
        is_low = values - low <= slack * abs(low) if math.isfinite(low) else values < low
        is_high = high - values <= slack * abs(high) if math.isfinite(high) else values > high
    else:
        return None
    if bool(is_low.all()):
        return f"lower bound {low:.3g}"
    return f"upper bound {high:.3g}" if bool(is_high.all()) else None


def _raw(subject: Subject, table: Tensor) -> Tensor:
    """Returns raw λ of values."""
    if isinstance(subject.constraint, (Unconstrained, Softmax)):
        return table
    try:
        return subject.constraint.inverse(table)
    except ValueError:  # a constraint of the user's, which may look at the whole tensor
        return table


def _scale(subject: Subject, raw: Tensor) -> float:
    """Returns what changes of raw λ are measured by: on a log or logit scale they are relative."""
    is_relative = isinstance(subject.constraint, (Positive, UnitInterval))
    return 1.0 if is_relative else float(raw.abs().max())


def _movement(subject: Subject, values: Tensor) -> str:
    """Tells whether λ was still on its way over the last fifth of the updates."""
    table = _elements(values, subject)
    if len(table) < 10:
        return "too few updates to see a trend"
    if subject.choices:
        table = table[:, table[-1].argmax(), None]  # the most probable one
    raw = _raw(subject, table[-(len(table) // 5) - 1 :]).mean(1)
    net = float(raw[-1] - raw[0])
    # Less than a twentieth is of no account.
    if not abs(net) > max(0.5 * float(raw.diff().abs().sum()), 0.05 * _scale(subject, raw)):
        return "settled"
    return "still rising" if net > 0 else "still falling"


def _pulled(subject: Subject, gradients: Tensor | None) -> str | None:
    """Tells where λ stays because of its rate, and not because its hypergradients cancel.

    That is so where, over the last half of the updates, those of half of its elements agree.
    """
    if gradients is None or subject.choices:
        return None
    h = _elements(gradients, subject)
    h = h[len(h) // 2 :]
    h = h[torch.isfinite(h).all(1)]
    if not len(h):
        return None
    mean, size = h.mean(0), h.square().mean(0).sqrt()
    if not float((mean.abs() / size).nan_to_num(0.0).median()) > DIRECTED:
        return None
    return f"still pulled {'up' if float(mean.median()) < 0 else 'down'}"


def _last(subject: Subject, values: Tensor) -> Any:
    """Returns the last value in the form in which the history has it."""
    last = values[-1].tolist()
    if isinstance(subject.initial, dict):
        return dict(zip(("min", "mean", "max", "norm"), last, strict=True))
    return last if len(last) > 1 else last[0]


def _described(subject: Subject, value: Any) -> str:
    """Returns a value in words; of choices, the most probable ones."""
    if not subject.choices:
        return _short(value)
    probabilities = value if isinstance(value, list) else [1 - value, value]
    return described(subject.choices, probabilities)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['mean']:.3g} ({value['min']:.3g} … {value['max']:.3g})"
    numbers = torch.as_tensor(value, dtype=torch.float64)
    if numbers.numel() == 1:
        return f"{numbers.item():.3g}"
    return f"{numbers.mean():.3g} ({numbers.min():.3g} … {numbers.max():.3g})"


def _course(history: History) -> list[str]:
    """Says from where to where the held-out loss went, and where it was lower than it ends."""
    losses = history.losses()
    is_finite = torch.isfinite(losses)
    losses, steps = losses[is_finite], history.steps()[is_finite]
    if not len(losses):
        return []
    n = max(1, len(losses) // 20)
    start, end = float(losses[:n].mean()), float(losses[-n:].mean())
    of = f"mean of the first and last {n}" if n > 1 else "first and last"
    text = f"  held-out loss: {start:.4g} → {end:.4g} ({of})"
    width = max(FEW_LOSSES, len(losses) // 10)
    if len(losses) >= 2 * width:
        windows = losses.unfold(0, width, 1)
        means, variances = windows.mean(1), windows.var(1) / width
        at = int(means.argmin())
        lowest, rise = float(means[at]), float(means[-1] - means[at])
        error = float((variances[-1] + variances[at]).sqrt())
        if rise > max(RISEN * abs(lowest), ERRORS * error):
            text += f", lowest {lowest:.4g} around step {int(steps[at + width // 2])}"
    return [text]


_some = partial(listed, most=_NAMES)


def _rounded_up(value: float) -> str:
    """Writes a positive number in two digits, none of which makes it smaller."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / unit) * unit:.2g}"


def _trend(x: Tensor, y: Tensor) -> float:
    """Returns the slope of a straight line through the points, in standard errors."""
    n = len(x)
    if n < FEW_VALIDATIONS:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    spread = float(x.square().sum())
    if spread == 0:
        return 0.0
    slope = float(x @ y) / spread
    rest = float((y - slope * x).square().sum())
    error = math.sqrt(rest / (n - 2) / spread)
    return slope / error if error > 0 else math.copysign(math.inf, slope) if slope else 0.0
