"""Where L_V comes from: what a validation step returns, and what it logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torchmetrics import Metric

from lightning_hpo._arguments import did_you_mean
from lightning_hpo._lightning import MisconfigurationException

# The names under which a loss is looked for where none was given.
NAMES = ("val_loss", "valid_loss", "validation_loss")

_REMEDY = (
    "Return the loss (a tensor, or a dict with 'loss'), or pass monitor= (the name under which it "
    "is logged) or validation_loss=lambda module, batch: ... (the loss itself) to OnlineHPOCallback"
)
_NO_DERIVATIVE = (
    "An accuracy, or what else is counted or goes through argmax, round or a comparison, has no "
    "derivative: return the loss, and log the accuracy"
)


class DetachedMetric(MisconfigurationException):
    """A metric was logged as L_V, and its value has no graph."""


def find_loss(output: Any, logged: Mapping[str, Any], monitor: str | None, origin: str) -> Tensor:
    """Finds the loss of a validation step.

    An explicit ``monitor`` wins, logged or in a returned dict. Then come a returned scalar with a
    graph, or ``"loss"`` of a returned dict, and what is logged, or in that dict, under
    ``val_loss``, ``valid_loss`` or ``validation_loss``.

    Args:
        output: What the step returned.
        logged: What it logged, by name.
        monitor: The callback's argument.
        origin: Whose loss it is, for messages.

    Returns:
        A tensor of no dimension, with a graph.

    Raises:
        MisconfigurationException: If there is none.
    """
    returned_dict: Mapping[str, Any] = output if isinstance(output, Mapping) else {}
    if monitor is not None:
        # With on_step=True and on_epoch=True Lightning appends to the name that is logged.
        plain = monitor.removesuffix("_epoch").removesuffix("_step")
        monitor = monitor if monitor in logged or plain not in logged else plain
        if monitor not in logged and monitor in returned_dict:
            return check_loss(output[monitor], f"{origin}, returned as {monitor!r},")
        if monitor not in logged:
            returned_names = [*map(str, returned_dict)]
            question = did_you_mean(monitor, [*logged, *returned_names])
            raise MisconfigurationException(
                f"{origin} does not log monitor={monitor!r}; it logged "
                f"{sorted(logged) or 'nothing'}"
                + (f" and returned {returned_names}" if returned_names else "")
                + (f": {question} " if question else ". ")
                + _REMEDY
            )
        return check_loss(logged[monitor], f"{origin}, logged as {monitor!r},")
    returned = returned_dict.get("loss") if isinstance(output, Mapping) else output
    if _is_loss(returned):
        return check_loss(returned, origin)
    name = next((name for name in NAMES if name in logged), None)
    if name is not None:
        return check_loss(logged[name], f"{origin}, logged as {name!r},")
    name = next((name for name in NAMES if name in returned_dict), None)
    if name is not None and returned is None:
        return check_loss(returned_dict[name], f"{origin}, returned as {name!r},")
    if returned is None:
        keys = f" (a dict with {list(map(str, returned_dict))})" if returned_dict else ""
        raise MisconfigurationException(
            f"{origin} returned no loss{keys} and logged {sorted(logged) or 'nothing'}. {_REMEDY}"
        )
    return check_loss(returned, origin)


def check_loss(value: Any, origin: str) -> Tensor:
    """Returns a loss without dimensions; refuses what is no scalar with a graph.

    Raises:
        MisconfigurationException: See above.
    """
    is_metric = isinstance(value, Metric)
    if is_metric:
        value = _value_of(value)
    if not isinstance(value, Tensor):
        raise MisconfigurationException(
            f"The validation loss of {origin} is a {type(value).__name__}, expected a tensor with "
            f"a graph{'; do not call .item() on it' * isinstance(value, (int, float))}. {_REMEDY}"
        )
    if value.numel() != 1:
        raise MisconfigurationException(
            f"The validation loss of {origin} has shape {tuple(value.shape)}, expected a scalar; "
            f"reduce it, for example with .mean(). {_REMEDY}"
        )
    if not value.requires_grad:
        kind = ", a metric whose value has no graph," if is_metric else ""
        error = DetachedMetric if is_metric else MisconfigurationException
        raise error(
            f"The validation loss of {origin}{kind} is detached from the parameters. Compute it "
            "without torch.no_grad() and without .detach(); Lightning itself disables gradients "
            f"where they are not needed. {_NO_DERIVATIVE}. Or pass validation_loss=lambda module, "
            "batch: ... to OnlineHPOCallback"
        )
    return value.reshape(())


def _is_loss(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad


def _value_of(metric: Metric) -> Any:
    """Returns the value of a metric on the present batch, of which it has seen no other."""
    if isinstance(metric._forward_cache, Tensor) and metric._forward_cache.requires_grad:
        return metric._forward_cache
    # Other processes compute theirs at other times, and sharing it would lose the graph.
    to_sync, metric._to_sync = metric._to_sync, False
    metric._computed = None
    try:
        return metric.compute()
    finally:
        metric._to_sync = to_sync
