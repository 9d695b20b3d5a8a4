"""Brute force: a whole training as one autograd graph, from textbook formulas.

Nothing here is shared with the package, whose results are held to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from cases import Lion
from torch import Tensor
from torch.func import functional_call

Parameters = dict[str, Tensor]


@dataclass
class Unrolled:
    """The end of an unrolled training.

    Attributes:
        theta: θ_T, by name.
        hypergradients: dL_V(θ_T)/d(raw λ), by name.
        clipped: For each step, the share of the gradient's elements that clipping changed.
    """

    theta: Parameters
    hypergradients: Parameters
    clipped: list[float] = field(default_factory=list)


def differentiate_training(
    train_loss: Callable[[Parameters, Parameters, int], Tensor],
    validation_loss: Callable[[Parameters], Tensor],
    theta: Parameters,
    raw: Parameters,
    *,
    steps: int,
    optimizer: type[torch.optim.Optimizer],
    options: dict[str, Any],
    schedule: Callable[[int], float] = lambda t: 1.0,
    gradient_clip_val: float | None = None,
    gradient_clip_algorithm: str = "norm",
    start: int = 0,
    decay: float = 1.0,
) -> Unrolled:
    """Differentiates the validation loss after ``steps`` steps of training with respect to raw λ.

    Args:
        train_loss: L_T of (θ, raw λ, step), penalties included.
        validation_loss: L_V of θ.
        theta: Initial parameters.
        raw: Raw hyperparameters.
        steps: Optimizer steps.
        optimizer: Names the formula to follow.
        options: Its arguments.
        schedule: The factor of the learning rate at a step (from 0).
        gradient_clip_val: As in the Trainer.
        gradient_clip_algorithm: As in the Trainer.
        start: Where the window begins: θ and the optimizer's state are constants there.
        decay: How much of the influence of earlier steps survives each step.
    """
    theta = {name: p.detach().clone().requires_grad_() for name, p in theta.items()}
    raw = {name: r.detach().clone().requires_grad_() for name, r in raw.items()}
    memory: dict[str, dict[str, Tensor]] = {name: {} for name in theta}
    step_formula = _FORMULAS[optimizer]
    clipped = []
    for t in range(steps):
        keep = 0.0 if t == start else decay
        theta = {name: _fade(p, keep) for name, p in theta.items()}
        memory = {n: {k: _fade(s, keep) for k, s in m.items()} for n, m in memory.items()}
        theta = {n: p if p.requires_grad else p.requires_grad_() for n, p in theta.items()}
        loss = train_loss(theta, raw, t)
        gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        before = gradients
        if gradient_clip_val is not None:
            gradients = _CLIPPINGS[gradient_clip_algorithm](gradients, gradient_clip_val)
        clipped.append(_share_changed(before, gradients))
        lr = options["lr"] * schedule(t)
        moved = {}
        for (name, p), g in zip(theta.items(), gradients, strict=True):
            moved[name] = step_formula(p, g, memory[name], t + 1, {**options, "lr": lr})
        theta = moved
    values = torch.autograd.grad(validation_loss(theta), list(raw.values()))
    return Unrolled(
        {name: p.detach() for name, p in theta.items()},
        dict(zip(raw, values, strict=True)),
        clipped,
    )


def differentiate_mlp(model: Any, batch: Callable[[int], Any], valid: Any, **options: Any) -> Any:
    """Applies :func:`differentiate_training` to a ``cases.Mlp``, which is left alone.

    The strength exp(raw) of each L2 hyperparameter acts on the weight of the layer that it is named
    after, or on both weights.
    """
    net = model.net
    raw = {n: b for n, b in model.named_buffers() if n.endswith("raw")}

    def data_loss(theta: Parameters, data: Any) -> Tensor:
        x, y = data
        return torch.nn.functional.cross_entropy(functional_call(net, theta, (x,)), y)

    def train_loss(theta: Parameters, lam: Parameters, t: int) -> Tensor:
        loss = data_loss(theta, batch(t))
        for name, r in lam.items():
            place = name.removeprefix("l2").removesuffix("raw").strip(".").removeprefix("net.")
            for weight_name, w in theta.items():
                if weight_name.endswith("weight") and weight_name.startswith(place):
                    loss = loss + 0.5 * r.exp() * (w * w).sum()
        return loss

    result = differentiate_training(
        train_loss,
        lambda theta: data_loss(theta, valid),
        dict(net.named_parameters()),
        raw,
        **options,
    )
    result.hypergradients = {
        name.removesuffix(".raw"): h for name, h in result.hypergradients.items()
    }
    return result


def central_differences(function: Callable[[list[float]], float], at: Sequence[float]) -> Tensor:
    """Differentiates ``function`` numerically, to about 1e-8 where it is smooth and of size 1."""
    h = 1e-4
    result = []
    for j in range(len(at)):
        ends = []
        for sign in (1, -1):
            moved = list(at)
            moved[j] += sign * h
            ends.append(function(moved))
        result.append((ends[0] - ends[1]) / (2 * h))
    return torch.tensor(result)


def _fade(x: Tensor, keep: float) -> Tensor:
    """Returns x with ``keep`` times its derivative."""
    return keep * x + (1 - keep) * x.detach() if keep != 1.0 else x


def _share_changed(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    changed = [(a != b).double().flatten() for a, b in zip(before, after, strict=True)]
    return torch.cat(changed).mean().item()


def _clip_norm(gradients: Sequence[Tensor], bound: float) -> list[Tensor]:
    norm = torch.cat([g.flatten() for g in gradients]).square().sum().sqrt()
    # torch.nn.utils.clip_grad_norm_ adds 1e-6 to the norm, so that it never divides by zero.
    factor = bound / (norm + 1e-6)
    return [g * factor for g in gradients] if factor < 1 else list(gradients)


def _clip_value(gradients: Sequence[Tensor], bound: float) -> list[Tensor]:
    return [torch.where(g.abs() > bound, bound * g.detach().sign(), g) for g in gradients]


_CLIPPINGS = {"norm": _clip_norm, "value": _clip_value}


def _sgd(p: Tensor, g: Tensor, memory: dict[str, Tensor], t: int, o: dict[str, Any]) -> Tensor:
    momentum = o.get("momentum", 0.0)
    velocity = momentum * memory["velocity"] + g if "velocity" in memory else g
    memory["velocity"] = velocity
    direction = g + momentum * velocity if o.get("nesterov") else velocity
    return p - o["lr"] * direction


def _adam(p: Tensor, g: Tensor, memory: dict[str, Tensor], t: int, o: dict[str, Any]) -> Tensor:
    b1, b2, eps = 0.9, 0.999, 1e-8
    m = b1 * memory.get("m", torch.zeros_like(p)) + (1 - b1) * g
    v = b2 * memory.get("v", torch.zeros_like(p)) + (1 - b2) * g**2
    memory["m"], memory["v"] = m, v
    m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
    return p - o["lr"] * m_hat / (v_hat.sqrt() + eps)


def _adamw(p: Tensor, g: Tensor, memory: dict[str, Tensor], t: int, o: dict[str, Any]) -> Tensor:
    return _adam(p * (1 - o["lr"] * o["weight_decay"]), g, memory, t, o)


def _rmsprop(p: Tensor, g: Tensor, memory: dict[str, Tensor], t: int, o: dict[str, Any]) -> Tensor:
    square = 0.99 * memory.get("square", torch.zeros_like(p)) + 0.01 * g**2
    memory["square"] = square
    return p - o["lr"] * g / (square.sqrt() + 1e-8)


def _lion(p: Tensor, g: Tensor, memory: dict[str, Tensor], t: int, o: dict[str, Any]) -> Tensor:
    mean = memory.get("mean", torch.zeros_like(p))
    memory["mean"] = 0.99 * mean + 0.01 * g
    update = torch.tanh(o["sharpness"] * (0.9 * mean + 0.1 * g))
    return p * (1 - o["lr"] * o["weight_decay"]) - o["lr"] * update


_FORMULAS = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adamw,
    torch.optim.RMSprop: _rmsprop,
    Lion: _lion,
}
