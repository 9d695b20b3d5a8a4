"""The type of a training loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], "Tensor | None"]
"""L_T as a pure function of (θ, λ); None where the step has no loss (a skipped batch)."""
