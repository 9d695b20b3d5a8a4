"""What the package keeps with a user's module: one record, under one attribute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lightning_hpo.hyperparameters import Hyperparameter

_ATTRIBUTE = "_hpo_record"


@dataclass(frozen=True)
class ModuleRecord:
    """What is known of a module besides its own attributes.

    It is copied and pickled with the module; checkpoints do not hold it. It never changes: a change
    puts another one in its place. So what is noted during a replay is undone with the module's
    attributes, whether or not those were copied for it.

    Attributes:
        penalties_in_loss: The penalties that ``penalty()`` sums; see
            :class:`~lightning_hpo.regularizers.Penalty`.
        penalties_in_gradient: Those that are added to the gradient.
        penalties_applied: Whether that has happened in the step under way.
        found_dry: The penalties whose strengths ``fast_dev_run`` has resolved; they are for a dry
            run only.
        awaits_later_weights: Whether penalties are meant for all weights, and none was looked for
            that was added later.
        constants_agreed: Whether all processes have the same constants of penalties.
        without_penalty: Whether ``penalty()`` returns 0: within a validation loss.
        example_weights: The name of the submodule with the weights of the examples.
        loss_weights: The name of the submodule with the weights of auxiliary losses.
        tuned_options: Options of the optimizer that the last callback has tuned, by
            ``optimizer.<option>``.
        fixed_options: Options of the optimizer that are fixed, by ``optimizer.<option>``.
    """

    penalties_in_loss: tuple[Any, ...] = ()
    penalties_in_gradient: tuple[Any, ...] = ()
    penalties_applied: bool = False
    found_dry: tuple[Any, ...] = ()
    awaits_later_weights: bool = False
    constants_agreed: bool = True
    without_penalty: bool = False
    example_weights: str | None = None
    loss_weights: str | None = None
    tuned_options: Mapping[str, Hyperparameter] = field(default_factory=dict)
    fixed_options: Mapping[str, Any] = field(default_factory=dict)


_NOTHING = ModuleRecord()


def record_of(module: nn.Module) -> ModuleRecord:
    """Returns the record of a module, which is empty where nothing has been noted."""
    record: ModuleRecord = vars(module).get(_ATTRIBUTE, _NOTHING)
    return record


def update_record(module: nn.Module, **changes: Any) -> None:
    """Gives a module a record with some fields changed; see :class:`ModuleRecord`.

    Raises:
        TypeError: If there is no such field.
    """
    record = replace(record_of(module), **changes)
    if record == _NOTHING:
        vars(module).pop(_ATTRIBUTE, None)
    else:
        vars(module)[_ATTRIBUTE] = record
