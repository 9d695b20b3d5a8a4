"""Which weights a penalty acts on, and where they are now."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_hpo._lightning import MisconfigurationException
from lightning_hpo.regularizers._placement import closest

_NORMALIZATION = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
)


def default_weights(module: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Lists the weights that a penalty acts on unless told otherwise.

    Biases (parameters whose name contains ``bias``) and the parameters of normalization layers
    (the classes of torch, and any whose class name contains ``norm``) are left out; a shared
    weight is listed once.

    Returns:
        The dotted name, the owning module and the name there, of each weight.
    """
    return [
        (full, owner, name)
        for full, owner, name in all_weights(module)
        if "bias" not in name
        and not isinstance(owner, _NORMALIZATION)
        and "norm" not in type(owner).__name__.lower()
    ]


def all_weights(module: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Lists every parameter once, as in :func:`default_weights`."""
    found = []
    seen = set()
    for prefix, owner in module.named_modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found.append((f"{prefix}.{name}" if prefix else name, owner, name))
    return found


def chosen_weights(
    caller: str, module: nn.Module, parameters: Iterable[nn.Parameter | str]
) -> list[tuple[str, nn.Module, str]]:
    """Finds the given parameters or names in the module.

    Returns:
        As :func:`default_weights`.

    Raises:
        TypeError: If something else than parameters and names is given.
        ValueError: If the module does not own a parameter.
    """
    known = all_weights(module)
    by_name = {full: (full, owner, leaf) for full, owner, leaf in known}
    by_id = {id(owner._parameters[leaf]): (full, owner, leaf) for full, owner, leaf in known}
    for full, p in module.named_parameters(remove_duplicate=False):
        by_name.setdefault(full, by_id[id(p)])  # a tied weight has several names
    chosen = {}
    for item in [parameters] if isinstance(parameters, (str, nn.Parameter)) else parameters:
        if isinstance(item, str):
            if item not in by_name:
                raise ValueError(
                    f"{caller}: {type(module).__name__} has no parameter {item!r}; "
                    f"{closest(item, by_name)}"
                )
            entry = by_name[item]
        elif isinstance(item, nn.Parameter):
            if id(item) not in by_id:
                raise ValueError(
                    f"{caller}: parameters holds a parameter of shape {tuple(item.shape)} that "
                    f"is not registered in {type(module).__name__}; pass parameters of this module"
                )
            entry = by_id[id(item)]
        else:
            raise TypeError(
                f"{caller}: parameters holds a {type(item).__name__}, expected parameters of "
                "this module or their dotted names"
            )
        chosen[entry[0]] = entry
    return list(chosen.values())


def current_weight(owner: nn.Module, name: str) -> nn.Parameter:
    """Finds a weight where it is now: pruning and parametrizations keep it under another name.

    The parameter is the same one; the penalty acts on it, as a weight decay of the optimizer would.

    Args:
        owner: The module that owned the parameter when the penalty was registered.
        name: Its name there then.

    Raises:
        MisconfigurationException: If the module has no such parameter any more.
    """
    # torch.nn.utils.prune takes "weight" to "weight_orig", and back when it is made permanent.
    for candidate in (name, f"{name}_orig", name.removesuffix("_orig")):
        parameter = _entry(owner._parameters, candidate)
        if parameter is not None:
            return parameter  # type: ignore[no-any-return]
    parametrizations = _entry(owner._modules, "parametrizations")
    if parametrizations is not None and name in parametrizations:
        parameter = _entry(parametrizations[name]._parameters, "original")
        if parameter is not None:  # weight normalization has two
            return parameter  # type: ignore[no-any-return]
    raise MisconfigurationException(
        f"A penalty acts on the parameter {name!r} of a {type(owner).__name__}, which "
        "no longer has it: register penalties after weight normalization and "
        "whatever else replaces parameters"
    )


def _entry(entries: Any, name: str) -> Any:
    """Looks up a name; scripted modules keep their parameters in something without ``get``."""
    return entries[name] if name in entries else None  # noqa: SIM401
