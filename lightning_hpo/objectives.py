"""training_step and validation_step as pure losses of (θ, λ), and the shield around a replay."""

from __future__ import annotations

import inspect
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import RunningStage
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_hpo.derivatives import Loss
from lightning_hpo.hyperparameters import Hyperparameter
from lightning_hpo.regularizers.penalty import PenaltyMixin
from lightning_hpo.rng import RandomState, forked_rng

# --------------------------------------------------------------------------------------------------
# The shield
# --------------------------------------------------------------------------------------------------

_MODULE_INTERNALS = frozenset(vars(nn.Module()))

# Tensors and arrays up to this many elements, kept as plain attributes, are copied for a replay. A
# larger one is rather data than a counter; a replay that writes to it is refused.
_COPIED_ELEMENTS = 1_000_000


class Shield:
    """Makes a call of ``training_step`` or ``validation_step`` invisible.

    Inside :meth:`__call__`, buffers are clones, metrics are clones, ``self.log`` and the loggers
    are mute; afterwards every attribute of every module is what it was. Buffers are rebound, never
    written in place, so a graph that was built inside may be used after the shield is gone.

    Args:
        trainer: The trainer.
        module: The LightningModule.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._trainer = trainer
        self._module = module
        self._metrics: dict[int, tuple[nn.Module, nn.Module]] = {}

    @property
    def device(self) -> torch.device:
        """The device whose random numbers the module draws."""
        return self._trainer.strategy.root_device

    @contextmanager
    def __call__(
        self,
        *,
        rng: RandomState | None = None,
        state: ModuleState | None = None,
        swaps: dict[int, Tensor] | None = None,
        log: Callable[..., None] | None = None,
    ) -> Iterator[None]:
        """Opens the shield.

        Args:
            rng: The random state to run under. Default: the present one.
            state: What the modules held at an earlier moment.
            swaps: Tensors to put in the place of parameters and buffers, by the ``id`` of these.
            log: What ``self.log`` calls instead. Default: nothing happens.
        """
        trainer = self._trainer
        modules = list(self._module.modules())
        before = [(module, dict(vars(module))) for module in modules]
        copied: dict[int, Any] = {}
        shared: list[tuple[str, Tensor, int]] = []
        swaps = {**_frozen_copies(self._module, shared), **(swaps or {})}
        loggers = trainer.loggers
        metrics = []
        try:
            with forked_rng(self.device, rng):
                for module in modules:
                    if not isinstance(module, torch.jit.ScriptModule):
                        earlier = None if state is None else state.get(id(module))
                        _isolate(module, earlier, swaps)
                        _copy_attributes(module, earlier, copied, shared)
                        metrics += self._swap_metrics(module)
                    if isinstance(module, pl.LightningModule):
                        _mute(module, log or _nothing)
                trainer.loggers = [DummyLogger() for _ in loggers]
                yield
        finally:
            trainer.loggers = loggers
            for module, attributes in before:
                vars(module).clear()
                vars(module).update(attributes)
            for metric in metrics:
                metric.reset()
        for name, tensor, version in shared:
            if tensor._version != version:
                raise MisconfigurationException(
                    f"A replay of the step wrote to the attribute {name!r}, a tensor of shape "
                    f"{tuple(tensor.shape)}, in place, which cannot be undone; register it as a "
                    "buffer"
                )

    def _swap_metrics(self, module: nn.Module) -> list[Any]:
        """Puts clones in the place of the metrics that are direct children of ``module``.

        A metric's state is written in place, so that a reference to it would not protect it.
        """
        if isinstance(module, (Metric, MetricCollection)):
            return []
        clones: dict[str, Any] = {}
        for name, child in module._modules.items():
            if isinstance(child, (Metric, MetricCollection)):
                known = self._metrics.get(id(child))
                if known is None or known[0] is not child:
                    clone = child.clone()
                    clone.reset()
                    self._metrics[id(child)] = known = (child, clone)
                clones[name] = known[1]
        if clones:
            vars(module)["_modules"] = {**module._modules, **clones}
        return list(clones.values())


ModuleState = dict[int, tuple[dict[str, "Tensor | None"], dict[str, Any]]]
"""Copies of the buffers and of the plain attributes, by the ``id`` of the module that owns them."""


def capture_state(module: nn.Module) -> ModuleState:
    """Copies the buffers and attributes of a module tree, for a replay at a later moment."""
    copied: dict[int, Any] = {}
    return {
        id(m): (
            {name: None if b is None else b.detach().clone() for name, b in m._buffers.items()},
            {name: _copied(value, copied) for name, value in vars(m).items() if _is_own(name)},
        )
        for m in module.modules()
        if not isinstance(m, (Metric, torch.jit.ScriptModule))
    }


def _is_own(name: str) -> bool:
    """Whether an attribute is the user's, or the mode of the module, and no machinery of torch."""
    return name not in _MODULE_INTERNALS or name == "training"


