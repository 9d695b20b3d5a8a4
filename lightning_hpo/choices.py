"""The choices of a training: drawn for each batch, by random numbers of their own."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, product

import torch
from torch import Tensor, nn

from lightning_hpo.hyperparameters import (
    CategoricalHyperparameter,
    Controller,
    Hyperparameter,
    IndependentController,
    LSTMController,
    Pick,
)

Indices = dict[str, int]
"""For each categorical hyperparameter, by name, the index of a choice."""


class Choices:
    """Draws the choices of a training, those that are frozen included, and knows their log p.

    What is drawn follows from the seed, the place in the training and the probabilities alone: all
    ranks draw the same, and so does a training that is resumed. The user's random numbers are left
    alone.

    Args:
        module: The module, whose controllers decide together.
        known: All categorical hyperparameters, by name.
        seed: That of the callback.

    Attributes:
        controllers: Those of the module, and one for the choices that are left.
        driven: The names of the choices that a network decides: their own logits are no λ.
    """

    def __init__(
        self,
        module: nn.Module,
        known: Mapping[str, CategoricalHyperparameter],
        seed: int,
    ) -> None:
        self._hyperparameters = dict(known)
        self._names = {h: name for name, h in known.items()}
        self._seed = seed
        self._cache: dict[Hyperparameter, tuple[tuple[int, int], Tensor]] = {}
        own = [m for m in module.modules() if isinstance(m, LSTMController)]
        self.driven = [
            self._names[h] for m in own for h in m.decisions.values() if h in self._names
        ]
        rest = {name: h for name, h in known.items() if name not in self.driven}
        self.controllers: list[Controller] = [*own]
        if rest:
            self.controllers.append(IndependentController(rest))
        self.show()

    def __bool__(self) -> bool:
        return bool(self._hyperparameters)

    def show(self) -> None:
        """Lets the logits of choices that a network decides show what it would decide."""
        for controller in self.controllers:
            controller.show()

    # --------------------------------------------------------------------------------------- draws

    def draw(self, *place: object) -> None:
        """Draws what is in force until :meth:`forget`.

        Args:
            place: What identifies the batch.
        """
        for name, index in self.sample(*place).items():
            self._hyperparameters[name].drawn = index

    def forget(self) -> None:
        """Lets the most probable choices be in force again."""
        for h in self._hyperparameters.values():
            h.drawn = None

    def drawn(self) -> Indices:
        """Returns what is in force."""
        known = self._hyperparameters.items()
        return {name: h.drawn for name, h in known if h.drawn is not None}

    def sample(self, *place: object) -> Indices:
        """Draws choices without putting them in force."""
        found: Indices = {}

        def pick(name: str, log_p: Tensor) -> int:
            number = random.Random(repr((self._seed, name, *place))).random()
            bounds = accumulate(log_p.double().exp().tolist())
            found[name] = next((i for i, bound in enumerate(bounds) if number < bound), 0)
            return found[name]

        with torch.no_grad():
            for controller in self.controllers:
                self._walk(controller, self._on_host(controller), pick)
        return found

    def every(self, names: Sequence[str]) -> list[tuple[Indices, float]]:
        """Returns all combinations of some choices, each with its probability.

        Where a network decides, they are all that it decides.
        """
        counts = [range(len(self._hyperparameters[name].choices)) for name in names]
        result = []
        for combination in product(*counts):
            indices = dict(zip(names, combination, strict=True))
            log_p = self.log_probability({}, indices, names)
            result.append((indices, 1.0 if log_p is None else math.exp(float(log_p))))
        return result

    @contextmanager
    def at(self, indices: Mapping[str, int]) -> Iterator[None]:
        """Puts choices in force for a while; of those that are not named, the most probable."""
        before = {name: h.drawn for name, h in self._hyperparameters.items()}
        for name, h in self._hyperparameters.items():
            h.drawn = indices.get(name)
        try:
            yield
        finally:
            for name, h in self._hyperparameters.items():
                h.drawn = before[name]

    def __getitem__(self, name: str) -> CategoricalHyperparameter:
        return self._hyperparameters[name]

    def decided_by(self, policy: Iterable[Hyperparameter]) -> list[str]:
        """Returns the names of the choices that depend on some of the λ."""
        wanted = set(policy)
        return [
            self._names[h]
            for controller in self.controllers
            for h in controller.decisions.values()
            if h in wanted
            or (self._names[h] in self.driven and wanted & {*controller.policy().values()})
        ]

    def is_mixed(self, names: Collection[str]) -> bool:
        """Whether a network decides some of these together with others."""
        wanted = set(names)
        owned = [self._owned(controller) for controller in self.controllers if controller.is_joint]
        return any(own & wanted and not own <= wanted for own in owned)

    def names_of(self, hyperparameters: Iterable[CategoricalHyperparameter]) -> frozenset[str]:
        """Returns the names of some of them."""
        return frozenset(self._names[h] for h in hyperparameters if h in self._names)

    # ----------------------------------------------------------------------------- probabilities

    def log_probability(
        self,
        phi: Mapping[Hyperparameter, Tensor],
        indices: Mapping[str, int],
        asked: Collection[str],
    ) -> Tensor | None:
        """Returns log p_φ of choices, a scalar; None where nothing depends on them.

        Args:
            phi: Raw tensors to use in the place of those of λ.
            indices: The choices.
            asked: The names of those that something depends on. Others that are independent of them
                are left out, which would add nothing but noise.
        """
        parts: list[Tensor] = []
        for controller in self.controllers:
            own = self._owned(controller)
            relevant = own.intersection(asked)
            if controller.is_joint and relevant:
                relevant = own
            if not relevant or not relevant <= indices.keys():
                continue
            found = self._walk(controller, phi, lambda name, _: indices.get(name, 0))
            parts += [log_p[indices[name]] for name, log_p in found.items() if name in relevant]
        return torch.stack(parts).sum() if parts else None

    def score(
        self,
        hyperparameters: Sequence[Hyperparameter],
        indices: Mapping[str, int],
        asked: Collection[str],
    ) -> list[Tensor]:
        """Returns ∇φ log p_φ of choices, like the raw tensors of λ; see :meth:`log_probability`."""
        return _slope(hyperparameters, lambda phi: self.log_probability(phi, indices, asked))

    def entropy_slope(
        self, hyperparameters: Sequence[Hyperparameter], indices: Mapping[str, int]
    ) -> list[Tensor]:
        """Returns ∇φ H(p_φ), like the raw tensors of λ.

        Where a network decides, the sum of the entropies of its decisions given those before them,
        along ``indices``.
        """

        def entropy(phi: Mapping[Hyperparameter, Tensor]) -> Tensor:
            walks = [
                self._walk(controller, phi, lambda name, _: indices.get(name, 0))
                for controller in self.controllers
            ]
            return torch.stack(
                [-(log_p.exp() * log_p).sum() for walk in walks for log_p in walk.values()]
            ).sum()

        return _slope(hyperparameters, entropy)

    def mean(self, name: str) -> float:
        """Returns the mean of a choice among numbers.

        Where a network decides, all count the same: what depends on the decisions before it would
        bias a derivative that it is the baseline of.
        """
        h = self._hyperparameters[name]
        values = [float(choice) for choice in h.choices]
        if name in self.driven:
            return sum(values) / len(values)
        return sum(p * v for p, v in zip(h.probabilities(), values, strict=True))

    def chances(self) -> dict[str, dict[str, float]]:
        """Returns for each choice, by name, what loggers get: probabilities, and entropy in nats.

        Of choices that a network decides, as their logits show them.
        """
        found = {}
        for name, h in self._hyperparameters.items():
            found[name] = {
                f"hpo/{name}/{choice}": p
                for choice, p in zip(h.choices, h.probabilities(), strict=True)
            } | {f"hpo/{name}/entropy": float(h.distribution().entropy())}
        return found

    def _owned(self, controller: Controller) -> set[str]:
        return {self._names[h] for h in controller.decisions.values()}

    def _walk(
        self, controller: Controller, phi: Mapping[Hyperparameter, Tensor], pick: Pick
    ) -> dict[str, Tensor]:
        """Walks through the decisions of a controller by the names that they have here."""
        names = {key: self._names[h] for key, h in controller.decisions.items()}
        found = controller.walk(phi, lambda key, log_p: pick(names[key], log_p))
        return {names[key]: log_p for key, log_p in found.items()}

    def _on_host(self, controller: Controller) -> dict[Hyperparameter, Tensor]:
        """Returns φ on the CPU; waits for a device only where it has been written to."""
        found = {}
        for h in controller.policy().values():
            written = h.raw._version, h.raw.data_ptr()
            before, copy = self._cache.get(h, (None, h.raw))
            if before != written:
                copy = h.raw.detach().cpu().clone()
                self._cache[h] = written, copy
            found[h] = copy
        return found


def _slope(
    hyperparameters: Sequence[Hyperparameter],
    function: Callable[[Mapping[Hyperparameter, Tensor]], Tensor | None],
) -> list[Tensor]:
    """Returns the gradient of a number over raw λ; zeros where it does not depend on any."""
    with torch.enable_grad():
        leaves = [h.raw.detach().clone().requires_grad_() for h in hyperparameters]
        value = function(dict(zip(hyperparameters, leaves, strict=True)))
        if value is None or not value.requires_grad:
            return [torch.zeros_like(leaf) for leaf in leaves]
        return list(torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True))
