"""What a step finds in the place of loggers and the profiler while it must leave no trace."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.profilers import PassThroughProfiler


class MutedLogger:
    """Tells what a logger tells (folder, name, version, options) and writes nothing.

    It passes for an instance of the logger's class, so that ``trainer.log_dir`` is as usual. Its
    methods do nothing; ``experiment`` takes everything and does nothing.

    Args:
        logger: The logger.
    """

    def __init__(self, logger: Logger) -> None:
        self._muted_logger = logger

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._muted_logger)

    @property
    def experiment(self) -> Any:
        """Takes everything and does nothing."""
        return DummyLogger().experiment

    def __getattr__(self, name: str) -> Any:
        if name == "_muted_logger":  # not yet set, as in a copy
            raise AttributeError(name)
        value = getattr(self._muted_logger, name)
        return _nothing if callable(value) else value

    def __getitem__(self, index: Any) -> MutedLogger:
        return self


class MutedProfiler(PassThroughProfiler):
    """Measures nothing, and has the attributes of the profiler besides.

    Args:
        profiler: The profiler.
    """

    def __init__(self, profiler: Any) -> None:
        super().__init__()
        self._muted_profiler = profiler

    def __getattr__(self, name: str) -> Any:
        if name == "_muted_profiler":  # not yet set, as in a copy
            raise AttributeError(name)
        return getattr(self._muted_profiler, name)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Takes the place of a method."""
