"""Every collective that the package makes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor


def world_size() -> int:
    """Returns the number of processes that train together."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size()


def gather(value: Any) -> list[Any]:
    """Returns the objects that all processes pass, in the order of their ranks."""
    everyone = [value] * world_size()
    if len(everyone) > 1:
        torch.distributed.all_gather_object(everyone, value)
    return everyone


@contextmanager
def together() -> Iterator[None]:
    """Lets all processes stop where one of them does, in a block without collectives.

    The others would wait for ever at the next collective.

    Raises:
        RuntimeError: Where another process has raised an error.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
        raise
    finally:
        failures = gather(None if failure is None else f"{type(failure).__name__}: {failure}")
    for rank, message in enumerate(failures):
        if message is not None:
            raise RuntimeError(f"OnlineHPOCallback: stopped because rank {rank} did: {message}")


def average_(tensors: Sequence[Tensor]) -> None:
    """Averages tensors over all processes, in place; does nothing in a single process.

    Gradients and products with the Hessian are linear in the loss, and the loss of a data-parallel
    training is the mean over the ranks: averaging the parts gives the parts of the average.

    All tensors travel in one flat buffer, since a collective per tensor costs a hundred times more.
    """
    if world_size() == 1 or not tensors:
        return
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in by_kind.values():
        flat = torch.cat([t.reshape(-1) for t in group])
        torch.distributed.all_reduce(flat)
        flat /= world_size()
        parts = flat.split([t.numel() for t in group])
        torch._foreach_copy_(list(group), [p.view_as(t) for p, t in zip(parts, group, strict=True)])
