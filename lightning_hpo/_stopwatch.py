"""How much of a training's time is spent in this package."""

from __future__ import annotations

from time import perf_counter


class Stopwatch:
    """Adds up the time spent in its ``with`` blocks, on the host: no device is waited for.

    Blocks must not lie in one another. A class, since a generator would cost ten times as much at
    every idle step.

    Attributes:
        inside: The seconds spent in blocks.
    """

    def __init__(self) -> None:
        self.inside = 0.0
        self._made = self._entered = perf_counter()
        self._total: float | None = None

    def __enter__(self) -> None:
        self._entered = perf_counter()

    def __exit__(self, *_: object) -> None:
        self.inside += perf_counter() - self._entered

    @property
    def total(self) -> float:
        """The seconds since this was made, up to :meth:`stop`."""
        return perf_counter() - self._made if self._total is None else self._total

    def stop(self) -> None:
        """Ends the training that is measured."""
        self._total = self.total
