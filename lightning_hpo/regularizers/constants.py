"""What a penalty keeps for each weight: where it started, how much it matters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_hpo._lightning import MisconfigurationException
from lightning_hpo._tensors import separate
from lightning_hpo.distributed import is_sharded


class Keeper(Protocol):
    """Whatever keeps constants: a :class:`Penalty`."""

    constants: list[Any]


class Constants(nn.Module):
    """Lets the constants of a penalty move with the module and be saved in its state_dict.

    They are no buffers, which DistributedDataParallel would send to all ranks at every step and
    each replay would clone. They stay in the penalty: a replay shares objects of its kind.

    Args:
        penalty: The penalty that keeps them.
    """

    def __init__(self, penalty: Keeper) -> None:
        super().__init__()
        self.penalty = penalty

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Constants:
        """Moves them, or changes their precision, with the weights."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.penalty.constants = apply_to_collection(self.penalty.constants, Tensor, fn)
        return self

    def get_extra_state(self) -> list[Any]:
        """Returns the constants, one entry per weight."""
        return list(self.penalty.constants)

    def set_extra_state(self, state: Any) -> None:
        """Takes over saved constants.

        Raises:
            ValueError: If they are of other shapes, or of another number of weights.
        """
        here, saved = _shapes(self.penalty.constants), _shapes(state)
        if here != saved:
            raise ValueError(
                f"load_state_dict: {type(self.penalty).__name__} keeps constants of the shapes "
                f"{here}, but the state_dict holds {saved}; register the penalty on the weights "
                "that it acted on when the state was saved"
            )
        for own, value in zip(tensors_of(self.penalty.constants), tensors_of(state), strict=True):
            own.copy_(value)


def kept(constant: Any, weight: Tensor) -> Any:
    """Returns a constant as it is kept: on the device and in the precision of its weight.

    Args:
        constant: What :meth:`Penalty.constant` returned.
        weight: The weight that it belongs to.

    Raises:
        TypeError: If it is no tensor, tuple of tensors or None.
        MisconfigurationException: If the weight is sharded.
    """
    if constant is None:
        return None
    parts = constant if type(constant) is tuple else (constant,)
    if not all(isinstance(part, Tensor) for part in parts):
        raise TypeError(
            f"Penalty.constant returned a {type(constant).__name__}, expected a tensor, a tuple of "
            "tensors, or None"
        )
    refuse_sharded([weight])
    placed = [
        t.detach().to(weight.device, weight.dtype if t.is_floating_point() else t.dtype)
        for t in parts
    ]
    # One that shared the memory of its weight would follow it.
    owned = separate(placed, [weight.detach()])
    return tuple(owned) if type(constant) is tuple else owned[0]


def tensors_of(constants: list[Any]) -> list[Tensor]:
    """Lists the tensors among constants."""
    return [
        t
        for constant in constants
        if constant is not None
        for t in (constant if isinstance(constant, tuple) else (constant,))
    ]


def refuse_sharded(weights: list[Tensor]) -> None:
    """Refuses constants of weights of which each process holds a slice.

    Raises:
        MisconfigurationException: If a weight is sharded.
    """
    if is_sharded(weights):
        raise MisconfigurationException(SHARDED)


SHARDED = (
    "A penalty keeps constants of whole weights, but the parameters are sharded. Use "
    "strategy='ddp', or a penalty without constants, such as L2"
)


def _shapes(constants: Any) -> Any:
    return apply_to_collection(constants, Tensor, lambda t: list(t.shape))
