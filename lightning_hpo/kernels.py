"""Which kernels a replay runs on: those that have the derivatives that are wanted of it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def eager() -> Iterator[None]:
    """Runs the original code of whatever has been given to ``torch.compile``.

    Compiled code has no double backward, and a call with other shapes or in another mode than the
    training's would compile it anew. Costs a few microseconds.
    """
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def twice_differentiable(module: nn.Module) -> Iterator[None]:
    """Chooses operators that have second and forward derivatives.

    Compiled code runs in eager mode, ``scaled_dot_product_attention`` on its MATH kernel (the fused
    ones have a first derivative only), recurrent layers as in :func:`native_recurrent`, weight
    normalization and the mean squared error as compositions. A kernel that the module itself
    selects inside its ``forward`` stays.

    Args:
        module: The module whose recurrent layers are meant.
    """
    with (
        eager(),
        sdpa_kernel(SDPBackend.MATH),
        native_recurrent(module),
        _composed_weight_norm(),
        _composed_mean_squared_error(),
    ):
        yield


@contextmanager
def _composed_weight_norm() -> Iterator[None]:
    """Runs weight normalization, old and new, without its fused operator.

    Its double backward is wrong where the norm is kept along the first or the last dimension, as
    ``gradgradcheck`` shows (torch 2.6 to 2.15).
    """
    # ``torch.nn.utils.weight_norm`` is the function that the module of that name defines.
    places = (torch, importlib.import_module("torch.nn.utils.weight_norm"))
    before = [vars(place).get("_weight_norm") for place in places]
    for place in places:
        vars(place)["_weight_norm"] = _weight_norm
    try:
        yield
    finally:
        for place, function in zip(places, before, strict=True):
            vars(place)["_weight_norm"] = function


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    # −1 stands for no dimension. (torch.norm_except_dim then has a wrong forward derivative.)
    others = [d for d in range(v.dim()) if d != dim]
    norm = torch.linalg.vector_norm(v, dim=others, keepdim=dim != -1) if others else v.abs()
    return v * (g / norm)


@contextmanager
def _composed_mean_squared_error() -> Iterator[None]:
    """Takes the mean of squared errors outside of their operator.

    The operator that does both has no forward derivative of its gradient: that fails with
    "ZeroTensors are immutable" (torch 2.14).
    """
    place = vars(torch._C._nn)
    operator = place["mse_loss"]

    def composed(input: Tensor, target: Tensor, reduction: int = _MEAN) -> Tensor:
        if reduction != _MEAN:
            return operator(input, target, reduction)  # type: ignore[no-any-return]
        return operator(input, target, _NONE).mean()  # type: ignore[no-any-return]

    place["mse_loss"] = composed
    try:
        yield
    finally:
        place["mse_loss"] = operator


_NONE, _MEAN = 0, 1  # what operators call "none" and "mean"


@contextmanager
def native_recurrent(module: nn.Module) -> Iterator[None]:
    """Runs ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` without cuDNN and oneDNN.

    cuDNN's recurrent layers have no double backward, and no backward in evaluation mode; oneDNN's
    LSTM has no forward derivative. Other layers (convolutions) keep their kernels.

    Args:
        module: The module whose recurrent layers are meant.
    """
    layers = [
        m
        for m in module.modules()
        if isinstance(m, nn.RNNBase) and not isinstance(m, torch.jit.ScriptModule)
    ]
    shadowed = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        vars(layer)["forward"] = _natively(layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, shadowed, strict=True):
            if forward is None:
                del vars(layer)["forward"]
            else:
                vars(layer)["forward"] = forward


def _natively(forward: Any) -> Any:
    def without_libraries(*args: Any, **kwargs: Any) -> Any:
        libraries: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.mkldnn)
        before = [library.enabled for library in libraries]
        try:
            for library in libraries:
                library.enabled = False
            return forward(*args, **kwargs)
        finally:
            for library, enabled in zip(libraries, before, strict=True):
                library.enabled = enabled

    return without_libraries


@contextmanager
def without_tf32(device: torch.device) -> Iterator[None]:
    """Multiplies float32 numbers as such on CUDA: TF32 would round small displacements away."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    name: str = "fp32_precision"
    value: str | bool = "ieee"
    places: tuple[Any, ...] = ()
    if device.type != "cuda":
        pass
    elif hasattr(matmul, name):
        places = (matmul, cudnn.conv, cudnn.rnn)
    else:  # torch < 2.9
        name, value, places = "allow_tf32", False, (matmul, cudnn)
    before = [getattr(place, name) for place in places]
    try:
        for place in places:
            setattr(place, name, value)
        yield
    finally:
        for place, earlier in zip(places, before, strict=True):
            setattr(place, name, earlier)


@contextmanager
def differentiable_checkpoints() -> Iterator[None]:
    """Lets ``torch.utils.checkpoint`` with ``use_reentrant=True`` run without reentrance.

    The reentrant form works under ``.backward()`` alone, which would write to ``.grad`` and run the
    user's hooks; ``torch.autograd.grad`` refuses it. Both forms give the same gradient.
    """
    before = torch.utils.checkpoint.CheckpointFunction
    torch.utils.checkpoint.CheckpointFunction = _NonReentrant  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        torch.utils.checkpoint.CheckpointFunction = before  # type: ignore[misc]


class _NonReentrant:
    """Takes the place of ``torch.utils.checkpoint.CheckpointFunction``."""

    @staticmethod
    def apply(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        if not any(isinstance(a, Tensor) and a.requires_grad for a in args):
            # As with the original: nothing inside, parameters included, gets a gradient.
            with torch.no_grad():
                return function(*args)
        return torch.utils.checkpoint.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state
        )
