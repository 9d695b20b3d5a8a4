"""training_step and validation_step as pure losses of (θ, λ)."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import MappingProxyType, MethodType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Metric, MetricCollection

from lightning_hpo._hooks import emptied
from lightning_hpo._lightning import MisconfigurationException
from lightning_hpo._record import update_record
from lightning_hpo._tensors import without_hooks
from lightning_hpo._trainer import progress_of, progressed_to, stage
from lightning_hpo.batch_copy import copy_batch
from lightning_hpo.choices import Choices, Indices
from lightning_hpo.derivatives import Loss, gradient, gradient_products
from lightning_hpo.exchange import ModuleState, pack_state, place_state
from lightning_hpo.held_out import HeldOutBatch
from lightning_hpo.hyperparameters import CategoricalHyperparameter, Hyperparameter
from lightning_hpo.kernels import (
    differentiable_checkpoints,
    eager,
    native_recurrent,
    twice_differentiable,
    without_tf32,
)
from lightning_hpo.regularizers.penalty import PenaltyMixin
from lightning_hpo.rng import RandomState
from lightning_hpo.shield import Shield
from lightning_hpo.statistics import (
    Place,
    RunningStatistics,
    Standing,
    differentiable_statistics,
)
from lightning_hpo.validation_entry import ValidationEntry
from lightning_hpo.validation_value import DetachedMetric, check_loss, find_loss

_EPS_BF16 = torch.finfo(torch.bfloat16).eps
_EPS_FP16 = torch.finfo(torch.float16).eps

# --------------------------------------------------------------------------------------------------
# The training loss
# --------------------------------------------------------------------------------------------------


@dataclass
class Moment:
    """Everything that a replay of one micro-batch's ``training_step`` depends on, but for θ and λ.

    Attributes:
        batch: The batch, on the device. Each replay gets a copy: a step may write to it.
        batch_idx: Its index in the epoch.
        rng: The random state in which the step starts.
        progress: The trainer's counts and learning rates at that step.
        state: What the modules held at that step; None for a replay that happens at once.
        choices: The indices of the choices in force, by name.
    """

    batch: Any
    batch_idx: int
    rng: RandomState
    progress: dict[str, Any]
    state: ModuleState | None = None
    choices: Indices = field(default_factory=dict)


class TrainingObjective:
    """L_T(θ, λ; batch, ξ): ``training_step`` as a pure function.

    Each evaluation draws the same random numbers ξ as the step that it replays, runs under the
    trainer's precision, and leaves no trace.

    Args:
        trainer: The trainer.
        module: The LightningModule.
        hyperparameters: Those that are tuned.
        choices: What the choices in the module are drawn by; None where there are none.

    Attributes:
        choices: See above.
        statistics: The running statistics that a step moves.
        unwritten: Buffers that no step has been seen to write to.
        newly_written: Those of them that a replay has, taken from ``unwritten``.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        hyperparameters: Sequence[Hyperparameter],
        choices: Choices | None = None,
    ) -> None:
        self.unwritten: list[Place] = []
        self.newly_written: list[Place] = []
        wrapper = trainer.strategy.model
        self.statistics = RunningStatistics(
            module,
            is_broadcast=isinstance(wrapper, DistributedDataParallel) and wrapper.broadcast_buffers,
        )
        self._trainer = trainer
        self._module = module
        self._hyperparameters = list(hyperparameters)
        self.choices = Choices(nn.Module(), {}, 0) if choices is None else choices
        self._categorical = _choices_of(module)
        self.shield = Shield(trainer, module)
        self._previous: tuple[ModuleState, RandomState] | None = None

    @property
    def rounding(self) -> float | None:
        """The relative rounding error of the loss under autocast; None without autocast."""
        precision = self._trainer.precision_plugin.precision
        return {"bf16-mixed": _EPS_BF16, "16-mixed": _EPS_FP16}.get(str(precision))

    @property
    def scale(self) -> float:
        """The factor of a micro-batch's loss in the training, which the losses here carry too.

        That of the gradient scaler, over the number of accumulated batches: gradients in float16
        would vanish or overflow, and hooks on parameters would see others, without it. Whoever
        takes a derivative divides by it.
        """
        return _scaler_factor(self._trainer) / self._trainer.accumulate_grad_batches

    def moment(
        self,
        batch: Any,
        batch_idx: int,
        *,
        keep: bool = False,
        share: bool = False,
    ) -> Moment:
        """Records the present as the start of a ``training_step``.

        Args:
            batch: The batch, on the device.
            batch_idx: Its index in the epoch.
            keep: Whether the replay happens later. Costs a copy of the batch, the random state, the
                buffers, the modules' own attributes, and parameters that are not trained (of a
                large frozen backbone only small ones).
            share: Whether large tensors that have not changed since the last moment that was kept
                are shared with it. The host then waits for the device to compare them.
        """
        moment = Moment(
            batch=batch,
            batch_idx=batch_idx,
            rng=RandomState.capture(self.shield.device),
            progress=progress_of(self._trainer),
            choices=self.choices.drawn(),
        )
        if keep:
            moment.batch = copy_batch(batch)
            state, rng = (share and self._previous) or (None, None)
            moment.state = self.shield.remember(state)
            if rng is not None:
                moment.rng.share_with(rng)
            if share:
                self._previous = moment.state, moment.rng
        return moment

    def pack(self, moment: Moment) -> dict[str, Any] | None:
        """Returns a moment as tensors, numbers and containers, which a checkpoint may hold.

        None for a batch that has other things in it. Of the modules' attributes only those of these
        kinds are kept.
        """
        state = {} if moment.state is None else pack_state(self._module, moment.state)
        state = {
            name: [tensors, {n: v for n, v in attributes.items() if is_plain(v)}]
            for name, (tensors, attributes) in state.items()
        }
        packed = {**vars(moment), "rng": moment.rng.state_dict(), "state": state}
        return packed if is_plain(packed) else None

    def unpack(self, packed: dict[str, Any]) -> Moment:
        """Reads what :meth:`pack` returned, onto the device of the training.

        Attributes that a checkpoint could not hold are taken as they are now.
        """
        placed = move_data_to_device(
            {"batch": packed["batch"], "state": packed["state"]}, self.shield.device
        )
        with self.shield():
            place_state(self._module, placed["state"])
            state = self.shield.remember()
        rng = RandomState.from_state_dict(packed["rng"])
        return Moment(**{**packed, "batch": placed["batch"], "rng": rng, "state": state})

    def buffers(self) -> list[Tensor]:
        """Returns the module's buffers, raw λ excepted."""
        raws = self._raws()
        return [b for b in self._module.buffers() if id(b) not in raws]

    def _raws(self) -> set[int]:
        """Returns the ``id`` of every raw λ of the module, frozen ones included."""
        return {id(m.raw) for m in self._module.modules() if isinstance(m, Hyperparameter)}

    def place_of(self, name: str) -> Place:
        """Returns the module and the name in it of a buffer, by its qualified name."""
        owner, _, own = name.rpartition(".")
        return self._module.get_submodule(owner), own

    def name_of(self, place: Place) -> str:
        """Returns the qualified name of a buffer."""
        owner, own = place
        names = [name for name, m in self._module.named_modules() if m is owner]
        return f"{names[0]}.{own}".strip(".") if names else own

    def other_buffers(self) -> Iterator[Place]:
        """Yields the places of buffers, but for statistics and raw λ; there may be None in them."""
        known = {(id(owner), name) for owner, name in self.statistics.places}
        raws = self._raws()
        for owner in self._module.modules():
            if isinstance(owner, torch.jit.ScriptModule):
                continue
            for name, b in owner._buffers.items():
                if id(b) not in raws and (id(owner), name) not in known:
                    yield owner, name

    def written_buffers(self, moment: Moment, theta: Sequence[Tensor]) -> dict[str, Tensor]:
        """Returns what a step leaves in the buffers that it changes, but for statistics and raw λ.

        Some may have another shape than before, or may not have been there at all.

        Costs a forward pass, where there are such buffers of floating point numbers.
        """
        found = {self.name_of(place): place for place in self.other_buffers()}
        present = {name: owner._buffers[own] for name, (owner, own) in found.items()}
        before = {
            name: (None if b is None else b.clone(), -1 if b is None else b._version)
            for name, b in present.items()
        }
        if not any(b is None or b.is_floating_point() for b in present.values()):
            return {}
        with torch.enable_grad(), self.evaluations(moment, theta) as evaluate:
            evaluate(theta, self.leaves())
            return {
                name: after.detach().clone()
                for name, (owner, own) in found.items()
                if isinstance(after := owner._buffers.get(own), Tensor)
                # What is written may be the same by chance: a copy that is averaged from now on.
                and (
                    after is not present[name]
                    or after._version != before[name][1]
                    or not torch.equal(after, before[name][0])  # type: ignore[arg-type]
                )
            }

    def leaves(self) -> list[Tensor]:
        """Returns raw λ as fresh leaves that require grad, in the order of the hyperparameters."""
        return [h.raw.detach().clone().requires_grad_() for h in self._hyperparameters]

    @contextmanager
    def at(
        self,
        moment: Moment,
        theta: Sequence[Tensor],
        *,
        exact: bool = False,
        statistics: bool = False,
    ) -> Iterator[Loss]:
        """Gives L_T at a moment as a function of (θ, raw λ), or of ((θ, r, c), raw λ).

        With running statistics r and weights c of the same shapes it is L_T + ⟨c, r'⟩. Its
        derivative with respect to c is r', which thus takes part in products with the Hessian: at
        c = 0, H (y, ṙ, 0) has ṙ' in the place of c, and H (u, 0, w) is the gradient of
        ⟨∇θL_T, u⟩ + ⟨w, r'⟩.

        The graph of an evaluation must be used before the next one, and inside the context: parts
        of the forward pass may be run again in the backward pass (activation checkpointing), and
        must find the same values there.

        Args:
            moment: What is replayed.
            theta: The module's own parameters, in whose place the function's first argument is put.
            exact: Whether second or forward derivatives will be taken, and the kernels that have
                them are to be used. Otherwise the replay runs on those of the training.
            statistics: Whether it is a function of r and c. It runs in eager mode then, but for
                differences with statistics ``by_value``.
        """
        with self.evaluations(moment, theta, exact=exact, statistics=statistics) as evaluate:

            def loss(values: Sequence[Tensor], lam: Sequence[Tensor]) -> Tensor | None:
                value, moved = evaluate(values, lam)
                scale = self.scale  # asks the gradient scaler, which may wait for a device
                value = value if value is None or scale == 1 else value * scale
                for r, c in zip(moved, values[len(theta) + len(moved) :], strict=True):
                    term = scale * (c * r).sum()
                    value = term if value is None else value + term
                return value

            yield loss

    @contextmanager
    def evaluations(
        self,
        moment: Moment,
        theta: Sequence[Tensor],
        *,
        exact: bool = False,
        statistics: bool = False,
        full_precision: bool = False,
        looks: str = "step",
    ) -> Iterator[Callable[..., tuple[Tensor | None, list[Tensor]]]]:
        """Gives L_T without factors, and r', as a function of ((θ, r), raw λ); see :meth:`at`.

        After a call, until the next, the module holds what the step has left.

        Args:
            moment: As for :meth:`at`.
            theta: As for :meth:`at`.
            exact: As for :meth:`at`.
            statistics: As for :meth:`at`.
            full_precision: Whether to do without the Trainer's autocast, and without TF32.
            looks: What these evaluations are (:meth:`Walker.walk`). Many that are no replays would
                use up the looks at what steps change.
        """
        step = self._module.training_step
        followed = self.statistics.buffers(moment.state) if statistics else []
        with ExitStack() as kernels, ExitStack() as evaluation:
            kernels.enter_context(differentiable_checkpoints())
            if exact:
                kernels.enter_context(twice_differentiable(self._module))
            if full_precision:
                kernels.enter_context(without_tf32(self.shield.device))
            is_traced = exact or not self.statistics.by_value
            if followed and is_traced:
                kernels.enter_context(eager())
                kernels.enter_context(differentiable_statistics())

            def evaluate(
                values: Sequence[Tensor], lam: Sequence[Tensor]
            ) -> tuple[Tensor | None, list[Tensor]]:
                evaluation.close()
                at_rest = [h.raw for h in self._hyperparameters]
                present = values[len(theta) : len(theta) + len(followed)]
                moving = [Standing.of(r) if is_traced else r.detach().clone() for r in present]
                swaps = {
                    id(p): v
                    for p, v in zip(
                        [*theta, *followed], [*values[: len(theta)], *moving], strict=True
                    )
                    if p is not v
                }
                swaps |= {id(h.raw): raw for h, raw in zip(self._hyperparameters, lam, strict=True)}
                evaluation.enter_context(
                    self.shield(rng=moment.rng, state=moment.state, swaps=swaps, looks=looks)
                )
                evaluation.enter_context(self.choices.at(moment.choices))
                evaluation.enter_context(progressed_to(self._trainer, moment.progress))
                with (
                    self._trainer.precision_plugin.train_step_context(),
                    self._without_autocast() if full_precision else nullcontext(),
                    self.shield.gradients_aside(),
                ):
                    for h in self._categorical:
                        h.was_asked = False
                    arguments = _step_arguments(step, copy_batch(moment.batch), moment.batch_idx)
                    before = _versions(self.unwritten)
                    value = _training_loss(step(*arguments))
                    ratio = self._ratio(moment.choices, lam, at_rest)
                    if before != (after := _versions(self.unwritten)):
                        self._note_written(before, after)
                # The step may have put others in their place.
                moved = self.statistics.buffers() if followed else []
                if ratio is None:
                    return value, moved
                moved = [
                    new + (ratio - 1) * (new - old).detach()
                    for new, old in zip(moved, present, strict=True)
                ]
                return None if value is None else value * ratio, moved

            yield evaluate

    def _ratio(
        self, drawn: Indices, lam: Sequence[Tensor], at_rest: Sequence[Tensor]
    ) -> Tensor | None:
        """Returns p_φ(a) / p_φ'(a) of the choices a that the step has asked for.

        φ' is where the choices were drawn: the factor is 1, and its derivative that of log p_φ(a).
        A loss that is multiplied by it has the mixed derivative B = ∇θL ∇φ log p_φ(a)ᵀ, whose mean
        over a is that of the expected loss. So have the moves of running statistics.
        """
        if not self.choices:
            return None
        asked = self.choices.names_of(h for h in self._categorical if h.was_asked)
        new, old = (
            self.choices.log_probability(
                dict(zip(self._hyperparameters, raws, strict=True)), drawn, asked
            )
            for raws in (lam, [raw.detach() for raw in at_rest])
        )
        return None if new is None or old is None else (new - old).exp()

    def _note_written(self, before: Sequence[Any], after: Sequence[Any]) -> None:
        pairs = zip(self.unwritten, before, after, strict=True)
        self.newly_written += [place for place, then, now in pairs if then != now]
        self.unwritten = [place for place in self.unwritten if place not in self.newly_written]

    def _without_autocast(self) -> AbstractContextManager[Any]:
        if self.rounding is None:
            return nullcontext()
        return torch.autocast(self.shield.device.type, enabled=False)

    def gradient(
        self,
        moment: Moment,
        theta: Sequence[Tensor],
        leaves: Sequence[Tensor] | None = None,
        *,
        exact: bool = False,
        statistics: bool = False,
    ) -> list[Tensor | None] | None:
        """Takes the gradient of L_T at a moment, at the parameters in place.

        Args:
            moment: What is replayed.
            theta: Some of the module's own parameters.
            leaves: Raw λ, as from :meth:`leaves`, with respect to which it is taken as well.
            exact: As for :meth:`at`.
            statistics: As for :meth:`at`; c is zero.

        Returns:
            One tensor, or None, per parameter and leaf; None where the step has no loss.
        """
        lam = self.leaves() if leaves is None else leaves
        r = self.statistics.leaves(moment.state) if statistics else []
        c = [torch.zeros_like(t) for t in r]
        with (
            torch.enable_grad(),
            self.at(moment, theta, exact=exact, statistics=statistics) as at,
        ):
            loss = at([*theta, *r, *c], lam)
            if loss is None:
                return None
            return _unscaled(gradient(loss, [*theta, *(leaves or ())]), self.scale)


