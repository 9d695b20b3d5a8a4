"""What an update leaves behind: a record in the history, and values in the loggers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_hpo.hyperparameters import Hyperparameter

# Above this many elements, the history keeps summaries instead of the tensors themselves.
SUMMARY_ABOVE = 1000

# As many names as a progress bar has room for.
_PROGRESS_BAR_NAMES = 6


@dataclass
class HistoryRecord:
    """One λ update.

    For a hyperparameter of more than 1 000 elements, each entry is a dict with ``min``, ``mean``,
    ``max`` and ``norm`` instead.

    Attributes:
        step: The number of optimizer steps taken when the update was made.
        values: The constrained values after the update: a float, or a list for a tensor.
        hypergradients: dL_V/d(raw λ), shaped like raw λ, on the CPU.
        tangent_norms: ‖dθ/d(raw λ)‖: a float, or a list for a tensor; None for reverse estimators.
        skipped: How many updates have been skipped so far because their hypergradient was not
            finite, this one included.
        outcome: How the solver of an implicit estimator ended (the value of a
            :class:`~lightning_hpo.estimators.SolverOutcome`); None for other estimators.
    """

    step: int
    values: dict[str, Any]
    hypergradients: dict[str, Any]
    tangent_norms: dict[str, Any] | None
    skipped: int
    outcome: str | None = None


def make_record(
    step: int,
    hyperparameters: Mapping[str, Hyperparameter],
    hypergradients: list[Tensor],
    tangent_norms: list[Tensor] | None,
    skipped: int,
    outcome: str | None = None,
) -> HistoryRecord:
    """Collects a record; every tensor is copied to the CPU."""
    names = list(hyperparameters)
    return HistoryRecord(
        step=step,
        values={name: _numbers(h().detach()) for name, h in hyperparameters.items()},
        hypergradients={
            name: _summary(h) if h.numel() > SUMMARY_ABOVE else h.detach().cpu().clone()
            for name, h in zip(names, hypergradients, strict=True)
        },
        tangent_norms=None
        if tangent_norms is None
        else {name: _numbers(t) for name, t in zip(names, tangent_norms, strict=True)},
        skipped=skipped,
        outcome=outcome,
    )


def log_record(
    trainer: pl.Trainer, module: pl.LightningModule, record: HistoryRecord, step: int
) -> None:
    """Sends a record to every logger, and its first values to the progress bar.

    Names: ``hpo/<name>`` (the value), ``hpo/<name>_grad`` and ``hpo/<name>_tangent_norm``. A
    hyperparameter of several elements is logged as its mean, minimum and maximum.
    """
    values: dict[str, float] = {}
    others: dict[str, float] = {}
    for name, value in record.values.items():
        values.update(_flat(f"hpo/{name}", value))
        others.update(_flat(f"hpo/{name}_grad", record.hypergradients[name]))
        if record.tangent_norms is not None:
            others.update(_flat(f"hpo/{name}_tangent_norm", record.tangent_norms[name]))
    for logger in trainer.loggers:
        logger.log_metrics({**values, **others}, step=step)
    if trainer.barebones:
        return  # Lightning warns of every module.log then
    # Logging through the module costs a third of a millisecond per name: only what the progress
    # bar has room for.
    shown = dict(list(values.items())[:_PROGRESS_BAR_NAMES])
    module.log_dict(shown, on_step=True, on_epoch=False, prog_bar=True, logger=False)


def _numbers(tensor: Tensor) -> Any:
    if tensor.numel() == 1:
        return tensor.item()
    return _summary(tensor) if tensor.numel() > SUMMARY_ABOVE else tensor.tolist()


def _summary(tensor: Tensor) -> dict[str, float]:
    t = tensor.detach()
    return {
        "min": t.min().item(),
        "mean": t.mean().item(),
        "max": t.max().item(),
        "norm": torch.linalg.vector_norm(t).item(),
    }


def _flat(name: str, value: Any) -> dict[str, float]:
    """Returns the scalars to log for a number, a tensor, a nested list or a summary."""
    if isinstance(value, float):
        return {name: value}
    if not isinstance(value, dict):
        tensor = torch.as_tensor(value)
        if tensor.numel() == 1:
            return {name: tensor.item()}
        value = _summary(tensor)
    return {f"{name}/{key}": value[key] for key in ("mean", "min", "max")}
