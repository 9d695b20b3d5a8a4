"""After the run: read the values found, and train again with them fixed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch.core.optimizer import _configure_optimizers
from torch import Tensor, nn

from lightning_hpo._arguments import did_you_mean
from lightning_hpo._record import record_of, update_record
from lightning_hpo.dynamics import OptimizerOptions
from lightning_hpo.hyperparameters import (
    Hyperparameter,
    LSTMController,
    named_hyperparameters,
)

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# What optimizers of torch call their options; values found for them have "optimizer." before it.
_OPTIONS = frozenset(
    ("lr", "weight_decay", "momentum", "betas", "eps", "dampening", "alpha", "rho", "lambd")
)
_NOT_RESOLVED = (
    'freeze: {!r} has no value yet: its init="auto" is resolved at the start of a training. Take '
    "what was found after one, or leave it out: the next training resolves it"
)


def fixed_values(module: nn.Module) -> dict[str, float | list[Any] | str]:
    """Reads the constrained value of every hyperparameter of a module.

    Args:
        module: The module that was trained, or that is to be.

    Returns:
        A plain dict from names to floats, or nested lists for tensors; it can be written as JSON.
        Options of the optimizer that the last callback has tuned with this module are among them,
        as ``optimizer.<option>``; under a learning-rate schedule ``optimizer.lr`` is the scale on
        it. A strength with ``init="auto"`` that no training has resolved is ``"auto"``.

    Raises:
        TypeError: If ``module`` is none. The values of a checkpoint are
            ``fixed_values(freeze(module, path))``, with a fresh module.

    Example:
        >>> module = Tuned()
        >>> module.l2.value = 0.5
        >>> fixed_values(module)
        {'l2': 0.5}
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"fixed_values: got a {type(module).__name__}, expected a module. {_instead(module)}"
        )
    tuned = {**named_hyperparameters(module), **record_of(module).tuned_options}
    values = {name: h.fixed() if h.is_resolved else "auto" for name, h in tuned.items()}
    return values | fixed_options(module)


def _instead(given: Any) -> str:
    """Says where the values are that were looked for in something else than a module."""
    if isinstance(given, (str, Path)):
        return (
            f"The values of a checkpoint: fixed_values(freeze(LitClassifier(), {str(given)!r})), "
            "with a fresh module of the same class; freeze alone is enough to train with them"
        )
    return "After trainer.fit(module), pass that module: fixed_values(module)"


