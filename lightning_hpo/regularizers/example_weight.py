"""One tunable weight per training example."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_hpo._arguments import check_count, named_arguments
from lightning_hpo._record import record_of, update_record
from lightning_hpo._tensors import is_on_host
from lightning_hpo.hyperparameters import Box, Constraint, Hyperparameter
from lightning_hpo.regularizers._mixin import RegularizerMixin
from lightning_hpo.regularizers._placement import INIT_HINTS, check_free_name


class ExampleWeightMixin(RegularizerMixin):
    """Weighs every training example: data hyper-cleaning (Franceschi et al. 2017, §5.1).

    Example:
        >>> class Cleaned(ExampleWeightMixin, LitModel):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_example_weights(len(train_set))
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         x, y, index = batch
        ...         losses = F.cross_entropy(self.net(x), y, reduction="none")
        ...         return self.weighted_mean(losses, index)
        >>> indexed = DataLoader(IndexedDataset(train_set), batch_size=32, shuffle=True)
        >>> Trainer(callbacks=[OnlineHPOCallback()]).fit(Cleaned(), indexed, validation_loader)
    """

    @named_arguments("register_example_weights", INIT_HINTS)
    def register_example_weights(
        self,
        count: int,
        init: float | Tensor = 1.0,
        name: str = "example_weights",
        constraint: Constraint | None = None,
    ) -> None:
        """Registers a vector of weights, one per training example.

        Use a reverse-mode estimator (``T1T2``, or ``UnrollK``): its cost does not grow with the
        number of weights.

        Args:
            count: The number of training examples.
            init: Initial weight of all of them, a factor of their losses, or a tensor ``(count,)``.
            name: The attribute under which the vector is registered.
            constraint: Default: ``Box(0, 1)``. ``Simplex()`` and ``L1Ball(radius)`` project the
                whole vector.

        Raises:
            TypeError: If ``init`` holds no floating-point numbers, or ``constraint`` is none.
            ValueError: If ``count`` is not positive, ``init`` has another shape or lies outside the
                constraint, ``name`` is taken, or there are example weights already.

        Example:
            >>> module = with_mixins(LitModel(), ExampleWeightMixin)
            >>> module.register_example_weights(len(train_set), init=0.5, constraint=L1Ball(64.0))
            >>> module.example_weights.value.sum()  # on the surface of the ball
            tensor(64.)
        """
        check_free_name("register_example_weights", self, name)
        known = record_of(self).example_weights
        if known is not None:
            raise ValueError(
                f"register_example_weights: {type(self).__name__} has example weights already, "
                f"self.{known}; for another vector assign a Hyperparameter of your own"
            )
        check_count("register_example_weights", "the number of training examples", count=count)
        if isinstance(init, Tensor) and init.shape != (count,):
            raise ValueError(
                f"register_example_weights: init has shape {tuple(init.shape)}, expected ({count},)"
            )
        value = init if isinstance(init, Tensor) else torch.full((count,), float(init))
        self.add_module(name, Hyperparameter(value, Box() if constraint is None else constraint))
        update_record(self, example_weights=name)

    def weighted_mean(self, losses: Tensor, index: Tensor | None) -> Tensor:
        """Returns 1/B Σ_i w[index_i] · losses_i over a batch of B examples.

        Args:
            losses: One loss per example, ``(B,)``.
            index: The positions of the examples in the training set, ``(B,)``, integers.

        Returns:
            A scalar with the graph of ``losses`` and of the weights.

        Raises:
            ValueError: If the index is missing, has another shape, or is out of range.

        Example:
            >>> module = Cleaned()
            >>> module.example_weights.value = 0.5
            >>> module.weighted_mean(torch.tensor([1.0, 3.0]), index=torch.tensor([7, 0]))
            tensor(1.)
        """
        name = record_of(self).example_weights
        if name is None:
            raise ValueError("weighted_mean: call register_example_weights in __init__ first")
        weights: Tensor = self.get_submodule(name)()
        if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype is torch.bool:
            raise ValueError(
                f"weighted_mean: index is {type(index).__name__}, expected the integer positions "
                "of the examples; wrap the training set in IndexedDataset, which adds them"
            )
        if losses.shape != index.shape:
            raise ValueError(
                f"weighted_mean: losses have shape {tuple(losses.shape)} and index "
                f"{tuple(index.shape)}, expected one loss per example; use reduction='none'"
            )
        count = len(weights)
        if not is_on_host(index):
            # There the look-up fails by itself, except that a negative index counts from the end.
            index = torch.where(index < 0, count, index)
        elif index.numel() and not 0 <= int(index.min()) <= int(index.max()) < count:
            raise ValueError(
                f"weighted_mean: index reaches from {int(index.min())} to {int(index.max())}, but "
                f"there are {count} example weights"
            )
        return (weights.to(losses.dtype)[index.long()] * losses).mean()


class IndexedDataset(Dataset[Any]):
    """Adds to each sample its position: ``(*sample, index)``; to a batch, if indexed by a list.

    Args:
        dataset: A map-style dataset of tuples.

    Example:
        >>> x, y, index = IndexedDataset(train_set)[5]
        >>> index
        5
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int | list[int]) -> tuple[Any, ...]:
        sample = self.dataset[index]
        position = torch.as_tensor(index) if isinstance(index, list) else index
        return (*(sample if isinstance(sample, (tuple, list)) else (sample,)), position)
