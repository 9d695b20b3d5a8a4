"""Policies over choices: independent logits, and a network that decides one after the other."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hpo._arguments import check_count
from lightning_hpo.hyperparameters.categorical import (
    BernoulliHyperparameter,
    CategoricalHyperparameter,
)
from lightning_hpo.hyperparameters.hyperparameter import Hyperparameter

# The most probable combination is looked for among all, if they are no more.
_ENUMERATED = 4096

Pick = Callable[[str, Tensor], "int | Tensor"]
"""Returns the index of a choice, given its name and the log-probabilities of all.

Or a tensor ``(n,)`` of indices: n combinations are then gone through at once.
"""


class Controller(nn.Module, ABC):
    """A policy p_φ(a) over the choices a of several categorical hyperparameters.

    What is common to the two controllers below, and how :class:`~lightning_hpo.choices.Choices`
    uses them; no base class for others.

    Args:
        decisions: The choices, by name. For :func:`freeze` to understand what :meth:`best` returns
            these are the names that :func:`named_hyperparameters` gives them, and
            ``"optimizer.<option>"`` for options of the optimizer.

    Attributes:
        decisions: See above, in the order in which they are made.
        is_joint: Whether decisions depend on those before them.
    """

    is_joint = False

    def __init__(self, decisions: Mapping[str, CategoricalHyperparameter]) -> None:
        super().__init__()
        # A plain dict: as modules they would be found, and saved, a second time.
        self.decisions = dict(decisions)

    @abstractmethod
    def policy(self) -> dict[str, Hyperparameter]:
        """Returns the λ that hold φ, by the names that they have below this module."""

    @abstractmethod
    def walk(self, phi: Mapping[Hyperparameter, Tensor], pick: Pick) -> dict[str, Tensor]:
        """Decides one choice after the other.

        Args:
            phi: Raw tensors to use in the place of those of λ.
            pick: Makes a choice, given its log-probabilities under what was decided before.

        Returns:
            log p_φ of all choices of each decision, by name, given the decisions before it:
            ``(choices,)``, or ``(n, choices)`` where n combinations are gone through.
        """

    def deciding(self) -> dict[str, CategoricalHyperparameter]:
        """Returns the decisions that it makes; where they are joint, frozen ones have been made."""
        every = self.decisions.items()
        return {name: h for name, h in every if not (self.is_joint and h.frozen)}

    @property
    def count(self) -> int:
        """The number of combinations of what it decides."""
        return math.prod(len(h.choices) for h in self.deciding().values())

    def combinations(self) -> Tensor:
        """Returns the indices of all combinations, ``(count, decisions)``."""
        deciding = self.deciding()
        parts = [
            torch.arange(len(h.choices)) if name in deciding else torch.tensor([h.best()])
            for name, h in self.decisions.items()
        ]
        return torch.cartesian_prod(*parts).reshape(-1, len(parts))

    def log_probabilities(
        self, phi: Mapping[Hyperparameter, Tensor], combinations: Tensor
    ) -> Tensor:
        """Returns log p_φ of combinations, ``(n,)``, given their indices, ``(n, decisions)``."""
        columns = dict(zip(self.decisions, combinations.unbind(1), strict=True))
        found = self.walk(phi, lambda name, log_p: columns[name].to(log_p.device))
        n = len(combinations)
        parts = [
            log_p.expand(n, -1).gather(1, columns[name].to(log_p.device).unsqueeze(1))
            for name, log_p in found.items()
        ]
        return torch.cat(parts, 1).sum(1)

    def show(self) -> None:
        """Lets the logits of the choices show what would be decided."""

    def best(self) -> dict[str, Any]:
        """Returns the most probable choices, by name."""
        pairs = zip(self.decisions.items(), self._best({}).tolist(), strict=True)
        return {name: h.choices[index] for (name, h), index in pairs}

    @torch.no_grad()
    def _best(self, phi: Mapping[Hyperparameter, Tensor]) -> Tensor:
        """Returns their indices: each the most probable one, given those before it."""
        found: dict[str, int] = {}

        def pick(name: str, log_p: Tensor) -> int:
            found[name] = int(log_p.argmax())
            return found[name]

        self.walk(phi, pick)
        return torch.tensor([found[name] for name in self.decisions])


class IndependentController(Controller):
    """Choices that know nothing of each other: each has logits of its own.

    Example:
        >>> skip = BernoulliHyperparameter(0.75)
        >>> IndependentController({"skip": skip}).best()
        {'skip': True}
    """

    def policy(self) -> dict[str, Hyperparameter]:
        """Returns the choices themselves: their logits are λ."""
        return dict(self.decisions)

    def walk(self, phi: Mapping[Hyperparameter, Tensor], pick: Pick) -> dict[str, Tensor]:
        """Decides each by its own logits."""
        found = {}
        for name, h in self.decisions.items():
            found[name] = h.distribution(phi.get(h)).logits
            pick(name, found[name].detach())
        return found


class LSTMController(Controller):
    r"""An LSTM that decides one choice after the other, each in the light of those before it.

    The multi-task controller of Adam & Lorraine (2018, §3), after ENAS (Pham et al. 2018). Its
    input is an embedding of the choice before, its hidden state is common to both tasks, and each
    task, architecture and optimizer, has a head of its own:

        h_i, c_i = LSTM(embedding(a_{i−1}), h_{i−1}, c_{i−1}),   p(a_i) = softmax(W_i tanh(V h_i))

    with V of the task. W starts at 0: all choices are equally probable. λ are all these weights, as
    one vector. Assign it to the module whose choices it makes:

        self.controller = LSTMController({"activation": self.activation, "width": self.width})

    The logits of its choices show, after each update, their log-probabilities where all others are
    those of :meth:`best`. A decision that is frozen stays as it is.

    Args:
        decisions: The choices of architecture, by their names in the module.
        optimizer: The choices of options of the optimizer, by option; the callback gets the same
            ones: ``optimizer_hyperparameters={"lr": module.lr}``.
        hidden: The size of hidden state and embeddings.
        seed: Of the initial weights.

    Raises:
        TypeError: If ``decisions`` or ``optimizer`` is no mapping, or a decision no
            :class:`CategoricalHyperparameter`.
        ValueError: If there is none, or ``hidden`` is no positive integer.

    Example:
        >>> class Searched(LitModel):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.activation = CategoricalHyperparameter(["relu", "tanh"])
        ...         self.skip = BernoulliHyperparameter()
        ...         decisions = {"activation": self.activation, "skip": self.skip}
        ...         self.controller = LSTMController(decisions)
        >>> sorted(Searched().controller.best())
        ['activation', 'skip']
    """

    is_joint = True

    def __init__(
        self,
        decisions: Mapping[str, CategoricalHyperparameter],
        optimizer: Mapping[str, CategoricalHyperparameter] | None = None,
        hidden: int = 32,
        seed: int = 0,
    ) -> None:
        for given in (decisions, optimizer or {}):
            if not isinstance(given, Mapping):
                raise TypeError(
                    f"LSTMController: got a {type(given).__name__}, expected a mapping from names "
                    'to choices: {"activation": self.activation}'
                )
        options = {f"optimizer.{name}": h for name, h in (optimizer or {}).items()}
        every = {**decisions, **options}
        check_count("LSTMController", hidden=hidden)
        for name, h in every.items():
            if not isinstance(h, CategoricalHyperparameter):
                raise TypeError(
                    f"LSTMController: {name!r} is a {type(h).__name__}, expected a "
                    "CategoricalHyperparameter"
                )
        if not every:
            raise ValueError("LSTMController: there are no decisions, expected at least one")
        super().__init__(every)
        self.hidden = hidden
        self._tasks = {name: "optimizer" if name in options else "network" for name in every}
        self._shapes = self._layout()
        generator = torch.Generator().manual_seed(seed)
        parts = [
            torch.zeros(shape)
            if name.startswith("output")
            else torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
            for name, shape in self._shapes.items()
        ]
        self.weights = PolicyWeights(torch.cat([part.flatten() for part in parts]))

    def _layout(self) -> dict[str, tuple[int, ...]]:
        n = self.hidden
        shapes: dict[str, tuple[int, ...]] = {
            "lstm": (4 * n, 2 * n),
            "bias": (4 * n,),
            "start": (n,),
        }
        for task in dict.fromkeys(self._tasks.values()):
            shapes[f"head {task}"] = (n, n)
        for name, h in self.decisions.items():
            shapes[f"embedding {name}"] = (len(h.choices), n)
            shapes[f"output {name}"] = (len(h.choices), n)
        return shapes

    def policy(self) -> dict[str, Hyperparameter]:
        """Returns the weights of the network."""
        return {"weights": self.weights}

    def walk(self, phi: Mapping[Hyperparameter, Tensor], pick: Pick) -> dict[str, Tensor]:
        """Runs the network over all decisions."""
        flat = phi.get(self.weights, self.weights.raw)
        sizes = [math.prod(shape) for shape in self._shapes.values()]
        pairs = zip(self._shapes.items(), flat.split(sizes), strict=True)
        w = {name: part.reshape(shape) for (name, shape), part in pairs}
        x, h = w["start"], flat.new_zeros(self.hidden)
        c = h
        found = {}
        for name, decision in self.decisions.items():
            gates = torch.cat(torch.broadcast_tensors(x, h), -1) @ w["lstm"].T + w["bias"]
            i, f, o, g = gates.split(self.hidden, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            logits = (h @ w[f"head {self._tasks[name]}"].T).tanh() @ w[f"output {name}"].T
            index: int | Tensor
            if decision.frozen:  # it has been made, and is no matter of φ
                index = decision.best()
                is_it = torch.arange(logits.shape[-1], device=logits.device) == index
                pick(name, torch.where(is_it, 0.0, -math.inf))
                found[name] = torch.zeros_like(logits)
            else:
                found[name] = logits.log_softmax(-1)
                index = pick(name, found[name].detach())
            x = w[f"embedding {name}"][index]
        return found

    def best(self) -> dict[str, Any]:
        """Returns the most probable choices together, by name.

        With more than 4096 combinations, what is reached from the most probable choices one after
        the other by changing single ones as long as that makes them more probable.
        """
        return super().best()

    @torch.no_grad()
    def _best(self, phi: Mapping[Hyperparameter, Tensor]) -> Tensor:
        if self.count <= _ENUMERATED:
            every = self.combinations()
            return every[self.log_probabilities(phi, every).argmax().cpu()]
        found = super()._best(phi)
        while True:
            others = self._changed(found)
            log_p = self.log_probabilities(phi, torch.cat([found.unsqueeze(0), others])).cpu()
            if not log_p[1:].max() > log_p[0] + 1e-5:  # by more than rounding
                return found
            found = others[log_p[1:].argmax()]

    def _changed(self, combination: Tensor) -> Tensor:
        """Returns what single decisions make of a combination, each choice of each in turn."""
        rows = []
        for i, name in enumerate(self.decisions):
            if name in self.deciding():
                for index in range(len(self.decisions[name].choices)):
                    row = combination.clone()
                    row[i] = index
                    rows.append(row)
        return torch.stack(rows)

    @torch.no_grad()
    def show(self) -> None:
        """Writes the log-probabilities of each decision, the others being the best, into logits."""
        deciding = self.deciding()
        if not deciding:
            return
        # One wait for a device, not one for each decision.
        phi: dict[Hyperparameter, Tensor] = {self.weights: self.weights.raw.cpu()}
        log_p = self.log_probabilities(phi, self._changed(self._best(phi)))
        parts = log_p.split([len(h.choices) for h in deciding.values()])
        for h, part in zip(deciding.values(), parts, strict=True):
            is_single = isinstance(h, BernoulliHyperparameter)
            h.raw.copy_(part[1] - part[0] if is_single else part - part.mean())


class PolicyWeights(Hyperparameter):
    """The weights of a :class:`LSTMController`; any numbers."""

    is_policy = True
