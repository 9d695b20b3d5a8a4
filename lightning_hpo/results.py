"""What the trainings of a callback, and of its copies, have shown."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lightning_hpo.diagnosis import Diagnosis
from lightning_hpo.monitoring import History, HistoryRecord
from lightning_hpo.strategy import Strategy


@dataclass
class Result:
    """What one training has shown; see :class:`~lightning_hpo.OnlineHPOCallback`.

    Attributes:
        history: One record per update.
        skipped: How many updates were skipped.
        diagnosis: What else has been seen; None before a training.
        strategy: What has acted; None before a training.
    """

    history: History = field(default_factory=History)
    skipped: int = 0
    diagnosis: Diagnosis | None = None
    strategy: Strategy | None = None


class Results:
    """The results of whichever training is to be shown.

    Some packages train with a copy of the callback that they were given. Copies in memory share the
    results of whichever began to train last; each keeps those of its own training for itself.
    """

    def __init__(self) -> None:
        self._latest: list[Result] = [Result()]
        self._own: Result | None = None

    def begin(
        self,
        records: Iterable[HistoryRecord],
        skipped: int,
        diagnosis: Diagnosis,
        strategy: Strategy,
    ) -> None:
        """Starts anew, for a training of this callback."""
        self._own = self._latest[0] = Result(History(records), skipped, diagnosis, strategy)

    @property
    def here(self) -> Result:
        """The result of this callback's training; before one, that of its copies."""
        return self._latest[0] if self._own is None else self._own

    def __deepcopy__(self, memo: dict[int, Any]) -> Results:
        other = Results()
        other._latest = self._latest
        other._own = copy.deepcopy(self._own, memo)
        return other
