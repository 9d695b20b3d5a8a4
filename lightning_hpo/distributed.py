"""Every collective that the package makes, and the local view of sharded parameters.

With sharded parameters (``fully_shard``) each rank holds a slice of every parameter. All that is
shaped like θ is then kept as plain tensors of the local slice's shape: elementwise formulas hold
slice by slice, and sums over the elements of θ are completed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Shard


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


def broadcast_(tensors: Sequence[Tensor]) -> None:
    """Gives tensors the values that they have in the first process, in place."""
    for tensor in tensors:
        value = tensor.contiguous()
        torch.distributed.broadcast(value, 0)
        tensor.copy_(value)


def collect_(tensors: Sequence[Tensor]) -> None:
    """Sums tensors over all processes in the first one, in place, and leaves zeros in the others.

    The adjoint of :func:`broadcast_`.
    """
    for tensor in tensors:
        torch.distributed.all_reduce(tensor)
        if torch.distributed.get_rank() > 0:
            tensor.zero_()


# --------------------------------------------------------------------------------------------------
# Sharded parameters
# --------------------------------------------------------------------------------------------------


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of the tensors is distributed over the processes (a ``DTensor``)."""
    return torch.distributed.is_available() and any(isinstance(t, DTensor) for t in tensors)


def is_fully_sharded(parameter: Tensor) -> bool:
    """Whether a parameter is one that :mod:`lightning_hpo` can follow shard by shard.

    It is where it is split along one dimension over all processes, and over nothing else.
    """
    return (
        isinstance(parameter, DTensor)
        and parameter.device_mesh.ndim == 1
        and parameter.device_mesh.size() == torch.distributed.get_world_size()
        and type(parameter.placements[0]) is Shard
    )


def local(tensor: Tensor) -> Tensor:
    """Returns this process's slice of a sharded tensor, in the same memory; others as they are."""
    if torch.distributed.is_available() and isinstance(tensor, DTensor):
        # Without a graph it is the very memory.
        with torch.no_grad():
            slice_: Tensor = tensor.to_local()
        return slice_
    return tensor


def sum_over_shards(partial: Tensor, sharded: bool) -> Tensor:
    """Completes a sum over the elements of θ; costs nothing where θ is not sharded.

    Args:
        partial: The sum over this process's slices.
        sharded: Whether the parameters are sharded.

    Returns:
        The sum over all elements, the same on all processes.
    """
    if not sharded:
        return partial
    total = partial.detach().clone()
    torch.distributed.all_reduce(total)
    return total


def norm_over_shards(partial: Tensor, sharded: bool) -> Tensor:
    """Completes norms over the elements of θ, as :func:`sum_over_shards` does sums."""
    if not sharded:
        return partial
    return sum_over_shards(partial.double().square(), sharded).sqrt().to(partial.dtype)


def reshard(modules: Iterable[nn.Module]) -> bool:
    """Drops gathered parameters, so that the next forward pass gathers the present shards.

    ``fully_shard`` leaves the parameters of its root gathered after a forward pass without a
    backward pass; changes of the shards would not be seen.

    Returns:
        Whether any module is sharded.
    """
    found = False
    if torch.distributed.is_available():
        for module in modules:
            if isinstance(module, FSDPModule):
                module.reshard()
                found = True
    return found


def gather_stacks(stacks: list[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Assembles stacked slices for a checkpoint, which only the first process writes.

    Every process must call it. Unsharded stacks are returned as they are.

    Args:
        stacks: One tensor ``(m, *slice)`` per parameter, or ``(m, 0)`` where there is no value.
        parameters: The parameters.

    Returns:
        On the first process, one tensor ``(m, *p.shape)`` per parameter on the CPU, or ``(m, 0)``;
        on the others an empty list.
    """
    if not is_sharded(parameters):
        return stacks
    device = stacks[0].device
    # A slice can be empty on some processes; all must agree on what is gathered.
    sizes = torch.tensor([stack.numel() for stack in stacks], device=device)
    torch.distributed.all_reduce(sizes)
    writes = torch.distributed.get_rank() == 0
    result = []
    for stack, p, size in zip(stacks, parameters, sizes.tolist(), strict=True):
        full = stack.new_zeros((len(stack), 0))
        if size:
            assert isinstance(p, DTensor)
            shape = torch.Size((len(stack), *p.shape))
            full = DTensor.from_local(
                stack.contiguous(),
                p.device_mesh,
                [Shard(_dimension(p) + 1)],
                run_check=False,
                shape=shape,
                stride=torch.empty(shape, device="meta").stride(),
            ).full_tensor()
        if writes:
            result.append(full.cpu())
    return result


def take_slices(stacks: list[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Takes this process's slices of what :func:`gather_stacks` assembled, on its device."""
    result = []
    for stack, p in zip(stacks, parameters, strict=True):
        if is_sharded([p]) and stack.numel():
            assert isinstance(p, DTensor)
            dimension = _dimension(p) + 1
            parts = stack.chunk(p.device_mesh.size(), dimension)
            rank = p.device_mesh.get_local_rank()
            stack = (
                parts[rank].clone() if rank < len(parts) else stack.narrow(dimension, 0, 0).clone()
            )
        result.append(stack.to(p.device))
    return result


def _dimension(parameter: DTensor) -> int:
    """The dimension along which a parameter is split."""
    placement = parameter.placements[0]
    assert isinstance(placement, Shard)
    return placement.dim
