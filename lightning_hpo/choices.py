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
    Hyperparameter,
    IndependentController,
    LSTMController,
)
from lightning_hpo.hyperparameters.categorical import labels
from lightning_hpo.hyperparameters.controller import Controller, Pick

# A choice that is frozen is all but certain, unless only its probabilities are held fixed.
_SURE = 1 - 1e-6

Indices = dict[str, int]
"""For each categorical hyperparameter, by name, the index of a choice."""


class Choices:
    """Draws the choices of a training, those that are frozen included, and knows their log p.

    What is drawn follows from the seed, the number of the batch and the probabilities alone: all
    ranks draw the same, and so does a training that is resumed. The user's random numbers are left
    alone.

    Args:
        module: The module, whose controllers decide together.
        known: All categorical hyperparameters, by name.
        seed: That of the callback.
        options: The names of those that are options of the optimizer.

    Attributes:
        controllers: Those of the module, and one for the choices that are left.
        driven: The names of the choices that a network decides: their own logits are no λ.
        idle: φ of networks that have nothing left to decide.
    """

    def __init__(
        self,
        module: nn.Module,
        known: Mapping[str, CategoricalHyperparameter],
        seed: int,
        options: Collection[str] = (),
    ) -> None:
        self._hyperparameters = dict(known)
        self._names = {h: name for name, h in known.items()}
        self._seed = seed
        self._options = frozenset(options)
        self._cache: dict[Hyperparameter, tuple[tuple[int, int], Tensor]] = {}
        own = [m for m in module.modules() if isinstance(m, LSTMController)]
        for controller in own:
            for name, h in controller.decisions.items():
                if h.frozen and h not in self._names:  # a fixed option of the optimizer
                    self._hyperparameters[name], self._names[h] = h, name
        self.idle = {h for m in own if not m.deciding() for h in m.policy().values()}
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

    def draw(self, batch: int, window: int) -> None:
        """Draws what is in force until :meth:`forget`.

        A network that decides about the optimizer as well decides once for each of its steps.

        Args:
            batch: The number of the batch in the training.
            window: The number of the first batch of its optimizer step.
        """
        for controller in self.controllers:
            is_mixed = controller.is_joint and self._options.intersection(self._own(controller))
            found = self._sample(controller, "training", window if is_mixed else batch)
            for name, index in found.items():
                self._hyperparameters[name].drawn = index
        for h in self._hyperparameters.values():
            h.was_asked = False

    def forget(self) -> None:
        """Lets the most probable choices be in force again."""
        for h in self._hyperparameters.values():
            h.drawn = None

    def drawn(self) -> Indices:
        """Returns what is in force."""
        known = self._hyperparameters.items()
        return {name: h.drawn for name, h in known if h.drawn is not None}

    def asked(self) -> list[str]:
        """Lists the names of those that were asked for since they were drawn."""
        return [name for name, h in self._hyperparameters.items() if h.was_asked]

    def sample(self, *place: object) -> Indices:
        """Draws choices without putting them in force.

        Args:
            place: What identifies the draw.
        """
        found: Indices = {}
        for controller in self.controllers:
            found |= self._sample(controller, *place)
        return found

    def _sample(self, controller: Controller, *place: object) -> Indices:
        found: Indices = {}

        def pick(name: str, log_p: Tensor) -> int:
            number = random.Random(repr((self._seed, name, *place))).random()
            bounds = accumulate(log_p.double().exp().tolist())
            found[name] = next((i for i, bound in enumerate(bounds) if number < bound), 0)
            return found[name]

        with torch.no_grad():
            self._walk(controller, self._on_host(controller), pick)
        return found

    def every(self, names: Sequence[str]) -> list[tuple[Indices, float]]:
        """Returns all combinations of some choices, each with its probability.

        Args:
            names: Those that :meth:`relevant` returns.
        """
        counts = [range(len(self._hyperparameters[name].choices)) for name in names]
        result = []
        for combination in product(*counts):
            indices = dict(zip(names, combination, strict=True))
            log_p = self.log_probability({}, indices, names)
            result.append((indices, 1.0 if log_p is None else math.exp(float(log_p))))
        return result

    def uncertain(self) -> list[str]:
        """Lists the choices of the network that may differ from batch to batch."""
        return self.relevant(
            [
                name
                for name, h in self._hyperparameters.items()
                if name not in self._options and not (h.frozen and max(h.probabilities()) > _SURE)
            ]
        )

    def number(self, names: Iterable[str]) -> int:
        """Returns how many combinations of some choices there are."""
        return math.prod(len(self._hyperparameters[name].choices) for name in names)

    def looks(self, names: Sequence[str], random_ones: int) -> Iterator[Indices]:
        """Yields combinations of some choices, to see what depends on which.

        Args:
            names: Their names.
            random_ones: How many are drawn; before them comes each choice, the others being the
                most probable ones. 0: all combinations come.
        """
        counts = [len(self._hyperparameters[name].choices) for name in names]
        if not random_ones:
            for combination in product(*map(range, counts)):
                yield dict(zip(names, combination, strict=True))
            return
        best = {name: self._hyperparameters[name].best() for name in names}
        for name, count in zip(names, counts, strict=True):
            yield from ({**best, name: i} for i in range(count))
        yield from (self.sample("look", i) for i in range(random_ones))

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
            for h in controller.deciding().values()
            if h in wanted
            or (self._names[h] in self.driven and wanted & {*controller.policy().values()})
        ]

    def relevant(self, asked: Collection[str]) -> list[str]:
        """Returns the names of the choices whose log p matters where only some are asked for.

        Where a network decides, these and what it decides before them; what it decides later adds
        nothing but noise. So do choices that are independent of those asked for.
        """
        return [name for each in self.controllers for name in self._relevant(each, asked)]

    def _relevant(self, controller: Controller, asked: Collection[str]) -> list[str]:
        own = self._own(controller)
        if not controller.is_joint:
            return [name for name in own if name in asked]
        return own[: max((i + 1 for i, name in enumerate(own) if name in asked), default=0)]

    def decided_with(self, name: str, asked: Collection[str]) -> list[str]:
        """Lists those of some choices that a network decides together with another one."""
        for controller in self.controllers:
            own = self._own(controller)
            if controller.is_joint and name in own:
                return [other for other in own if other in asked]
        return []

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
            asked: The names of those that something depends on; see :meth:`relevant`.
        """
        parts: list[Tensor] = []
        for controller in self.controllers:
            relevant = self._relevant(controller, asked)
            if not relevant or not indices.keys() >= {*relevant}:
                continue
            found = self._walk(controller, phi, lambda name, _: indices.get(name, 0))
            parts += [found[name][indices[name]] for name in relevant]
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
        self,
        hyperparameters: Sequence[Hyperparameter],
        drawn: Sequence[Indices],
        enumerate_up_to: int,
    ) -> list[Tensor]:
        """Returns ∇φ H(p_φ), like the raw tensors of λ.

        Args:
            hyperparameters: The λ.
            drawn: Independent draws of all choices, by which the entropy of a network is estimated
                that decides about more combinations than ``enumerate_up_to``.
            enumerate_up_to: See above.
        """

        def entropy(phi: Mapping[Hyperparameter, Tensor]) -> Tensor:
            return torch.stack(
                [
                    _joint_entropy(controller, phi, self._rows(controller, drawn, enumerate_up_to))
                    if controller.is_joint
                    else _sum_of_entropies(self._walk(controller, phi, lambda name, _: 0))
                    for controller in self.controllers
                ]
            ).sum()

        return _slope(hyperparameters, entropy)

    def _rows(
        self, controller: Controller, drawn: Sequence[Indices], enumerate_up_to: int
    ) -> Tensor | None:
        """Returns what a network has decided in some draws; None where all can be gone through."""
        if controller.count <= enumerate_up_to:
            return None
        names = [self._names[h] for h in controller.decisions.values()]
        return torch.tensor([[indices[name] for name in names] for indices in drawn])

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
                f"hpo/{name}/{label}": p
                for label, p in zip(labels(h.choices), h.probabilities(), strict=True)
            } | {f"hpo/{name}/entropy": float(h.distribution().entropy())}
        return found

    def _own(self, controller: Controller) -> list[str]:
        """Lists the names that the decisions of a controller have here, in its order."""
        return [self._names[h] for h in controller.deciding().values()]

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


def _sum_of_entropies(log_p: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([-(each.exp() * each).sum() for each in log_p.values()]).sum()


def _joint_entropy(
    controller: Controller, phi: Mapping[Hyperparameter, Tensor], drawn: Tensor | None
) -> Tensor:
    """Returns a number with the slope of the entropy, or with one whose mean over draws it is."""
    if drawn is None:
        log_p = controller.log_probabilities(phi, controller.combinations())
        return -(log_p.exp() * log_p).sum()
    log_p = controller.log_probabilities(phi, drawn)
    own = log_p.detach()
    n = len(own)
    # Each draw's baseline must not depend on it: the mean of the others.
    baseline = (own.sum() - own) / (n - 1) if n > 1 else -math.log(controller.count)
    return -((own - baseline) * log_p).mean()


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
