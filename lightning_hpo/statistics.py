"""Running statistics of normalization layers: state that training moves, besides θ."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_hpo._tensors import stacked_zeros, widened
from lightning_hpo.distributed import world_size
from lightning_hpo.exchange import ModuleState


class RunningStatistics:
    r"""The running means and variances r of a module, which L_V is a function of.

        r' = (1 − m) r + m b(θ, λ; batch)

    b are the mean and the unbiased variance of a batch, m the momentum of the layer (1/n for a
    cumulative average). Those of ``nn.BatchNorm*d`` and ``nn.InstanceNorm*d`` and their subclasses
    are meant. What else a training step writes to is taken as constant.

    Args:
        module: The module.
        is_broadcast: Whether every step starts from those of the first process, as with
            ``DistributedDataParallel``.

    Attributes:
        is_broadcast: See above.
        by_value: Whether finite differences run on the kernels of the training, which write r'
            without a graph. Tangents need no more than its values; adjoints miss what reaches θ and
            λ through it.
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
        self._places = [
            (layer, buffer)
            for layer in self._followed.values()
            for buffer in ("running_mean", "running_var")
        ]
        self.is_broadcast = is_broadcast
        self.by_value = False

    def __len__(self) -> int:
        return len(self._places)

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

    def clear(self) -> None:
        """Follows none any longer."""
        self._places = []

    def buffers(self) -> list[Tensor]:
        """Returns the buffers as they are now."""
        return [layer._buffers[name] for layer, name in self._places]  # type: ignore[misc]

    def leaves(self, state: ModuleState | None) -> list[Tensor]:
        """Returns copies that require grad, of the present or of an earlier moment."""
        if state is None:
            values = self.buffers()
        else:
            values = [state.values.get(id(buffer), buffer) for buffer in self.buffers()]
        return [value.detach().clone().requires_grad_() for value in values]

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
    if running_mean is None or running_var is None or not running_mean.requires_grad:
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
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    name = "" if hooks is None else getattr(hooks[0], "__qualname__", "")
    return 2 if name.startswith(("_checkpoint_hook", "_recomputation_hook")) else 1
