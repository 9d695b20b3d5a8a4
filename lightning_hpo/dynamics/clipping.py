"""Gradient clipping as part of the dynamics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hpo._tensors import is_on_host, rows
from lightning_hpo.distributed import norm_over_shards, sum_over_shards


@dataclass(frozen=True)
class GradientClipping:
    r"""The derivative of ``Trainer(gradient_clip_val=..., gradient_clip_algorithm=...)``.

    By norm, with n = ‖g‖ over all parameters and c = value / (n + 1e-6):

        ĝ = min(1, c) g,   ∂ĝ/∂g = c I − c g gᵀ / (n (n + 1e-6))   where c < 1, else I.

    By value: ĝ = clamp(g, −value, value), whose derivative is 1 inside and 0 outside.

    Both are symmetric, so one product serves tangents and adjoints.

    Args:
        value: The Trainer's ``gradient_clip_val``.
        by_value: Whether the algorithm is ``"value"``; ``"norm"`` otherwise.
        sharded: Whether gradients and vectors are local slices of sharded parameters.
    """

    value: float
    by_value: bool = False
    sharded: bool = False

    def acts_on(self, gradients: list[Tensor | None]) -> bool:
        """Whether anything is clipped; True where looking would make the host wait for a device."""
        present = [g for g in gradients if g is not None]
        if not present or not is_on_host(present[0]):
            return bool(present)
        if self.by_value:
            return any(not bool((g.abs() <= self.value).all()) for g in present)
        return not float(self._norm(present)) + 1e-6 <= self.value

    def clip_(self, gradients: list[Tensor | None]) -> None:
        """Clips gradients in place, as the Trainer does."""
        present = [g for g in gradients if g is not None]
        if self.by_value:
            for g in present:
                g.clamp_(-self.value, self.value)
        elif present:
            norm = self._norm(present)
            torch._foreach_mul_(present, (self.value / (norm + 1e-6)).clamp(max=1.0))

    def product_(self, gradients: list[Tensor | None], vectors: list[Tensor]) -> None:
        """Multiplies ∂ĝ/∂g with m vectors, in place.

        Args:
            gradients: g before clipping; None for a parameter that takes no part.
            vectors: One tensor ``(m, *p.shape)`` per parameter.
        """
        pairs = [(g, v) for g, v in zip(gradients, vectors, strict=True) if g is not None]
        if not pairs:
            return
        if self.by_value:
            for g, v in pairs:
                v.mul_(g.abs() <= self.value)
            return
        scale, share = self.by_norm([g for g, _ in pairs])
        if is_on_host(scale) and float(scale) == 1:
            return
        dots = sum(rows(v) @ g.to(v.dtype).flatten() for g, v in pairs)
        assert isinstance(dots, Tensor)
        weights = share * sum_over_shards(dots, self.sharded)
        for g, v in pairs:
            v.sub_(weights.reshape(-1, *[1] * g.dim()) * g).mul_(scale)

    def by_norm(self, gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns s and a of ∂ĝ/∂g = s (I − a g gᵀ); 1 and 0 where nothing is clipped.

        Args:
            gradients: g before clipping.
        """
        norm = self._norm(gradients)
        scale = self.value / (norm + 1e-6)
        share = torch.where(scale < 1, 1 / (norm * (norm + 1e-6)), 0.0)
        return scale.clamp(max=1.0), share

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        norms = torch.stack(
            [
                torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32))
                for g in gradients
            ]
        )
        return norm_over_shards(torch.linalg.vector_norm(norms), self.sharded)
