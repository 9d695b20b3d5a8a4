"""What the mixins have in common: they work with the LightningModule of either package."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_hpo._lightning import classes, join_again


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


def lightning_bases(kind: type) -> list[type]:
    """Lists the LightningModules, of either package, that a class derives from."""
    return [base for base in kind.__mro__ if base in classes("LightningModule")]
