"""Hooks of others that stand between the start of a batch and the optimizer's step."""

from __future__ import annotations

import lightning.pytorch as pl
from torch.optim.optimizer import _global_optimizer_pre_hooks

from lightning_hpo._lightning import classes
from lightning_hpo._trainer import is_foreign, overrides
from lightning_hpo.regularizers import PenaltyMixin

# Those of modules and callbacks between the start of a batch and the optimizer's step.
_BETWEEN = (
    "on_before_zero_grad",
    "optimizer_zero_grad",
    "on_before_backward",
    "backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "optimizer_step",
)


def may_change_gradients(
    trainer: pl.Trainer, module: pl.LightningModule, callback: pl.Callback
) -> bool:
    """Whether some hook may change the gradient between the backward pass and this callback."""
    others = [c for c in trainer.callbacks if c is not callback]  # type: ignore[attr-defined]
    return (
        any(
            overrides(module, hook, *classes("LightningModule"))
            for hook in ("backward", "on_after_backward", "optimizer_zero_grad")
        )
        or any(
            overrides(other, hook, *classes("Callback"))
            for other in others
            for hook in ("on_after_backward", "on_before_optimizer_step")
        )
        or any(p._backward_hooks or p._post_accumulate_grad_hooks for p in module.parameters())
    )


def may_interfere(trainer: pl.Trainer, module: pl.LightningModule, callback: pl.Callback) -> bool:
    """Whether some hook stands between the start of a batch and the optimizer's step.

    It may change parameters, gradients or what the loss depends on: a step can then be replayed at
    the start of its batch only.
    """
    (optimizer,) = trainer.optimizers
    return (
        any(overrides(module, hook, PenaltyMixin, *classes("LightningModule")) for hook in _BETWEEN)
        or any(
            overrides(other, hook, *classes("Callback"))
            for other in trainer.callbacks  # type: ignore[attr-defined]
            if other is not callback
            for hook in _BETWEEN
        )
        or any(p._post_accumulate_grad_hooks for p in module.parameters())
        or is_foreign(trainer.precision_plugin)
        or is_foreign(trainer.strategy)
        # One is that of the callback; those that wrap another optimizer may have none.
        or len(getattr(optimizer, "_optimizer_step_pre_hooks", ())) > 1
        or bool(_global_optimizer_pre_hooks)
    )
