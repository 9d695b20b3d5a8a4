"""The start of a window, to which θ can return."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from lightning_hpo.distributed import local
from lightning_hpo.step.training_map import TrainingMap


class Snapshot:
    """A copy of θ, the optimizer's state and the buffers, to return to.

    Args:
        training: What all steps of the training share.
        saved: What :meth:`state_dict` of an earlier snapshot returned. Default: the present.
    """

    def __init__(self, training: TrainingMap, saved: dict[str, Any] | None = None) -> None:
        self._training = training
        optimizer = training.dynamics.optimizer
        self._values = saved or {
            "theta": [local(p.detach()).clone() for p in training.theta],
            "state": [copy.deepcopy(dict(optimizer.state.get(p, {}))) for p in training.theta],
            "buffers": [b.detach().clone() for b in training.objective.buffers()],
        }

    @torch.no_grad()
    def restore(self) -> None:
        """Puts everything back; the λ themselves stay."""
        training, values = self._training, self._values
        # Parameters that have joined the training within the window stay.
        for p, value, state in zip(training.theta, values["theta"], values["state"], strict=False):
            local(p).copy_(value)
            training.dynamics.optimizer.state[p] = {
                name: v.to(p.device) if isinstance(v, Tensor) and v.dim() else v
                for name, v in state.items()
            }
        for buffer, value in zip(training.objective.buffers(), values["buffers"], strict=True):
            buffer.copy_(value)

    def state_dict(self) -> dict[str, Any] | None:
        """Returns the copies; None for sharded parameters, of which each process has its own."""
        return None if self._training.sharded else self._values
