"""Averages of the module that other callbacks keep, in which λ is not averaged."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_hpo.hyperparameters import Hyperparameter, named_hyperparameters


class Averages:
    """Keeps λ in averaged copies of a module at the tuned values.

    Callbacks that average weights (WeightAveraging, EMA) keep a copy of the module, save it in
    checkpoints, and copy it back over the module at the end. An average of λ over the training is
    nothing that was tuned.

    Args:
        trainer: The trainer, whose callbacks have been set up.
        module: The LightningModule.
        callback: The callback that tunes.
    """

    def __init__(self, trainer: Any, module: nn.Module, callback: Any) -> None:
        tuned = named_hyperparameters(module)
        self._pairs: list[tuple[Hyperparameter, Hyperparameter]] = []
        for other in trainer.callbacks:
            for value in () if other is callback else list(vars(other).values()):
                average = value.module if isinstance(value, AveragedModel) else value
                if isinstance(average, type(module)) and average is not module:
                    copies = named_hyperparameters(average).items()
                    self._pairs += [(h, tuned[name]) for name, h in copies if name in tuned]
        self.follow()

    @torch.no_grad()
    def follow(self) -> None:
        """Gives the copies the present values; to rounding, if they are averaged with these."""
        for copy, own in self._pairs:
            copy.raw.copy_(own.raw)
