"""The tensor that is tuned."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hpo._arguments import check_number, named_arguments
from lightning_hpo.hyperparameters.constraints import Constraint, Positive, Unconstrained


class Hyperparameter(nn.Module):
    """A number, or a tensor of numbers, that the callback tunes.

    It may sit anywhere in the module tree and is found there. Calling it returns the constrained
    value, ``value = constraint(raw)``; use that value in ``training_step`` or in a layer.

    ``raw`` is a persistent *buffer*: it is saved in checkpoints and moves with the module, but
    ``module.parameters()`` does not list it, so the model's optimizer never sees it.

    With ``frozen`` set to True the callback leaves it alone. ``is_initial`` says whether the value
    is the one that it was made with: it was not assigned, loaded or tuned since.

    Args:
        init: Initial value, in the scale of the value (not raw). A float or a tensor of any shape.
        constraint: The map from raw to value. Default: :class:`Unconstrained`.
        difference_step: Half the width, in raw λ, of the central difference by which the loss is
            differentiated with respect to this hyperparameter: for one that acts through random
            masks or another step function, where autograd sees no or a wrong derivative. Default:
            autograd.
        typical: A value that is usual for its kind, in the scale of the value. Where hypergradients
            say nothing yet, the λ-optimizer that is chosen by default drifts to it. Default: none.

    Raises:
        TypeError: If ``init`` is not a number or a floating-point tensor, ``constraint`` is not a
            :class:`Constraint` instance, or ``difference_step`` or ``typical`` is not a number; or
            later, if it is itself used as a number, as in ``alpha * x`` for ``alpha() * x``.
        ValueError: If ``init`` is not finite, is empty, or lies outside the constraint, or
            ``difference_step`` is not positive and finite, or ``typical`` not finite.

    Example:
        >>> class Mixed(LitModel):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gain = Hyperparameter(1.0, Positive())
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         x, y = batch
        ...         return F.cross_entropy(self.gain() * self.net(x), y)
        >>> module = Mixed()
        >>> Trainer(callbacks=[OnlineHPOCallback()]).fit(module, train_loader, validation_loader)
        >>> module.gain.value = 2.0  # in the scale of the value
        >>> module.gain.raw
        tensor(0.6931)
    """

    raw: Tensor
    is_policy = False  # whether it holds φ, the logits of choices or what decides them
    _is_resolved = True

    @named_arguments("Hyperparameter")
    def __init__(
        self,
        init: float | Tensor,
        constraint: Constraint | None = None,
        difference_step: float | None = None,
        typical: float | None = None,
    ) -> None:
        super().__init__()
        constraint = Unconstrained() if constraint is None else constraint
        _check_constraint(constraint)
        if isinstance(init, bool) or not isinstance(init, (int, float, Tensor)):
            raise TypeError(
                f"Hyperparameter: init={init!r} is a {type(init).__name__}, "
                "expected a float or a floating-point tensor"
            )
        value = (
            init.detach().clone()
            if isinstance(init, Tensor)
            else torch.tensor(float(init), dtype=torch.get_default_dtype())
        )
        if not value.is_floating_point():
            raise TypeError(
                f"Hyperparameter: init has dtype {value.dtype}, expected a floating-point tensor"
            )
        if value.numel() == 0:
            raise ValueError("Hyperparameter: init is empty, expected at least one number")
        if difference_step is not None:
            check_number(
                "Hyperparameter",
                "a positive, finite number",
                lambda x: 0 < x < math.inf,
                difference_step=difference_step,
            )
        if typical is not None:
            check_number("Hyperparameter", "a finite number", math.isfinite, typical=typical)
        self.constraint = constraint
        self.difference_step = difference_step
        self.typical = typical
        self.frozen = False
        self.is_initial = True
        try:
            raw = constraint.inverse(value)
        except ValueError as error:
            is_off = isinstance(constraint, Positive) and not torch.any(torch.as_tensor(value))
            raise ValueError(
                f"Hyperparameter: init={init!r} is refused: {error}"
                + (". A strength of 0 is to leave it out; small ones are 1e-6, say" * is_off)
            ) from None
        self.register_buffer("raw", raw, persistent=True)

    @classmethod
    def unresolved(cls, constraint: Constraint) -> Hyperparameter:
        """Makes one of one element whose value is found at the start of a training.

        Until then ``raw`` is NaN, also in a checkpoint.

        Args:
            constraint: The map from raw to value.

        Raises:
            TypeError: If ``constraint`` is no constraint.
        """
        _check_constraint(constraint)
        result = cls(0.0)
        result.constraint = constraint
        result.raw.fill_(math.nan)
        result._is_resolved = False
        return result

    @property
    def is_resolved(self) -> bool:
        """Whether it has a value; not as long as ``init="auto"`` waits for a training.

        Example:
            >>> Tuned().l2.is_resolved, module.gain.is_resolved
            (False, True)
        """
        if not self._is_resolved:  # else the host would wait for the device
            self._is_resolved = not bool(self.raw.isnan().any())
        return self._is_resolved

    def kept(self) -> Callable[[], None]:
        """Returns what puts it back to where it is now."""
        raw, is_resolved, is_initial = self.raw.clone(), self._is_resolved, self.is_initial

        def put_back() -> None:
            self.raw.copy_(raw)
            self._is_resolved, self.is_initial = is_resolved, is_initial

        return put_back

    def forget(self) -> None:
        """Lets it wait for a training again, as :meth:`unresolved` makes it."""
        self.raw.fill_(math.nan)
        self._is_resolved, self.is_initial = False, True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Loads ``raw``, which may have been saved before it was resolved."""
        before = self.raw.clone()
        super()._load_from_state_dict(*args, **kwargs)
        # What is put back as it was, as searches before a training do, is what it was made with.
        self.is_initial = self.is_initial and torch.equal(before, self.raw)
        self._is_resolved = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Hyperparameter:
        """Moves with the module, but keeps ``raw`` in float32 or better.

        In half precision, steps of the λ-optimizer would be lost to rounding.
        """
        before = self.raw
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.raw.dtype in (torch.float16, torch.bfloat16):
            self.raw = before.to(self.raw.device)
        return self

    def forward(self) -> Tensor:
        """Returns the constrained value, of the shape of ``raw``."""
        return self.constraint(self.raw)

    @property
    def value(self) -> Tensor:
        """The constrained value, detached. Assigning a number or a tensor writes ``raw``.

        A number is taken for all elements.

        Raises:
            TypeError: If what is assigned is no number and no tensor.
            ValueError: If it has another shape, or lies outside the constraint.

        Example:
            >>> scales = Hyperparameter(torch.tensor([0.1, 0.2]), Positive())
            >>> scales.value = 0.5
            >>> scales.value
            tensor([0.5000, 0.5000])
        """
        return self.constraint(self.raw).detach()

    @value.setter
    def value(self, value: float | Tensor) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
            raise TypeError(
                f"Hyperparameter: value={value!r} is a {type(value).__name__}, "
                "expected a number or a tensor"
            )
        new = torch.as_tensor(value, dtype=self.raw.dtype, device=self.raw.device).detach()
        if new.numel() == 1:
            new = new.expand(self.raw.shape)
        if new.shape != self.raw.shape:
            raise ValueError(
                f"Hyperparameter: got a value of shape {tuple(new.shape)}, expected a number or a "
                f"tensor of shape {tuple(self.raw.shape)}"
            )
        try:
            raw = self.constraint.inverse(new)
        except ValueError as error:
            raise ValueError(f"Hyperparameter: value={value!r} is refused: {error}") from None
        with torch.no_grad():
            self.raw.copy_(raw)
        self._is_resolved = True
        self.is_initial = False

    def fixed(self) -> Any:
        """Returns the value as a number or nested lists, for :func:`fixed_values`."""
        return self.value.tolist()

    def raw_of(self, value: Any) -> Tensor:
        """Returns the raw tensor of what :meth:`fixed` returned.

        Args:
            value: A number, or nested lists, in the scale of the value.

        Raises:
            ValueError: If it lies outside the constraint.
        """
        return self.constraint.inverse(torch.as_tensor(value, dtype=self.raw.dtype))

    def settled(self, raw: Tensor) -> Tensor:
        """Returns the raw tensor that stands for ``raw`` once nothing is tuned: that itself.

        Args:
            raw: Raw λ where a training has left it.
        """
        return self.constraint.project(raw)

    def __format__(self, spec: str) -> str:
        """Formats the value, as in ``f"{self.alpha:.2f}"``; without a format, as ``repr``."""
        return format(self.value, spec) if spec else str(self)

    def extra_repr(self) -> str:
        """Shows the value, the constraint, and whether it is frozen."""
        value = self.value
        shown = f"{value.item():.4g}" if value.numel() == 1 else f"shape={tuple(value.shape)}"
        shown = shown if self.is_resolved else "auto"
        return f"{shown}, constraint={self.constraint}{', frozen' if self.frozen else ''}"