def _isolate(
    module: nn.Module,
    earlier: tuple[dict[str, Tensor | None], dict[str, Any]] | None,
    swaps: dict[int, Tensor],
) -> None:
    """Rebinds a module's tensors: buffers to clones, and whatever is swapped."""
    attributes = vars(module)
    if module._buffers:
        values = {} if earlier is None else earlier[0]

        def stand_in(name: str, buffer: Tensor | None) -> Tensor | None:
            if buffer is None or id(buffer) in swaps:
                return None if buffer is None else swaps[id(buffer)]
            value = values.get(name)
            return (buffer if value is None else value).detach().clone()

        attributes["_buffers"] = {name: stand_in(name, b) for name, b in module._buffers.items()}
    if swaps and module._parameters:
        attributes["_parameters"] = {
            name: None if p is None else swaps.get(id(p), p)
            for name, p in module._parameters.items()
        }
        if "_flat_weights" in attributes:  # recurrent layers hold a second list of them
            attributes["_flat_weights"] = [swaps.get(id(w), w) for w in attributes["_flat_weights"]]


def _frozen_copies(module: nn.Module, shared: list[tuple[str, Tensor, int]]) -> dict[int, Tensor]:
    """Copies the parameters that do not require grad: a step may write to them (mean teachers).

    A large frozen backbone is shared instead, and watched.
    """
    parameters = dict(module.named_parameters())
    frozen = {name: p for name, p in parameters.items() if not p.requires_grad}
    size = sum(p.numel() for p in parameters.values())
    if 5 * sum(p.numel() for p in frozen.values()) > 4 * size:
        shared += [(name, p, p._version) for name, p in frozen.items()]
        return {}
    return {id(p): nn.Parameter(p.detach().clone(), False) for p in frozen.values()}


def _copy_attributes(
    module: nn.Module,
    earlier: tuple[dict[str, Tensor | None], dict[str, Any]] | None,
    copied: dict[int, Any],
    shared: list[tuple[str, Tensor, int]],
) -> None:
    """Gives a replay copies of what a module keeps in plain attributes: lists, counts, sums.

    Args:
        module: The module.
        earlier: What it held at an earlier moment; None: the present.
        copied: Copies made so far, by the ``id`` of the original: what is shared stays shared.
        shared: Receives the tensors that are too large to be copied, with their versions.
    """
    if isinstance(module, (Metric, MetricCollection)):
        return
    attributes = vars(module)
    if earlier is not None:
        attributes.update(earlier[1])
    for name, value in list(attributes.items()):
        if not _is_own(name):
            continue
        if isinstance(value, Tensor) and value.numel() > _COPIED_ELEMENTS:
            shared.append((name, value, value._version))
        else:
            attributes[name] = _copied(value, copied)


def _copied(value: Any, copied: dict[int, Any]) -> Any:
    """Copies containers all through, tensors, arrays, generators and plain objects.

    Anything else is shared.
    """
    kind = type(value)
    if isinstance(value, _ATOMS):
        return value
    if id(value) not in copied:
        if kind in _COPIERS:
            _COPIERS[kind](value, copied)
        elif isinstance(value, Metric):
            copied[id(value)] = value.clone()
        elif _is_plain_object(value):
            copied[id(value)] = copy = object.__new__(kind)
            vars(copy).update({name: _copied(v, copied) for name, v in vars(value).items()})
        else:
            copied[id(value)] = value
    return copied[id(value)]


