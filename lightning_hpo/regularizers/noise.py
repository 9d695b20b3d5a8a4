"""Additive Gaussian noise with a tunable standard deviation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hpo._arguments import named_arguments
from lightning_hpo.hyperparameters import Constraint, Hyperparameter, Interval
from lightning_hpo.regularizers._mixin import RegularizerMixin
from lightning_hpo.regularizers._placement import (
    INIT_HINTS,
    attach,
    check_free_name,
    find_modules,
)


class GaussianNoise(nn.Module):
    r"""Adds noise in training: x + σ ε with ε ~ N(0, 1), one draw per element.

    Source: Luketina et al. (2016), §2.2 and §3; Fioravanti, §II-B, eq. 6. σ acts differentiably, so
    that every backend gives its exact mixed derivative for the draws at hand.

    Typical is 0.3 times the root mean square of the first input of a training
    (:class:`Hyperparameter`).

    Args:
        init: Initial standard deviation σ, in the units of the input.
        constraint: Default: ``Interval(0, inf)``.

    Raises:
        TypeError: If ``init`` is not a number, or ``constraint`` is none.
        ValueError: If ``init`` lies outside the constraint.

    Example:
        >>> net = nn.Sequential(GaussianNoise(0.1), nn.Linear(4, 3))
        >>> net[0].sigma
        Hyperparameter(0.1, constraint=Interval(low=0.0, high=inf))
    """

    @named_arguments("GaussianNoise")
    def __init__(self, init: float, constraint: Constraint | None = None) -> None:
        super().__init__()
        self.sigma = Hyperparameter(init, Interval(0.0) if constraint is None else constraint)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a tensor of the shape of ``x``; ``x`` itself in evaluation mode.

        Args:
            x: Floating-point numbers, of any shape.
        """
        return add_noise(x, self.sigma) if self.training else x


def add_noise(x: Tensor, sigma: Hyperparameter) -> Tensor:
    """Returns x + σ ε, with ε drawn like ``x``.

    The first input of a training says which σ is typical.
    """
    if "input_size" not in vars(sigma) and not torch.compiler.is_compiling():
        vars(sigma)["input_size"] = float(x.detach().float().square().mean().sqrt())
    value: Tensor = sigma()
    return x + value.to(x.dtype) * torch.randn_like(x)


class GaussianNoiseMixin(RegularizerMixin):
    """Adds tunable Gaussian noise to the inputs of modules, by hooks.

    Source: Luketina et al. (2016, §3), who tune the noise of the input and of each layer.

    Example:
        >>> class Noisy(GaussianNoiseMixin, LitModel):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_noise(init=0.1)  # at the input of the network
        ...         self.register_noise(init=0.1, at=["net.3"], name="hidden_noise")
        >>> sorted(named_hyperparameters(Noisy()))
        ['hidden_noise', 'noise']
    """

    @named_arguments("register_noise", INIT_HINTS)
    def register_noise(
        self,
        init: float,
        at: str | Sequence[str] = "input",
        name: str = "noise",
        tied: bool = True,
        constraint: Constraint | None = None,
    ) -> None:
        """Adds σ ε to the first floating-point input of modules, in training only.

        Call it after the network has been built.

        Args:
            init: Initial σ, in the units of the input.
            at: ``"input"``: the first child of this module that has parameters. Otherwise the
                dotted names of the modules before which the noise is added.
            name: The attribute under which σ is registered, and the first part of its name.
            tied: Whether all places share one σ, named ``name``. Otherwise there is one each, named
                ``name.<module>``.
            constraint: Default: ``Interval(0, inf)``.

        Raises:
            TypeError: If ``init`` is not a number, or ``constraint`` is none.
            ValueError: If a module does not exist (the closest names are listed) or is named twice,
                there is none with parameters, ``name`` is taken, or ``init`` lies outside the
                constraint.

        Example:
            >>> module = with_mixins(LitModel(), GaussianNoiseMixin)
            >>> module.register_noise(0.1, at=["net.0", "net.3"], tied=False)
            >>> sorted(named_hyperparameters(module))
            ['noise.net.0', 'noise.net.3']
        """
        check_free_name("register_noise", self, name)
        if at == "input":
            places = [
                child
                for child, module in self.named_children()
                if next(module.parameters(), None) is not None
            ][:1]
            if not places:
                raise ValueError(
                    f"register_noise: at='input', but {type(self).__name__} has no child with "
                    "parameters; call it after the network has been built, or name modules"
                )
        else:
            places = [at] if isinstance(at, str) else list(at)
        if not places or len(set(places)) < len(places):
            raise ValueError(
                f"register_noise: at={list(places)}, expected different modules, at least one"
            )
        modules = find_modules("register_noise", self, places)
        constraint = Interval(0.0) if constraint is None else constraint
        shared = Hyperparameter(init, constraint) if tied else None
        if shared is not None:
            attach(self, name, shared)
        for place, module in zip(places, modules, strict=True):
            sigma = shared
            if sigma is None:
                sigma = Hyperparameter(init, constraint)
                attach(self, f"{name}.{place}", sigma)
            module.register_forward_pre_hook(_NoiseHook(sigma), with_kwargs=False)


class _NoiseHook:
    """Adds noise to the first floating-point argument of a module.

    A class, not a closure, so that a copy of the module gets a hook with its own σ.
    """

    def __init__(self, sigma: Hyperparameter) -> None:
        self.sigma = sigma

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not module.training:
            return None
        for i, value in enumerate(args):
            if isinstance(value, Tensor) and value.is_floating_point():
                return (*args[:i], add_noise(value, self.sigma), *args[i + 1 :])
        return None