# Functions whose arguments torch takes as numbers only, so that to call it is not enough.
_INSTEAD = {
    "cross_entropy_loss": ". Label smoothing with a derivative is lightning_hpo.LabelSmoothing",
}


def _itself(kind: type, what: str) -> TypeError:
    """Makes the error where a hyperparameter stands in the place of its value."""
    return TypeError(
        f"{what} was given a {kind.__name__} itself, expected its value: call it, as in "
        "self.alpha() * x instead of self.alpha * x, or torch.exp(self.alpha()) (without a "
        "derivative it is self.alpha.value, as a Python number float(self.alpha.value)). Options "
        'of the optimizer are tuned by OnlineHPOCallback(optimizer_hyperparameters=["lr"])'
        f"{_INSTEAD.get(what, '')}"
    )


def _refusing(what: str) -> Callable[..., Any]:
    def refuse(self: Hyperparameter, *others: Any) -> Any:
        raise _itself(type(self), what)

    return refuse


def _torch_function(
    cls: type[Hyperparameter], func: Any, types: Any, args: Any = (), kwargs: Any = None
) -> Any:
    """Refuses a hyperparameter among the arguments of a function of torch."""
    raise _itself(cls, getattr(func, "__name__", str(func)))


# Not in the class: type checkers are to refuse it as well.
for _name, _what in {
    **dict.fromkeys(("add", "radd", "iadd"), "+"),
    **dict.fromkeys(("sub", "rsub", "isub"), "-"),
    **dict.fromkeys(("mul", "rmul", "imul"), "*"),
    **dict.fromkeys(("truediv", "rtruediv", "itruediv"), "/"),
    **dict.fromkeys(("pow", "rpow"), "**"),
    **dict.fromkeys(("matmul", "rmatmul"), "@"),
    **dict.fromkeys(("lt", "le", "gt", "ge"), "A comparison"),
    **{"neg": "-", "abs": "abs", "float": "float", "int": "int", "index": "An index"},
    **{"round": "round", "getitem": "[]", "array": "A function of NumPy"},
}.items():
    setattr(Hyperparameter, f"__{_name}__", _refusing(_what))
Hyperparameter.__torch_function__ = classmethod(_torch_function)  # type: ignore[attr-defined]


def _check_constraint(constraint: Any) -> None:
    if not isinstance(constraint, Constraint):
        raise TypeError(
            f"Hyperparameter: constraint={constraint!r} is a {type(constraint).__name__}, "
            "expected an instance of a Constraint, for example Positive()"
        )


def named_hyperparameters(module: nn.Module) -> dict[str, Hyperparameter]:
    """Finds every :class:`Hyperparameter` in a module tree.

    Args:
        module: The module to search, itself included.

    Returns:
        Dotted names, as in ``module.named_modules()``, mapped to the hyperparameters. One that is
        registered in several places, as a rate shared by several layers is, appears once, under the
        name that was registered last among those with the fewest dots.

    Example:
        >>> list(named_hyperparameters(Tuned()))
        ['l2']
    """
    names: dict[Hyperparameter, str] = {}
    for name, m in module.named_modules(remove_duplicate=False):
        if isinstance(m, Hyperparameter) and (
            m not in names or name.count(".") <= names[m].count(".")
        ):
            names[m] = name
    return {name: m for m, name in names.items()}