def _is_plain_object(value: Any) -> bool:
    """Whether an object is a bare bundle of numbers and containers, as an average meter is."""
    kind = type(value)
    return (
        kind.__new__ is object.__new__  # type: ignore[comparison-overlap]
        and not isinstance(value, nn.Module)
        and not callable(value)
        and hasattr(value, "__dict__")
        and not hasattr(kind, "__slots__")
        and all(isinstance(v, _ATOMS) or type(v) in _COPIERS for v in vars(value).values())
    )


def _deep_copy(value: Any, copied: dict[int, Any]) -> None:
    copied[id(value)] = deepcopy(value)


def _copy_generator(value: torch.Generator, copied: dict[int, Any]) -> None:
    clone = copied[id(value)] = torch.Generator(value.device)
    clone.set_state(value.get_state())


def _copy_sequence(value: Any, copied: dict[int, Any]) -> None:
    copy = copied[id(value)] = value.copy()
    copy.clear()
    copy.extend(_copied(item, copied) for item in value)


def _copy_mapping(value: Any, copied: dict[int, Any]) -> None:
    copy = copied[id(value)] = value.copy()
    for key, item in value.items():
        copy[key] = _copied(item, copied)


def _copy_set(value: Any, copied: dict[int, Any]) -> None:
    copied[id(value)] = value.copy()


def _copy_tensor(value: Tensor, copied: dict[int, Any]) -> None:
    # A tensor with a graph was computed, and is not written to.
    small = value.numel() <= _COPIED_ELEMENTS and not value.requires_grad
    copied[id(value)] = value.clone() if small else value


def _copy_array(value: np.ndarray[Any, Any], copied: dict[int, Any]) -> None:
    copied[id(value)] = value.copy() if value.size <= _COPIED_ELEMENTS else value


_COPIERS: dict[type, Callable[[Any, dict[int, Any]], None]] = {
    list: _copy_sequence,
    deque: _copy_sequence,
    dict: _copy_mapping,
    OrderedDict: _copy_mapping,
    defaultdict: _copy_mapping,
    Counter: _copy_mapping,
    set: _copy_set,
    Tensor: _copy_tensor,
    np.ndarray: _copy_array,
    torch.Generator: _copy_generator,
    np.random.Generator: _deep_copy,
    np.random.RandomState: _deep_copy,
    random.Random: _deep_copy,
}

_ATOMS = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Takes the place of a muted method."""


def _mute(module: pl.LightningModule, log: Callable[..., None]) -> None:
    def log_dict(dictionary: Any, *args: Any, **kwargs: Any) -> None:
        for name, value in dictionary.items():
            log(name, value)

    vars(module).update(log=log, log_dict=log_dict, print=_nothing)


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
        self._shield = Shield(trainer, module)

    def moment(self, batch: Any, batch_idx: int, *, keep: bool = False) -> Moment:
        """Records the present as the start of a ``training_step``.

        Args:
            batch: The batch, on the device.
            batch_idx: Its index in the epoch.
            keep: Whether the replay happens later; costs a copy of the batch and the buffers.
        """
        return Moment(
            batch=copy_batch(batch) if keep else batch,
            batch_idx=batch_idx,
            rng=RandomState.capture(self._shield.device),
            global_step=self._trainer.global_step,
            epoch=self._trainer.current_epoch,
            state=capture_state(self._module) if keep else None,
        )

    def buffers(self) -> list[Tensor]:
        """Returns the module's buffers, raw λ excepted."""
        raws = {id(m.raw) for m in self._module.modules() if isinstance(m, Hyperparameter)}
        return [b for b in self._module.buffers() if id(b) not in raws]

    def leaves(self) -> list[Tensor]:
        """Returns raw λ as fresh leaves that require grad, in the order of the hyperparameters."""
        return [h.raw.detach().clone().requires_grad_() for h in self._hyperparameters]

    def at(self, moment: Moment, theta: Sequence[Tensor]) -> Loss:
        """Returns L_T at a moment as a function of (θ, raw λ).

        Args:
            moment: What is replayed.
            theta: The module's own parameters, in whose place the function's first argument is put.
        """

        def loss(values: Sequence[Tensor], lam: Sequence[Tensor]) -> Tensor | None:
            swaps = {id(p): v for p, v in zip(theta, values, strict=True) if p is not v}
            swaps |= {id(h.raw): raw for h, raw in zip(self._hyperparameters, lam, strict=True)}
            with (
                self._shield(rng=moment.rng, state=moment.state, swaps=swaps),
                _counted_as(self._trainer, moment.global_step, moment.epoch),
                self._trainer.precision_plugin.train_step_context(),
            ):
                step = self._module.training_step
                output = step(*_step_arguments(step, copy_batch(moment.batch), moment.batch_idx))
            return _training_loss(output)

        return loss


