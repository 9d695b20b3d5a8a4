"""Derivatives of the optimizer's step; knows nothing of Lightning."""

import torch

from lightning_hpo.dynamics.adam import AdamDynamics
from lightning_hpo.dynamics.base import Dynamics, OptimizerStep
from lightning_hpo.dynamics.blocks import jvp_lean_, multiply_by_slope_, vjp_lean_
from lightning_hpo.dynamics.clipping import GradientClipping
from lightning_hpo.dynamics.entry import Entry
from lightning_hpo.dynamics.generic import GenericDynamics, is_elementwise
from lightning_hpo.dynamics.options import OptimizerOptions, add_to_tangent_, pull_back
from lightning_hpo.dynamics.sgd import SGDDynamics
from lightning_hpo.dynamics.state import THETA, State
from lightning_hpo.dynamics.verification import Verification


def make_dynamics(optimizer: torch.optim.Optimizer) -> Dynamics:
    """Chooses the closed form where there is one, else the generic path.

    Subclasses of SGD, Adam and AdamW take the generic path, since their step may differ.
    """
    kind = type(optimizer)
    if kind is torch.optim.SGD:
        return SGDDynamics(optimizer)
    if kind in (torch.optim.Adam, torch.optim.AdamW) and not any(
        group["amsgrad"] for group in optimizer.param_groups
    ):
        return AdamDynamics(optimizer)
    return GenericDynamics(optimizer)


__all__ = [
    "THETA",
    "AdamDynamics",
    "Dynamics",
    "Entry",
    "GenericDynamics",
    "GradientClipping",
    "OptimizerOptions",
    "OptimizerStep",
    "SGDDynamics",
    "State",
    "Verification",
    "add_to_tangent_",
    "is_elementwise",
    "jvp_lean_",
    "make_dynamics",
    "multiply_by_slope_",
    "pull_back",
    "vjp_lean_",
]
