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

Pick = Callable[[str, Tensor], int]
"""Returns the index of a choice, given its name and the log-probabilities of all."""


class Controller(nn.Module, ABC):
    """A policy p_φ(a) over the choices a of several categorical hyperparameters.

    Args:
        decisions: The choices, by name. For :func:`freeze` to understand what :meth:`best` returns
            these are the names that :func:`named_hyperparameters` gives them, and
            ``"optimizer.<option>"`` for options of the optimizer.

    Attributes:
        decisions: See above.
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
            log p_φ of all choices of each decision, by name, given the decisions before it.
        """

    def show(self) -> None:
        """Lets the logits of the choices show what would be decided."""

    def best(self) -> dict[str, Any]:
        """Returns the most probable choices, by name, each given those decided before it."""
        found: dict[str, Any] = {}

        def pick(name: str, log_p: Tensor) -> int:
            index = int(log_p.argmax())
            found[name] = self.decisions[name].choices[index]
            return index

        with torch.no_grad():
            self.walk({}, pick)
        return found


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

    The logits of its choices show, after each update, their log-probabilities given the most
    probable choices before them. A decision that is frozen stays as it is.

    Args:
        decisions: The choices of architecture, by their names in the module.
        optimizer: The choices of options of the optimizer, by option; the callback gets the same
            ones: ``optimizer_hyperparameters={"lr": module.lr}``.
        hidden: The size of hidden state and embeddings.
        seed: Of the initial weights.

    Raises:
        TypeError: If a decision is no :class:`CategoricalHyperparameter`.
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
        for name in self.decisions:
            gates = w["lstm"] @ torch.cat([x, h]) + w["bias"]
            i, f, o, g = gates.split(self.hidden)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            logits = w[f"output {name}"] @ (w[f"head {self._tasks[name]}"] @ h).tanh()
            decision = self.decisions[name]
            if decision.frozen:  # it has been made, and is no matter of φ
                index = decision.best()
                is_it = torch.arange(len(logits), device=logits.device) == index
                pick(name, torch.where(is_it, 0.0, -math.inf))
                found[name] = torch.zeros_like(logits)
            else:
                found[name] = logits.log_softmax(0)
                index = pick(name, found[name].detach())
            x = w[f"embedding {name}"][index]
        return found

    @torch.no_grad()
    def show(self) -> None:
        """Writes the log-probabilities along the most probable choices into their logits."""

        def pick(name: str, log_p: Tensor) -> int:
            h = self.decisions[name]
            if not h.frozen:
                is_single = isinstance(h, BernoulliHyperparameter)
                h.raw.copy_(log_p[1] - log_p[0] if is_single else log_p - log_p.mean())
            return int(log_p.argmax())

        self.walk({}, pick)


class PolicyWeights(Hyperparameter):
    """The weights of a :class:`LSTMController`; any numbers."""

    is_policy = True