def _choices_of(module: nn.Module) -> list[CategoricalHyperparameter]:
    return [m for m in module.modules() if isinstance(m, CategoricalHyperparameter)]


def _versions(places: Sequence[Place]) -> list[tuple[int, int]]:
    """Returns what is another number where something has been written to a buffer."""
    buffers = [owner._buffers.get(name) for owner, name in places]
    return [(id(b), 0 if b is None else b._version) for b in buffers]


def _scaler_factor(trainer: pl.Trainer) -> float:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0


def _unscaled(gradients: list[Tensor | None], scale: float) -> list[Tensor | None]:
    return gradients if scale == 1 else [None if g is None else g / scale for g in gradients]


def is_plain(value: Any) -> bool:
    """Whether a value consists of what a checkpoint may hold when it is loaded safely."""
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    if type(value) in (dict, OrderedDict):
        return all(map(is_plain, value)) and all(map(is_plain, value.values()))
    return type(value) in (Tensor, nn.Parameter, int, float, complex, bool, str, bytes, type(None))


def _training_loss(output: Any) -> Tensor | None:
    """Reads the loss as Lightning does: a tensor, a mapping with ``"loss"``, or None."""
    if output is None or isinstance(output, Tensor):
        return output
    loss = output["loss"]
    return loss if isinstance(loss, Tensor) else None


