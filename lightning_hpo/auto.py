r"""Where a penalty begins to matter: the strengths that ``init="auto"`` stands for.

A penalty λ R(w) matters where, over the training to come, it would by itself move the weights by
about their own size. With Σ η the sum of the learning rates over the steps to come:

- L2 and weight decay move w by η λ w per step: λ₀ = 1 / Σ η.
- L1 moves w by η λ sign(w) per step: λ₀ = mean|w| / Σ η.
- Momentum μ repeats each step 1 / (1 − μ) times: (1 − μ) λ₀.
- An adaptive optimizer (Adam, RMSprop …) divides a penalty in the gradient by the size of the
  gradient: rms(g) λ₀, at the first step, over the weights that have a gradient then. A decoupled
  weight decay is not divided.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_hpo._lightning import MisconfigurationException
from lightning_hpo.distributed import broadcast_, is_sharded, local, sum_over_shards, world_size
from lightning_hpo.hyperparameters import Hyperparameter, named_hyperparameters
from lightning_hpo.schedule import Group, steps_left, total_rates

__docformat__ = "google"
__all__: list[str] = []  # its page is the text above

if TYPE_CHECKING:
    from lightning_hpo.regularizers.penalty import Penalty

Optimizer = torch.optim.Optimizer


@dataclass(frozen=True)
class Start:
    """A strength, and how it came about."""

    value: float
    formula: str


class Starts:
    """Finds strengths for one training; its schedules are followed once.

    Args:
        trainer: The trainer, in a training.
        at_step: Whether gradients are complete: unscaled, averaged, and without penalties.
    """

    def __init__(self, trainer: pl.Trainer, *, at_step: bool) -> None:
        self._trainer = trainer
        self._at_step = at_step
        self._totals: dict[tuple[int, bool], list[float]] = {}

    def penalty(self, penalty: Penalty) -> Start | None:
        """Returns the strength of a penalty in the gradient or in the loss.

        None as long as it is not known: before the gradients are where they are needed, or where no
        optimizer moves its weights, or these or their gradients are all 0 or not finite.
        """
        owner = self.owner(penalty)
        if owner is None or penalty.degree is None:
            return None
        return self._start(owner, penalty.weights, penalty.degree, is_adaptive(owner))

    def weight_decay(self, optimizer: Optimizer) -> Start | None:
        """Returns the strength of the weight decay of an optimizer, or None as above."""
        theta = [p for group in optimizer.param_groups for p in group["params"]]
        if is_decoupled(optimizer):
            return self._start(optimizer, theta, 2, adaptive=False, decoupled=True)
        return self._start(optimizer, theta, 2, is_adaptive(optimizer))

    def owner(self, penalty: Penalty) -> Optimizer | None:
        """Returns the optimizer that moves the weights of a penalty, or None."""
        trained = {id(w) for w in penalty.weights if w.requires_grad}
        for optimizer in self._trainer.optimizers:
            if any(id(p) in trained for group in optimizer.param_groups for p in group["params"]):
                return optimizer
        return None

    def _start(
        self,
        optimizer: Optimizer,
        weights: Sequence[Tensor],
        degree: int,
        adaptive: bool,
        decoupled: bool = False,
    ) -> Start | None:
        if adaptive and not self._at_step:
            return None
        group_of = {
            id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]
        }
        trained = [w for w in weights if id(w) in group_of and w.requires_grad]
        squares: list[float] = []
        if adaptive:
            trained = [w for w in trained if w.grad is not None]
            squares = _sums([w.grad for w in trained if w.grad is not None], 2)
            # A gradient of zeros is none: low-rank factors begin so, and shards that are not used.
            trained = [w for w, square in zip(trained, squares, strict=True) if square != 0]
        size, factors = 1.0, []
        if degree == 1:
            size *= _mean(trained, _sums(trained, 1))
            factors.append("mean |w|")
        if adaptive:
            size *= math.sqrt(_mean(trained, squares))
            factors.append("rms(gradient)")
        if not (trained and 0 < size < math.inf):
            return None
        group = optimizer.param_groups[0]
        if _repeats(optimizer, group) and not decoupled:
            factors.append("(1 − momentum)")
        steps, is_known = steps_left(self._trainer)
        totals = self._rates(optimizer, decoupled)
        count = sum(w.numel() for w in trained)
        total = sum(totals[group_of[id(w)]] * w.numel() for w in trained) / count
        if not 0 < total < math.inf:
            return None
        damped = "(1 − dampening) " if factors[-1:] == ["(1 − momentum)"] and _damps(group) else ""
        formula = f"{' · '.join(factors) or '1'} / {damped}Σ lr over {steps:,} steps".replace(
            ",", " "
        )
        unknown = "" if is_known else " (the length of the training is not known)"
        return Start(size / total, formula + unknown)

    def _rates(self, optimizer: Optimizer, decoupled: bool) -> list[float]:
        """Returns Σ η of each group as it acts in the long run."""

        def rate(group: Group) -> float:
            if decoupled or not _repeats(optimizer, group):
                return float(group["lr"])
            return float(group["lr"]) * (1 - _damps(group)) / (1 - float(group["momentum"]))

        key = id(optimizer), decoupled
        if key not in self._totals:
            self._totals[key] = total_rates(self._trainer, optimizer, rate)
        return self._totals[key]


def is_adaptive(optimizer: Optimizer) -> bool:
    """Whether the step of an optimizer is not in proportion to the gradient, as that of SGD is."""
    is_plain = isinstance(optimizer, (torch.optim.SGD, torch.optim.ASGD))
    return not (is_plain or type(optimizer).__name__.startswith("SGD"))


def is_decoupled(optimizer: Optimizer) -> bool | None:
    """Whether the weight decay of an optimizer acts on the weights, not in the gradient.

    None for an optimizer of another library, whose step may be either.
    """
    group = optimizer.param_groups[0]
    if "decoupled_weight_decay" in group:
        return bool(group["decoupled_weight_decay"])
    for kind in type(optimizer).__mro__:
        if kind.__module__.startswith("torch.optim") and kind is not Optimizer:
            return kind.__name__ in ("AdamW", "Muon", "Adafactor")
    return None


def _repeats(optimizer: Optimizer, group: Group) -> bool:
    """Whether momentum adds up steps, as that of SGD and RMSprop; that of Adam averages them."""
    adds_up = not is_adaptive(optimizer) or isinstance(optimizer, torch.optim.RMSprop)
    return adds_up and 0 < float(group.get("momentum", 0)) < 1


def _damps(group: Group) -> float:
    return float(group.get("dampening", 0))


def _sums(tensors: Sequence[Tensor], power: int) -> list[float]:
    """Returns Σ |x|^power of each tensor, of whole ones where they are sharded."""
    if not tensors:
        return []
    parts = [
        torch.linalg.vector_norm(x, power, dtype=torch.promote_types(x.dtype, torch.float32))
        for x in (local(t.detach()) for t in tensors)
    ]
    # On one device: the layers of a model may be spread over several.
    totals = torch.stack([part.to(parts[0].device) ** power for part in parts])
    found: list[float] = sum_over_shards(totals, is_sharded(tensors)).tolist()
    return found


def _mean(tensors: Sequence[Tensor], sums: Sequence[float]) -> float:
    """Returns the mean over all elements; 0 of none."""
    return sum(sums) / max(sum(t.numel() for t in tensors), 1)


# --------------------------------------------------------------------------------------------------
# Putting them in place
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def resolve_penalties(module: Any, penalties: Sequence[Penalty], *, at_step: bool) -> None:
    """Gives strengths that are not resolved yet their values, as far as these are known by now.

    All processes must call it together.

    Args:
        module: The LightningModule.
        penalties: Those whose strengths are not resolved.
        at_step: As for :class:`Starts`.

    Raises:
        MisconfigurationException: If there is no trainer, whose schedule says the strength; or if
            a penalty needs a gradient that its loss does not have yet.
    """
    names = {id(h): name for name, h in named_hyperparameters(module).items()}
    named = [(names.get(id(p.hyperparameter), "a penalty"), p) for p in penalties]
    trainer = getattr(module, "_trainer", None)
    if trainer is None or trainer.state.stage is None:
        raise MisconfigurationException(
            f'{named[0][0]}: init="auto" is resolved from the learning rates of a training, and '
            f"{type(module).__name__} is used without a Trainer. Train it with Trainer.fit, "
            f"register the penalty with a number (init=1e-4), or give it one: "
            f"module.{named[0][0]}.value = 1e-4"
        )
    if not trainer.training:
        return  # it evaluates, within a training or not
    starts = Starts(trainer, at_step=at_step)
    for name, penalty in named:
        optimizer = starts.owner(penalty)
        in_loss = any(penalty is p for p in module.loss_penalties)
        if in_loss and optimizer is not None and is_adaptive(optimizer):
            raise MisconfigurationException(
                f'{name}: init="auto" needs the gradient of the loss without the penalty under '
                f"{type(optimizer).__name__}, which divides by its size; with inside_loss=True "
                "there is none. Register the penalty without inside_loss and remove "
                "self.penalty() from the loss (θ and λ are the same), or pass a number: init=1e-4"
            )
    settle(trainer, [(name, p.hyperparameter, starts.penalty(p)) for name, p in named])


@torch.no_grad()
def settle(trainer: pl.Trainer, found: Sequence[tuple[str, Hyperparameter, Start | None]]) -> None:
    """Gives hyperparameters the values of the first process, where they are known, and says so.

    Raises:
        MisconfigurationException: If a value does not fit the constraint.
    """
    known = [math.nan if start is None else start.value for *_, start in found]
    values = agreed(trainer, known)
    said: dict[str, list[tuple[str, float]]] = {}
    for value, (name, h, start) in zip(values, found, strict=True):
        if math.isnan(value):
            continue
        low, high = getattr(h.constraint, "low", 0.0), getattr(h.constraint, "high", math.inf)
        kept = min(max(value, low), high)
        try:
            h.value = kept
        except ValueError as error:
            raise MisconfigurationException(
                f'{name}: init="auto" has found {value:.3g}, which does not fit: {error}'
            ) from None
        formula = "" if start is None else start.formula
        limited = "" if kept == value else f", limited by {h.constraint}"
        said.setdefault(formula + limited, []).append((name, kept))
    for formula, pairs in said.items():
        rank_zero_info(f'{_names(pairs)}: init="auto" → {_range(pairs)} = {formula}')


def agreed(trainer: pl.Trainer, values: list[float]) -> list[float]:
    """Returns the values of the first process."""
    if trainer.world_size > 1 and world_size() > 1:
        sent = torch.tensor(values, dtype=torch.float64, device=trainer.strategy.root_device)
        broadcast_([sent])
        values = sent.tolist()
    return values


def _names(pairs: Sequence[tuple[str, float]]) -> str:
    return pairs[0][0] if len(pairs) == 1 else f"{pairs[0][0]} and {len(pairs) - 1} more"


def _range(pairs: Iterable[tuple[str, float]]) -> str:
    values = [value for _, value in pairs]
    shown = dict.fromkeys(f"{value:.3g}" for value in (min(values), max(values)))
    return " … ".join(shown)
