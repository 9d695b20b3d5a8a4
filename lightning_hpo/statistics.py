"""Running statistics of normalization layers: state that training moves, besides θ."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_hpo._tensors import stacked_zeros, widened
from lightning_hpo.distributed import world_size
from lightning_hpo.exchange import ModuleState

# torch 2.6 does not say which hooks pack what autograd saves.
_CAN_ASK = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
_seen: list[Any] = []

Place = tuple[nn.Module, str]
"""A module, and the name of one of its buffers."""


class Standing(Tensor):
    """Stands for a buffer in a replay: it has a graph, and can be copied and read like a buffer."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, leaf: Tensor) -> Tensor:
        """Returns a copy of a leaf that a step may write to."""
        result: Tensor = leaf.clone().as_subclass(cls)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        result = memo[id(self)] = self.detach().as_subclass(Tensor).clone()
        return result

    def numpy(self, **options: Any) -> Any:
        """Returns the values."""
        return self.detach().as_subclass(Tensor).numpy(**options)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.detach().as_subclass(Tensor).__array__(*args, **kwargs)


class RunningStatistics:
    r"""The running means and variances r of a module, which losses are functions of.

        r' = (1 − m) r + m b(θ, λ; batch)

    b are the mean and the unbiased variance of a batch, m the momentum of the layer (1/n for a
    cumulative average). Those of ``nn.BatchNorm*d`` and ``nn.InstanceNorm*d`` are meant, and what
    else a step writes to buffers that a loss depends on (:meth:`follow`). What a step writes
    without a graph (under ``no_grad``, through ``detach()`` or ``.data``) is taken as constant,
    unless differences follow it by value.

    Memory: tangents of r, in all as large as r, per scalar λ. That counts for a bank of features.

    Args:
        module: The module.
        is_broadcast: Whether every step starts from those of the first process, as with
            ``DistributedDataParallel``.

    Attributes:
        is_broadcast: See above.
        by_value: Whether finite differences run on the kernels of the training, which write r'
            without a graph. Tangents need no more than its values; adjoints miss what reaches θ and
            λ through it.
        by_value_because: Why that is so.
    """

    def __init__(self, module: nn.Module, *, is_broadcast: bool = False) -> None:
        layers = {
            name: m
            for name, m in module.named_modules()
            if isinstance(m, _NormBase) and m.running_mean is not None
        }
        self._synchronized = {
            name: m
            for name, m in layers.items()
            if isinstance(m, nn.SyncBatchNorm) and world_size() > 1
        }
        self._scripted = {
            name: m
            for name, m in module.named_modules()
            if isinstance(m, torch.jit.ScriptModule)
            and "running_mean" in dict(m.named_buffers(recurse=False))
        }
        self._followed = {n: m for n, m in layers.items() if n not in self._synchronized}
        self._places: list[Place] = [
            (layer, buffer)
            for layer in self._followed.values()
            for buffer in ("running_mean", "running_var")
        ]
        self.is_broadcast = is_broadcast
        self.by_value = False
        self.by_value_because = ""

    def __len__(self) -> int:
        return len(self._places)

    @property
    def places(self) -> list[Place]:
        """Which buffers of which modules are followed."""
        return list(self._places)

    def follow(self, places: Iterable[Place]) -> None:
        """Follows these, and no others."""
        self._places = list(places)

    def follow_by_value(self, reason: str) -> None:
        """Follows them by value from now on."""
        self.by_value, self.by_value_because = True, reason

    def warn_of_constants(self, estimators: Sequence[str]) -> None:
        """Names the layers that train, and of which it is not followed how λ moves them.

        Args:
            estimators: Those that do not ask for it.
        """
        for layers, reason in (
            (self._followed, f"{' and '.join(estimators)} does not follow them" * bool(estimators)),
            (
                self._synchronized,
                "they are those of several ranks (SyncBatchNorm); without sync_batchnorm=True they "
                "are followed",
            ),
            (
                self._scripted,
                "the layers are in TorchScript; the same layers in Python are followed",
            ),
        ):
            names = [name for name, layer in layers.items() if layer.training]
            if names and reason:
                warnings.warn(
                    f"OnlineHPOCallback takes the running statistics of {names} as constants: "
                    f"hypergradients miss how λ moves them, because {reason}",
                    stacklevel=2,
                )

    def buffers(self, state: ModuleState | None = None) -> list[Tensor]:
        """Returns the buffers that are in place now, or were at an earlier moment."""
        held = {} if state is None else state.held
        contents: list[Any] = [
            held[id(layer._buffers)].content if id(layer._buffers) in held else layer._buffers
            for layer, _ in self._places
        ]
        return [content[name] for content, (_, name) in zip(contents, self._places, strict=True)]

    def leaves(self, state: ModuleState | None) -> list[Tensor]:
        """Returns copies that require grad, of the present or of an earlier moment."""
        values = {} if state is None else state.values
        buffers = self.buffers(state)
        return [values.get(id(b), b).detach().clone().requires_grad_() for b in buffers]

    def zeros(self, m: int) -> list[Tensor]:
        """Returns m stacked zeros per buffer, in float32 or better."""
        return stacked_zeros(self.buffers(), m)