@contextmanager
def _counted_as(trainer: pl.Trainer, global_step: int, epoch: int) -> Iterator[None]:
    """Lets ``global_step`` and ``current_epoch`` read as they did, for losses with a schedule."""
    loop = trainer.fit_loop.epoch_loop.automatic_optimization
    total = loop.optim_progress.optimizer.step.total
    epochs = trainer.fit_loop.epoch_progress.current
    before = total.completed, epochs.completed
    total.completed, epochs.completed = global_step, epoch
    try:
        yield
    finally:
        total.completed, epochs.completed = before


def copy_batch(batch: Any) -> Any:
    """Copies the containers and tensors of a batch; objects of other kinds are shared."""
    return apply_to_collection(batch, Tensor, torch.clone)


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
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        loss_function: Callable[[pl.LightningModule, Any], Tensor] | None = None,
        monitor: str = "val_loss",
        dataloader_idx: int = 0,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._loss_function = loss_function
        self._monitor = monitor
        self._dataloader_idx = dataloader_idx
        self._shield = Shield(trainer, module)

    def loss(self, batch: Any, batch_idx: int) -> Tensor:
        """Evaluates L_V at the parameters in place.

        Raises:
            MisconfigurationException: If there is no loss, it is not a scalar, or it does not
                depend on the parameters.
        """
        module = self._module
        logged: dict[str, Any] = {}

        def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            logged[name] = value

        with (
            torch.enable_grad(),
            self._shield(log=log),
            stage(self._trainer, RunningStage.VALIDATING),
            self._trainer.precision_plugin.val_step_context(),
        ):
            module.eval()
            batch = copy_batch(batch)
            for part in module.modules():
                if isinstance(part, PenaltyMixin):
                    vars(part)["_hpo_without_penalty"] = True
            if self._loss_function is not None:
                origin = "the loss function"
                output: Any = self._loss_function(module, batch)
            else:
                origin = f"{type(module).__name__}.validation_step"
                arguments = _step_arguments(
                    module.validation_step, batch, batch_idx, self._dataloader_idx
                )
                output = module.validation_step(*arguments)
                if isinstance(output, dict):
                    output = output.get("loss")
                if output is None:
                    output = logged.get(self._monitor)
                    origin += f", logged as {self._monitor!r},"
                if output is None:
                    raise MisconfigurationException(
                        f"{type(module).__name__}.validation_step returned no loss and logged "
                        f"{sorted(logged) or 'nothing'}. Return the loss (a tensor, or a dict "
                        "with 'loss'), or pass monitor= (the name under which it is logged) or "
                        "validation_loss= (a function of the module and a batch) to "
                        "OnlineHPOCallback"
                    )
        return _check_validation_loss(output, origin)


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


@contextmanager
def stage(trainer: pl.Trainer, running: RunningStage) -> Iterator[None]:
    """Lets the trainer appear in another stage, for hooks that ask."""
    before = trainer.state.stage
    trainer.state.stage = running
    try:
        yield
    finally:
        trainer.state.stage = before


def _step_arguments(step: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
    """Returns as many of (batch, batch_idx, dataloader_idx) as a step takes."""
    parameters = inspect.signature(step).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return arguments
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return arguments[: len(positional)]
