"""What an update leaves behind: a record in the history, and values in the loggers."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple, overload

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_hpo.hyperparameters import Hyperparameter

__docformat__ = "google"
__all__ = ["History", "HistoryRecord"]

# Above this many elements, the history keeps summaries instead of the tensors themselves.
SUMMARY_ABOVE = 1000

# As many names as a progress bar has room for.
_PROGRESS_BAR_NAMES = 6


@dataclass
class HistoryRecord:
    """One λ update.

    For a hyperparameter of more than 1 000 elements, each entry is a dict with ``min``, ``mean``,
    ``max`` and ``norm`` instead.

    Attributes:
        step: The number of optimizer steps taken when the update was made: the trainer's
            ``global_step``, less steps that a gradient scaler has left out.
        values: The constrained values after the update: a float, or a list for a tensor.
        hypergradients: dL_V/d(raw λ), shaped like raw λ, on the CPU.
        tangent_norms: ‖dθ/d(raw λ)‖, in units of θ per unit of raw λ: a float, or a list for a
            tensor; None for reverse estimators.
        skipped: How many updates have been skipped so far because their hypergradient was not
            finite, this one included.
        outcome: How the solver of an implicit estimator ended (the value of a
            :class:`lightning_hpo.estimators.SolverOutcome`); None for other estimators. Of several
            estimators, ``"pattern: outcome"`` for each that has one, separated by commas.
        loss: L_V on the held-out batch of this update, before it; None where it was not asked for.

    Example:
        >>> callback = OnlineHPOCallback(ClipR(), every_n_steps=5)
        >>> Trainer(callbacks=[callback]).fit(Tuned(), train_loader, validation_loader)
        >>> record = callback.history[0]
        >>> record.step, list(record.values), list(record.tangent_norms), record.skipped
        (5, ['l2'], ['l2'], 0)
    """

    step: int
    values: dict[str, Any]
    hypergradients: dict[str, Any]
    tangent_norms: dict[str, Any] | None
    skipped: int
    outcome: str | None = None
    loss: float | None = None


class History(Sequence[HistoryRecord]):
    """A list of records that takes a few bytes per number, however long the training.

    Records are made anew where they are read. It grows by :meth:`append` alone.

    Args:
        records: What it begins with.

    Example:
        >>> callback = OnlineHPOCallback(T1T2(), every_n_steps=5)
        >>> Trainer(callbacks=[callback]).fit(Tuned(), train_loader, validation_loader)
        >>> len(callback.history), callback.history[-1].step
        (4, 20)
        >>> list(callback.history.columns())  # pandas.DataFrame(callback.history.columns())
        ['step', 'loss', 'skipped', 'l2', 'l2_grad']
    """

    def __init__(self, records: Iterable[HistoryRecord] = ()) -> None:
        self._layouts: list[tuple[int, _Layout]] = []  # each with the index of its first record
        self._numbers = array("d")
        self._starts = array("q")
        self._steps = array("q")
        self._skipped = array("q")
        self._outcomes: list[str | None] = []
        self._losses = array("d")  # NaN: none
        for record in records:
            self.append(record)

    def append(self, record: HistoryRecord) -> None:
        """Adds a record.

        Args:
            record: That of the next update.
        """
        entries = _entries(record)
        layout = [(part, name, _Shape.of(value)) for part, name, value in entries]
        if not self._layouts or self._layouts[-1][1] != layout:
            self._layouts.append((len(self), layout))
        self._starts.append(len(self._numbers))
        for (_, _, value), (_, _, shape) in zip(entries, layout, strict=True):
            self._numbers.extend(shape.flatten(value))
        self._steps.append(record.step)
        self._skipped.append(record.skipped)
        self._outcomes.append(record.outcome)
        self._losses.append(math.nan if record.loss is None else record.loss)

    def __len__(self) -> int:
        return len(self._steps)

    @overload
    def __getitem__(self, index: int) -> HistoryRecord: ...

    @overload
    def __getitem__(self, index: slice) -> list[HistoryRecord]: ...

    def __getitem__(self, index: int | slice) -> HistoryRecord | list[HistoryRecord]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        layout = next(layout for start, layout in reversed(self._layouts) if start <= i)
        loss = None if math.isnan(self._losses[i]) else self._losses[i]
        record = HistoryRecord(
            self._steps[i], {}, {}, None, self._skipped[i], self._outcomes[i], loss
        )
        at = self._starts[i]
        for part, name, shape in layout:
            if getattr(record, part) is None:
                setattr(record, part, {})
            getattr(record, part)[name] = shape.restore(self._numbers[at : at + shape.length])
            at += shape.length
        return record

    def columns(self) -> dict[str, list[Any]]:
        """Returns flat lists of equal length, one entry per update, for ``pandas.DataFrame``.

        ``"step"``, ``"loss"``, ``"skipped"``, and for each hyperparameter ``"<name>"``,
        ``"<name>_grad"`` and ``"<name>_tangent_norm"`` where there are any; for one of several
        elements ``"<name>[i]"`` (``"<name>[i,j]"``), above 1 000 elements ``"<name>.mean"`` and so
        on. NaN where an update has no such number.

        Example:
            >>> callback.history.columns()["step"]
            [5, 10, 15, 20]
        """
        columns: dict[str, list[Any]] = {"step": [], "loss": [], "skipped": []}
        for i, record in enumerate(self):
            row: dict[str, Any] = {
                "step": record.step,
                "loss": math.nan if record.loss is None else record.loss,
                "skipped": record.skipped,
            }
            for part, name, value in _entries(record):
                row.update(_cells(name, _SUFFIXES[part], value))
            if record.outcome is not None:
                row["outcome"] = record.outcome
            for name in [n for n in row if n not in columns]:
                columns[name] = [math.nan] * i
            for name, column in columns.items():
                column.append(row.get(name, math.nan))
        return columns

    def tables(self) -> dict[str, dict[str, Tensor]]:
        """Returns the numbers of all updates at once, in a time that suits long trainings.

        Returns:
            For each of ``"values"``, ``"hypergradients"`` and ``"tangent_norms"``, and each name, a
            tensor with a row for each update: the elements, or ``min``, ``mean``, ``max`` and
            ``norm`` of a summary. NaN where an update has no such entry, or another number of
            elements than the last one.

        Example:
            >>> callback.history.tables()["values"]["l2"].shape
            torch.Size([4, 1])
        """
        tables: dict[str, dict[str, Tensor]] = {part: {} for part in _SUFFIXES}
        starts = [start for start, _ in self._layouts]
        ends = [*starts[1:], len(self)][: len(starts)]
        for (start, layout), end in zip(self._layouts, ends, strict=True):
            size = sum(shape.length for _, _, shape in layout)
            if size == 0:
                continue
            first = self._starts[start]
            block = self._numbers[first : first + size * (end - start)]
            whole = torch.frombuffer(block, dtype=torch.float64).reshape(end - start, size)
            parts = whole.split([shape.length for _, _, shape in layout], dim=1)
            for (part, name, shape), rows in zip(layout, parts, strict=True):
                table = tables[part].get(name)
                if table is None or table.shape[1] != shape.length:
                    table = rows.new_full((len(self), shape.length), math.nan)
                    tables[part][name] = table
                table[start:end] = rows
        return tables

    def steps(self) -> Tensor:
        """Returns the step of each update.

        Example:
            >>> callback.history.steps().tolist()
            [5.0, 10.0, 15.0, 20.0]
        """
        return torch.tensor(self._steps, dtype=torch.float64)

    def loss_at(self, index: int) -> float:
        """Returns L_V of one update; NaN where it was not asked for.

        Args:
            index: That of the update, from 0; negative from the end.

        Example:
            >>> callback.history.loss_at(-1) == callback.history[-1].loss
            True
        """
        return self._losses[index]

    def losses(self) -> Tensor:
        """Returns L_V of each update; NaN where it was not asked for.

        Example:
            >>> losses = callback.history.losses()
            >>> best = callback.history[losses.argmin()]  # the update with the lowest held-out loss
        """
        return torch.tensor(self._losses, dtype=torch.float64)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"History of {len(self)} records"


_Layout = list[tuple[str, str, "_Shape"]]


def _entries(record: HistoryRecord) -> list[tuple[str, str, Any]]:
    """Lists the entries of a record, each with the attribute and the name that it stands under."""
    return [
        (part, name, value)
        for part in ("values", "hypergradients", "tangent_norms")
        for name, value in (getattr(record, part) or {}).items()
    ]


class _Shape(NamedTuple):
    """What an entry of a record is made of."""

    kind: str
    size: tuple[int, ...] = ()
    dtype: torch.dtype | None = None

    @classmethod
    def of(cls, value: Any) -> _Shape:
        if isinstance(value, dict):
            return cls("summary", (len(_SUMMARY),))
        if isinstance(value, Tensor):
            return cls("tensor", tuple(value.shape), value.dtype)
        if isinstance(value, list):
            return cls("list", tuple(torch.tensor(value).shape))
        return cls("number")

    @property
    def length(self) -> int:
        return math.prod(self.size)

    def flatten(self, value: Any) -> list[float]:
        if self.kind == "summary":
            return [value[key] for key in _SUMMARY]
        numbers = torch.as_tensor(value, dtype=torch.float64)
        flat: list[float] = numbers.flatten().tolist()
        return flat

    def restore(self, numbers: array[float]) -> Any:
        if self.kind == "number":
            return numbers[0]
        if self.kind == "summary":
            return dict(zip(_SUMMARY, numbers, strict=True))
        tensor = torch.tensor(numbers, dtype=torch.float64).reshape(self.size)
        return tensor.to(self.dtype) if self.kind == "tensor" else tensor.tolist()


_SUMMARY = ("min", "mean", "max", "norm")

_SUFFIXES = {"values": "", "hypergradients": "_grad", "tangent_norms": "_tangent_norm"}


def _cells(name: str, suffix: str, value: Any) -> dict[str, float]:
    """Names every number of an entry."""
    if isinstance(value, dict):
        return {f"{name}.{key}{suffix}": number for key, number in value.items()}
    numbers = torch.as_tensor(value, dtype=torch.float64)
    if numbers.numel() == 1:
        return {f"{name}{suffix}": numbers.item()}
    places = product(*map(range, numbers.shape))
    return {
        f"{name}[{','.join(map(str, place))}]{suffix}": number
        for place, number in zip(places, numbers.flatten().tolist(), strict=True)
    }


def make_record(
    step: int,
    hyperparameters: Mapping[str, Hyperparameter],
    hypergradients: Mapping[str, Tensor],
    tangent_norms: Mapping[str, Tensor] | None,
    skipped: int,
    outcome: str | None = None,
    loss: float | None = None,
) -> HistoryRecord:
    """Collects a record; every tensor is copied to the CPU."""
    return HistoryRecord(
        step=step,
        values={name: as_numbers(h.value) for name, h in hyperparameters.items()},
        hypergradients={
            name: _summary(h) if h.numel() > SUMMARY_ABOVE else h.detach().cpu().clone()
            for name, h in hypergradients.items()
        },
        tangent_norms=None
        if tangent_norms is None
        else {name: as_numbers(t) for name, t in tangent_norms.items()},
        skipped=skipped,
        outcome=outcome,
        loss=loss,
    )


def log_record(
    trainer: pl.Trainer,
    record: HistoryRecord,
    step: int,
    chances: Mapping[str, Mapping[str, float]],
) -> None:
    """Sends a record to every logger.

    Names: ``hpo/<name>`` (the value), ``hpo/<name>_grad`` and ``hpo/<name>_tangent_norm``. A
    hyperparameter of several elements is logged as its mean, minimum and maximum; one that is
    chosen among a few, as the probability ``hpo/<name>/<choice>`` of each and their entropy.
    """
    values = _flat_values(record, chances)
    others: dict[str, float] = {}
    for name in record.values:
        # Of several estimators one may have had no estimate, or keep no tangents.
        if name in record.hypergradients:
            others.update(_flat(f"hpo/{name}_grad", record.hypergradients[name]))
        if record.tangent_norms is not None and name in record.tangent_norms:
            others.update(_flat(f"hpo/{name}_tangent_norm", record.tangent_norms[name]))
    for logger in trainer.loggers:
        logger.log_metrics({**values, **others}, step=step)


def log_interval(trainer: pl.Trainer) -> int:
    """Returns the trainer's ``log_every_n_steps``; 0 where nothing is to be logged."""
    return int(getattr(trainer, "log_every_n_steps", 1))