# --------------------------------------------------------------------------------------------------
# The validation loss
# --------------------------------------------------------------------------------------------------


class ValidationObjective:
    """L_V(θ; batch): the unregularized loss on held-out data, in evaluation mode.

    The loss is, in this order: ``loss_function(module, batch)`` where one is given; what
    ``validation_step`` logs under ``monitor`` where that is given; what it returns (a scalar, or a
    mapping with ``"loss"``); what it logs under ``val_loss``, ``valid_loss`` or
    ``validation_loss``. A logged metric counts by its value on the batch.

    Args:
        trainer: The trainer.
        module: The LightningModule.
        loss_function: See above.
        monitor: The name under which ``validation_step`` logs its loss.
        shield: That of the training. Default: one of its own.

    Attributes:
        loss: L_V where it was last taken, a scalar of this rank; None before.
        asked: The choices that it has asked for.
    """

    loss: Tensor | None = None
    asked: Sequence[CategoricalHyperparameter] = ()

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        loss_function: Callable[[pl.LightningModule, Any], Tensor] | None = None,
        monitor: str | None = None,
        shield: Shield | None = None,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._loss_function = loss_function
        self._monitor = monitor
        self._shield = shield or Shield(trainer, module)
        self._entry = ValidationEntry(trainer, module)
        self._categorical = _choices_of(module)
        self._metrics_keep_graphs = False

    def settle(self, batch: HeldOutBatch, theta: Sequence[Tensor]) -> None:
        """Finds out which of the module's hooks can be called, before anything has moved."""
        with self._shield(), stage(self._trainer, RunningStage.VALIDATING):
            self._entry.settle(batch, theta)

    def gradient(
        self, batch: HeldOutBatch, theta: Sequence[Tensor], statistics: Sequence[Tensor] = ()
    ) -> list[Tensor | None]:
        """Takes the gradient of L_V at the parameters in place, and over running statistics.

        Raises:
            MisconfigurationException: If there is no loss, it is not a scalar, or it does not
                depend on the parameters.
        """
        try:
            with self._at(batch, statistics) as (loss, scale, leaves):
                return _unscaled(gradient(loss, [*theta, *leaves]), scale)
        except DetachedMetric:
            if self._metrics_keep_graphs:
                raise
        # Only where it is needed: metrics compute without graphs, and some can do nothing else.
        self._metrics_keep_graphs = True
        return self.gradient(batch, theta, statistics)

    def direct(
        self, batch: HeldOutBatch, hyperparameters: Sequence[Hyperparameter]
    ) -> list[Tensor | None]:
        """Takes ∂L_V/∂(raw λ), θ held fixed; None where L_V does not read a λ."""
        leaves = [h.raw.detach().clone().requires_grad_() for h in hyperparameters]
        swaps = {id(h.raw): leaf for h, leaf in zip(hyperparameters, leaves, strict=True)}
        with self._at(batch, (), swaps) as (loss, scale, _):
            return _unscaled(gradient(loss, leaves), scale)

    def gradient_products(
        self,
        batch: HeldOutBatch,
        theta: Sequence[Tensor],
        stacks: Sequence[Tensor | None],
        statistics: Sequence[Tensor] = (),
    ) -> list[Tensor | None]:
        """Multiplies the gradient with directions, as :func:`gradient_products` does.

        The directions of the running statistics follow those of the parameters.

        Raises:
            MisconfigurationException: As for :meth:`gradient`.
        """
        with self._at(batch, statistics) as (loss, scale, leaves):
            return _unscaled(gradient_products(loss, [*theta, *leaves], stacks), scale)

    @contextmanager
    def _at(
        self,
        batch: HeldOutBatch,
        statistics: Sequence[Tensor],
        others: Mapping[int, Tensor] = MappingProxyType({}),
    ) -> Iterator[tuple[Tensor, float, list[Tensor]]]:
        """Gives L_V times the factor of the gradient scaler, that factor, and r as leaves.

        ``others`` are put in the place of further buffers, by the ``id`` of these.
        """
        module = self._module
        logged: dict[str, Any] = {}

        def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            logged[name] = value

        leaves = [r.detach().clone().requires_grad_() for r in statistics]
        with torch.enable_grad():  # a layer in training mode writes to them
            moving = {id(r): Standing.of(leaf) for r, leaf in zip(statistics, leaves, strict=True)}
        on_cuda = self._shield.device.type == "cuda"
        with (
            torch.enable_grad(),
            eager(),
            native_recurrent(module) if on_cuda else nullcontext(),
            differentiable_checkpoints(),
            differentiable_statistics() if leaves else nullcontext(),
            self._shield(log=log, swaps={**moving, **others}),
            stage(self._trainer, RunningStage.VALIDATING),
            self._entry(batch),
            _without_backward_hooks(module),
            _metrics_with_graphs(module) if self._metrics_keep_graphs else nullcontext(),
        ):
            for part in module.modules():
                if isinstance(part, PenaltyMixin):
                    update_record(part, without_penalty=True)
            with (
                self._trainer.precision_plugin.val_step_context(),
                self._shield.gradients_aside(),
            ):
                for h in self._categorical:
                    h.was_asked = False
                loss = self._evaluate(batch, logged)
                self.asked = [h for h in self._categorical if h.was_asked]
            self.loss = loss.detach()
            # As in training: without its factor, gradients in float16 would vanish.
            scale = _scaler_factor(self._trainer)
            if scale != 1:
                scale /= self._trainer.accumulate_grad_batches
            with without_hooks(module.parameters()):
                yield loss * scale, scale, leaves

    def _evaluate(self, held_out: HeldOutBatch, logged: dict[str, Any]) -> Tensor:
        module = self._module
        batch = copy_batch(held_out.batch)
        if self._loss_function is not None:
            return check_loss(self._loss_function(module, batch), "the loss function")
        step = module.validation_step
        origin = f"{type(module).__name__}.validation_step"
        if any(p.name == "dataloader_iter" for p in _parameters(step)):
            item = batch, held_out.batch_idx, held_out.dataloader_idx or 0
            try:
                output: Any = step(iter([item]))
            except StopIteration:
                raise MisconfigurationException(
                    f"{origin} takes more than one batch from its dataloader_iter, which a "
                    "held-out batch cannot give. Take one, or pass "
                    "validation_loss=lambda module, batch: ... to OnlineHPOCallback"
                ) from None
        else:
            output = step(*_validation_arguments(step, batch, held_out))
        return find_loss(output, logged, self._monitor, origin)


