"""Tangents and adjoints of s = (θ, the optimizer's state), of which parts may not exist yet."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from lightning_hpo._tensors import stacked_zeros

State = dict[str, list[Tensor]]
"""m tangents or adjoints of s = (θ, the optimizer's state tensors).

``state["theta"]`` has one tensor of shape ``(m, *p.shape)`` per parameter p, or per local slice of
a sharded one; every other key is the name of a state tensor of the optimizer, with one entry per
parameter as well.

The optimizer creates state at the first step of a parameter, or when an option such as momentum is
switched on. Until then a name is missing, or its entry is ``(m, 0)``: both stand for zeros.
"""

THETA = "theta"


def entries(state: State, name: str) -> list[Tensor]:
    """Returns the entries of a state tensor, which are ``(m, 0)`` where it does not exist yet.

    The list is the state's own: it may be written to.
    """
    if name not in state:
        state[name] = [t.new_zeros((len(t), 0)) for t in state[THETA]]
    return state[name]


def entry(state: State, name: str, i: int, shape: torch.Size) -> Tensor:
    """Returns the entry of one parameter, made of zeros ``(m, *shape)`` where it does not exist.

    It is the state's own: it may be written to.
    """
    tensors = entries(state, name)
    if tensors[i].shape[1:] != shape:
        tensors[i] = tensors[i].new_zeros((len(tensors[i]), *shape))
    return tensors[i]


def entries_like_theta(state: State, name: str, index: Iterable[int]) -> list[Tensor]:
    """Returns the entries at some positions, made of zeros shaped like θ where there are none."""
    return [entry(state, name, i, state[THETA][i].shape[1:]) for i in index]


def extend_(state: State, joined: Sequence[Tensor], names: Collection[str]) -> None:
    """Appends the entries of parameters that have joined the training.

    Args:
        state: The tangents or adjoints of the parameters so far.
        joined: The parameters that come after them.
        names: The entries that are zeros shaped like the parameter; the others do not exist yet.
    """
    m = len(state[THETA][0])
    for name, tensors in state.items():
        zeros = stacked_zeros(joined, m)
        tensors += zeros if name in names else [t.new_zeros((m, 0)) for t in zeros]
