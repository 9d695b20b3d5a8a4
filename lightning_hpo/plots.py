"""Pictures of a training, for people; matplotlib is optional."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from lightning_hpo.hyperparameters import Constraint, Positive, UnitInterval
from lightning_hpo.hyperparameters.categorical import labels
from lightning_hpo.monitoring import History

_COLUMNS = 4


def plot(
    history: History,
    constraints: Mapping[str, Constraint],
    names: Sequence[str] | None,
    choices: Mapping[str, Sequence[Any]],
) -> tuple[Any, Any]:
    """Draws a history; see :meth:`OnlineHPOCallback.plot`."""
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "OnlineHPOCallback.plot() draws with matplotlib, which is not installed. Install it "
            "(pip install matplotlib), or take the numbers from callback.history.columns()"
        ) from None
    if not history:
        raise RuntimeError(
            "OnlineHPOCallback.plot(): there has been no update yet. Call it after trainer.fit"
        )
    known = history[-1].values
    names = list(known)[:_COLUMNS] if names is None else list(names)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise KeyError(f"OnlineHPOCallback.plot(): got {unknown}, expected some of {sorted(known)}")
    if not names:
        raise ValueError(
            f"OnlineHPOCallback.plot(): got no names, expected some of {sorted(known)}, or None "
            "for the first few"
        )
    columns = history.columns()
    steps = columns["step"]
    figure, axes = plt.subplots(
        3,
        len(names),
        figsize=(4.2 * len(names) + 0.6, 7.2),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for column, name in zip(axes.T, names, strict=True):
        series = _series(columns, name)
        _draw_values(column[0], steps, series, constraints.get(name), choices.get(name, ()))
        column[0].set_title(name)
        _draw_hypergradients(column[1], steps, _series(columns, name, "_grad"))
        _draw_loss(column[2], steps, columns["loss"])
        column[2].set_xlabel("optimizer steps")
    for ax, label in zip(
        axes[:, 0], ("value", "hypergradient (raw)", "held-out loss"), strict=True
    ):
        ax.set_ylabel(label)
    return figure, axes


def _series(columns: Mapping[str, list[Any]], name: str, suffix: str = "") -> list[list[float]]:
    """Returns the column of a hyperparameter; of several elements, those of the first ten."""
    own = [
        column
        for key, column in columns.items()
        if key in (name + suffix, f"{name}.mean{suffix}")
        or (key.startswith(f"{name}[") and key.endswith(f"]{suffix}"))
    ]
    return own[:10]


def _draw_values(
    ax: Any,
    steps: list[int],
    series: list[list[float]],
    constraint: Constraint | None,
    choices: Sequence[Any],
) -> None:
    # Of yes and no, the probability of yes alone.
    names = labels(choices)[: len(series)] if len(series) > 1 else []
    for values, label in zip_longest(series, names):
        ax.plot(steps, values, lw=1.4, label=label)
    if names:
        ax.legend(fontsize=8, title="probability of", title_fontsize=8)
    low, high = (getattr(constraint, bound, math.nan) for bound in ("low", "high"))
    if isinstance(constraint, UnitInterval):
        low, high = 0.0, 1.0
    if isinstance(constraint, Positive):
        ax.set_yscale("log")
    bottom, top = ax.get_ylim()
    for bound in (low, high):
        if isinstance(bound, float) and math.isfinite(bound) and bottom <= bound <= top:
            ax.axhline(bound, color="0.6", lw=1, ls="--")


def _draw_hypergradients(ax: Any, steps: list[int], series: list[list[float]]) -> None:
    width = max(1, len(steps) // 20)
    for i, values in enumerate(series):
        mean, spread = _moving(torch.tensor(values, dtype=torch.float64), width)
        color = f"C{i % 10}"
        if len(series) == 1:
            ax.plot(steps, values, ".", ms=2, color="0.7")
            ax.fill_between(steps, mean - spread, mean + spread, color=color, alpha=0.25, lw=0)
        ax.plot(steps, mean, lw=1.4, color=color)
    ax.axhline(0.0, color="0.6", lw=1)


def _draw_loss(ax: Any, steps: list[int], losses: list[float]) -> None:
    width = max(1, len(steps) // 20)
    mean, _ = _moving(torch.tensor(losses, dtype=torch.float64), width)
    ax.plot(steps, losses, ".", ms=2, color="0.7")
    ax.plot(steps, mean, lw=1.4)


def _moving(values: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Returns the mean and standard deviation over the last ``width`` finite values."""
    means, spreads = [], []
    for i in range(len(values)):
        part = values[max(0, i + 1 - width) : i + 1]
        part = part[torch.isfinite(part)]
        means.append(part.mean() if len(part) else torch.tensor(math.nan))
        spreads.append(part.std(unbiased=False) if len(part) else torch.tensor(math.nan))
    return torch.stack(means).double(), torch.stack(spreads).double()
