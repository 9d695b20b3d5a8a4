"""After the run: read the values found, and train again with them fixed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_hpo.hyperparameters.hyperparameter import Hyperparameter, named_hyperparameters

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def fixed_values(module: nn.Module) -> dict[str, float | list[Any]]:
    """Reads the constrained value of every hyperparameter of a module.

    Args:
        module: The module that was trained.

    Returns:
        A plain dict from names to floats, or nested lists for tensors; it can be written as JSON.
        Tuned options of the optimizer are not part of the module: ``callback.history[-1].values``
        has them.
    """
    return {
        name: value.item() if (value := h().detach().cpu()).dim() == 0 else value.tolist()
        for name, h in named_hyperparameters(module).items()
    }


def freeze(module: ModuleT, values: Mapping[str, Any] | str | Path) -> ModuleT:
    """Sets hyperparameters to given values and takes them out of the tuning.

    This is the papers' retraining with the values found (Luketina et al. 2016, §3.1). A callback
    leaves frozen hyperparameters alone; those that ``values`` does not name stay tunable.

    Args:
        module: A fresh module.
        values: What :func:`fixed_values` returned, or the path of a Lightning checkpoint.

    Returns:
        The same module.

    Raises:
        ValueError: If a name is unknown, or a value lies outside its constraint or has another
            shape. Nothing is changed then.
    """
    known = named_hyperparameters(module)
    raws = (
        _raw_from_checkpoint(values, known)
        if isinstance(values, (str, Path))
        else {name: _raw(name, known, value) for name, value in values.items()}
    )
    for name, raw in raws.items():
        if name not in known:
            raise ValueError(f"freeze: no hyperparameter {name!r}; there are {sorted(known)}")
        if raw.shape != known[name].raw.shape:
            raise ValueError(
                f"freeze: {name!r} has shape {tuple(raw.shape)}, expected "
                f"{tuple(known[name].raw.shape)}"
            )
    for name, raw in raws.items():
        known[name].raw.copy_(known[name].constraint.project(raw.to(known[name].raw)))
        known[name].frozen = True
    return module


def _raw(name: str, known: Mapping[str, Hyperparameter], value: Any) -> torch.Tensor:
    if name not in known:
        raise ValueError(f"freeze: no hyperparameter {name!r}; there are {sorted(known)}")
    h = known[name]
    try:
        return h.constraint.inverse(torch.as_tensor(value, dtype=h.raw.dtype))
    except ValueError as error:
        raise ValueError(f"freeze: the value of {name!r} is refused: {error}") from None


def _raw_from_checkpoint(
    path: str | Path, known: Mapping[str, Hyperparameter]
) -> dict[str, torch.Tensor]:
    """Looks up the known names: a shared rate stands in the checkpoint under several."""
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    missing = [name for name in known if f"{name}.raw" not in state]
    if missing:
        raise ValueError(f"freeze: the checkpoint {str(path)!r} has no hyperparameters {missing}")
    return {name: state[f"{name}.raw"] for name in known}