def show_record(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    record: HistoryRecord,
    chances: Mapping[str, Mapping[str, float]],
) -> None:
    """Gives the first values of a record to the progress bar, and to callbacks that watch them."""
    if trainer.barebones:
        return  # Lightning warns of every module.log then
    # Logging through the module costs a third of a millisecond per name: only what the progress
    # bar has room for. Lightning reads these numbers again at every step: on a GPU, where it would
    # put plain ones, the host would have to wait for that.
    shown = {
        name: torch.tensor(value, device="cpu")
        for name, value in list(_flat_values(record, chances).items())[:_PROGRESS_BAR_NAMES]
    }
    module.log_dict(shown, on_step=True, on_epoch=False, prog_bar=True, logger=False)


def _flat_values(
    record: HistoryRecord, chances: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    values: dict[str, float] = {}
    for name, value in record.values.items():
        values.update(chances[name] if name in chances else _flat(f"hpo/{name}", value))
    return values


def as_numbers(tensor: Tensor) -> Any:
    """Returns values as the history has them: a number, a list, or a summary."""
    if tensor.numel() == 1:
        return tensor.item()
    return _summary(tensor) if tensor.numel() > SUMMARY_ABOVE else tensor.tolist()


def _summary(tensor: Tensor) -> dict[str, float]:
    t = tensor.detach()
    numbers = (t.min(), t.mean(), t.max(), torch.linalg.vector_norm(t))
    return {key: number.item() for key, number in zip(_SUMMARY, numbers, strict=True)}


def _flat(name: str, value: Any) -> dict[str, float]:
    """Returns the scalars to log for a number, a tensor, a nested list or a summary."""
    if isinstance(value, float):
        return {name: value}
    if not isinstance(value, dict):
        tensor = torch.as_tensor(value, device="cpu")
        if tensor.numel() == 1:
            return {name: tensor.item()}
        value = _summary(tensor)
    return {f"{name}/{key}": value[key] for key in ("mean", "min", "max")}
