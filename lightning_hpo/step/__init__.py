"""One training step as a map, and its derivative."""

from lightning_hpo.step.backends import settle, settle_statistics
from lightning_hpo.step.buffers import (
    check_buffers,
    find_buffers,
    follow_newly_written,
    warn_of_newly_written,
)
from lightning_hpo.step.effect import Effect
from lightning_hpo.step.forward_check import check_forward
from lightning_hpo.step.numbers import read_as_numbers, warn_of_other_paths
from lightning_hpo.step.recorder import Observer, Recorder
from lightning_hpo.step.snapshot import Snapshot
from lightning_hpo.step.space import Space
from lightning_hpo.step.step import Step
from lightning_hpo.step.tangents import Tangents
from lightning_hpo.step.trace_check import TraceCheck
from lightning_hpo.step.training_map import TrainingMap
from lightning_hpo.step.validation import ExpectedValidation, ValidationGradient
from lightning_hpo.step.value_check import check_value

__all__ = [
    "Effect",
    "ExpectedValidation",
    "Observer",
    "Recorder",
    "Snapshot",
    "Space",
    "Step",
    "Tangents",
    "TraceCheck",
    "TrainingMap",
    "ValidationGradient",
    "check_buffers",
    "check_forward",
    "check_value",
    "find_buffers",
    "follow_newly_written",
    "read_as_numbers",
    "settle",
    "settle_statistics",
    "warn_of_newly_written",
    "warn_of_other_paths",
]