def _without_backward_hooks(module: nn.Module) -> AbstractContextManager[None]:
    """Keeps the user's backward hooks on modules from what is no gradient of the training."""
    parts = module.modules()
    return emptied(hooks for m in parts for hooks in (m._backward_hooks, m._backward_pre_hooks))


@contextmanager
def _metrics_with_graphs(module: nn.Module) -> Iterator[None]:
    """Lets ``update`` of metrics keep the graph of what it is given: one may be logged as L_V."""
    metrics = [m for m in module.modules() if isinstance(m, Metric)]
    before = [m._enable_grad for m in metrics]
    collections = [m for m in module.modules() if isinstance(m, MetricCollection)]
    for metric in metrics:
        metric._enable_grad = True
    for collection in collections:
        # By default it copies states that its metrics share, and a graph cannot be copied.
        vars(collection)["items"] = partial(collection.items, copy_state=False)
    try:
        yield
    finally:
        for collection in collections:
            del vars(collection)["items"]
        for metric, enable in zip(metrics, before, strict=True):
            metric._enable_grad = enable


def _validation_arguments(
    step: Callable[..., Any], batch: Any, held_out: HeldOutBatch
) -> tuple[Any, ...]:
    """Returns (batch, batch_idx, dataloader_idx) as Lightning gives them to a validation step.

    A step that insists on a dataloader_idx gets one, though there be only one loader.
    """
    index = held_out.dataloader_idx
    if index is None and any(
        p.name == "dataloader_idx" and p.default is p.empty for p in _parameters(step)
    ):
        index = 0
    given = (batch, held_out.batch_idx) if index is None else (batch, held_out.batch_idx, index)
    return _step_arguments(step, *given)


def _step_arguments(step: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
    """Returns as many of (batch, batch_idx, dataloader_idx) as a step takes."""
    parameters = _parameters(step)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return arguments
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return arguments[: len(positional)]


def _parameters(step: Callable[..., Any]) -> Sequence[inspect.Parameter]:
    """Returns what a step takes; of a method, read once, as that takes as long as small layers."""
    if not isinstance(step, MethodType):
        return list(inspect.signature(step).parameters.values())
    parameters = _parameters_of(step.__func__)
    is_variadic = parameters[0].kind is inspect.Parameter.VAR_POSITIONAL  # *args takes self as well
    return parameters if is_variadic else parameters[1:]


@lru_cache(maxsize=64)
def _parameters_of(function: Callable[..., Any]) -> Sequence[inspect.Parameter]:
    return tuple(inspect.signature(function).parameters.values())
