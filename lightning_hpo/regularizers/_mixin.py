"""What the mixins have in common: they work with the LightningModule of either package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_hpo._lightning import classes, join_again
from lightning_hpo.hyperparameters import Hyperparameter, named_hyperparameters


class RegularizerMixin(nn.Module):
    """A mixin for a LightningModule: it is none itself, so that the user's class says of which.

    Raises:
        TypeError: Where a class is defined that derives from the LightningModules of both packages.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        join_again()
        if len(lightning_bases(cls)) > 1:
            raise TypeError(
                f"{cls.__name__} derives from LightningModule of lightning.pytorch and of "
                "pytorch_lightning, and no Trainer takes such a mixture; import everything from "
                "one of the two packages"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        """Says how a hyperparameter is given a value, where a number would take its place."""
        if name in self.__dict__.get("_modules", ()):  # Lightning sets dozens of others per step
            self._check_in_the_place_of_a_module(name, value)
        super().__setattr__(name, value)

    def _check_in_the_place_of_a_module(self, name: str, value: Any) -> None:
        child = self._modules[name]
        known = named_hyperparameters(child) if isinstance(child, nn.Module) else {}
        if known and isinstance(value, (int, float, Tensor)):
            path = ".".join(part for part in (name, next(iter(known))) if part)
            is_one = not isinstance(value, Tensor) or value.numel() == 1
            number = f"{float(torch.as_tensor(value).detach()):.3g}" if is_one else "…"
            raise TypeError(
                f"{type(self).__name__}.{name} "
                f"{'is' if isinstance(child, Hyperparameter) else 'holds'} a hyperparameter, "
                f"and a {type(value).__name__} cannot take its place; assign its value: "
                f"module.{path}.value = {number}"
            )


def lightning_bases(kind: type) -> list[type]:
    """Lists the LightningModules, of either package, that a class derives from."""
    return [base for base in kind.__mro__ if base in classes("LightningModule")]