def freeze(module: ModuleT, values: Mapping[str, Any] | str | Path) -> ModuleT:
    """Sets hyperparameters to given values and takes them out of the tuning.

    This is the papers' retraining with the values found (Luketina et al. 2016, §3.1). A callback
    leaves frozen hyperparameters alone; those that ``values`` does not name stay tunable. Options
    of the optimizer are put in force at each of its steps, with or without a callback; its
    parameter groups, and what a scheduler or a monitor reads there, stay as they are.

    Args:
        module: A fresh module.
        values: What :func:`fixed_values` or ``best()`` of a controller returned, in the scale of
            the values (not raw), or the path of a Lightning checkpoint. Options of the optimizer
            are found there with the state of the callback.

    Returns:
        The same module.

    Raises:
        TypeError: If ``module`` or ``values`` is something else.
        ValueError: If a name is unknown, or a value lies outside its constraint or has another
            shape. Nothing is changed then. Options that the optimizer does not have, and values
            that it cannot take, are refused when the optimizer is made.

    Example:
        >>> module = freeze(Tuned(), {"l2": 0.5})
        >>> module.l2
        Hyperparameter(0.5, constraint=Positive(low=1e-10, high=10000.0), frozen)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"freeze: got a {type(module).__name__} as the module, expected a fresh module, and "
            "after it the values: freeze(LitClassifier(), values)"
        )
    if not isinstance(values, (str, Path, Mapping)):
        raise TypeError(
            f"freeze: values is a {type(values).__name__}, expected what fixed_values(module) "
            "returned, or the path of a checkpoint"
        )
    known = named_hyperparameters(module)
    if isinstance(values, (str, Path)):
        raws, options = _from_checkpoint(values, known)
    else:
        options = {n: v for n, v in values.items() if n.startswith("optimizer.") and n not in known}
        raws = {n: _raw(n, known, v) for n, v in values.items() if n not in options}
    for name, raw in raws.items():
        if bool(raw.isnan().any()):
            raise ValueError(_NOT_RESOLVED.format(name))
        if raw.shape != known[name].raw.shape:
            raise ValueError(
                f"freeze: {name!r} has shape {tuple(raw.shape)}, expected "
                f"{tuple(known[name].raw.shape)}"
            )
    for name, value in options.items():
        if not _is_finite(value):
            raise ValueError(f"freeze: {name!r} is {value!r}, expected a number, or a list of them")
    decided = {
        h: _raw(name, controller.decisions, options[name])
        for controller in module.modules()
        if isinstance(controller, LSTMController)
        for name, h in controller.decisions.items()
        if name in options
    }
    for h, raw in decided.items():
        h.raw.copy_(raw)
        h.frozen = True
    for name, raw in raws.items():
        known[name].raw.copy_(known[name].settled(raw.to(known[name].raw)))
        known[name].frozen = True
        known[name].is_initial = False
    if options:
        if not record_of(module).fixed_options:
            make = module.configure_optimizers
            vars(module)["configure_optimizers"] = partial(_with_fixed_options, module, make)
        update_record(module, fixed_options=fixed_options(module) | options)
    return module


def fixed_options(module: nn.Module) -> dict[str, Any]:
    """Returns the options of the optimizer that :func:`freeze` has fixed, as ``optimizer.lr``."""
    return dict(record_of(module).fixed_options)


def remember_options(module: nn.Module, options: Mapping[str, Hyperparameter]) -> None:
    """Keeps the options that a callback tunes where :func:`fixed_values` finds them."""
    update_record(module, tuned_options=dict(options))


def _with_fixed_options(module: nn.Module, configure_optimizers: Any) -> Any:
    """Runs ``configure_optimizers`` and arranges for the fixed options at each step."""
    configured = configure_optimizers()
    optimizers, schedulers, _ = _configure_optimizers(configured)
    if len(optimizers) != 1:
        raise ValueError(
            f"freeze: configure_optimizers returned {len(optimizers)} optimizers, expected one "
            f"whose {sorted(fixed_options(module))} can be fixed"
        )
    values = {
        name.removeprefix("optimizer."): torch.as_tensor(v, dtype=torch.float64)
        for name, v in fixed_options(module).items()
    }
    defaults = OptimizerOptions(optimizers[0], dict.fromkeys(values), bool(schedulers))
    for value, (name, h) in zip(values.values(), defaults.hyperparameters.items(), strict=True):
        try:
            h.constraint.inverse(value)
        except ValueError as error:
            raise ValueError(f"freeze: the value of {name!r} is refused: {error}") from None
    fixed = {name: Hyperparameter(value) for name, value in values.items()}
    options = OptimizerOptions(optimizers[0], fixed, bool(schedulers))
    optimizers[0].register_step_pre_hook(lambda *_: options.set_())
    optimizers[0].register_step_post_hook(lambda *_: options.restore_())
    return configured


def _is_finite(value: Any) -> bool:
    try:
        return bool(torch.isfinite(torch.as_tensor(value, dtype=torch.float64)).all())
    except (TypeError, ValueError, RuntimeError):
        return False


def _raw(name: str, known: Mapping[str, Hyperparameter], value: Any) -> Tensor:
    if name not in known:
        hint = (
            f"An option of the optimizer has 'optimizer.' before its name: {{'optimizer.{name}': "
            f"{value!r}}}. Or give it to the optimizer in configure_optimizers"
            if name in _OPTIONS
            else did_you_mean(name, known)
        )
        there = f"freeze: no hyperparameter {name!r}; there are {sorted(known) or 'none'}"
        raise ValueError(f"{there}. {hint}" if hint else there)
    h = known[name]
    if isinstance(value, str) and value == "auto":
        raise ValueError(_NOT_RESOLVED.format(name))
    try:
        return h.raw_of(value)
    except ValueError as error:
        raise ValueError(f"freeze: the value of {name!r} is refused: {error}") from None


def _from_checkpoint(
    path: str | Path, known: Mapping[str, Hyperparameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Looks up the known names, and the options that a callback has tuned.

    A shared rate stands in the checkpoint under several names.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    state = checkpoint["state_dict"]
    missing = [name for name in known if f"{name}.raw" not in state]
    if missing:
        raise ValueError(f"freeze: the checkpoint {str(path)!r} has no hyperparameters {missing}")
    options: dict[str, Any] = {}
    for callback in checkpoint.get("callbacks", {}).values():
        saved = callback.get("options") if isinstance(callback, Mapping) else None
        if isinstance(saved, Mapping):  # other callbacks may have something of that name
            options |= {
                name: option["value"]
                for name, option in saved.items()
                if str(name).startswith("optimizer.") and isinstance(option, Mapping)
            }
    return {name: state[f"{name}.raw"] for name in known}, options
