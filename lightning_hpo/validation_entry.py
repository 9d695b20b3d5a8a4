"""The entry into validation: evaluation mode, and the hooks of the module that Lightning calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_hpo._lightning import classes
from lightning_hpo._trainer import overrides
from lightning_hpo.distributed import is_sharded
from lightning_hpo.held_out import HeldOutBatch
from lightning_hpo.shield import Shadow

_MODE, _END = "on_validation_model_eval", "on_validation_model_train"
_STARTS = ("on_validation_start", "on_validation_epoch_start")
_BATCH = "on_validation_batch_start"


class ValidationEntry:
    """Enters validation as Lightning does before it calls ``validation_step``.

    Of the module's hooks those that it overrides are called, in Lightning's order:
    ``on_validation_model_eval`` (else ``eval()``), ``on_validation_start``,
    ``on_validation_epoch_start``, ``on_validation_batch_start``; afterwards
    ``on_validation_model_train``. Whoever enters undoes what they do to the modules.

    Args:
        trainer: The trainer.
        module: The LightningModule.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._trainer = trainer
        self._module = module
        self._hooks = {
            name
            for name in (_MODE, *_STARTS, _BATCH, _END)
            if overrides(module, name, *classes("LightningModule"))
        }

    @contextmanager
    def __call__(self, batch: HeldOutBatch) -> Iterator[None]:
        """Enters, and leaves."""
        with self._wrappers_keep_their_mode(), self._optimizers_keep_theirs():
            for _, call in self._calls(batch):
                call()
            yield
            if _END in self._hooks:
                getattr(self._module, _END)()

    def settle(self, batch: HeldOutBatch, theta: Sequence[Tensor]) -> None:
        """Finds out which hooks can be called outside of Lightning's own loop; warns about others.

        Left out are those that fail, and those that write to trained parameters, as hooks do that
        put averaged weights in their place: L_V is to be a function of the trained ones.

        Args:
            batch: A held-out batch.
            theta: The parameters that the optimizer moves.
        """
        for optimizer in self._optimizers_with_modes():
            warnings.warn(
                f"OnlineHPOCallback: {type(optimizer).__name__} has eval() and train(), which "
                "exchange the weights that it trains for others. Held-out batches are evaluated at "
                "those that it trains",
                stacklevel=2,
            )
        if not self._hooks & {_MODE, *_STARTS, _BATCH} or is_sharded(theta):
            return
        before = [(p.data, p.detach().clone(), p.requires_grad) for p in theta]
        try:
            # Averages are the weights themselves at first; moved weights show what is written.
            for p in theta:
                p.data.add_(1)
            with self._wrappers_keep_their_mode(), self._optimizers_keep_theirs():
                for name, call in self._calls(batch):
                    fault = self._fault_of(call, before, theta)
                    if fault is not None and name in self._hooks:
                        self._leave_out(name, fault)
        finally:
            for p, (data, value, requires_grad) in zip(theta, before, strict=True):
                p.data = data
                data.copy_(value)
                p.requires_grad_(requires_grad)

    def _calls(self, batch: HeldOutBatch) -> list[tuple[str, Callable[[], Any]]]:
        module = self._module
        mode = getattr(module, _MODE) if _MODE in self._hooks else module.eval
        calls = [(_MODE, mode)]
        calls += [(name, getattr(module, name)) for name in _STARTS if name in self._hooks]
        if _BATCH in self._hooks:
            arguments = [batch.batch, batch.batch_idx]
            if batch.dataloader_idx is not None:
                arguments.append(batch.dataloader_idx)
            calls.append((_BATCH, lambda: getattr(module, _BATCH)(*arguments)))
        return calls

    @staticmethod
    def _fault_of(
        call: Callable[[], Any],
        before: Sequence[tuple[Tensor, Tensor, bool]],
        theta: Sequence[Tensor],
    ) -> str | None:
        """Calls a hook, and says what is wrong with it."""
        fault = None
        try:
            call()
        except Exception as error:  # the user's code may raise anything
            fault = f"failed ({type(error).__name__}: {error})"
        for p, (data, value, requires_grad) in zip(theta, before, strict=True):
            if p.requires_grad != requires_grad:
                fault = fault or "changes requires_grad of trained parameters"
                p.requires_grad_(requires_grad)
            if p.data_ptr() != data.data_ptr() or not torch.equal(p.detach(), value + 1):
                fault = fault or "writes to trained parameters"
                p.data = data
                data.copy_(value).add_(1)
        return fault

    def _leave_out(self, name: str, fault: str) -> None:
        self._hooks -= {name, _END} if name == _MODE else {name}
        warnings.warn(
            f"OnlineHPOCallback: {type(self._module).__name__}.{name} {fault}, so held-out batches "
            "are evaluated without it. If L_V depends on it, pass "
            "validation_loss=lambda module, batch: ... to OnlineHPOCallback",
            stacklevel=2,
        )

    def _optimizers_with_modes(self) -> list[Any]:
        """Returns the optimizers that put other weights in place for a validation."""
        return [
            optimizer
            for optimizer in self._trainer.optimizers
            if all(callable(getattr(optimizer, mode, None)) for mode in ("eval", "train"))
        ]

    @contextmanager
    def _optimizers_keep_theirs(self) -> Iterator[None]:
        """Lets hooks and the module's ``train`` call ``eval`` of an optimizer in vain.

        What it does to the weights could be undone to rounding only.
        """
        optimizers = self._optimizers_with_modes()
        if optimizers:
            optimizers += getattr(self._trainer.strategy, "_lightning_optimizers", [])
        with ExitStack() as stack:
            for optimizer in optimizers:
                for mode in ("eval", "train"):
                    stack.callback(Shadow(optimizer, mode, _nothing).remove)
            yield

    @contextmanager
    def _wrappers_keep_their_mode(self) -> Iterator[None]:
        """Puts back the mode of what the strategy wraps the module in, which its hooks may set."""
        inner = set(self._module.modules())
        outer = [m for m in self._trainer.model.modules() if m not in inner]  # type: ignore[union-attr]
        modes = [m.training for m in outer]
        try:
            yield
        finally:
            for m, mode in zip(outer, modes, strict=True):
                m.training = mode


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Takes the place of a method."""