@contextmanager
def differentiable_statistics() -> Iterator[None]:
    """Lets normalization layers be differentiated with respect to r, and r' with respect to all.

    The fused operators write r' without a graph. Where r requires grad, b is computed beside them,
    and r is written in place with a graph; in evaluation mode the layer is a composition.
    """
    before = torch.batch_norm, torch.instance_norm
    try:
        torch.batch_norm = partial(_normalized, before[0], _of_batch)
        torch.instance_norm = partial(_normalized, before[1], _of_instances)
        with nullcontext() if _CAN_ASK else _hooks_seen():
            yield
    finally:
        torch.batch_norm, torch.instance_norm = before


def _normalized(
    operator: Callable[..., Tensor],
    statistics: Callable[[Tensor], tuple[Tensor, Tensor]],
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Does what a fused operator does, with derivatives where running statistics require grad."""
    options = momentum, eps, cudnn_enabled
    if (
        running_mean is None
        or running_var is None
        or not (running_mean.requires_grad or running_var.requires_grad)
    ):
        return operator(input, weight, bias, running_mean, running_var, training, *options)
    if not training:
        shape = (1, -1, *[1] * (input.dim() - 2))
        scale = (running_var + eps).rsqrt()
        scale = scale if weight is None else scale * weight
        y: Tensor = (widened(input) - running_mean.reshape(shape)) * scale.reshape(shape)
        return (y if bias is None else y + bias.reshape(shape)).to(input.dtype)
    output = operator(input, weight, bias, None, None, True, *options)
    with torch.enable_grad():  # r' depends on r all the same
        mean, variance = statistics(widened(input))
        for _ in range(_updates()):
            for running, new in ((running_mean, mean), (running_var, variance)):
                running.mul_(1 - momentum).add_(new.to(running.dtype), alpha=momentum)
    return output


def _of_batch(x: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x, [0, *range(2, x.dim())])
    return mean, variance


def _of_instances(x: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x, list(range(2, x.dim())))
    return mean.mean(0), variance.mean(0)


def _updates() -> int:
    """How often a layer that runs now updates its statistics.

    Under activation checkpointing it runs again in the backward pass and updates them a second
    time. Both updates are made in the first run: what r' is must be known before that pass.
    """
    if torch._C._current_graph_task_id() != -1:
        return 0
    if _CAN_ASK:
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        packs = [] if hooks is None else [hooks[0]]
    else:
        packs = _seen
    name = getattr(packs[-1], "__qualname__", "") if packs else ""
    return 2 if name.startswith(("_checkpoint_hook", "_recomputation_hook")) else 1


@contextmanager
def _hooks_seen() -> Iterator[None]:
    """Notes the hooks that pack what autograd saves while they are in force."""
    kind = torch.autograd.graph.saved_tensors_hooks
    enter, leave = kind.__enter__, kind.__exit__

    def noting(self: Any) -> None:
        enter(self)
        _seen.append(self.pack_hook)

    def forgetting(self: Any, *args: Any) -> None:
        if _seen and _seen[-1] is self.pack_hook:
            _seen.pop()
        leave(self, *args)

    try:
        kind.__enter__, kind.__exit__ = noting, forgetting  # type: ignore[method-assign]
        yield
    finally:
        kind.__enter__, kind.__exit__ = enter, leave  # type: ignore[method-assign]
        _seen.clear()
