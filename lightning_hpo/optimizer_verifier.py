"""Whether the steps of an optimizer can be followed."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_hpo import compatibility
from lightning_hpo.dynamics import Dynamics, GenericDynamics, OptimizerStep, Verification


class OptimizerVerifier:
    """Refuses an optimizer whose step has no derivative: before it moves θ, where that is seen."""

    def __init__(self, dynamics: Dynamics, module: pl.LightningModule) -> None:
        self._dynamics = dynamics
        self._module = module
        self._verification: Verification | None = None
        if isinstance(dynamics, GenericDynamics) and dynamics.is_foreign:
            self._verification = Verification(dynamics)
            reason = self._verification.closure()
            compatibility.refuse(compatibility.unfollowed(dynamics.optimizer, reason))

    def before(self, step: OptimizerStep, *, is_first: bool) -> None:
        """Looks at a step that is about to happen."""
        # More may have joined the training since its start.
        trained = (p for p in self._dynamics.theta if p.requires_grad)
        findings = compatibility.check_complex(trained, self._module)
        if self._verification is not None and not findings:
            reason = self._verification.before(step)
            findings = compatibility.unfollowed(self._dynamics.optimizer, reason)
        if is_first and not findings:
            findings = compatibility.check_elementwise(self._dynamics, step)
        compatibility.refuse(findings)

    def after(self) -> None:
        """Looks at a step that has happened."""
        if self._verification is not None:
            reason = self._verification.after()
            compatibility.refuse(compatibility.unfollowed(self._dynamics.optimizer, reason))
