"""What is replaced in an optimizer's step, so that derivatives pass through it and are finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# The same function for real numbers. The derivative of sgn is a tensor without memory, on which
# in-place operations end the process by a segmentation fault (torch 2.14).
_AS_SIGN: dict[Any, Callable[..., Tensor]] = {
    torch.sgn: torch.sign,
    Tensor.sgn: Tensor.sign,
    Tensor.sgn_: Tensor.sign_,
}

# SGD detaches the first momentum buffer, which cuts dθ/dλ off from that step; optimizers work on
# ``p.data`` and ``p.grad.data``. The tensor itself is what they mean.
_ITSELF = (
    Tensor.detach,
    Tensor.detach_,
    torch.detach,
    torch.detach_,
    Tensor.data.__get__,  # type: ignore[attr-defined]
)
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_FOREACH_MUL: dict[Any, Callable[..., Tensor]] = {
    torch._foreach_mul: Tensor.mul,
    torch._foreach_mul_: Tensor.mul_,
}
_POWERS = (torch.pow, Tensor.pow, Tensor.__pow__)


class Differentiable(TorchFunctionMode):
    """Lets derivatives pass where an optimizer stops them: no_grad, ``detach``, ``.data``.

    The derivative of √x, and of x^a with 0 < a < 1, is defined as 0 at x = 0.

    Args:
        functional: Whether operations in place are rewritten by ``torch.func.functionalize``,
            which has no derivative of a copy.
    """

    def __init__(self, *, functional: bool = False) -> None:
        super().__init__()
        self._functional = functional

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch._C._set_grad_enabled:
            return None
        if func in _ITSELF:
            return args[0]
        if func in (torch.sqrt, Tensor.sqrt):
            return _sqrt(args[0])
        if func is Tensor.sqrt_:
            return self._copy(args[0], _sqrt(args[0]))
        if func in _POWERS and _is_root(args, kwargs):
            return _root(*args, **kwargs)
        if func is Tensor.pow_ and _is_root(args, kwargs):
            return self._copy(args[0], _root(*args, **kwargs))
        if func == _SET_DATA:
            self._copy(*args)
            return None
        if func is Tensor.__deepcopy__:
            return args[0].clone()
        if func is Tensor.copy_:
            return self._copy(args[0], kwargs.get("src", args[-1] if len(args) == 1 else args[1]))
        if func is torch._foreach_copy_:
            for target, value in zip(*args[:2], strict=True):
                self._copy(target, value)
            return args[0]
        if func is torch._foreach_norm:
            # The forward derivative of the fused form has the wrong shape.
            return [torch.linalg.vector_norm(t, *args[1:], **kwargs) for t in args[0]]
        if func in _FOREACH_MUL and isinstance(args[1], Tensor):
            # Nor has the fused form a derivative with respect to a factor that is one number.
            return [_FOREACH_MUL[func](t, args[1]) for t in args[0]]
        if func is Tensor.__setitem__ and self._functional:
            return self._set_item(*args)
        if isinstance(kwargs.get("out"), Tensor):
            out = kwargs.pop("out")
            return self._copy(out, func(*args, **kwargs))
        return _AS_SIGN.get(func, func)(*args, **kwargs)

    def _copy(self, target: Tensor, value: Tensor) -> Tensor:
        if not self._functional:
            return target.copy_(value)
        if target.dtype is torch.bool:
            return target.zero_().logical_or_(value)
        return target.zero_().add_(value.to(target.dtype))

    def _set_item(self, target: Tensor, key: Any, value: Any) -> None:
        keys = key if isinstance(key, tuple) else (key,)
        if any(isinstance(k, (Tensor, list)) for k in keys):
            Tensor.__setitem__(target, key, value)
            return
        part = target[key]
        self._copy(part, value if isinstance(value, Tensor) else part.new_tensor(value))


def _sqrt(x: Tensor) -> Tensor:
    """Returns √x with the derivative at 0 defined as 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def _is_root(args: Any, kwargs: dict[str, Any]) -> bool:
    exponent = args[1] if len(args) > 1 else kwargs.get("exponent")
    return isinstance(args[0], Tensor) and isinstance(exponent, float) and 0 < exponent < 1


def _root(x: Tensor, exponent: float) -> Tensor:
    """Returns x^a with the derivative at 0 defined as 0."""
    is_zero = x == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, x).pow(exponent))
