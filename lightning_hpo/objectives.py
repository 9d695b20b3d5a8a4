"""training_step and validation_step as pure losses of (θ, λ)."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn

from lightning_hpo._record import update_record
from lightning_hpo._tensors import without_hooks
from lightning_hpo._trainer import counted_as, stage
from lightning_hpo.batch_copy import copy_batch
from lightning_hpo.contents import ModuleState, pack_state, place_state
from lightning_hpo.derivatives import Loss, gradient, gradient_products
from lightning_hpo.hyperparameters import Hyperparameter
from lightning_hpo.kernels import (
    differentiable_checkpoints,
    eager,
    native_recurrent,
    twice_differentiable,
)
from lightning_hpo.regularizers.penalty import PenaltyMixin
from lightning_hpo.rng import RandomState
from lightning_hpo.shield import Shield

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
        global_step: The trainer's count of steps at that step.
        epoch: The trainer's count of epochs at that step.
        state: What the modules held at that step; None for a replay that happens at once.
    """

    batch: Any
    batch_idx: int
    rng: RandomState
    global_step: int
    epoch: int
    state: ModuleState | None = None


class TrainingObjective:
    """L_T(θ, λ; batch, ξ): ``training_step`` as a pure function.

    Each evaluation draws the same random numbers ξ as the step that it replays, runs under the
    trainer's precision, and leaves no trace.

    Args:
        trainer: The trainer.
        module: The LightningModule.
        hyperparameters: Those that are tuned.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        hyperparameters: Sequence[Hyperparameter],
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._hyperparameters = list(hyperparameters)
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
            global_step=self._trainer.global_step,
            epoch=self._trainer.current_epoch,
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
        raws = {id(m.raw) for m in self._module.modules() if isinstance(m, Hyperparameter)}
        return [b for b in self._module.buffers() if id(b) not in raws]

    def leaves(self) -> list[Tensor]:
        """Returns raw λ as fresh leaves that require grad, in the order of the hyperparameters."""
        return [h.raw.detach().clone().requires_grad_() for h in self._hyperparameters]

    @contextmanager
    def at(self, moment: Moment, theta: Sequence[Tensor], *, exact: bool = False) -> Iterator[Loss]:
        """Gives L_T at a moment as a function of (θ, raw λ).

        The graph of an evaluation must be used before the next one, and inside the context: parts
        of the forward pass may be run again in the backward pass (activation checkpointing), and
        must find the same values there.

        Args:
            moment: What is replayed.
            theta: The module's own parameters, in whose place the function's first argument is put.
            exact: Whether second or forward derivatives will be taken, and the kernels that have
                them are to be used. Otherwise the replay runs on those of the training.
        """
        step = self._module.training_step
        kernels = twice_differentiable(self._module) if exact else nullcontext()
        with kernels, differentiable_checkpoints(), ExitStack() as evaluation:

            def loss(values: Sequence[Tensor], lam: Sequence[Tensor]) -> Tensor | None:
                evaluation.close()
                swaps = {id(p): v for p, v in zip(theta, values, strict=True) if p is not v}
                swaps |= {id(h.raw): raw for h, raw in zip(self._hyperparameters, lam, strict=True)}
                evaluation.enter_context(
                    self.shield(rng=moment.rng, state=moment.state, swaps=swaps)
                )
                evaluation.enter_context(
                    counted_as(self._trainer, moment.global_step, moment.epoch)
                )
                with (
                    self._trainer.precision_plugin.train_step_context(),
                    self.shield.gradients_aside(),
                ):
                    arguments = _step_arguments(step, copy_batch(moment.batch), moment.batch_idx)
                    value = _training_loss(step(*arguments))
                scale = self.scale  # asks the gradient scaler, which may wait for a device
                return value if value is None or scale == 1 else value * scale

            yield loss

    def gradient(
        self,
        moment: Moment,
        theta: Sequence[Tensor],
        leaves: Sequence[Tensor] | None = None,
        *,
        exact: bool = False,
    ) -> list[Tensor | None] | None:
        """Takes the gradient of L_T at a moment, at the parameters in place.

        Args:
            moment: What is replayed.
            theta: Some of the module's own parameters.
            leaves: Raw λ, as from :meth:`leaves`, with respect to which it is taken as well.
            exact: As for :meth:`at`.

        Returns:
            One tensor, or None, per parameter and leaf; None where the step has no loss.
        """
        lam = self.leaves() if leaves is None else leaves
        with torch.enable_grad(), self.at(moment, theta, exact=exact) as at:
            loss = at(theta, lam)
            if loss is None:
                return None
            return _unscaled(gradient(loss, [*theta, *(leaves or ())]), self.scale)


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
    ``validation_step`` returns (a tensor, or a mapping with ``"loss"``); the value that it logs
    under ``monitor``.

    Args:
        trainer: The trainer.
        module: The LightningModule.
        loss_function: See above.
        monitor: The name under which ``validation_step`` logs its loss.
        dataloader_idx: Passed to a ``validation_step`` that takes it.
        shield: That of the training. Default: one of its own.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        loss_function: Callable[[pl.LightningModule, Any], Tensor] | None = None,
        monitor: str = "val_loss",
        dataloader_idx: int = 0,
        shield: Shield | None = None,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._loss_function = loss_function
        self._monitor = monitor
        self._dataloader_idx = dataloader_idx
        self._shield = shield or Shield(trainer, module)

    def gradient(self, batch: Any, batch_idx: int, theta: Sequence[Tensor]) -> list[Tensor | None]:
        """Takes the gradient of L_V at the parameters in place.

        Raises:
            MisconfigurationException: If there is no loss, it is not a scalar, or it does not
                depend on the parameters.
        """
        with self._at(batch, batch_idx) as (loss, scale):
            return _unscaled(gradient(loss, theta), scale)

    def gradient_products(
        self,
        batch: Any,
        batch_idx: int,
        theta: Sequence[Tensor],
        stacks: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """Multiplies the gradient with directions, as :func:`gradient_products` does.

        Raises:
            MisconfigurationException: As for :meth:`gradient`.
        """
        with self._at(batch, batch_idx) as (loss, scale):
            return _unscaled(gradient_products(loss, theta, stacks), scale)

    @contextmanager
    def _at(self, batch: Any, batch_idx: int) -> Iterator[tuple[Tensor, float]]:
        """Gives L_V times the factor of the gradient scaler, and that factor."""
        module = self._module
        logged: dict[str, Any] = {}

        def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            logged[name] = value

        on_cuda = self._shield.device.type == "cuda"
        with (
            torch.enable_grad(),
            eager(),
            native_recurrent(module) if on_cuda else nullcontext(),
            differentiable_checkpoints(),
            self._shield(log=log),
            stage(self._trainer, RunningStage.VALIDATING),
        ):
            module.eval()
            for part in module.modules():
                if isinstance(part, PenaltyMixin):
                    update_record(part, without_penalty=True)
            with (
                self._trainer.precision_plugin.val_step_context(),
                self._shield.gradients_aside(),
            ):
                output, origin = self._evaluate(copy_batch(batch), batch_idx, logged)
            loss = _check_validation_loss(output, origin)
            # As in training: without its factor, gradients in float16 would vanish.
            scale = _scaler_factor(self._trainer)
            if scale != 1:
                scale /= self._trainer.accumulate_grad_batches
            with without_hooks(module.parameters()):
                yield loss * scale, scale

    def _evaluate(self, batch: Any, batch_idx: int, logged: dict[str, Any]) -> tuple[Any, str]:
        """Returns the loss, and where it comes from."""
        module = self._module
        if self._loss_function is not None:
            return self._loss_function(module, batch), "the loss function"
        origin = f"{type(module).__name__}.validation_step"
        arguments = _step_arguments(module.validation_step, batch, batch_idx, self._dataloader_idx)
        output: Any = module.validation_step(*arguments)
        if isinstance(output, dict):
            output = output.get("loss")
        if output is None:
            output = logged.get(self._monitor)
            origin += f", logged as {self._monitor!r},"
        if output is None:
            raise MisconfigurationException(
                f"{type(module).__name__}.validation_step returned no loss and logged "
                f"{sorted(logged) or 'nothing'}. Return the loss (a tensor, or a dict with "
                "'loss'), or pass monitor= (the name under which it is logged) or "
                "validation_loss= (a function of the module and a batch) to OnlineHPOCallback"
            )
        return output, origin


def _check_validation_loss(value: Any, origin: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise MisconfigurationException(
            f"The validation loss of {origin} is a {type(value).__name__}, expected a tensor with "
            "a graph; do not call .item() on it"
        )
    if value.numel() != 1:
        raise MisconfigurationException(
            f"The validation loss of {origin} has shape {tuple(value.shape)}, expected a scalar; "
            "reduce it, for example with .mean()"
        )
    if not value.requires_grad:
        raise MisconfigurationException(
            f"The validation loss of {origin} is detached from the parameters. Compute it without "
            "torch.no_grad() and without .detach(); Lightning itself disables gradients where they "
            "are not needed"
        )
    return value.reshape(())


def _step_arguments(step: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
    """Returns as many of (batch, batch_idx, dataloader_idx) as a step takes."""
    parameters = inspect.signature(step).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return arguments
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return arguments[: len(positional)]
